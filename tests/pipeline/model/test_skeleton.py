from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from pipeline.errors import SourceError
from pipeline.model.blocks import find_blocks
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from tests.benchmarks.minilm import preset_folder
from tests.models.tiny import ARCHITECTURES
from tests.pipeline.presets import shared_preset, stock_task
from tests.selection import by_default

# KerasHub leaves the file open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*vocabulary.spm:ResourceWarning")

SIZE_8B = {
    "vocabulary_size": 128256,
    "num_layers": 32,
    "num_query_heads": 32,
    "num_key_value_heads": 8,
    "hidden_dim": 4096,
    "intermediate_dim": 14336,
    "tie_word_embeddings": False,
}


def skeleton_of(path: Path, **options: Any) -> Any:
    return build_skeleton(read_preset(str(path)), **options)


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A preset that a test may change."""
    return shutil.copytree(shared_preset("Llama3"), tmp_path / "preset")


def edit(path: Path, **changes: Any) -> None:
    """Change a backbone's config wherever the preset holds it."""
    for name, place in (("config.json", ()), ("task.json", ("config", "backbone"))):
        saved = json.loads((path / name).read_text())
        backbone = saved
        for key in place:
            backbone = backbone[key]
        backbone["config"].update(changes)
        (path / name).write_text(json.dumps(saved))


def describe(model: Any) -> list[tuple[str, tuple[int, ...], str]]:
    """Variables, but for the states of random generators, whose names count per process."""
    return [
        (variable.path, tuple(variable.shape), variable.dtype)
        for variable in model.variables
        if "seed_generator" not in variable.path
    ]


@pytest.mark.parametrize("architecture", by_default(ARCHITECTURES, ["Bert", "Gemma"]))
def test_has_the_variables_of_the_stock_model_and_no_value(architecture: str) -> None:
    skeleton = skeleton_of(shared_preset(architecture))
    assert describe(skeleton.model) == describe(stock_task(architecture))
    assert type(skeleton.task).__name__ == ARCHITECTURES[architecture].task
    assert [
        variable.path for variable in skeleton.model.variables if variable._value is not None
    ] == []


def test_an_8b_model_takes_no_memory_and_keeps_taking_none(preset: Path) -> None:
    edit(preset, **SIZE_8B)
    before = resident_bytes()
    skeleton = skeleton_of(preset)
    graph = find_blocks(skeleton)
    # Tracing makes Keras initialize whatever waits for a value.
    keras.Model(graph.embed.inputs, graph.embed.outputs[0] * 2)
    assert skeleton.model.count_params() > 8e9
    assert resident_bytes() - before < 100 << 20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_variable_paths_do_not_depend_on_what_was_built_before() -> None:
    path = shared_preset("GPT2")  # with dropout, whose variables Keras names by counting
    script = (
        "import json, sys; from pipeline.model.preset import read_preset;"
        "from pipeline.model.skeleton import build_skeleton;"
        "s = build_skeleton(read_preset(sys.argv[1]));"
        "print(json.dumps([v.path for v in s.model.variables]))"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", script, str(path)]
    fresh = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    keras.layers.Dropout(0.5)
    skeleton_of(path)
    here = [variable.path for variable in skeleton_of(path).model.variables]
    assert here == json.loads(fresh.stdout)


def test_leaves_keras_names_where_they_were() -> None:
    first = keras.layers.Dropout(0.5).name
    skeleton_of(shared_preset("GPT2"))
    assert keras.layers.Dropout(0.5).name != first


def test_a_policy_map_gives_quantized_layers() -> None:
    target = "transformer_layer_1/feedforward_gate_dense"
    policy = {
        "module": "keras.dtype_policies",
        "class_name": "GPTQDTypePolicy",
        "config": {"mode": "gptq/4/32", "source_name": "float32"},
        "registered_name": None,
    }
    policies = {
        "module": "keras.dtype_policies",
        "class_name": "DTypePolicyMap",
        "config": {"default_policy": "float32", "policy_map": {target: policy}},
        "registered_name": None,
    }
    skeleton = skeleton_of(shared_preset("Llama3"), dtype_policy_map=policies)
    quantized = {
        layer.path: layer
        for layer in skeleton.model._flatten_layers()
        if getattr(layer, "quantization_mode", None)
    }
    assert list(quantized) == [target]
    assert quantized[target].quantized_kernel.dtype == "uint8"
    assert quantized[target].g_idx.shape == (64,)
    assert all(variable._value is None for variable in skeleton.model.variables)


def test_a_task_without_json_leaves_the_backbone(preset: Path) -> None:
    (preset / "task.json").unlink()
    skeleton = skeleton_of(preset)
    assert skeleton.task is None
    assert skeleton.model is skeleton.backbone


def test_what_get_config_forgets_is_kept() -> None:
    assert skeleton_of(shared_preset("Llama3", tied=False)).backbone.tie_word_embeddings is False
    assert skeleton_of(shared_preset("Llama3", tied=True)).backbone.tie_word_embeddings is True


def test_reads_a_hugging_face_folder() -> None:
    skeleton = skeleton_of(preset_folder())
    assert type(skeleton.task).__name__ == "BertTextEmbedder"
    assert skeleton.task.pooling_mode == "mean"
    assert skeleton.backbone.num_layers == 6
    # As JSON it builds the same model again.
    assert json.loads(json.dumps(skeleton.task_json)) == skeleton.task_json


def test_reads_through_a_url(preset: Path) -> None:
    local = read_preset(str(preset))
    through_url = read_preset(f"file://{preset}/")
    assert through_url.json_files == local.json_files
    assert through_url.sizes == local.sizes
    assert local.assets == ("assets/tokenizer/merges.txt", "assets/tokenizer/vocabulary.json")


def test_preset_files_travel(preset: Path) -> None:
    sent = copy.deepcopy(read_preset(str(preset)))  # by way of __reduce__, as between processes
    assert sent.read("config.json") == (preset / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"registered_name": "keras>Lambda"}, "is not a Backbone of KerasHub"),
        ({"registered_name": "keras_hub>Llama3Tokenizer"}, "is not a Backbone of KerasHub"),
        ({"module": "os", "class_name": "system"}, "refuses 'system' of module 'os'"),
        ({"config": {"a": {"class_name": "Lambda", "module": "keras.layers"}}}, "refuses 'Lambda'"),
        ({"config": {"a": [{"class_name": "layers.Lambda", "module": "keras"}]}}, "refuses"),
        (
            {"config": {"a": {"class_name": "function", "module": "os", "config": "system"}}},
            "refuses 'function'",
        ),
        ({"config": 3}, 'lacks "config"'),
        ({"config": {"vocabulary_size": 10}}, "Llama3Backbone cannot be built"),
    ],
)
def test_refuses_what_is_not_a_plain_kerashub_model(
    preset: Path, changes: dict[str, Any], expected: str
) -> None:
    (preset / "task.json").unlink()
    config = json.loads((preset / "config.json").read_text())
    (preset / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(SourceError, match=expected) as caught:
        skeleton_of(preset)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no config.json there"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "neither a KerasHub preset"),
        ('{"model_type": "unheard-of"}', "no converter"),
    ],
)
def test_says_what_is_wrong_with_a_folder(
    tmp_path: Path, content: str | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SourceError, match=expected):
        skeleton_of(tmp_path)


def test_seeds_have_a_value_so_that_a_block_can_be_called() -> None:
    skeleton = skeleton_of(preset_folder())
    states = [v for v in skeleton.model.variables if "seed_generator" in v.path]
    assert states
    assert all(np.asarray(state.value).tolist() == [0, 0] for state in states)
