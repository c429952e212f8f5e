"""What a driver may ask of a worker, and what travels between them.

`pipeline.worker.worker.Worker` implements the protocol; the driver's process imports neither it nor
JAX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from numpy.typing import NDArray

from pipeline.evaluation.answers import ChoiceLikelihood
from pipeline.evaluation.batches import EvaluationSet
from pipeline.executor.protocol import concurrent
from pipeline.fidelity import WindowFidelity
from pipeline.run.activations import SavedShard
from pipeline.run.records import Manifest, PartRecord

if TYPE_CHECKING:
    from quantizer.expert_codes import ExpertCodes
    from quantizer.expert_solver import SolvedExpert
    from quantizer.experts import InputStatistics as Statistics
    from quantizer.gptq.solve import SolvedRows
    from quantizer.result import Float32

Values: TypeAlias = Mapping[str, NDArray[Any]]
"""A part's arrays in the source, by the path of their variable."""


@dataclass(frozen=True, kw_only=True)
class SolvedLayer:
    """One quantized layer, by Keras' path.

    Attributes:
        variables: what stock Keras stores for it, by the layer's own names.
        report: the solver's, as plain JSON values.
        kernel: the dequantized kernel, as later layers meet it; None of an embedding.
        codes: of a bank of experts, whose variable holds what they stand for as floats; it has no
            variables of its own.
    """

    path: str
    variables: dict[str, NDArray[Any]]
    report: dict[str, Any]
    kernel: Float32 | None
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


class WorkerApi(Protocol):
    """One worker: it holds calibration shards, and captures, solves, commits and propagates.

    Every method may run twice, or again on a worker that has restarted: each is a function of its
    arguments and of what is in storage, but for the shards, which `restore` makes anew.
    """

    @concurrent
    def read(self, part: int) -> Values:
        """Read the source's arrays of one part."""

    def restore(self, block: int, shards: Sequence[int], start: int) -> None:
        """Bring shards to where they enter `block`; one that is inside it only goes back.

        Args:
            start: the block before which stored activations are to be used; 0 for none.
        """

    def capture(
        self,
        block: int,
        stage: int,
        subtree: range,
        values: Values,
        *solved: Sequence[SolvedLayer],
        experts: range | None = None,
    ) -> Statistics:
        """Move shards to the input of the block's group `stage`, and sum it over a subtree of them.

        Args:
            solved: the results for all groups before, and for layers that need no calibration.
            experts: which ones' inputs to sum, of a group of experts with inputs of their own.
        """

    def merge(self, left: Statistics, right: Statistics) -> Statistics:
        """Add two sums: one node of the reduction."""

    def solve(
        self, part: int, paths: Sequence[str], values: Values, statistics: Statistics | None
    ) -> list[SolvedLayer]:
        """Quantize some of a part's layers: those of one input, or those that need none."""

    def solve_slices(
        self, part: int, slices: Mapping[str, Sequence[int]], values: Values, statistics: Statistics
    ) -> dict[str, SolvedSlices]:
        """Quantize some row slices, by number, of layers of one input; both by layer path."""

    def join(
        self, part: int, paths: Sequence[str], values: Values, *solved: Mapping[str, SolvedSlices]
    ) -> list[SolvedLayer]:
        """Put layers together whose slices several workers solved."""

    def commit(
        self, part: int, previous: str, values: Values, *solved: Sequence[SolvedLayer]
    ) -> PartRecord:
        """Write a part's file and record, and return the record.

        Args:
            previous: digest of the record of the block before; "" where there is none.
            solved: the results for all of the part's layers with a scheme.
        """

    def propagate(
        self, block: int, shards: Sequence[int], values: Values, *solved: Sequence[SolvedLayer]
    ) -> None:
        """Send shards through the rest of the quantized block; no-op for those that have left."""

    def quantize_alone(self, part: int) -> PartRecord:
        """Read, solve and commit a part whose layers need no calibration."""

    def keep(self, block: int, shards: Sequence[int]) -> dict[int, SavedShard]:
        """Store the activations that enter `block`, to resume from."""

    def finalize(self, records: Mapping[int, PartRecord]) -> Manifest:
        """Write the artifact's small files and the manifest; all parts must be committed."""

    def evaluate(
        self, given: EvaluationSet, numbers: Sequence[int]
    ) -> list[list[WindowFidelity] | list[ChoiceLikelihood]]:
        """Compare source and finished artifact on some batches, by number; by row of each."""
