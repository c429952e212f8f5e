"""What a worker knows of its model serves the thread that computes, and those beside it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import pipeline.worker.model_state
from pipeline.weights.source import Source
from pipeline.worker.model_state import ModelState
from tests.pipeline.tiny_runs import NUM_BLOCKS, planned, source


def test_threads_share_a_model_that_is_built_before_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keras must not build one model in a thread that commits while it traces another."""
    state = ModelState(planned("gptq").plan, str(source()))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("built late")

    for name in ("build_skeleton", "find_blocks", "cut_parts"):
        monkeypatch.setattr(pipeline.worker.model_state, name, refuse)
    prepare, inside = Source.prepare, threading.Lock()

    def alone(opened: Source) -> None:
        assert inside.acquire(blocking=False), "two threads find out the same"
        time.sleep(0.05)
        prepare(opened)
        inside.release()

    monkeypatch.setattr(Source, "prepare", alone)
    with ThreadPoolExecutor(NUM_BLOCKS + 1) as pool:
        found = list(pool.map(state.read, range(NUM_BLOCKS + 1)))
    assert [part.number for part in state.parts] == list(range(NUM_BLOCKS + 1))
    for part, values in enumerate(found):
        again = state.read(part)
        assert set(again) == set(values)
        assert all((again[path] == value).all() for path, value in values.items())
