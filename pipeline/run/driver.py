"""The driver of one run: a plan carried out block by block, each committed as soon as it is solved.

It holds no arrays and no Keras. Storage decides where it starts, so resuming is running.

While a block is calibrated and solved, the next one is read and the one before it committed. Its
own commit begins, and calibration shards leave it, once the one before is committed: whatever dies,
at most one block has to be solved again besides the one under way, and no shard is further ahead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Concatenate

from pipeline.errors import DamagedObjectError, PipelineError, PlanMismatchError
from pipeline.executor.protocol import (
    Executor,
    ExecutorError,
    Handle,
    P,
    T,
    WorkerLostError,
    argument,
)
from pipeline.plan import PLAN_KEY, LayerPlan, Plan, read_plan
from pipeline.reduction import join, split
from pipeline.run import activations
from pipeline.run.commits import committed_parts, quarantine
from pipeline.run.events import Report, Step
from pipeline.run.records import Manifest, PartRecord
from pipeline.run.worker_api import HeldSum, InputSum, SolvedLayer, Values, WorkerApi
from pipeline.storage.object_store import ObjectStore
from quantizer.experts import expert_passes, expert_ranges

KEEP_EVERY = 8
"""Blocks between activations kept in storage, where the user does not say."""
_MOST_LOSSES = 10
"""In a row, with nothing committed between them."""


def claim(
    store: ObjectStore,
    plan: Plan,
    windows: bytes | None = None,
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> Plan:
    """Write the plan into an empty run directory, or make sure that it is the one there.

    Args:
        windows: that the plan names; written first, so that a plan can always be carried out.
        beside: other objects of a new run by key, below exports/; written first too.

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
    own = ("tokens/", "leases/", "exports/")
    foreign = [key for key in store.list() if not key.startswith(own)]
    if foreign:
        raise PlanMismatchError(
            f"{store.url(foreign[0])} is there already, and no {PLAN_KEY} beside it; choose an "
            "empty --output"
        )
    if plan.tokens is not None and windows is not None:
        store.create(plan.tokens.key, windows)
    for key, data in beside.items():
        store.put(key, data)
    store.create(PLAN_KEY, plan.to_json())
    return plan


def _difference(found: Plan, wanted: Plan) -> str:
    """How two plans differ: the names of fields, and the values for machine and versions."""
    fields = ["source_digest", "recipe", "tokens"]
    if found.source_digest == wanted.source_digest:
        fields.append("parts")  # they name the weights too
    other = [f"other {name}" for name in fields if getattr(found, name) != getattr(wanted, name)]
    theirs, ours = found.machine | found.versions, wanted.machine | wanted.versions
    return "; ".join([*other, *differences(theirs, ours, "{0} {1} there, {2} here")])


def differences(planned: Mapping[str, str], now: Mapping[str, str], form: str) -> list[str]:
    """What differs between two machines and their packages; `form` takes name and both values."""
    names = [name for name in sorted({*planned, *now}) if planned.get(name) != now.get(name)]
    return [form.format(name, planned.get(name), now.get(name)) for name in names]


def quantize(
    plan: Plan,
    store: ObjectStore,
    executor: Executor,
    report: Report,
    *,
    keep_every: int = KEEP_EVERY,
    check_lease: Callable[[], None] = lambda: None,
) -> Manifest:
    """Carry out a claimed plan, from wherever storage says it stands, to its manifest.

    Args:
        store: opened at the run's root.
        keep_every: blocks between activations kept in storage.
        check_lease: raises if another driver has taken over; called before anything is moved or
            deleted, and before a block's commit begins, when no other is under way: a driver
            commits at most one block after it has lost its lease.

    Raises:
        PipelineError: what repetition does not mend; resuming goes on from the last block.
    """
    drive = _Drive(plan, store, executor, report, keep_every, check_lease)
    losses, committed = 0, -1
    # Once is enough until something is found damaged: the end of the run reads all of it again.
    verify = True
    while True:
        try:
            return drive.attempt(verify=verify)
        except (WorkerLostError, DamagedObjectError) as error:
            losses = losses + 1 if len(drive.records) <= committed else 1
            committed = max(committed, len(drive.records))
            verify = isinstance(error, DamagedObjectError)
            if losses > _MOST_LOSSES:
                raise _give_up(error) from error
            if isinstance(error, WorkerLostError):
                text = f"a worker was lost ({error}); its work is repeated"
                report(Step(event="lost", text=text))
                for change in executor.recover():
                    report(Step(event="fewer", text=change))
            else:
                report(Step(event="damaged", text=f"{error}; it is recomputed"))
        except Exception:
            # What is solved need not be solved again by the run that resumes.
            with suppress(PipelineError, WorkerLostError):
                drive.settle()
            raise


