"""Tensors of a Hugging Face model that KerasHub's converter does not read.

A converter takes what it knows and drops the rest in silence: biases that its backbone lacks, a
classifier, layers beyond those that the config counts. Only what changes no answer of the backbone
may be dropped, and that is listed here with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import keras_hub
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.model.preset import CONFIG_FILE, PresetFiles
from pipeline.model.skeleton import Skeleton

_HARMLESS = {
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)": "computed from the config",
    r"(attn|attention)\.(masked_bias|bias)": "a causal mask that old versions stored (see below)",
    r"embeddings\.(position_ids|token_type_ids)": "the numbers 0, 1, 2, … or zeros",
    r"pooler\.dense\.(weight|bias)": "feeds classifiers only; embeddings are pooled without it",
    r"mtp\..+": "predicts further tokens for speculative decoding",
}
# Of encoders: what they are put on is what is quantized.
_HEADS = {
    r"cls\.(predictions|seq_relationship)\..+": "the head of BERT's pretraining",
    r"(predictions|sop_classifier)\..+": "the heads of ALBERT's pretraining",
    r"vocab_(transform|layer_norm|projector)\..+": "the head of DistilBERT's pretraining",
    r"lm_head\.(bias|(dense|layer_norm|decoder)\..+)": "the head of RoBERTa's pretraining",
    r"contact_head\..+": "the head of ESM that predicts contacts",
}
_MASK = re.compile(r"(.*\.)?(attn|attention)\.bias")
# The head, and the tables of encoder and decoder where they share one.
_TIED_HEAD = r"(lm_head|embed_out|(encoder|decoder)\.embed_tokens)\.weight"
_CLASSIFIER = re.compile(r"(pre_)?classifier\..+")
# Zeros that are added change nothing; old checkpoints of RoBERTa have them, for example.
_ADDED = re.compile(r"(.*\.)?((final_logits_)?bias|token_type_embeddings\.weight)")
_MAX_ADDED_WEIGHTS = 1 << 20


def check_unused(
    preset: PresetFiles,
    skeleton: Skeleton,
    unused: Mapping[str, tuple[int, ...]],
    read: Callable[[str], NDArray[np.generic]],
) -> None:
    """Check that nothing is lost with the tensors that the converter does not read.

    Args:
        unused: their shapes by name.
        read: returns a tensor's value.

    Raises:
        SourceError: a tensor that decides the model's answers.
    """
    patterns = [*_HARMLESS]
    if not skeleton.predicts_tokens:
        patterns += _HEADS
    # Transformers itself ignores the head of a tied model, and ties unless the config says no.
    tied = preset.parse(CONFIG_FILE).get("tie_word_embeddings") is not False
    if tied or isinstance(skeleton.task, keras_hub.models.TextEmbedder):
        patterns.append(_TIED_HEAD)
    harmless = re.compile(rf"(.*\.)?({'|'.join(patterns)})")
    lost = [name for name, shape in unused.items() if not _is_harmless(name, shape, harmless, read)]
    if lost:
        shown = ", ".join(f"{name} {list(unused[name])}" for name in lost[:3])
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        remedy = "such a model cannot be quantized"
        if all(_CLASSIFIER.fullmatch(name) for name in lost):
            remedy = (
                "save it as a KerasHub preset with its head (docs/reference.md, Classifiers), and "
                "quantize that"
            )
        raise SourceError(
            f"{preset.url}: KerasHub's model has no place for {shown}{more}, and would answer "
            f"differently without; {remedy} (if only the rest is wanted, remove them from the "
            "safetensors files)"
        )


def _is_harmless(
    name: str,
    shape: tuple[int, ...],
    harmless: re.Pattern[str],
    read: Callable[[str], NDArray[np.generic]],
) -> bool:
    if _MASK.fullmatch(name) and len(shape) == 1:
        # The bias of a dense layer of the same name; a mask has [1, 1, positions, positions].
        return not np.any(read(name))
    if harmless.fullmatch(name):
        return True
    is_added = _ADDED.fullmatch(name) and math.prod(shape) <= _MAX_ADDED_WEIGHTS
    return bool(is_added) and not np.any(read(name))
