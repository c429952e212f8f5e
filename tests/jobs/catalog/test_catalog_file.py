"""A mistake rejects the whole catalog, with file, line and remedy."""

from __future__ import annotations

import io
import sys
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from jobs.catalog.catalog_file import Catalog, CatalogError, parse_catalog, read_catalog
from jobs.catalog.entries import Export, TextLimits
from jobs.cli.listings import catalog_table
from pipeline.executor.protocol import ComputeSpec

HEAD = "root: s3://bucket/fleet\n"


def parsed(text: str, folder: Path | None = None) -> Catalog:
    return parse_catalog(text, where="catalog.yaml", folder=folder)


def test_models_inherit_defaults_they_do_not_override() -> None:
    catalog = parsed("""\
root: s3://bucket/fleet
defaults:
  recipes: [int8, gptq-w4-g128]
  owner: nlp
  calibration: {texts: [s3://bucket/c4.jsonl], num_samples: 16, chat: false}
  evaluate_on: [s3://bucket/held-out.jsonl]
  gate: {max_perplexity_increase: 0.05, max_divergence: 1}
  resources: {workers: 2, memory: 8GiB}
models:
  - {name: a, preset: s3://bucket/a}
  - name: b
    preset: s3://bucket/b
    recipes: [int4]
    owner: search
    priority: 5
    calibration: {num_samples: 32}
    gate: {max_perplexity_increase: 0.1}
  - {name: stable, alias_of: newest, owner: nlp}
  - {name: newest, alias_of: b}
""")
    b, a = catalog.entries  # b is more urgent
    assert (a.name, b.name) == ("a", "b")
    assert (a.settings.owner, b.settings.owner) == ("nlp", "search")
    assert [recipe.name for recipe in a.recipes] == ["int8", "gptq-w4-g128"]
    assert b.aliases == ("newest", "stable")
    assert a.settings.resources.memory == b.settings.resources.memory == 8 << 30
    assert a.settings.gate is not None
    assert b.settings.gate is not None
    assert a.settings.gate.max_perplexity_increase == 0.05
    assert b.settings.gate.max_perplexity_increase == 0.1
    assert b.settings.gate.max_divergence == 1
    calibration = a.recipes[1].calibration
    assert calibration is not None
    assert calibration.texts == ("s3://bucket/c4.jsonl",)
    assert calibration.num_samples == 16
    assert calibration.chat is False
    assert catalog.num_runs == 3


def test_gpus_per_worker_are_asked_for_as_on_the_command_line() -> None:
    text = """
root: s3://bucket/fleet
defaults: {recipes: [int8], resources: {gpus_per_worker: 2}}
models:
  - {name: a, preset: s3://bucket/a, resources: {memory: 8GiB}}
"""
    (entry,) = parse_catalog(text, where="catalog.yaml", folder=None).entries
    assert entry.settings.resources.needs == ComputeSpec(gpus_per_worker=2, memory_bytes=8 << 30)


def test_a_dtype_becomes_part_of_every_recipe() -> None:
    text = """
root: s3://bucket/fleet
defaults: {recipes: [int8, gptq-w4-g128]}
models:
  - {name: a, preset: s3://bucket/a, dtype: bfloat16}
  - {name: b, preset: s3://bucket/b}
"""
    a, b = parse_catalog(text, where="catalog.yaml", folder=None).entries
    assert {recipe.dtype for recipe in a.recipes} == {"bfloat16"}
    assert [recipe.to_dict().get("dtype", "unsaid") for recipe in b.recipes] == ["unsaid"] * 2


def test_a_model_may_be_quantized_in_part_if_its_entry_says_so() -> None:
    text = """
root: s3://bucket/fleet
defaults: {recipes: [int8, gptq-w4-g128]}
models:
  - {name: a, preset: s3://bucket/a, allow_partial: true}
  - {name: b, preset: s3://bucket/b}
"""
    a, b = parse_catalog(text, where="catalog.yaml", folder=None).entries
    assert [recipe.allow_partial for recipe in (*a.recipes, *b.recipes)] == [True] * 2 + [False] * 2
    assert "allow_partial" not in b.recipes[0].to_dict()


