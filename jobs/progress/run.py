"""How a run reports its progress: a live view on a terminal, lines of text or JSON elsewhere."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping

from jobs.logging import is_json, is_live, live, log_event
from jobs.progress.run_view import RunView
from jobs.progress.time_left import expected
from pipeline.executor.protocol import Allocation, ExecutorError
from pipeline.executor.work_spans import Doing
from pipeline.plan import Plan
from pipeline.run.events import Report, Step
from quantizer.schemes import scheme_to_dict

_TROUBLE = frozenset({"damaged", "lost", "fewer"})
_ASKING_SECONDS = 0.5


@contextlib.contextmanager
def watch(
    plan: Plan,
    allocation: Allocation,
    doing: Callable[[], Mapping[int, Doing]] = dict,
) -> Iterator[Report]:
    """Yield what a run is to report to.

    Args:
        doing: asks the workers what they do, from another thread, for whoever looks at a terminal.
    """
    if is_json():
        yield lambda step: _log_values(plan, step)
        return
    if not is_live():
        yield lambda step: log_event(step.event, _message(plan, step))
        return
    view = RunView(plan=plan, num_workers=allocation.workers)

    def report(step: Step) -> None:
        view.report(step)
        if step.text:
            log_event(step.event, f"{step.event}: {step.text}")

    with live(lambda: view), _asking(view, plan, allocation, doing):
        yield report


@contextlib.contextmanager
def _asking(
    view: RunView,
    plan: Plan,
    allocation: Allocation,
    doing: Callable[[], Mapping[int, Doing]],
) -> Iterator[None]:
    """Find out what the view needs, in a thread, so that the run waits for none of it."""
    is_over = threading.Event()

    def ask() -> None:
        view.expected = expected(plan, allocation)
        while not is_over.wait(_ASKING_SECONDS):
            try:
                view.hear(doing())
            except ExecutorError:
                view.hear({})  # the run itself says what is wrong with the cluster

    thread = threading.Thread(target=ask, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _message(plan: Plan, step: Step) -> str:
    if step.record is not None and step.part is not None:
        # Of parts solved side by side, the first reports the seconds of all.
        stages = "".join(f", {name} {value:.1f}s" for name, value in step.seconds.items())
        done = f"committed {step.part + 1}/{len(plan.parts)}"
        if plan.makes == "statistics":  # of which there are none outside the blocks
            done = f"captured {step.part}/{plan.num_blocks}"
        return f"{done} {plan.parts[step.part].name}: {step.record.size_bytes:,} bytes{stages}"
    return f"{step.event}: {step.text}" if step.text else ""


def _log_values(plan: Plan, step: Step) -> None:
    """Also what people do not see: each layer's report, and steps without words."""
    about: dict[str, object] = {"parts": len(plan.parts)}
    if step.part is not None:
        about |= {"part": step.part, "block": plan.parts[step.part].name}
    for layer in () if step.record is None else step.record.layers:
        scheme = None if layer.scheme is None else scheme_to_dict(layer.scheme)
        fields = {"layer": layer.path, "scheme": scheme, "account": layer.account}
        log_event("layer", layer.note, {**about, **fields})
    if step.record is not None:
        about["size_bytes"] = step.record.size_bytes
    log_event(
        step.event,
        _message(plan, step) or step.event,
        about | {"seconds": {name: round(value, 3) for name, value in step.seconds.items()}},
        level=logging.WARNING if step.event in _TROUBLE else logging.INFO,
    )
