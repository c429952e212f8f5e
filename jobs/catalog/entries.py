"""The schema of catalog files: each key's meaning and allowed values."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    model_serializer,
    model_validator,
)

from pipeline.composition.target import Target
from pipeline.evaluation.named_texts import SET_NAME_PATTERN, EvaluatedTexts
from pipeline.executor.protocol import ComputeSpec, Device, ExecutorError
from pipeline.export.code_formats import ExportFormat
from pipeline.export.settings import ExportDtype
from pipeline.recipe.auto_recipe import MOST_TARGET_BITS
from pipeline.recipe.text_sources import CalibrationText, WeightedText
from pipeline.recipe.yaml_document import UNION_TAG

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"

Name = Annotated[StrictStr, Field(pattern=NAME_PATTERN)]


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, got {value!r}; write it without quotes, as 0.05")
    if not math.isfinite(value):
        raise ValueError("must be finite; leave the key out where there is no limit")
    return float(value)


def _size(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"must be a size such as 8GiB, got {value!r}")
    return value


_Number = Annotated[float, BeforeValidator(_number)]


def _without_password(url: str) -> str:
    rest = url.partition("://")[2]
    if "@" in rest.partition("/")[0] and ":" in rest.partition("@")[0]:
        raise ValueError(
            "the URL contains a password; remove it, change it, since URLs are logged, and pass it "
            "in the environment"
        )
    return url


_Url = Annotated[StrictStr, Field(min_length=1), AfterValidator(_without_password)]
_Files = Annotated[tuple[_Url, ...], Field(min_length=1)]
_LIST, _SETS = f"{UNION_TAG}list", f"{UNION_TAG}sets"


def _texts_of(value: Any) -> str:
    return _SETS if isinstance(value, dict) else _LIST


def _as_files(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_SetName = Annotated[StrictStr, Field(pattern=SET_NAME_PATTERN)]
_Sets = dict[_SetName, Annotated[_Files, BeforeValidator(_as_files)]]
_EvaluatedTexts = Annotated[
    Annotated[_Files, Tag(_LIST)] | Annotated[_Sets, Field(min_length=1), Tag(_SETS)],
    Discriminator(_texts_of),
]


class _Mapping(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _with_plain_url(text: str | WeightedText) -> str | WeightedText:
    _without_password(text if isinstance(text, str) else text.url)
    return text


_Text = Annotated[CalibrationText, AfterValidator(_with_plain_url)]


class CalibrationChanges(_Mapping):
    """Calibration settings that replace a recipe's own, for recipes that calibrate."""

    texts: Annotated[tuple[_Text, ...], Field(min_length=1)] | None = None
    num_samples: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    sequence_length: Annotated[StrictInt, Field(ge=2, le=1_000_000)] | None = None
    chat: StrictBool | None = None


