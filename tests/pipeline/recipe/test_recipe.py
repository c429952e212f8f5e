"""A recipe's layers, its round trip, and every mistake named by file, line and remedy."""

import json
import re
import subprocess
import sys

import fsspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import PipelineError, RecipeError
from pipeline.export.code_formats import code_format
from pipeline.export.kernels import serving_kernel
from pipeline.recipe.recipe import (
    Calibration,
    Recipe,
    Rule,
    check_recipe,
    statistics_of,
    unmatched_patterns,
)
from pipeline.recipe.recipe_file import builtin_recipes, load_recipe, parse_recipe, recipe_from_dict
from quantizer.schemes import SCHEMES, AWQScheme, GPTQScheme, Int4Scheme, Int8Scheme

QUERY = "llama_transformer_decoder_3/self_attention/query"
DOWN = "llama_transformer_decoder_3/feedforward_output_dense"
TEXTS = Calibration(texts=("a.txt",))

FULL = """\
name: mixed
scheme:
  mode: gptq
  weight_bits: 3
  group_size: 64
rules:
  - pattern: self_attention/(query|key)$
    scheme: {mode: int8}
  - pattern: self_attention
    scheme: null
embeddings: {mode: int4, block_size: 64}
calibration:
  texts:
    - hf:allenai/c4/en?split=train
    - s3://bucket/texts/*.jsonl
  num_samples: 256
  sequence_length: 1024
  sampling: sequential
"""


def test_the_first_rule_that_matches_decides():
    recipe = parse_recipe(FULL, where="mixed.yaml")
    assert recipe.scheme_for(QUERY, "kernel") == Int8Scheme()
    assert recipe.scheme_for(QUERY.replace("query", "value"), "kernel") is None
    assert recipe.scheme_for(DOWN, "kernel") == GPTQScheme(weight_bits=3, group_size=64)


def test_rules_leave_embeddings_alone():
    everything = Rule(pattern=".", scheme=Int8Scheme())
    recipe = Recipe(name="a", scheme=None, rules=(everything,))
    assert recipe.scheme_for("token_embedding", "embedding") is None
    recipe = Recipe(name="a", scheme=Int8Scheme(), embeddings=Int4Scheme())
    assert recipe.scheme_for("token_embedding", "embedding") == Int4Scheme()


@pytest.mark.parametrize(
    ("mode", "statistics"),
    [
        ("gptq", "hessian"),
        ("awq", "hessian"),
        ("float8", "magnitudes"),
        ("int8", None),
        ("int4", None),
    ],
)
def test_calibration_is_needed_just_where_a_scheme_asks_for_it(mode, statistics):
    scheme = SCHEMES[mode]()
    assert statistics_of(scheme) == statistics
    by_default = Recipe(name="a", scheme=scheme, calibration=TEXTS)
    by_rule = Recipe(
        name="a", scheme=None, rules=(Rule(pattern="q", scheme=scheme),), calibration=TEXTS
    )
    assert by_default.needs_calibration == by_rule.needs_calibration == (statistics is not None)


def test_a_recipe_cannot_be_changed():
    recipe = builtin_recipes()["gptq-w4-g128"]
    for part, field in ((recipe, "name"), (recipe.calibration, "seed")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, 1)


# --- to and from plain values

