from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import h5py
import pytest
from rich.console import Console

from jobs.logging import configure
from jobs.plan_summary import plan_table
from jobs.summary import Summary, summary_table
from pipeline.errors import DamagedObjectError
from pipeline.evaluation.answers import Accuracy, TaskFidelity
from pipeline.executor.protocol import Allocation
from pipeline.fidelity import Fidelity
from pipeline.model.preset import read_preset
from pipeline.planning.estimates import estimate
from pipeline.planning.make_plan import make_plan
from pipeline.recipe.recipe import Rule
from pipeline.run.commits import read_manifest
from pipeline.run.records import PartRecord
from pipeline.storage.object_store import ObjectStore, open_store
from quantizer.schemes import Int8Scheme, Scheme
from tests.integration.quantized import SCHEMES, finished_run
from tests.integration.quantized import recipe as reads_text
from tests.models.tiny import tiny_preset
from tests.pipeline.tiny_runs import execute, planned, recipe, source


def finished(scheme: str, embeddings: Scheme | None = None) -> tuple[ObjectStore, Summary]:
    store = open_store(f"memory://test-summary/{scheme}-{embeddings}")
    given = planned(scheme)
    if embeddings is not None:
        changed = recipe(scheme).model_copy(update={"embeddings": embeddings})
        given = make_plan(read_preset(str(source())), changed, threads=2)
    manifest, _ = execute(given, store)
    plan = given.plan
    summary = Summary.of(
        plan,
        store,
        manifest,
        estimate(plan, 1),
        {"solve": 2.0, "read": 1.0},
        wall_seconds=4.0,
        fidelity=Fidelity(
            num_windows=1,
            count=9,
            source_perplexity=10.0,
            result_perplexity=11.0,
            divergence=0.1,
            agreement=0.5,
        ),
    )
    return store, summary


def shown_summary(summary: Summary) -> str:
    stream = io.StringIO()
    Console(file=stream, width=160).print(summary_table(summary))
    return stream.getvalue()


def test_what_to_know_of_quantized_layers_is_not_said_of_layers_in_float() -> None:
    _, summary = finished("int8")
    known = dataclasses.replace(summary, layer_notes={"block/dense": "not foldable: so"})
    lines = [line.rstrip() for line in shown_summary(known).splitlines()]
    assert "block/dense: not foldable: so" in lines
    assert not any("left in float: block/dense" in line for line in lines)


def test_a_summary_adds_up_the_records() -> None:
    store, summary = finished("gptq")
    records = [PartRecord.from_json(store.get(key)) for key in store.list("records/")]
    assert summary.stored_bytes == sum(len(store.get(record.file)) for record in records)
    assert summary.loaded_bytes == sum(record.loaded_bytes for record in records)
    accounts = [layer.account for r in records for layer in r.layers if layer.account]
    [row] = summary.schemes
    assert row.layers == len(accounts) == 21
    ratios = [a["output_error"] / a["rtn_output_error"] for a in accounts]
    assert row.error_against_rtn == sum(ratios) / len(ratios)
    assert row.error_against_rtn < 1
    assert json.loads(json.dumps(summary.to_dict()))["schemes"][0]["scheme"] == "gptq/4/32"


def test_summary_and_plan_say_what_share_of_the_model_is_quantized() -> None:
    _, summary = finished("int8")
    plan = planned("int8").plan
    sizes = {layer.path: layer.num_weights for part in plan.parts for layer in part.layers}
    kernels = sum(size for path, size in sizes.items() if "embedding" not in path)
    assert kernels < sum(sizes.values())
    wanted = (
        f"{kernels / sum(sizes.values()):.1%} of the model's weights, 100.0% of those that the "
        "recipe asks for"
    )
    assert wanted in shown_summary(summary)
    assert summary.to_dict()["share"]["of_recipe"] == 1.0
    stream = io.StringIO()
    Console(file=stream, width=160).print(
        plan_table(plan, estimate(plan, 1), Allocation(workers=1, threads=1))
    )
    assert wanted in stream.getvalue()


def test_the_stored_bytes_are_those_of_blocks_embeddings_and_the_rest() -> None:
    _, kept = finished("int8")
    _, reduced = finished("int8", Int8Scheme())
    for summary in (kept, reduced):
        parts = (summary.block_bytes, summary.embedding_bytes, summary.rest_bytes)
        assert sum(parts) == summary.stored_bytes
        assert all(summary.to_dict()[f"{name}_bytes"] > 0 for name in ("block", "rest"))
    assert kept.embedding_bytes == 273 * 64 * 4
    assert 3.5 < kept.embedding_bytes / reduced.embedding_bytes < 4
    assert kept.block_bytes == reduced.block_bytes
    assert shown_summary(kept).count("embeddings 68.2 KiB") == 1


