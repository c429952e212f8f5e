"""What of --evaluate-on is a set's name, and what is refused."""

from __future__ import annotations

import pytest

from pipeline.errors import CalibrationTextError
from pipeline.evaluation.named_texts import EvaluatedTexts, parse_texts, unknown_name


def test_a_name_stands_before_the_first_equals_sign_of_no_url_or_path() -> None:
    plain = (
        "texts.jsonl",
        "hf:allenai/c4/en?split=train",
        "s3://bucket/date=2024/*.jsonl",
        "./date=2024/x.txt",
        "/data/a=b.txt",
    )
    assert parse_texts(plain) == EvaluatedTexts(texts=plain)
    named = parse_texts(["a.txt", "novels=hf:some/novels?split=test", "code=b=c.txt"])
    assert named.texts == ("a.txt",)
    assert named.sets == {"novels": ("hf:some/novels?split=test",), "code": ("b=c.txt",)}
    assert list(named.by_name) == ["", "code", "novels"]
    assert parse_texts(named.arguments) == named
    assert not parse_texts([])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["Novels=a.txt"], "Novels=a.txt: a set of texts is NAME=URL.*write ./Novels=a.txt"),
        (["=a.txt"], "a set of texts is NAME=URL"),
        (["novels="], "a set of texts is NAME=URL"),
        (["a.txt", " "], "a text to evaluate on is empty; give a URL, or NAME=URL"),
        (["novels=a.txt", "novels=b.txt"], "novels is a.txt already; give each set a name"),
    ],
)
def test_a_bad_name_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(CalibrationTextError, match=message):
        parse_texts(given)


def test_a_name_that_is_near_is_suggested() -> None:
    assert "did you mean novels? the named sets are code, novels" in unknown_name(
        "novel", {"novels", "code"}
    )
    assert "the named sets are none" in unknown_name("novel", set())
