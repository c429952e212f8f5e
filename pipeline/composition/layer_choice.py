"""Which run gives each layer of each block, so that a model costs least within a number of bytes.

It is the choice of `pipeline.composition.choice` over units of layers: those of a block that have
to be of one run, or a whole block where its layers cannot be told apart. In each run a unit has its
share of what the block costs (see `layer_errors`) and of the block's files, so that blocks of one
run alone have exactly the cost that was measured, and their size. Sizes of blocks that come from
several runs are close to the sum: HDF5 aligns what it stores.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.composition.choice import Choice, Choices, Option
from pipeline.composition.composed_plan import GivenLayers, GivenRun, part_bytes, policy_keys
from pipeline.composition.layer_errors import LayerErrors
from pipeline.composition.sensitivities import Sensitivity


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What one run gives.

    Attributes:
        block: its number.
        layers: paths; of all its layers that a run quantizes if it is the whole block.
        runs: numbers of those that can give it, and the options that they are.
    """

    block: int
    layers: tuple[str, ...]
    runs: tuple[int, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """A run for every unit.

    Attributes:
        picked: of each block, the number of the run that gives most of its weights, and all that
            `layers` does not name.
        layers: what other runs give of a block.
        size_bytes: of all blocks, about; cost: what they are expected to cost.
    """

    picked: tuple[int, ...]
    layers: tuple[GivenLayers, ...]
    size_bytes: int
    cost: float


class LayerChoices:
    """The best choices within any number of bytes."""

    def __init__(
        self,
        runs: Sequence[GivenRun],
        sensitivities: Sequence[Sequence[Sensitivity]],
        errors: Sequence[Sequence[LayerErrors]],
    ) -> None:
        """Args: sensitivities, errors: for each block, for each run; see `options_of`."""
        self._runs = runs
        self._units = [
            unit
            for block, (costs, found) in enumerate(zip(sensitivities, errors, strict=True))
            for unit in units_of(runs, block, costs, found)
        ]
        self._choices = Choices([unit.options for unit in self._units])

    def within(self, most_bytes: int) -> LayerChoice | None:
        """The choice of least cost; None if even the smallest has more bytes."""
        choice = self._choices.within(most_bytes)
        return None if choice is None else self._given(choice)

    def _given(self, choice: Choice) -> LayerChoice:
        picked, layers = [], []
        pairs = zip(self._units, choice.picked, strict=True)
        for block, of_block in itertools.groupby(pairs, key=lambda pair: pair[0].block):
            weights = {x.path: x.num_weights for x in self._runs[0].plan.parts[block + 1].layers}
            given: dict[int, list[str]] = {}
            for unit, number in of_block:
                given.setdefault(unit.runs[number], []).extend(unit.layers)
            most = max(given, key=lambda run: (sum(weights[path] for path in given[run]), -run))
            picked.append(most)
            layers += [
                GivenLayers(block=block, run=run, layers=tuple(given[run]))
                for run in sorted(given)
                if run != most
            ]
        return LayerChoice(
            picked=tuple(picked),
            layers=tuple(layers),
            size_bytes=choice.size_bytes,
            cost=choice.cost,
        )


def units_of(
    runs: Sequence[GivenRun],
    block: int,
    costs: Sequence[Sensitivity],
    errors: Sequence[LayerErrors],
) -> list[Unit]:
    """The units of a block.

    Args:
        costs, errors: of each run's block.
    """
    usable = [number for number, one in enumerate(costs) if one.cost is not None]
    layers = {x.path for run in runs for x in run.plan.parts[block + 1].layers if x.scheme}
    shares = {number: _shares(errors[number], layers) for number in usable}
    joined = _joined(runs, errors[usable[0]], layers)
    alike = all(_paths(errors[n]) == _paths(errors[usable[0]]) for n in usable)
    # What training changed of a block is not of one layer alone.
    tuned = any(run.plan.recipe.tuning is not None for run in runs)
    if tuned or not alike or len(joined) < 2 or any(one is None for one in shares.values()):
        joined = [tuple(sorted(layers))]
    options: list[list[Option]] = [[] for _ in joined]
    for number in usable:
        cost, share = costs[number].cost, shares[number]
        assert cost is not None
        for place, size_bytes in enumerate(_sizes(runs[number], block, errors[number], joined)):
            part = cost
            if len(joined) > 1:
                assert share is not None
                part = cost * sum(share.get(path, 0.0) for path in joined[place])
            options[place].append(Option(size_bytes=size_bytes, cost=part))
    return [
        Unit(block=block, layers=unit, runs=tuple(usable), options=tuple(own))
        for unit, own in zip(joined, options, strict=True)
    ]


def _paths(errors: LayerErrors) -> list[tuple[str, ...]]:
    return [unit.layers for unit in errors.units]


def _shares(errors: LayerErrors, layers: set[str]) -> dict[str, float] | None:
    """Of each unit, at its first layer that any run quantizes."""
    shares = errors.shares
    if shares is None:
        return None
    found = {}
    for unit, share in zip(errors.units, shares, strict=True):
        first = next((path for path in unit.layers if path in layers), None)
        if first is not None:
            found[first] = share
    return found


def _joined(
    runs: Sequence[GivenRun], errors: LayerErrors, layers: set[str]
) -> list[tuple[str, ...]]:
    """Units with a layer that any run quantizes; joined where a preset names them alike."""
    units = [tuple(p for p in unit.layers if p in layers) for unit in errors.units]
    keys = policy_keys([run.plan for run in runs])
    found: dict[str, list[str]] = {}
    place: dict[str, str] = {}  # of a layer's key, the first layer of its unit
    for unit in filter(None, units):
        own = {keys[path] for path in unit if path in keys}
        alike = sorted({place[key] for key in own if key in place})
        first = alike[0] if alike else unit[0]
        for other in alike[1:]:
            found[first] += found.pop(other)
            place |= {key: first for key, one in place.items() if one == other}
        found.setdefault(first, []).extend(unit)
        place |= dict.fromkeys(own, first)
    return [tuple(paths) for paths in found.values()]


def _sizes(
    run: GivenRun, block: int, errors: LayerErrors, units: Sequence[Sequence[str]]
) -> list[int]:
    """Of each unit, its arrays and an equal share of all else in the block's files."""
    record = run.records[block + 1]
    if len(units) == 1:
        return [part_bytes(record)]
    planned = {layer.path: layer for layer in run.plan.parts[block + 1].layers}
    arrays = {x.layers: x.stored_bytes for x in errors.units}
    sizes = []
    codes = 0 if record.codes is None else record.codes.size_bytes
    for unit in units:
        own = sum(size for paths, size in arrays.items() if set(paths) & set(unit))
        if codes and any(planned[path].experts for path in unit):
            own, codes = own + codes, 0
        sizes.append(own)
    rest = part_bytes(record) - sum(sizes)
    shared, first = divmod(rest, len(units))
    return [size + shared + (first if place == 0 else 0) for place, size in enumerate(sizes)]
