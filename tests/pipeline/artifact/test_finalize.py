"""How a part's file is encoded follows from its plan."""

import dataclasses
import io

import h5py
import numpy as np
import pytest

from pipeline.artifact.parts import decode_part, encode_solved_part
from pipeline.plan import Plan
from pipeline.run.records import file_key
from tests.pipeline.tiny_runs import model_state, planned, source


@pytest.fixture(scope="module")
def part():
    plan = planned("float8").plan
    return model_state(plan.to_json(), str(source())).parts[1]


def some_values(part):
    """Few distinct values, as float8 kernels have, large enough to be compressed."""
    rng = np.random.default_rng(0)
    return {
        str(stored.variable.path): (rng.integers(-8, 8, stored.shape) / 8).astype(stored.dtype)
        for stored in part.variables
    }


def compressions(data):
    found = set()

    def visit(_, item):
        if isinstance(item, h5py.Dataset):
            found.add(item.compression)

    with h5py.File(io.BytesIO(data)) as file:
        file.visititems(visit)
    return found


def test_only_plans_with_float8_mention_a_weights_format():
    for scheme in ("gptq", "int8"):
        assert planned(scheme).plan.weights_format == 1
        assert b"weights_format" not in planned(scheme).plan.to_json()
    assert planned("float8").plan.weights_format == 2


def test_a_float8_plan_of_the_first_format_is_still_read_and_encodes_plain_files(part):
    new = planned("float8").plan
    old = dataclasses.replace(new, weights_format=1)
    assert b"weights_format" not in old.to_json()
    assert Plan.from_json(old.to_json()) == old
    assert old.digest != new.digest
    values = some_values(part)
    plain = encode_solved_part(old, part, "", values, {})[1][file_key(1)]
    assert compressions(plain) == {None}
    assert len(plain) > part.num_bytes


def test_the_second_format_compresses_float8_kernels_and_changes_no_value(part):
    values = some_values(part)
    plan = planned("float8").plan
    record, files = encode_solved_part(plan, part, "", values, {})
    [data] = files.values()
    assert compressions(data) == {None, "gzip"}
    assert record.size_bytes == len(data) < 0.6 * record.loaded_bytes
    found = decode_part(part, data)
    for stored in part.variables:
        np.testing.assert_array_equal(found[stored.name_path], values[str(stored.variable.path)])
