"""What a model takes for a window: text in halves, arrays as given, and no image for text alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.calibration.arrays import ExpectedInput
from pipeline.calibration.windows import TokenWindows
from pipeline.errors import SourceError
from pipeline.model.inputs import InputLayout, input_layout, split
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from tests.families.tiny_families import shared_family

TOKENS = ExpectedInput(shape=(None,), dtype="int32")
TWO_TEXTS = InputLayout(
    inputs={
        f"{half}_{name}": TOKENS
        for half in ("encoder", "decoder")
        for name in ("token_ids", "padding_mask")
    }
)


def windows(lengths: list[int], size: int, **more: Any) -> TokenWindows:
    tokens = np.arange(1, 1 + len(lengths) * size, dtype=np.int32).reshape(-1, size)
    mask = np.arange(size) < np.array(lengths)[:, None]
    return TokenWindows(
        tokens=np.where(mask, tokens, 0).astype(np.int32),
        lengths=np.array(lengths, np.int32),
        fingerprint="",
        num_documents=0,
        **more,
    )


def test_the_decoder_is_teacher_forced_on_the_second_half() -> None:
    found = TWO_TEXTS.batch(windows([8, 5], 8, decoder_start=(99,)), slice(None), 2)
    assert found.arrays["encoder_token_ids"].tolist() == [[1, 2, 3, 4, 5], [9, 10, 11, 0, 0]]
    assert found.arrays["encoder_padding_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    # It predicts 6, 7 and 8, and is given all but the last.
    assert found.arrays["decoder_token_ids"].tolist() == [[99, 6, 7], [99, 12, 0]]
    assert found.arrays["decoder_padding_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("num_start", [1, 2])
@pytest.mark.parametrize("size", range(4, 20))
def test_the_encoder_always_has_more_positions_and_no_token_is_lost(
    size: int, num_start: int
) -> None:
    given = windows([size, size - 1, 1], size)
    start = [99] * num_start
    (encoder, encoder_mask), (decoder, decoder_mask) = split(given.tokens, given.mask, start)
    assert encoder.shape[1] > decoder.shape[1]
    for row, (text, mask) in enumerate(zip(given.tokens, given.mask, strict=True)):
        read = encoder[row][encoder_mask[row]].tolist()
        forced = decoder[row][decoder_mask[row]].tolist()
        assert read + forced[num_start:] == text[mask].tolist()[: -1 if forced else None]
        assert forced[:num_start] == (start if forced else [])


def test_vectors_of_padding_are_told_by_the_positions_of_either_text() -> None:
    found = TWO_TEXTS.batch(windows([8, 5], 8, decoder_start=(99,)), slice(None), 3)
    assert found.rows((3, 5)).sum(axis=1).tolist() == [5, 3, 0]
    assert found.rows((3, 3)).sum(axis=1).tolist() == [3, 2, 0]
    # Features of a sound have no padding, but a window that fills a batch up has no content.
    assert found.rows((3, 7)).sum(axis=1).tolist() == [7, 7, 0]
    assert found.rows((3,)).tolist() == [True, True, False]
    with pytest.raises(SourceError, match="not known which belong to the 3 windows' padding"):
        found.rows((3, 5, 2))


@pytest.mark.parametrize("given", [False, True])
def test_images_before_the_text_count_where_there_are_any(given: bool) -> None:
    layout = InputLayout(
        inputs={
            "token_ids": TOKENS,
            "images": ExpectedInput(shape=(2, 2, 3), dtype="float32"),
        },
        encoders=True,
    )
    inputs = {"images": np.ones((2, 2, 2, 3), np.float32)} if given else {}
    found = layout.batch(windows([4, 2], 4, inputs=inputs), slice(None), 3)
    assert found.arrays["images"].max() == given
    before = [3 * given, 3 * given, 0]
    assert (found.rows((3, 7)).sum(axis=1) - before).tolist() == [4, 2, 0]
    assert found.rows((3, 7))[0, -4:].all()


def test_text_alone_has_no_images_where_their_number_is_free() -> None:
    layout = input_layout(build_skeleton(read_preset(str(shared_family("Gemma4 with vision")))))
    arrays = layout.batch(windows([6], 6), slice(None), 1).arrays
    shapes = {name: array.shape for name, array in arrays.items()}
    assert shapes["pixel_values"] == (1, 0, 1, 3 * 4 * 4)
    assert shapes["pixel_position_ids"] == (1, 0, 1, 2)
    assert shapes["vision_indices"] == (1, 0)
    assert shapes["vision_mask"] == (1, 6)
    assert not arrays["vision_mask"].any()
    assert arrays["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_an_input_that_nothing_determines_is_named_with_the_option() -> None:
    layout = input_layout(build_skeleton(read_preset(str(shared_family("Whisper")))))
    with pytest.raises(SourceError) as refused:
        layout.check([])
    assert "an input 'encoder_features' that text does not determine" in str(refused.value)
    assert "{inputs: {encoder_features: URL.npy}}" in str(refused.value)
    assert "[samples, any, 80]" in str(refused.value)
    layout.check(["encoder_features"])


def test_a_sound_is_read_whole_and_its_text_goes_to_the_decoder() -> None:
    layout = input_layout(build_skeleton(read_preset(str(shared_family("Whisper")))))
    sounds = np.random.default_rng(0).normal(size=(2, 16, 80)).astype(np.float32)
    given = windows([4, 3], 4, inputs={"encoder_features": sounds})
    found = layout.batch(given, slice(1, 2), 2)
    assert np.array_equal(found.arrays["encoder_features"][0], sounds[1])
    assert not found.arrays["encoder_features"][1].any()
    assert found.arrays["decoder_token_ids"].tolist() == [given.tokens[1].tolist(), [0] * 4]
    assert found.arrays["decoder_padding_mask"].tolist() == [[1, 1, 1, 0], [0] * 4]


def test_windows_keep_what_stands_beside_the_text() -> None:
    sounds = np.ones((2, 3, 80), np.float32)
    plain = windows([4, 3], 4)
    full = windows([4, 3], 4, decoder_start=(2, 0), inputs={"encoder_features": sounds})
    again = TokenWindows.from_bytes(full.to_bytes())
    assert again.decoder_start == (2, 0)
    assert np.array_equal(again.inputs["encoder_features"], sounds)
    assert full.digest != plain.digest
    assert b"inputs" not in plain.to_bytes()
