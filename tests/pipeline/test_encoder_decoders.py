"""Encoder–decoders: the decoder is calibrated on what the quantized encoder gives it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import keras
import keras_hub
import numpy as np
import pytest

from pipeline.calibration.windows import TokenWindows
from pipeline.errors import SourceError
from pipeline.evaluation.batches import EvaluationSet
from pipeline.executor.protocol import ActivationPlace
from pipeline.fidelity import fidelity_of
from pipeline.model.blocks import find_blocks
from pipeline.model.inputs import input_layout
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.recipe.recipe import Calibration, Recipe
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.run.events import Step
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.worker import Worker
from quantizer.schemes import Float8Scheme, GPTQScheme, Int8Scheme, Scheme
from tests.families.tiny_families import shared_family
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.tiny_runs import PASSING, CrashError, crash_at, text_file
from tests.selection import by_default

pytestmark = [
    # KerasHub's T5 and Whisper.
    pytest.mark.filterwarnings("ignore:Layer '.*' .* was passed an input with a mask:UserWarning"),
]

GPTQ = GPTQScheme(weight_bits=4, group_size=16, scale_search=False)


def planned(family: str, scheme: Scheme, **inputs: str) -> Planned:
    calibration = Calibration(
        texts=(str(text_file()),), num_samples=3, sequence_length=24, inputs=inputs
    )
    recipe = Recipe(name="test", scheme=scheme, calibration=calibration)
    return make_plan(read_preset(str(shared_family(family))), recipe, threads=1)


def run(
    given: Planned,
    family: str,
    store: ObjectStore,
    report: Any = lambda step: None,
    place: ActivationPlace = "device",
) -> Worker:
    claim(store, given.plan, None if given.windows is None else given.windows.to_bytes())
    worker = Worker(given.plan, str(shared_family(family)), store.root_url)
    quantize(
        given.plan, store, LocalExecutor([worker]), report, keep_every=1, place=lambda _: place
    )
    return worker


def lasting(store: ObjectStore) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.list() if not key.startswith(PASSING)}


def test_values_pass_between_the_blocks_of_t5_for_as_long_as_they_are_used() -> None:
    graph = find_blocks(build_skeleton(read_preset(str(shared_family("T5")))))
    names = [graph.blocks[call.block].name for call in graph.calls]
    assert names == [
        "transformer_encoder_layer_0",
        "transformer_encoder_layer_1",
        "transformer_decoder_layer_0",
        "transformer_decoder_layer_1",
    ]
    # The hidden states and the position bias that the first block made; the last one's bias goes.
    assert [len(call.gives) for call in graph.calls] == [2, 1, 2, 1]
    assert [len(graph.carried(call)) for call in graph.calls] == [0, 2, 1, 3]
    [glue] = [call.glue for call in graph.calls if call.glue is not None]
    assert [v.path for v in glue.model.weights] == ["encoder_output_layer_norm/weight"]


def test_two_variables_of_one_path_are_told_apart() -> None:
    """KerasHub's T5 gives encoder and decoder biases the path self_attention/embeddings."""
    paths = [v.path for v in build_skeleton(read_preset(str(shared_family("T5")))).backbone.weights]
    assert len(set(paths)) == len(paths)
    assert "transformer_decoder_layer_0/self_attention/embeddings" in paths


@pytest.mark.parametrize("family", by_default(["Bart", "T5", "T5Gemma", "Whisper"], []))
def test_the_pieces_together_are_the_stock_model(family: str) -> None:
    source = shared_family(family)
    skeleton = build_skeleton(read_preset(str(source)))
    name = "WhisperBackbone" if family == "Whisper" else f"{family}Seq2SeqLM"
    stock = getattr(keras_hub.models, name).from_preset(str(source))
    for ours, theirs in zip(skeleton.model.variables, stock.variables, strict=True):
        ours.assign(theirs.value)
    graph, layout = find_blocks(skeleton), input_layout(skeleton)
    rng = np.random.default_rng(0)
    sounds = {"encoder_features": rng.normal(size=(2, 16, 80)).astype(np.float32)}
    windows = TokenWindows(
        tokens=rng.integers(5, 250, (2, 20)).astype(np.int32),
        lengths=np.array([20, 14], np.int32),
        fingerprint="",
        num_documents=0,
        decoder_start=(0,),
        inputs=sounds if family == "Whisper" else {},
    )
    batch = layout.batch(windows, slice(None), 2)
    embedded = keras.tree.flatten(graph.embed(batch.structured(graph.embed)))
    values = dict(zip(graph.embedded, embedded, strict=True))
    for call in graph.calls:
        if call.glue is not None:
            found = call.glue.model([values[number] for number in call.glue.takes])
            values |= zip(call.glue.gives, keras.tree.flatten(found), strict=True)
        values = {number: values[number] for number in call.live}
        args, kwargs = call.bind([values[number] for number in call.takes])
        values |= zip(call.gives, call.given(call.layer(*args, **kwargs)), strict=True)
    found = keras.tree.flatten(graph.head(graph.bind_head(values, batch.arrays)))
    expected = keras.tree.flatten(stock(batch.structured(graph.embed)))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["Bart", pytest.param("T5", marks=pytest.mark.slow)])
