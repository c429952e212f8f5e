"""Statistics of experts are those of the rows that the router sends to each, in stock Keras."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import keras
import keras_hub
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import SourceError
from pipeline.model.preset import read_preset
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.recipe.recipe import Rule
from pipeline.run.worker_api import Values
from pipeline.storage.object_store import open_store
from pipeline.worker.statistics import finished, sum_routed
from pipeline.worker.worker import Worker
from quantizer import HessianSum
from quantizer.experts import ExpertHessians, InputStatistics
from quantizer.keras_format.generated_names import apart
from quantizer.schemes import GPTQScheme, Int8Scheme
from tests.families.tiny_families import shared_family
from tests.integration.quantized import recipe
from tests.selection import by_default

FAMILIES = ["Mixtral", "QwenMoe", "Qwen3Moe", "GptOss", "Gemma4 with experts"]
DOCUMENTS = [f"document {i}: " + "some more words about it, " * (i % 5) for i in range(7)]


def padded_plan(family: str, folder: Path) -> Planned:
    """Windows of one short document each, so that most end in padding."""
    paths = []
    for index, document in enumerate(DOCUMENTS):
        path = folder / f"{index}.txt"
        path.write_text(document)
        paths.append(str(path))
    # Stock KerasHub cannot build GPT-OSS with an attention in gptq.
    attention = Rule(pattern="attention|linear_attn", scheme=Int8Scheme())
    scheme = GPTQScheme(weight_bits=4, group_size=16, scale_search=False)
    wanted = recipe(scheme, attention)
    assert wanted.calibration is not None
    calibration = wanted.calibration.model_copy(
        update={
            "texts": tuple(paths),
            "num_samples": len(paths),
            "sequence_length": 24,
            "packing": False,
        }
    )
    wanted = wanted.model_copy(update={"calibration": calibration, "allow_partial": True})
    return make_plan(read_preset(str(shared_family(family))), wanted, threads=2)


@dataclass
class Seen:
    """What stock Keras computed with banks, by the bank's path, and the choices of its routers."""

    inputs: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    choices: list[NDArray[Any]] = field(default_factory=list)


