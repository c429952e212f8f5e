"""What workers made of a block's layers, before it is committed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from numpy.typing import NDArray

from pipeline.run.records import TuningRecord

if TYPE_CHECKING:
    from quantizer.expert_codes import ExpertCodes
    from quantizer.expert_solver import SolvedExpert
    from quantizer.gptq.solved_rows import SolvedRows


@dataclass(frozen=True, kw_only=True)
class SolvedLayer:
    """One quantized layer, by Keras' path.

    Attributes:
        variables: what stock Keras stores for it, by the layer's own names; later layers meet the
            kernel that they decode to.
        report: the solver's, as plain JSON values.
        codes: of a bank of experts, whose variable holds what they stand for as floats; it has no
            variables of its own.
    """

    path: str
    variables: dict[str, NDArray[Any]]
    report: dict[str, Any]
    codes: ExpertCodes | None = None


@dataclass(frozen=True, kw_only=True)
class SolvedSlices:
    """Some of the row slices of a layer, or of the experts of a bank, by Keras' path.

    Attributes:
        rows: each slice's result, by its number.
        experts: of a bank of experts with inputs of their own, each one's result, by its number;
            it has no rows.
        problem: why they could not be calibrated; "" if they were.
    """

    path: str
    rows: dict[int, SolvedRows] = field(default_factory=dict)
    experts: dict[int, SolvedExpert] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class TunedBlock:
    """A solved block after training; the better of the two by windows that it was not trained on.

    Attributes:
        layers: all of its quantized layers.
        floats: variables that stay in float and have changed, by path, as they are stored.
        record: what training did; None if the block has nothing to train.
    """

    layers: list[SolvedLayer]
    floats: dict[str, NDArray[Any]]
    record: TuningRecord | None

    @property
    def is_changed(self) -> bool:
        """Whether it is other than it was solved."""
        return self.record is not None and self.record.kept == "tuned"


SolvedLayers: TypeAlias = Sequence[SolvedLayer] | TunedBlock
"""Results for some layers of a block, or for all of it."""


def whole_block(solved: Iterable[SolvedLayers]) -> TunedBlock:
    """Results for the layers of a block put together; without a record if it was not trained."""
    layers: dict[str, SolvedLayer] = {}
    floats: dict[str, NDArray[Any]] = {}
    record = None
    for one in solved:
        if isinstance(one, TunedBlock):
            floats, record = one.floats, one.record
        layers |= {x.path: x for x in (one.layers if isinstance(one, TunedBlock) else one)}
    return TunedBlock(layers=list(layers.values()), floats=floats, record=record)