def test_a_run_that_dies_in_the_decoder_resumes_to_the_same_bytes(family: str) -> None:
    # Stock KerasHub cannot build T5 with layers in gptq.
    scheme = Float8Scheme() if family == "T5" else GPTQ
    given = planned(family, scheme)
    whole = open_store(f"memory://test-encoder-decoders/{family}-whole")
    run(given, family, whole)
    steps: list[Step] = []
    # The last of the encoder, and the first of the decoder.
    for part, place in zip((2, 3), get_args(ActivationPlace), strict=True):
        broken = open_store(f"memory://test-encoder-decoders/{family}-{part}")
        with pytest.raises(CrashError):
            run(given, family, broken, crash_at(part), place)
        run(given, family, broken, steps.append, place)
        assert lasting(broken) == lasting(whole)
    assert [step.parts for step in steps if step.event == "resumed"] == [
        (0, 1, 2),
        (0, 1, 2, 3),
    ]


def test_the_decoder_begins_as_its_preprocessor_says() -> None:
    windows = planned("Bart", GPTQ).windows
    assert windows is not None
    tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(str(shared_family("Bart")))
    assert windows.decoder_start == (tokenizer.end_token_id, tokenizer.start_token_id)
    assert (windows.tokens[:, 0] == tokenizer.start_token_id).all()


@pytest.mark.exhaustive
def test_perplexity_is_over_the_decoder_s_tokens() -> None:
    given = planned("Bart", Int8Scheme())
    assert given.windows is None
    windows = planned("Bart", GPTQ).windows
    assert windows is not None
    store = open_store("memory://test-encoder-decoders/judged")
    worker = run(given, "Bart", store)
    judged_on = EvaluationSet(windows=windows.chosen([0, 2]))
    found = fidelity_of(judged_on, worker.evaluate(judged_on, [0]))

    source = shared_family("Bart")
    task = keras_hub.models.BartSeq2SeqLM.from_preset(str(source))
    layout = input_layout(build_skeleton(read_preset(str(source))))
    arrays = layout.batch(windows, [0, 2], 2).arrays
    logits = np.asarray(task(dict(arrays)), np.float64)
    log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    following = arrays["decoder_token_ids"][:, 1:]
    losses = -np.take_along_axis(log[:, :-1], following[..., None], axis=-1)
    assert found.count == following.size
    assert found.source_perplexity is not None
    assert math.isclose(found.source_perplexity, math.exp(losses.mean()), rel_tol=1e-4)
    assert found.divergence is not None
    assert 0 < found.divergence < 1


@pytest.mark.exhaustive
def test_a_sound_model_is_calibrated_on_given_features(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(3, 16, 80)).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    given = planned("Whisper", GPTQ, encoder_features=str(tmp_path / "features.npy"))
    assert given.windows is not None
    assert np.array_equal(given.windows.inputs["encoder_features"], features)
    (tmp_path / "features.npy").unlink()  # workers read the run's own copy
    worker = run(given, "Whisper", open_store(f"file://{tmp_path}/run"))
    judged_on = EvaluationSet(windows=given.windows)
    found = fidelity_of(judged_on, worker.evaluate(judged_on, [0]))
    assert found.cosine is not None
    assert 0.9 < found.cosine < 1
    assert given.plan.task == "WhisperBackbone"


def test_blocks_that_share_weights_are_refused_where_they_need_calibration() -> None:
    with pytest.raises(SourceError, match=r"runs 2 times with the same weights.*int8 or int4"):
        planned("Albert", GPTQ)
    assert planned("Albert", Int8Scheme()).plan.num_blocks == 1
