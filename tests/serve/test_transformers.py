"""transformers with compressed-tensors, in its own environment, answers as stock KerasHub does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from pipeline.artifact.verification import ask_stock
from pipeline.export.checkpoint import plan_checkpoint
from pipeline.export.code_formats import ExportFormat
from pipeline.export.writing import write_checkpoint
from pipeline.model.checkpoint_tokenizer import checkpoint_tokenizer
from pipeline.model.preset import read_preset
from pipeline.plan import read_plan
from pipeline.storage.object_store import open_store
from tests.families.tiny_families import shared_family
from tests.models.expert_configs import config_folder
from tests.models.tiny_huggingface import HIDDEN, tiny_huggingface
from tests.pipeline.export.runs import finished_run
from tests.pipeline.presets import shared_preset
from tests.serve.environments import ask

# Every family's vocabulary has these.
TOKENS = np.random.default_rng(0).integers(5, 60, (2, 24)).astype(np.int32)
BOTH_TEXTS = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("token_ids", TOKENS), ("padding_mask", np.ones_like(TOKENS)))
}

pytestmark = [
    pytest.mark.serve,
    # The fixture makes all runs and exports.
    pytest.mark.timeout(3600),
    # KerasHub 0.32 leaves the files of SentencePiece vocabularies open.
    pytest.mark.filterwarnings(r"ignore:unclosed file .*tokenizer\.model:ResourceWarning"),
]


def gptq(bits: int, **options: Any) -> dict[str, Any]:
    return {"mode": "gptq", "weight_bits": bits, "group_size": 8, **options}


@dataclass(frozen=True)
class Case:
    """A model, its recipe, and a format to export it in.

    Attributes:
        tolerance: of answers, as a share of the largest.
        like: makes a folder to take the config from.
    """

    source: Callable[[Path], Path]
    scheme: Mapping[str, Any]
    as_format: ExportFormat = "compressed-tensors"
    settings: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-4
    like: Callable[[Path], Path] | None = None


def llama3(_: Path) -> Path:
    return shared_preset("Llama3", num_blocks=2)


def llama3_in_bfloat16(_: Path) -> Path:
    return shared_preset("Llama3", num_blocks=2, dtype="bfloat16", tied=False)


def experts(
    name: str,
    scheme: Mapping[str, Any],
    as_format: ExportFormat = "compressed-tensors",
    **more: Any,
) -> Case:
    """A mixture of experts, for which KerasHub writes no config.json."""
    return Case(
        lambda _: shared_family(name),
        scheme,
        as_format,
        settings=more,
        like=lambda folder: config_folder(name, folder),
    )


def family(name: str, *, tokenizer: bool = False, **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        return tiny_huggingface(
            folder, name, tokenizer=tokenizer, dtype="f4", torch_dtype="float32", **options
        )

    return write


NO_KINDS_OF_TEXT = {
    "roberta.embeddings.token_type_embeddings.weight": np.zeros((1, HIDDEN), np.float32)
}
INT4 = {"mode": "int4", "block_size": 16}
AWQ = {"mode": "awq", "group_size": 8}
RULES = [{"pattern": "feedforward_output", "scheme": gptq(8, symmetric=True)}]

EXACT = {
    **{
        f"Llama 3, gptq {bits} bits, {kind}": Case(llama3, gptq(bits, symmetric=kind == "sym"))
        for bits in (2, 3, 4, 8)
        for kind in ("sym", "asym")
    },
    "Llama 3, gptq per channel": Case(llama3, gptq(4) | {"group_size": -1}),
    "Llama 3, gptq in order of activation": Case(llama3, gptq(3, activation_order=True)),
    "Llama 3, int4": Case(llama3, INT4),
    "Llama 3, int4 per channel": Case(llama3, INT4 | {"block_size": -1}),
    "Llama 3, two schemes": Case(llama3, gptq(3), settings={"rules": RULES}),
    "Llama 3, awq": Case(llama3, AWQ, "dense"),
    "Llama 3, foldable awq": Case(llama3, AWQ | {"foldable": True}),
    "Gemma, foldable awq": Case(family("gemma", tokenizer=True), AWQ | {"foldable": True}),
    "Mistral": Case(family("mistral", tokenizer=True), gptq(4)),
    "Qwen 2": Case(family("qwen2"), INT4),
    "Qwen 3": Case(family("qwen3"), INT4),
    "Gemma": Case(family("gemma", tokenizer=True), gptq(4)),
    "Gemma 2": Case(family("gemma2", tokenizer=True), gptq(3)),
    "Gemma 3": Case(family("gemma3_text", tokenizer=True), gptq(4, symmetric=True)),
    "GPT-2": Case(family("gpt2"), INT4, "dense"),
    # KerasHub's BERT approximates GELU by tanh, whatever its config says.
    "BERT": Case(family("bert", tokenizer=True), gptq(4), tolerance=1e-3),
    # Written by a converter that sets the table of kinds of text to zeros.
    "RoBERTa": Case(family("roberta", extra=NO_KINDS_OF_TEXT), INT4),
    "XLM-RoBERTa": Case(family("xlm-roberta"), INT4),
    "BART": Case(family("bart", tokenizer=True), gptq(4)),
    "DistilBERT": Case(family("distilbert", tokenizer=True), gptq(4)),
    "ALBERT": Case(family("albert"), INT4),
    "Mixtral": experts("Mixtral", gptq(4, symmetric=True)),
    "Mixtral, 3 bits": experts("Mixtral", gptq(3, symmetric=True)),
    "Qwen 3 MoE": experts("Qwen3Moe", gptq(4, symmetric=True)),
    "Qwen 3 MoE, experts otherwise": experts(
        "Qwen3Moe", gptq(4, symmetric=True), rules=[{"pattern": "attention", "scheme": gptq(8)}]
    ),
    "Mixtral, experts in int8": experts(
        "Mixtral", gptq(4), rules=[{"pattern": "experts", "scheme": {"mode": "int8"}}]
    ),
}
# Their inputs are rounded at run time, and by float8 a value at the edge of two differs.
ROUNDED = {
    "Llama 3, float8": Case(llama3, {"mode": "float8"}),
    "Llama 3, int8": Case(llama3, {"mode": "int8"}),
    "Gemma, int8": Case(family("gemma"), {"mode": "int8"}),
    "Llama 3, int8 embeddings": Case(llama3, gptq(4), settings={"embeddings": {"mode": "int8"}}),
    "Llama 3 in bfloat16": Case(llama3_in_bfloat16, gptq(4)),
}


@dataclass(frozen=True)
class Answers:
    """Outputs of stock KerasHub, and of transformers for the export and for a dense one."""

    keras: NDArray[np.float32]
    exported: NDArray[np.float32]
    dense: NDArray[np.float32]
    folder: Path

    def distance(self, a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
        """Largest difference, as a share of the largest value."""
        return float(np.abs(a - b).max() / np.abs(self.keras).max())


def task_name(artifact: Path) -> str:
    return str(json.loads((artifact / "task.json").read_text())["class_name"])


def last_hidden_states(artifact: Path) -> NDArray[np.float32]:
    """Of an encoder's backbone, which is all of it that is exported."""
    backbone = getattr(keras_hub.models, task_name(artifact)).from_preset(str(artifact)).backbone
    known = {
        "token_ids": TOKENS,
        "padding_mask": np.ones_like(TOKENS),
        "segment_ids": np.zeros_like(TOKENS),
    }
    answer = backbone.predict_on_batch({one.name: known[one.name] for one in backbone.inputs})
    if isinstance(answer, dict):
        answer = answer["sequence_output"]
    return np.asarray(answer, np.float32)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    """Of every case: stock KerasHub and transformers each start only once."""
    root = tmp_path_factory.mktemp("serve")
    np.save(root / "tokens.npy", TOKENS)
    cases, jobs = {**EXACT, **ROUNDED}, []
    for number, case in enumerate(cases.values()):
        folder = root / str(number)
        folder.mkdir()
        source = case.source(folder / "source")
        run, manifest = finished_run(source, str(folder / "run"), case.scheme, **case.settings)
        artifact = read_preset(f"{run.root_url}/artifact")
        like = None if case.like is None else str(case.like(folder / "like"))
        for as_format in dict.fromkeys((case.as_format, "dense")):
            checkpoint = plan_checkpoint(read_plan(run), artifact, as_format, like_url=like)
            store = open_store(str(folder / as_format))
            write_checkpoint(checkpoint, run, manifest, store)
            outputs = str(folder / f"{as_format}.npy")
            inputs = str(root / "tokens.npy")
            jobs.append({"folder": str(folder / as_format), "inputs": inputs, "outputs": outputs})
    presets = [root / str(number) / "run" / "artifact" for number in range(len(cases))]
    kinds = [(preset, task_name(preset)) for preset in presets]
    generate = {
        preset: BOTH_TEXTS if kind.endswith("Seq2SeqLM") else TOKENS
        for preset, kind in kinds
        if kind.endswith(("CausalLM", "Seq2SeqLM"))
    }
    logits = ask_stock([*generate], [*generate.values()]).outputs
    by_preset = dict(zip(generate, logits, strict=True))
    keras = [by_preset[one] if one in by_preset else last_hidden_states(one) for one in presets]
    ask("transformers", jobs)
    return {
        name: Answers(
            keras=keras[number],
            exported=np.load(root / str(number) / f"{case.as_format}.npy"),
            dense=np.load(root / str(number) / "dense.npy"),
            folder=root / str(number),
        )
        for number, (name, case) in enumerate(cases.items())
    }