@contextmanager
def watched(banks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Record the products with these variables, by watching Keras' own operations."""
    seen, einsum, top_k, cast = Seen(), keras.ops.einsum, keras.ops.top_k, keras.ops.cast
    of_value: dict[int, str] = {id(variable): path for path, variable in banks.items()}

    def watch_cast(value: Any, dtype: Any) -> Any:
        made = cast(value, dtype)
        if id(value) in of_value:
            of_value[id(made)] = of_value[id(value)]
            kept.append(made)
        return made

    def watch_einsum(equation: str, given: Any, kernel: Any, **kwargs: Any) -> Any:
        if id(kernel) in of_value:
            seen.inputs[of_value[id(kernel)]] = np.asarray(given, np.float64)
        return einsum(equation, given, kernel, **kwargs)

    def watch_top_k(*args: Any, **kwargs: Any) -> Any:
        values, indices = top_k(*args, **kwargs)
        seen.choices.append(np.asarray(indices))
        return values, indices

    kept: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(keras.ops, "einsum", watch_einsum)
        patched.setattr(keras.ops, "top_k", watch_top_k)
        patched.setattr(keras.ops, "cast", watch_cast)
        yield seen


@pytest.mark.parametrize(
    "family",
    [
        *by_default(FAMILIES, []),
        # Its linear attention takes long in stock Keras, uncompiled.
        pytest.param("Qwen3_5Moe", marks=pytest.mark.slow),
    ],
)
def test_captured_statistics_are_of_the_rows_that_the_router_sends(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = padded_plan(family, tmp_path)
    assert given.windows is not None
    store = open_store(f"memory://experts/{family}")
    store.put(given.windows.key, given.windows.to_bytes())
    worker = Worker(given.plan, str(shared_family(family)), store.root_url)
    tokens, mask = given.windows.tokens, given.windows.mask
    assert not mask.all()
    planned = [layer for part in given.plan.parts[1:] for layer in part.layers if layer.experts]
    assert all(layer.scheme for layer in planned)

    with apart():  # so that Keras numbers names as in the plan
        backbone = keras_hub.models.Backbone.from_preset(str(shared_family(family)))
    by_path = {variable.path: variable for variable in backbone.weights}
    banks = {layer.path: by_path[layer.path] for layer in planned}
    inputs = {
        "token_ids": tokens,
        "padding_mask": mask.astype(np.int32),
        "position_ids": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
    }
    with watched(banks, monkeypatch) as seen:
        backbone({name: inputs[name] for name in backbone.input}, training=False)
    assert len(seen.choices) == given.plan.num_blocks

    worker.restore(0, [0], 0)
    kept = mask.reshape(-1)
    for block, part in enumerate(given.plan.parts[1:]):
        values, layers = worker.read(block + 1), {layer.name: layer for layer in part.layers}
        for stage, group in enumerate(part.groups):
            of_experts = [layers[name] for name in group.targets if layers[name].experts]
            for layer in of_experts:
                rows = seen.inputs[layer.path]
                if not group.experts:
                    found = captured(worker, block, stage, values)
                    assert isinstance(found, HessianSum)
                    assert found.num_rows == kept.sum()
                    assert_gram(found.gram_CC, rows.reshape(-1, rows.shape[-1])[kept])
                    continue
                routed = captured(worker, block, stage, values, range(4))
                assert isinstance(routed, ExpertHessians)
                for expert in range(4):
                    chosen = kept & (seen.choices[block] == expert).any(1)
                    one = routed.of_expert(expert)
                    assert one.num_rows == chosen.sum()
                    assert_gram(one.gram_CC, rows[expert][chosen])
                some = captured(worker, block, stage, values, range(1, 3))
                assert isinstance(some, ExpertHessians)
                for expert in range(1, 3):
                    np.testing.assert_array_equal(
                        some.of_expert(expert).gram_CC, routed.of_expert(expert).gram_CC
                    )
        worker.propagate(block, [0], values)
    assert set(seen.inputs) == set(banks)


def test_a_block_whose_output_depends_on_other_tokens_of_an_expert_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here each token also takes a little of the experts that it is not sent to."""
    one_hot = keras.ops.one_hot
    monkeypatch.setattr(keras.ops, "one_hot", lambda *args: 0.1 + one_hot(*args))
    given = padded_plan("Mixtral", tmp_path)
    assert given.windows is not None
    store = open_store("memory://experts/not-routed")
    store.put(given.windows.key, given.windows.to_bytes())
    worker = Worker(given.plan, str(shared_family("Mixtral")), store.root_url)
    worker.restore(0, [0], 0)
    [stage] = [i for i, group in enumerate(given.plan.parts[1].groups) if group.experts]
    with pytest.raises(SourceError, match=r"transformer_layer_0: .*give its experts int8") as found:
        worker.capture(0, stage, range(1), worker.read(1), experts=range(4))
    assert "\n" not in str(found.value)


def captured(
    worker: Worker, block: int, stage: int, values: Values, experts: range | None = None
) -> InputStatistics:
    held = worker.capture(block, stage, range(1), values, experts=experts)
    return finished(worker.send(held))


def assert_gram(found: ArrayLike, rows: NDArray[np.float64]) -> None:
    expected = rows.T @ rows
    scale = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(found, expected, atol=3e-5 * scale, rtol=0)


@pytest.mark.parametrize("routed_to", [range(6), range(1), range(2, 5)], ids=["all", "one", "some"])
def test_experts_are_summed_over_their_rows_alone(routed_to: range) -> None:
    """Rows of other experts may be anything, and an expert without rows has a sum of zeros."""
    num_experts, num_rows, in_features = 6, 700, 520
    random = np.random.default_rng(0)
    per_row = min(2, len(routed_to))
    rows = random.normal(size=(num_experts, num_rows, in_features)).astype(np.float32)
    choice = np.stack([random.permutation(routed_to)[:per_row] for _ in range(num_rows)])
    mask = random.random(num_rows) < 0.8
    member = np.zeros((num_experts, num_rows), bool)
    for one in choice.T:
        member[one, np.arange(num_rows)] = True
    rows[~member] = np.nan
    member &= mask
    batch = (jnp.asarray(rows), jnp.asarray(choice, jnp.int32), mask)
    found = finished(sum_routed([batch, batch], in_features, range(num_experts)))
    assert isinstance(found, ExpertHessians)
    np.testing.assert_array_equal(found.rows_E, 2 * member.sum(1))
    for expert in range(num_experts):
        taken = rows[expert][member[expert]].astype(np.float64)
        assert_gram(found.of_expert(expert).gram_CC / 2, taken)
