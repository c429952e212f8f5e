"""A recipe: which scheme each layer gets, and the texts to calibrate on.

A recipe is frozen, checked once when it is made, and round-trips through plain JSON values.
This module imports neither JAX nor Keras, so that listing recipes is instant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictInt,
    StrictStr,
    model_serializer,
    model_validator,
)

from pipeline.errors import RecipeError
from pipeline.recipe.text_sources import CalibrationText, WeightedText, shares
from quantizer.schemes import (
    AWQScheme,
    Float8Scheme,
    GPTQScheme,
    Int4Scheme,
    Int8Scheme,
    Scheme,
    scheme_from_dict,
    scheme_to_dict,
)

LayerKind: TypeAlias = Literal["kernel", "embedding"]
StatisticsKind: TypeAlias = Literal["hessian", "magnitudes"]


def statistics_of(scheme: Scheme | None) -> StatisticsKind | None:
    """The calibration statistics that a scheme needs; None if the weights are enough."""
    match scheme:
        case GPTQScheme() | AWQScheme():
            return "hessian"
        case Float8Scheme():
            return "magnitudes"
        case Int8Scheme() | Int4Scheme() | None:
            return None


def _read_scheme(value: object) -> Scheme:
    if isinstance(value, Scheme):
        return value
    if isinstance(value, dict) and value.get("mode") == "auto":
        raise ValueError(
            "mode: auto is for the scheme of a whole recipe, not for some of its layers; give "
            "these a scheme such as {mode: gptq, weight_bits: 4}"
        )
    if not isinstance(value, dict):
        raise ValueError(
            f"{value!r} is not a scheme; give a mapping such as {{mode: gptq, weight_bits: 4}}, or "
            "null to leave layers in float"
        )
    for name, field in value.items():
        if isinstance(field, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", field):
            # YAML 1.1 reads 1.0e-2 as a number, but 1e-2 as text.
            raise ValueError(f"{name}: YAML reads {field} as text; write {float(field)!r}")
    return scheme_from_dict(value)


def _check_embeddings(scheme: Scheme) -> Scheme:
    if not isinstance(scheme, Int8Scheme | Int4Scheme):
        raise ValueError(
            f"stock Keras quantizes embeddings to int8 or int4 only, not {scheme.mode}; "
            "use {mode: int8}, or null to leave them in float"
        )
    return scheme


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{pattern!r} is not a regular expression: {error}; escape special characters with \\"
        ) from None
    return pattern


SchemeField = Annotated[Scheme, PlainValidator(_read_scheme), PlainSerializer(scheme_to_dict)]
EmbeddingsField = Annotated[SchemeField, AfterValidator(_check_embeddings)]
_PatternField = Annotated[
    StrictStr, Field(min_length=1, max_length=500), AfterValidator(_check_pattern)
]


class Rule(BaseModel):
    """The scheme of all layers whose path matches a pattern."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: _PatternField
    """A regular expression, searched for anywhere in a layer's path; case-sensitive."""
    scheme: SchemeField | None
    """Null leaves these layers in float."""


