"""Choices become tokens as lm-evaluation-harness makes them."""

from __future__ import annotations

import pytest

from pipeline.errors import TaskError
from pipeline.evaluation.choices import TaskRows, Tokens, task_rows
from pipeline.evaluation.tasks import Question, Task

START = 0


def words(text: str) -> list[int]:
    """A token for each letter, and one for a space with the letter after it."""
    tokens, place = [], 0
    while place < len(text):
        step = 2 if text[place] == " " and place + 1 < len(text) and text[place + 1] != " " else 1
        tokens.append(ord(text[place + step - 1]) + (200 if step == 2 else 0))
        place += step
    return tokens


def rows(question: str, *choices: str, **options: int | None) -> TaskRows:
    given = {"start": START, "instead": START, "most": 100, "vocabulary_size": 500, **options}
    task = Task(
        name="t", questions=(Question(text=question, choices=choices or ("x", "y"), answer=0),)
    )
    return task_rows(task, Tokens(tokenize=words, **given))  # type: ignore[arg-type]


def spelled(found: TaskRows, row: int = 0) -> tuple[str, str]:
    """A row's tokens before the choice, and the choice's; _ is a space with the next letter."""
    text = [
        "^" if t == START else chr(t) if t < 200 else f"_{chr(t - 200)}" for t in found.rows[row]
    ]
    first = len(text) - found.scored[row]
    return "".join(text[:first]), "".join(text[first:])


def test_a_space_stands_before_a_choice_and_belongs_to_it() -> None:
    assert spelled(rows("ab", "cd", "e")) == ("^ab", "_cd")
    assert spelled(rows("ab", "cd", "e"), 1) == ("^ab", "_e")


def test_spaces_at_a_question_s_end_go_to_the_choice() -> None:
    assert spelled(rows("a b ", "c", "d")) == ("^a_b", " _c")
    assert spelled(rows("ab\n", "c", "d")) == ("^ab", "\n_c")


def test_no_start_is_put_where_the_model_puts_none() -> None:
    assert spelled(rows("ab", start=None)) == ("ab", "_x")


def test_a_choice_that_nothing_precedes_follows_the_start_or_the_end_of_a_text() -> None:
    assert spelled(rows("", "cd", "e")) == ("^", "_cd")
    assert spelled(rows("", "cd", "e", start=None, instead=START)) == ("^", "_cd")
    with pytest.raises(TaskError, match="nothing precedes it, and the model's tokenizer has no"):
        rows("", start=None, instead=None)


def test_what_is_too_long_is_cut_on_the_left_and_counted() -> None:
    found = rows("abcdef", "gh", "i", most=4)
    # Four tokens are read, and the last one of five is only predicted.
    assert spelled(found) == ("def", "_gh")
    assert spelled(found, 1) == ("cdef", "_i")
    assert found.truncated == 2
    assert rows("abcdef", "gh", "i").truncated == 0
    with pytest.raises(TaskError, match="task t, question 1, choice 0: 5 tokens, more than the 4"):
        rows("ab", "cdefg", "h", most=4)


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(TaskError, match="token 320 is not between 0 and 309"):
        rows("ab", vocabulary_size=310)


def test_a_choice_without_a_token_of_its_own_is_refused() -> None:
    task = Task(name="t", questions=(Question(text="ab", choices=("c", "d"), answer=0),))
    joined = Tokens(
        tokenize=lambda text: [1], start=START, instead=START, most=9, vocabulary_size=9
    )
    with pytest.raises(TaskError, match="makes no token of it beyond those of the question"):
        task_rows(task, joined)
