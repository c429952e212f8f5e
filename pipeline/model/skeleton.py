"""A preset's model without weights: every variable has a path, shape and dtype, but no value.

An 8B model takes half a second and a few MB; `variable.assign(array)` later fills any variable.
Before anything is built, the classes that the JSON names are checked, more strictly than by Keras's
safe mode.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import keras
import keras_hub
import numpy as np

from pipeline.errors import SourceError
from pipeline.model.huggingface import convert_config
from pipeline.model.preset import CONFIG_FILE, TASK_FILE, PresetFiles, keras_errors
from pipeline.model.weight_layout import StoredVariable, weight_layout
from quantizer.keras_format.generated_names import MANY, ManyMade, apart


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A weightless model."""

    backbone: Any
    """The `keras_hub.models.Backbone`."""
    task: Any | None
    """The `keras_hub.models.Task` around it, without its preprocessor, if the preset has one."""
    backbone_json: Mapping[str, Any]
    """What the backbone was built from, as in config.json."""
    task_json: Mapping[str, Any] | None
    generated_names: frozenset[str] = frozenset()
    """Names of layers that Keras generated: in another process they may end in other numbers."""

    @property
    def model(self) -> Any:
        """The task if there is one, else the backbone."""
        return self.backbone if self.task is None else self.task

    @property
    def predicts_tokens(self) -> bool:
        """Whether the task is a causal language model, whose output is the next token's logits."""
        return isinstance(self.task, keras_hub.models.CausalLM)

    @property
    def backbone_layers(self) -> tuple[keras.layers.Layer, ...]:
        """The backbone and every layer inside it, however deep."""
        return tuple(self.backbone._flatten_layers())

    def mark_calibrated(self) -> None:
        """Let gptq and awq layers use their quantized variables, as Keras' loader does.

        Without this they compute with the float kernel that they no longer have.
        """
        for layer in self.backbone_layers:
            mode = getattr(layer, "quantization_mode", None)
            if mode in ("gptq", "awq"):
                setattr(layer, f"is_{mode}_calibrated", True)

    @cached_property
    def stored(self) -> tuple[StoredVariable, ...]:
        """The backbone's variables in a weights file."""
        return weight_layout(self.backbone)

    @cached_property
    def stored_by_task(self) -> tuple[StoredVariable, ...]:
        """The variables in a task's own weights file, without its backbone's."""
        if self.task is None:
            return ()
        return weight_layout(self.task, skip=self.backbone_layers)


def build_skeleton(
    preset: PresetFiles,
    dtype_policy_map: Mapping[str, Any] | str | None = None,
    *,
    many_made: bool = False,
) -> Skeleton:
    """Build a preset's backbone, and its task if it has one, without weights.

    Layer names and variable paths are the same in every process, whatever was built before.

    Args:
        dtype_policy_map: replaces the dtype in the preset's JSON: a policy's name, or a serialized
            `DTypePolicyMap`, which makes quantized layers with all their variables.
        many_made: give the names that Keras generates the numbers that they have in a process
            that has built many models.

    Raises:
        SourceError: JSON that is damaged, names a class from outside Keras and KerasHub, or
            cannot be built.
    """
    backbone_json, task_json = _configs(preset)
    if dtype_policy_map is not None:
        backbone_json["config"]["dtype"] = _copy(dtype_policy_map)
    where = f"{preset.url}/{CONFIG_FILE}"
    check_trusted(backbone_json, where)
    backbone_class = _registered_class(backbone_json, keras_hub.models.Backbone, where)
    made: defaultdict[str, int] = ManyMade() if many_made else defaultdict(int)
    with apart(made), keras.StatelessScope(initialize_variables=False):
        backbone = _build(backbone_class, backbone_json["config"], where)
        task = None
        if task_json is not None:
            task_json["config"]["backbone"] = backbone_json
            rest = {**task_json["config"], "backbone": None, "preprocessor": None}
            where = f"{preset.url}/{TASK_FILE}"
            check_trusted(rest, where)
            task_class = _registered_class(task_json, keras_hub.models.Task, where)
            rest.update(backbone=backbone, compile=False)
            task = _build(task_class, rest, where)
    _fill_seeds(backbone if task is None else task)
    _tell_apart(backbone)
    return Skeleton(
        backbone=backbone,
        task=task,
        backbone_json=backbone_json,
        task_json=task_json,
        generated_names=frozenset(
            f"{name}_{index}" if index else name
            for name, number in made.items()
            for index in range(MANY if many_made else 0, number)
        ),
    )