def _give_up(error: Exception) -> PipelineError:
    if isinstance(error, DamagedObjectError):
        return DamagedObjectError(
            f"objects are damaged again and again, {_MOST_LOSSES} times in a row, the last: "
            f"{error}; check the store, then resume"
        )
    return ExecutorError(
        f"workers were lost {_MOST_LOSSES} times without one more block committed, the last by "
        f"{error}; check the memory and logs of the cluster's nodes, then resume"
    )


@dataclass(frozen=True, kw_only=True)
class _Commit:
    """The commit of a block, which may go on while the next block is under way.

    Attributes:
        record: what the commit returns.
        seconds: of work on the block, by stage.
    """

    record: Handle[PartRecord]
    seconds: Counter[str]


@dataclass
class _Drive:
    """See `quantize` for the fields that it is given.

    Attributes:
        records: of the parts committed, as far as the current attempt has come.
        subtrees: of the reduction over calibration shards, by the worker that holds these.
        committing: the part whose commit has begun, and whose record has not arrived.
        seconds: of work by stage that no report has named yet.
    """

    plan: Plan
    store: ObjectStore
    executor: Executor
    report: Report
    keep_every: int
    check_lease: Callable[[], None]
    records: dict[int, PartRecord] = field(default_factory=dict, init=False)
    subtrees: list[list[range]] = field(default_factory=list, init=False)
    committing: int | None = field(default=None, init=False)
    seconds: Counter[str] = field(default_factory=Counter, init=False)

    def attempt(self, *, verify: bool) -> Manifest:
        """Go from where storage stands to the manifest."""
        self.records = {}
        self.settle()
        self._find_committed(verify=verify)
        self._quantize_alone()
        if self.plan.chained:
            self._quantize_in_turn()
        [manifest] = self.executor.fetch(
            [self.executor.submit(0, WorkerApi.finalize, self.records)]
        )
        self.report(Step(event="sealed", seconds=dict(self._take_seconds())))
        return manifest

    def settle(self) -> None:
        """Wait for the commit that an attempt left under way, so that storage tells how it ended.

        Raises:
            WorkerLostError: its worker was lost.
        """
        if self.committing is not None:
            # Workers may have been numbered anew since.
            workers = range(self.executor.num_workers)
            self.executor.fetch([self.executor.submit(w, WorkerApi.settle) for w in workers])

    def _find_committed(self, *, verify: bool) -> None:
        found = committed_parts(
            self.store,
            plan_digest=self.plan.digest,
            num_blocks=self.plan.num_blocks,
            chained=self.plan.chained,
            verify=verify,
        )
        for finding in found.findings:
            self.report(Step(event="damaged", text=finding.problem))
        if found.findings:
            self.check_lease()
            quarantine(self.store, found.findings)
        if self.committing in found.parts:
            self._committed(found.parts[self.committing], self._take_seconds())
        self.committing = None
        if found.parts:
            text = f"{len(found.parts)} of {len(self.plan.parts)} parts were committed before"
            self.report(Step(event="resumed", parts=tuple(found.parts), text=text))
        self.records |= found.parts

    def _committed(self, record: PartRecord, seconds: Mapping[str, float]) -> None:
        self.records[record.part] = record
        self.committing = None
        spent = dict(seconds)
        self.report(Step(event="committed", part=record.part, record=record, seconds=spent))

    def _take_seconds(self) -> Counter[str]:
        """Seconds of work by stage that no report has named yet, and no longer count."""
        self.seconds.update(self.executor.take_seconds())
        taken, self.seconds = self.seconds, Counter()
        return taken

    def _quantize_alone(self) -> None:
        """Quantize parts that depend on no other: all without calibration, else only part 0."""
        parts = [0] if self.plan.chained else range(len(self.plan.parts))
        pending = [part for part in parts if part not in self.records]
        for start in range(0, len(pending), self.executor.num_workers):
            wave = pending[start : start + self.executor.num_workers]
            handles = [
                self.executor.submit(worker, WorkerApi.quantize_alone, part)
                for worker, part in enumerate(wave)
            ]
            for record in self.executor.fetch(handles):
                self._committed(record, self._take_seconds())

    def _quantize_in_turn(self) -> None:
        """Quantize the blocks, each calibrated on the output of the quantized ones before it."""
        plan, executor = self.plan, self.executor
        first = next((b for b in range(plan.num_blocks) if b + 1 not in self.records), None)
        if first is None:
            return
        assert plan.tokens is not None
        num_shards = len(plan.tokens.shards)
        self.subtrees = split(num_shards, executor.num_workers)
        shards = {
            worker: [leaf for subtree in share for leaf in subtree]
            for worker, share in enumerate(self.subtrees)
            if share
        }
        start = activations.latest(self.store, first, num_shards)
        values = self._read(first)
        executor.fetch(
            [executor.submit(w, WorkerApi.restore, first, shards[w], start) for w in shards]
        )
        commit: _Commit | None = None
        for block in range(first, plan.num_blocks):
            last = block + 1 == plan.num_blocks
            following = values if last else self._read(block + 1)
            solved = self._solve(block, values)
            if commit is not None:
                self._conclude(commit)
                if block % self.keep_every == 0:
                    self._keep(block, shards)
            record = self._begin_commit(block, values, solved)
            if last:
                executor.fetch([record])
            else:
                executor.fetch(
                    [
                        executor.submit(w, WorkerApi.propagate, block, shards[w], values, *solved)
                        for w in shards
                    ]
                )
            commit = _Commit(record=record, seconds=self._take_seconds())
            values = following
        assert commit is not None
        self._conclude(commit)

    def _begin_commit(
        self, block: int, values: Values, solved: Sequence[list[SolvedLayer]]
    ) -> Handle[PartRecord]:
        """Submit a block's commit; no other may be under way."""
        self.check_lease()
        self.committing = block + 1
        previous = self.records[block].record_sha256 if block else ""
        worker = block % self.executor.num_workers
        return self.executor.submit(worker, WorkerApi.commit, block + 1, previous, values, *solved)

    def _conclude(self, commit: _Commit) -> None:
        """Wait for a block's record."""
        [record] = self.executor.fetch([commit.record])
        self.seconds.update(self.executor.take_seconds())
        # All else that took time meanwhile was for the next block.
        commit.seconds["commit"] += self.seconds.pop("commit", 0)
        self._committed(record, commit.seconds)

    def _submit(
        self,
        worker: int,
        method: Callable[Concatenate[WorkerApi, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Submit a call whose result is only passed on to others (see `argument`)."""
        return argument(self.executor.submit(worker, method, *args, **kwargs))

    def _read(self, block: int) -> Values:
        """Have a block's arrays read, while the workers do other things."""
        worker = block % self.executor.num_workers
        return self._submit(worker, WorkerApi.read, block + 1)

    def _keep(self, block: int, shards: dict[int, list[int]]) -> None:
        """Store the activations that enter a block, and delete those stored before.

        The block before must be committed, and the shards must not have left this one.
        """
        kept = self.executor.fetch(
            [self.executor.submit(w, WorkerApi.keep, block, shards[w]) for w in shards]
        )
        saved = {shard: one for stored in kept for shard, one in stored.items()}
        activations.finish(self.store, block, saved)
        self.check_lease()
        activations.discard(self.store, block)
        self.report(Step(event="kept", part=block))

    def _solve(self, block: int, values: Values) -> list[list[SolvedLayer]]:
        """Submit the solves of a block: layers that need no calibration, then group after group.

        Each group is calibrated on the output of the quantized ones before it. Its layers, or
        slices of their rows, are solved side by side.
        """
        number, part = block + 1, self.plan.parts[block + 1]
        schemed = {layer.name: layer for layer in part.layers if layer.scheme is not None}
        calibrated = {name for group in part.groups for name in group.targets}
        alone = [layer.path for name, layer in schemed.items() if name not in calibrated]
        solved = [self._submit(0, WorkerApi.solve, number, alone, values, None)] if alone else []
        for stage, group in enumerate(part.groups):
            members = [schemed[name] for name in group.targets]
            if group.experts:
                solved.append(self._solve_experts(block, stage, members, values, solved))
                continue
            total = self._capture(block, stage, values, solved)
            whole, cut = share_out(members, self.executor.num_workers)
            if group.fold is not None:
                # They share one vector of input scales, which all of them decide.
                whole, cut = [[layer.path for layer in members]], [{}]
            # Sent before its holder begins to solve, so that the others need not wait for that.
            given = {
                worker: self._sum_for(worker, total)
                for worker, (paths, numbers) in enumerate(zip(whole, cut, strict=True))
                if paths or numbers
            }
            solved += [
                self._submit(worker, WorkerApi.solve, number, paths, values, given[worker])
                for worker, paths in enumerate(whole)
                if paths
            ]
            slices = [
                self._submit(worker, WorkerApi.solve_slices, number, numbers, values, given[worker])
                for worker, numbers in enumerate(cut)
                if numbers
            ]
            if slices:
                paths = sorted({path for numbers in cut for path in numbers})
                solved.append(self._submit(0, WorkerApi.join, number, paths, values, *slices))
        return solved

    def _solve_experts(
        self,
        block: int,
        stage: int,
        members: Sequence[LayerPlan],
        values: Values,
        solved: list[list[SolvedLayer]],
    ) -> list[SolvedLayer]:
        """Submit the solves of experts with inputs of their own, as many at once as memory allows.

        Ranges of them are solved side by side.
        """
        number, num_workers, slices = block + 1, self.executor.num_workers, []
        [(num_experts, num_ranges, in_features)] = {
            (layer.experts, layer.slices, layer.in_features) for layer in members
        }
        ranges = expert_ranges(num_experts, num_ranges)
        for together in expert_passes(ranges, in_features):
            experts = range(ranges[together[0]].start, ranges[together[-1]].stop)
            total = self._capture(block, stage, values, solved, experts)
            workers = range(min(num_workers, len(together)))
            given = [self._sum_for(worker, total) for worker in workers]
            for worker in workers:
                taken = {layer.path: together[worker::num_workers] for layer in members}
                slices.append(
                    self._submit(
                        worker, WorkerApi.solve_slices, number, taken, values, given[worker]
                    )
                )
        paths = [layer.path for layer in members]
        return self._submit(0, WorkerApi.join, number, paths, values, *slices)

    def _capture(
        self,
        block: int,
        stage: int,
        values: Values,
        solved: list[list[SolvedLayer]],
        experts: range | None = None,
    ) -> _Summed:
        """Submit the sum of one group's input, or of some experts', over all shards."""
        by_subtree = [
            _Summed(
                worker,
                self._submit(
                    worker, WorkerApi.capture, block, stage, tree, values, *solved, experts=experts
                ),
            )
            for worker, share in enumerate(self.subtrees)
            for tree in share
        ]

        def merge(left: _Summed, right: _Summed) -> _Summed:
            # On the left one's worker: its sum need not travel.
            sent = None if right.worker == left.worker else self._sent(right)
            merged = self._submit(left.worker, WorkerApi.merge, left.held, right.held, sent)
            return _Summed(left.worker, merged)

        return join(by_subtree, merge)

    def _sum_for(self, worker: int, total: _Summed) -> HeldSum | InputSum:
        """A sum as a worker takes it: by name if it holds it."""
        return total.held if worker == total.worker else self._sent(total)

    def _sent(self, total: _Summed) -> InputSum:
        """A sum itself, as its holder sends it, once."""
        if total.sent is None:
            total.sent = self._submit(total.worker, WorkerApi.send, total.held)
        return total.sent


@dataclass
class _Summed:
    """The worker that holds a sum, and its name.

    Attributes:
        sent: the sum itself, once another worker has needed it.
    """

    worker: int
    held: HeldSum
    sent: InputSum | None = None


def share_out(
    layers: Sequence[LayerPlan], num_workers: int
) -> tuple[list[list[str]], list[dict[str, list[int]]]]:
    """Share the solves of layers of one input out: whole layers, and row slices of others.

    The costliest slice goes first, each to the worker with the least to do.

    Returns:
        by worker: paths of the layers that it solves alone, and numbers of its slices of others.
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
