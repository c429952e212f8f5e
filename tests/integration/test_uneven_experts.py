"""Experts that a router leaves out, or sends everything to, and what is wrong in one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from jobs.expert_summary import ExpertSummary
from pipeline.errors import SourceError
from pipeline.model.preset import read_preset
from pipeline.planning.make_plan import make_plan
from pipeline.run.records import PartRecord, record_key
from quantizer.schemes import GPTQScheme
from tests.families.tiny_families import FAMILIES, tiny_family
from tests.integration.quantized import finished_run, recipe

SCHEME = GPTQScheme(weight_bits=4, group_size=16, scale_search=False)
DOWN = "experts/expert_feedforward_output_dense"


def changed_mixtral(path: Path, name: str, change: Callable[[Any], None], **options: Any) -> Path:
    """A tiny Mixtral, of which some arrays are changed in place.

    Args:
        name: part of the path of these arrays' group in the file.
    """
    [family] = (family for family in FAMILIES if family.name == "Mixtral")
    wanted = dataclasses.replace(family, options={**family.options, **options})
    preset = tiny_family(wanted, path)
    found = []
    with h5py.File(preset / "model.weights.h5", "r+") as file:

        def visit(where: str, item: Any) -> None:
            if name in where and isinstance(item, h5py.Dataset):
                found.append(where)
                change(item)

        file.visititems(visit)
    assert found
    return preset


def all_alike(router: Any) -> None:
    """Of experts with the same score, top_k takes the first."""
    router[...] = np.zeros(router.shape, np.float32)


def experts_of(record: PartRecord) -> dict[str, Any]:
    [account] = (layer.account for layer in record.layers if layer.path.endswith(DOWN))
    assert account is not None
    return account


@pytest.mark.exhaustive
@pytest.mark.parametrize("per_token", [1, 2])
def test_experts_that_no_token_reaches_are_rounded_and_named(
    per_token: int, tmp_path: Path
) -> None:
    preset = changed_mixtral(
        tmp_path / "source", "sparse_feedforward_gate_dense", all_alike, top_k=per_token
    )
    run = finished_run(preset, recipe(SCHEME), tmp_path / "run")
    assert run.plan.tokens is not None
    num_tokens = run.plan.tokens.num_samples * run.plan.tokens.sequence_length
    for part in (1, 2):
        account = experts_of(PartRecord.from_json(run.store.get(record_key(part))))
        found = account["experts"]
        assert found["tokens"] == [0, 0, num_tokens]
        [(reason, numbers)] = found["rounded"].items()
        assert "no token" in reason
        assert numbers == list(range(per_token, 4))
        assert account["num_rows"] == per_token * num_tokens
        assert account["output_error"] < account["rtn_output_error"]
    records = [PartRecord.from_json(run.store.get(record_key(part))) for part in (1, 2)]
    summary = ExpertSummary.of(run.plan, records)
    assert summary is not None
    assert summary.rounded == 2 * (4 - per_token)
    [*_, (_, text)] = summary.rows()
    assert f"expert {per_token} of transformer_layer_0/" in text
    assert reason in text


def test_a_nan_in_an_expert_is_refused_by_layer_and_expert_before_anything_is_written(
    tmp_path: Path,
) -> None:
    def spoil(bank: Any) -> None:
        if bank.shape == (4, 64, 32) and "decoder_1" in bank.name:
            bank[3, 5, 7] = np.nan

    preset = changed_mixtral(tmp_path / "source", "expert_bank", spoil)
    where = r"decoder_1/.*expert_bank/vars/2: 1 of 8192 values are NaN .* at \[3, 5, 7\]"
    with pytest.raises(SourceError, match=where) as refused:
        make_plan(read_preset(str(preset)), recipe(SCHEME), threads=1)
    assert "\n" not in str(refused.value)


@pytest.mark.exhaustive
def test_an_expert_whose_inputs_are_too_large_to_calibrate_it_is_rounded_alone(
    tmp_path: Path,
) -> None:

    def enlarge(bank: Any) -> None:
        if bank.shape == (4, 32, 64) and "decoder_1" in bank.name:
            bank[1] = np.float32(1e7) * bank[1]

    preset = changed_mixtral(tmp_path / "source", "expert_bank", enlarge)
    run = finished_run(preset, recipe(SCHEME), tmp_path / "run")
    account = experts_of(PartRecord.from_json(run.store.get(record_key(2))))
    [(reason, numbers)] = account["experts"]["rounded"].items()
    assert "too large to solve in float32" in reason
    assert numbers == [1]
    assert account["output_error"] < account["rtn_output_error"]
