"""Tasks: files of multiple-choice questions.

A task is a .jsonl file, its name the file's without the ending. A line is one question:

    {"question": "Rain falls from", "choices": ["clouds", "stones"], "answer": 0}

`answer` is the right choice's place, from 0, or its capital letter, from "A". Other keys, such as
an id, are left alone.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.canonical import digest_of
from pipeline.errors import TaskError
from pipeline.storage.json_lines import read_json_lines
from pipeline.storage.user_files import find_given_files

_EXAMPLE = '{"question": "…", "choices": ["…", "…"], "answer": 0}'
_ENDINGS = (".jsonl", ".jsonl.gz")
_MAX_QUESTION_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question.

    Attributes:
        answer: the place of the right choice.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """The questions of one file."""

    name: str
    questions: tuple[Question, ...]

    @cached_property
    def sha256(self) -> str:
        """Of the questions, whatever else the file holds."""
        return digest_of([[q.text, list(q.choices), q.answer] for q in self.questions])


def read_tasks(sources: Sequence[str]) -> tuple[Task, ...]:
    """Read and check whole files of questions.

    Args:
        sources: paths, URLs or globs of .jsonl or .jsonl.gz files.

    Raises:
        TaskError: `file:line: what is wrong; what to do`.
    """
    tasks: list[Task] = []
    file_of: dict[str, str] = {}
    for file in (file for source in sources for file in _files(source)):
        name = _name(file)
        if name in file_of:
            raise TaskError(
                f"{file}: its task's name, {name}, is also that of {file_of[name]}; name each file "
                "once, and rename one of two"
            )
        file_of[name] = file
        tasks.append(Task(name=name, questions=tuple(_questions(file))))
        if not tasks[-1].questions:
            raise TaskError(f"{file}: holds no question; write one per line, as {_EXAMPLE}")
    return tuple(tasks)


def _files(source: str) -> tuple[str, ...]:
    if source.startswith("hf:"):
        raise TaskError(
            f"{source}: tasks are not read from data sets of the hub; write questions to a .jsonl "
            f"file, one per line, as {_EXAMPLE}"
        )
    return find_given_files(source, error_type=TaskError)


def _name(file: str) -> str:
    base = file.rpartition("/")[2]
    for ending in _ENDINGS:
        if base.endswith(ending) and base != ending:
            return base.removesuffix(ending)
    raise TaskError(f"{file}: not a file of questions; name files that end in .jsonl or .jsonl.gz")


def _questions(file: str) -> Iterable[Question]:
    rows = read_json_lines(
        file, example=_EXAMPLE, max_bytes=_MAX_QUESTION_BYTES, error_type=TaskError
    )
    for where, row in rows:
        missing = [key for key in ("question", "choices", "answer") if key not in row]
        if missing:
            raise TaskError(f"{where}: no {missing[0]!r}; write each question as {_EXAMPLE}")
        choices = row["choices"]
        if not isinstance(choices, list) or len(choices) < 2:
            raise TaskError(f"{where}: 'choices' must be a list of at least two texts")
        text = _text(row["question"], f"{where}: 'question'")
        read = tuple(
            _text(choice, f"{where}: choice {n}", may_be_empty=False)
            for n, choice in enumerate(choices)
        )
        yield Question(text=text, choices=read, answer=_place(row["answer"], read, where))


def _text(value: Any, where: str, *, may_be_empty: bool = True) -> str:
    if not isinstance(value, str):
        raise TaskError(f"{where} holds {type(value).__name__}, not text; put it in quotes")
    if not may_be_empty and not value.strip():
        raise TaskError(f"{where} is empty; write what the model is to find likely or not")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TaskError(
            f"{where} is not Unicode text: its character {error.start + 1} is "
            f"{value[error.start]!a}, half of a surrogate pair; write the whole character"
        ) from None
    return value


def _place(answer: Any, choices: tuple[str, ...], where: str) -> int:
    letters = string.ascii_uppercase[: len(choices)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        place = letters.index(answer)
        if answer in choices and choices[place] != answer:
            raise TaskError(
                f"{where}: 'answer' is {answer!r}, which is the letter of choice {place} and the "
                f"text of choice {choices.index(answer)}; write the place, from 0"
            )
        return place
    is_place = isinstance(answer, int) and not isinstance(answer, bool)
    if is_place and 0 <= answer < len(choices):
        return int(answer)
    raise TaskError(
        f"{where}: 'answer' is {str(answer)[:40]!r}, but there are {len(choices)} choices; write "
        f"the right one's place, from 0 to {len(choices) - 1}, or its letter, from 'A'"
    )
