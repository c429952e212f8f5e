"""A catalog as its authors write it: what each key means, and what it may be.

Nothing here looks at the models themselves; `jobs.catalog.requests` makes requests of this.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
)

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"

_CONFIG = ConfigDict(frozen=True, extra="forbid")
Name = Annotated[StrictStr, Field(pattern=NAME_PATTERN)]
_Texts = Annotated[tuple[Annotated[StrictStr, Field(min_length=1)], ...], Field(min_length=1)]


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
            "the URL contains a password; take it out, change it, since URLs are logged, and give "
            "it in the environment"
        )
    return url


_Url = Annotated[StrictStr, Field(min_length=1), AfterValidator(_without_password)]


class CalibrationChanges(BaseModel):
    """What to calibrate on instead of what a recipe says; for recipes that calibrate."""

    model_config = _CONFIG

    texts: _Texts | None = None
    num_samples: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    sequence_length: Annotated[StrictInt, Field(ge=2, le=1_000_000)] | None = None


class GateLimits(BaseModel):
    """What a result must keep to be published. All that are given must hold."""

    model_config = _CONFIG

    max_perplexity_increase: Annotated[_Number, Field(ge=0)] | None = None
    """Relative to the source's: 0.05 lets 20 become 21. Of causal language models."""
    max_divergence: Annotated[_Number, Field(ge=0)] | None = None
    """Mean KL(source ‖ result), in nats a token. Of causal language models."""
    min_cosine: Annotated[_Number, Field(ge=-1, le=1)] | None = None
    """Mean cosine between the source's and the result's vectors. Of all other models."""


class Resources(BaseModel):
    """What each of a model's runs takes of the cluster; None leaves it to the cluster."""

    model_config = _CONFIG

    workers: Annotated[StrictInt, Field(ge=1, le=100_000)] | None = None
    threads: Annotated[StrictInt, Field(ge=1, le=10_000)] | None = None
    """Of each worker; they decide rounding, and so are part of what is asked for."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    memory: Annotated[ByteSize, BeforeValidator(_size)] | None = None
    """A worker's, such as 8GiB. A run whose plan says that it needs more is refused."""


class Retention(BaseModel):
    """How much of the past is kept."""

    model_config = _CONFIG

    keep: Annotated[StrictInt, Field(ge=1, le=1_000_000)] = 3
    """Newest releases whose artifacts `quantfleet gc` leaves alone, the current one among them."""


class Settings(BaseModel):
    """What a model may say for itself, and `defaults` for all."""

    model_config = _CONFIG

    recipes: Annotated[tuple[StrictStr | dict[str, Any], ...], Field(min_length=1)] | None = None
    """Built-in names, paths of recipe files, or recipes written out."""
    owner: StrictStr = ""
    tags: tuple[StrictStr, ...] = ()
    priority: Annotated[StrictInt, Field(ge=-1_000_000, le=1_000_000)] = 0
    """Higher ones run first."""
    calibration: CalibrationChanges = CalibrationChanges()
    evaluate_on: _Texts | None = None
    """Texts, other than calibration's, by which the result is judged."""
    windows: Annotated[StrictInt, Field(ge=1, le=1_000_000)] = 8
    """Token windows of them."""
    gate: GateLimits | None = None
    resources: Resources = Resources()
    retention: Retention = Retention()


class Model(Settings):
    """One model that is wanted."""

    name: Name
    preset: _Url | None = None
    """Folder or URL of a KerasHub or Hugging Face preset."""
    alias_of: Name | None = None
    """Another model's name, whose results are published under this one's too."""


class CatalogFile(BaseModel):
    """The whole file."""

    model_config = _CONFIG

    root: _Url
    """Where runs, requests and releases lie."""
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    defaults: Settings = Settings()