def _configs(preset: PresetFiles) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The JSON of backbone and task that KerasHub would use."""
    if preset.format == "huggingface":
        return convert_config(preset)
    backbone_json = preset.parse(CONFIG_FILE)
    task_json = preset.parse(TASK_FILE) if TASK_FILE in preset.json_files else None
    for name, content in ((CONFIG_FILE, backbone_json), (TASK_FILE, task_json)):
        if content is not None and not isinstance(content.get("config"), dict):
            raise SourceError(f'{preset.url}/{name}: not a Keras config (it lacks "config")')
    if task_json is not None and isinstance(task_json["config"].get("backbone"), dict):
        # KerasHub builds the task from task.json, but with the dtype of config.json.
        dtype = backbone_json["config"].get("dtype")
        backbone_json = task_json["config"]["backbone"]
        if not isinstance(backbone_json.get("config"), dict):
            raise SourceError(f'{preset.url}/{TASK_FILE}: its backbone lacks "config"')
        if dtype is not None:
            backbone_json["config"]["dtype"] = dtype
    return backbone_json, task_json


def _build(model_class: type[Any], config: Mapping[str, Any], where: str) -> Any:
    problem = f"{where}: {model_class.__name__} cannot be built from it"
    with keras_errors(problem, "was it written by a newer KerasHub?"):
        # from_config may modify its argument.
        return model_class.from_config(_copy(config))


def _copy(config: Any) -> Any:
    """A deep copy of JSON; live Keras objects in it stay themselves."""
    if isinstance(config, Mapping):
        return {key: _copy(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [_copy(value) for value in config]
    return config


def _fill_seeds(model: keras.Model) -> None:
    """Initialize random generators (of dropout): calls need a state, and no file holds one."""
    for layer in model._flatten_layers():
        for generator in layer._seed_generators:
            generator.state.assign(np.zeros(generator.state.shape, generator.state.dtype))


def _tell_apart(model: keras.Model) -> None:
    """Give variables that have the same path that of their layer before their name.

    KerasHub's T5 makes the position biases of encoder and decoder before their layers have a place
    in the model.
    """
    owned = [
        (layer, variable)
        for layer in model._flatten_layers()
        for variable in (*layer._trainable_variables, *layer._non_trainable_variables)
    ]
    numbers = Counter(str(variable.path) for _, variable in owned)
    for layer, variable in owned:
        if numbers[str(variable.path)] > 1:
            variable._path = f"{layer.path}/{variable.name}"


_TRUSTED = ("keras", "keras_hub")
# Modules of Keras's activation functions.
_FUNCTIONS = ("builtins", "keras.activations", "keras.ops", "keras")
# Keras's own classes that execute code from their config.
_RUN_CODE = frozenset(
    {"Lambda", "__lambda__", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "TFSMLayer"}
)


def check_trusted(content: Any, where: str) -> None:
    """Reject objects of other packages, and those of Keras that execute code from their config.

    Raises:
        SourceError: such an object, at any depth.
    """
    pending = [content]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        if not isinstance(item, dict):
            continue
        pending.extend(item.values())
        if "class_name" not in item:
            continue
        # Keras joins module and name, so a name may itself contain dots.
        name, module = str(item["class_name"]), str(item.get("module") or "keras")
        if name == "function":
            trusted = module in _FUNCTIONS and isinstance(item.get("config"), str)
        else:
            trusted = module.partition(".")[0] in _TRUSTED
        if not trusted or name.rpartition(".")[2] in _RUN_CODE:
            raise SourceError(
                f"{where}: refuses {name!r} of module {module!r}; a source may use only classes of "
                "keras and keras_hub that execute no code from their config"
            )


def _registered_class(config: Mapping[str, Any], parent: type, where: str) -> type[Any]:
    """The KerasHub class that a serialized object names, which must be a subclass of `parent`."""
    registered_name = str(config.get("registered_name"))
    found = keras.saving.get_registered_object(registered_name)
    if (
        isinstance(found, type)
        and issubclass(found, parent)
        and found.__module__.partition(".")[0] in _TRUSTED
    ):
        return found
    raise SourceError(
        f"{where}: {registered_name!r} is not a {parent.__name__} of KerasHub "
        f"{keras_hub.__version__}; only KerasHub's own models can be quantized"
    )