RECIPES = [*builtin_recipes().values(), parse_recipe(FULL, where="mixed.yaml")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_comes_back_from_json_and_yaml(recipe):
    text = json.dumps(recipe.to_dict(), sort_keys=True)
    assert recipe_from_dict(json.loads(text)) == recipe
    assert parse_recipe(yaml.safe_dump(recipe.to_dict()), where="a.yaml") == recipe


@pytest.mark.parametrize("text", [FULL, "name: a # b\nscheme: &s {mode: int4}\nembeddings: *s\n"])
def test_a_file_means_the_same_where_only_the_slow_reader_is(text, monkeypatch):
    found = parse_recipe(text, where="a.yaml")
    monkeypatch.setattr(yaml, "__with_libyaml__", False)
    assert parse_recipe(text, where="a.yaml") == found


def test_plain_values_spell_defaults_out():
    short = parse_recipe("name: a\nscheme: {mode: int4}", where="a.yaml")
    long = parse_recipe("name: a\nscheme: {mode: int4, block_size: 128}\nrules: []", where="b.yaml")
    assert short.to_dict() == long.to_dict()
    assert short.to_dict()["scheme"] == {"mode": "int4", "block_size": 128}


def test_calibration_that_nothing_needs_is_no_part_of_the_digest():
    recipe = Recipe(name="a", scheme=Int8Scheme())
    assert Recipe(name="a", scheme=Int8Scheme(), calibration=TEXTS).to_dict() == recipe.to_dict()


# --- built-in recipes


def test_built_in_recipes_are_named_for_what_they_are():
    for name, recipe in builtin_recipes().items():
        assert recipe.name == name
        mode, *marks = name.split("-")
        assert recipe.scheme.mode == mode
        for mark in marks:
            if re.fullmatch(r"w\d+", mark):
                assert recipe.scheme.weight_bits == int(mark[1:])
            if re.fullmatch(r"g\d+", mark):
                size = getattr(recipe.scheme, "group_size", None) or recipe.scheme.block_size
                assert size == int(mark[1:])
        # As Keras' own model.quantize: embeddings too. Exports would only dequantize them.
        embeddings = recipe.scheme if mode in ("int8", "int4") else Int8Scheme()
        assert recipe.embeddings == (None if recipe.servable else embeddings)


def test_built_in_recipes_for_serving_have_a_kernel_in_every_format():
    found = [recipe for recipe in builtin_recipes().values() if recipe.servable]
    assert found
    for recipe in found:
        formats = {"layer": code_format(recipe.scheme)}
        takes_both = isinstance(recipe.scheme, GPTQScheme)  # vLLM reads symmetric gptq only
        for as_format in ("compressed-tensors", "gptq") if takes_both else ("compressed-tensors",):
            assert "Marlin" in serving_kernel("layer", as_format, formats).name


def test_only_a_recipe_that_is_servable_says_so():
    assert "servable" not in builtin_recipes()["gptq-w4-g128"].to_dict()
    assert builtin_recipes()["gptq-w4-g128-sym"].to_dict()["servable"] is True


def test_built_in_recipes_of_two_bits_train_and_the_best_of_more_correct_drift_alone():
    for name, recipe in builtin_recipes().items():
        assert (recipe.tuning is not None) == name.startswith("gptq-w2-")
        if recipe.tuning is not None or name.endswith("-best"):
            assert recipe.scheme.drift_correction == 1.0
            assert recipe.scheme.scale_refit
        else:
            assert not getattr(recipe.scheme, "drift_correction", 0.0)


def test_built_in_gptq_uses_its_most_accurate_settings():
    for recipe in builtin_recipes().values():
        if isinstance(recipe.scheme, GPTQScheme):
            assert recipe.scheme.activation_order
            assert recipe.scheme.scale_search
            assert recipe.scheme.refinement_sweeps == 2


def test_listing_recipes_imports_neither_jax_nor_keras_nor_datasets():
    program = (
        "import sys; from pipeline.recipe.recipe_file import load_recipe; load_recipe('int8'); "
        "sys.exit(bool({'jax', 'keras', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- loading


def test_a_name_and_a_file_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\nscheme: {mode: int8}\n")
    (tmp_path / "int8").write_text("name: other\nscheme: {mode: int4}\n")
    assert load_recipe("int8") == builtin_recipes()["int8"]
    assert load_recipe("./int8").name == "other"
    assert load_recipe("mine.yaml") == load_recipe(str(tmp_path / "mine.yaml"))


def test_a_recipe_is_read_from_any_storage():
    with fsspec.open("memory://recipes/mine.yaml", "w") as file:
        file.write(FULL)
    recipe = load_recipe("memory://recipes/mine.yaml")
    assert recipe == parse_recipe(FULL, where="mixed.yaml")


def test_an_unknown_name_is_refused_with_all_known_ones():
    with pytest.raises(RecipeError, match="did you mean gptq-w4-g128") as caught:
        load_recipe("gptq-w4-g182")
    for name in builtin_recipes():
        assert name in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=rf"{tmp_path}/a.yaml: no such file; check the path"):
        load_recipe(f"{tmp_path}/a.yaml")


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="a directory"):
        load_recipe(f"{tmp_path}/")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"name: a\nscheme: \xff\xfe\n")
    with pytest.raises(RecipeError, match=r"a\.yaml:2: not UTF-8 text; save the file as UTF-8"):
        load_recipe(f"{tmp_path}/a.yaml")


