"""What a driver may ask of a worker, and what travels between them.

`pipeline.worker.worker.Worker` implements the protocol; the driver's process imports neither it nor
JAX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from numpy.typing import NDArray
from pydantic import ConfigDict

from pipeline.evaluation.answers import ChoiceLikelihood
from pipeline.evaluation.batches import TOKENS_PER_PASS, EvaluationSet
from pipeline.executor.protocol import ActivationPlace, concurrent
from pipeline.fidelity import WindowFidelity
from pipeline.plan import Plan
from pipeline.recipe.recipe import StatisticsKind
from pipeline.run.activations import SavedShard
from pipeline.run.code_histograms import CodeHistogram
from pipeline.run.records import CommittedRecord, Manifest
from pipeline.run.solved_layers import SolvedLayer, SolvedLayers, SolvedSlices, TunedBlock
from pipeline.storage.record import STRICT

if TYPE_CHECKING:
    from quantizer.tuning.training import Batch

Values: TypeAlias = Mapping[str, NDArray[Any]]
"""A part's arrays in the source, by the path of their variable."""


@dataclass(frozen=True, kw_only=True)
class TuningWindows:
    """Micro-batches that a block is trained and judged on, by their number, in NumPy."""

    batches: dict[int, Batch]


@dataclass(frozen=True, kw_only=True)
class HeldSum:
    """The name of a sum over the input of one group, which stays with the worker that made it.

    It stands for a node of the reduction's tree, and so for the same bits on every worker.

    Attributes:
        block, stage: of the group.
        leaves: the calibration shards that it covers.
        experts: whose inputs it is over, where experts have inputs of their own.
    """

    block: int
    stage: int
    leaves: range
    experts: range | None = None

    def __str__(self) -> str:
        shards = f"shards {self.leaves[0]} to {self.leaves[-1]}"
        return f"the sum over {shards} of block {self.block}'s input {self.stage}"

    @property
    def place(self) -> tuple[int, int, int]:
        """Sums are made in this order; those over some experts are made one after another."""
        return self.block, self.stage, 0 if self.experts is None else self.experts.start

    def is_part_of(self, other: HeldSum) -> bool:
        """Whether the other covers the same shards, or these and more."""
        same = replace(self, leaves=other.leaves) == other
        first, last = self.leaves[0], self.leaves[-1]
        return same and first in other.leaves and last in other.leaves


@dataclass(frozen=True, kw_only=True)
class InputSum:
    """A sum itself, on a device or in NumPy.

    Attributes:
        arrays: of a Gram, its bands of rows from the diagonal on; of magnitudes, Σ|x|, Σx² and
            max|x| by input feature. Of experts with inputs of their own, each array has an axis of
            experts first, and the last one is the number of rows that each was sent.
        num_rows: tokens that it covers.
        experts: their numbers.
        drift: where the group corrects drift: Σ (x - x̃)ᵀx̃, and over windows that are held back
            Σ (x - x̃)ᵀ(x - x̃) too, of the float model's inputs x and the quantized one's, x̃.
        held_back: over windows that are held back, of which the sum itself covers none then; None
            if it covers all windows, or if none of its windows are held back.
    """

    kind: StatisticsKind
    arrays: tuple[Any, ...]
    num_rows: int
    experts: range | None = None
    drift: tuple[Any, ...] = ()
    held_back: InputSum | None = None


