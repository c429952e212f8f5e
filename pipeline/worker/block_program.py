"""A block as compiled stages, cut at the inputs of its layers.

The block is traced once, with the values of its weights as arguments, so that all blocks of one
signature share the compiled programs. Stage k computes the input of the k-th group of layers; once
those are quantized, stage k + 1 continues with their new weights. So each layer runs just once, and
is calibrated on the input that it will have in the quantized model.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from pipeline.errors import SourceError
from pipeline.model.blocks import Block
from pipeline.model.targets import Target, call_with, recorded_inputs
from pipeline.plan import InputGroup
from pipeline.recipe.recipe import StatisticsKind
from pipeline.worker.block_memory import BlockMemory, derived_values
from pipeline.worker.expert_products import expert_products
from pipeline.worker.routed_products import with_routed_products
from quantizer import kernel_layout

_ROUNDING = 1e-3
"""Of a block's output, more than another order of sums changes in it."""


class BlockProgram:
    """One stage for the input of each group of layers, and one for the block's output.

    Attributes:
        groups: layers that share an input, or several if they are called several times, in the
            order of their first calls; with the names of the block that was traced.
        input_axes: of each group, the axes of the inputs that are contracted with the kernels,
            counted from their ends.
        group_shapes: of each of a group's inputs, the other axes: [batch, positions] for most, and
            [rows] of inputs that each expert has of its own.
        outputs: shapes and dtypes of what the block's call gives, for one micro-batch.
        memory: what it needs device memory for.
    """

    groups: tuple[InputGroup, ...]
    input_axes: tuple[tuple[int, ...], ...]
    group_shapes: tuple[tuple[tuple[int, ...], ...], ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    memory: BlockMemory

    def __init__(
        self,
        block: Block,
        statistics: Mapping[str, StatisticsKind | None],
        inputs: Sequence[jax.ShapeDtypeStruct],
    ) -> None:
        """Trace the block, without computing anything.

        Args:
            statistics: what a target's scheme needs to know of its input, by the target's name.
            inputs: shapes and dtypes of what the block's call takes, for one micro-batch.

        Raises:
            SourceError: the block calls a target on what it has computed with that target.
        """
        self._block = block
        self._kernels = _kernels(block)
        wanted = {name: kind for name, kind in statistics.items() if kind is not None}
        calibrated = [target for target in block.targets if target.name in wanted]
        traced, recorded = trace_block(block, inputs, calibrated)
        outputs = traced.jaxpr.outvars[len(recorded) :]
        self.outputs = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in outputs)
        self.memory = BlockMemory.of(traced.jaxpr)
        called = _called(traced.jaxpr, recorded, calibrated, self._kernels)
        groups = _grouped(called, wanted)
        self.groups = tuple(group for group, _ in groups)
        self.input_axes = tuple(reads[0].axes for _, reads in groups)
        self.group_shapes = tuple(tuple(one.row_shape for one in reads) for _, reads in groups)
        results = [[v for one in reads for v in one.results] for _, reads in groups]
        results.append(outputs)
        large = {one.tensor for _, reads in groups for one in reads if one.choice is not None}
        program = traced
        self._unchecked: ClosedJaxpr | None = None
        if large and jax.default_backend() == "cpu":
            banks = [
                traced.jaxpr.invars[self._kernels[t.name]] for t in block.targets if t.num_experts
            ]
            program = with_routed_products(traced, expert_products(traced.jaxpr, banks).values())
            self._unchecked = ClosedJaxpr(traced.jaxpr.replace(outvars=outputs), traced.consts)
        num_values = len(block.layer.weights)
        self._stages = _cut(program, num_values=num_values, results=results, large=large)
        self._refuse_loops(program.jaxpr, results)

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all groups' inputs."""
        return tuple(shape for shapes in self.group_shapes for shape in shapes)

    def run_stage(
        self, stage: int, weights: Sequence[Any], live: tuple[Any, ...]
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Run one stage on one micro-batch.

        Args:
            stage: up to the inputs of this group, or to what the block gives if there is none.
            weights: the block's, in the order of `layer.weights`.
            live: what the stage before left; for stage 0, what the block takes.

        Returns:
            the group's inputs or what the block gives, and `live` for the next stage; of this what
            was live before is the very same arrays. Inputs that experts have of their own,
            [experts, rows, in_features], are followed by the router's choice, [rows, experts per
            row].
        """
        program = self._stages[stage]
        found = program.run(*(weights[i] for i in program.reads), *live)
        known = (*live, *found)
        return tuple(found[: program.num_results]), tuple(known[i] for i in program.leaves)

    def check_routing(self, weights: Sequence[Any], taken: Sequence[Any]) -> None:
        """Compare, once, with KerasHub's own answer for a micro-batch, if experts are routed here.

        Args:
            weights: the block's, in the order of `layer.weights`.
            taken: what the block takes.

        Raises:
            SourceError: it is another one.
        """
        if self._unchecked is None:
            return
        expected = jax.jit(jaxpr_as_fun(self._unchecked))(*weights, *taken)
        found, live = self.run_stage(0, weights, tuple(taken))
        for stage in range(1, len(self._stages)):
            found, live = self.run_stage(stage, weights, live)
        for ours, theirs in zip(found, expected, strict=True):
            off, size = _norm(ours - theirs), _norm(theirs)
            # Where KerasHub's answer is not finite, there is nothing to compare with.
            if math.isfinite(size) and not off <= _ROUNDING * size:
                raise SourceError(
                    f"{self._block.name}: its output changes by {off / size:.1%} if experts leave "
                    "out the tokens that its router does not send to them, so that they cannot be "
                    "calibrated on the tokens that it does; give its experts int8, int4 or null"
                )
        self._unchecked = None

    def groups_of(self, block: Block) -> tuple[InputGroup, ...]:
        """The groups of a block of the same signature, some of whose layers may be named apart."""
        ours, theirs = ([target.name for target in one.targets] for one in (self._block, block))
        names = dict(zip(ours, theirs, strict=True))
        return tuple(
            replace(group, targets=tuple(names[name] for name in group.targets))
            for group in self.groups
        )

    def leaves_little(self, stage: int) -> bool:
        """Whether what a stage leaves for the next can be kept for all micro-batches.

        The inputs that experts have of their own are as large as all experts' outputs: a
        micro-batch that has them is brought there again where they are needed.
        """
        return not self._stages[stage].leaves_large

    def _refuse_loops(self, whole: Jaxpr, results: Sequence[Sequence[Any]]) -> None:
        """Check that no group's kernels are used before all of its inputs are known.

        Otherwise a stage would compute on with the float kernel, and calibrate the layer on what
        the quantized one never gives.
        """
        for group, end in zip(self.groups, _ends(whole, results), strict=False):
            for name in group.targets:
                kernel = whole.invars[self._kernels[name]]
                if kernel in _used(whole.eqns[:end], ()):
                    raise SourceError(
                        f"{self._block.name}/{name}: called again on what was computed with it, so "
                        "that it has no input to calibrate on; give it a scheme that needs no "
                        "calibration, or null"
                    )


def trace_block(
    block: Block, inputs: Sequence[jax.ShapeDtypeStruct], recorded: Sequence[Target]
) -> tuple[ClosedJaxpr, list[str]]:
    """Trace a block's call, without computing anything.

    Args:
        inputs: shapes and dtypes of what the call takes.
        recorded: targets of which to record the inputs.

    Returns:
        (weights, inputs) → the inputs of these targets' calls, in the order of the calls, and what
        the block gives; and the names of the targets called.
    """
    call = block.calls[0]
    names: list[str] = []

    def run(weights: Sequence[Array], values: Sequence[Array]) -> list[Array]:
        args, kwargs = call.bind(values)
        with recorded_inputs(recorded) as calls:
            output = call_with(block.layer, weights, *args, **kwargs)
        names.extend(target.name for target, _ in calls)
        return [*(tensor for _, tensor in calls), *call.given(output)]

    weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in block.layer.weights]
    return jax.make_jaxpr(run)(weights, list(inputs)), names


def hidden_states(given: Sequence[Any]) -> list[int]:
    """Of what a block gives, by place: vectors of numbers, [batch, positions, features].

    Args:
        given: shapes and dtypes.
    """
    return [
        place
        for place, one in enumerate(given)
        if len(one.shape) == 3 and jnp.issubdtype(one.dtype, jnp.floating)
    ]


@dataclass(frozen=True)
class _Read:
    """One input of a target, as a variable of the traced program.

    Attributes:
        axes: of in_features, counted from the end.
        choice: where each expert has rows of its own, the router's choice.
    """

    tensor: Any
    axes: tuple[int, ...]
    choice: Any | None = None

    @property
    def results(self) -> tuple[Any, ...]:
        """What a stage gives of it."""
        return (self.tensor,) if self.choice is None else (self.tensor, self.choice)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Its axes that are neither of in_features nor of experts."""
        shape = self.tensor.aval.shape
        rows = tuple(size for i, size in enumerate(shape) if i - len(shape) not in self.axes)
        return rows if self.choice is None else rows[1:]


