"""What one process needs to know of a model to work on its parts: skeletons, files, programs."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import keras
import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.parts import INDEX_FILE, Part, cut_parts, decode_part
from pipeline.errors import SourceError
from pipeline.model.blocks import Block, BlockGraph, find_blocks
from pipeline.model.converted_files import converted_files
from pipeline.model.preset import read_preset
from pipeline.model.quantized_config import base_policy, policy_map
from pipeline.model.skeleton import Skeleton, build_skeleton
from pipeline.model.stateless import call_with
from pipeline.model.targets import Target
from pipeline.model.tokenizer import model_inputs
from pipeline.plan import Plan
from pipeline.recipe.recipe import statistics_of
from pipeline.run.worker_api import Values
from pipeline.weights.source import open_source, values_digest
from pipeline.worker.block_program import BlockProgram
from quantizer import kernel_layout
from quantizer.keras_format.variables import restore_kernel

TASK_WEIGHTS = "task.weights.h5"
"""Where KerasHub keeps what a task has beside its backbone."""


class ModelState:
    """A plan's model in this process. Everything in it can be built again from plan and source.

    The model that is calibrated computes in float32, whatever its weights are stored in.
    """

    def __init__(self, plan: Plan, source_url: str) -> None:
        self.plan = plan
        self._preset = read_preset(source_url)
        self.own = build_skeleton(self._preset)
        """The source as it is, in its own dtype."""
        self.source = open_source(self._preset, self.own)
        self._programs: dict[tuple[Any, ...], BlockProgram] = {}

    @cached_property
    def graph(self) -> BlockGraph:
        """In float32: what is calibrated."""
        return find_blocks(self._calibrated)

    @cached_property
    def _calibrated(self) -> Skeleton:
        # Skeletons grow with the number of blocks: one serves two ends where it can.
        return self.own if self._base == "float32" else build_skeleton(self._preset, "float32")

    @cached_property
    def _base(self) -> str:
        return base_policy(self.own.backbone_json)

    def _quantized(self, base: str) -> Skeleton:
        """As the artifact's JSON describes it, but for the dtype of what is not quantized."""
        return build_skeleton(self._preset, policy_map(base, self.plan.policies))

    @cached_property
    def evaluated(self) -> tuple[Skeleton, Skeleton]:
        """Source and result as they can be run here: as they are, where JAX can do that."""
        if self._base != "float16" or jax.default_backend() != "cpu":
            return self.own, self._quantized(self._base)
        # JAX has no float16 attention on a CPU. Float32 holds every float16, so the model is
        # the same, only computed more exactly.
        return self._calibrated, self._quantized("float32")

    @cached_property
    def evaluated_graphs(self) -> tuple[BlockGraph, BlockGraph]:
        """Their blocks."""
        source, result = self.evaluated
        graph = self.graph if source is self._calibrated else find_blocks(source)
        return graph, find_blocks(result)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What each file of the artifact holds."""
        quantized = self._quantized(self._base)
        # Named alike in every skeleton of one preset; to find the blocks again takes long.
        layers = [quantized.backbone.get_layer(block.name) for block in self.graph.blocks]
        parts = cut_parts(quantized.stored, layers)
        del quantized, layers
        # Layers know each other in circles: they would lie about for the rest of a run.
        gc.collect()
        return parts

    def preset_files(self) -> dict[str, bytes]:
        """The source's files as KerasHub saves a preset, but for its weights, by name."""
        if self._preset.format == "huggingface":
            return converted_files(self._preset, self.own)
        names = {*self._preset.json_files, *self._preset.assets} - {INDEX_FILE}
        if TASK_WEIGHTS in self._preset.sizes:
            names.add(TASK_WEIGHTS)
        given = self._preset.json_files
        return {name: given.get(name) or self._preset.read(name) for name in sorted(names)}

    def targets(self, part: int) -> dict[str, Target]:
        """The quantizable layers of a part, by path."""
        graph = self.graph
        found = graph.rest_targets if part == 0 else graph.blocks[part - 1].targets
        return {target.path: target for target in found}

    @property
    def scale_dtype(self) -> str:
        """In which the scales of most layers are stored: that of their weights."""
        return str(keras.DTypePolicy(self._base).variable_dtype)

    def read(self, part: int) -> dict[str, NDArray[Any]]:
        """The source's arrays of one part, by variable path; part 0 is what no block holds.

        Raises:
            SourceError: they cannot be read, or are not those that the plan was made for.
        """
        if part:
            values = self.source.read_layer(self.graph.blocks[part - 1].layer)
        else:
            values = self.source.read(self.source.rest_paths(self.graph))
        planned = self.plan.parts[part]
        found = values_digest(values)
        if found != planned.source_sha256:
            raise SourceError(
                f"{self._preset.url}: the weights of {planned.name} changed since the run was "
                f"planned (SHA-256 {found[:12]}, planned {planned.source_sha256[:12]}); put them "
                "back and resume, or start a new run elsewhere"
            )
        return values

    def program(self, block: Block, hidden_states: Any, side_inputs: Sequence[Any]) -> BlockProgram:
        """The block's compiled program for micro-batches of this shape."""
        layers = self.plan.parts[block.index + 1].layers
        wanted = {layer.name: statistics_of(layer.scheme) for layer in layers}
        shapes = tuple((tuple(a.shape), str(a.dtype)) for a in (hidden_states, *side_inputs))
        key = (block.signature, tuple(wanted.items()), shapes)
        if key not in self._programs:
            hidden_states, *side_inputs = (
                jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (hidden_states, *side_inputs)
            )
            self._programs[key] = BlockProgram(block, wanted, hidden_states, side_inputs)
        return self._programs[key]

    def embed(
        self, values: Values, tokens: NDArray[np.int32], mask: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], list[NDArray[Any]]]:
        """The hidden_states that enters block 0, and the side_input inputs of all blocks."""
        graph = self.graph
        weights = in_order(graph.embed.weights, values, {})
        hidden_states, *side_inputs = self._embed(weights, model_inputs(graph.embed, tokens, mask))
        return np.asarray(hidden_states), [np.asarray(side_input) for side_input in side_inputs]

    @cached_property
    def _embed(self) -> Any:
        embed = self.graph.embed
        return jax.jit(lambda values, inputs: call_with(embed, values, inputs))

    def kernels(self, part: int, data: bytes) -> dict[str, NDArray[np.float32]]:
        """What a committed file's quantized kernels stand for, by the path of their variable."""
        values = decode_part(self.parts[part], data)
        by_layer: dict[str, dict[str, NDArray[Any]]] = {}
        for stored in self.parts[part].variables:
            by_layer.setdefault(stored.layer_path, {})[stored.name] = values[stored.name_path]
        found = {}
        for layer in self.plan.parts[part].layers:
            if layer.scheme is not None and layer.kind == "kernel":
                target = self.targets(part)[layer.path]
                found[target.kernel_path] = restore_kernel(
                    by_layer[layer.path], kernel_layout(target.layer), layer.scheme
                )
        return found


def in_order(
    variables: Sequence[Any], values: Values, replaced: Mapping[str, NDArray[np.float32]]
) -> list[NDArray[Any]]:
    """Values of variables, in their order and dtype.

    Args:
        values: the source's arrays, by variable path.
        replaced: those that take the place of the source's.
    """
    return [
        np.asarray(replaced.get(variable.path, values[variable.path]), dtype=variable.dtype)
        for variable in variables
    ]
