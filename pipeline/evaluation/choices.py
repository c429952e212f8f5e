"""Questions as tokens: one row per choice, the question before it.

As in EleutherAI's lm-evaluation-harness 0.4 (`TemplateLM._encode_pair` and
`HFLM._loglikelihood_tokens`): a space stands between question and choice; spaces at the question's
end go to the choice; the choice's tokens are those of the whole beyond as many as the question
alone has; what is too long for the model loses tokens on the left. A row begins with the token that
the model's own preprocessor puts first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import TaskError
from pipeline.evaluation.tasks import Question, Task

_DELIMITER = " "


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """How text becomes what a model reads.

    Attributes:
        tokenize: gives a text's tokens, without special ones.
        start: put before every row; None for nothing.
        instead: put before a choice that nothing else precedes; None where there is no such token.
        most: tokens that the model can read.
        vocabulary_size: what every token is less than.
    """

    tokenize: Callable[[str], Sequence[int]]
    start: int | None
    instead: int | None
    most: int
    vocabulary_size: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskRows:
    """A task's choices as tokens, question after question.

    Attributes:
        sha256: of the questions.
        rows: the tokens of each choice, with all that precedes it. The last one is predicted only.
        scored: [rows]: how many of a row's last tokens are the choice's.
        characters: [rows]: length of the choice's text.
        num_choices, answers: [questions].
        truncated: how many rows were too long, and lost tokens on the left.
        most: tokens that the model can read.
    """

    name: str
    sha256: str
    rows: tuple[NDArray[np.int32], ...]
    scored: NDArray[np.int32]
    characters: NDArray[np.int32]
    num_choices: NDArray[np.int32]
    answers: NDArray[np.int32]
    truncated: int
    most: int


def task_rows(task: Task, tokens: Tokens) -> TaskRows:
    """Tokenize a task.

    Raises:
        TaskError: a choice without tokens, or with more than the model reads.
    """
    rows, scored, truncated = [], [], 0
    for number, question in enumerate(task.questions, 1):
        for place, choice in enumerate(question.choices):
            where = f"task {task.name}, question {number}, choice {place}"
            before, after = _encode(question, choice, tokens, where)
            if len(after) > tokens.most:
                raise TaskError(
                    f"{where}: {len(after)} tokens, more than the {tokens.most} that the model "
                    "reads; shorten it, or leave the question out"
                )
            whole = np.array([*before, *after], np.int32)
            # The last token is not read.
            kept = whole[-(tokens.most + 1) :]
            truncated += len(kept) < len(whole)
            rows.append(kept)
            scored.append(len(after))
    choices = [choice for question in task.questions for choice in question.choices]
    return TaskRows(
        name=task.name,
        sha256=task.sha256,
        rows=tuple(rows),
        scored=np.array(scored, np.int32),
        characters=np.array([len(choice) for choice in choices], np.int32),
        num_choices=np.array([len(q.choices) for q in task.questions], np.int32),
        answers=np.array([q.answer for q in task.questions], np.int32),
        truncated=truncated,
        most=tokens.most,
    )


def _encode(
    question: Question, choice: str, tokens: Tokens, where: str
) -> tuple[list[int], list[int]]:
    """The tokens before a choice, and its own."""
    context = question.text.rstrip()
    continuation = question.text[len(context) :] + _DELIMITER + choice
    start = [] if tokens.start is None else [tokens.start]
    before = start + (_checked(context, tokens, where) if context else [])
    whole = start + _checked(context + continuation, tokens, where)
    after = whole[len(before) :]
    if not after:
        raise TaskError(
            f"{where}: the model's tokenizer makes no token of it beyond those of the question; "
            "write it otherwise, or leave the question out"
        )
    if not before:
        if tokens.instead is None:
            raise TaskError(
                f"{where}: nothing precedes it, and the model's tokenizer has no token for the "
                "start or end of a text; write a question"
            )
        before = [tokens.instead]
    return before, after


def _checked(text: str, tokens: Tokens, where: str) -> list[int]:
    found = [int(token) for token in tokens.tokenize(text)]
    for token in found:
        if not 0 <= token < tokens.vocabulary_size:
            raise TaskError(
                f"{where}: token {token} is not between 0 and {tokens.vocabulary_size - 1}; is "
                "this the model's own tokenizer?"
            )
    return found