def test_weights_that_are_not_hdf5_are_damaged() -> None:
    store, _ = finished("int8")
    record = PartRecord.from_json(store.get("records/rest.json"))
    copy = open_store("memory://test-summary/damaged")
    for key in store.list():
        copy.put(key, bytes(record.size_bytes) if key == record.file else store.get(key))
    plan = planned("int8").plan
    with pytest.raises(DamagedObjectError, match=r"model_00000\.weights\.h5: not valid HDF5"):
        Summary.of(
            plan,
            copy,
            read_manifest(copy),
            estimate(plan, 1),
            {},
            wall_seconds=0.0,
            fidelity=None,
        )


def test_damaged_token_windows_cost_a_finished_run_only_what_they_showed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, whole = finished("gptq")
    assert whole.coverage is not None
    plan = planned("gptq").plan
    assert plan.tokens is not None
    copy = open_store("memory://test-summary/damaged-windows")
    for key in store.list():
        content = store.get(key)
        copy.put(key, content[:-1] + b"?" if key == plan.tokens.key else content)
    configure("text")
    summary = Summary.of(
        plan,
        copy,
        read_manifest(copy),
        estimate(plan, 1),
        whole.seconds,
        wall_seconds=whole.wall_seconds,
        fidelity=whole.fidelity,
    )
    assert summary.coverage is None
    assert summary.stored_bytes == whole.stored_bytes
    assert f"{plan.tokens.key} is damaged" in " ".join(capsys.readouterr().err.split())


def test_a_scheme_without_calibration_has_no_comparison() -> None:
    _, summary = finished("int8")
    [row] = summary.schemes
    assert row.error_against_rtn is None
    assert row.weight_error is not None
    assert (row.rounded, row.damped) == (0, 0)


def test_the_table_shows_sizes_quality_and_time() -> None:
    _, summary = finished("gptq")
    text = shown_summary(summary)
    for part in ("10.000 → 11.000", "KL 0.1000", "50.0%", "4.0 in all", summary.manifest_sha256):
        assert part in text


def test_tasks_and_the_worst_tokens_stand_with_the_quality() -> None:
    _, summary = finished("int8")
    before, after = (
        Accuracy(acc=acc, acc_stderr=0.0501, acc_norm=acc, acc_norm_stderr=0.05)
        for acc in (0.5, 0.45)
    )
    task = TaskFidelity(
        name="arc", num_questions=100, truncated=3, source=before, result=after, flips=7,
        changed=9, recovery=0.9, divergence=0.1,
    )  # fmt: skip
    assert summary.fidelity is not None
    both = dataclasses.replace(summary.fidelity, divergence_p99=0.75, tasks=(task,))
    shown = " ".join(shown_summary(dataclasses.replace(summary, fidelity=both)).split())
    assert "KL 0.1000 nats (p99 0.7500), same next token 50.0%" in shown
    assert "task arc acc 50.0% → 45.0% ± 5.0%, recovery 90.0%" in shown
    assert "7 of 100 questions flipped, 9 answered otherwise" in shown
    assert "3 choices were too long, and cut on the left" in shown
    alone = dataclasses.replace(both, num_windows=0, count=0, source_perplexity=None)
    assert "perplexity" not in shown_summary(dataclasses.replace(summary, fidelity=alone))


@pytest.mark.exhaustive
def test_inputs_that_calibration_never_saw_are_counted(tmp_path: Path) -> None:
    preset = tiny_preset("Llama3", tmp_path / "in", num_blocks=1)
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        norm = "layers/llama_transformer_decoder/_self_attention_layernorm/vars/0"
        file[norm][:16] = 0
    run = finished_run(preset, reads_text(SCHEMES["gptq8"]), tmp_path / "out")
    costs, manifest = estimate(run.plan, 1), read_manifest(run.store)
    summary = Summary.of(run.plan, run.store, manifest, costs, {}, wall_seconds=0.0, fidelity=None)
    layers = ("query", "key", "value")
    path = "transformer_layer_0/self_attention"
    assert summary.unseen_inputs == {f"{path}/{layer}": 16 for layer in layers}
    assert "48 inputs of 3 layers were zero" in shown_summary(summary)
    _, every = finished("gptq")
    assert every.unseen_inputs == {}
    assert "never seen" not in shown_summary(every)


def test_a_summary_tells_what_calibration_showed_and_warns(tmp_path: Path) -> None:
    preset = tiny_preset("Llama3", tmp_path / "in", num_blocks=1)
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        norm = "layers/llama_transformer_decoder/_self_attention_layernorm/vars/0"
        file[norm][:16] *= 1e-4
    run = finished_run(preset, reads_text(SCHEMES["gptq8"]), tmp_path / "out")
    costs, manifest = estimate(run.plan, 1), read_manifest(run.store)
    summary = Summary.of(run.plan, run.store, manifest, costs, {}, wall_seconds=0.0, fidelity=None)
    path = "transformer_layer_0/self_attention"
    assert summary.faint_inputs == {f"{path}/{name}": 16 for name in ("query", "key", "value")}
    assert summary.coverage is not None
    assert summary.to_dict()["coverage"]["num_tokens"] == summary.coverage.num_tokens
    assert summary.warnings[-1].startswith("in 3 layers more than 10% of the inputs had next to no")
    text = shown_summary(summary)
    assert "48 inputs of 3 layers had next to no energy" in text
    assert re.search(rf"calibrated on +{summary.coverage.num_tokens} tokens, ", text)
    assert f"warning: {summary.warnings[-1][:60]}" in text
    store, every = finished("gptq")
    assert every.faint_inputs == {}
    assert "faint_inputs" not in store.get("records/block-00000.json").decode()