def test_exports_are_named_or_spelled_out_and_a_models_own_replace_the_defaults(
    tmp_path: Path,
) -> None:
    catalog = parsed(
        """\
root: s3://bucket/fleet
defaults: {recipes: [int8], export: compressed-tensors}
models:
  - {name: a, preset: s3://bucket/a}
  - {name: b, preset: s3://bucket/b, export: []}
  - {name: c, preset: s3://bucket/c, export: [gptq, {format: dense, dtype: float16, like: c}]}
""",
        tmp_path,
    )
    a, b, c = (entry.settings.export for entry in catalog.entries)
    assert (a, b) == ((Export(format="compressed-tensors"),), ())
    like = str(tmp_path / "c")
    assert c == (Export(format="gptq"), Export(format="dense", dtype="float16", like=like))


def test_relative_paths_are_relative_to_the_catalogs_folder(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "{name: own, scheme: {mode: gptq}, calibration: {texts: [t.txt]}}"
    )
    file = tmp_path / "catalog.yaml"
    file.write_text(
        "root: out\nmodels:\n  - {name: a, preset: presets/a, recipes: [./own.yaml],"
        " evaluate_on: [e.txt, s3://bucket/e.txt, 'hf:some/texts']}\n"
    )
    catalog = read_catalog(str(file))
    [entry] = catalog.entries
    assert catalog.root_url == str(tmp_path / "out")
    assert entry.preset == str(tmp_path / "presets/a")
    assert entry.settings.evaluate_on == (
        str(tmp_path / "e.txt"), "s3://bucket/e.txt", "hf:some/texts",
    )  # fmt: skip
    calibration = entry.recipes[0].calibration
    assert calibration is not None
    assert calibration.texts == (str(tmp_path / "t.txt"),)


def test_texts_to_evaluate_on_may_be_sets_with_limits_of_their_own(tmp_path: Path) -> None:
    catalog = parsed(
        """\
root: s3://bucket/fleet
models:
  - name: a
    preset: s3://bucket/a
    recipes: [int8]
    evaluate_on: {manual: m.txt, novels: [s3://bucket/n.txt, o.txt]}
    gate: {max_divergence: 0.1, novels: {max_perplexity_increase: 0.3}}
""",
        tmp_path,
    )
    settings = catalog.entries[0].settings
    assert settings.evaluated_on.sets == {
        "manual": (str(tmp_path / "m.txt"),),
        "novels": ("s3://bucket/n.txt", str(tmp_path / "o.txt")),
    }
    assert settings.gate is not None
    assert settings.gate.of_set("manual").limits == {"max_divergence": 0.1}
    assert settings.gate.of_set("novels").limits == {
        "max_divergence": 0.1,
        "max_perplexity_increase": 0.3,
    }


def test_a_checked_catalog_shows_what_is_evaluated_judged_and_exported(tmp_path: Path) -> None:
    catalog = parsed(
        """\
root: s3://bucket/fleet
models:
  - name: a
    preset: s3://bucket/a
    recipes: [int8]
    evaluate_on: {manual: m.txt, novels: [s3://bucket/n.txt, o.txt]}
    tasks: [s3://bucket/arc.jsonl]
    gate: {max_divergence: 0.1, min_recovery: 0.9, novels: {max_divergence: 0.3}}
    export: [gptq, dense]
""",
        tmp_path,
    )
    stream = io.StringIO()
    Console(file=stream, width=200).print(catalog_table(catalog))
    for text in (
        "manual: 1 source",
        "novels: 2 sources",
        "tasks: arc.jsonl",
        "max_divergence 0.1, min_recovery 0.9",
        "novels: max_divergence 0.3",
        "gptq, dense",
    ):
        assert text in stream.getvalue(), text


def test_calibration_texts_may_have_weights(tmp_path: Path) -> None:
    catalog = parsed(
        """\
root: s3://bucket/fleet
models:
  - name: a
    preset: s3://bucket/a
    recipes: [gptq-w4-g128]
    calibration: {texts: [{url: a.txt, weight: 2}, {url: s3://bucket/b.txt, weight: 1}]}
""",
        tmp_path,
    )
    calibration = catalog.entries[0].recipes[0].calibration
    assert calibration is not None
    assert calibration.text_urls == (str(tmp_path / "a.txt"), "s3://bucket/b.txt")
    assert [text.weight for text in calibration.weighted_texts] == [2, 1]