class Calibration(BaseModel):
    """The calibration texts, and how they are cut into token windows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: tuple[CalibrationText, ...] = ()
    """Sources (see `pipeline.calibration.texts`), interleaved document by document; or, where each
    has a weight, each with its share of the windows."""
    text_field: Annotated[StrictStr, Field(min_length=1)] = "text"
    """The column of a data set, or the key of a .jsonl line, that holds a document."""
    num_samples: Annotated[StrictInt, Field(ge=1, le=1_000_000)] = 128
    sequence_length: Annotated[StrictInt, Field(ge=2, le=1_000_000)] = 2048
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 0
    sampling: Literal["sequential", "random"] = "random"
    """Take the first windows of the texts, or draw from a pool of them without replacement."""
    pool_factor: Annotated[StrictInt, Field(ge=1, le=1000)] = 8
    """Size of that pool, as a multiple of num_samples, if the texts are long enough."""
    packing: StrictBool = True
    """Join documents and cut them into full windows; false puts one document in each window."""
    chat: StrictBool | None = None
    """How conversations, in text_field or in "messages", are read: rendered by the model's chat
    template, or their contents alone; null refuses them."""
    inputs: dict[StrictStr, Annotated[StrictStr, Field(min_length=1)]] = Field(default_factory=dict)
    """For inputs of the model that text does not determine, such as "images": a .npy file with a
    sample per window (see `pipeline.calibration.arrays`)."""
    statistics: Literal["sequential", "float"] = "sequential"
    """Calibrate each layer on the output of the quantized ones before it; or on the float model's,
    whose sums are stored for all recipes (see `pipeline.float_statistics`)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.texts and not self.inputs:
            raise ValueError(
                "nothing to calibrate on; name texts: [...], or inputs: {images: images.npy} for a "
                "model that takes no text"
            )
        weighted = self.weighted_texts
        if weighted and len(weighted) < len(self.texts):
            plain = next(text for text in self.texts if isinstance(text, str))
            raise ValueError(
                f"texts: {plain} has no weight, and others have; write it as "
                f"{{url: {plain}, weight: 1}}, or give none a weight"
            )
        for text, share in zip(weighted, self.window_shares, strict=True):
            if not share:
                whole = sum(one.weight for one in weighted)
                raise ValueError(
                    f"texts: {text.url} has {text.weight:g} of the weight {whole:g}, which gives "
                    f"it none of {self.num_samples} windows; raise num_samples or its weight, or "
                    "remove it"
                )
        return self

    @property
    def weighted_texts(self) -> tuple[WeightedText, ...]:
        """The texts where they have weights, else none."""
        return tuple(text for text in self.texts if isinstance(text, WeightedText))

    @property
    def window_shares(self) -> tuple[int, ...]:
        """How many windows each weighted text gives (see `shares`)."""
        weights = [text.weight for text in self.weighted_texts]
        return shares(weights, self.num_samples) if weights else ()

    @property
    def text_urls(self) -> tuple[str, ...]:
        """The texts that it names."""
        return tuple(text if isinstance(text, str) else text.url for text in self.texts)

    @property
    def sources(self) -> tuple[str, ...]:
        """All texts and arrays that it names."""
        return (*self.text_urls, *(self.inputs[name] for name in sorted(self.inputs)))

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Plans of recipes without it do not mention it, since older versions did not know it.
        values: dict[str, Any] = serialize(self)
        if not self.inputs:
            del values["inputs"]
        if self.chat is None:
            del values["chat"]
        if self.statistics == "sequential":
            del values["statistics"]
        return values


_Rate = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]


