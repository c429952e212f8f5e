"""The plan of a run: what is quantized how, on which text, in which order.

Everything here decides bytes of the result, except where the source lies, which the digest leaves
out. The number of workers decides none, and is no part of it. Reading a plan needs no Keras.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict

from pipeline.canonical import digest_of
from pipeline.errors import DamagedObjectError
from pipeline.executor.protocol import ComputeSpec
from pipeline.fold import Fold
from pipeline.recipe.recipe import (
    LayerKind,
    Recipe,
    RecipeField,
    SchemeField,
    StatisticsKind,
)
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import STRICT, StoredRecord
from pipeline.tokens_plan import TokensPlan
from quantizer.schemes import GPTQScheme

PLAN_KEY = "plan.json"


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer that holds matrices.

    Attributes:
        name: the path within its block; outside the blocks, the path.
        in_features, out_features: of the matrix; of an embedding, length and number of vectors;
            of a bank of experts, of one expert.
        scheme: how it is quantized; None leaves it in float.
        note: why it stays in float, if not because of its recipe; of a layer with a foldable awq
            that has no input scales, why not.
        slices: ranges of output channels, or of experts with inputs of their own, that different
            workers may solve.
        stacked_weights: of a layer that stock Keras cannot load quantized: the weights of the
            matrices that it stacks; omitted where there are none.
        experts: of a variable that holds the matrices of several experts, how many; omitted of
            ordinary layers.
        experts_per_token: of these, to how many its block sends a token; omitted where it is not
            known.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: str
    name: str
    kind: LayerKind
    in_features: int
    out_features: int
    scheme: SchemeField | None
    note: str = ""
    slices: int = 1
    stacked_weights: int = 0
    experts: int = 0
    experts_per_token: int = 0

    @property
    def num_weights(self) -> int:
        return self.in_features * self.num_rows + self.stacked_weights

    @property
    def num_rows(self) -> int:
        """Output channels of the matrix, or of all experts' matrices."""
        return self.out_features * max(1, self.experts)

    @property
    def corrects_drift(self) -> bool:
        """Whether it is solved for the outputs that it has in the float model."""
        return isinstance(self.scheme, GPTQScheme) and self.scheme.drift_correction > 0

    @property
    def is_trainable(self) -> bool:
        """Whether tuning trains it, where its block is tuned."""
        return isinstance(self.scheme, GPTQScheme) and not self.experts


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much of a model's matrices and tables of tokens is quantized, from 0 to 1.

    Attributes:
        of_model: of all weights in them.
        of_recipe: of those that the recipe asks to quantize, whether stock Keras could load them
            quantized or not.
    """

    of_model: float
    of_recipe: float

    @classmethod
    def of(cls, recipe: Recipe, layers: Sequence[LayerPlan]) -> Self:
        """The share that a recipe's layers make."""
        asked = [x for x in layers if x.scheme or recipe.scheme_for(x.path, x.kind)]
        quantized = _num_weights([layer for layer in asked if layer.scheme])
        return cls(
            of_model=quantized / max(_num_weights(layers), 1),
            of_recipe=quantized / max(_num_weights(asked), 1),
        )


def _num_weights(layers: Iterable[LayerPlan]) -> int:
    return sum(layer.num_weights for layer in layers)


