"""Experts leave in codes that stand for the artifact's values; what no runtime reads is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.artifact.bit_packing import unpack_bits
from pipeline.artifact.parts import decode_part
from pipeline.artifact.safetensors_file import read_safetensors
from pipeline.errors import ExportError
from pipeline.export.checkpoint import Checkpoint, plan_checkpoint
from pipeline.export.code_formats import ExportFormat
from pipeline.export.writing import write_checkpoint
from pipeline.model.preset import read_preset
from pipeline.plan import read_plan
from pipeline.run.commits import committed_file, read_manifest
from pipeline.storage.object_store import ObjectStore, open_store
from tests.families.tiny_families import shared_family
from tests.models.expert_configs import config_folder
from tests.pipeline.export.runs import checkpoint_of, finished_run
from tests.selection import by_default

SYMMETRIC = {"mode": "gptq", "weight_bits": 4, "group_size": 16, "symmetric": True}
FAMILIES = by_default(["Mixtral", "Qwen3Moe"], ["Mixtral"])


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def made(family: str) -> ObjectStore:
        folder = tmp_path_factory.mktemp("experts")
        return finished_run(shared_family(family), str(folder), SYMMETRIC)[0]

    return made


def exported(
    run: ObjectStore, family: str, folder: Path, as_format: ExportFormat
) -> tuple[Checkpoint, dict[str, NDArray[Any]]]:
    """A run's checkpoint, and its tensors by name."""
    like = str(config_folder(family, folder / "like"))
    artifact = read_preset(f"{run.root_url}/artifact")
    checkpoint = plan_checkpoint(read_plan(run), artifact, as_format, like_url=like)
    store = open_store(str(folder / as_format))
    made = write_checkpoint(checkpoint, run, read_manifest(run), store)
    tensors: dict[str, NDArray[Any]] = {}
    for name in made.files:
        if name.endswith(".safetensors"):
            tensors |= read_safetensors(store.get(name))[0]
    return checkpoint, tensors


def artifact_values(run: ObjectStore, checkpoint: Checkpoint) -> Mapping[str, NDArray[Any]]:
    """The artifact's variables, by path."""
    found = {}
    for part in checkpoint.parts:
        values = decode_part(part, committed_file(run, part.number))
        found |= {str(one.variable.path): values[one.name_path] for one in part.variables}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_of_experts_stand_for_the_artifacts_values(
    family: str, run_of: Any, tmp_path: Path
) -> None:
    run = run_of(family)
    checkpoint, tensors = exported(run, family, tmp_path, "compressed-tensors")
    values = artifact_values(run, checkpoint)
    experts = checkpoint.places.experts
    assert len(experts) == 2 * 4 * 3
    covered = {path: np.zeros(values[path].shape, bool) for path in values}
    for name, one in experts.items():
        module = checkpoint.names[name].removesuffix(".weight")
        assert f"{module}.weight" not in tensors
        assert tuple(tensors[f"{module}.weight_shape"]) == one.shape
        codes = unpack_bits(tensors[f"{module}.weight_packed"], 4, one.in_features)
        scale = np.repeat(tensors[f"{module}.weight_scale"], 16, axis=1)
        expected = one.of(values[one.variable])
        np.testing.assert_array_equal((codes.astype(np.float32) - 8) * scale, expected)
        one.of(covered[one.variable])[:] = True
    assert all(covered[path].all() for path in {one.variable for one in experts.values()})
    rows = {row.module: row for row in checkpoint.report()}
    assert rows[checkpoint.names[next(iter(experts))].removesuffix(".weight")].scheme == "gptq/4/16"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_checkpoint_has_the_values_of_experts(
    family: str, run_of: Any, tmp_path: Path
) -> None:
    run = run_of(family)
    checkpoint, tensors = exported(run, family, tmp_path, "dense")
    values = artifact_values(run, checkpoint)
    for name, one in checkpoint.places.experts.items():
        np.testing.assert_array_equal(tensors[checkpoint.names[name]], one.of(values[one.variable]))


def planned(family: str, scheme: Mapping[str, Any], folder: Path, **settings: Any) -> Checkpoint:
    as_format = settings.pop("as_format", "compressed-tensors")
    like = str(config_folder(family, folder))
    return checkpoint_of(shared_family(family), scheme, as_format, like_url=like, **settings)


def test_every_experts_module_is_named_by_a_pattern_of_a_group(tmp_path: Path) -> None:
    rules = [{"pattern": "attention", "scheme": SYMMETRIC | {"weight_bits": 8}}]
    checkpoint = planned("Mixtral", SYMMETRIC, tmp_path, rules=rules)
    groups = checkpoint.config_json()["quantization_config"]["config_groups"].values()
    [own] = (one for one in groups if any("experts" in name for name in one["targets"]))
    assert own["weights"]["num_bits"] == 4
    patterns = [name.removeprefix("re:") for name in own["targets"]]
    modules = [name for name in checkpoint.formats if "experts" in name]
    assert len(patterns) == 6
    assert len(modules) == 24
    for module in modules:
        assert len([one for one in patterns if re.search(one, module)]) == 1


EXPERTS = "expert_feedforward"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "asymmetric": (SYMMETRIC | {"symmetric": False}, {}, "no zero points of experts.*symmetric"),
    "gptq": (SYMMETRIC, {"as_format": "gptq"}, "compressed-tensors alone"),
    "two schemes": (
        SYMMETRIC,
        {"rules": [{"pattern": f"{EXPERTS}_output", "scheme": SYMMETRIC | {"weight_bits": 8}}]},
        "experts of one scheme",
    ),
    "groups": (
        SYMMETRIC | {"group_size": 24},
        {"rules": [{"pattern": "attention", "scheme": None}]},
        "32 inputs are not divisible into groups of 24",
    ),
}


@pytest.mark.parametrize("case", by_default(REFUSED, ["asymmetric"]))
def test_what_no_runtime_reads_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    scheme, settings, problem = REFUSED[case]
    with pytest.raises(ExportError, match=problem) as caught:
        planned("Mixtral", scheme, tmp_path, **dict(settings))
    assert "\n" not in str(caught.value)
