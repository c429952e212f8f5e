"""The calls that read and solve one block: which worker does what, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Concatenate

from pipeline.executor.protocol import Executor, P, T, argument
from pipeline.plan import LayerPlan, Plan
from pipeline.reduction import join
from pipeline.run.solved_layers import SolvedLayer, SolvedLayers
from pipeline.run.worker_api import HeldSum, InputSum, Values, WorkerApi
from quantizer.experts import expert_passes, expert_ranges


@dataclass(frozen=True)
class BlockCalls:
    """Submits calls of blocks, and waits for none.

    Attributes:
        subtrees: of the reduction over calibration shards, by the worker that holds these.
    """

    plan: Plan
    executor: Executor
    subtrees: Sequence[Sequence[range]]

    @property
    def shards(self) -> dict[int, list[int]]:
        """The calibration shards of each worker that holds any."""
        return {
            worker: [leaf for subtree in share for leaf in subtree]
            for worker, share in enumerate(self.subtrees)
            if share
        }

    def read(self, block: int) -> Values:
        """Have a block's arrays read, beside what the workers do."""
        return self._submit(block % self.executor.num_workers, WorkerApi.read, block + 1)

    def solve(self, block: int, values: Values) -> list[list[SolvedLayer]]:
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
            total = self._summed(self._capture(block, stage, values, solved))
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

    def sums(self, block: int, values: Values) -> tuple[list[InputSum], dict[int, list[HeldSum]]]:
        """Submit the sums over a float block's inputs, of group after group.

        Nothing is solved between them whose result would put these calls in order. So each is
        given what the one before it on the same shards returned, and may only then be carried out.

        Returns:
            the sums; and by worker, what its shards have to wait for before they leave the block.
        """
        trees = [(worker, tree) for worker, share in enumerate(self.subtrees) for tree in share]
        sums: list[InputSum] = []
        before: list[list[HeldSum]] = [[] for _ in trees]
        for stage in range(len(self.plan.parts[block + 1].groups)):
            held = [
                self._submit(worker, WorkerApi.capture, block, stage, tree, values, *done)
                for (worker, tree), done in zip(trees, before, strict=True)
            ]
            before = [[one] for one in held]
            summed = [_Summed(worker, one) for (worker, _), one in zip(trees, held, strict=True)]
            sums.append(self._sent(self._summed(summed)))
        last: dict[int, list[HeldSum]] = {worker: [] for worker, _ in trees}
        for (worker, _), done in zip(trees, before, strict=True):
            last[worker] += done
        return sums, last

    def tune(
        self, block: int, values: Values, solved: Sequence[list[SolvedLayer]]
    ) -> list[SolvedLayers]:
        """Have a solved block trained, if the recipe asks for it; returns what becomes of it.

        A block without a layer to train stays as it was solved.

        One worker trains, and all windows go there: they travel once, where a gradient, as large as
        the block in float32, would travel in every step. So no bit depends on who holds which.
        """
        trained = any(layer.is_trainable for layer in self.plan.parts[block + 1].layers)
        if self.plan.recipe.tuning is None or not trained:
            return list(solved)
        windows = [
            self._submit(worker, WorkerApi.windows, block, shards, values)
            for worker, shards in self.shards.items()
            if worker
        ]
        own = self.shards[0]
        return [self._submit(0, WorkerApi.tune, block, own, values, *solved, *windows)]

    def _solve_experts(
        self,
        block: int,
        stage: int,
        members: Sequence[LayerPlan],
        values: Values,
        solved: list[list[SolvedLayer]],
    ) -> list[SolvedLayer]:
        """Submit the solves of experts with inputs of their own, as many at once as memory allows.

        Each worker solves some of them, for which all others send it their part of the sums: the
        tree of an expert's sums has its root where the expert is solved, so that what travels is
        shared as the solving is, and no worker holds the sums of all.
        """
        number, slices = block + 1, []
        [(num_experts, num_ranges, in_features)] = {
            (layer.experts, layer.slices, layer.in_features) for layer in members
        }
        ranges = expert_ranges(num_experts, num_ranges)
        first = 0  # of the workers that solve a pass: others than for the last one, if they are few
        for together in expert_passes(ranges, in_features):
            experts = range(ranges[together[0]].start, ranges[together[-1]].stop)
            held = self._capture(block, stage, values, solved, experts)
            shares = expert_ranges(len(together), min(len(together), self.executor.num_workers))
            owned = [together[share.start : share.stop] for share in shares]
            owners = [(first + i) % self.executor.num_workers for i in range(len(owned))]
            first += len(owned)
            solving = [
                (owner, numbers, range(ranges[numbers[0]].start, ranges[numbers[-1]].stop))
                for owner, numbers in zip(owners, owned, strict=True)
            ]
            # All sums are sent before any worker begins to solve.
            sums = [
                [self._sum_for(owner, one, experts=own) for one in held]
                for owner, _, own in solving
            ]
            for (owner, numbers, own), given in zip(solving, sums, strict=True):
                taken = {layer.path: numbers for layer in members}
                slices.append(
                    self._submit(
                        owner,
                        WorkerApi.solve_slices,
                        number,
                        taken,
                        values,
                        *given,
                        experts=own,
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
    ) -> list[_Summed]:
        """Submit the sums of one group's input, or of some experts', over each subtree."""
        return [
            _Summed(
                worker,
                self._submit(
                    worker, WorkerApi.capture, block, stage, tree, values, *solved, experts=experts
                ),
            )
            for worker, share in enumerate(self.subtrees)
            for tree in share
        ]

    def _summed(self, by_subtree: Sequence[_Summed]) -> _Summed:
        """Submit the rest of the tree."""

        def merge(left: _Summed, right: _Summed) -> _Summed:
            # On the left one's worker: its sum need not travel.
            sent = None if right.worker == left.worker else self._sent(right)
            merged = self._submit(left.worker, WorkerApi.merge, left.held, right.held, sent)
            return _Summed(left.worker, merged)

        return join(by_subtree, merge)

    def _sum_for(
        self, worker: int, total: _Summed, experts: range | None = None
    ) -> HeldSum | InputSum:
        """A sum, or some experts' part of it, as a worker takes it: by name if it holds it."""
        if worker == total.worker:
            return total.held
        if experts is not None:
            return self._submit(total.worker, WorkerApi.send, total.held, experts=experts)
        return self._sent(total)

    def _sent(self, total: _Summed) -> InputSum:
        """A sum itself, as its holder sends it, once."""
        if total.sent is None:
            total.sent = self._submit(total.worker, WorkerApi.send, total.held)
        return total.sent

    def _submit(
        self,
        worker: int,
        method: Callable[Concatenate[WorkerApi, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Submit a call whose result is only passed on to others (see `argument`)."""
        return argument(self.executor.submit(worker, method, *args, **kwargs))


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
