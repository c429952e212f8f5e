"""The driver of one run: a plan carried out block by block, each committed as soon as it is solved.

It holds no arrays and no Keras: keys and handles go out, small records come back. What is in
storage decides where it starts, so resuming is the same as running.

Who is asked for what while one block is captured and solved: handles only, no arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.errors import DamagedObjectError, PipelineError, PlanMismatchError
from pipeline.executor.protocol import Executor, ExecutorError, WorkerLostError
from pipeline.plan import PLAN_KEY, LayerPlan, PartPlan, Plan, read_plan
from pipeline.reduction import Subtree, join, split
from pipeline.run import activations
from pipeline.run.commits import committed_parts, quarantine
from pipeline.run.events import Report, Step
from pipeline.run.records import Manifest, PartRecord
from pipeline.storage.object_store import ObjectStore

_MOST_LOSSES = 10
"""In a row, with nothing committed between them."""


def claim(store: ObjectStore, plan: Plan, windows: bytes | None = None) -> Plan:
    """Write the plan into an empty run directory, or make sure that it is the one there.

    Args:
        windows: the token windows that the plan names; written before it, so that a plan can
            always be carried out.

    Raises:
        PlanMismatchError: the directory belongs to another plan, or holds other things.
    """
    if store.exists(PLAN_KEY):
        found = read_plan(store)
        if found.digest != plan.digest:
            raise PlanMismatchError(
                f"{store.url(PLAN_KEY)} is the plan of another run ({_difference(found, plan)}); "
                "choose another --output, or resume that run with what it was started with"
            )
        return found
    foreign = [key for key in store.list() if not key.startswith(("tokens/", "leases/"))]
    if foreign:
        raise PlanMismatchError(
            f"{store.url(foreign[0])} is there already, and no {PLAN_KEY} beside it; choose an "
            "empty --output"
        )
    if plan.tokens is not None and windows is not None:
        store.create(plan.tokens.key, windows)
    store.create(PLAN_KEY, plan.to_json())
    return plan


def quantize(
    plan: Plan,
    store: ObjectStore,
    executor: Executor,
    report: Report,
    *,
    keep_every: int = 8,
    check_lease: Callable[[], None] = lambda: None,
) -> Manifest:
    """Carry a plan out, from wherever storage says it stands, to its manifest.

    Args:
        plan: the one at the run's root (see `claim`).
        store: opened at the run's root.
        executor: workers for this plan.
        report: is told what happens.
        keep_every: blocks between activations kept in storage.
        check_lease: raises where another driver has taken over; asked before anything is moved
            or deleted, and before every block.

    Raises:
        PipelineError: what repetition does not mend; resuming goes on from the last block.
    """
    losses, committed = 0, -1
    # Once is enough until something is found damaged: the end of the run reads all of it again.
    verify = True
    while True:
        records: dict[int, PartRecord] = {}
        try:
            records |= _committed(plan, store, report, check_lease, verify=verify)
            _quantize_alone(plan, executor, records, report)
            if plan.chained:
                _quantize_in_turn(plan, store, executor, records, report, keep_every, check_lease)
            [manifest] = executor.fetch([executor.submit(0, "seal", records)])
        except (WorkerLostError, DamagedObjectError) as error:
            losses = losses + 1 if len(records) <= committed else 1
            committed = max(committed, len(records))
            if losses > _MOST_LOSSES:
                raise _given_up(error) from error
            verify = isinstance(error, DamagedObjectError)
            if isinstance(error, WorkerLostError):
                text = f"a worker was lost ({error}); its work is done again"
                report(Step(event="lost", text=text))
                for change in executor.revive():
                    report(Step(event="fewer", text=change))
            else:
                report(Step(event="damaged", text=f"{error}; it is made again"))
        else:
            report(Step(event="sealed", seconds=executor.seconds()))
            return manifest  # type: ignore[no-any-return]


def _given_up(error: Exception) -> PipelineError:
    if isinstance(error, DamagedObjectError):
        return DamagedObjectError(
            f"objects are damaged again and again, {_MOST_LOSSES} times in a row, the last: "
            f"{error}; check the store, then resume"
        )
    return ExecutorError(
        f"workers were lost {_MOST_LOSSES} times without one more block committed, the last by "
        f"{error}; check the memory and logs of the cluster's nodes, then resume"
    )


def _committed(
    plan: Plan,
    store: ObjectStore,
    report: Report,
    check_lease: Callable[[], None],
    *,
    verify: bool,
) -> dict[int, PartRecord]:
    found = committed_parts(
        store,
        plan_digest=plan.digest,
        num_blocks=plan.num_blocks,
        chained=plan.chained,
        verify=verify,
    )
    for finding in found.findings:
        report(Step(event="damaged", text=finding.problem))
    if found.findings:
        check_lease()
        quarantine(store, found.findings)
    if found.parts:
        report(
            Step(
                event="resumed",
                parts=tuple(found.parts),
                text=f"{len(found.parts)} of {len(plan.parts)} parts were committed before",
            )
        )
    return dict(found.parts)


def _quantize_alone(
    plan: Plan, executor: Executor, records: dict[int, PartRecord], report: Report
) -> None:
    """The parts that depend on nothing: all of them without calibration, else what is no block."""
    parts = [0] if plan.chained else range(len(plan.parts))
    pending = [part for part in parts if part not in records]
    for start in range(0, len(pending), executor.num_workers):
        wave = pending[start : start + executor.num_workers]
        handles = [executor.submit(i, "quantize_alone", part) for i, part in enumerate(wave)]
        for record in executor.fetch(handles):
            _note(records, record, executor, report)


def _quantize_in_turn(
    plan: Plan,
    store: ObjectStore,
    executor: Executor,
    records: dict[int, PartRecord],
    report: Report,
    keep_every: int,
    check_lease: Callable[[], None],
) -> None:
    """The blocks, each calibrated on what the quantized ones before it give."""
    first = next((b for b in range(plan.num_blocks) if b + 1 not in records), plan.num_blocks)
    if first == plan.num_blocks:
        return
    assert plan.tokens is not None
    num_shards = len(plan.tokens.shards)
    shares = split(num_shards, executor.num_workers)
    shards = [[leaf for subtree in share for leaf in subtree.leaves] for share in shares]
    start = activations.latest(store, first, num_shards)
    values = executor.submit(first % executor.num_workers, "read", first + 1)
    executor.fetch(
        [executor.submit(w, "restore", first, held, start) for w, held in enumerate(shards) if held]
    )
    for block in range(first, plan.num_blocks):
        check_lease()
        part = plan.parts[block + 1]
        last = block + 1 == plan.num_blocks
        following = (
            None if last else executor.submit(block % executor.num_workers, "read", block + 2)
        )
        solved = solve_in_turn(part, block, executor, shares, values)
        previous = records[block].record_sha256 if block else ""
        record = executor.submit(
            block % executor.num_workers, "commit", block + 1, previous, values, *solved
        )
        moved = [
            executor.submit(w, "propagate", block, held, values, *solved)
            for w, held in enumerate(shards)
            if held and not last
        ]
        _note(records, executor.fetch([record])[0], executor, report)
        executor.fetch(moved)
        if not last and (block + 1) % keep_every == 0:
            _keep(store, executor, block + 1, shards, report, check_lease)
        values = following


def _keep(
    store: ObjectStore,
    executor: Executor,
    block: int,
    shards: Sequence[Sequence[int]],
    report: Report,
    check_lease: Callable[[], None],
) -> None:
    kept: dict[int, activations.Kept] = {}
    for found in executor.fetch(
        [executor.submit(w, "keep", block, held) for w, held in enumerate(shards) if held]
    ):
        kept |= found
    activations.finish(store, block, kept)
    check_lease()
    activations.discard(store, block)
    report(Step(event="kept", part=block))


def _note(
    records: dict[int, PartRecord], record: PartRecord, executor: Executor, report: Report
) -> None:
    records[record.part] = record
    report(Step(event="committed", part=record.part, record=record, seconds=executor.seconds()))


def _difference(found: Plan, wanted: Plan) -> str:
    """What of two plans differs: fields by name; of machine and versions, what they are."""
    fields = ["source_digest", "recipe", "tokens"]
    if found.source_digest == wanted.source_digest:
        fields.append("parts")  # they name the weights too
    other = [f"other {name}" for name in fields if getattr(found, name) != getattr(wanted, name)]
    theirs, ours = found.machine | found.versions, wanted.machine | wanted.versions
    other += [
        f"{name} {theirs.get(name)} there, {ours.get(name)} here"
        for name in sorted(theirs | ours)
        if theirs.get(name) != ours.get(name)
    ]
    return "; ".join(other)


def solve_in_turn(
    part: PartPlan, block: int, executor: Executor, shares: Sequence[Sequence[Subtree]], values: Any
) -> list[Any]:
    """Handles to the solved layers: those that need no calibration, then group after group.

    Each group is calibrated on what the quantized ones before it give. Its layers, or slices of
    their rows, are solved side by side.
    """
    schemed = {layer.name: layer for layer in part.layers if layer.scheme is not None}
    calibrated = {name for group in part.groups for name in group.targets}
    alone = [layer.path for name, layer in schemed.items() if name not in calibrated]
    solved = [executor.submit(0, "solve", part.part, alone, values, None)] if alone else []
    for stage, group in enumerate(part.groups):
        total = _capture(block, stage, executor, shares, values, solved)
        layers = [schemed[name] for name in group.targets]
        whole, cut = shared(layers, executor.num_workers)
        solved += [
            executor.submit(worker, "solve", part.part, paths, values, total)
            for worker, paths in enumerate(whole)
            if paths
        ]
        slices = [
            executor.submit(worker, "solve_slices", part.part, numbers, values, total)
            for worker, numbers in enumerate(cut)
            if numbers
        ]
        if slices:
            paths = sorted({path for numbers in cut for path in numbers})
            solved.append(executor.submit(0, "join", part.part, paths, values, *slices))
    return solved


def shared(
    layers: Sequence[LayerPlan], num_workers: int
) -> tuple[list[list[str]], list[dict[str, list[int]]]]:
    """Who solves what of some layers of one input: whole layers, and slices of others.

    The costliest slice goes first, each to the worker with the least to do. By worker: paths of
    the layers that it solves alone, and numbers of slices of those that it shares.
    """
    units = [
        (-(-layer.out_features // layer.slices), layer.path, number)
        for layer in layers
        for number in range(layer.slices)
    ]
    load = [0] * num_workers
    taken: list[dict[str, list[int]]] = [{} for _ in load]
    for rows, path, number in sorted(units, key=lambda unit: (-unit[0], unit[1:])):
        worker = load.index(min(load))
        load[worker] += rows
        taken[worker].setdefault(path, []).append(number)
    slices = {layer.path: layer.slices for layer in layers}
    alone = [[path for path in one if len(one[path]) == slices[path]] for one in taken]
    cut = [{path: one[path] for path in one if len(one[path]) < slices[path]} for one in taken]
    return alone, cut


def _capture(
    block: int,
    stage: int,
    executor: Executor,
    shares: Sequence[Sequence[Subtree]],
    values: Any,
    solved: Sequence[Any],
) -> Any:
    """Handle to the sum of one group's input over all shards."""
    by_subtree = [
        (worker, executor.submit(worker, "capture", block, stage, subtree, values, *solved))
        for worker, share in enumerate(shares)
        for subtree in share
    ]
    # The left one's worker adds: its sum need not travel.
    return join(
        by_subtree,
        lambda left, right: (left[0], executor.submit(left[0], "merge", left[1], right[1])),
    )[1]
