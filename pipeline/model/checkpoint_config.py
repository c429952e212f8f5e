"""The config.json and small files of a Hugging Face checkpoint of a KerasHub model.

They are those of the folder that the model was converted from, or of one that the user names. For
some families KerasHub can also write a config. Whichever it is, KerasHub's converter must read from
it exactly the model at hand: a setting that got lost on the way would change every answer.
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from keras_hub.src.utils.transformers.export import hf_exporter

from pipeline.errors import ExportError, MissingObjectError, SourceError
from pipeline.model.checkpoint_tokenizer import checkpoint_tokenizer
from pipeline.model.huggingface import convert_config
from pipeline.model.preset import (
    CONFIG_FILE,
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX_FILE,
    PresetFiles,
    read_preset,
)
from pipeline.model.skeleton import Skeleton
from pipeline.storage.object_store import open_store

_COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "generation_config.json"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
    # How sentence-transformers makes one vector of an encoder's outputs.
    *("modules.json", "1_Pooling/config.json", "*sentence_*.json"),
)
_OF_TOKENIZERS = re.compile("tokenizer|vocab|merges")
# Of a model, not of its architecture: no setting of the backbone, or not one that decides answers.
_NOT_COMPARED = ("dtype", "name", "trainable", "dropout", "attention_dropout")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a checkpoint is described by, apart from its tensors.

    Attributes:
        folder: of Hugging Face; of one that KerasHub describes, it holds a config.json alone.
        made: whether KerasHub wrote the config.
        tokenizer: files of the artifact's own tokenizer, where the folder has none.
    """

    folder: PresetFiles
    made: bool
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, Any]:
        """config.json."""
        return self.folder.parse(CONFIG_FILE)

    @property
    def has_tensors(self) -> bool:
        """Whether the folder lists the names of its tensors."""
        return not {SAFETENSORS_FILE, SAFETENSORS_INDEX_FILE}.isdisjoint(self.folder.sizes)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one, of the folder or of the artifact."""
        return bool(self.tokenizer) or any(map(_OF_TOKENIZERS.match, self._copied))

    def small_files(self) -> dict[str, bytes]:
        """Tokenizer, settings of generation or pooling, and licence, by name."""
        folder = self.folder
        copied = {name: folder.json_files.get(name) or folder.read(name) for name in self._copied}
        return {**self.tokenizer, **copied}

    @property
    def _copied(self) -> list[str]:
        names = sorted({*self.folder.json_files, *self.folder.assets})
        return [name for name in names if any(fnmatch.fnmatch(name, one) for one in _COPIED)]


def checkpoint_config(
    artifact: PresetFiles, skeleton: Skeleton, source_url: str, like_url: str | None
) -> CheckpointConfig:
    """Find the config of a checkpoint, and check that it describes the model.

    Args:
        artifact: of KerasHub; its tokenizer is taken if the folder has none.
        skeleton: of the same model.
        source_url: what the model was quantized from; it may be gone.
        like_url: a folder to take config and tokenizer from instead.

    Raises:
        ExportError: there is none, or it is of another model.
        SourceError: `like_url` cannot be read.
    """
    backbone = type(skeleton.backbone).__name__
    if like_url is not None:
        folder = read_preset(like_url)
        if folder.format != "huggingface":
            raise ExportError(
                f"{like_url}: a KerasHub preset; --like takes a Hugging Face folder, with "
                "config.json and tokenizer"
            )
        return _checked(skeleton, _with_tokenizer(folder, artifact))
    source = _source(source_url)
    if source is not None and source.format == "huggingface":
        return _checked(skeleton, _with_tokenizer(source, artifact))
    if backbone not in hf_exporter.MODEL_CONFIGS:
        raise ExportError(
            f"{source_url}: not a Hugging Face folder, and KerasHub writes no config.json for a "
            f"{backbone}; name a Hugging Face folder of this model with --like (its config.json "
            "and tokenizer are enough)"
        )
    tokenizer = checkpoint_tokenizer(artifact)
    content = {
        **_architecture(skeleton, backbone),
        **hf_exporter.MODEL_CONFIGS[backbone](skeleton.backbone),
        **tokenizer.ids,
    }
    data = json.dumps(content).encode()
    made = PresetFiles(
        url=f"the config that KerasHub writes for {backbone}",
        format="huggingface",
        json_files={CONFIG_FILE: data},
        sizes={CONFIG_FILE: len(data)},
        store=open_store("memory://described-by-kerashub"),
    )
    found = CheckpointConfig(folder=made, made=True, tokenizer=tokenizer.files)
    return _checked(skeleton, found)


def _with_tokenizer(folder: PresetFiles, artifact: PresetFiles) -> CheckpointConfig:
    """A folder's own tokenizer, or else the artifact's."""
    found = CheckpointConfig(folder=folder, made=False)
    if found.has_tokenizer:
        return found
    return replace(found, tokenizer=checkpoint_tokenizer(artifact).files)


def _source(url: str) -> PresetFiles | None:
    try:
        return read_preset(url)
    except (SourceError, MissingObjectError):
        return None


def _architecture(skeleton: Skeleton, backbone: str) -> dict[str, Any]:
    """What vLLM finds its model class by; KerasHub leaves it out for some families."""
    family = backbone.removesuffix("Backbone")
    family = "Qwen2" if family == "Qwen" else family
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return {"architectures": [f"{family}{kind if skeleton.predicts_tokens else 'Model'}"]}


def _checked(skeleton: Skeleton, found: CheckpointConfig) -> CheckpointConfig:
    """Check that KerasHub would read this very model from the config."""
    backbone_class = type(skeleton.backbone)
    converted, _ = convert_config(found.folder)
    if converted["registered_name"] != skeleton.backbone_json["registered_name"]:
        raise ExportError(
            f"{found.folder.url}: config.json is of a {converted['class_name']}, and the result is "
            f"a {backbone_class.__name__}; name the folder of the model that was quantized"
        )
    parameters = inspect.signature(backbone_class).parameters
    ours, theirs = skeleton.backbone_json["config"], converted["config"]
    for name in sorted({*ours, *theirs} - set(_NOT_COMPARED)):
        default = parameters[name].default if name in parameters else None
        a, b = ours.get(name, default), theirs.get(name, default)
        if not _same(a, b):
            raise ExportError(
                f"{found.folder.url}: KerasHub reads {name} {b!r} from config.json, and the result "
                f"has {a!r}; name a Hugging Face folder of this very model with --like, or a copy "
                "whose config.json agrees"
            )
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) or isinstance(b, Mapping):
        # A serialized layer, such as an activation.
        return json.dumps(a, sort_keys=True, default=str) == json.dumps(
            b, sort_keys=True, default=str
        )
    if isinstance(a, list | tuple) or isinstance(b, list | tuple):
        # Without layers of some kind, KerasHub keeps an empty list where None was given.
        return list(a or ()) == list(b or ())
    return bool(a == b)


def config_json(
    found: CheckpointConfig,
    *,
    dtype: str,
    generates: bool,
    quantization: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of the checkpoint's config.json.

    Args:
        generates: whether the checkpoint is a causal language model; if not, it is a base model,
            without any head.
    """
    content = {**found.content, "dtype": dtype, "torch_dtype": dtype}
    if not generates:
        heads = content.get("architectures") or []
        content["architectures"] = [re.sub(r"(For\w+|LMHeadModel)$", "Model", x) for x in heads]
    if quantization is not None:
        content["quantization_config"] = dict(quantization)
    return content
