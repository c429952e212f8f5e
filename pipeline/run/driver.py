"""The driver of one run: a plan carried out block by block, each committed as soon as it is solved.

It holds no arrays and no Keras. Storage decides where it starts, so resuming is running.

While a block is calibrated and solved, the next one is read and the one before it committed. Its
own commit begins, and calibration shards leave it, once the one before is committed: whatever dies,
at most one block has to be solved again besides the one under way, and no shard is further ahead.

A plan that captures statistics (see `pipeline.float_statistics`) goes the same way: the blocks are
not solved, but the sums over their inputs are committed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from pipeline.errors import DamagedObjectError, PipelineError
from pipeline.executor.protocol import (
    ActivationPlace,
    Executor,
    ExecutorError,
    Handle,
    WorkerLostError,
)
from pipeline.executor.work_spans import WorkSpan
from pipeline.plan import Plan
from pipeline.reduction import split
from pipeline.run import activations
from pipeline.run.block_calls import BlockCalls
from pipeline.run.commits import Committed, committed_parts, quarantine
from pipeline.run.events import Report, Step
from pipeline.run.records import CommittedRecord, Manifest, PartRecord
from pipeline.run.solved_layers import SolvedLayers
from pipeline.run.sums_records import SumsRecord
from pipeline.run.worker_api import CommittedPart, HeldSum, InputSum, Values, WorkerApi
from pipeline.storage.object_store import ObjectStore

KEEP_EVERY = 8
"""Blocks between activations kept in storage, where the user does not say."""
_MOST_LOSSES = 10
"""In a row, with nothing committed between them."""


def quantize(
    plan: Plan,
    store: ObjectStore,
    executor: Executor,
    report: Report,
    *,
    keep_every: int = KEEP_EVERY,
    check_lease: Callable[[], None] = lambda: None,
    place: Callable[[int], ActivationPlace] = lambda _: "device",
) -> Manifest:
    """Carry out a claimed plan, from wherever storage says it stands, to its manifest.

    Args:
        store: opened at the run's root.
        keep_every: blocks between activations kept in storage.
        check_lease: raises if another driver has taken over; called before anything is moved or
            deleted, and before a block's commit begins, when no other is under way: a driver
            commits at most one block after it has lost its lease.
        place: where the activations of this many workers wait; results do not depend on it.

    Raises:
        PipelineError: what repetition does not mend; resuming goes on from the last block.
    """
    drive = _Drive(plan, store, executor, report, keep_every, check_lease, place)
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
        done: what the commit returns.
        work: on the block.
    """

    done: Handle[CommittedPart]
    work: list[WorkSpan]


