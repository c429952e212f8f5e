"""What a run costs on a machine: seconds of each stage, hours of its workers, and money.

A model, not a measurement: counted work (`pipeline.planning.work`) at a machine's rates
(`pipeline.planning.machines`). A stage's work is done one piece after another, so that its seconds
are the sum of what each rate takes: products, memory, launches, storage and so on; the largest of
them is what bounds it.

What is assumed of workers:

- A worker has one GPU or several of its node. The forward pass and the Grams are shared by
  calibration shards: the GPU, or the worker on CPUs, with the most shards decides. Adding up the
  Grams takes a copy for each level of the tree above the GPUs of a worker, and one exchange through
  host memory for each level above the workers.
- Every worker that solves rows of an input factors its Hessian itself, on one GPU, whose others
  copy the factor. Rows are shared by slices: the GPU with the most work decides.
- Every worker decodes the block's kernels for itself; its other GPUs copy the block's weights.
- One worker trains a block (tuning), on one GPU, while the others wait.
- One worker reads a block, by a thread for each of its GPUs, while the block before is being
  calibrated and solved; one commits it, while the next one is. What of it is longer than that is
  waited for.
- Planning reads and hashes the source on all workers and threads, as fast as the parts of their
  hosts that belong to all GPUs. On CPUs that start a cluster of
  their own, workers start meanwhile.
- With `statistics: float` the float model is captured first, block after block, unless another run
  has done so; then each worker solves blocks alone.
- Nothing fails, and nothing is repeated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from pipeline.executor.worker_environment import GPU_MEMORY_SHARE
from pipeline.float_statistics import statistics_plan
from pipeline.plan import PartPlan, Plan
from pipeline.planning.estimates import estimate, hidden_features, num_streams
from pipeline.planning.evaluation_costs import Evaluated, head_flops
from pipeline.planning.machines import Machine
from pipeline.planning.run_cost import Ledger, RunCost, Stage
from pipeline.planning.stage_constants import CONSTANTS
from pipeline.planning.stored_sizes import stored_bytes
from pipeline.planning.work import (
    BlockWork,
    Work,
    block_work,
    forward_work,
    planned_on,
    tuning_work,
)
from pipeline.reduction import split
from pipeline.run.sums_records import statistics_bytes, sums_bytes
from quantizer.schemes import Float8Scheme

# Measured on two cores, in this order: Ray and a worker's imports; planning, and more of it for
# each block; opening the model in a worker, for each block; a worker's call and its answer; making
# files durable; what evaluating compiles every time.
_START_SECONDS = 6.0
_PLAN_SECONDS = 1.5
_PLAN_BLOCK_SECONDS = 0.05
_OPEN_BLOCK_SECONDS = 0.1
_CALL_SECONDS = 0.006
_FILE_SECONDS = 0.02
_EVALUATION_START_SECONDS = 6.0
# To compile one program of a kind; those of the solver are compiled while the first block is read.
_COMPILE_SECONDS = {"cpu": (1.5, 1.0), "gpu": (8.0, 3.0)}
# As `pipeline.worker.solve.CompiledAhead` does.
_COMPILED_AT_ONCE = {"cpu": 1, "gpu": 4}
# gzip writes so many float8 values a second (docs/benchmarks.md).
_COMPRESSED_PER_SECOND = 28e6
_READ_PASSES = 2.0
_COMMIT_PASSES = 4.0
# Of stored sums: read, and made whole and symmetric, which is twice as large.
_UNPACK_PASSES = 5.0
_MOST_HASHING_THREADS = 8
EVALUATED_PER_PASS = 1 << 15
"""Tokens of which a worker holds activations (`pipeline.worker.evaluate`)."""


def run_cost(
    plan: Plan,
    machine: Machine,
    workers: int,
    *,
    together: int = 1,
    evaluated: Evaluated | None = None,
    keep_every: int = 8,
    captured: bool = False,
) -> RunCost:
    """What a plan costs on so many such machines: GPUs, or nodes of CPUs.

    Args:
        plan: also one that was made for other devices (see `planned_on`).
        workers: the machines, each with a worker of its own, or so many `together` with one.
        evaluated: the text that the result is judged on.
        keep_every: blocks between activations that are stored.
        captured: whether another run has made the statistics that the plan uses, if it uses any.
    """
    model = RunModel(planned_on(plan, machine.device), machine, workers, together)
    model.begin()
    if model.plan.makes == "statistics":
        model.part_seconds.append(0.0)  # of what is outside the blocks
        model.capture(model.plan, keep_every)
    elif not model.plan.chained:
        if model.plan.uses_float_statistics and not captured:
            model.capture(statistics_plan(model.plan), keep_every)
            model.part_seconds.clear()
        model.quantize_alone(model.plan.parts)
    else:
        model.quantize_alone(model.plan.parts[:1])
        model.quantize_in_turn(keep_every)
    model.finish()
    if evaluated is not None:
        model.evaluate(evaluated)
    return RunCost(
        machine=machine,
        workers=workers,
        together=together,
        stages=model.ledger.stages(),
        part_seconds=tuple(model.part_seconds),
    )


class RunModel:
    """Goes through a run as its driver would, and adds up what it takes."""

    def __init__(self, plan: Plan, machine: Machine, devices: int, together: int) -> None:
        self.plan = plan
        self.ledger = Ledger(machine)
        self.part_seconds: list[float] = []
        self._machine = machine
        self._devices, self._together = devices, together
        self._workers = devices // together
        self._constants = CONSTANTS[machine.device]
        self._works: dict[tuple[Any, ...], BlockWork] = {}

    def begin(self) -> None:
        """Start, compile, and plan, which reads and hashes the source."""
        source = sum(part.source_bytes for part in self.plan.parts)
        of_worker = self._machine.host_threads * self._together
        threads = self._workers * min(of_worker, _MOST_HASHING_THREADS)
        hashed = Work(
            storage_bytes=source / self._devices,
            hash_bytes=source / threads,
            host_bytes=source / threads,
            seconds=_PLAN_SECONDS + _PLAN_BLOCK_SECONDS * self.plan.num_blocks,
        )
        self._start(hashed)
        self.ledger.add("compile", Work(seconds=self._compile_seconds()))

    def open(self) -> None:
        """Start, for a result of runs that are planned already; of the source only JSON is read."""
        self._start(Work(seconds=_PLAN_SECONDS))

    def _start(self, planned: Work) -> None:
        planning = self.ledger.add("plan", planned)
        waited = _START_SECONDS
        if self._machine.device == "cpu":
            waited = max(0.0, _START_SECONDS - planning)
        start = Work(seconds=_START_SECONDS)
        self.ledger.add("start", start, share=waited / _START_SECONDS)
        self.ledger.add("start", Work(seconds=_OPEN_BLOCK_SECONDS * self.plan.num_blocks))

    def _compile_seconds(self) -> float:
        """One program for each form of a solve, and for each stage of each form of a block."""
        solver, stage = _COMPILE_SECONDS[self._machine.device]
        forms, stages = set(), {}
        for part in self.plan.parts[1:]:
            layers = {layer.name: layer for layer in part.layers}
            stages[_form(part)] = len(part.groups) + 1
            for name in (name for group in part.groups for name in group.targets):
                layer = layers[name]
                forms.add((layer.in_features, -(-layer.out_features // layer.slices), layer.scheme))
        at_once = _COMPILED_AT_ONCE[self._machine.device]
        return solver * -(-len(forms) // at_once) + stage * sum(stages.values())

    def quantize_alone(self, parts: Sequence[PartPlan]) -> None:
        """Parts that depend on no other, as many at once as there are workers."""
        for start in range(0, len(parts), self._workers):
            before = self.ledger.total_seconds
            wave = parts[start : start + self._workers]
            stages = [self._alone(part) for part in wave]
            slowest = max(stages, key=lambda by: sum(map(self.ledger.seconds_of, by.values())))
            for stage, work in slowest.items():
                self.ledger.add(stage, work)
            spent = self.ledger.total_seconds - before
            self.part_seconds += [spent / len(wave)] * len(wave)

    def _alone(self, part: PartPlan) -> dict[Stage, Work]:
        found = block_work(self.plan, part, self._constants)
        # What uses statistics has an input's factor to find, too.
        rows = [work for group in found.solve for work in (group.shared, *group.rows)]
        sums = sums_bytes(part.captured) if part.groups else 0
        to_device = sums if self._machine.device == "gpu" else 0
        return {
            "read": self._read(part),
            "statistics": Work(
                storage_bytes=sums,
                hash_bytes=sums,
                host_bytes=_UNPACK_PASSES * sums,
                transfer_bytes=2 * to_device,
            ),
            "solve": Work.total(rows),
            "commit": self._commit(part),
            "exchange": Work(seconds=_CALL_SECONDS),
        }

    def capture(self, plan: Plan, keep_every: int) -> None:
        """Take the sums over a float block's inputs, one block after another, and store them.

        Args:
            plan: of the statistics.
        """
        blocks = plan.parts[1:]
        share = self._largest_share()
        stored = [
            Work(
                host_bytes=_COMMIT_PASSES * sums_bytes(part.groups),
                hash_bytes=sums_bytes(part.groups),
                storage_bytes=sums_bytes(part.groups),
                seconds=_FILE_SECONDS,
            )
            for part in blocks
        ]
        before = self.ledger.total_seconds
        self.ledger.add("read", self._read(blocks[0]))
        for index, part in enumerate(blocks):
            found = self._work_of(part)
            to_device = part.source_bytes if self._machine.device == "gpu" else 0
            forward = found.forward * share + Work(transfer_bytes=to_device)
            busy = self.ledger.add("forward", forward + self._moved_activations(part))
            busy += self.ledger.add("grams", found.grams * share)
            busy += self.ledger.add("exchange", self._exchange(part, found))
            beside: list[tuple[Stage, Work]] = []
            if index + 1 < len(blocks):
                beside.append(("read", self._read(blocks[index + 1])))
            if index:
                beside.append(("statistics", stored[index - 1]))
            self._add_beside(beside, busy)
            if index + 1 < len(blocks) and (index + 1) % keep_every == 0:
                self.ledger.add("keep", self._keep())
            if index + 1 == len(blocks):
                self.ledger.add("statistics", stored[-1])
            self.part_seconds.append(self.ledger.total_seconds - before)
            before = self.ledger.total_seconds
        total = statistics_bytes(plan)
        self.ledger.add("finish", Work(storage_bytes=total, hash_bytes=total))

    def _add_beside(self, beside: Sequence[tuple[Stage, Work]], busy: float) -> None:
        """Add what threads of their own do, side by side, while workers compute for so long."""
        seconds = [self.ledger.seconds_of(work) for _, work in beside]
        waited = max(0.0, max(seconds, default=0.0) - busy)
        share = waited / sum(seconds) if seconds else 0.0
        for stage, work in beside:
            self.ledger.add(stage, work, share=share)

    def quantize_in_turn(self, keep_every: int) -> None:
        """Blocks one after another, each read and committed beside others."""
        blocks = self.plan.parts[1:]
        before = self.ledger.total_seconds
        self.ledger.add("read", self._read(blocks[0]))
        for index, part in enumerate(blocks):
            last = index + 1 == len(blocks)
            busy = self._calibrate_and_solve(part)
            beside: list[tuple[Stage, Work]] = []
            if not last:
                beside.append(("read", self._read(blocks[index + 1])))
            if index:
                beside.append(("commit", self._commit(blocks[index - 1])))
            self._add_beside(beside, busy)
            if not last and (index + 1) % keep_every == 0:
                self.ledger.add("keep", self._keep())
            if last:
                self.ledger.add("commit", self._commit(part))
            self.part_seconds.append(self.ledger.total_seconds - before)
            before = self.ledger.total_seconds

    def _calibrate_and_solve(self, part: PartPlan) -> float:
        """Add what a block's workers do one after the other; returns its seconds."""
        found = self._work_of(part)
        share = self._largest_share()
        to_device = part.source_bytes if self._machine.device == "gpu" else 0
        # As read, and again as decoded.
        copied = 2 * to_device * (self._together - 1)
        forward = found.forward * share + Work(transfer_bytes=to_device, peer_bytes=copied)
        stages: list[tuple[Stage, Work]] = [
            ("forward", forward + self._moved_activations(part)),
            ("grams", found.grams * share),
            ("decode", found.decode),
            ("exchange", self._exchange(part, found) + self._between_gpus(found)),
        ]
        stages += [("solve", g.shared + self._most_rows(g.rows)) for g in found.solve]
        if self.plan.recipe.tuning is not None:
            stages.append(("tune", tuning_work(self.plan, part, self._constants)))
        return sum(self.ledger.add(stage, work) for stage, work in stages)

    def _work_of(self, part: PartPlan) -> BlockWork:
        form = _form(part)
        if form not in self._works:
            self._works[form] = block_work(self.plan, part, self._constants)
        return self._works[form]

    def _largest_share(self) -> float:
        """Of all calibration windows, those of the GPU, or of the worker, that has most."""
        tokens = self.plan.tokens
        assert tokens is not None
        sizes = [stop - start for start, stop in tokens.shards]
        held = []
        for share in split(len(sizes), self._workers):
            of_worker = [sizes[leaf] for tree in share for leaf in tree]
            held += [
                sum(of_worker[place] for tree in one for place in tree)
                for one in split(len(of_worker), self._together)
            ]
        return max(held) / tokens.num_samples

    def _most_rows(self, rows: Sequence[Work]) -> Work:
        """The work of the GPU with most, where each piece goes to the one that has least."""
        loads = [(0.0, Work())] * self._devices
        pieces = sorted(rows, key=self.ledger.seconds_of, reverse=True)
        for piece in pieces:
            least = min(range(len(loads)), key=lambda worker: loads[worker][0])
            seconds, work = loads[least]
            loads[least] = seconds + self.ledger.seconds_of(piece), work + piece
        return max(loads, key=lambda load: load[0])[1]

    def _moved_activations(self, part: PartPlan) -> Work:
        """To the host and back at each stage, where a GPU cannot hold them."""
        tokens = self.plan.tokens
        if self._machine.device == "cpu" or tokens is None:
            return Work()
        needed = estimate(self.plan, self._workers, self._together).device_bytes
        if needed <= GPU_MEMORY_SHARE * self._machine.memory_bytes:
            return Work()
        num_tokens = self._largest_share() * tokens.num_samples * tokens.sequence_length
        item = 2 if self.plan.forward_dtype == "bfloat16" else 4
        moved = 2.0 * num_tokens * hidden_features(self.plan) * item * num_streams(self.plan)
        return Work(transfer_bytes=moved * (len(part.groups) + 1))

    def _exchange(self, part: PartPlan, found: BlockWork) -> Work:
        """Calls, and what travels: sums up the tree and to who solves, weights to all."""
        levels = math.ceil(math.log2(self._workers))
        calls = len(found.solve) * (2 + levels) + 3
        work = Work(seconds=calls * _CALL_SECONDS)
        if self._workers == 1:
            return work
        sums = sum(group.received_bytes(self._workers, levels) for group in found.solve)
        weights = part.source_bytes + part.num_weights  # as read, and as codes
        return work + self._sent(sums) + self._sent(weights)

    def _between_gpus(self, found: BlockWork) -> Work:
        """What the GPUs of a worker copy: sums up the tree, and what each needs to solve with.

        Copies of one level pass at the same time; those of a factor leave one GPU in turn.
        """
        if self._together == 1:
            return Work()
        levels = math.ceil(math.log2(self._together))
        peer, added = 0.0, 0.0
        for group in found.solve:
            solving = min(self._together, -(-len(group.rows) // self._workers))
            peer += levels * group.sum_bytes + (solving - 1) * group.shared_bytes
            added += 3.0 * levels * group.sum_bytes  # two read, one written
        return Work(peer_bytes=peer, memory_bytes=added)

    def _sent(self, num_bytes: float) -> Work:
        """From one worker to another: off the device, into and out of shared memory, on again."""
        of_gpu = self._machine.device == "gpu"
        many_nodes = self._devices > self._machine.workers_per_node
        return Work(
            transfer_bytes=2 * num_bytes if of_gpu else 0.0,
            host_bytes=2 * num_bytes,
            network_bytes=num_bytes if many_nodes else 0.0,
        )

    def _read(self, part: PartPlan) -> Work:
        """By a thread for each GPU of the worker, of which none reads a part of a variable."""
        largest = max((x.num_weights for x in part.layers), default=0) / max(part.num_weights, 1)
        read = part.source_bytes * max(largest, 1 / self._together)
        if self._together == 1:
            read = part.source_bytes
        return Work(storage_bytes=read, hash_bytes=read, host_bytes=_READ_PASSES * read)

    def _commit(self, part: PartPlan) -> Work:
        stored = stored_bytes(self.plan, part)
        float8 = sum(x.num_weights for x in part.layers if isinstance(x.scheme, Float8Scheme))
        compressed = float8 if self.plan.weights_format == 2 else 0
        return Work(
            host_bytes=_COMMIT_PASSES * stored,
            hash_bytes=2 * stored,
            storage_bytes=stored,
            seconds=_FILE_SECONDS + compressed / _COMPRESSED_PER_SECOND,
        )

    def _keep(self) -> Work:
        kept = estimate(self.plan, self._workers).activation_bytes * self._largest_share()
        return Work(
            storage_bytes=kept,
            hash_bytes=kept,
            host_bytes=2 * kept,
            transfer_bytes=kept if self._machine.device == "gpu" else 0.0,
            seconds=_FILE_SECONDS,
        )

    def finish(self) -> None:
        """Every file is read and hashed once more before the manifest names it."""
        stored = sum(stored_bytes(self.plan, part) for part in self.plan.parts)
        work = Work(storage_bytes=stored, hash_bytes=stored, seconds=10 * _FILE_SECONDS)
        self.ledger.add("finish", work)

    def evaluate(self, evaluated: Evaluated) -> None:
        """Source and result go over the worker's windows, each block read for each pass."""
        windows = evaluated.worker_windows(self._devices)
        tokens = evaluated.as_tokens(self.plan, windows)
        num_tokens = windows * evaluated.sequence_length
        passes = -(-num_tokens // EVALUATED_PER_PASS)
        batches = -(-windows // tokens.micro_batch)
        blocks = self.plan.parts[1:]
        source = sum(part.source_bytes for part in self.plan.parts)
        stored = sum(stored_bytes(self.plan, part) for part in self.plan.parts)
        one = [forward_work(self.plan, part, tokens, self._constants) for part in blocks]
        decoded = [self._work_of(part).decode for part in blocks]
        head = head_flops(self.plan, num_tokens)
        bfloat16 = self.plan.forward_dtype == "bfloat16"
        heads = Work(bfloat16_flops=2 * head) if bfloat16 else Work(float32_flops=2 * head)
        files = Work(
            storage_bytes=source + stored,
            hash_bytes=source + stored,
            host_bytes=_READ_PASSES * (source + stored),
            transfer_bytes=source + stored if self._machine.device == "gpu" else 0.0,
        )
        self.ledger.add("evaluate", Work.total(one) * 2 + heads)
        self.ledger.add("evaluate", Work.total(decoded) * batches + files * passes)
        self.ledger.add("evaluate", Work(seconds=_EVALUATION_START_SECONDS))


def _form(part: PartPlan) -> tuple[Any, ...]:
    """What decides a block's work: blocks alike in it are counted once."""
    # Keras numbers some names.
    places = {layer.name: str(place) for place, layer in enumerate(part.layers)}
    layers = tuple(dataclasses.replace(x, path="", name="", note="") for x in part.layers)
    groups = tuple(
        dataclasses.replace(group, targets=tuple(map(places.__getitem__, group.targets)), fold=None)
        for group in part.groups
    )
    return layers, groups
