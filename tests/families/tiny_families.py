"""Every backbone that KerasHub exports: how a tiny one is built, or why it is not tried.

The names come from KerasHub itself (`exported_backbones`), so that a family that a new version adds
is in neither list, and shows up as not yet tried.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import keras
import keras_hub
from keras.src.backend.common import global_state
from keras.src.utils.naming import reset_uids

from tests.models.saved_preset import complete
from tests.models.tiny import randomize
from tests.models.tiny_tokenizers import TOKENIZERS

_SEQUENCE_LENGTH = 64
_VOCABULARY_SIZE = 288
"""More than the tokenizer has, and a multiple of 32."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a tiny model of one family is built.

    Attributes:
        name: in the table, such as "Gemma3 with vision".
        backbone: its class.
        task: its class; None if KerasHub has none that a quantized backbone could be loaded by.
        options: arguments of the backbone.
        parts: what the backbone takes ready made, as (argument, class, its arguments).
        forgotten: options that the backbone's `get_config` omits.
        input_length: of what it takes besides text: frames, or samples of sound.
    """

    name: str
    backbone: str
    task: str | None
    options: Mapping[str, Any]
    parts: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    forgotten: tuple[str, ...] = ()
    input_length: int = 16


def _text(hidden: int = 32, **options: Any) -> dict[str, Any]:
    return {
        "vocabulary_size": _VOCABULARY_SIZE,
        "num_layers": 2,
        "hidden_dim": hidden,
        "intermediate_dim": 2 * hidden,
        **options,
    }


def _heads(**options: Any) -> dict[str, Any]:
    return _text(num_heads=4, **options)


def _positions(**options: Any) -> dict[str, Any]:
    return _heads(max_sequence_length=_SEQUENCE_LENGTH, dropout=0.0, **options)


def _grouped(**options: Any) -> dict[str, Any]:
    return _text(num_query_heads=4, num_key_value_heads=2, **options)


def _gemma(**options: Any) -> dict[str, Any]:
    return _grouped(head_dim=8, **options)


def _gemma3(**options: Any) -> dict[str, Any]:
    return _gemma(
        image_size=16,  # required even without a vision encoder
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=8,
        **options,
    )


def _gemma4(**options: Any) -> dict[str, Any]:
    return _gemma(image_size=16, sliding_window_size=8, **options)


_EXPERTS = {"num_experts": 4, "top_k": 2}
_QWEN_EXPERTS = {**_EXPERTS, "moe_intermediate_dim": 32, "norm_top_k_prob": True}
_QWEN3_5 = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_VISION = {
    "image_size": 16,
    "patch_size": 4,
    "pool_size": 2,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "output_dim": 32,
}
_QWEN3_5_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 32,
    "in_channels": 3,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
}
_SMOLLM3 = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True, True],
    "layer_types": ["attention", "attention"],
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": _SEQUENCE_LENGTH,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}
_GEMMA3N = {
    "text_vocab_size": _VOCABULARY_SIZE,
    "text_hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": [64, 64],
    "hidden_activation": "gelu_approximate",
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "rope_theta": 10000.0,
    "max_position_embeddings": _SEQUENCE_LENGTH,
    "vocab_size_per_layer_input": _VOCABULARY_SIZE,
    "hidden_size_per_layer_input": 16,
    "altup_num_inputs": 2,
    "laurel_rank": 16,
}
_T5GEMMA = {
    "vocabulary_size": _VOCABULARY_SIZE,
    **{
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "hidden_dim": 32,
            "intermediate_dim": 64,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        }.items()
    },
    "dropout_rate": 0.0,
    "query_pre_attn_scalar": 1.0,
    "sliding_window": 16,
    "cross_attention_hidden_size": 32,
    "attn_logit_softcapping": 50.0,
}
_MOONSHINE = {
    "vocabulary_size": _VOCABULARY_SIZE,
    "filter_dim": 32,
    "hidden_dim": 32,
    "intermediate_dim": 64,
    **{f"{half}_num_layers": 2 for half in ("encoder", "decoder")},
    **{f"{half}_num_heads": 4 for half in ("encoder", "decoder")},
}
_ELECTRA = {**_positions(embedding_dim=16), "vocab_size": _VOCABULARY_SIZE}
del _ELECTRA["vocabulary_size"]
_CLIP_TEXT = _positions(embedding_dim=32) | {"max_sequence_length": 16}
del _CLIP_TEXT["dropout"]


def _family(
    name: str, task: str | None, options: Mapping[str, Any], label: str = "", **more: Any
) -> Family:
    backbone = name if name.endswith("Encoder") else f"{name}Backbone"
    task = None if task is None else name + task
    return Family(name=f"{name}{label}", backbone=backbone, task=task, options=options, **more)


_TIED = ("tie_word_embeddings",)

FAMILIES = (
    # Decoders of text.
    _family("Bloom", "CausalLM", _heads()),
    _family("Falcon", "CausalLM", _text(num_attention_heads=4)),
    _family("GPT2", "CausalLM", _positions()),
    _family("GPTNeoX", "CausalLM", _heads()),
    _family("Gemma", "CausalLM", _gemma()),
    _family("Gemma3", "CausalLM", _gemma3()),
    _family("Gemma3n", "CausalLM", _GEMMA3N),
    _family("Gemma4", "CausalLM", _gemma4()),
    _family(
        "Gemma4",
        "CausalLM",
        _gemma4(num_kv_shared_layers=1, hidden_size_per_layer_input=16, use_double_wide_mlp=True)
        | {
            "num_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "vocab_size_per_layer_input": _VOCABULARY_SIZE,
        },
        " with shared keys",
    ),
    _family("Llama", "CausalLM", _grouped()),
    _family("Llama3", "CausalLM", _grouped(tie_word_embeddings=True), forgotten=_TIED),
    _family("Mistral", "CausalLM", _grouped()),
    _family("OPT", "CausalLM", _positions()),
    _family("Phi3", "CausalLM", _grouped()),
    _family("Qwen", "CausalLM", _grouped()),
    _family("Qwen3", "CausalLM", _grouped(head_dim=8)),
    _family("Qwen3_5", "CausalLM", _grouped(**_QWEN3_5)),
    _family("RWKV7", "CausalLM", {
        "vocabulary_size": _VOCABULARY_SIZE,
        "num_layers": 2,
        "hidden_size": 32,
        "head_size": 8,
        "intermediate_dim": 64,
        **{f"{name}_lora": 8 for name in ("gate", "mv", "aaa", "decay")},
    }),
    _family("SmolLM3", "CausalLM", _text(**_SMOLLM3)),
    # With experts.
    _family("Gemma4", "CausalLM", _gemma4(
        enable_moe_block=True, num_experts=4, expert_intermediate_dim=32, num_experts_per_token=2
    ), " with experts"),
    _family("GptOss", "CausalLM", _grouped(**_EXPERTS, sliding_window=8)),
    _family("Mixtral", "CausalLM", _grouped(**_EXPERTS)),
    _family("Qwen3Moe", "CausalLM", _grouped(head_dim=8, **_QWEN_EXPERTS)),
    _family("Qwen3_5Moe", "CausalLM", {
        **_grouped(**_QWEN3_5, **_EXPERTS),
        "moe_intermediate_dim": 32,
        "shared_expert_intermediate_size": 32,
    }),
    _family("QwenMoe", "CausalLM", _grouped(shared_expert_intermediate_dim=64, **_QWEN_EXPERTS)),
    # Decoders with a vision encoder.
    _family("Gemma3", "CausalLM", _gemma3(), " with vision", parts={
        "vision_encoder": ("Gemma3VisionEncoder", _VISION)
    }),
    _family("Gemma4", "CausalLM", _gemma4(), " with vision", parts={
        "vision_encoder": ("Gemma4VisionEncoder", {
            **_VISION, "head_dim": 8, "num_key_value_heads": 2
        })
    }),
    _family("PaliGemma", "CausalLM", _gemma(
        image_size=16, vit_patch_size=4, vit_num_heads=2, vit_hidden_dim=16, vit_num_layers=2,
        vit_intermediate_dim=32,
    )),
    _family("Qwen3_5", "CausalLM", _grouped(**_QWEN3_5, mrope_section=[1, 0, 0]), " with vision",
        parts={"vision_encoder": ("Qwen3_5VisionEncoder", _QWEN3_5_VISION)},
    ),
    # Encoders.
    _family("Albert", "MaskedLM", _positions(embedding_dim=16)),
    _family("Bert", "MaskedLM", _positions()),
    _family("CLIPTextEncoder", None, _CLIP_TEXT),
    _family("DebertaV3", "MaskedLM", _positions(bucket_size=16)),
    _family("DistilBert", "MaskedLM", _positions()),
    _family("ESM", "MaskedPLM", _positions()),
    _family("Electra", None, _ELECTRA),
    _family("FNet", "MaskedLM", _text(max_sequence_length=_SEQUENCE_LENGTH, dropout=0.0)),
    _family("MetaCLIP2TextEncoder", None, _CLIP_TEXT),
    _family("Roberta", "MaskedLM", _positions()),
    _family("RoformerV2", "MaskedLM", _heads(head_size=8, dropout=0.0)),
    _family("SigLIPTextEncoder", None, _CLIP_TEXT),
    _family("XLMRoberta", "MaskedLM", _positions()),
    _family("XLNet", None, _heads(dropout=0.0)),
    # Encoders with decoders.
    _family("Bart", "Seq2SeqLM", _positions()),
    _family("EdRec", "Seq2SeqLM", {
        "vocab_size": _VOCABULARY_SIZE,
        "num_layers_enc": 2,
        "num_layers_dec": 2,
        "hidden_dim": 32,
        "intermediate_dim": 64,
        "num_heads": 4,
    }),
    _family("Moonshine", "AudioToText", _MOONSHINE, input_length=2000),
    _family("T5", "Seq2SeqLM", _heads(dropout=0.0)),
    _family("T5Gemma", "Seq2SeqLM", _T5GEMMA),
    _family("T5Gemma2", "Seq2SeqLM", _T5GEMMA),
    _family("Whisper", None, _heads(
        dropout=0.0, max_encoder_sequence_length=16, max_decoder_sequence_length=_SEQUENCE_LENGTH
    )),
)  # fmt: skip

OUT_OF_SCOPE: dict[str, str] = {
    name: reason
    for reason, names in {
        "images, without text": (
            "BASNet CSPNet DFine DINOV2 DINOV3 DeepLabV3 DeiT DenseNet DepthAnything EfficientNet "
            "HGNetV2 MiT MobileNet MobileNetV5 PARSeq ResNet RetinaNet SAM SegFormer "
            "SwinTransformer VGG ViT ViTDet Xception"
        ),
        "images beside text, in towers of their own": (
            "BLIP2 CLIP MetaCLIP2 SAM3PromptableConcept SigLIP"
        ),
        "makes images from text": "Flux StableDiffusion3",
        "video": "VideoPrism",
        "the vision half of another backbone": (
            "CLIPVisionEncoder MetaCLIP2VisionEncoder SigLIPVisionEncoder"
        ),
        "an abstract class": "Backbone FeaturePyramidBackbone",
    }.items()
    for name in names.split()
}


def exported_backbones() -> frozenset[str]:
    """The names of all backbones in `keras_hub.models`; one of a class that has several names."""
    exported = (getattr(keras_hub.models, name) for name in dir(keras_hub.models))
    return frozenset(
        found.__name__
        for found in exported
        if inspect.isclass(found) and issubclass(found, keras_hub.models.Backbone)
    )


def not_yet_tried() -> list[str]:
    """Backbones that are neither tried nor listed as out of scope."""
    listed = {family.backbone for family in FAMILIES}
    listed |= OUT_OF_SCOPE.keys() | {f"{name}Backbone" for name in OUT_OF_SCOPE}
    return sorted(exported_backbones() - listed)


def _part_module(family: Family, argument: str) -> Any:
    """The module of a part, which KerasHub does not export."""
    folder = getattr(keras_hub.models, family.backbone).__module__.rpartition(".")[0]
    return importlib.import_module(f"{folder}.{folder.rpartition('.')[2]}_{argument}")


def tiny_family(family: Family, path: Path, *, seed: int = 0) -> Path:
    """Save a tiny random preset of a family, with a tokenizer that is the same for all of them.

    Calibration only needs token ids; which words they stand for is all the same to it.
    """
    reset_uids()
    options = dict(family.options)
    with keras.StatelessScope(initialize_variables=False):  # initializers take most of the time
        for argument, (name, its_options) in family.parts.items():
            options[argument] = getattr(_part_module(family, argument), name)(**its_options)
        backbone = getattr(keras_hub.models, family.backbone)(
            dtype="float32", name="backbone", **options
        )
    # Otherwise the next scope would initialize them, even those that have a value by then.
    global_state.set_global_attribute("uninitialized_variables", [])
    model = backbone
    if family.task is not None:
        task_class = getattr(keras_hub.models, family.task)
        model = task_class(backbone=backbone, preprocessor=None, name="task")
    randomize(model, seed)
    model.save_to_preset(str(path))
    TOKENIZERS["GPT2"]().save_to_preset(str(path))
    if family.task is not None:
        forgotten = {name: family.options[name] for name in family.forgotten}
        complete(path, forgotten, origin={"family": family.name, "seed": seed})
    return path


@cache
def shared_family(name: str) -> Path:
    """A tiny preset of a family that several tests read and none changes."""
    [family] = (family for family in FAMILIES if family.name == name)
    folder = Path(tempfile.mkdtemp(prefix="family-"))
    atexit.register(shutil.rmtree, folder)
    return tiny_family(family, folder / "preset")
