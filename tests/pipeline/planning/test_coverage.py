"""What calibration shows of a model's inputs, and when that is too little."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from pipeline.planning.coverage import (
    MIN_TOKENS_PER_INPUT,
    MIN_VOCABULARY_SHARE,
    Coverage,
    faint_warnings,
)
from tests.pipeline.tiny_runs import planned


def test_a_plan_s_windows_are_counted_against_its_table_and_its_widest_layer() -> None:
    given = planned("gptq")
    assert given.windows is not None
    found = Coverage.of(given.plan, given.windows)
    assert found is not None
    tokens = given.windows.tokens[given.windows.mask]
    assert (found.num_tokens, found.distinct_tokens) == (tokens.size, len(set(tokens.tolist())))
    tables = [x.out_features for x in given.plan.parts[0].layers if x.kind == "embedding"]
    assert [found.vocabulary_size] == tables
    widest = max(x.in_features for part in given.plan.parts[1:] for x in part.layers)
    assert found.widest_input == widest
    assert found.to_dict()["tokens_per_input"] == tokens.size / widest


def test_a_scheme_that_uses_no_correlations_needs_no_tokens_for_them() -> None:
    given = planned("float8")
    assert given.windows is not None
    few = given.windows.chosen([0])
    found = Coverage.of(given.plan, few)
    assert found is not None
    assert found.tokens_per_input is None
    assert found.text.startswith("128 tokens, ")
    assert not any("correlations" in text for text in found.warnings())
    of_gptq = Coverage.of(planned("gptq").plan, few)
    assert of_gptq is not None
    assert any("chance correlations" in text for text in of_gptq.warnings())


def test_windows_with_arrays_beside_them_are_not_read_for_it() -> None:
    given = planned("gptq")
    assert given.windows is not None
    content = given.windows.to_bytes()
    assert Coverage.read(given.plan, lambda: content) == Coverage.of(given.plan, given.windows)
    calibration = given.plan.recipe.calibration
    assert calibration is not None
    seeing = calibration.model_copy(update={"inputs": {"images": "images.npy"}})
    recipe = given.plan.recipe.model_copy(update={"calibration": seeing})
    plan = dataclasses.replace(given.plan, recipe=recipe)
    assert Coverage.read(plan, lambda: pytest.fail("they may take gigabytes")) is None


def test_padding_does_not_count() -> None:
    given = planned("gptq")
    assert given.windows is not None
    short = np.full_like(given.windows.lengths, 5)
    padded = dataclasses.replace(given.windows, lengths=short)
    found = Coverage.of(given.plan, padded)
    assert found is not None
    assert found.num_tokens == 5 * len(short)


@pytest.mark.parametrize(
    ("share", "tokens_per_input", "said"),
    [
        (MIN_VOCABULARY_SHARE, MIN_TOKENS_PER_INPUT, []),
        (
            MIN_VOCABULARY_SHARE - 0.01,
            MIN_TOKENS_PER_INPUT,
            ["shows 40 of the vocabulary's 1000 tokens, fewer than 50:"],
        ),
        (0.5, 7.9, ["7.9 tokens for each of the widest layer's 100 inputs, .* it 800 tokens"]),
        (0.0, 0.1, ["vocabulary", "tokens for each"]),
    ],
)
def test_it_warns_below_the_floors_alone(
    share: float, tokens_per_input: float, said: list[str]
) -> None:
    coverage = Coverage(
        num_tokens=round(100 * tokens_per_input),
        distinct_tokens=round(1000 * share),
        vocabulary_size=1000,
        widest_input=100,
    )
    found = list(coverage.warnings())
    assert len(found) == len(said)
    for text, wanted in zip(found, said, strict=True):
        assert re.search(wanted, text)


def test_a_vocabulary_for_many_languages_need_not_be_seen_to_a_share() -> None:
    def seen(distinct: int) -> list[str]:
        coverage = Coverage(
            num_tokens=10**6, distinct_tokens=distinct, vocabulary_size=256_000, widest_input=100
        )
        return list(coverage.warnings())

    assert not seen(10_000)
    assert "fewer than 10000" in seen(9_999)[0]


def test_the_layer_with_the_most_faint_inputs_is_named() -> None:
    assert not list(faint_warnings({}))
    assert not list(faint_warnings({"a": (10, 100)}))
    [found] = faint_warnings({"a": (11, 100), "b": (30, 100), "c": (31, 1000)})
    assert found.startswith("in 2 layers more than 10% of the inputs")
    assert "in b 30 of 100" in found
