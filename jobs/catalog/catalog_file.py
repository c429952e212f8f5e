"""Reads catalogs from YAML. A mistake rejects the whole file, with its line and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jobs.catalog.composition import (
    Composition,
    CompositionError,
    composition_of,
    composition_of_choices,
)
from jobs.catalog.entries import CatalogFile, Export, Gate, Model, Settings
from pipeline.errors import PipelineError, RecipeError, StorageError
from pipeline.evaluation.named_texts import unknown_name
from pipeline.recipe.auto_recipe import AnyRecipe, AutoRecipe
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.recipe_file import any_recipe_from_dict, load_recipe
from pipeline.recipe.yaml_document import (
    MarkedYaml,
    YamlPath,
    describe_mistake,
    mistake_order,
    mistakes_in,
    read_yaml,
)
from pipeline.storage.object_store import open_store
from pipeline.storage.overlap import check_apart
from pipeline.storage.user_files import read_given_text

_MAX_BYTES = 8 << 20
"""Some ten thousand models, with settings of their own."""
_WRITTEN = ("models", "requests", "runs")
"""The folders below a catalog's root."""
_REPLACED = {"compose"}
"""Settings of which a model's own replace the defaults, though both may be a mapping."""
_OWN = set(Model.model_fields) - set(Settings.model_fields)
"""What settings of a model no other model can have."""
_FILES = {"evaluate_on": "texts", "tasks": "FILE.jsonl"}


class CatalogError(PipelineError):
    """A catalog with a mistake."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of a catalog, with its defaults filled in; local paths are absolute.

    Attributes:
        aliases: other names under which its results are published, sorted.
        recipes: with the catalog's calibration settings applied, but for those that choose widths.
        compositions: results to make of blocks: of these recipes' runs, once they are made, or,
            of a recipe that chooses widths, of runs of their own.
        settings: all others.
    """

    name: str
    preset: str
    aliases: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    settings: Settings
    compositions: tuple[Composition, ...] = ()

    @property
    def result_names(self) -> tuple[str, ...]:
        """Of all results that are published, in the order in which they are made."""
        recipes = tuple(recipe.name for recipe in self.recipes)
        return recipes + tuple(one.name for one in self.compositions)


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The models and recipes that a team wants.

    Attributes:
        root_url: where runs, requests and releases are stored.
        entries: in execution order: by priority, then as written.
    """

    root_url: str
    entries: tuple[Entry, ...]

    @property
    def num_runs(self) -> int:
        return sum(len(entry.result_names) for entry in self.entries)


def read_catalog(path: str) -> Catalog:
    """Read and check a catalog file. Models and texts are not opened.

    Args:
        path: the file's path or URL. Relative local paths in it are relative to its folder.

    Raises:
        CatalogError: `file:line: what is wrong; what to do`.
    """
    text = read_given_text(path, max_bytes=_MAX_BYTES, error_type=CatalogError)
    folder = None if "://" in path else Path(path).expanduser().absolute().parent
    return parse_catalog(text, where=path, folder=folder)


def parse_catalog(text: str, *, where: str, folder: Path | None) -> Catalog:
    """Check a catalog's text, as `read_catalog` does.

    Args:
        where: the file, for messages.
        folder: what relative paths are relative to; None rejects them.
    """
    document = read_yaml(text, where=where, error_type=CatalogError, max_bytes=_MAX_BYTES)
    try:
        written = CatalogFile.model_validate(_with_defaults(document.values))
    except ValidationError as invalid:
        errors = sorted(
            _independent(mistakes_in(invalid)),
            key=lambda error: mistake_order(error, document.line_of(error["loc"])),
        )
        more = f" ({len(errors) - 1} more after it)" if len(errors) > 1 else ""
        mistake = describe_mistake(errors[0], CatalogFile)
        raise _error(document, errors[0]["loc"], f"{mistake}{more}") from None
    return _Resolver(document, folder).catalog(written)


def _error(document: MarkedYaml, path: YamlPath, text: str) -> CatalogError:
    return CatalogError(f"{document.where}:{document.line_of(path)}: {text}")


def _independent(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Drop "the list is too short" where it is so only because its bad entries do not count."""
    parents = {error["loc"][:depth] for error in errors for depth in range(len(error["loc"]))}
    return [e for e in errors if e["type"] != "too_short" or e["loc"] not in parents]