def _kernels(block: Block) -> dict[str, int]:
    """Where each target's kernel is among the block's weights."""
    places = {str(variable.path): i for i, variable in enumerate(block.layer.weights)}
    return {target.name: places[target.kernel_path] for target in block.targets}


def _called(
    program: Jaxpr, recorded: Sequence[str], targets: Sequence[Target], kernels: Mapping[str, int]
) -> list[tuple[Target, tuple[_Read, ...]]]:
    """Targets with the inputs of their calls.

    They come in the order of their first calls; in a block of experts, in that of their inputs, so
    that layers beside the experts are not calibrated after them.
    """
    by_name = {target.name: target for target in targets}
    found: dict[str, tuple[_Read, ...]] = {}
    for name, tensor in zip(recorded, program.outvars, strict=False):
        read = _Read(tensor, kernel_layout(by_name[name].layer).input_axes)
        found[name] = (*found.get(name, ()), read)
    banks = {program.invars[kernels[t.name]]: t.name for t in targets if t.num_experts}
    products = expert_products(program, banks)
    for bank, product in products.items():
        read = _Read(product.input, (product.input_axis,), product.choice)
        found[banks[bank]] = (read,)
    if products:
        numbers = {v: i + 1 for i, equation in enumerate(program.eqns) for v in equation.outvars}
        in_order = sorted(found, key=lambda name: numbers.get(found[name][-1].tensor, 0))
        found = {name: found[name] for name in in_order}
    return [(by_name[name], reads) for name, reads in found.items()]


