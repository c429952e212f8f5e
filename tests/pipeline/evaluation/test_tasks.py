"""Questions are read whole, and every mistake in them is named by its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import TaskError
from pipeline.evaluation.tasks import Question, read_tasks

GOOD = {"question": "Rain falls from", "choices": ["clouds", "stones"], "answer": 0}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def test_questions_are_read_in_order_with_places_or_letters(tmp_path: Path) -> None:
    lettered = {"id": 7, "question": "", "choices": ["B", "C", "A"], "answer": "C"}
    plain = {"question": "Two?", "choices": ["a", "b"], "answer": "B"}
    source = write(tmp_path / "common.jsonl", GOOD, {**lettered, "answer": 2}, plain)
    [task] = read_tasks([source])
    assert task.name == "common"
    assert task.questions == (
        Question(text="Rain falls from", choices=("clouds", "stones"), answer=0),
        Question(text="", choices=("B", "C", "A"), answer=2),
        Question(text="Two?", choices=("a", "b"), answer=1),
    )


def test_what_else_a_line_holds_does_not_change_a_task(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", GOOD)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n" + json.dumps({"name": "q1", **GOOD}) + "\n\n")
    first, second = read_tasks([plain, str(tmp_path / "b*")])
    assert (first.name, second.name) == ("a", "b")
    assert first.sha256 == second.sha256
    other = write(tmp_path / "c.jsonl", {**GOOD, "answer": 1})
    assert read_tasks([other])[0].sha256 != first.sha256


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?", "choices": ["a", "b"]}, "no 'answer'; write each question as"),
        ({"choices": ["a", "b"], "answer": 0}, "no 'question'"),
        ({**GOOD, "choices": ["a"]}, "'choices' must be a list of at least two texts"),
        ({**GOOD, "choices": "ab"}, "'choices' must be a list of at least two texts"),
        ({**GOOD, "choices": ["a", 3]}, "choice 1 holds int, not text"),
        ({**GOOD, "choices": ["a", " "]}, "choice 1 is empty"),
        ({**GOOD, "question": None}, "'question' holds NoneType, not text"),
        ({**GOOD, "question": "\ud800"}, "'question' is not Unicode text"),
        ({**GOOD, "answer": 2}, "'answer' is '2', but there are 2 choices; write the right one"),
        ({**GOOD, "answer": -1}, "from 0 to 1"),
        ({**GOOD, "answer": True}, "'answer' is 'True'"),
        ({**GOOD, "answer": "C"}, "'answer' is 'C', but there are 2 choices"),
        ({**GOOD, "answer": "clouds"}, "or its letter, from 'A'"),
        ({**GOOD, "choices": ["B", "A"], "answer": "A"}, "the letter of choice 0 and the text of"),
        ("clouds", "holds str, not an object such as"),
    ],
)
def test_a_mistake_is_named_by_its_line(row: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=said) as refused:
        read_tasks([write(tmp_path / "some.jsonl", GOOD, row)])
    assert str(refused.value).startswith(f"{tmp_path}/some.jsonl:2: ")
    assert "\n" not in str(refused.value)


def test_files_that_are_no_tasks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "page.txt").write_text("text")
    (tmp_path / "deep").mkdir()
    same = [write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "deep" / "a.jsonl", GOOD)]
    for sources, said in (
        ([str(tmp_path / "empty.jsonl")], "holds no question"),
        ([str(tmp_path / "page.txt")], "name files that end in .jsonl"),
        ([str(tmp_path / "none.jsonl")], "no such file"),
        (["hf:allenai/ai2_arc"], "tasks are not read from data sets of the hub"),
        (same, "its task's name, a, is also that of .*; name each file once"),
    ):
        with pytest.raises(TaskError, match=said):
            read_tasks(sources)
