"""A preset's own tokenizer, as KerasHub reads it, from wherever the preset is stored."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras_hub

from pipeline.errors import SourceError
from pipeline.source.preset import PresetFiles
from pipeline.source.trusted import check_trusted

_SPECIAL = ("start", "end", "pad", "unk", "cls", "sep", "mask")


@dataclass(frozen=True, kw_only=True)
class PresetTokenizer:
    """Text to token ids: `tokenizer("some text")`.

    Attributes:
        tokenizer: the `keras_hub.tokenizers.Tokenizer`.
        vocabulary_size: ids are below it.
        special_ids: ids that mark rather than say: start, end, pad, unk, cls, sep, mask; those
            that the tokenizer has.
    """

    tokenizer: Any
    vocabulary_size: int
    special_ids: Mapping[str, int]

    def __call__(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text)]


def preset_tokenizer(preset: PresetFiles) -> PresetTokenizer:
    """Build a preset's tokenizer from its JSON and vocabularies.

    Raises:
        SourceError: the preset has none, or it does not build.
    """
    if preset.kind == "keras":
        check_trusted(preset.parse("tokenizer.json"), f"{preset.url}/tokenizer.json")
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        # KerasHub reads vocabularies from local files only.
        preset.copy_small_files(Path(folder))
        try:
            tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(folder)
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            reason = str(error).strip().partition("\n")[0].replace(folder, preset.url)
            raise SourceError(
                f"{preset.url}: its tokenizer cannot be built ({type(error).__name__}: {reason}); "
                "are all of its files there?"
            ) from error
    return PresetTokenizer(
        tokenizer=tokenizer,
        vocabulary_size=int(tokenizer.vocabulary_size()),
        special_ids={
            name: int(token)
            for name in _SPECIAL
            if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None
        },
    )