def _grouped(
    called: Sequence[tuple[Target, tuple[_Read, ...]]], statistics: Mapping[str, StatisticsKind]
) -> list[tuple[InputGroup, tuple[_Read, ...]]]:
    """Groups of targets with the same inputs, and these."""
    # Layers that share inputs, but not their axes or what they need to know, form two groups.
    members: dict[tuple[tuple[_Read, ...], StatisticsKind], list[Target]] = {}
    for target, reads in called:
        members.setdefault((reads, statistics[target.name]), []).append(target)
    return [
        (
            InputGroup(
                targets=tuple(target.name for target in targets),
                in_features=targets[0].in_features,
                statistics=kind,
                experts=0 if reads[0].choice is None else targets[0].num_experts,
            ),
            reads,
        )
        for (reads, kind), targets in members.items()
    ]


@dataclass(frozen=True)
class _Stage:
    """A range of a traced program's equations, compiled on its own.

    Attributes:
        run: (the values that it reads, live) → (*results, what else it computes for later stages).
        reads: indices of these values among all of the program.
        leaves: indices among live and what `run` returns; a program's copies would take memory.
        leaves_large: whether a large value is among them.
    """

    run: Any
    reads: list[int]
    leaves: list[int]
    num_results: int
    leaves_large: bool


def _cut(
    traced: ClosedJaxpr, *, num_values: int, results: Sequence[Sequence[Any]], large: Container[Any]
) -> tuple[_Stage, ...]:
    """Cut a traced program into stages.

    What a later stage needs is kept for it, or computed there again (see `derived_values`).

    Args:
        traced: a function of (values, *inputs).
        num_values: how many of its arguments are values, passed to every stage anew.
        results: the variables that each stage gives. One may only be used by equations after it
            and after the results before it.
        large: variables that are too large to be kept.
    """
    whole = traced.jaxpr
    values, inputs = whole.invars[:num_values], whole.invars[num_values:]
    derived = derived_values(whole, inputs)
    stages = []
    live: list[Any] = list(inputs)
    start = 0
    for index, (end, result) in enumerate(zip(_ends(whole, results), results, strict=True)):
        equations = whole.eqns[start:end]
        again = [derived[v].equations for v in _used(equations, result) if v in derived]
        missing = sorted(i for i in frozenset().union(*again) if i < start)
        repeated = [x for x in map(whole.eqns.__getitem__, missing) if set(x.outvars) - set(live)]
        equations = [*repeated, *equations]
        used = _used(equations, result)
        used_later = _used(whole.eqns[end:], [v for later in results[index + 1 :] for v in later])
        kept = used_later - derived.keys()
        kept |= {v for made in used_later & derived.keys() for v in derived[made].inputs}
        defined = [*live, *(v for equation in equations for v in equation.outvars)]
        left = [v for v in dict.fromkeys(defined) if v in kept]
        new = [v for v in left if v not in live and v not in result]
        known = [*live, *result, *new]
        reads = [i for i, value in enumerate(values) if value in used]
        constants = [
            (v, constant)
            for v, constant in zip(whole.constvars, traced.consts, strict=True)
            if v in used
        ]
        program = Jaxpr(
            constvars=[v for v, _ in constants],
            invars=[*(values[i] for i in reads), *live],
            outvars=[*result, *new],
            eqns=equations,
            effects=whole.effects,
            debug_info=whole.debug_info.with_unknown_names(),
        )
        closed = ClosedJaxpr(program, [constant for _, constant in constants])
        leaves = [known.index(v) for v in left]
        leaves_large = any(v in large for v in left)
        run = jax.jit(jaxpr_as_fun(closed))
        stages.append(_Stage(run, reads, leaves, len(result), leaves_large))
        live, start = left, end
    return tuple(stages)


def _ends(program: Jaxpr, results: Sequence[Sequence[Any]]) -> list[int]:
    """The number of equations up to each stage's results; all of them for the last."""
    defined_by = {v: i + 1 for i, equation in enumerate(program.eqns) for v in equation.outvars}
    ends: list[int] = []
    for result in results:
        numbers = [0 if isinstance(v, Literal) else defined_by.get(v, 0) for v in result]
        ends.append(max([*numbers, *ends[-1:]]))
    ends[-1] = len(program.eqns)
    return ends


def _norm(array: Array) -> float:
    return float(jnp.linalg.norm(array.astype(jnp.float32).ravel()))


def _used(equations: Sequence[Any], results: Sequence[Any]) -> set[Any]:
    """The variables that equations and results use."""
    used = [*(v for equation in equations for v in equation.invars), *results]
    return {v for v in used if not isinstance(v, Literal)}
