"""Tokenizers of about 300 tokens that can spell any text, one per KerasHub architecture."""

from __future__ import annotations

import functools
import io
import string
from collections.abc import Callable
from typing import Any

import keras_hub
import sentencepiece
from tokenizers import pre_tokenizers

_MERGES = ("Ġ t", "h e", "i n", "Ġ a", "Ġt he", "r e", "o n", "Ġ s", "e r", "n d", "Ġa nd", "in g")
_WORDS = ("the", "and", "of", "to", "is", "in", "##ing", "##ed", "##er", "##s")
_SENTENCES = (
    "the quick brown fox jumps over the lazy dog and the dog sleeps in the sun",
    "pack my box with five dozen liquor jugs and then send it to the other side of the river",
    string.ascii_lowercase,
    string.ascii_uppercase,
    string.digits,
)


def _byte_pairs(name: str, *special_tokens: str) -> Callable[[], Any]:
    """Byte-level BPE: the special tokens, the 256 bytes, and a few merges."""

    def build() -> Any:
        merged = [merge.replace(" ", "") for merge in _MERGES]
        tokens = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet()), *merged]
        return getattr(keras_hub.models, name)(
            vocabulary={token: index for index, token in enumerate(tokens)},
            merges=list(_MERGES),
            unsplittable_tokens=list(special_tokens),  # the default has a set's order
            name="tokenizer",
        )

    return build


def _sentence_pieces(
    name: str, symbols: dict[str, str], special: tuple[str, ...] = (), **options: Any
) -> Callable[[], Any]:
    """SentencePiece BPE with byte fallback.

    Args:
        symbols: the pieces of bos, eos and maybe pad.
        special: further pieces that are kept whole.
    """

    def build() -> Any:
        proto = _train_sentence_pieces(tuple(symbols.items()), special)
        return getattr(keras_hub.models, name)(proto=proto, name="tokenizer", **options)

    return build


@functools.cache
def _train_sentence_pieces(symbols: tuple[tuple[str, str], ...], special: tuple[str, ...]) -> bytes:
    options: dict[str, Any] = {"unk_id": len(symbols), "pad_id": -1}
    if special:
        options["user_defined_symbols"] = list(special)
    for index, (kind, piece) in enumerate(symbols):
        options |= {f"{kind}_id": index, f"{kind}_piece": piece}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def _word_pieces() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits
    continued = [f"##{letter}" for letter in letters]
    return keras_hub.models.BertTokenizer(
        vocabulary=[*special, *letters, *string.punctuation, *continued, *_WORDS],
        lowercase=True,
        name="tokenizer",
    )


_GEMMA = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>"}
_LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "Bart": _byte_pairs("BartTokenizer", "<s>", "<pad>", "</s>"),
    "Bert": _word_pieces,
    "Bloom": _byte_pairs("BloomTokenizer", "<unk>", "<s>", "</s>", "<pad>"),
    "Falcon": _byte_pairs("FalconTokenizer", "<|endoftext|>"),
    "GPT2": _byte_pairs("GPT2Tokenizer", "<|endoftext|>"),
    "GPTNeoX": _byte_pairs("GPTNeoXTokenizer", "<|endoftext|>"),
    "Gemma": _sentence_pieces("GemmaTokenizer", _GEMMA),
    "Gemma3": _sentence_pieces("Gemma3Tokenizer", _GEMMA, has_vision_tokens=False),
    "Gemma3Vision": _sentence_pieces(
        "Gemma3Tokenizer",
        _GEMMA,
        special=("<start_of_image>", "<img>", "<end_of_image>"),
        has_vision_tokens=True,
    ),
    "Llama3": _byte_pairs("Llama3Tokenizer", *_LLAMA3),
    "Mistral": _sentence_pieces("MistralTokenizer", {"bos": "<s>", "eos": "</s>"}),
    "OPT": _byte_pairs("OPTTokenizer", "<s>", "<pad>", "</s>"),
    "PaliGemma": _sentence_pieces("PaliGemmaTokenizer", _GEMMA),
    "Phi3": _sentence_pieces("Phi3Tokenizer", {"bos": "<s>", "eos": "<|endoftext|>"}),
    "Qwen3": _byte_pairs("Qwen3Tokenizer", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}
