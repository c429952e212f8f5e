"""Calibration input for one preset: its texts as token windows, and the arrays beside them."""

from __future__ import annotations

import numpy as np

from pipeline.calibration.arrays import read_arrays
from pipeline.calibration.chat import ChatTemplate
from pipeline.calibration.texts import read_each, read_texts
from pipeline.calibration.windows import (
    CALIBRATION_WINDOWS,
    TextStream,
    Tokenize,
    TokenWindows,
    WindowNames,
    make_windows,
)
from pipeline.errors import RecipeError, TaskError
from pipeline.evaluation.choices import Tokens
from pipeline.model.chat_template import find_chat_template
from pipeline.model.inputs import InputLayout, input_layout
from pipeline.model.preset import PresetFiles
from pipeline.model.skeleton import Skeleton
from pipeline.model.tokenizer import (
    ConversationTokenizer,
    adds_start,
    decoder_packing,
    preset_tokenizer,
)
from pipeline.recipe.recipe import Calibration

_MOST_WHERE_UNKNOWN = 2048
"""Tokens of a question, for models without a limit of their own; as lm-evaluation-harness has."""


def token_windows(
    preset: PresetFiles,
    skeleton: Skeleton,
    calibration: Calibration,
    names: WindowNames = CALIBRATION_WINDOWS,
) -> TokenWindows:
    """Tokenize texts as the preset does, with its special tokens, and cut them into windows.

    Args:
        names: of what the user may change, for messages.

    Raises:
        PipelineError: no tokenizer, texts that are missing, unreadable or too few, or inputs that
            neither texts nor arrays determine.
    """
    layout = input_layout(skeleton)
    # Before anything is read.
    layout.check(calibration.inputs)
    inputs = read_arrays(calibration.inputs, layout.inputs, num_samples=calibration.num_samples)
    if not layout.takes_text:
        return TokenWindows(
            tokens=np.zeros((calibration.num_samples, 0), np.int32),
            lengths=np.zeros(calibration.num_samples, np.int32),
            fingerprint="",
            num_documents=0,
            inputs=inputs,
        )
    if not calibration.texts:
        raise RecipeError(f"{preset.url}: the model takes text; add calibration: {{texts: [...]}}")
    _check_length(preset, skeleton, layout, calibration.sequence_length)
    tokenizer = preset_tokenizer(preset)
    template = find_chat_template(preset, tokenizer.special_texts) if calibration.chat else None
    streams = _streams(calibration, template)
    special = tokenizer.special_ids
    start = special.get("start", special.get("cls"))
    decoder_start: tuple[int, ...] = ()
    if layout.takes_two_texts:
        start, decoder_start = decoder_packing(tokenizer, type(skeleton.backbone))
    start = start if adds_start(preset) else None
    end = special.get("end", special.get("sep"))
    tokenize: Tokenize = tokenizer
    if template is not None:
        found = {token: tokenizer.id_of(token) for token in template.control_tokens}
        control_ids = {token: number for token, number in found.items() if number is not None}
        tokenize = ConversationTokenizer(
            tokenizer=tokenizer, control_ids=control_ids, start=start, end=end
        )
    return make_windows(
        streams,
        tokenize,
        calibration,
        start_token=start,
        end_token=end,
        pad_token=special.get("pad", 0),
        vocabulary_size=getattr(skeleton.backbone, "vocabulary_size", None),
        decoder_start=decoder_start,
        inputs=inputs,
        names=names,
    )


def blank_windows(
    preset: PresetFiles, skeleton: Skeleton, calibration: Calibration
) -> TokenWindows:
    """Windows of the shapes that texts would give, without a text: to plan what a run would cost.

    Models that take two texts, or arrays, get their own, whose shapes nothing else tells.

    Raises:
        PipelineError: as `token_windows`, but of texts.
    """
    layout = input_layout(skeleton)
    if calibration.inputs or layout.takes_two_texts or not layout.takes_text:
        return token_windows(preset, skeleton, calibration)
    layout.check(calibration.inputs)
    _check_length(preset, skeleton, layout, calibration.sequence_length)
    num_samples, length = calibration.num_samples, calibration.sequence_length
    return TokenWindows(
        tokens=np.zeros((num_samples, length), np.int32),
        lengths=np.full(num_samples, length, np.int32),
        fingerprint="",
        num_documents=0,
    )


def _streams(calibration: Calibration, template: ChatTemplate | None) -> list[TextStream]:
    weighted = calibration.weighted_texts
    if not weighted:
        return [TextStream.of_all(read_texts(calibration, template), calibration)]
    each = zip(weighted, calibration.window_shares, read_each(calibration, template), strict=True)
    return [
        TextStream(documents=documents, num_windows=share, source=text)
        for text, share, documents in each
    ]


def question_tokens(preset: PresetFiles, skeleton: Skeleton) -> Tokens:
    """How a model reads questions; as its own preprocessor begins a text.

    Raises:
        TaskError: it continues no text, or takes more than text.
    """
    layout = input_layout(skeleton)
    reason = ""
    if not skeleton.predicts_tokens:
        reason = "it predicts no tokens"
    elif layout.takes_two_texts:
        reason = "it answers a text with another, and does not continue it"
    elif missing := layout.missing(()):
        reason = f"it takes {missing[0]!r} besides text" if not layout.encoders else ""
    if reason:
        raise TaskError(
            f"{preset.url}: the model cannot answer tasks, since {reason}; evaluate it on texts "
            "alone, without tasks"
        )
    tokenizer = preset_tokenizer(preset)
    special = tokenizer.special_ids
    start = special.get("start", special.get("cls"))
    size = getattr(skeleton.backbone, "vocabulary_size", None) or tokenizer.vocabulary_size
    return Tokens(
        tokenize=tokenizer,
        start=start if adds_start(preset) else None,
        instead=special.get("start", special.get("end")),
        most=most_tokens(skeleton) or _MOST_WHERE_UNKNOWN,
        vocabulary_size=size,
    )


def most_tokens(skeleton: Skeleton) -> int | None:
    """The number of positions that a model has for a text; None if it sets no limit."""
    names = ("max_sequence_length", "max_decoder_sequence_length")
    found = (getattr(skeleton.backbone, name, None) for name in names)
    return next((most for most in found if isinstance(most, int)), None)


def _check_length(
    preset: PresetFiles, skeleton: Skeleton, layout: InputLayout, sequence_length: int
) -> None:
    most = most_tokens(skeleton)
    if most is None:
        return
    if layout.takes_two_texts:
        # The encoder's half of a window may be longer than the decoder's by two tokens.
        fits, what = 2 * (most - 2), "each half of a window of"
    else:
        fits, what = most, "a window's"
    if sequence_length > fits:
        raise RecipeError(
            f"{preset.url}: the model has {most} positions, fewer than {what} {sequence_length} "
            f"tokens; set sequence_length to at most {fits}"
        )