def _with_defaults(values: Any) -> Any:
    """Fill in `defaults` for each model; pydantic rejects values of the wrong shape later."""
    if not isinstance(values, dict):
        return values
    defaults, models = values.get("defaults"), values.get("models")
    if not isinstance(defaults, dict) or not isinstance(models, list):
        return values
    # Unknown keys would be reported again for every model.
    known = {name: value for name, value in defaults.items() if name in Settings.model_fields}
    merged = [
        _merged(known, model) if isinstance(model, dict) and "alias_of" not in model else model
        for model in models
    ]
    return values | {"models": merged}


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over`, completed from `under`; nested mappings are merged too."""
    found = {**under, **over}
    for name in under.keys() & over.keys() - _REPLACED:
        if isinstance(under[name], dict) and isinstance(over[name], dict):
            found[name] = _merged(under[name], over[name])
    return found


class _Resolver:
    """Checks what pydantic cannot: entries against each other, and what they refer to."""

    def __init__(self, document: MarkedYaml, folder: Path | None) -> None:
        self._document = document
        self._folder = folder
        self._recipes: dict[str, AnyRecipe] = {}
        self._made: dict[tuple[object, ...], AnyRecipe] = {}
        self._settings: dict[str, Settings] = {}
        self._root_url = ""

    def catalog(self, written: CatalogFile) -> Catalog:
        indices: dict[str, int] = {}
        for index, model in enumerate(written.models):
            if model.name in indices:
                first = self._document.line_of(("models", indices[model.name], "name"))
                raise self._error(
                    ("models", index, "name"),
                    f"the name {model.name} is taken by line {first}; rename one of them",
                )
            indices[model.name] = index
        self._root_url = self._absolute(written.root, ("root",))
        try:
            open_store(self._root_url)
        except StorageError as error:
            raise self._error(("root",), str(error)) from None
        aliases = self._aliases(written, indices)
        entries = [
            self._shared(
                self._entry(model, ("models", index), tuple(sorted(aliases.get(model.name, ()))))
            )
            for index, model in enumerate(written.models)
            if model.alias_of is None
        ]
        entries.sort(key=lambda entry: -entry.settings.priority)
        return Catalog(root_url=self._root_url, entries=tuple(entries))

    def _shared(self, entry: Entry) -> Entry:
        """The same entry; of settings that many entries have, one copy is kept."""
        key = entry.settings.model_dump_json(exclude=_OWN)
        if key not in self._settings:
            values = {name: getattr(entry.settings, name) for name in Settings.model_fields}
            self._settings[key] = Settings.model_construct(**values)
        return dataclasses.replace(entry, settings=self._settings[key])

    def _aliases(self, written: CatalogFile, indices: Mapping[str, int]) -> dict[str, list[str]]:
        """The aliases of each real model; an alias may name another alias."""
        found: dict[str, list[str]] = {}
        for index, model in enumerate(written.models):
            if model.alias_of is None:
                continue
            path = ("models", index, "alias_of")
            given = sorted(model.model_fields_set - {"name", "alias_of", "owner", "tags"})
            if given:
                raise self._error(
                    ("models", index, given[0]),
                    f"{model.name} is an alias, so {given[0]} is that of {model.alias_of}; "
                    "remove it here",
                )
            chain, current = [model.name], model
            while current.alias_of is not None:
                if current.alias_of not in indices:
                    near = difflib.get_close_matches(current.alias_of, indices, n=1)
                    hint = f"did you mean {near[0]}? " if near else ""
                    raise self._error(
                        path,
                        f"alias_of names no model of this file: {current.alias_of}; {hint}add it, "
                        "or correct the name",
                    )
                current = written.models[indices[current.alias_of]]
                if current.name in chain:
                    circle = " → ".join((*chain, current.name))
                    raise self._error(
                        path, f"aliases form a circle ({circle}); give one of them a preset"
                    )
                chain.append(current.name)
            found.setdefault(current.name, []).append(model.name)
        return found

    def _entry(self, model: Model, path: YamlPath, aliases: tuple[str, ...]) -> Entry:
        if model.preset is None:
            raise self._error(
                path, f"{model.name} has no preset; add preset: URL, or alias_of: another model"
            )
        if model.recipes is None:
            raise self._error(
                path, f"{model.name} has no recipes; add recipes: [...], here or to defaults"
            )
        if model.gate is not None:
            self._check_gate(model, model.gate, (*path, "gate"))
        recipes: dict[str, Recipe] = {}
        compositions: dict[str, Composition] = {}
        for index, given in enumerate(model.recipes):
            at: YamlPath = (*path, "recipes", index)
            recipe = self._recipe(given, model, at)
            if recipe.name in (*recipes, *compositions):
                raise self._error(
                    at, f"{model.name} has two recipes named {recipe.name}; rename or remove one"
                )
            if isinstance(recipe, AutoRecipe):
                compositions[recipe.name] = composition_of_choices(recipe)
            else:
                recipes[recipe.name] = recipe
        for made in self._compositions(model, recipes, compositions, path):
            compositions[made.name] = made
        preset = self._absolute(model.preset, (*path, "preset"))
        try:
            for written in _WRITTEN:
                check_apart(preset, f"{self._root_url.rstrip('/')}/{written}")
        except PipelineError as error:
            raise self._error((*path, "preset"), str(error)) from None
        texts: Any = self._absolute_files(model.evaluate_on, (*path, "evaluate_on"))
        tasks: Any = self._absolute_files(model.tasks, (*path, "tasks"))
        exports = tuple(
            self._with_absolute_like(export, (*path, "export", index))
            for index, export in enumerate(model.export)
        )
        return Entry(
            name=model.name,
            preset=preset,
            aliases=aliases,
            recipes=tuple(recipes.values()),
            compositions=tuple(compositions.values()),
            settings=model.model_copy(
                update={
                    "evaluate_on": texts or None,
                    "tasks": tasks or None,
                    "export": exports,
                }
            ),
        )

    def _compositions(
        self,
        model: Model,
        recipes: Mapping[str, Recipe],
        others: Mapping[str, Composition],
        path: YamlPath,
    ) -> Iterator[Composition]:
        if (model.compose or others) and any(export.format == "gptq" for export in model.export):
            raise self._error(
                (*path, "export"),
                f"{model.name}: a gptq checkpoint holds one width for all layers, and compositions "
                "have several, those of mode: auto too; export compressed-tensors or dense, or "
                "remove them",
            )
        taken = dict.fromkeys((*recipes, *others), "recipe")
        for index, asked in enumerate(model.compose):
            at: YamlPath = (*path, "compose", index)
            measure_on: Any = self._absolute_files(asked.measure_on, (*at, "measure_on"))
            try:
                made = composition_of(asked, recipes, measure_on)
            except CompositionError as error:
                raise self._error(at, f"{model.name}: {error}") from None
            if made.name in taken:
                raise self._error(
                    at,
                    f"{model.name} has a {taken[made.name]} named {made.name} already; give this "
                    "composition another name: ...",
                )
            taken[made.name] = "composition"
            yield made

    def _absolute_files(self, given: Any, at: YamlPath) -> Any:
        """The same URLs, in the same lists and mappings."""
        if isinstance(given, dict):
            return {name: self._absolute_files(urls, (*at, name)) for name, urls in given.items()}
        return tuple(self._absolute(url, at) for url in given or ())

    def _check_gate(self, model: Model, gate: Gate, at: YamlPath) -> None:
        if not gate.judges:
            raise self._error(
                at,
                "the gate sets no limit; give max_perplexity_increase, max_divergence, "
                "min_agreement or min_cosine, or, for tasks, min_recovery or max_flips",
            )
        evaluated = model.evaluated_on.sets
        for name in gate.sets:
            if name not in evaluated:
                raise self._error((*at, name), f"the gate: {unknown_name(name, evaluated)}")
        for key in sorted(gate.judges):
            if getattr(model, key) is None:
                raise self._error(
                    at, f"{model.name} has a gate but no {key}; add {key}: [{_FILES[key]}]"
                )

    def _with_absolute_like(self, export: Export, at: YamlPath) -> Export:
        if export.like is None:
            return export
        return export.model_copy(update={"like": self._absolute(export.like, at)})

    def _recipe(self, given: str | dict[str, Any], model: Model, at: YamlPath) -> AnyRecipe:
        changes = model.dtype, model.allow_partial, model.calibration.model_dump_json()
        key = repr(given), *changes
        if key not in self._made:
            try:
                self._made[key] = self._changed(self._given(given, at), model, at)
            except RecipeError as error:
                raise self._error(at, str(error)) from None
        return self._made[key]

    def _given(self, given: str | dict[str, Any], at: YamlPath) -> AnyRecipe:
        """A recipe as it is written, here or in a file."""
        if isinstance(given, dict):
            return any_recipe_from_dict(given)
        if given not in self._recipes:  # a file is read once, however many models name it
            is_file = "/" in given or given.endswith((".yaml", ".yml"))
            url = self._absolute(given, at) if is_file else given
            self._recipes[given] = load_recipe(url)
        return self._recipes[given]

    def _changed(self, recipe: AnyRecipe, model: Model, at: YamlPath) -> AnyRecipe:
        """A recipe with what a model's settings change in it."""
        if model.dtype is not None:
            recipe = recipe.model_copy(update={"dtype": model.dtype})
        if model.allow_partial:
            recipe = recipe.model_copy(update={"allow_partial": True})
        if not recipe.needs_calibration:
            return recipe
        values = recipe.to_dict()
        calibration = values["calibration"]
        calibration |= model.calibration.model_dump(mode="json", exclude_none=True)
        calibration["texts"] = [self._text(text, at) for text in calibration["texts"]]
        return any_recipe_from_dict(values, where=recipe.name)

    def _text(self, text: str | dict[str, Any], at: YamlPath) -> str | dict[str, Any]:
        if isinstance(text, str):
            return self._absolute(text, at)
        return text | {"url": self._absolute(text["url"], at)}

    def _absolute(self, url: str, path: YamlPath) -> str:
        """Make a local path absolute; URLs stay as they are."""
        if "://" in url or url.startswith("hf:"):
            return url
        local = Path(url).expanduser()
        if local.is_absolute():
            return str(local)
        if self._folder is None:
            raise self._error(
                path,
                f"{url} is relative, but this catalog was not read from a folder; write a full URL",
            )
        return os.path.normpath(self._folder / local)  # storage URLs must not contain ".."

    def _error(self, path: YamlPath, text: str) -> CatalogError:
        return _error(self._document, path, text)