@dataclass(frozen=True, kw_only=True)
class LayersOfRun:
    """Layers of a part, by path, that another run gives than the rest of it."""

    part: int
    url: str
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PartsOfRuns:
    """A model made of parts of finished runs of one source; a run of its own need not exist.

    Attributes:
        plan: of the whole.
        run_urls: where each part is committed.
        layers: what other runs give of parts.
    """

    plan: Plan
    run_urls: tuple[str, ...]
    layers: tuple[LayersOfRun, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayersAlone:
    """Layers of a block that have to be of one run, and what they do in place of the source's.

    Attributes:
        layers: paths.
        error: of what the block gives for the source's inputs, Σ‖y' - y‖² / ‖y‖² by token, divided
            by num_tokens; None if it is not finite.
        stored_bytes: of their arrays in the block's file.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    layers: tuple[str, ...]
    error: float | None
    num_tokens: int
    stored_bytes: int


@dataclass(frozen=True, kw_only=True)
class CommittedPart:
    """A part that a worker has committed.

    Attributes:
        histograms: of its layers that have codes, by path; for the log.
    """

    record: CommittedRecord
    histograms: Mapping[str, CodeHistogram] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunAt:
    """A finished run of the source by where it is: a plan is too long to be sent with every call.

    Attributes:
        plan_digest: of the plan that is to be there.
    """

    url: str
    plan_digest: str


class WorkerApi(Protocol):
    """One worker: it holds calibration shards, and captures, solves, commits and propagates.

    Every method may run twice, or again on a worker that has restarted: each is a function of its
    arguments and of what is in storage, but for the shards, which `restore` makes anew, and for the
    sums over them, which `capture` does.
    """

    @concurrent("read")
    def read(self, part: int) -> Values:
        """Read the source's arrays of one part."""

    def restore(
        self, block: int, shards: Sequence[int], start: int, place: ActivationPlace = "device"
    ) -> None:
        """Bring shards to where they enter `block`; one that is inside it only goes back.

        Args:
            start: the block before which stored activations are to be used; 0 for none.
            place: where the activations of shards that are not held yet are to wait.
        """

    def capture(
        self,
        block: int,
        stage: int,
        subtree: range,
        values: Values,
        *before: Sequence[SolvedLayer] | HeldSum,
        experts: range | None = None,
    ) -> HeldSum:
        """Move shards to the input of the block's group `stage`, and sum it over a subtree of them.

        The sum stays here until a later stage begins; of a float block, until the block after the
        next begins.

        Args:
            before: the results for all groups before, and for layers that need no calibration; of a
                float block, which has none, the name of the sum that has to be captured before.
            experts: which ones' inputs to sum, of a group of experts with inputs of their own.
        """

    def merge(self, left: HeldSum, right: HeldSum, sent: InputSum | None = None) -> HeldSum:
        """Add two sums, one node of the reduction, and hold the result in place of them.

        Args:
            sent: the right one, if another worker holds it.
        """

    def send(self, held: HeldSum, experts: range | None = None) -> InputSum:
        """Copy a sum to the host, for another worker that is to merge it or solve with it.

        Args:
            experts: which ones to send, of a sum over the inputs that experts have of their own.
        """

    def solve(
        self, part: int, paths: Sequence[str], values: Values, total: HeldSum | InputSum | None
    ) -> list[SolvedLayer]:
        """Quantize some of a part's layers: those of one input, or those that need none.

        Args:
            total: the sum over their input, by name if it is held here.
        """

    def solve_slices(
        self,
        part: int,
        slices: Mapping[str, Sequence[int]],
        values: Values,
        *sums: HeldSum | InputSum,
        experts: range | None = None,
    ) -> dict[str, SolvedSlices]:
        """Quantize some row slices, by number, of layers of one input; both by layer path.

        Args:
            slices: of experts with inputs of their own, ranges of them, the same ones of each
                layer.
            sums: the sum over the layers' input, by name if it is held here. For experts, those
                over all subtrees of the reduction, in the order of their leaves: the rest of the
                tree is reduced here, so that an expert's sums meet where it is solved.
            experts: those in the ranges; what others send is of these alone.
        """

    def join(
        self, part: int, paths: Sequence[str], values: Values, *solved: Mapping[str, SolvedSlices]
    ) -> list[SolvedLayer]:
        """Put layers together whose slices several workers solved."""

    def windows(self, block: int, shards: Sequence[int], values: Values) -> TuningWindows:
        """What a block takes of shards, and what the float model's block gives, to train it on."""

    def tune(
        self,
        block: int,
        shards: Sequence[int],
        values: Values,
        *given: Sequence[SolvedLayer] | TuningWindows,
    ) -> TunedBlock:
        """Train a block all of whose layers are solved.

        Args:
            shards: that this worker holds.
            given: the results for all layers, and the windows of all other shards.
        """

    @concurrent("commit")
    def commit(
        self, part: int, previous: str, values: Values, *solved: SolvedLayers
    ) -> CommittedPart:
        """Write a part's file and record.

        Args:
            previous: digest of the record of the block before; "" where there is none.
            solved: the results for all of the part's layers with a scheme.
        """

    @concurrent("commit")
    def commit_sums(self, part: int, *sums: InputSum) -> CommittedPart:
        """Write the sums over a float block's inputs, of all groups, and their record."""

    @concurrent("commit")
    def settle(self) -> None:
        """Wait until no commit that was begun before is under way."""

    def propagate(
        self, block: int, shards: Sequence[int], values: Values, *before: SolvedLayers | HeldSum
    ) -> None:
        """Send shards through the rest of the quantized block; no-op for those that have left.

        Args:
            before: the results for all of its layers; of a float block, names of the sums that have
                to be captured before.
        """

    def quantize_alone(self, part: int) -> CommittedPart:
        """Read, solve and commit a part that depends on no other.

        Its layers need no calibration, or are solved on stored statistics.

        Raises:
            StatisticsError: these are missing or damaged.
        """

    def keep(self, block: int, shards: Sequence[int]) -> dict[int, SavedShard]:
        """Store the activations that enter `block`, to resume from."""

    def finalize(self, records: Mapping[int, CommittedRecord]) -> Manifest:
        """Write the artifact's small files and the manifest; all parts must be committed."""

    def evaluate(
        self,
        given: EvaluationSet,
        numbers: Sequence[int],
        tokens_per_pass: int = TOKENS_PER_PASS,
        of: PartsOfRuns | None = None,
    ) -> list[list[WindowFidelity] | list[ChoiceLikelihood]]:
        """Compare source and finished artifact on some batches, by number; by row of each.

        Args:
            tokens_per_pass: how many its device has room for between two blocks.
            of: another artifact of the source; None for the run's own.
        """

    def sensitivities(
        self,
        block: int,
        runs: Sequence[RunAt],
        given: EvaluationSet,
        tokens_per_pass: int = TOKENS_PER_PASS,
    ) -> list[list[WindowFidelity]]:
        """Compare the source with what it is with this one block of a run instead of its own.

        Blocks that are asked for in their order go on with the source's activations.

        Args:
            given: windows of text without a name.

        Returns:
            For each run, what was found of each window.

        Raises:
            PlanMismatchError: another run has taken a run's place.
        """

    def layer_errors(
        self,
        block: int,
        runs: Sequence[RunAt],
        given: EvaluationSet,
        tokens_per_pass: int = TOKENS_PER_PASS,
    ) -> list[tuple[LayersAlone, ...]]:
        """Compare what a block gives with what it gives with some layers of a run.

        Arguments and errors as of `sensitivities`.

        Returns:
            For each run, for all units of the block's layers, the same of all runs; none of a block
            that gives no hidden states.
        """
