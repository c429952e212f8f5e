"""A block whose layers have several widths is exported as the weights that the artifact holds."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.artifact.bit_packing import unpack_bits
from pipeline.composition.composed_plan import read_given_run
from pipeline.export.checkpoint import Checkpoint, plan_checkpoint
from pipeline.model.preset import read_preset
from pipeline.plan import read_plan
from pipeline.run.commits import committed_file
from pipeline.storage.object_store import ObjectStore
from tests.pipeline.composition.composed_runs import composed_run, every_other_group
from tests.pipeline.export.runs import finished_run
from tests.pipeline.presets import shared_preset

GROUP_SIZE = 32
BLOCK = "model.layers.0"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    """Two blocks: in the first, layers of two runs, and the second of one run."""
    source = shared_preset("Llama3")
    runs = [
        finished_run(
            source,
            str(tmp_path_factory.mktemp(f"w{bits}")),
            {"mode": "gptq", "weight_bits": bits, "group_size": GROUP_SIZE, "symmetric": True},
        )[0]
        for bits in (4, 3)
    ]
    others = [every_other_group(read_given_run(runs[0]), 0, 1)]
    picked = [0] * read_plan(runs[0]).num_blocks
    store, _ = composed_run(runs, picked, str(tmp_path_factory.mktemp("mixed")), others)
    return store


def exported(run: ObjectStore, as_format: str) -> tuple[Checkpoint, dict[str, np.ndarray]]:
    artifact = read_preset(f"{run.root_url}/artifact")
    found = plan_checkpoint(read_plan(run), artifact, as_format)  # type: ignore[arg-type]
    tensors: dict[str, np.ndarray] = {}
    for part in found.parts:
        tensors |= found.encode(part.number, committed_file(run, part.number))
    return found, tensors


def test_codes_of_each_width_are_the_weights_of_the_dense_checkpoint(mixed: ObjectStore) -> None:
    packed, stored = exported(mixed, "compressed-tensors")
    _, dense = exported(mixed, "dense")
    config = packed.config_json()["quantization_config"]
    bits_of = {
        module: group["weights"]["num_bits"]
        for group in config["config_groups"].values()
        for module in group["targets"]
    }
    assert set(bits_of) == set(packed.formats)
    for module, bits in bits_of.items():
        weight = dense.pop(f"{module}.weight")
        codes = unpack_bits(stored[f"{module}.weight_packed"], bits, weight.shape[1])
        scale = stored[f"{module}.weight_scale"][:, np.arange(weight.shape[1]) // GROUP_SIZE]
        values = (codes - np.float32(2 ** (bits - 1))) * scale
        np.testing.assert_allclose(values, weight, rtol=1e-6, atol=1e-9)
    for name, value in dense.items():
        np.testing.assert_array_equal(stored[name], value)


def test_what_runtimes_fuse_has_one_width(mixed: ObjectStore) -> None:
    found, _ = exported(mixed, "compressed-tensors")
    of_block = {m: one.bits for m, one in found.formats.items() if m.startswith(f"{BLOCK}.")}
    together = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert [of_block.pop(f"{BLOCK}.{name}") for name in together] == [4, 4, 4]
    assert [of_block.pop(f"{BLOCK}.mlp.{name}") for name in ("gate_proj", "up_proj")] == [4, 4]
    assert of_block == {f"{BLOCK}.self_attn.o_proj": 3, f"{BLOCK}.mlp.down_proj": 3}
    assert not [row.module for row in found.report() if "fuses" in row.reason]
