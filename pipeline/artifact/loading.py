"""The Python by which stock KerasHub loads an artifact, in the dtype that it is in or in another.

A preset asks for its quantized layers in the backbone's `dtype`, a map from layers to policies.
KerasHub 0.32 looks for them nowhere else, and `from_preset(…, dtype="bfloat16")` puts "bfloat16"
where the map was, before anything is built; so does `Backbone.from_preset` with None. That makes a
float model, for whose layers Keras takes nothing but a float kernel: no artifact can be written so
that these calls work. But `dtype` may be a map: the saved one, as it is, or with another dtype in
it.
"""

from __future__ import annotations

import json

from pipeline.model.preset import CONFIG_FILE, TASK_FILE
from pipeline.run.records import ARTIFACT_PREFIX
from pipeline.storage.object_store import ObjectStore


def load_call(task: str, folder: str) -> str:
    """Load an artifact in its own dtype, whatever Keras' global policy is.

    Args:
        task: a class of KerasHub: that of task.json, or the backbone's where there is none.
        folder: an expression for the artifact's folder, such as a string in quotes.
    """
    # A backbone without a task ignores the dtype in its own config (keras-hub 0.32).
    given = f", dtype={_saved(f'json.loads({_text(folder)})')}" if task.endswith("Backbone") else ""
    return f"keras_hub.models.{task}.from_preset({folder}{given})"


def load_call_in(dtype: str, task: str, folder: str, saved: str) -> str:
    """Load an artifact so that it computes in another dtype, such as "bfloat16".

    Codes stay as they are; scales, biases and layers left in float are cast. Keras refuses int8
    layers in float16.

    Args:
        task, folder: as for `load_call`.
        saved: the dtype policy of what the artifact has in float, such as "float32".
    """
    changed = f"json.loads({_text(folder)}.replace({saved!r}, {dtype!r}))"
    return f"keras_hub.models.{task}.from_preset({folder}, dtype={_saved(changed)})"


def load_hints(store: ObjectStore) -> tuple[str, ...]:
    """For people: how stock KerasHub loads a run's artifact, and how in another dtype.

    KerasHub knows local folders, and no object storage.
    """
    config = json.loads(store.get(f"{ARTIFACT_PREFIX}{CONFIG_FILE}"))
    has_task = store.exists(f"{ARTIFACT_PREFIX}{TASK_FILE}")
    named = json.loads(store.get(f"{ARTIFACT_PREFIX}{TASK_FILE}")) if has_task else config
    task = str(named["class_name"])
    saved = str(config["config"]["dtype"]["config"]["default_policy"])
    other = "bfloat16" if saved == "float32" else "float32"
    url = store.url(ARTIFACT_PREFIX.rstrip("/"))
    local = url.removeprefix("file://")
    is_local = "://" not in local
    folder = repr(local) if is_local else "folder"
    first = "" if is_local else f"copy {url} to a local folder, then "
    return (
        f"load it:  {first}{load_call(task, folder)}",
        f"compute in {other} instead of {saved}:  {load_call_in(other, task, folder, saved)}",
    )


def _text(folder: str) -> str:
    return f"pathlib.Path({folder}, '{CONFIG_FILE}').read_text()"


def _saved(content: str) -> str:
    return f"{content}['config']['dtype']"
