"""Machines that a run's cost can be worked out for: rates by name, and a user's own.

A name with a number is so many workers, each on one of them: 8xH100.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from pipeline.errors import PipelineError
from pipeline.recipe.yaml_document import MarkedYaml, describe_mistake, mistake_order, read_yaml

HERE = "here"
"""The name of the machine at hand, in a user's file of rates."""
_NOT_OF_HERE = ("like", "name", "device")
"""What the machine at hand says for itself."""

_TABLE = "machines.yaml"
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(gt=0, le=1)]


class RatesError(PipelineError):
    """A machine that is not known, or a file of rates that cannot be used."""


class Machine(BaseModel):
    """What one worker computes on: a GPU with its share of a host, or the CPUs of a node.

    Operations, bytes and seconds. See machines.yaml for what each is, and where it comes from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: StrictStr
    device: Literal["cpu", "gpu"]
    float32_flops: _Rate
    bfloat16_flops: _Rate
    float32_achievable: _Share
    bfloat16_achievable: _Share
    memory_bytes: _Rate
    memory_bytes_per_second: _Rate
    memory_achievable: _Share
    transfer_bytes_per_second: _Rate
    transfer_achievable: _Share
    peer_bytes_per_second: _Rate | None = None
    step_seconds: _Rate
    host_threads: Annotated[StrictInt, Field(ge=1)]
    host_bytes_per_second: _Rate
    host_hash_bytes_per_second: _Rate
    storage_bytes_per_second: _Rate
    network_bytes_per_second: _Rate
    workers_per_node: Annotated[StrictInt, Field(ge=1)]
    source: StrictStr
    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    price_source: StrictStr = ""

    @property
    def between_gpus(self) -> float:
        """Bytes a second from one GPU to another: over the host's bus where there is no link."""
        peak = self.peer_bytes_per_second or self.transfer_bytes_per_second
        return peak * self.transfer_achievable


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    machines: dict[StrictStr, dict[StrictStr, Any]]


@dataclass(frozen=True)
class Machines:
    """Known machines by name, and what a user says of the machine at hand, in the file `where`."""

    by_name: Mapping[str, Machine]
    here: Mapping[str, Any]
    where: str = ""

    def named(self, name: str) -> Machine:
        """A machine, by its name in any case.

        Raises:
            RatesError: it is not known.
        """
        found = self.find(name)
        if found is None:
            known = ", ".join(self.by_name)
            raise RatesError(
                f"no rates are known for a machine named {name!r}, but for {known}; name one of "
                "these, as in 8xH100, or describe it in a file that you give as --rates"
            )
        return found

    def find(self, name: str) -> Machine | None:
        """The same, or None."""
        return next((m for n, m in self.by_name.items() if n.lower() == name.lower()), None)

    def at_hand(self, known: Machine) -> Machine:
        """The machine at hand, as it is measured or known, but for what the user says of it."""
        source = _source(known, self.here, self.where)
        return known.model_copy(update={"source": source, **self.here})


def workers_on(given: str) -> tuple[int, str]:
    """The number of workers and the machine's name in text such as 8xH100; one where none is given.

    Raises:
        RatesError: it is neither.
    """
    number, name = re.fullmatch(r"(?:(\d{1,6})[xX×])?(.*)", given, re.DOTALL).groups()  # type: ignore[union-attr]
    if not name or (number is not None and int(number) < 1):
        raise RatesError(f"--on {given}: give a number of workers and a machine, such as 8xH100")
    return int(number or 1), name


def known_machines(rates_file: str | None = None) -> Machines:
    """The machines of the package, and of a user's file over them.

    Raises:
        RatesError: the file cannot be read, or is not such a file; the message says where.
    """
    found = dict(_package_machines())
    if rates_file is None:
        return Machines(found, {})
    try:
        text = Path(rates_file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise RatesError(f"--rates {rates_file}: {reason}; give a YAML file of machines") from error
    document = read_yaml(text, where=rates_file, error_type=RatesError)
    given = _machines_in(document)
    here = _here(given.pop(HERE, {}), found, document)
    for name, values in given.items():
        found[name] = _described(name, values, found, document)
    return Machines(found, here, rates_file)


def _here(
    values: Mapping[str, Any], known: Mapping[str, Machine], document: MarkedYaml
) -> Mapping[str, Any]:
    """What a file says of the machine at hand, checked before anything is measured."""
    for key in _NOT_OF_HERE:
        if key in values:
            raise RatesError(
                f"{document.where}:{document.line_of(('machines', HERE, key))}: {HERE}: {key} is "
                "known of the machine at hand; remove it, or describe a machine by another name "
                "and name that with --on"
            )
    # Over any machine.
    whole = _described(HERE, {"like": next(iter(known)), **values}, known, document)
    own = {*values, *(["price_source"] if "price_per_hour" in values else [])}
    return {key: getattr(whole, key) for key in sorted(own)}


@cache
def _package_machines() -> Mapping[str, Machine]:
    text = files(__package__).joinpath(_TABLE).read_text("utf-8")
    document = read_yaml(text, where=_TABLE, error_type=RatesError)
    found: dict[str, Machine] = {}
    for name, values in _machines_in(document).items():
        found[name] = _described(name, values, found, document)
    return found


def _machines_in(document: MarkedYaml) -> dict[str, dict[str, Any]]:
    try:
        return dict(_File.model_validate(document.values).machines)
    except ValidationError as mistakes:
        raise _mistake(mistakes, document, _File) from None


def _described(
    name: str, values: Mapping[str, Any], known: Mapping[str, Machine], document: MarkedYaml
) -> Machine:
    """A machine as a file describes it, over the one that it is like, or has the name of."""
    like = values.get("like", name)
    before = known.get(like)
    if before is None and like != name:
        raise RatesError(
            f"{document.where}:{document.line_of(('machines', name, 'like'))}: {name} is to be "
            f"like {like!r}, which is not known; name one of {', '.join(known)}"
        )
    base = {} if before is None else before.model_dump()
    changed = {key: value for key, value in values.items() if key != "like"}
    if "price_per_hour" in changed:
        base["price_source"] = ""  # which was of another price
    if before is not None:
        base["source"] = _source(before, changed, document.where)
    try:
        return Machine.model_validate({**base, **changed, "name": name})
    except ValidationError as mistakes:
        raise _mistake(mistakes, document, Machine, ("machines", name)) from None


def _source(before: Machine, changed: Mapping[str, Any], where: str) -> str:
    """Where the rates of a machine come from, of which a file changes some."""
    if changed.keys() <= {"price_per_hour", "price_source"}:
        return before.source
    return f"{where}, and for the rest: {before.source}"


def _mistake(
    mistakes: ValidationError,
    document: MarkedYaml,
    model: type[BaseModel],
    inside: tuple[str, ...] = (),
) -> RatesError:
    def line(error: Any) -> int:
        return document.line_of((*inside, *error["loc"]))

    first = min(mistakes.errors(), key=lambda error: mistake_order(error, line(error)))
    within = f"{inside[-1]}: " if inside else ""
    return RatesError(f"{document.where}:{line(first)}: {within}{describe_mistake(first, model)}")
