"""What a worker knows of its plan's model: skeletons, weights, parts and compiled programs."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import keras
import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.parts import Part, cut_parts, decode_part
from pipeline.errors import SourceError
from pipeline.model.blocks import Block, BlockGraph, Call, find_blocks
from pipeline.model.inputs import InputBatch, InputLayout, input_layout
from pipeline.model.preset import INDEX_FILE, TASK_WEIGHTS_FILE, read_preset
from pipeline.model.preset_json import base_policy, converted_files, policy_map
from pipeline.model.skeleton import Skeleton, build_skeleton
from pipeline.model.targets import Target, outputs_with
from pipeline.plan import Plan
from pipeline.recipe.recipe import statistics_of
from pipeline.run.worker_api import Values
from pipeline.weights.digests import values_digest
from pipeline.weights.source import open_source
from pipeline.worker.block_program import BlockProgram
from quantizer import kernel_layout
from quantizer.keras_format.variables import decode_kernel


class ModelState:
    """A plan's model in this process; all of it can be rebuilt from plan and source.

    Attributes:
        skeleton: the source, in its own dtype.
    """

    def __init__(self, plan: Plan, source_url: str) -> None:
        self.plan = plan
        self._preset = read_preset(source_url).in_dtype(plan.recipe.dtype)
        self.skeleton = build_skeleton(self._preset)
        self._source = open_source(self._preset, self.skeleton)
        self._programs: dict[tuple[Any, ...], BlockProgram] = {}
        self._functions: dict[int, Any] = {}

    @cached_property
    def graph(self) -> BlockGraph:
        """The model that is calibrated, which computes in the plan's dtype."""
        return find_blocks(self._forward_skeleton)

    @cached_property
    def _forward_skeleton(self) -> Skeleton:
        # Skeletons grow with the number of blocks: one serves both purposes where it can.
        if self._base_policy == self.plan.forward_dtype:
            return self.skeleton
        return build_skeleton(self._preset, self.plan.forward_dtype)

    @cached_property
    def _base_policy(self) -> str:
        """The dtype policy of the layers that stay in float."""
        return base_policy(self.skeleton.backbone_json)

    @property
    def compute_dtype(self) -> str:
        """The dtype in which the layers that stay in float compute."""
        return str(keras.DTypePolicy(self._base_policy).compute_dtype)

    @property
    def scale_dtype(self) -> str:
        """The dtype in which the scales of most layers are stored: that of their weights."""
        return str(keras.DTypePolicy(self._base_policy).variable_dtype)

    def _quantized_skeleton(self, base: str) -> Skeleton:
        """The model of the artifact, with policy `base` for the layers that stay in float."""
        return build_skeleton(self._preset, policy_map(base, self.plan.policies))

    @cached_property
    def evaluation_models(self) -> tuple[tuple[Skeleton, BlockGraph], tuple[Skeleton, BlockGraph]]:
        """Source and artifact in their own dtypes, as stock Keras runs them."""
        base, source = self._base_policy, self.skeleton
        graph = self.graph if base == self.plan.forward_dtype else find_blocks(source)
        artifact = self._quantized_skeleton(base)
        return (source, graph), (artifact, find_blocks(artifact))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What each file of the artifact holds."""
        quantized = self._quantized_skeleton(self._base_policy)
        # By name, which all skeletons of a preset share; finding the blocks again takes long.
        layers = [quantized.backbone.get_layer(block.name) for block in self.graph.blocks]
        parts = cut_parts(quantized.stored, layers)
        del quantized, layers
        # Layers refer to each other in cycles: without this they would stay for the whole run.
        gc.collect()
        return parts

    def preset_files(self) -> dict[str, bytes]:
        """The source's files other than the backbone's weights, as KerasHub saves them, by name."""
        if self._preset.format == "huggingface":
            return converted_files(self._preset, self.skeleton)
        json_files = self._preset.json_files
        names = {*json_files, *self._preset.assets} - {INDEX_FILE}
        if TASK_WEIGHTS_FILE in self._preset.sizes:
            names.add(TASK_WEIGHTS_FILE)
        return {name: json_files.get(name) or self._preset.read(name) for name in sorted(names)}

    def targets(self, part: int) -> dict[str, Target]:
        """The quantizable layers of a part, by path."""
        graph = self.graph
        targets = graph.rest_targets if part == 0 else graph.blocks[part - 1].targets
        return {target.path: target for target in targets}

    def read(self, part: int) -> dict[str, NDArray[Any]]:
        """The source's arrays of one part, by variable path.

        Raises:
            SourceError: they cannot be read, or are not those that the plan was made for.
        """
        if part:
            values = self._source.read_layer(self.graph.blocks[part - 1].layer)
        else:
            values = self._source.read(self._source.rest_paths(self.graph))
        planned = self.plan.parts[part]
        digest = values_digest(values)
        if digest != planned.source_sha256:
            raise SourceError(
                f"{self._preset.url}: the weights of {planned.name} changed since the run was "
                f"planned (SHA-256 {digest[:12]}, planned {planned.source_sha256[:12]}); put them "
                "back and resume, or start a new run elsewhere"
            )
        return values

    def dequantized_kernels(self, part: int, data: bytes) -> dict[str, NDArray[np.float32]]:
        """The quantized kernels in a committed file, dequantized, by the path of their variable."""
        values = decode_part(self.parts[part], data)
        by_layer: dict[str, dict[str, NDArray[Any]]] = {}
        by_path: dict[str, NDArray[Any]] = {}
        for stored in self.parts[part].variables:
            value = by_path[str(stored.variable.path)] = values[stored.name_path]
            by_layer.setdefault(stored.layer_path, {})[stored.name] = value
        kernels = {}
        for layer in self.plan.parts[part].layers:
            if layer.scheme is not None and layer.kind == "kernel":
                target = self.targets(part)[layer.path]
                if layer.experts:  # which the file holds dequantized
                    kernels[target.kernel_path] = by_path[target.kernel_path]
                    continue
                kernels[target.kernel_path] = decode_kernel(
                    by_layer[layer.path], kernel_layout(target.layer), layer.scheme
                )
        return kernels

    @cached_property
    def layout(self) -> InputLayout:
        """What the model takes for token windows."""
        return input_layout(self.skeleton)

    def embed(self, values: Values, batch: InputBatch) -> dict[int, NDArray[Any]]:
        """What depends on no block, by the number of the value; `values` are of part 0."""
        weights = in_order(self.graph.embed.weights, values, {})
        inputs = batch.structured(self.graph.embed)
        embedded = self._compiled(self.graph.embed)(weights, inputs)
        return dict(zip(self.graph.embedded, map(np.asarray, embedded), strict=True))

    def call(self, block: int) -> Call:
        """The only call of a block; a plan with calibration has no blocks that share weights."""
        [call] = self.graph.blocks[block].calls
        return call

    def enter(
        self, block: int, values: Values, given: Mapping[int, NDArray[Any]]
    ) -> dict[int, NDArray[Any]]:
        """Run the glue before a block, and keep what the block or anything after it uses.

        Args:
            block: where the values go; the number of blocks if they go to the head.
            values: at least those of part 0 that glue needs (see `glue_paths`).
            given: what was live before the glue, by the number of the value.
        """
        if block == len(self.graph.blocks):
            return {number: given[number] for number in self.graph.head_takes}
        call, found = self.call(block), dict(given)
        if call.glue is not None:
            weights = in_order(call.glue.model.weights, values, {})
            taken = [given[number] for number in call.glue.takes]
            results = self._compiled(call.glue.model)(weights, taken)
            found |= zip(call.glue.gives, map(np.asarray, results), strict=True)
        return {number: found[number] for number in call.live}

    @cached_property
    def glue_paths(self) -> frozenset[str]:
        """Paths of the variables that lie between blocks, such as an encoder's last norm."""
        models = [call.glue.model for call in self.graph.calls if call.glue is not None]
        return frozenset(str(variable.path) for model in models for variable in model.weights)

    def _compiled(self, model: keras.Model) -> Any:
        """(weights, inputs) → the model's outputs."""
        key = id(model)  # which the graph keeps alive
        if key not in self._functions:
            self._functions[key] = jax.jit(
                lambda weights, inputs: outputs_with(model, weights, inputs)
            )
        return self._functions[key]

    def program(self, block: Block, taken: Sequence[Any]) -> BlockProgram:
        """The block's compiled program for micro-batches of this shape.

        Args:
            taken: the values that the block's call takes.
        """
        layers = self.plan.parts[block.index + 1].layers
        statistics = {layer.name: statistics_of(layer.scheme) for layer in layers}
        inputs = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in taken)
        # By their order: Keras numbers some names.
        kinds = tuple(statistics[target.name] for target in block.targets)
        key = (block.signature, kinds, inputs)
        if key not in self._programs:
            self._programs[key] = BlockProgram(block, statistics, inputs)
        return self._programs[key]


def in_order(
    variables: Sequence[Any], values: Values, replaced: Mapping[str, NDArray[np.float32]]
) -> list[NDArray[Any]]:
    """Values of variables, in their order and dtype: those replaced, otherwise the source's."""
    return [
        np.asarray(replaced.get(variable.path, values[variable.path]), dtype=variable.dtype)
        for variable in variables
    ]
