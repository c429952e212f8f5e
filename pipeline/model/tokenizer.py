"""Text to tokens: a preset's tokenizer as KerasHub builds it, and what begins its texts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras_hub

from pipeline.errors import SourceError
from pipeline.model.huggingface import kerashub_subclass, tokenizer_class
from pipeline.model.preset import PresetFiles, keras_errors
from pipeline.model.skeleton import check_trusted

_SPECIAL = ("start", "end", "pad", "unk", "cls", "sep", "mask")


@dataclass(frozen=True, kw_only=True)
class PresetTokenizer:
    """Text to token ids: `tokenizer("some text")`."""

    tokenizer: Any
    """The `keras_hub.tokenizers.Tokenizer`."""
    vocabulary_size: int
    """Exclusive upper bound of the ids."""
    special_ids: Mapping[str, int]
    """Those that the tokenizer has of start, end, pad, unk, cls, sep and mask."""

    def __call__(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text)]


def preset_tokenizer(preset: PresetFiles) -> PresetTokenizer:
    """Build a preset's tokenizer from its JSON and vocabularies.

    Raises:
        SourceError: the preset has none, or it cannot be built.
    """
    tokenizer_type: Any = keras_hub.tokenizers.Tokenizer
    if preset.format == "keras":
        check_trusted(preset.parse("tokenizer.json"), f"{preset.url}/tokenizer.json")
    else:
        tokenizer_type = tokenizer_class(preset)
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        # KerasHub reads vocabularies from local files only.
        preset.copy_small_files(Path(folder))
        with keras_errors(
            f"{preset.url}: its tokenizer cannot be built",
            "check that all of its files are there",
            {folder: preset.url},
        ):
            tokenizer = tokenizer_type.from_preset(folder)
    return PresetTokenizer(
        tokenizer=tokenizer,
        vocabulary_size=int(tokenizer.vocabulary_size()),
        special_ids={
            name: int(token)
            for name in _SPECIAL
            if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None
        },
    )


def decoder_packing(
    tokenizer: PresetTokenizer, backbone_class: type
) -> tuple[int | None, tuple[int, ...]]:
    """What KerasHub's preprocessor puts before an encoder's text, and before its decoder's.

    Raises:
        SourceError: KerasHub has none, or it cannot be built.
    """
    found = kerashub_subclass(keras_hub.models.Seq2SeqLMPreprocessor, backbone_class)
    name = backbone_class.__name__
    if found is None:
        raise SourceError(
            f"{name}: KerasHub has no preprocessor that says what its decoder begins with, so it "
            "cannot be calibrated on texts; choose a recipe that needs no calibration, such as int8"
        )
    with keras_errors(f"{name}: {found.__name__} cannot be built", "check the tokenizer's files"):
        preprocessor = found(tokenizer=tokenizer.tokenizer)
        preprocessor.build(None)
    starts = preprocessor.encoder_packer.start_value
    start = starts[0] if starts and getattr(preprocessor, "add_start_token", True) else None
    return start, tuple(preprocessor.decoder_packer.start_value or ())
