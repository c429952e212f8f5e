"""The tokenizer of a KerasHub preset as transformers reads it.

Byte-level BPE is written as KerasHub itself runs it, by the package `tokenizers`: a text gets the
tokens that it got in calibration, even where a published tokenizer splits it otherwise. Files of
SentencePiece are left out: transformers 5 reads them by rules of its own for each family, and
splits texts otherwise than the file says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.model.preset import PresetFiles
from pipeline.model.tokenizer import PresetTokenizer, adds_start, preset_tokenizer

_MERGES = "assets/tokenizer/merges.txt"


@dataclass(frozen=True, kw_only=True)
class CheckpointTokenizer:
    """A tokenizer for a checkpoint.

    Attributes:
        files: by name; none if the preset has no tokenizer of a kind known here.
        ids: of the tokens that begin and end a text, by their names in config.json.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)


def checkpoint_tokenizer(preset: PresetFiles) -> CheckpointTokenizer:
    """Write a KerasHub preset's tokenizer for transformers.

    Raises:
        SourceError: it cannot be built.
    """
    if _MERGES not in preset.assets:
        return CheckpointTokenizer()
    found = preset_tokenizer(preset)
    files = _byte_pairs(found, adds_start(preset))
    names = {"start": "bos_token_id", "end": "eos_token_id"}
    ids = {names[ours]: number for ours, number in found.special_ids.items() if ours in names}
    return CheckpointTokenizer(files=files, ids=ids)


def _byte_pairs(found: PresetTokenizer, begins_with_start: bool) -> dict[str, bytes]:
    tokenizer = found.tokenizer
    # Keras builds it at its first use.
    tokenizer._maybe_initialized_tokenizers()
    written = json.loads(tokenizer._tokenizer.to_str())
    start = found.special_texts.get("bos_token")
    if begins_with_start and start is not None:
        written["post_processor"] = _starting_with(start, found.special_ids["start"])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **found.special_texts,
    }
    return {"tokenizer.json": _json(written), "tokenizer_config.json": _json(config)}


def _starting_with(token: str, token_id: int) -> dict[str, Any]:
    """What puts a token before a text, as the package `tokenizers` stores it."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, first, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=1).encode()