def test_a_huge_file_is_refused_unread(tmp_path):
    (tmp_path / "a.yaml").write_text("# " + "x" * 300_000)
    with pytest.raises(RecipeError, match="more than 262144 bytes"):
        load_recipe(f"{tmp_path}/a.yaml")


# --- mistakes

CALIBRATED = "name: a\nscheme: {mode: gptq}\ncalibration:\n  texts: [a.txt]\n"
MISTAKES = {
    "unknown key": ("name: a\nscheme: {mode: int8}\nscheem: 1\n", 3, "unknown key scheem; the"),
    "misspelled key": ("name: a\nschem: {mode: int8}\n", 2, "unknown key schem; the"),
    "missing name": ("scheme: {mode: int8}\n", 1, "name is missing; add it"),
    "missing scheme": ("name: a\n", 1, "scheme is missing; add it"),
    "name of another type": ("name: 3\nscheme: null\n", 1, "name must be text, got 3; put it"),
    "name for no key": ("scheme: {mode: int8}\nname: A/B\n", 2, "name must match"),
    "no mapping": ("- a\n", 1, "must be a mapping"),
    "scheme as text": (
        "name: a\nscheme: int8\n",
        2,
        "'int8' is not a scheme; give a mapping such as {mode:",
    ),
    "unknown mode": (
        "name: a\nscheme:\n  group_size: 4\n  mode: gptk\n",
        4,
        "unknown scheme mode 'gptk'; choose one of gptq",
    ),
    "bad field of a scheme": (
        "name: a\nscheme:\n  mode: gptq\n  weight_bits: 5\n",
        4,
        "weight_bits must be 2, 3, 4 or 8, got 5",
    ),
    "unknown field of a scheme": (
        "name: a\nscheme:\n  mode: gptq\n\n  bits: 4\n",
        5,
        "no field 'bits'; its fields are weight_bits",
    ),
    "exponent without a point": (
        "name: a\nscheme:\n  mode: gptq\n  hessian_damping: 1e-2\n",
        4,
        "YAML reads 1e-2 as text; write 0.01",
    ),
    "bad pattern": (
        "name: a\nscheme: {mode: int8}\nrules:\n- scheme: null\n  pattern: '('\n",
        5,
        "rules[0].pattern: '(' is not a regular expression",
    ),
    "a rule without scheme": (
        "name: a\nscheme: {mode: int8}\nrules:\n- {pattern: a, scheme: null}\n- pattern: b\n",
        5,
        "rules[1].scheme is missing",
    ),
    "unknown key of a rule": (
        "name: a\nscheme: {mode: int8}\nrules:\n- pattern: b\n  scheme: null\n  kind: kernel\n",
        6,
        "unknown key rules[0].kind; the keys here are pattern, scheme",
    ),
    "rules that are no list": ("name: a\nscheme: null\nrules: {a: b}\n", 3, "rules must be a list"),
    "gptq embeddings": (
        "name: a\nscheme: null\nembeddings: {mode: float8}\n",
        3,
        "int8 or int4 only, not float8; use {mode: int8}",
    ),
    "nothing to do": ("name: a\nscheme: null\n", 1, "nothing would be quantized; give scheme"),
    "no calibration": ("name: a\nscheme: {mode: awq}\n", 1, "awq must see texts; add calibration"),
    "no texts": (
        CALIBRATED.replace("[a.txt]", "[]"),
        3,
        "calibration: nothing to calibrate on; name texts",
    ),
    "texts that are text": (CALIBRATED.replace("[a.txt]", "a.txt"), 4, "texts must be a list"),
    "number in quotes": (CALIBRATED + "  num_samples: '8'\n", 5, "must be a whole number, got '8'"),
    "number that is truth": (CALIBRATED + "  num_samples: true\n", 5, "must be a whole number"),
    "number too small": (CALIBRATED + "  num_samples: 0\n", 5, "must be at least 1, got 0"),
    "no choice": (
        CALIBRATED + "  sampling: first\n",
        5,
        "calibration.sampling must be 'sequential' or 'random', got 'first'",
    ),
    "truth in words": (CALIBRATED + "  packing: 'no'\n", 5, "packing must be true or false"),
    "unknown key of calibration": (
        CALIBRATED + "  sead: 1\n",
        5,
        "unknown key calibration.sead; the keys here are texts, text_field, num_samples",
    ),
    "empty text field": (CALIBRATED + "  text_field: ''\n", 5, "calibration.text_field is empty"),
    "key given twice": ("name: a\nscheme: {mode: int8}\nname: b\n", 3, "name is given twice"),
    "no YAML": ("name: a\nscheme: [\n", 3, "correct the YAML"),
    "tab": ("name: a\n\tscheme: null\n", 2, "correct the YAML"),
    "two documents": ("name: a\n---\nname: b\n", 2, "correct the YAML"),
    "empty file": ("# nothing\n", 1, "the file is empty"),
    "control character": ("name: a\nscheme: \x07\n", 2, "remove that character"),
    "an object": ("name: a\nscheme: !!python/name:os.system\n", 2, "correct the YAML"),
    "impossible date": ("name: 2024-13-45\n", 1, "put such values in quotes"),
    "unknown anchor": ("name: a\nscheme: *gptq\n", 2, "undefined alias"),
    "recursion": ("name: a\nscheme: &s {mode: *s}\n", 2, "unknown scheme mode"),
}


