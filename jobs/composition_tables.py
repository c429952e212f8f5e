"""What a composition chooses from, what it chooses, and what other sizes would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from jobs.quantities import size
from pipeline.composition.choice import Choice, Choices
from pipeline.composition.composed_plan import GivenLayers, GivenRun, Pick, part_bytes
from pipeline.composition.decision import blocks_bytes, picked_runs
from pipeline.composition.layer_choice import LayerChoice
from pipeline.composition.sensitivities import Sensitivity
from pipeline.composition.target import Target, block_weights

_NUM_POINTS = 16
_MOST_CHARACTERS = 50
"""In a cell that lists blocks; the table of blocks has them all."""


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run that blocks are taken from.

    Attributes:
        num_bytes: of all weights files; bits: of a weight in the blocks, as stored.
        expected: the sum of what its blocks alone cost; None if one gives answers not finite.
    """

    recipe: str
    url: str
    num_bytes: int
    bits: float
    expected: float | None


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """A block, in each run.

    Attributes:
        name: the block's.
        num_bytes, costs, standard_errors: by run.
        picked: the number of the run chosen.
    """

    name: str
    num_bytes: tuple[int, ...]
    costs: tuple[float | None, ...]
    standard_errors: tuple[float | None, ...]
    picked: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """The best choice of a size.

    Attributes:
        num_bytes: of all weights files.
        picked: of each block, the number of the run.
        layers: what others give of blocks.
    """

    num_bytes: int
    bits: float
    expected: float
    picked: tuple[int, ...]
    layers: tuple[GivenLayers, ...] = ()

    @property
    def pick(self) -> Pick:
        """What the runs give."""
        return self.picked, self.layers

    @property
    def is_mixed(self) -> bool:
        """Whether more than one run gives anything."""
        return len(set(self.picked)) > 1 or bool(self.layers)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Everything that is known before an artifact is composed.

    Attributes:
        figure, num_windows: what costs are, and on how many windows they were measured.
        curve: the best choices of whole blocks, by size.
        by_layers: the best choice of layers, where it was asked for and is another one.
    """

    target: str
    figure: str
    num_windows: int
    runs: tuple[RunRow, ...]
    blocks: tuple[BlockRow, ...]
    choice: Point
    curve: tuple[Point, ...]
    by_layers: Point | None = None

    @classmethod
    def of(
        cls,
        runs: Sequence[GivenRun],
        target: Target,
        sensitivities: Sequence[Sequence[Sensitivity]],
        choices: Choices,
        numbers: Sequence[Sequence[int]],
        choice: Choice,
    ) -> Outlook:
        """Args: numbers: of each block, the number of each option's run."""
        weights = block_weights(runs[0])
        outside = part_bytes(runs[0].records[0])

        def point(one: Choice) -> Point:
            return Point(
                num_bytes=one.size_bytes + outside,
                bits=8 * one.size_bytes / weights,
                expected=one.cost,
                picked=picked_runs(one, numbers),
            )

        chosen = point(choice)
        rows = []
        for number, run in enumerate(runs):
            costs = [of_block[number].cost for of_block in sensitivities]
            known = [cost for cost in costs if cost is not None]
            rows.append(
                RunRow(
                    recipe=run.name,
                    url=run.store.root_url,
                    num_bytes=run.size_bytes,
                    bits=8 * blocks_bytes(run) / weights,
                    expected=sum(known) if len(known) == len(costs) else None,
                )
            )
        return cls(
            target=str(target),
            figure=sensitivities[0][0].figure,
            num_windows=sensitivities[0][0].num_windows,
            runs=tuple(rows),
            blocks=tuple(
                BlockRow(
                    name=runs[0].plan.parts[block + 1].name,
                    num_bytes=tuple(part_bytes(run.records[block + 1]) for run in runs),
                    costs=tuple(one.cost for one in of_block),
                    standard_errors=tuple(one.standard_error for one in of_block),
                    picked=chosen.picked[block],
                )
                for block, of_block in enumerate(sensitivities)
            ),
            choice=chosen,
            curve=tuple(map(point, choices.curve(_NUM_POINTS))),
        )

    def point(self, runs: Sequence[GivenRun], found: LayerChoice) -> Point:
        """A choice of layers."""
        return Point(
            num_bytes=found.size_bytes + part_bytes(runs[0].records[0]),
            bits=8 * found.size_bytes / block_weights(runs[0]),
            expected=found.cost,
            picked=found.picked,
            layers=found.layers,
        )

    def tables(self) -> Group:
        """All of it, for people."""
        figure = "KL, nats a token" if self.figure == "divergence" else "1 - mean cosine"
        names = [run.recipe for run in self.runs]
        blocks = Table(
            "block",
            *(Column(name, justify="right") for name in names),
            "chosen",
            title=f"what each block alone costs ({figure}, {self.num_windows} windows)",
        )
        for row in self.blocks:
            cells = [_cost(*cell) for cell in zip(row.costs, row.standard_errors, strict=True)]
            blocks.add_row(Text(row.name), *cells, Text(names[row.picked]))
        right = [Column(name, justify="right") for name in ("size", "bits a weight", "expected")]
        curve = Table("", *right, "blocks of", title="sizes, and what they would cost")
        for run in self.runs:
            expected = "not finite" if run.expected is None else f"{run.expected:.5f}"
            curve.add_row(Text(run.recipe), size(run.num_bytes), f"{run.bits:.3f}", expected)
        points = sorted({*self.curve, self.choice}, key=lambda one: (one.num_bytes, one.expected))
        for one in points:
            curve.add_row(
                "chosen" if one == self.choice else "",
                size(one.num_bytes),
                f"{one.bits:.3f}",
                f"{one.expected:.5f}",
                Text(_blocks_in_short(one.picked, names)),
            )
        if (found := self.by_layers) is not None:
            mixed = len({one.block for one in found.layers})
            short = _blocks_in_short(found.picked, names)
            words = f"{short}; {mixed} are mixed"
            cost = f"{found.expected:.5f}"
            curve.add_row(
                "by layers", size(found.num_bytes), f"{found.bits:.3f}", cost, Text(words)
            )
        rows = [blocks, curve]
        if self.by_layers is not None:
            blocks_names = [row.name for row in self.blocks]
            rows.append(_layers_table(self.by_layers.layers, names, blocks_names))
        return Group(*rows, Text(f"{self.target}; bits and sizes are as stored"))


