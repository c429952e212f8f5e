"""What a worker knows of its plan's model: skeletons, weights, parts and compiled programs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import keras
import numpy as np
from jax import Array
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
from pipeline.run.worker_api import Values
from pipeline.weights.digests import read_side_by_side
from pipeline.weights.source import open_source
from pipeline.worker.activation_memory import ActivationMemory
from pipeline.worker.block_program import BlockProgram
from pipeline.worker.tune import BlockTuner


class ModelState:
    """A plan's model in this process; all of it can be rebuilt from plan and source.

    One thread may compute while another reads and a third uses `parts`.

    Attributes:
        skeleton: the source, in its own dtype.
        graph: the model that is calibrated, which computes in the plan's dtype.
        parts: what each file of the artifact holds.
        tuner: trains blocks.
    """

    def __init__(self, plan: Plan, source_url: str) -> None:
        self.plan = plan
        self._preset = read_preset(source_url).in_dtype(plan.recipe.dtype)
        self.skeleton = build_skeleton(self._preset)
        self._source = open_source(self._preset, self.skeleton)
        self._preparing = threading.Lock()
        # Keras must not trace a model in two threads at once.
        self._tracing = threading.RLock()
        # Now, while there is one thread: Keras must not build one model while it traces another,
        # and all that a worker does needs them.
        self.graph: BlockGraph = find_blocks(self._forward_skeleton)
        self.parts: tuple[Part, ...] = self._cut_parts()
        self._programs: dict[tuple[Any, ...], BlockProgram] = {}
        self._functions: dict[int, Any] = {}
        self.tuner = BlockTuner(plan)

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

    def _cut_parts(self) -> tuple[Part, ...]:
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

    def read(self, part: int, threads: int = 1) -> dict[str, NDArray[Any]]:
        """The source's arrays of one part, by variable path; several calls may read side by side.

        Args:
            threads: that read and hash for this call.

        Raises:
            SourceError: they cannot be read, or are not those that the plan was made for.
        """
        with self._preparing:
            self._source.prepare()
        if part:
            paths = self._source.layer_paths(self.graph.blocks[part - 1].layer)
        else:
            paths = self._source.rest_paths(self.graph)
        values, digest = read_side_by_side(self._source, self._source.sized(paths), threads)
        planned = self.plan.parts[part]
        if digest != planned.source_sha256:
            raise SourceError(
                f"{self._preset.url}: the weights of {planned.name} changed since the run was "
                f"planned (SHA-256 {digest[:12]}, planned {planned.source_sha256[:12]}); put them "
                "back and resume, or start a new run elsewhere"
            )
        return values

    def committed(
        self, part: int, data: bytes
    ) -> tuple[dict[str, dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
        """What a committed file holds: of the layers with a scheme, and of what stays in float.

        Returns:
            variables by the layer's path and their own names; and others by their paths.
        """
        values = decode_part(self.parts[part], data)
        parts = self.plan.parts[part]
        solved: dict[str, dict[str, NDArray[Any]]] = {
            layer.path: {} for layer in parts.layers if layer.scheme is not None
        }
        floats = {}
        for stored in self.parts[part].variables:
            # Experts are a variable of a layer; others are all variables of one.
            path = str(stored.variable.path)
            for owner in (stored.layer_path, path):
                if owner in solved:
                    solved[owner][stored.name] = values[stored.name_path]
            if stored.layer_path not in solved and path not in solved:
                floats[path] = values[stored.name_path]
        return solved, floats

    @cached_property
    def layout(self) -> InputLayout:
        """What the model takes for token windows."""
        return input_layout(self.skeleton)

    def embed(self, weights: Sequence[Array], batch: InputBatch) -> dict[int, Array]:
        """What depends on no block, by the number of the value.

        Args:
            weights: of `graph.embed`, on the device (see `place_weights`).
        """
        inputs = batch.structured(self.graph.embed)
        embedded = self._compiled(self.graph.embed)(weights, inputs)
        return dict(zip(self.graph.embedded, embedded, strict=True))

    def call(self, block: int) -> Call:
        """The only call of a block; a plan with calibration has no blocks that share weights."""
        [call] = self.graph.blocks[block].calls
        return call

    def glue_weights(self, block: int, values: Values) -> list[Array]:
        """On the device, the weights of the glue before a block; the number of blocks: the head.

        Args:
            values: at least those of part 0 that glue needs (see `glue_paths`).
        """
        glue = None if block == len(self.graph.blocks) else self.call(block).glue
        return [] if glue is None else place_weights(glue.model.weights, values)

    def enter(
        self,
        block: int,
        weights: Sequence[Array],
        given: Mapping[int, Array],
        memory: ActivationMemory,
    ) -> dict[int, Array]:
        """Run the glue before a block, and keep what the block or anything after it uses.

        Args:
            block: where the values go; the number of blocks if they go to the head.
            weights: of the glue (see `glue_weights`).
            given: what was live before the glue, by the number of the value, kept in `memory`.
        """
        if block == len(self.graph.blocks):
            return {number: given[number] for number in self.graph.head_takes}
        call, found = self.call(block), dict(given)
        if call.glue is not None:
            taken = memory.fetch([given[number] for number in call.glue.takes])
            results = self._compiled(call.glue.model)(weights, list(taken))
            found |= zip(call.glue.gives, memory.keep(results), strict=True)
        return {number: found[number] for number in call.live}

    @cached_property
    def glue_paths(self) -> frozenset[str]:
        """Paths of the variables that lie between blocks, such as an encoder's last norm."""
        models = [call.glue.model for call in self.graph.calls if call.glue is not None]
        return frozenset(str(variable.path) for model in models for variable in model.weights)

    def _compiled(self, model: keras.Model) -> Any:
        """(weights, inputs) → the model's outputs."""
        key = id(model)  # which the graph keeps alive
        with self._tracing:
            if key not in self._functions:

                def run(weights: Sequence[Array], inputs: Any) -> Any:
                    with self._tracing:
                        return outputs_with(model, weights, inputs)

                self._functions[key] = jax.jit(run)
        return self._functions[key]

    def program(self, block: Block, taken: Sequence[Any]) -> BlockProgram:
        """The block's compiled program for micro-batches of this shape.

        Args:
            taken: the values that the block's call takes.
        """
        groups = self.plan.parts[block.index + 1].groups
        statistics = {name: group.statistics for group in groups for name in group.targets}
        inputs = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in taken)
        # By their order: Keras numbers some names.
        kinds = tuple(statistics.get(target.name) for target in block.targets)
        key = (block.signature, kinds, inputs)
        with self._tracing:
            if key not in self._programs:
                self._programs[key] = BlockProgram(block, statistics, inputs)
        return self._programs[key]


def place_weights(variables: Sequence[Any], values: Values) -> list[Array]:
    """Values of variables on the device, in their order and dtype.

    What its own dtype holds exactly in fewer bytes is widened there; all else is rounded here.
    """
    dtypes = [np.dtype(variable.dtype) for variable in variables]
    arrays = [values[variable.path] for variable in variables]
    sent = jax.device_put(
        [
            array if np.can_cast(array.dtype, dtype) else array.astype(dtype)
            for array, dtype in zip(arrays, dtypes, strict=True)
        ]
    )
    narrow = [i for i, dtype in enumerate(dtypes) if sent[i].dtype != dtype]
    if narrow:
        widened = _in_dtypes([sent[i] for i in narrow], tuple(dtypes[i] for i in narrow))
        for i, array in zip(narrow, widened, strict=True):
            sent[i] = array
    return list(sent)


@partial(jax.jit, static_argnames=("dtypes",))
def _in_dtypes(arrays: Sequence[Array], dtypes: tuple[np.dtype[Any], ...]) -> list[Array]:
    return [array.astype(dtype) for array, dtype in zip(arrays, dtypes, strict=True)]
