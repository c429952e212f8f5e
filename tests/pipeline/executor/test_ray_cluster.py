"""Clusters that cannot be reached are refused at once, and a lost head is noticed."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from pipeline.executor import ray_cluster
from pipeline.executor.protocol import ExecutorError
from pipeline.executor.ray_cluster import GcsMonitor, connect


def test_a_ray_client_is_refused_with_the_remedy() -> None:
    with (
        pytest.raises(
            ExecutorError, match=r"ray://head:10001: .*--address auto.*quantfleet submit"
        ),
        connect("ray://head:10001"),
    ):
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Seconds that a test sets."""
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr(ray_cluster, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The port that a head listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = "{}:{}".format(*listening.getsockname())
        context = SimpleNamespace(gcs_address=address)
        monkeypatch.setattr(
            ray_cluster, "ray", SimpleNamespace(get_runtime_context=lambda: context)
        )
        yield listening


def test_a_head_that_stays_away_ends_the_run_after_half_a_minute(
    clock: SimpleNamespace, port: socket.socket
) -> None:
    monitor = GcsMonitor()
    clock.now = 10.0
    monitor.check()
    port.close()
    for clock.now in (20.0, 30.0, 50.0):
        monitor.check()
    clock.now = 51.0
    monitor.check()  # checked a second ago
    clock.now = 56.0
    with pytest.raises(ExecutorError, match=r"has been away for 36 s .* then resume"):
        monitor.check()


def test_a_head_that_comes_back_is_given_half_a_minute_again(
    clock: SimpleNamespace, port: socket.socket
) -> None:
    monitor = GcsMonitor()
    address = port.getsockname()
    port.close()
    clock.now = 20.0
    monitor.check()
    with socket.create_server(address):
        clock.now = 40.0
        monitor.check()
    for clock.now in (60.0, 90.0):
        monitor.check()
    clock.now = 96.0
    with pytest.raises(ExecutorError, match="has been away for 36 s"):
        monitor.check()