@dataclass
class _Drive:
    """See `quantize` for the fields that it is given.

    Attributes:
        records: of the parts committed, as far as the current attempt has come.
        committing: the part whose commit has begun, and whose record has not arrived.
        work: that no report has named yet.
    """

    plan: Plan
    store: ObjectStore
    executor: Executor
    report: Report
    keep_every: int
    check_lease: Callable[[], None]
    place: Callable[[int], ActivationPlace]
    records: dict[int, CommittedRecord] = field(default_factory=dict, init=False)
    committing: int | None = field(default=None, init=False)
    work: list[WorkSpan] = field(default_factory=list, init=False)

    def attempt(self, *, verify: bool) -> Manifest:
        """Go from where storage stands to the manifest."""
        self.records = {}
        self.settle()
        self._find_committed(verify=verify)
        if not self._captures:
            self._quantize_alone()
        if self._captures or self.plan.chained:
            self._go_in_turn()
        [manifest] = self.executor.fetch(
            [self.executor.submit(0, WorkerApi.finalize, self.records)]
        )
        self.report(Step(event="sealed", work=self._take_work()))
        return manifest

    @property
    def _captures(self) -> bool:
        return self.plan.makes == "statistics"

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
        find = partial(
            committed_parts,
            plan_digest=self.plan.digest,
            num_blocks=self.plan.num_blocks,
            chained=self.plan.chained,
            verify=verify,
        )
        found: Committed[PartRecord] | Committed[SumsRecord] = (
            find(self.store, SumsRecord) if self._captures else find(self.store, PartRecord)
        )
        for finding in found.findings:
            self.report(Step(event="damaged", text=finding.problem))
        if found.findings:
            self.check_lease()
            quarantine(self.store, found.findings)
        parts: dict[int, CommittedRecord] = {**found.parts}
        if self.committing is not None and self.committing in parts:
            # What its worker counted for the log went with it.
            self._committed(CommittedPart(record=parts[self.committing]), self._take_work())
        self.committing = None
        if parts:
            text = f"{len(parts)} of {len(self.plan.due_parts)} parts were committed before"
            self.report(Step(event="resumed", parts=tuple(parts), text=text))
        self.records |= parts

    def _committed(self, done: CommittedPart, work: Sequence[WorkSpan]) -> None:
        record, self.committing = done.record, None
        self.records[record.part] = record
        self.report(
            Step(
                event="committed",
                part=record.part,
                record=record,
                work=work,
                histograms=done.histograms,
            )
        )

    def _take_work(self) -> list[WorkSpan]:
        """Work that no report has named yet, and that no other will."""
        taken, self.work = [*self.work, *self.executor.take_work()], []
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
            for done in self.executor.fetch(handles):
                self._committed(done, self._take_work())

    def _go_in_turn(self) -> None:
        """Take the calibration windows through the blocks, and make what is missing of each.

        A block that is quantized gives the next one its input, so that all after it are missing.
        Sums of the float model depend on no other: only those that are missing are made again.
        """
        plan, executor = self.plan, self.executor
        missing = [block for block in range(plan.num_blocks) if block + 1 not in self.records]
        if not missing:
            return
        first, last = missing[0], missing[-1]
        assert plan.tokens is not None
        num_shards = len(plan.tokens.shards)
        calls = BlockCalls(plan, executor, split(num_shards, executor.num_workers))
        shards = calls.shards
        start = activations.latest(self.store, first, num_shards)
        values = calls.read(first)
        place = self.place(executor.num_workers)
        executor.fetch(
            [executor.submit(w, WorkerApi.restore, first, shards[w], start, place) for w in shards]
        )
        commit: _Commit | None = None
        kept = start
        for block in range(first, last + 1):
            following = values if block == last else calls.read(block + 1)
            solved: Sequence[SolvedLayers] = ()
            sums: Sequence[InputSum] = ()
            captured: Mapping[int, Sequence[HeldSum]] = {}
            if not self._captures:
                solved = calls.tune(block, values, calls.solve(block, values))
            elif block in missing:
                sums, captured = calls.sums(block, values)
            if commit is not None:
                self._conclude(commit)
                commit = None
            # By how far they are, so that an attempt also keeps what the one before did not.
            if block - kept >= self.keep_every:
                self._keep(block, shards)
                kept = block
            done = self._begin_commit(block, values, solved, sums) if block in missing else None
            if block == last:
                assert done is not None
                executor.fetch([done])
            else:
                executor.fetch(
                    [
                        executor.submit(
                            w,
                            WorkerApi.propagate,
                            block,
                            shards[w],
                            values,
                            *solved,
                            *captured.get(w, ()),
                        )
                        for w in shards
                    ]
                )
            if done is not None:
                commit = _Commit(done=done, work=self._take_work())
            values = following
        assert commit is not None
        self._conclude(commit)

    def _begin_commit(
        self,
        block: int,
        values: Values,
        solved: Sequence[SolvedLayers],
        sums: Sequence[InputSum],
    ) -> Handle[CommittedPart]:
        """Submit a block's commit; no other may be under way.

        Args:
            sums: of a plan that captures statistics, which solves nothing.
        """
        self.check_lease()
        part = self.committing = block + 1
        worker = block % self.executor.num_workers
        if self._captures:
            return self.executor.submit(worker, WorkerApi.commit_sums, part, *sums)
        previous = self.records[block].record_sha256 if block else ""
        return self.executor.submit(worker, WorkerApi.commit, part, previous, values, *solved)

    def _conclude(self, commit: _Commit) -> None:
        """Wait for a block's record."""
        [done] = self.executor.fetch([commit.done])
        # All else that took time meanwhile was for the next block.
        work = self._take_work()
        stage = "commit_sums" if self._captures else "commit"
        self.work = [span for span in work if span.stage != stage]
        self._committed(done, [*commit.work, *(s for s in work if s.stage == stage)])

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
