"""The texts of a composition: what blocks are measured on, and what results are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jobs.evaluating import read_evaluation_set
from pipeline.calibration.windows import TokenWindows
from pipeline.canonical import digest_of
from pipeline.composition.composed_plan import GivenRun
from pipeline.errors import DamagedObjectError, MissingObjectError, PipelineError
from pipeline.evaluation.batches import EvaluationSet
from pipeline.evaluation.named_texts import EvaluatedTexts
from pipeline.executor.protocol import FunctionRunner


@dataclass(frozen=True, kw_only=True)
class AskedTexts:
    """What a user names.

    Attributes:
        measure_texts: to measure sensitivities on; none for the runs' own calibration windows.
        measure_windows: how many.
        evaluated_on, evaluation_windows, tasks, chat: as of `jobs.quantize.Job`; without texts
            results are compared on what sensitivities are measured on.
    """

    measure_texts: tuple[str, ...] = ()
    measure_windows: int = 8
    evaluated_on: EvaluatedTexts = field(default_factory=EvaluatedTexts)
    evaluation_windows: int = 8
    tasks: tuple[str, ...] = ()
    chat: bool | None = None

    @property
    def arguments(self) -> list[str]:
        """The same, as arguments of `quantfleet compose`."""
        words = [word for text in self.measure_texts for word in ("--measure-on", text)]
        words += ["--measure-windows", str(self.measure_windows)]
        for text in self.evaluated_on.arguments:
            words += ["--evaluate-on", text]
        if self.evaluated_on:
            words += ["--windows", str(self.evaluation_windows)]
        for task in self.tasks:
            words += ["--tasks", task]
        return words + {None: [], True: ["--chat"], False: ["--no-chat"]}[self.chat]

    @property
    def judges(self) -> bool:
        """Whether anything is named to judge results by."""
        return bool(self.evaluated_on or self.tasks)


@dataclass(frozen=True, kw_only=True, eq=False)
class CompositionTexts:
    """What sensitivities are measured on, and what results are judged by."""

    measured: EvaluationSet
    """Windows without a name."""
    judged: EvaluationSet

    @property
    def judged_digest(self) -> str:
        """Of what results are judged by."""
        sets = {name: windows.digest for name, windows in self.judged.text_sets.items()}
        return digest_of([sets, {task.name: task.sha256 for task in self.judged.tasks}])


def read_composition_texts(
    asked: AskedTexts, runs: Sequence[GivenRun], source_url: str, runner: FunctionRunner
) -> CompositionTexts:
    """Read the texts of a composition.

    Raises:
        CalibrationTextError: texts that are missing, unreadable or too few.
        PipelineError: there is nothing to measure on.
    """
    # Evaluations, too, are on windows as long as calibration's.
    calibrated = next((run for run in runs if run.plan.tokens is not None), runs[0])
    if asked.measure_texts:
        measured = read_evaluation_set(
            runner,
            source_url,
            calibrated.plan,
            texts=EvaluatedTexts(texts=asked.measure_texts),
            num_windows=asked.measure_windows,
            chat=asked.chat,
            named=f"--measure-on, with --measure-windows {asked.measure_windows}",
        )
        assert measured is not None
    else:
        measured = EvaluationSet(windows=_calibration_windows(asked, calibrated))
    judged = read_evaluation_set(
        runner,
        source_url,
        calibrated.plan,
        texts=asked.evaluated_on,
        num_windows=asked.evaluation_windows,
        tasks=asked.tasks,
        chat=asked.chat,
        named=f"--evaluate-on, with --windows {asked.evaluation_windows}",
    )
    if judged is None or not judged.text_sets:
        judged = EvaluationSet(windows=measured.windows, tasks=judged.tasks if judged else ())
    return CompositionTexts(measured=measured, judged=judged)


def _calibration_windows(asked: AskedTexts, run: GivenRun) -> TokenWindows:
    """Some of a run's calibration windows, from all of them alike."""
    tokens = run.plan.tokens
    if tokens is None:
        raise PipelineError(
            "none of the runs was calibrated, so there are no windows to measure on; name texts: "
            "--measure-on texts.jsonl"
        )
    try:
        content = run.store.get(tokens.key, sha256=tokens.digest)
    except (DamagedObjectError, MissingObjectError) as error:
        raise PipelineError(
            f"{error}; name texts to measure on instead: --measure-on texts.jsonl"
        ) from error
    number = min(asked.measure_windows, tokens.num_samples)
    # Sources of texts alternate.
    return TokenWindows.from_bytes(content).chosen(
        [i * tokens.num_samples // number for i in range(number)]
    )
