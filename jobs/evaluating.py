"""What a result is judged by, and judging it on a run's workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from jobs.logging import log_event, status
from pipeline.calibration.windows import TokenWindows
from pipeline.errors import CalibrationTextError
from pipeline.evaluation.answers import ChoiceLikelihood
from pipeline.evaluation.batches import TOKENS_PER_PASS, EvaluationSet
from pipeline.evaluation.named_texts import EvaluatedTexts
from pipeline.executor.protocol import Executor, ExecutorError, FunctionRunner, WorkerLostError
from pipeline.fidelity import Fidelity, WindowFidelity, fidelity_of
from pipeline.plan import Plan
from pipeline.remote_planning import evaluation_windows, question_rows, token_texts
from pipeline.run.evaluations import Evaluation
from pipeline.run.worker_api import PartsOfRuns, WorkerApi
from pipeline.run.worst_windows import WorstWindows
from pipeline.storage.object_store import ObjectStore

Rows: TypeAlias = list[list[WindowFidelity] | list[ChoiceLikelihood]]
"""What was found of each row of each batch."""

_MOST_LOSSES = 5


def read_evaluation_set(
    runner: FunctionRunner,
    source_url: str,
    plan: Plan,
    *,
    texts: EvaluatedTexts,
    num_windows: int,
    tasks: tuple[str, ...] = (),
    chat: bool | None = None,
    named: str,
) -> EvaluationSet | None:
    """What to judge a result by: windows as long as calibration's, and tasks; None for neither.

    Args:
        num_windows: of each set of texts.
        chat: how conversations are read; None as the plan's calibration reads its own.
        named: how the user named texts and windows, for messages.

    Raises:
        CalibrationTextError: texts that are missing, unreadable or too few.
        TaskError: files that hold no questions, or a model that cannot answer any.
    """
    if not texts and not tasks:
        return None
    # Questions first: reading them is quick.
    questions = runner.run(question_rows, source_url, tasks) if tasks else ()
    if not texts:
        return EvaluationSet(tasks=questions)
    length = None if plan.tokens is None else plan.tokens.sequence_length
    given = plan.recipe.calibration
    if chat is None and given is not None:
        chat = given.chat
    inputs = {} if given is None else given.inputs
    try:
        windows = runner.run(
            evaluation_windows, source_url, texts.by_name, num_windows, length, chat, inputs
        )
    except CalibrationTextError as error:
        raise CalibrationTextError(f"{named}: {error}") from None
    read = {name: TokenWindows.from_bytes(content) for name, content in windows.items()}
    return EvaluationSet(windows=read.pop("", None), named=read, tasks=questions)


def judge(
    executor: Executor,
    store: ObjectStore,
    source_url: str,
    manifest_sha256: str,
    given: EvaluationSet,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> Fidelity:
    """Compare a finished result with its source, and keep what is found beside it.

    Args:
        store: at the run's root.
        tokens_per_pass: how many have room on a worker's device (see `Compute.evaluation_pass`).
    """
    found = measure(executor, given, tokens_per_pass)
    return keep(executor, store, source_url, manifest_sha256, given, found)


def keep(
    executor: Executor,
    store: ObjectStore,
    source_url: str,
    manifest_sha256: str,
    given: EvaluationSet,
    found: Rows,
) -> Fidelity:
    """Keep what `measure` found of a finished result beside it; returns its figures."""
    fidelity = fidelity_of(given, found)
    evaluation = Evaluation.of(manifest_sha256, given, fidelity)
    evaluation.save(store)
    if given.text_sets:

        def decode(texts: Sequence[Sequence[int]]) -> list[list[str]]:
            return executor.run(token_texts, source_url, texts)

        WorstWindows.of(evaluation, given, found, decode).save(store)
    return fidelity


def measure(
    executor: Executor,
    given: EvaluationSet,
    tokens_per_pass: int = TOKENS_PER_PASS,
    of: PartsOfRuns | None = None,
) -> Rows:
    """Compare a finished result with its source, with the batches spread over the workers.

    Args:
        tokens_per_pass: how many have room on a worker's device.
        of: another result of the source than the workers' own.

    Returns:
        what was found of each row of each batch.
    """
    if tokens_per_pass < TOKENS_PER_PASS:
        log_event(
            "device memory",
            f"at most {tokens_per_pass} tokens pass the blocks together, of {TOKENS_PER_PASS}: a "
            "GPU has no room for more; each pass reads all blocks again",
        )
    for _ in range(_MOST_LOSSES):
        number = len(given.batches)
        workers = min(executor.num_workers, number)
        try:
            with status("comparing the result with its source"):
                measured = executor.fetch(
                    [
                        executor.submit(
                            w,
                            WorkerApi.evaluate,
                            given,
                            range(w, number, workers),
                            tokens_per_pass,
                            of,
                        )
                        for w in range(workers)
                    ]
                )
        except WorkerLostError:
            executor.recover()
        else:
            return [measured[i % workers][i // workers] for i in range(number)]
    raise ExecutorError(
        f"workers were lost {_MOST_LOSSES} times while they evaluated; check the memory and logs "
        "of the cluster's nodes, then run quantfleet evaluate"
    )
