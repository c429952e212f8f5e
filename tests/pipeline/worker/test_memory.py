"""Freed memory is returned when a process has grown, and not after every block."""

from __future__ import annotations

import pytest

from pipeline.worker import memory as free_memory
from pipeline.worker.memory import FreedMemory, make_room

MEBI = 1 << 20


@pytest.fixture
def handed_back(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows whenever memory is returned."""
    times: list[None] = []
    monkeypatch.setattr(free_memory, "hand_back", lambda: times.append(None))
    return times


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ([100, 110, 116], [1, 0, 0]),
        ([100, 117, 100, 117], [1, 1, 0, 1]),
        ([300, 100, 110, 120], [1, 0, 0, 1]),
        ([None, None], [1, 1]),
    ],
)
def test_memory_is_returned_at_first_and_when_the_process_has_grown(
    sizes: list[int | None],
    wanted: list[int],
    handed_back: list[None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    freed = FreedMemory()
    for size, times in zip(sizes, wanted, strict=True):
        monkeypatch.setattr(free_memory, "_resident_bytes", lambda size=size: size and size * MEBI)
        handed_back.clear()
        freed.limit()
        assert len(handed_back) == times


def test_room_is_made_for_large_arrays_only(handed_back: list[None]) -> None:
    make_room(16 * MEBI - 1)
    assert not handed_back
    make_room(16 * MEBI)
    assert handed_back


def test_resident_memory_includes_what_was_touched() -> None:
    before = free_memory._resident_bytes()
    touched = bytearray(b"1" * (64 * MEBI))
    after = free_memory._resident_bytes()
    assert before is not None
    assert after is not None
    assert 60 * MEBI < after - before < 200 * MEBI, len(touched)