@pytest.mark.parametrize(("text", "line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_by_file_line_and_remedy(text, line, message):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, where="a.yaml")
    found = str(caught.value)
    assert found.startswith(f"a.yaml:{line}: ")
    assert message in found
    assert "; " in found or "must be" in found  # a remedy, or a rule that is one
    assert "\n" not in found


def test_the_first_of_several_mistakes_is_named_and_the_others_counted():
    text = "name: a\nscheme: {mode: int8}\nrules: 5\nwrong: 1\nembeddings: 3\n"
    with pytest.raises(RecipeError, match=r"a.yaml:3: rules .* \(2 more after it\)$"):
        parse_recipe(text, where="a.yaml")


def test_plain_values_are_refused_by_key():
    with pytest.raises(RecipeError, match=r"catalog\[3\]: calibration.seed must be a whole"):
        recipe_from_dict(
            {"name": "a", "scheme": None, "calibration": {"texts": ["a"], "seed": 0.5}},
            where="catalog[3]",
        )


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 20 aliases"),
        ("[" * 5000, "nested more than 20 deep"),
        ("name: " + "{a: " * 5000, "nested more than 20 deep"),
        ("- " * 5000, "nested more than 20 deep"),
        ("# " + "x" * 300_000, "more than 262144 bytes"),
    ],
    ids=["aliases", "lists", "mappings", "dashes", "length"],
)
def test_a_file_made_to_exhaust_its_reader_is_refused(text, message):
    with pytest.raises(RecipeError, match=rf"bomb.yaml:\d+: {message}"):
        parse_recipe(text, where="bomb.yaml")