@dataclass(frozen=True, kw_only=True)
class InputGroup:
    """Layers of one block that share an input, and so its statistics and their factorization.

    Attributes:
        targets: the layers' names within the block, in the order of their calls.
        fold: what takes up the input scales of layers with a foldable awq; omitted where nothing
            does.
        experts: where each expert has an input of its own, the number of experts: statistics are
            then by expert, over the rows that the block sends to it; omitted otherwise.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    targets: tuple[str, ...]
    in_features: int
    statistics: StatisticsKind
    fold: Fold | None = None
    experts: int = 0


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """One weights file of the artifact: 0 is everything outside the blocks, i + 1 is block i.

    Attributes:
        name: the block's name; "rest" for part 0.
        source_bytes: size of its variables in the source.
        source_sha256: of their values (see `pipeline.weights.digests`); "" in a dry run's plan.
        groups: inputs of the layers that are calibrated.
        captured: inputs of which the sums over the float model are stored, those of all kernels
            that have any; omitted where a recipe does not use them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    part: int
    name: str
    source_bytes: int
    source_sha256: str
    layers: tuple[LayerPlan, ...]
    groups: tuple[InputGroup, ...] = ()
    captured: tuple[InputGroup, ...] = ()

    @property
    def num_weights(self) -> int:
        return _num_weights(self.layers)

    def corrects_drift(self, group: InputGroup) -> bool:
        """Whether any layer of a group is solved for the outputs that it has in the float model."""
        return any(x.corrects_drift for x in self.layers if x.name in group.targets)


