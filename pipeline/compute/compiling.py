"""Solver programs compiled in a thread of their own, beside what is done until they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.plan import LayerPlan, Plan
from pipeline.source.quantizable import Target
from quantizer import kernel_layout, scheme_from_dict
from quantizer.ahead import compile_solver
from quantizer.schemes import GPTQScheme

_Kind = tuple[str, int, int]
"""What makes a program of its own: scheme, in words, and shape."""


class CompiledAhead:
    """GPTQ's programs for the blocks of a plan, in the order of their first use."""

    def __init__(
        self, plan: Plan, targets: Callable[[int], Mapping[str, Target]], scale_dtype: str
    ) -> None:
        """Nothing is compiled yet.

        Args:
            targets: the layers of a part, by path.
            scale_dtype: in which most scales will be stored; others are compiled when needed.
        """
        self._plan, self._targets, self._scale_dtype = plan, targets, scale_dtype
        self._begun: dict[_Kind, Future[None]] = {}

    def begin(self) -> None:
        """Where blocks are to be solved soon; evaluating a result needs none of it."""
        if self._begun:
            return
        pool = ThreadPoolExecutor(1, thread_name_prefix="compiling")
        for part, layer in _in_order(self._plan):
            kind = _kind(layer)
            scheme = None if layer.scheme is None else scheme_from_dict(layer.scheme)
            if not isinstance(scheme, GPTQScheme) or kind in self._begun:
                continue
            # Kernels that Keras groups otherwise are solved in slices that hang on their layout.
            if kernel_layout(self._targets(part)[layer.path].layer).keras_rows_are_inputs:
                shape = layer.out_features, layer.in_features
                self._begun[kind] = pool.submit(
                    compile_solver, *shape, scheme, scale_dtype=self._scale_dtype
                )
        pool.shutdown(wait=False)

    def await_for(self, layers: Sequence[LayerPlan]) -> None:
        """Wait for what is to solve these; to compile it twice would cost more."""
        for layer in layers:
            begun = self._begun.get(_kind(layer))
            if begun is not None:
                begun.result()


def _in_order(plan: Plan) -> list[tuple[int, LayerPlan]]:
    """The blocks' calibrated layers as their groups take turns, each with its part."""
    found = []
    for part in plan.parts[1:]:
        layers = {layer.name: layer for layer in part.layers}
        found += [(part.part, layers[name]) for group in part.groups for name in group.targets]
    return found


def _kind(layer: LayerPlan) -> _Kind:
    return repr(layer.scheme), layer.out_features, layer.in_features