MISTAKES = {
    "GPUs on CPUs": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    resources: {device: cpu, gpus_per_worker: 2}\n",
        6, "resources: 2 GPUs per worker, and the device is to be cpu; leave out one of the two",
    ),
    "a kind of GPU on CPUs": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    resources: {device: cpu, accelerator: H100}\n",
        6, "accelerator H100 is a kind of GPU, and the device is to be cpu",
    ),
    "no GPU per worker": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    resources: {gpus_per_worker: 0}\n",
        6, "resources.gpus_per_worker must be at least 1",
    ),
    "a password in a weighted text": (
        "models:\n  - name: a\n    preset: p\n    recipes: [int8]\n    calibration:\n"
        "      texts: [{url: 'https://me:secret@host/t.txt', weight: 1}]\n",
        7, "the URL contains a password",
    ),
    "two of a name": (
        "models:\n  - {name: a, preset: p, recipes: [int8]}\n"
        "  - {name: a, preset: q, recipes: [int8]}\n",
        4, "the name a is taken by line 3; rename one",
    ),
    "two recipes of a name": (
        "models:\n  - {name: a, preset: s3://b/p, recipes: [int8, int8]}\n",
        3, "a has two recipes named int8",
    ),
    "a circle of aliases": (
        "models:\n  - {name: a, alias_of: b}\n  - {name: b, alias_of: a}\n",
        3, "aliases form a circle (a → b → a)",
    ),
    "an alias of itself": (
        "models:\n  - {name: a, alias_of: a}\n", 3, "form a circle (a → a)",
    ),
    "an alias of nothing": (
        "models:\n  - {name: alpha, preset: s3://b/p, recipes: [int8]}\n"
        "  - {name: b, alias_of: alpa}\n",
        4, "did you mean alpha?",
    ),
    "an alias with settings": (
        "models:\n  - {name: a, preset: s3://b/p, recipes: [int8]}\n"
        "  - name: b\n    alias_of: a\n    priority: 3\n",
        6, "b is an alias, so priority is that of a",
    ),
    "traversal in a name": (
        "models:\n  - {name: ../a, preset: p, recipes: [int8]}\n", 3, "must match ^[a-z0-9]",
    ),
    "traversal in the root": (
        "root: s3://bucket/../other\nmodels:\n  - {name: a, preset: s3://b/p, recipes: [int8]}\n",
        1, "'..'",
    ),
    "an unknown recipe": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes:\n      - int8\n      - itn4\n",
        7, "did you mean int4?",
    ),
    "a bad recipe written out": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes:\n"
        "      - {name: x, scheme: {mode: gptq}}\n",
        6, "gptq must see texts",
    ),
    "an unknown key": (
        "models:\n  - name: a\n    preset: p\n    recipes: [int8]\n    priorty: 3\n",
        6, "unknown key models[0].priorty",
    ),
    "an unknown key in the defaults": (
        "defaults:\n  ownr: me\nmodels:\n  - {name: a, preset: p, recipes: [int8]}\n",
        3, "unknown key defaults.ownr",
    ),
    "a gate and nothing to judge by": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    gate: {min_cosine: 0.99}\n",
        6, "a has a gate but no evaluate_on",
    ),
    "a gate on tasks, and none": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    evaluate_on: [s3://b/t.txt]\n    gate: {min_recovery: 0.98}\n",
        7, "a has a gate but no tasks; add tasks: [FILE.jsonl]",
    ),
    "a gate on texts, and none": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    tasks: [s3://b/t.jsonl]\n    gate: {max_divergence: 0.1}\n",
        7, "a has a gate but no evaluate_on",
    ),
    "a gate on a set that is not evaluated": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    evaluate_on: {novels: s3://b/t.txt}\n    gate:\n      min_cosine: 0.9\n"
        "      novel: {min_cosine: 0.8}\n",
        9, "no set of texts named novel is evaluated; did you mean novels?",
    ),
    "an unknown limit": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    evaluate_on: [s3://b/t.txt]\n    gate: {max_diverge: 0.1}\n",
        7, "unknown key max_diverge; the keys here are max_perplexity_increase",
    ),
    "an unknown limit of a set": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    evaluate_on: {novels: s3://b/t.txt}\n    gate:\n      novels:\n"
        "        max_flips: 0.1\n",
        9, "unknown key models[0].gate.novels.max_flips; the keys here are max_perplexity",
    ),
    "a bad name of a set": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    evaluate_on: {Novels: s3://b/t.txt}\n",
        6, "a key of models[0].evaluate_on must match ^[a-z0-9]",
    ),
    "no set of texts": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n    evaluate_on: {}\n",
        6, "evaluate_on is empty",
    ),
    "a gate without a limit": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    evaluate_on: [s3://b/t.txt]\n    gate: {}\n",
        7, "the gate sets no limit",
    ),
    "a gate of text": (
        "models:\n  - name: a\n    preset: p\n    recipes: [int8]\n"
        "    gate: {min_cosine: '0.99'}\n",
        6, "must be a number, got '0.99'",
    ),
    "a gate of nan": (
        "models:\n  - name: a\n    preset: p\n    recipes: [int8]\n"
        "    gate: {max_divergence: .nan}\n",
        6, "must be finite",
    ),
    "no preset": ("models:\n  - {name: a, recipes: [int8]}\n", 3, "a has no preset"),
    "a preset among the results": (
        "root: s3://b/r\nmodels:\n  - {name: a, preset: s3://b/r/runs/p, recipes: [int8]}\n",
        3,
        "s3://b/r/runs: the output holds the preset",
    ),
    "results in a preset": (
        "root: s3://b/p/q\nmodels:\n  - name: a\n    recipes: [int8]\n    preset: s3://b/p/\n",
        5,
        "inside the preset's own folder",
    ),
    "no recipes": ("models:\n  - {name: a, preset: s3://b/p}\n", 3, "a has no recipes"),
    "no models": ("models: []\n", 2, "models is empty"),
    "a password": (
        "models:\n  - {name: a, preset: 's3://me:secret@b/p', recipes: [int8]}\n",
        3, "contains a password",
    ),
    "a password in a task's address": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    tasks: ['https://me:secret@host/t.jsonl']\n",
        6, "tasks[0]: the URL contains a password",
    ),
    "memory that is no size": (
        "models:\n  - name: a\n    preset: p\n    recipes: [int8]\n"
        "    resources: {memory: plenty}\n",
        6, "models[0].resources.memory",
    ),
    "a relative path and no folder": (
        "models:\n  - {name: a, preset: here/a, recipes: [int8]}\n", 3, "write a full URL",
    ),
    "an unknown format": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n    export: [gguf]\n",
        6, "models[0].export[0].format must be 'compressed-tensors', 'gptq' or 'dense', got 'gguf'",
    ),
    "an unknown key of an export": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    export: {format: gptq, bits: 4}\n",
        6, "the keys here are format, dtype, like",
    ),
    "a composition of one recipe": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8]\n"
        "    compose: {target_bits: 3.5, measure_on: [s3://b/t]}\n",
        6, "a: a composition takes blocks of at least two recipes, and there is 1; add another",
    ),
    "a composition of an unknown recipe": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8, int4]\n"
        "    compose: [{target_bits: 3.5, recipes: [int8, int5]}]\n",
        6, "takes the blocks of recipes of this model, and int5 is none; did you mean int",
    ),
    "a composition in a format of one width": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8, int4]\n"
        "    export: gptq\n    compose: [{target_bits: 5}]\n",
        6, "a: a gptq checkpoint holds one width for all layers, and compositions have several",
    ),
    "a composition without a target": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8, int4]\n"
        "    compose: [{name: small}]\n",
        6, "give target_bits, such as 3.5, or target_bytes, and not both",
    ),
    "a composition of no bits": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int8, int4]\n"
        "    compose: {target_bits: 0}\n",
        6, "compose[0].target_bits must be greater than 0",
    ),
    "nothing to measure blocks on": (
        "models:\n  - name: a\n    preset: s3://b/p\n"
        "    recipes: [int8, {name: own, scheme: {mode: int4}, embeddings: {mode: int8}}]\n"
        "    compose: {target_bits: 5}\n",
        6, "add measure_on: [texts.jsonl] to compose",
    ),
    "a composition of other windows": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes:\n"
        "      - {name: x, scheme: {mode: gptq}, calibration: {texts: [s3://b/t]}}\n"
        "      - {name: y, scheme: {mode: gptq}, calibration: {texts: [s3://b/t], seed: 1}}\n"
        "    compose: {target_bits: 5}\n",
        8, "recipes x and y cannot be composed: they calibrate on other windows (seed); give both",
    ),
    "a composition of other embeddings": (
        "models:\n  - name: a\n    preset: s3://b/p\n    recipes: [int4, int8]\n"
        "    compose: {target_bits: 5, measure_on: [s3://b/t]}\n",
        6, "int4 and int8 cannot be composed: embeddings int8, there int4/128; give both the same",
    ),
    "a composition by a recipe's name": (
        "models:\n  - name: a\n    preset: s3://b/p\n"
        "    recipes: [int8, {name: own, scheme: {mode: int4}, embeddings: {mode: int8}}]\n"
        "    compose: {target_bits: 5, name: own, measure_on: [s3://b/t]}\n",
        6, "a has a recipe named own already; give this composition another name",
    ),
    "two compositions of a size": (
        "models:\n  - name: a\n    preset: s3://b/p\n"
        "    recipes: [int8, {name: own, scheme: {mode: int4}, embeddings: {mode: int8}}]\n"
        "    compose:\n      - {target_bits: 5, measure_on: [s3://b/t]}\n"
        "      - {target_bits: 5, measure_on: [s3://b/u]}\n",
        8, "a has a composition named composed-5-bits already",
    ),
    "no mapping": ("- a\n", 1, "must be a mapping"),
    "keys twice": ("models: []\nmodels: []\n", 3, "models is given twice"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_with_its_line(mistake: str) -> None:
    text, line, message = MISTAKES[mistake]
    head = "" if "root" in text or text.startswith("-") else HEAD
    with pytest.raises(CatalogError) as caught:
        parsed(head + text)
    said = str(caught.value)
    assert said.startswith(f"catalog.yaml:{line}: "), said
    assert message in said
    assert "secret" not in said
    assert "\n" not in said


def test_the_limits_of_tasks_are_not_offered_to_a_set_of_texts() -> None:
    text, _, _ = MISTAKES["an unknown limit of a set"]
    with pytest.raises(CatalogError, match="the keys here are ") as caught:
        parsed(HEAD + text)
    offered = str(caught.value).partition("the keys here are ")[2].split(", ")
    assert offered == list(TextLimits.model_fields)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: !!python/object:os.system {}", b"", b"{"])
def test_a_file_that_is_not_a_catalog_is_rejected(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "catalog.yaml"
    file.write_bytes(content)
    with pytest.raises(CatalogError, match=r"catalog\.yaml:1: "):
        read_catalog(str(file))


@pytest.mark.exhaustive
def test_reading_time_is_linear_in_the_number_of_entries() -> None:
    calls = {}
    for number in (100, 1000):
        lines = "".join(
            f"  - {{name: m{i:04d}, preset: s3://bucket/presets/m{i:04d}}}\n" for i in range(number)
        )
        text = f"{HEAD}defaults: {{recipes: [int8, gptq-w4-g128]}}\nmodels:\n{lines}"
        counted: Counter[str] = Counter()
        # Counted, since time on a shared machine says nothing.
        sys.setprofile(lambda frame, event, _, counted=counted: counted.update([event]))
        try:
            catalog = parsed(text)
        finally:
            sys.setprofile(None)
        assert catalog.num_runs == 2 * number
        calls[number] = counted["call"]
    assert calls[100] > 1000
    assert calls[1000] < 11 * calls[100]
