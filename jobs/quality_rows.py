"""How close a result is to its source, as rows of a table for people: of each set, of each task."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from pipeline.evaluation.answers import TaskFidelity
from pipeline.fidelity import Fidelity, TextFidelity


def add_quality(facts: Table, fidelity: Fidelity) -> None:
    """Add a row for each set of texts and each task; or one that says what is not finite."""
    if fidelity.not_finite is not None:
        facts.add_row("quality", fidelity.not_finite)
        return
    for name, of_texts in fidelity.texts.items():
        facts.add_row(Text(f"quality, {name}" if name else "quality"), _quality(of_texts))
    for task in fidelity.tasks:
        facts.add_row(Text(f"task {task.name}"), _answers(task))


def _quality(fidelity: TextFidelity) -> str:
    if fidelity.cosine is not None:
        return f"mean cosine {fidelity.cosine:.5f} over {fidelity.count} vectors"
    p99 = fidelity.divergence_p99
    tail = "" if p99 is None else f" (p99 {p99:.4f})"
    return (
        f"perplexity {fidelity.source_perplexity:.3f} → {fidelity.result_perplexity:.3f}, KL "
        f"{fidelity.divergence:.4f} nats{tail}, same next token {fidelity.agreement:.1%} "
        f"({fidelity.count} tokens in {fidelity.num_windows} windows)"
    )


def _answers(task: TaskFidelity) -> str:
    stderr = task.result.acc_stderr
    error = "" if stderr is None else f" ± {stderr:.1%}"
    recovery = "" if task.recovery is None else f", recovery {task.recovery:.1%}"
    cut = f"; {task.truncated} choices were too long, and cut on the left" if task.truncated else ""
    return (
        f"acc {task.source.acc:.1%} → {task.result.acc:.1%}{error}{recovery}, acc_norm "
        f"{task.source.acc_norm:.1%} → {task.result.acc_norm:.1%}, {task.flips} of "
        f"{task.num_questions} questions flipped, {task.changed} answered otherwise, KL "
        f"{task.divergence:.4f} nats{cut}"
    )