def test_layers_that_calibration_gave_nan_are_named(tmp_path: Path) -> None:
    preset = tiny_preset("Llama3", tmp_path / "in", num_blocks=2)
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        # Finite in itself, as checkpoints must be; its products are not.
        file["layers/llama_transformer_decoder/_feedforward_layernorm/vars/0"][...] = 3e30
    run = finished_run(preset, reads_text(SCHEMES["awq"]), tmp_path / "out")
    costs, manifest = estimate(run.plan, 1), read_manifest(run.store)
    summary = Summary.of(run.plan, run.store, manifest, costs, {}, wall_seconds=0.0, fidelity=None)
    assert "transformer_layer_0/feedforward_output_dense" in summary.uncalibrated
    assert summary.uncalibrated.keys() < {layer.path for layer in run.layers().values()}
    assert any("transformer_layer_1" in path for path in summary.uncalibrated)
    assert not any("layer_0/self_attention" in path for path in summary.uncalibrated)
    text = shown_summary(summary)
    assert "the first transformer_layer_0/feedforward_" in text
    assert "not calibrated, rounded to nearest" in text


def shown(scheme: str, architecture: str = "Llama3") -> str:
    stream = io.StringIO()
    plan = planned(scheme, architecture).plan
    table = plan_table(plan, estimate(plan, 2), Allocation(workers=2, threads=3))
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_a_plan_shows_layers_schemes_costs_and_workers() -> None:
    text = shown("gptq")
    for part in (
        planned("gptq").plan.digest[:12],
        "self_attention/query",
        "gptq/4/32",
        "20 windows of 128 tokens in 2 shards",
        "2 × 3 threads",
        "peak of a worker",
    ):
        assert part in text
    assert "calibration" not in shown("int8")


def test_a_gpus_plan_shows_what_it_computes_in() -> None:
    plan = planned("gptq").plan
    assert "computed in" not in shown("gptq")
    assert plan.tokens is not None
    for attention, said in (("cudnn", "by cuDNN"), ("scores", "with all its scores in memory")):
        tokens = dataclasses.replace(
            plan.tokens,
            attention=attention,
            largest_array_bytes=8 << 30,  # type: ignore[arg-type]
        )
        on_gpu = dataclasses.replace(
            plan, machine={"platform": "gpu", "device": "NVIDIA H100"}, tokens=tokens
        )
        stream = io.StringIO()
        table = plan_table(on_gpu, estimate(on_gpu, 1), Allocation(workers=1, threads=1, gpus=1))
        Console(file=stream, width=200).print(table)
        expected = f"float32, attention {said}; the largest array of a micro-batch has 8.0 GiB"
        assert expected in stream.getvalue()
        assert "beside the GPUs" not in stream.getvalue()
        costs = estimate(on_gpu, 1).beside_devices()
        table = plan_table(on_gpu, costs, Allocation(workers=1, threads=1, gpus=1))
        Console(file=stream, width=200).print(table)
        assert "B, beside the GPUs, which have no room for them" in stream.getvalue()


def test_a_summary_compares_what_a_gpu_needed_with_the_estimate() -> None:
    _, summary = finished("gptq")
    assert "peak of a GPU" not in shown_summary(summary)
    on_gpu = dataclasses.replace(summary, device_bytes=40 << 30, device_peak_bytes=30 << 30)
    assert "30.0 GiB of about 40.0 GiB estimated" in shown_summary(on_gpu)


def test_every_reason_for_float_is_shown_once_with_a_layer() -> None:
    text = shown("gptq", "Bert")
    lines = [line for line in text.splitlines() if line.startswith("left in float: ")]
    assert len(lines) == len({line.split(": ", 2)[2] for line in lines}) >= 3


def test_layers_that_cannot_take_foldable_scales_are_shown() -> None:
    text = shown("awq-foldable", "GPT2")
    assert "transformer_layer_2/feedforward_output_dense: not foldable: no norm" in text
    assert "left in float: transformer_layer_2" not in text
    assert "not foldable" not in shown("awq-foldable")


def test_a_rule_that_matches_no_layer_is_shown() -> None:
    plan = planned("gptq").plan
    rules = tuple(Rule(pattern=p, scheme=None) for p in ("querry", "self_attention/key"))
    other = dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"rules": rules}))
    stream = io.StringIO()
    table = plan_table(other, estimate(other, 1), Allocation(workers=1, threads=1))
    Console(file=stream, width=200).print(table)
    lines = [line for line in stream.getvalue().splitlines() if "rule without a layer" in line]
    assert [line.split("'")[1] for line in lines] == ["querry"]
