"""What a model reads of questions, and which models cannot answer any."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import TaskError
from pipeline.evaluation.choices import Tokens
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.planning.token_windows import question_tokens
from tests.families.tiny_families import shared_family
from tests.models.tiny import MAX_SEQUENCE_LENGTH
from tests.pipeline.presets import shared_preset, stock_task


def tokens_of(folder: Path) -> Tokens:
    preset = read_preset(str(folder))
    return question_tokens(preset, build_skeleton(preset))


def test_questions_begin_as_the_model_s_own_preprocessor_begins_a_text() -> None:
    found = tokens_of(shared_preset("Llama3"))
    preprocessor = stock_task("Llama3").preprocessor
    begun = preprocessor.generate_preprocess("ab", sequence_length=8)["token_ids"]
    assert [found.start, *found.tokenize("ab")] == list(begun[: 1 + len(found.tokenize("ab"))])
    assert found.most == 2048, "where the model does not say"


def test_a_model_s_positions_limit_what_it_reads() -> None:
    assert tokens_of(shared_preset("GPT2")).most == MAX_SEQUENCE_LENGTH


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        (lambda: shared_preset("Bert"), "it predicts no tokens"),
        (lambda: shared_family("Bart"), "it answers a text with another, and does not continue"),
    ],
    ids=["encoder", "encoder-decoder"],
)
def test_a_model_that_does_not_continue_text_cannot_answer(folder, reason: str) -> None:
    with pytest.raises(TaskError, match=f"cannot answer tasks, since {reason}.*without tasks$"):
        tokens_of(folder())