class TextLimits(_Mapping):
    """The limits that a result must meet on texts; None means no limit."""

    max_perplexity_increase: Annotated[_Number, Field(ge=0)] | None = None
    """Relative to the source's: 0.05 lets 20 become 21. For causal language models."""
    max_divergence: Annotated[_Number, Field(ge=0)] | None = None
    """Mean KL(source ‖ result), in nats per token. For causal language models."""
    min_cosine: Annotated[_Number, Field(ge=-1, le=1)] | None = None
    """Mean cosine similarity of the source's and the result's outputs. For all other models."""
    min_agreement: Annotated[_Number, Field(ge=0, le=1)] | None = None
    """Share of tokens of which both rank the same next one first. For causal language models."""
    max_divergence_p99: Annotated[_Number, Field(ge=0)] | None = None
    """KL(source ‖ result), in nats, that 99% of the tokens do not exceed. For causal language
    models."""

    @model_serializer(mode="wrap")
    def _without_later_limits(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Older versions did not know them, and ids are digests of what is stored.
        values: dict[str, Any] = dump(self)
        return {k: v for k, v in values.items() if v is not None or k in _FIRST_LIMITS}

    @property
    def limits(self) -> dict[str, float]:
        """Those that are set, by name."""
        found = {name: getattr(self, name) for name in TextLimits.model_fields}
        return {name: value for name, value in found.items() if value is not None}


_FIRST_LIMITS = ("max_perplexity_increase", "max_divergence", "min_cosine")


class Gate(TextLimits):
    """The limits that a result must meet to be published.

    Those on texts hold for each set; a mapping under the name of a set holds for it instead, limit
    by limit.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, TextLimits] = Field(init=False)

    min_recovery: Annotated[_Number, Field(ge=0)] | None = None
    """Of each task: the result's accuracy over the source's; 0.98 lets 0.50 become 0.49."""
    max_flips: Annotated[_Number, Field(ge=0, le=1)] | None = None
    """Of each task: the share of questions that only one of the two answers rightly."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, values: Any) -> Any:
        # Anything else that is no limit is meant as one.
        for name, value in values.items() if isinstance(values, dict) else ():
            if name not in cls.model_fields and not isinstance(value, dict | TextLimits):
                raise ValueError(
                    f"unknown key {name}; the keys here are {', '.join(cls.model_fields)}, and the "
                    "names of sets of evaluate_on, with limits of their own"
                )
        return values

    @property
    def sets(self) -> dict[str, TextLimits]:
        """Limits of named sets alone, by name."""
        return dict(sorted(self.__pydantic_extra__.items()))

    def of_set(self, name: str) -> TextLimits:
        """The limits that hold for a set of texts; "" for those without a name."""
        own = self.sets.get(name)
        return TextLimits(**(self.limits | ({} if own is None else own.limits)))

    @property
    def judges(self) -> set[str]:
        """The catalog's keys that name what the limits are on: evaluate_on, tasks."""
        on_texts = self.limits or any(one.limits for one in self.sets.values())
        on_tasks = self.min_recovery is not None or self.max_flips is not None
        return {
            key for key, is_judged in (("evaluate_on", on_texts), ("tasks", on_tasks)) if is_judged
        }


def _as_mapping(value: Any) -> Any:
    return {"format": value} if isinstance(value, str) else value


class Export(_Mapping):
    """A checkpoint for other runtimes to make of each result, and to publish with it."""

    format: ExportFormat
    dtype: ExportDtype | None = None
    """Of what is not quantized; None for the result's own."""
    like: _Url | None = None
    """Hugging Face folder of the model, to take config and tokenizer from."""


class Compose(_Mapping):
    """A result of a given size to compose of the blocks of a model's finished runs."""

    name: Name | None = None
    """What it is published as, beside the recipes' names; such as composed-3.5-bits."""
    target_bits: Annotated[_Number, Field(gt=0, le=MOST_TARGET_BITS)] | None = None
    """Bits a weight of the blocks may take, as stored, with scales and all."""
    target_bytes: Annotated[ByteSize, Field(gt=0), BeforeValidator(_size)] | None = None
    """What all weights files may take, such as 5GB."""
    recipes: tuple[StrictStr, ...] | None = None
    """Names of the model's recipes to take blocks of; of all by default."""
    measure_on: _Files | None = None
    """Texts to measure each block's cost on; the recipes' calibration windows by default."""
    measure_windows: Annotated[StrictInt, Field(ge=1, le=1_000_000)] = 8
    """Token windows to measure it on."""
    by_layers: StrictBool = False
    """Let layers of one block come from several runs too."""

    @model_validator(mode="after")
    def _check(self) -> Compose:
        if (self.target_bits is None) == (self.target_bytes is None):
            raise ValueError("give target_bits, such as 3.5, or target_bytes, and not both")
        return self

    @property
    def target(self) -> Target:
        """How large it may be."""
        num_bytes = None if self.target_bytes is None else int(self.target_bytes)
        return Target(bits=self.target_bits, num_bytes=num_bytes)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


_Exports = Annotated[
    tuple[Annotated[Export, BeforeValidator(_as_mapping)], ...], BeforeValidator(_as_list)
]


class Resources(_Mapping):
    """What each run of a model takes of the cluster; None leaves it to the cluster."""

    workers: Annotated[StrictInt, Field(ge=1, le=100_000)] | None = None
    threads: Annotated[StrictInt, Field(ge=1, le=10_000)] | None = None
    """Per worker. They affect rounding, and so are part of the request."""
    device: Device = "auto"
    accelerator: Annotated[StrictStr, Field(min_length=1)] | None = None
    """The kind of GPU, as Ray names it, such as H100; needed where a cluster has several."""
    gpus_per_worker: Annotated[StrictInt, Field(ge=1, le=1_000)] | None = None
    """All of one node; None for as many as a node has."""
    memory: Annotated[ByteSize, BeforeValidator(_size)] | None = None
    """Per worker, such as 8GiB. A run whose plan needs more is rejected."""

    @property
    def needs(self) -> ComputeSpec:
        """The same, as runs ask for it.

        Raises:
            ExecutorError: it contradicts itself.
        """
        memory = None if self.memory is None else int(self.memory)
        return ComputeSpec(**self.model_dump(exclude={"memory"}), memory_bytes=memory)

    @model_validator(mode="after")
    def _check_needs(self) -> Resources:
        try:
            _ = self.needs
        except ExecutorError as error:
            raise ValueError(str(error)) from None
        return self


class Retention(_Mapping):
    """How many old releases are kept."""

    keep: Annotated[StrictInt, Field(ge=1, le=1_000_000)] = 3
    """How many of the newest releases, including the current one, `quantfleet gc` leaves alone."""


class Settings(_Mapping):
    """Settings of one model, or in `defaults` of all."""

    recipes: Annotated[tuple[StrictStr | dict[str, Any], ...], Field(min_length=1)] | None = None
    """Names of built-in recipes, paths of recipe files, or recipes as mappings."""
    compose: Annotated[tuple[Compose, ...], BeforeValidator(_as_list)] = ()
    """Results of given sizes to make of the recipes' blocks: {target_bits: 3.5}, or several."""
    owner: StrictStr = ""
    tags: tuple[StrictStr, ...] = ()
    priority: Annotated[StrictInt, Field(ge=-1_000_000, le=1_000_000)] = 0
    """Higher ones run first."""
    calibration: CalibrationChanges = CalibrationChanges()
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of what stays in float; it replaces the recipes' own, and the model's."""
    allow_partial: StrictBool = False
    """Whether less than half of the weights that the recipes ask for may be quantized."""
    evaluate_on: _EvaluatedTexts | None = None
    """Texts to evaluate the result on, other than the calibration texts: a list; or sets by name,
    each with figures, and limits, of its own."""
    windows: Annotated[StrictInt, Field(ge=1, le=1_000_000)] = 8
    """Token windows of each set to evaluate on."""
    tasks: _Files | None = None
    """Files of multiple-choice questions that source and result are to answer."""
    gate: Gate | None = None
    export: _Exports = ()
    """Formats, such as compressed-tensors, or mappings; made of what passes its gate."""
    resources: Resources = Resources()
    retention: Retention = Retention()

    @property
    def evaluated_on(self) -> EvaluatedTexts:
        """The texts to evaluate on."""
        given = self.evaluate_on
        if isinstance(given, dict):
            return EvaluatedTexts(sets=given)
        return EvaluatedTexts(texts=given or ())

    @property
    def evaluated_urls(self) -> tuple[str, ...]:
        """All that they name, once."""
        every = (url for urls in self.evaluated_on.by_name.values() for url in urls)
        return tuple(dict.fromkeys(every))


class Model(Settings):
    """One model of the catalog."""

    name: Name
    preset: _Url | None = None
    """Folder or URL of a KerasHub or Hugging Face preset."""
    alias_of: Name | None = None
    """Another model's name; its results are published under this name too."""


class CatalogFile(_Mapping):
    """The whole file."""

    root: _Url
    """Where runs, requests and releases are stored."""
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    defaults: Settings = Settings()
