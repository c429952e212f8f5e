"""Find what can take up the input scales of layers with a foldable awq: it is planned, not tried.

Everything that reads the input must be a layer with the same scheme, and all that is divided must
be weights of the block that nothing else uses (see `pipeline.planning.scale_paths`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from pipeline.calibration.windows import TokenWindows
from pipeline.fold import Fold, FoldedVariable
from pipeline.model.blocks import Block, BlockGraph, Call
from pipeline.model.call_shapes import taken_by
from pipeline.model.inputs import InputLayout
from pipeline.model.targets import call_with, recorded_inputs
from pipeline.plan import InputGroup, LayerPlan
from pipeline.planning.flat_program import FlatProgram, flat_program
from pipeline.planning.input_groups import embedded_shapes
from pipeline.planning.scale_paths import ScalePath, ScalePaths, Strides
from quantizer import kernel_layout
from quantizer.schemes import AWQScheme, Float8Scheme, Scheme

_NOTHING = "no norm or layer before it can take up scales and change nothing else"

_Groups = tuple[InputGroup, ...]
_Layers = tuple[LayerPlan, ...]


def with_folds(
    graph: BlockGraph,
    layout: InputLayout,
    layers: Sequence[_Layers],
    groups: Sequence[_Groups],
    windows: TokenWindows,
    micro_batch: int,
) -> tuple[list[_Layers], list[_Groups]]:
    """Each block's layers and groups, with the folds of those that have a foldable awq.

    Where there is none, the layers' notes say why.

    Args:
        layers, groups: of every block.
    """
    if not any(_foldable(layer.scheme) for of_block in layers for layer in of_block):
        return list(layers), list(groups)
    values = embedded_shapes(graph, layout, windows, micro_batch)
    glue = [call.glue.model for call in graph.calls if call.glue is not None]
    users = [*(block.layer for block in graph.blocks), graph.embed, graph.head, *glue]
    uses = Counter(id(variable) for user in users for variable in user.weights)
    # Blocks of one signature, schemes and inputs have the same folds.
    traces: dict[tuple[Any, ...], _Traced] = {}
    noted, folded = [], []
    for call, planned, of_block in zip(graph.calls, layers, groups, strict=True):
        block, taken = graph.blocks[call.block], taken_by(call, values)
        schemes = {layer.name: layer.scheme for layer in planned}
        key = (call.signature, taken, tuple(schemes.items()))
        if key not in traces:
            traces[key] = _Traced.of(block, call, taken, schemes)
        values |= zip(call.gives, traces[key].outputs, strict=True)
        shared = [v for v in block.layer.weights if uses[id(v)] > 1]
        notes: dict[str, str] = {}
        found = []
        for group in of_block:
            fold = traces[key].fold(group, block) if _wants_fold(group, schemes) else None
            if isinstance(fold, Fold) and not fold.paths.isdisjoint(v.path for v in shared):
                fold = "another block uses what gives this input"
            if isinstance(fold, str):
                notes |= {name: fold for name in group.targets if _foldable(schemes[name])}
                fold = None
            found.append(dataclasses.replace(group, fold=fold))
        folded.append(tuple(found))
        noted.append(
            tuple(
                dataclasses.replace(one, note=f"not foldable: {notes[one.name]}")
                if one.name in notes
                else one
                for one in planned
            )
        )
    return noted, folded


def _foldable(scheme: Scheme | None) -> bool:
    return isinstance(scheme, AWQScheme) and scheme.foldable


def _wants_fold(group: InputGroup, schemes: Mapping[str, Scheme | None]) -> bool:
    return any(_foldable(schemes[name]) for name in group.targets)


@dataclass(frozen=True)
class _Traced:
    """A traced block.

    Attributes:
        outputs: shapes and dtypes of what its call gives.
        inputs: of each layer that it calls, by name, the inputs of its calls.
        kept: values that the rest of the model takes.
    """

    program: FlatProgram
    paths: ScalePaths
    outputs: Sequence[jax.ShapeDtypeStruct]
    inputs: Mapping[str, tuple[int, ...]]
    kept: tuple[int, ...]
    schemes: Mapping[str, Scheme | None]

    @classmethod
    def of(
        cls,
        block: Block,
        call: Call,
        taken: Sequence[jax.ShapeDtypeStruct],
        schemes: Mapping[str, Scheme | None],
    ) -> _Traced:
        names: list[str] = []

        def run(weights: Any, values: Any) -> list[Any]:
            args, kwargs = call.bind(values)
            with recorded_inputs(block.targets) as recorded:
                output = call_with(block.layer, weights, *args, **kwargs)
            names.extend(target.name for target, _ in recorded)
            return [*(tensor for _, tensor in recorded), *call.given(output)]

        weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in block.layer.weights]
        traced = jax.make_jaxpr(run)(weights, list(taken))
        program = flat_program(traced)
        inputs: dict[str, tuple[int, ...]] = {}
        for name, value in zip(names, program.results, strict=False):
            inputs[name] = (*inputs.get(name, ()), value)
        outputs = traced.out_avals[len(names) :]
        return cls(
            program=program,
            paths=ScalePaths(program, program.arguments[: len(weights)]),
            outputs=[jax.ShapeDtypeStruct(one.shape, one.dtype) for one in outputs],
            inputs=inputs,
            kept=program.results[len(names) :],
            schemes=schemes,
        )

    def fold(self, group: InputGroup, block: Block) -> Fold | str:
        """A fold for these layers, or why there is none."""
        scheme = self.schemes[group.targets[0]]
        others = [name for name in group.targets if self.schemes[name] != scheme]
        if others:
            return f"{others[0]} reads the same input, by another scheme"
        inputs = {value for name in group.targets for value in self.inputs[name]}
        if len(inputs) > 1:
            return "it is called on several inputs"
        [value] = inputs
        targets = {target.name: target for target in block.targets}
        dtypes = {str(variable.path): str(variable.dtype) for variable in block.layer.weights}
        if len({dtypes[targets[name].kernel_path] for name in group.targets}) > 1:
            return f"{' and '.join(group.targets)} are stored in different dtypes"
        foreign = self._foreign_reader(value, group, block)
        if foreign:
            return foreign
        strides = _strides(
            self.program.shapes[value], kernel_layout(targets[group.targets[0]].layer).input_axes
        )
        obstacle = _NOTHING
        for path in self.paths.to(value, strides):
            found = self._checked(path, value, group.in_features, block)
            if isinstance(found, Fold):
                return found
            if obstacle == _NOTHING:
                obstacle = found
        return obstacle

    def _foreign_reader(self, value: int, group: InputGroup, block: Block) -> str:
        """What reads an input beside the layers of its group; "" if nothing does."""
        elsewhere = "its input goes elsewhere too"
        if value in self.kept:
            return elsewhere
        weights = [str(variable.path) for variable in block.layer.weights]
        own = {target.kernel_path for target in block.targets if target.name in group.targets}
        for argument in self.paths.readers(value):
            if argument is None or argument >= len(weights):
                return elsewhere
            if weights[argument] not in own:
                layer = weights[argument].rpartition("/")[0].removeprefix(f"{block.layer.path}/")
                return f"{layer} reads the same input, but not by this scheme"
        return ""

    def _checked(self, path: ScalePath, end: int, in_features: int, block: Block) -> Fold | str:
        if self.paths.leaks(path, end, self.kept):
            return _NOTHING
        weights = [str(variable.path) for variable in block.layer.weights]
        layers = {target.kernel_path: target.name for target in block.targets}
        for argument in path.arguments:
            layer = layers.get(weights[argument], "")
            if isinstance(self.schemes.get(layer), Float8Scheme):
                return f"{layer} gives this input, and float8 has no scale for each of its rows"
        fold = Fold(
            variables=tuple(
                FoldedVariable(path=weights[argument], strides=strides, offset=offset)
                for argument in sorted(path.arguments)
                for strides, offset in [path.values[argument]]
            ),
            shared=tuple(sorted(path.shared)),
        )
        if len(set(fold.scale_of_input(in_features).tolist())) == 1:
            return "all of its inputs would have to share one scale"
        return fold


def _strides(shape: Sequence[int], input_axes: Sequence[int]) -> Strides:
    """The strides of a layer's input among its features."""
    found, step = [0] * len(shape), 1
    for axis in reversed(input_axes):
        found[axis] = step
        step *= shape[axis]
    return tuple(found)
