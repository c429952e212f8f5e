"""Text to model inputs: a preset's tokenizer as KerasHub builds it, and the arrays for a window."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.model.huggingface import tokenizer_class
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


def text_inputs(tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """Every input that text alone determines, by KerasHub's names, each [batch, sequence].

    Args:
        tokens: [batch, sequence].
        mask: [batch, sequence]: True where a token is text.
    """
    positions = np.arange(tokens.shape[1], dtype=np.int32)
    return {
        "token_ids": tokens,
        "padding_mask": mask.astype(np.int32),
        "segment_ids": np.zeros_like(tokens),
        "position_ids": np.broadcast_to(positions, tokens.shape),
        # A masked language model predicts at these positions: everywhere.
        "mask_positions": np.broadcast_to(positions, tokens.shape),
    }


def model_inputs(model: keras.Model, tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> Any:
    """A model's inputs for tokens as in `text_inputs`, in the structure that the model takes.

    Raises:
        SourceError: the model has an input that text alone does not determine.
    """
    given = text_inputs(tokens, mask)
    names = [tensor.name for tensor in model.inputs]
    unknown = sorted(set(names) - set(given))
    if unknown:
        raise SourceError(
            f"{model.name}: the model has an input {unknown[0]!r}; only text-only models can be "
            "calibrated; choose a recipe that needs no calibration, such as int8"
        )
    arrays = {t.name: given[t.name].astype(t.dtype) for t in model.inputs}
    struct = model._inputs_struct
    return {n: arrays[n] for n in struct} if isinstance(struct, dict) else list(arrays.values())