def test_an_anchor_may_be_used_again():
    text = "name: a\nscheme: &s {mode: int4}\nrules:\n- {pattern: q, scheme: *s}\n"
    assert parse_recipe(text, where="a.yaml").rules[0].scheme == Int4Scheme()


KEYS = [*Recipe.model_fields, *Calibration.model_fields, "pattern", "mode", "weight_bits"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


def outcome(read, *arguments, **options):
    try:
        return read(*arguments, **options)
    except PipelineError as error:
        return str(error)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_whatever_the_values_the_error_is_one_line_of_ours(values):
    for found in (
        outcome(recipe_from_dict, values),
        outcome(parse_recipe, yaml.safe_dump(values), where="a.yaml"),
    ):
        assert isinstance(found, Recipe) or "\n" not in found


# --- against a model's layers

LAYERS = [
    ("block_0/query", "kernel", 576),
    ("block_0/down", "kernel", 1536),
    ("block_0/tiny", "kernel", 48),
    ("token_embedding", "embedding", 576),
]


def test_a_group_larger_than_the_layer_is_refused_before_anything_starts():
    for scheme in (GPTQScheme(group_size=64), AWQScheme(group_size=64)):
        recipe = Recipe(name="mine", scheme=scheme, calibration=TEXTS)
        with pytest.raises(RecipeError) as caught:
            check_recipe(recipe, LAYERS)
        message = str(caught.value)
        assert "block_0/tiny (group_size 64, in_features 48)" in message
        assert "at most 48, or -1" in message
        assert "query" not in message
        tiny = Rule(pattern="tiny", scheme=None)
        check_recipe(recipe.model_copy(update={"rules": (tiny,)}), LAYERS)


def test_many_offending_layers_are_counted():
    layers = [(f"block_{i}/query", "kernel", 32) for i in range(40)]
    recipe = Recipe(name="mine", scheme=GPTQScheme(), calibration=TEXTS)
    with pytest.raises(RecipeError, match=r"block_4/query .* and 35 more; use"):
        check_recipe(recipe, layers)


@pytest.mark.parametrize(
    "scheme", [GPTQScheme(group_size=-1), GPTQScheme(group_size=48), Int4Scheme(), Int8Scheme()]
)
def test_short_last_groups_and_large_int4_blocks_pass(scheme):
    check_recipe(Recipe(name="a", scheme=scheme, calibration=TEXTS), LAYERS)


def test_a_recipe_that_would_change_nothing_is_refused():
    rule = Rule(pattern="expert", scheme=Int8Scheme())
    with pytest.raises(RecipeError, match="none of the model's 4 layers would be quantized"):
        check_recipe(Recipe(name="a", scheme=None, rules=(rule,)), LAYERS)


def test_patterns_that_decide_nothing_are_told():
    rules = [
        Rule(pattern=pattern, scheme=None) for pattern in ("query", "block_0/qu", "router", "tiny")
    ]
    recipe = Recipe(name="a", scheme=Int8Scheme(), rules=tuple(rules))
    assert unmatched_patterns(recipe, LAYERS) == ("block_0/qu", "router")


@pytest.mark.parametrize("chat", [True, False, None])
def test_how_conversations_are_read_is_kept_and_not_mentioned_where_nothing_was_chosen(chat):
    scheme = {"mode": "gptq"}
    recipe = recipe_from_dict(
        {"name": "a", "scheme": scheme, "calibration": {"texts": ["a.txt"], "chat": chat}}
    )
    assert recipe.calibration.chat is chat
    assert ("chat" in recipe.to_dict()["calibration"]) == (chat is not None)
    assert recipe_from_dict(recipe.to_dict()) == recipe


def test_inputs_are_kept_and_not_mentioned_where_there_are_none():
    given = {"images": "s3://bucket/images.npy"}
    scheme = {"mode": "gptq"}
    recipe = recipe_from_dict(
        {"name": "a", "scheme": scheme, "calibration": {"inputs": given, "num_samples": 4}}
    )
    assert recipe.to_dict()["calibration"]["inputs"] == given
    assert recipe_from_dict(recipe.to_dict()) == recipe
    texts = recipe_from_dict({"name": "a", "scheme": scheme, "calibration": {"texts": ["a.txt"]}})
    assert "inputs" not in texts.to_dict()["calibration"]


WEIGHTED = """\
name: weighted
scheme: {mode: gptq}
calibration:
  texts:
    - {url: manual.jsonl, weight: 2}
    - {url: novels.txt, weight: 1.5, text_field: body}
  num_samples: 16
"""


def test_weighted_texts_come_back_from_plain_values():
    recipe = parse_recipe(WEIGHTED, where="weighted.yaml")
    values = json.loads(json.dumps(recipe.to_dict()))
    assert values["calibration"]["texts"] == [
        {"url": "manual.jsonl", "weight": 2.0},
        {"url": "novels.txt", "weight": 1.5, "text_field": "body"},
    ]
    assert recipe_from_dict(values) == recipe
    assert recipe.calibration.text_urls == ("manual.jsonl", "novels.txt")
    assert recipe.calibration.window_shares == (9, 7)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("weight: 2", "weight: 0", 5, "calibration.texts[0].weight must be greater than 0, got 0"),
        ("weight: 2", "weight: .nan", 5, "calibration.texts[0].weight must be finite, got nan"),
        ("weight: 2", "weight: true", 5, "calibration.texts[0].weight must be a number, got True"),
        ("weight: 2", "weight: 1e-2", 5, "got '1e-2'; write it without quotes, 1e-2 as 1.0e-2"),
        ("weight: 2", "wight: 2", 5, "the keys here are url, weight, text_field"),
        ("url: manual.jsonl, ", "", 5, "calibration.texts[0].url is missing; add it"),
        ("{url: manual.jsonl, weight: 2}", "7", 5, "calibration.texts[0] must be text, got 7"),
        ("{url: manual.jsonl, weight: 2}", "manual.jsonl", 4, "manual.jsonl has no weight, and"),
        ("weight: 1.5", "weight: 0.01", 4, "gives it none of 16 windows; raise num_samples or"),
    ],
)
def test_a_mistake_in_weighted_texts_is_named_by_line(old, new, line, message):
    assert old in WEIGHTED
    with pytest.raises(RecipeError) as caught:
        parse_recipe(WEIGHTED.replace(old, new), where="weighted.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"weighted.yaml:{line}: ")


@pytest.mark.parametrize("tuning", [None, {}, {"steps": 7, "offset_rate": 0}])
def test_tuning_is_kept_and_not_mentioned_where_there_is_none(tuning):
    values = {"name": "a", "scheme": {"mode": "gptq"}, "calibration": {"texts": ["a"]}}
    recipe = recipe_from_dict(values if tuning is None else values | {"tuning": tuning})
    found = recipe.to_dict()
    assert ("tuning" in found) == (tuning is not None)
    assert recipe_from_dict(found) == recipe


@pytest.mark.parametrize(
    ("scheme", "tuning", "message"),
    [
        ("int8", {}, "no layer gets gptq; give scheme or a rule {mode: gptq}"),
        ("gptq", {"offset_rate": 0, "scale_rate": 0, "norm_rate": 0}, "every learning rate is 0"),
        ("gptq", {"steps": 0}, "tuning.steps"),
        ("gptq", {"scale_rate": 2}, "tuning.scale_rate"),
        ("gptq", {"norm_rate": True}, "tuning.norm_rate"),
        ("gptq", {"norm_rate": "0.5"}, "tuning.norm_rate"),
        ("gptq", {"rate": 1}, "tuning.rate"),
    ],
)
def test_tuning_that_would_do_nothing_or_harm_is_refused(scheme, tuning, message):
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict(
            {
                "name": "a",
                "scheme": {"mode": scheme},
                "calibration": {"texts": ["a"]},
                "tuning": tuning,
            }
        )
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