def _layers_table(
    layers: Sequence[GivenLayers], names: Sequence[str], block_names: Sequence[str]
) -> Table:
    """Layers as they are called within their blocks: blocks alike share a row."""
    given: dict[tuple[int, str], list[int]] = {}
    for one in layers:
        within = [path.removeprefix(f"{block_names[one.block]}/") for path in one.layers]
        for text in _by_folder(within):
            given.setdefault((one.run, text), []).append(one.block)
    table = Table("layers", "of", "blocks", title="layers from other runs than most of their block")
    for (run, text), blocks in sorted(given.items()):
        table.add_row(Text(text), Text(names[run]), _ranges(blocks))
    return table


def _by_folder(paths: Sequence[str]) -> list[str]:
    """Paths by what precedes their last part, such as "self_attention: query, key, value"."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, []).append(name)
    return [
        f"{folder}: {', '.join(own)}" if folder else ", ".join(own)
        for folder, own in folders.items()
    ]


def _cost(cost: float | None, error: float | None) -> str:
    if cost is None:
        return "not finite"
    return f"{cost:.5f}" if error is None else f"{cost:.5f} ± {error:.5f}"


def blocks_of(picked: Sequence[int], names: Sequence[str]) -> str:
    """Which run gives which blocks, in words, such as "w4: 0, 3–5; w3: 1–2"."""
    given = _by_run(picked)
    return "; ".join(f"{names[number]}: {_ranges(given[number])}" for number in sorted(given))


def _blocks_in_short(picked: Sequence[int], names: Sequence[str]) -> str:
    """As `blocks_of`; where that is long, of how many blocks each run gives."""
    words = blocks_of(picked, names)
    if len(words) <= _MOST_CHARACTERS:
        return words
    given = _by_run(picked)
    return "; ".join(f"{names[number]}: {len(given[number])} blocks" for number in sorted(given))


def _by_run(picked: Sequence[int]) -> dict[int, list[int]]:
    given: dict[int, list[int]] = {}
    for block, number in enumerate(picked):
        given.setdefault(number, []).append(block)
    return given


def _ranges(blocks: Sequence[int]) -> str:
    """Numbers in their order, such as "0, 3–5"."""
    ranges: list[list[int]] = []
    for block in blocks:
        if ranges and ranges[-1][1] == block - 1:
            ranges[-1][1] = block
        else:
            ranges.append([block, block])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in ranges)
