from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import keras
import pytest
import yaml

from jobs.cli.main import main
from jobs.release.cards import update_cards, write_card
from jobs.release.contents import FinishedRun, artifact_contents, export_contents, read_run
from jobs.release.loading import Place
from jobs.release.model_card import CardSettings, model_card
from jobs.release.quality import measured_on
from pipeline.export.manifest import EXPORT_KEY
from pipeline.fidelity import Fidelity, SetFidelity
from pipeline.plain.run import carry_out, make_plan
from pipeline.recipe.recipe import Calibration, Recipe, Rule
from pipeline.run.commits import damaged_files, read_manifest
from pipeline.run.records import FileDigest, LayerRecord, codes_key
from pipeline.storage.object_store import ObjectStore, open_store
from quantizer.schemes import GPTQScheme, Int8Scheme
from tests.jobs.release.runs import copied, evaluate, finished


@pytest.fixture
def run(tmp_path: Path) -> ObjectStore:
    return copied(tmp_path / "run")


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["card", *arguments])
    code: Any = stopped.value.code
    return int(code)


def head(card: bytes) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split(b"---\n")[1])
    return found


def test_a_finished_run_gets_a_card_for_its_artifact_and_one_for_each_export(
    run: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(run)
    assert command(run.root_url, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(one["form"], one["evaluations"]) for one in printed] == [
        ("kerashub", 1),
        ("compressed-tensors", 1),
    ]
    own, export = run.get("README.md"), run.get("exports/ct/README.md")
    assert head(own)["library_name"] == "keras-hub"
    assert head(own)["license"] == "apache-2.0"
    assert head(own)["language"] == ["en", "no"]
    assert head(export)["library_name"] == "transformers"
    assert "compressed-tensors" in head(export)["tags"]
    for card in (own, export):
        assert "base_model" not in head(card)
        assert b"| perplexity | 20 | 22 | 90.9% |" in card
        assert read_manifest(run).record_sha256.encode() in card
    assert b'MistralCausalLM.from_preset("artifact")' in own
    assert b'AutoModelForCausalLM.from_pretrained("."' in export
    assert b"keras_hub.models" not in export
    # Groups of 16: vLLM has no kernel, so nobody is told to use it.
    assert b"vllm" not in export


def test_eval_json_holds_what_was_measured_and_on_what(run: ObjectStore) -> None:
    evaluate(run)
    update_cards(run)
    found = json.loads(run.get("exports/ct/eval.json"))
    assert found["version"] == 1
    [one] = found["evaluations"]
    assert one["figures"]["result_perplexity"] == 22.0
    assert one["measured_on"]["texts_sha256"] == "ab" * 32
    assert one["measured_on"]["num_windows"] == 2
    assert found["sizes"]["stored_bytes"] == sum(
        run.size(key) for key in run.list("exports/ct/") if key.endswith(".safetensors")
    )
    manifest = read_manifest(run)
    assert found["digests"]["manifest_sha256"] == manifest.record_sha256
    assert json.loads(run.get("eval.json"))["sizes"]["loaded_bytes"] > 0


def test_a_result_that_was_not_evaluated_says_so(run: ObjectStore) -> None:
    update_cards(run)
    assert b"This result was not evaluated" in run.get("README.md")
    assert json.loads(run.get("eval.json"))["evaluations"] == []


def test_a_card_says_that_experts_take_the_memory_of_floats(run: ObjectStore) -> None:
    read = read_run(run, run.root_url)
    codes = {codes_key(1): FileDigest.of(b"codes")}
    manifest = dataclasses.replace(read.manifest, files={**read.manifest.files, **codes})
    place = Place(folder="artifact")
    for given, said in ((read, False), (dataclasses.replace(read, manifest=manifest), True)):
        card = model_card(artifact_contents(given), CardSettings(), place)
        assert (b"holds experts as floats" in card) == said
    export = export_contents(read, open_store(f"{run.root_url}/exports/ct"))
    with_codes = dataclasses.replace(export, run=dataclasses.replace(read, manifest=manifest))
    assert b"experts as floats" not in model_card(with_codes, CardSettings(), place)


def test_cards_are_no_part_of_what_a_manifest_names(run: ObjectStore) -> None:
    before = {key: run.get(key) for key in run.list()}
    update_cards(run)
    evaluate(run)
    update_cards(run)
    after = {key: run.get(key) for key in run.list()}
    assert before.items() <= after.items()
    assert damaged_files(run, read_manifest(run)) == ()
    assert f"exports/ct/{EXPORT_KEY}" in before


def test_equal_runs_have_equal_cards_wherever_they_lie(tmp_path: Path) -> None:
    cards = []
    for name in ("here", "there"):
        run = copied(tmp_path / name / "run")
        evaluate(run)
        update_cards(run)
        update_cards(run)
        cards.append([run.get(key) for key in run.list() if key.endswith((".md", "eval.json"))])
    assert cards[0] == cards[1]
    assert len(cards[0]) == 4
    for card in cards[0]:
        assert str(tmp_path).encode() not in card
        assert str(finished().parent).encode() not in card


def test_a_card_that_a_person_edited_stays_until_told_otherwise(
    run: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    update_cards(run)
    run.put("README.md", b"# Mine\n")
    update_cards(run)
    assert command(run.root_url) == 0
    assert "was edited, and is left as it is" in capsys.readouterr().err
    assert run.get("README.md") == b"# Mine\n"
    assert command(run.root_url, "--overwrite") == 0
    assert run.get("README.md").startswith(b"---\n")


def test_a_card_whose_writing_was_interrupted_is_not_taken_for_an_edited_one(
    run: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_cards(run)
    before = run.get("README.md")
    put = type(run).put

    def dying(store: ObjectStore, key: str, data: bytes) -> None:
        if key == "README.md":
            raise KeyboardInterrupt
        put(store, key, data)

    for perplexity in (22.0, 23.0):
        evaluate(run, perplexity)
        contents = artifact_contents(read_run(run, run.root_url))
        with monkeypatch.context() as patched:
            patched.setattr(type(run), "put", dying)
            with pytest.raises(KeyboardInterrupt):
                write_card(contents)
        assert run.get("README.md") == before
    assert not write_card(contents).edited
    assert run.get("README.md") != before


def test_what_a_person_says_is_kept(run: ObjectStore) -> None:
    options = ["--base-model", "someone/tiny-mistral", "--license", "mit"]
    assert command(run.root_url, *options) == 0
    evaluate(run)
    update_cards(run)
    found = head(run.get("README.md"))
    assert found["base_model"] == "someone/tiny-mistral"
    assert found["base_model_relation"] == "quantized"
    assert found["license"] == "mit"


def test_the_card_of_an_export_elsewhere_is_written_there(run: ObjectStore, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    (tmp_path / "run" / "exports" / "ct").rename(folder)
    assert command(run.root_url, "--to", str(folder)) == 0
    assert (folder / "README.md").exists()
    assert not run.exists("README.md")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--base-model", "../x"], 2, "not a repository of the hub"),
        (["--license", "My License"], 2, "not a license as the hub names them"),
        (["--to", "/nowhere"], 2, "no export.json there"),
    ],
)
def test_what_makes_no_card_costs_one_line(
    run: ObjectStore,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    assert command(run.root_url, *options) == code
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not run.exists("README.md")


def test_an_export_of_another_run_is_refused(
    run: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = dataclasses.replace(read_manifest(run), provenance={"changed": True})
    read = read_run(run, run.root_url)
    with pytest.raises(ValueError, match="an export of another run"):
        export_contents(
            dataclasses.replace(read, manifest=manifest), open_store(f"{run.root_url}/exports/ct")
        )


def test_a_damaged_export_costs_the_others_nothing(
    run: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    run.put("exports/ct/config.json", b"{")
    update_cards(run)
    assert "exports/ct/config.json is damaged" in capsys.readouterr().err
    assert run.exists("README.md")
    assert not run.exists("exports/ct/README.md")
    assert command(run.root_url, "--to", f"{run.root_url}/exports/ct") == 4


def changed(run: ObjectStore, **recipe: Any) -> FinishedRun:
    read = read_run(run, run.root_url)
    return dataclasses.replace(read, recipe=read.recipe.model_copy(update=recipe))


def test_no_path_or_secret_of_who_made_it_is_told(run: ObjectStore) -> None:
    calibration = Calibration(
        texts=(
            "/home/alice/secret-project/texts.jsonl",
            "s3://private-bucket/deep/corpus.jsonl?X-Amz-Signature=abc",
            "https://alice:password@host/texts.txt",
            "hf:owner/public-texts/en?split=train&token=hf_abc",
        ),
        inputs={"images": "/home/alice/images.npy"},
    )
    read = changed(run, calibration=calibration, scheme=GPTQScheme())
    assert read.plan is not None
    plan = dataclasses.replace(
        read.plan, source_url="/home/alice/model", notes=("/home/alice/model/x.json is odd",)
    )
    read = dataclasses.replace(read, plan=plan, source_url="/home/alice/model")
    card = model_card(artifact_contents(read), CardSettings(), Place(folder="artifact")).decode()
    for secret in ("alice", "private-bucket", "Signature", "password", "hf_abc", "secret-project"):
        assert secret not in card
    for told in ("texts.jsonl", "corpus.jsonl", "hf:owner/public-texts/en", "images.npy"):
        assert told in card


HOSTILE = "x\n---\nlicense: evil\n---\n# <script>alert(1)</script> [a](https://evil.example) `| |"


def test_hostile_names_stay_text(run: ObjectStore) -> None:
    read = changed(run, rules=(Rule(pattern=HOSTILE + "\n```\n# out", scheme=None),))
    origin = dataclasses.replace(read.origin, name=HOSTILE)
    layers = (*read.layers, LayerRecord(path=HOSTILE, note=HOSTILE))
    read = dataclasses.replace(read, layers=layers)
    read.__dict__["origin"] = origin  # found once
    card = model_card(artifact_contents(read), CardSettings(), Place(folder="artifact"))
    assert head(card)["license"] == "apache-2.0"
    text = card.decode()
    assert text.count("\n---\n") == 1
    lines = [line for line in text.splitlines() if "evil.example" in line and "pattern" not in line]
    assert lines
    assert not any("<script>" in line and "`" not in line and "\\<" not in line for line in lines)


def test_figures_that_this_version_does_not_know_are_told(run: ObjectStore) -> None:
    evaluate(run)
    read = read_run(run, run.root_url)
    [one] = read.evaluations
    before, after = {"acc": 0.5, "acc_stderr": 0.1}, {"acc": 0.45, "acc_stderr": 0.1}
    counts = {"num_questions": 20, "flips": 3, "recovery": 0.9, "divergence": 0.25}
    tasks = [{"name": "arc", "source": before, "result": after, **counts}]
    figures = {**one.figures, "divergence_p99": 1.5, "tasks": tasks}
    read = dataclasses.replace(read, evaluations=(dataclasses.replace(one, figures=figures),))
    card = model_card(artifact_contents(read), CardSettings(), Place(folder="artifact")).decode()
    assert "| KL divergence, 99th percentile, nats a token | – | 1.5 | – |" in card
    assert "| arc: acc | 50.00% | 45.00% | 90.0% |" in card
    assert "| arc: acc stderr | 0.1 | 0.1 | – |" in card
    assert "| arc: answers that became right or wrong | – | 3 | – |" in card
    # Unlike that of a text's tokens.
    assert "| arc: KL divergence over the choices, mean, nats a question | – | 0.25 | – |" in card
    assert card.index("arc: acc ") < card.index("arc: answers") < card.index("arc: questions")
    assert "recovery |" not in card.split("| --- |")[1]
    compared = "predicted tokens, or vectors, compared"
    assert (compared, 14) in measured_on(one)
    on_tasks_alone = dataclasses.replace(one, figures={**figures, "count": 0})
    assert compared not in dict(measured_on(on_tasks_alone))


def test_a_card_says_of_each_set_of_texts_what_it_was_and_what_was_found(run: ObjectStore) -> None:
    evaluate(run)
    read = read_run(run, run.root_url)
    [one] = read.evaluations
    novels = SetFidelity(name="novels", num_windows=3, count=21, divergence=0.25)
    on_sets = dataclasses.replace(
        one,
        measured_on={"sets": {"novels": {"num_windows": 3, "texts_sha256": "ab" * 32}}},
        figures=Fidelity(num_windows=0, count=0, sets=(novels,)).figures(),
    )
    read = dataclasses.replace(read, evaluations=(on_sets,))
    card = model_card(artifact_contents(read), CardSettings(), Place(folder="artifact")).decode()
    assert "| novels: KL divergence, mean, nats a token | – | 0.25 | – |" in card
    assert dict(measured_on(on_sets)) == {
        "novels: windows": 3,
        "novels: SHA-256 of the texts": "ab" * 32,
    }
    assert "\nnovels: windows: 3,\nnovels: SHA-256 of the texts: `abab" in card


def test_a_plain_keras_model_gets_a_card_too(tmp_path: Path) -> None:
    inputs = keras.Input((16,))
    model = keras.Model(inputs, keras.layers.Dense(8, name="top")(inputs))
    model.save(tmp_path / "small.keras")
    recipe = Recipe(name="int8", scheme=Int8Scheme())
    store = open_store(str(tmp_path / "out"))
    carry_out(make_plan(str(tmp_path / "small.keras"), recipe, 1), store)
    update_cards(store)
    card = store.get("README.md")
    assert head(card)["library_name"] == "keras"
    assert b'keras.saving.load_model(folder + "/model.keras")' in card
    assert str(tmp_path).encode() not in card
    assert b"name no license" in card
    assert json.loads(store.get("eval.json"))["form"] == "keras"