@pytest.mark.parametrize("name", EXACT)
def test_transformers_answers_as_stock_keras_does(name: str, answers: dict[str, Answers]) -> None:
    found, tolerance = answers[name], EXACT[name].tolerance
    assert found.keras.shape == found.exported.shape
    assert found.distance(found.exported, found.keras) < tolerance
    assert found.distance(found.dense, found.keras) < tolerance


@pytest.mark.parametrize("name", ROUNDED)
def test_where_inputs_are_rounded_runtimes_differ_by_that_rounding(
    name: str, answers: dict[str, Answers]
) -> None:
    # The dense checkpoint has the same weights and rounds no inputs: its distance to Keras is what
    # rounding costs. Keras divides the largest input by 127, compressed-tensors by 127.5.
    found = answers[name]
    assert found.distance(found.exported, found.keras) <= 2 * found.distance(
        found.dense, found.keras
    )


def test_int8_codes_are_the_same_weights(answers: dict[str, Answers]) -> None:
    folder = answers["Llama 3, int8"].folder
    packed, dense = _tensors(folder / "compressed-tensors"), _tensors(folder / "dense")
    scales = [name for name in packed if name.endswith("_scale")]
    assert len(scales) == 14
    for scale in scales:
        name = scale.removesuffix("_scale")
        values = packed[name].astype(np.float32) * packed[scale]
        np.testing.assert_allclose(values, dense[name], rtol=1e-6)


def _tensors(folder: Path) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_written_tokenizers_split_texts_as_kerashub_does(tmp_path: Path) -> None:
    texts = ["The man, and the  dog; it's 1234\n\nhere", "naïve café 東京 🙂", " a b"]
    jobs, expected = [], []
    for architecture in ("Llama3", "GPT2", "Qwen3"):
        preset, folder = shared_preset(architecture), tmp_path / architecture
        folder.mkdir()
        for name, data in checkpoint_tokenizer(read_preset(str(preset))).files.items():
            (folder / name).write_bytes(data)
        jobs.append({"folder": str(folder), "texts": texts})
        tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(str(preset))
        start = getattr(tokenizer, "start_token_id", None)
        before = [] if start is None else [start]
        expected.append([before + [int(token) for token in tokenizer(text)] for text in texts])
    assert ask("transformers", jobs) == expected
