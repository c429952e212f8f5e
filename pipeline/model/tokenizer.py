"""Text to tokens: a preset's tokenizer as KerasHub builds it, and what begins its texts."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
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

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token, which together are the text.

        Where several tokens make one character, the last of them is that character.
        """
        found: list[str] = []
        known = ""
        for i in range(len(tokens)):
            text = str(self.tokenizer.detokenize(list(tokens[: i + 1])))
            pairs = enumerate(zip(known, text, strict=False))
            same = next((j for j, (a, b) in pairs if a != b), min(len(known), len(text)))
            # What more tokens turned into something else was no text yet.
            spare = len(known) - same
            for j in reversed(range(len(found))):
                kept = max(0, len(found[j]) - spare)
                spare -= len(found[j]) - kept
                found[j] = found[j][:kept]
                if not spare:
                    break
            found.append(text[same:])
            known = text
        return found

    @property
    def special_texts(self) -> dict[str, str]:
        """The special tokens as text, by their names in chat templates, such as "bos_token"."""
        names = {"start": "bos", "end": "eos"}
        found = {n: getattr(self.tokenizer, f"{n}_token", None) for n in self.special_ids}
        return {
            f"{names.get(n, n)}_token": text for n, text in found.items() if isinstance(text, str)
        }

    def id_of(self, token: str) -> int | None:
        """The id of a token that the vocabulary has under this very text, or None."""
        try:
            found = int(self.tokenizer.token_to_id(token))
            # Some tokenizers answer with the id of unknown tokens.
            return found if self.tokenizer.id_to_token(found) == token else None
        except (ValueError, KeyError):
            return None


@dataclass(frozen=True, kw_only=True)
class ConversationTokenizer:
    """Rendered conversations to token ids, where control tokens stand in the text.

    KerasHub's tokenizers take most control tokens for text, and would split them.

    Attributes:
        tokenizer: for the text between control tokens.
        control_ids: by control token.
        start, end: left out where a conversation begins or ends with them, since windows have
            their own.
    """

    tokenizer: PresetTokenizer
    control_ids: Mapping[str, int]
    start: int | None
    end: int | None

    def __call__(self, text: str) -> list[int]:
        tokens: list[int] = []
        for piece in self._pieces(text):
            tokens += [self.control_ids[piece]] if piece in self.control_ids else self._ids(piece)
        begin = 1 if tokens and tokens[0] == self.start else 0
        stop = len(tokens) - (1 if len(tokens) > begin and tokens[-1] == self.end else 0)
        return tokens[begin:stop]

    def _pieces(self, text: str) -> list[str]:
        # Longest first, since one may begin another.
        known = sorted(self.control_ids, key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, known))})", text) if known else [text]

    def _ids(self, piece: str) -> list[int]:
        return self.tokenizer(piece) if piece else []


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
            "check that all of its files are there, or choose a recipe that needs no calibration, "
            "such as int8",
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


def adds_start(preset: PresetFiles) -> bool:
    """Whether a preset's preprocessor begins each text with its start token, if it has one."""
    if "preprocessor.json" not in preset.json_files:
        return True
    config = preset.parse("preprocessor.json").get("config", {})
    return bool(config.get("add_start_token", True))


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
    remedy = "install what it needs, or choose a recipe that needs no calibration, such as int8"
    with keras_errors(f"{name}: {found.__name__} cannot be built", remedy):
        preprocessor = found(tokenizer=tokenizer.tokenizer)
        preprocessor.build(None)
    starts = preprocessor.encoder_packer.start_value
    start = starts[0] if starts and getattr(preprocessor, "add_start_token", True) else None
    return start, tuple(preprocessor.decoder_packer.start_value or ())