@dataclass(frozen=True, kw_only=True)
class LayersOrigin:
    """The finished run that gives some layers of a part whose others come from another.

    Attributes:
        recipe, manifest_sha256, record_sha256: as of `PartOrigin`.
        layers: paths.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    recipe: str
    manifest_sha256: str
    record_sha256: str
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PartOrigin:
    """The finished run that gives a part of a composed result.

    Attributes:
        recipe: the name of its recipe.
        manifest_sha256: of the run.
        record_sha256: of the part's record there.
        layers: what other runs give of the part; omitted where it is whole.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    recipe: str
    manifest_sha256: str
    record_sha256: str
    layers: tuple[LayersOrigin, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan(StoredRecord):
    """One model × one recipe.

    Attributes:
        source_url: the preset; not part of the digest.
        source_files_sha256: of the preset's JSON and vocabularies; for its weights see the parts.
        model, task: the classes of the backbone, and of what stock KerasHub loads.
        recipe: without a calibration that no scheme needs.
        tokens: the calibration; None if no layer needs any.
        machine: what each worker computes on (see `pipeline.machine`); others may round
            differently.
        versions: of the packages that compute the result.
        forward_dtype: in which the model is run to calibrate it. Plans in float32, as all on CPUs,
            do not mention it, since older versions knew no other.
        policies: dtype policy by layer path, as the artifact's JSON names them.
        weights_format: 2 compresses float8 kernels in the weights files; 1 stores them as they
            are. Plans of format 1 do not mention it, since older versions knew no other.
        notes: where the result is not simply the source with quantized layers, such as variables
            that the source stores in another dtype; omitted where there are none.
        composed: where each part comes from, of a result that is made of the parts of finished
            runs (see `pipeline.composition`); omitted of all others.
        makes: "statistics" of a plan that stores the sums over the float model's inputs (see
            `pipeline.float_statistics`); omitted otherwise.
        statistics_url: the folder of all statistics, if the run uses them and it is not the run's
            own; not part of the digest.
    """

    source_url: str
    source_files_sha256: str
    model: str
    task: str
    recipe: RecipeField
    tokens: TokensPlan | None
    parts: tuple[PartPlan, ...]
    machine: dict[str, str]
    versions: dict[str, str]
    policies: dict[str, str] = field(default_factory=dict)
    weights_format: Literal[1, 2] = 1
    forward_dtype: Literal["float32", "bfloat16"] = "float32"
    notes: tuple[str, ...] = ()
    composed: tuple[PartOrigin, ...] = ()
    makes: Literal["artifact", "statistics"] = "artifact"
    statistics_url: str = ""

    def content(self) -> dict[str, Any]:
        values = super().content()
        if self.weights_format == 1:
            del values["weights_format"]
        if self.forward_dtype == "float32":
            del values["forward_dtype"]
        for name in ("notes", "composed", "statistics_url"):
            if not values[name]:
                del values[name]
        for origin in values.get("composed", ()):
            if not origin["layers"]:
                del origin["layers"]
        if self.makes == "artifact":
            del values["makes"]
        if self.tokens is not None and self.tokens.attention == "scores":
            del values["tokens"]["attention"]
        if self.tokens is not None and not self.tokens.largest_array_bytes:
            del values["tokens"]["largest_array_bytes"]
        if self.tokens is not None and not self.tokens.sources:
            del values["tokens"]["sources"]
        if self.tokens is not None and not self.tokens.held_back_every:
            del values["tokens"]["held_back_every"]
        for layer in (layer for part in values["parts"] for layer in part["layers"]):
            for name in ("stacked_weights", "experts", "experts_per_token"):
                if not layer[name]:
                    del layer[name]
        for part in values["parts"]:
            for group in (*part["groups"], *part["captured"]):
                if group["fold"] is None:
                    del group["fold"]
                if not group["experts"]:
                    del group["experts"]
            if not part["captured"]:
                del part["captured"]
        return values

    @property
    def threads(self) -> int | None:
        """Of each worker's matrix products; None if they decide nothing, as on GPUs."""
        threads = self.machine.get("threads")
        return None if threads is None else int(threads)

    @property
    def device(self) -> Literal["cpu", "gpu"]:
        """What its workers compute on."""
        return "cpu" if self.machine["platform"] == "cpu" else "gpu"

    def resuming(self, spec: ComputeSpec, *, finished: bool) -> ComputeSpec:
        """What to ask of a cluster to go on with the run, where the user leaves it open.

        Args:
            finished: it is only to be evaluated, which any device can do.
        """
        threads = spec.threads or self.threads
        device = spec.device if finished or spec.device != "auto" else self.device
        spec = replace(spec, threads=threads, device=device)
        return spec if finished or self.chained else spec.with_one_gpu_each()

    @property
    def num_blocks(self) -> int:
        return len(self.parts) - 1

    @property
    def due_parts(self) -> range:
        """Parts that a run of it commits; statistics are of blocks alone."""
        return range(self.makes == "statistics", len(self.parts))

    @cached_property
    def share(self) -> Share:
        """How much of the model is quantized."""
        return Share.of(self.recipe, [layer for part in self.parts for layer in part.layers])

    @property
    def is_complete(self) -> bool:
        """Whether it names all of its source's weights; without that, it has no digest."""
        return all(part.source_sha256 for part in self.parts)

    def of_source(self, digests: Sequence[str]) -> Plan:
        """The same plan, for weights with these digests, part by part."""
        parts = zip(self.parts, digests, strict=True)
        return replace(self, parts=tuple(replace(x, source_sha256=digest) for x, digest in parts))

    @property
    def chained(self) -> bool:
        """Whether a block's result depends on the blocks before it."""
        calibrated = self.tokens is not None and self.makes == "artifact"
        return calibrated and not self.uses_float_statistics

    @property
    def uses_float_statistics(self) -> bool:
        """Whether its blocks are solved on stored sums over the float model's inputs."""
        return any(part.captured for part in self.parts)

    @cached_property
    def has_float_stream(self) -> bool:
        """Whether workers carry the float model's activations beside the quantized model's."""
        layers = (layer for part in self.parts[1:] for layer in part.layers)
        return self.recipe.tuning is not None or any(x.corrects_drift for x in layers)

    @cached_property
    def source_digest(self) -> str:
        """SHA-256 of the whole source: of what decides the model, and of every weight."""
        return digest_of([self.source_files_sha256, *(part.source_sha256 for part in self.parts)])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the result."""
        assert self.is_complete, "a dry run's plan has no digest"
        values = self.content()
        for name in ("source_url", "statistics_url"):
            values.pop(name, None)
        return digest_of(values)


def read_plan(store: ObjectStore) -> Plan:
    """Read the plan at a run's root.

    Raises:
        MissingObjectError: no run was started there.
        DamagedObjectError: it cannot be read.
    """
    try:
        return Plan.read(store, PLAN_KEY)
    except DamagedObjectError as error:
        raise DamagedObjectError(
            f"{error}; without its plan this run cannot be resumed: start again in an empty folder"
        ) from error
