"""What is recorded of a converter's NumPy gives what NumPy gives, and holds little meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pipeline.model.recorded_tensors import (
    RecordedTensor,
    Stored,
    carried_out,
    keeps_rows,
    only_moves,
    stored_tensors,
)

VALUES = {
    f"{name}{expert}": np.random.default_rng([expert, ord(name)]).normal(size=(4, 6)).astype("f4")
    for expert in range(3)
    for name in "gu"
}
CODES = {"codes": np.arange(48, dtype=np.uint8).reshape(3, 4, 4), "scales": np.ones((3, 4), "u1")}


def read(stored: Stored) -> Any:
    return {**VALUES, **CODES}[stored.name]


def nothing_is_read(stored: Stored) -> Any:
    raise AssertionError(stored.name)


def given(name: str, reads: Callable[[Stored], Any] = nothing_is_read) -> RecordedTensor:
    value = {**VALUES, **CODES}[name]
    return RecordedTensor(Stored(name=name, shape=value.shape, dtype=value.dtype), reads)


def bank(tensor: Callable[[str], Any]) -> Any:
    """As KerasHub's converters join the tensors of experts."""
    each = [
        np.concatenate([np.transpose(tensor(f"g{e}"), axes=(1, 0)), tensor(f"u{e}").T], axis=-1)
        for e in range(3)
    ]
    return np.stack(each, axis=0)


def decoded(tensor: Callable[[str], Any]) -> Any:
    """With everything that KerasHub's decoding of MXFP4 does."""
    codes, scales = tensor("codes"), 2.0 ** (tensor("scales").astype(np.float32) - 3.0)
    experts, outputs, length = codes.shape
    nibbles = np.stack([codes & 0xF, (codes >> 4) & 0xF], axis=-1)
    nibbles = nibbles.reshape(experts, outputs, 2 * length)
    sign, is_large = 1.0 - 2.0 * (nibbles & 1), nibbles != 0
    values = np.empty_like(nibbles, dtype=np.float32)
    values[is_large] = sign[is_large] * nibbles[is_large].astype(np.float32)
    values[~is_large] = sign[~is_large] / 2.0
    wide = np.repeat(scales[..., np.newaxis], 2 * length, axis=2)
    return np.transpose(values * wide.reshape(experts, outputs, 2 * length), (0, 2, 1))


def eagerly(name: str) -> Any:
    return {**VALUES, **CODES}[name]


@pytest.mark.parametrize("made", [bank, decoded])
def test_a_recipe_gives_what_numpy_gives_and_its_shape_before(made: Callable[..., Any]) -> None:
    recorded, expected = made(given), made(eagerly)
    assert recorded.shape == expected.shape
    found = carried_out(recorded.step, read)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_tensors_are_known_in_their_order() -> None:
    names = [stored.name for stored in stored_tensors(bank(given).step)]
    assert names == ["g0", "u0", "g1", "u1", "g2", "u2"]


def test_what_moves_is_told_from_what_decodes() -> None:
    assert only_moves(bank(given).step)
    assert only_moves(given("g0")[:2, None].step)
    assert not only_moves(decoded(given).step)
    assert not only_moves((given("g0") + 1).step)


def test_stacks_hold_one_part_beside_themselves() -> None:
    held: list[weakref.ref[Any]] = []
    most = []

    def new(stored: Stored) -> Any:
        value = np.ones(stored.shape, np.float32)
        most.append(1 + sum(earlier() is not None for earlier in held))
        held.append(weakref.ref(value))
        return value

    each = [Stored(name=f"t{e}", shape=(4, 6), dtype=np.dtype("f4")) for e in range(60)]
    parts = [RecordedTensor(stored, nothing_is_read).T for stored in each]
    carried_out(np.stack(parts, axis=0).step, new)
    assert len(most) == 60
    assert max(most) <= 2


def test_a_tensor_is_read_once_however_often_it_is_taken() -> None:
    reads = []
    tensor = given("g0")
    found = carried_out(
        np.stack([tensor, tensor * 2, tensor], axis=0).step,
        lambda stored: reads.append(stored.name) or read(stored),
    )
    assert reads == ["g0"]
    np.testing.assert_array_equal(found[1], VALUES["g0"] * 2)


def test_what_is_still_needed_is_not_overwritten() -> None:
    def both(tensor: Callable[[str], Any]) -> Any:
        ones = tensor("g0") * 0.0 + 1.0
        before = ones * 1.0
        before[tensor("g0") > 0] = 5.0
        return np.stack([ones, before], axis=0)

    np.testing.assert_array_equal(carried_out(both(given).step, read), both(eagerly))


def test_a_stack_of_transposed_parts_lies_as_they_do() -> None:
    found = carried_out(bank(given).step, read)
    assert found[1].T.flags.c_contiguous


@pytest.mark.parametrize(
    ("made", "keeps"),
    [
        (decoded, True),
        (lambda tensor: tensor("codes")[..., None], True),
        (lambda tensor: tensor("codes")[:1] + tensor("codes"), False),
        (lambda tensor: np.stack([tensor("codes")], axis=0), False),
        (lambda tensor: np.transpose(tensor("codes"), (1, 0, 2)), False),
        (lambda tensor: np.concatenate([tensor("codes")], axis=0), False),
    ],
    ids=["decoded", "widened", "first", "stacked", "transposed", "concatenated"],
)
def test_a_row_is_made_of_rows_where_that_is_the_same(
    made: Callable[..., Any], keeps: bool
) -> None:
    def one_row(name: str) -> RecordedTensor:
        stored = given(name).step
        assert isinstance(stored, Stored)
        return RecordedTensor(replace(stored, shape=(1, *stored.shape[1:])), nothing_is_read)

    step = made(one_row).step
    assert keeps_rows(step) == keeps
    if keeps:
        rows = [carried_out(step, lambda s, r=r: read(s)[r : r + 1]) for r in range(3)]
        np.testing.assert_array_equal(np.concatenate(rows), made(eagerly))


def test_what_is_not_recorded_is_computed_at_once() -> None:
    reads: list[str] = []

    def noted(stored: Stored) -> Any:
        reads.append(stored.name)
        return read(stored)

    tensor = given("g0", noted)
    np.testing.assert_array_equal(tensor[0], VALUES["g0"][0])
    assert np.sum(tensor) == VALUES["g0"].sum()
    assert tensor.mean() == VALUES["g0"].mean()
    np.testing.assert_array_equal(np.asarray(tensor), VALUES["g0"])
    assert reads == ["g0"] * 4


def test_floats_keep_their_bits() -> None:
    """As a converter would round them to float16, whatever the model's dtype."""
    value = np.full((2, 2), 1e9, np.float32).astype(ml_dtypes.bfloat16)
    stored = Stored(name="a", shape=(2, 2), dtype=value.dtype)
    cast = RecordedTensor(stored, nothing_is_read).astype(np.float16)
    found = carried_out(cast.step, lambda _: value)
    assert found.dtype == ml_dtypes.bfloat16


def test_an_expert_of_another_shape_is_named() -> None:
    other = RecordedTensor(Stored(name="odd", shape=(4, 7), dtype=np.dtype("f4")), nothing_is_read)
    with pytest.raises(ValueError, match=r"odd gives \(7, 4\), where \(6, 4\) is expected"):
        np.stack([given("g0").T, other.T], axis=0)
