"""Clusters that cannot be joined are refused at once, and heads that went away are noticed."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from pipeline.executor import ray_cluster as joined_cluster
from pipeline.executor.protocol import ExecutorError
from pipeline.executor.ray_cluster import Head, joined


def test_a_ray_client_is_refused_with_the_remedy() -> None:
    with (
        pytest.raises(
            ExecutorError, match=r"ray://head:10001: .*--address auto.*quantfleet submit"
        ),
        joined("ray://head:10001"),
    ):
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Seconds that a test sets."""
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr(joined_cluster, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What a head listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = "{}:{}".format(*listening.getsockname())
        context = SimpleNamespace(gcs_address=address)
        monkeypatch.setattr(
            joined_cluster, "ray", SimpleNamespace(get_runtime_context=lambda: context)
        )
        yield listening


def test_a_head_that_stays_away_is_given_up_after_half_a_minute(
    clock: SimpleNamespace, door: socket.socket
) -> None:
    head = Head()
    clock.now = 10.0
    head.check()
    door.close()
    for clock.now in (20.0, 30.0, 50.0):
        head.check()
    clock.now = 51.0
    head.check()  # asked a second ago
    clock.now = 56.0
    with pytest.raises(ExecutorError, match=r"has been away for 36 s .* then resume"):
        head.check()


def test_a_head_that_comes_back_is_waited_for_anew(
    clock: SimpleNamespace, door: socket.socket
) -> None:
    head = Head()
    host, port = door.getsockname()
    door.close()
    clock.now = 20.0
    head.check()
    with socket.create_server((host, port)):
        clock.now = 40.0
        head.check()
    for clock.now in (60.0, 90.0):
        head.check()
    clock.now = 96.0
    with pytest.raises(ExecutorError, match="has been away for 36 s"):
        head.check()