class Tuning(BaseModel):
    """How each block is trained once its layers are solved (see `quantizer.tuning`).

    Learning rates are those of the first step; they fall to 0 in a straight line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[StrictInt, Field(ge=1, le=100_000)] = 100
    batch: Annotated[StrictInt, Field(ge=1, le=100_000)] = 4
    """Windows of a step; whole micro-batches, one at least."""
    offset_rate: _Rate = 0.02
    """Of the offsets that are added before rounding, in steps of the grid. A code flips once its
    offset has gone half a step, and an offset goes about steps × offset_rate / 2 at most."""
    scale_rate: _Rate = 2e-3
    """Of the scales' logarithms."""
    norm_rate: _Rate = 1e-3
    """Of the norms' weights, relative to their size."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.offset_rate or self.scale_rate or self.norm_rate):
            raise ValueError(
                "every learning rate is 0, so nothing would be trained; leave tuning out, or give "
                "one of offset_rate, scale_rate and norm_rate more"
            )
        return self


class Recipe(BaseModel):
    """Schemes per layer and the calibration they need."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[StrictStr, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    scheme: SchemeField | None
    """The scheme of every kernel that no rule matches; null leaves them in float."""
    rules: tuple[Rule, ...] = ()
    """Exceptions, for kernels; the first rule that matches decides."""
    embeddings: EmbeddingsField | None = None
    """The scheme of every embedding table, int8 or int4; null leaves them in float."""
    calibration: Calibration | None = None
    """Needed by gptq, awq and float8; otherwise ignored."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of what stays in float, and of all computation; null leaves it to the model."""
    allow_partial: StrictBool = False
    """Whether less than half of the weights that are asked for may be quantized."""
    servable: StrictBool = False
    """Whether other runtimes are meant to serve the result: planning warns where none would."""
    tuning: Tuning | None = None
    """Trains the roundings and scales of gptq layers, and the norms beside them, block by block;
    null leaves them as they were solved."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        schemes = self._kernel_schemes()
        if not any(schemes) and self.embeddings is None:
            raise ValueError(
                "nothing would be quantized; give scheme, a rule or embeddings a scheme such as "
                "{mode: int8}"
            )
        if self.needs_calibration and self.calibration is None:
            modes = sorted({scheme.mode for scheme in schemes if scheme and statistics_of(scheme)})
            raise ValueError(
                f"{' and '.join(modes)} must see texts; add calibration: {{texts: [...]}}"
            )
        if self.tuning is not None and not any(isinstance(x, GPTQScheme) for x in schemes):
            raise ValueError(
                "tuning trains layers that gptq has solved, and no layer gets gptq; give scheme or "
                "a rule {mode: gptq}, or leave tuning out"
            )
        if self.uses_float_statistics:
            self._check_float_statistics(schemes)
        return self

    def _check_float_statistics(self, schemes: Sequence[Scheme | None]) -> None:
        """Refuse what needs the quantized model's activations, or other sums than are stored."""
        remedy = "or statistics: sequential (the default)"
        if self.tuning is not None:
            raise ValueError(
                "tuning trains each block on what the quantized blocks before it give, which "
                f"statistics: float never computes; leave tuning out, {remedy}"
            )
        if any(isinstance(x, GPTQScheme) and x.drift_correction > 0 for x in schemes):
            raise ValueError(
                "drift_correction corrects how far the quantized model's inputs are from the float "
                "model's, and with statistics: float every layer is solved on the float model's; "
                f"leave drift_correction out, {remedy}"
            )
        if any(isinstance(x, Float8Scheme) for x in schemes):
            raise ValueError(
                "float8 needs the largest inputs, and statistics: float stores sums of their "
                f"products; give these layers gptq, awq, int8 or null, {remedy}"
            )

    def _kernel_schemes(self) -> tuple[Scheme | None, ...]:
        return (self.scheme, *(rule.scheme for rule in self.rules))

    def scheme_for(self, layer_path: str, layer_kind: LayerKind) -> Scheme | None:
        """The scheme of one layer; None leaves it in float.

        Args:
            layer_path: such as "llama_transformer_decoder_3/self_attention/query".
            layer_kind: "kernel" for a Dense or EinsumDense layer.
        """
        if layer_kind == "embedding":
            return self.embeddings
        rule = self.rule_for(layer_path)
        return self.scheme if rule is None else rule.scheme

    def rule_for(self, layer_path: str) -> Rule | None:
        """The first rule that matches a kernel's path; None if the default scheme applies."""
        return next((rule for rule in self.rules if re.search(rule.pattern, layer_path)), None)

    @property
    def needs_calibration(self) -> bool:
        """Whether any scheme needs calibration statistics."""
        return any(statistics_of(scheme) for scheme in self._kernel_schemes())

    @property
    def uses_float_statistics(self) -> bool:
        """Whether layers are solved on stored sums over the float model's inputs."""
        calibration = self.calibration
        is_float = calibration is not None and calibration.statistics == "float"
        return is_float and self.needs_calibration

    @property
    def chains_blocks(self) -> bool:
        """Whether a block is calibrated on the output of the quantized ones before it."""
        return self.needs_calibration and not self.uses_float_statistics

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values, with every default but those of newer fields.

        A calibration that no scheme needs is omitted, since it does not affect the result.
        """
        values = self.model_dump(mode="json")
        if self.dtype is None:
            del values["dtype"]  # older versions knew none
        for name in ("allow_partial", "servable"):
            if not values[name]:
                del values[name]
        if self.tuning is None:
            del values["tuning"]
        return values if self.needs_calibration else values | {"calibration": None}


RecipeField = Annotated[Recipe, PlainSerializer(Recipe.to_dict)]


_SHOWN = 5


def check_recipe(recipe: Recipe, layers: Sequence[tuple[str, LayerKind, int]]) -> None:
    """Reject groups larger than a layer, and a recipe that would quantize nothing.

    The last group may be shorter. int4's block_size may exceed in_features, as in Keras.

    Args:
        layers: (path, layer kind, in_features) of every layer that could be quantized.

    Raises:
        RecipeError: names the layers and the remedy.
    """
    chosen = [(path, size, recipe.scheme_for(path, kind)) for path, kind, size in layers]
    too_small = {
        path: (scheme.group_size, size)
        for path, size, scheme in chosen
        if isinstance(scheme, GPTQScheme | AWQScheme) and scheme.group_size > size
    }
    if too_small:
        shown = [
            f"{path} (group_size {group_size}, in_features {size})"
            for path, (group_size, size) in list(too_small.items())[:_SHOWN]
        ]
        more = f" and {len(too_small) - _SHOWN} more" if len(too_small) > _SHOWN else ""
        limit = min(size for _, size in too_small.values())
        raise RecipeError(
            f"recipe {recipe.name}: groups larger than the layer: {', '.join(shown)}{more}; use "
            f"a group_size of at most {limit}, or -1 for one group, or leave these layers in "
            "float with a rule {pattern: ..., scheme: null}"
        )
    if all(scheme is None for _, _, scheme in chosen):
        raise RecipeError(
            f"recipe {recipe.name}: none of the model's {len(layers)} layers would be quantized; "
            "loosen the patterns of its rules, or give scheme a default"
        )


def unmatched_patterns(
    recipe: Recipe, layers: Sequence[tuple[str, LayerKind, int]]
) -> tuple[str, ...]:
    """Patterns of rules that decide no layer: mistyped, shadowed, or meant for another model."""
    deciding = {recipe.rule_for(path) for path, kind, _ in layers if kind == "kernel"}
    return tuple(rule.pattern for rule in recipe.rules if rule not in deciding)
