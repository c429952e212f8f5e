"""Catalogs from YAML files, refused whole, with file, line and remedy, before anything starts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jobs.catalog.entries import CatalogFile, Model, Settings
from pipeline.errors import PipelineError, RecipeError, StorageError
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.recipe_file import load_recipe, recipe_from_dict
from pipeline.recipe.yaml_document import (
    MAX_BYTES,
    MarkedYaml,
    YamlPath,
    describe_mistake,
    mistake_order,
    read_yaml,
)
from pipeline.storage.object_store import open_store
from pipeline.storage.user_files import read_given_file


class CatalogError(PipelineError):
    """A catalog that cannot be carried out as it is written."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of a catalog, everything that it inherits written out.

    Attributes:
        name: of the model.
        preset: its URL; local paths are absolute.
        aliases: other names under which its results are published, sorted.
        recipes: with the calibration that the catalog wants.
        settings: the rest, as the file says.
    """

    name: str
    preset: str
    aliases: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    settings: Settings


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """What a team wants, in the order in which it is to be made: by priority, then as written.

    Attributes:
        where: the file, for messages.
        root_url: where the results go.
    """

    where: str
    root_url: str
    entries: tuple[Entry, ...]

    @property
    def num_runs(self) -> int:
        return sum(len(entry.recipes) for entry in self.entries)


def read_catalog(path: str) -> Catalog:
    """Read and check a whole catalog; no model is looked at.

    Args:
        path: of the file, or its URL. Relative local paths in it start at its folder.

    Raises:
        CatalogError: `file:line: what is wrong; what to do`.
    """
    content = read_given_file(path, max_bytes=MAX_BYTES, error_type=CatalogError)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CatalogError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    folder = None if "://" in path else Path(path).expanduser().absolute().parent
    return parse_catalog(text, where=path, folder=folder)


def parse_catalog(text: str, *, where: str, folder: Path | None) -> Catalog:
    """Check a catalog's text.

    Args:
        folder: where relative paths start; None refuses them.

    Raises:
        CatalogError: `where:line: what is wrong; what to do`.
    """
    document = read_yaml(text, where=where, error_type=CatalogError)
    try:
        written = CatalogFile.model_validate(_with_defaults(document.values))
    except ValidationError as invalid:
        errors = sorted(
            filter(_counts(invalid.errors()), invalid.errors()),
            key=lambda error: mistake_order(error, document.line_of(error["loc"])),
        )
        more = f" ({len(errors) - 1} more after it)" if len(errors) > 1 else ""
        mistake = describe_mistake(errors[0], CatalogFile)
        raise CatalogError(
            f"{where}:{document.line_of(errors[0]['loc'])}: {mistake}{more}"
        ) from None
    checked = _Checked(document, folder)
    return checked.catalog(written)


def _counts(errors: Sequence[ErrorDetails]) -> Callable[[ErrorDetails], bool]:
    """Leave out that a list is too short which is so only without its bad entries."""

    def counts(error: ErrorDetails) -> bool:
        place = error["loc"]
        inside = any(len(e["loc"]) > len(place) and e["loc"][: len(place)] == place for e in errors)
        return error["type"] != "too_short" or not inside

    return counts


def _with_defaults(values: Any) -> Any:
    """What models leave out, from `defaults`; wrong shapes are left for pydantic to refuse."""
    if not isinstance(values, dict):
        return values
    defaults, models = values.get("defaults"), values.get("models")
    if not isinstance(defaults, dict) or not isinstance(models, list):
        return values
    # Merged entries would repeat a mistake that stands in the defaults.
    known = {name: value for name, value in defaults.items() if name in Settings.model_fields}
    merged = [
        _merged(known, model) if isinstance(model, dict) and "alias_of" not in model else model
        for model in models
    ]
    return values | {"models": merged}


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over`, and what only `under` has; mappings are merged in their turn."""
    found = {**under, **over}
    for name in under.keys() & over.keys():
        if isinstance(under[name], dict) and isinstance(over[name], dict):
            found[name] = _merged(under[name], over[name])
    return found


class _Checked:
    """What pydantic cannot see: one entry against another, and what the entries name."""

    def __init__(self, document: MarkedYaml, folder: Path | None) -> None:
        self._document = document
        self._folder = folder
        self._recipes: dict[str, Recipe] = {}

    def catalog(self, written: CatalogFile) -> Catalog:
        places: dict[str, int] = {}
        for index, model in enumerate(written.models):
            if model.name in places:
                first = self._document.line_of(("models", places[model.name], "name"))
                raise self._refuse(
                    ("models", index, "name"),
                    f"the name {model.name} is taken by line {first}; rename one of them",
                )
            places[model.name] = index
        root_url = self._anywhere(written.root, ("root",))
        try:
            open_store(root_url)
        except StorageError as error:
            raise self._refuse(("root",), str(error)) from None
        aliases = self._aliases(written, places)
        entries = [
            self._entry(model, ("models", index), tuple(sorted(aliases.get(model.name, ()))))
            for index, model in enumerate(written.models)
            if model.alias_of is None
        ]
        entries.sort(key=lambda entry: -entry.settings.priority)
        return Catalog(where=self._document.where, root_url=root_url, entries=tuple(entries))

    def _aliases(self, written: CatalogFile, places: Mapping[str, int]) -> dict[str, list[str]]:
        """Of each model that is no alias, those that stand for it, over however many steps."""
        found: dict[str, list[str]] = {}
        for index, model in enumerate(written.models):
            if model.alias_of is None:
                continue
            place = ("models", index, "alias_of")
            given = sorted(model.model_fields_set - {"name", "alias_of", "owner", "tags"})
            if given:
                raise self._refuse(
                    ("models", index, given[0]),
                    f"{model.name} is an alias, so {given[0]} is that of {model.alias_of}; "
                    "remove it here",
                )
            passed, current = [model.name], model
            while current.alias_of is not None:
                if current.alias_of not in places:
                    raise self._refuse(place, self._unknown_model(current.alias_of, places))
                current = written.models[places[current.alias_of]]
                if current.name in passed:
                    circle = " → ".join((*passed, current.name))
                    raise self._refuse(
                        place, f"aliases go round in a circle ({circle}); give one of them a preset"
                    )
                passed.append(current.name)
            found.setdefault(current.name, []).append(model.name)
        return found

    @staticmethod
    def _unknown_model(name: str, places: Mapping[str, int]) -> str:
        near = difflib.get_close_matches(name, places, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"alias_of names no model of this file: {name}; {hint}add it, or mend the name"

    def _entry(self, model: Model, place: YamlPath, aliases: tuple[str, ...]) -> Entry:
        if model.preset is None:
            raise self._refuse(
                place, f"{model.name} has no preset; add preset: URL, or alias_of: another model"
            )
        if model.recipes is None:
            raise self._refuse(
                place, f"{model.name} has no recipes; add recipes: [...], here or to defaults"
            )
        if model.gate is not None and model.evaluate_on is None:
            raise self._refuse(
                (*place, "gate"),
                f"{model.name} has a gate but no evaluate_on to judge by; add evaluate_on: [texts]",
            )
        if model.gate is not None and not model.gate.model_dump(exclude_none=True):
            raise self._refuse(
                (*place, "gate"),
                "the gate sets no limit; give max_perplexity_increase, max_divergence or "
                "min_cosine",
            )
        recipes: list[Recipe] = []
        for index, given in enumerate(model.recipes):
            at = (*place, "recipes", index)
            recipe = self._recipe(given, model, at)
            if any(recipe.name == other.name for other in recipes):
                raise self._refuse(
                    at, f"{model.name} has two recipes named {recipe.name}; rename or remove one"
                )
            recipes.append(recipe)
        texts = model.evaluate_on
        return Entry(
            name=model.name,
            preset=self._anywhere(model.preset, (*place, "preset")),
            aliases=aliases,
            recipes=tuple(recipes),
            settings=model.model_copy(
                update={
                    "evaluate_on": None
                    if texts is None
                    else tuple(self._anywhere(text, (*place, "evaluate_on")) for text in texts)
                }
            ),
        )

    def _recipe(self, given: str | dict[str, Any], model: Model, at: YamlPath) -> Recipe:
        try:
            if isinstance(given, str):
                # A file is read once, however many models name it.
                if given not in self._recipes:
                    is_file = "/" in given or given.endswith((".yaml", ".yml"))
                    url = self._anywhere(given, at) if is_file else given
                    self._recipes[given] = load_recipe(url)
                recipe = self._recipes[given]
            else:
                recipe = recipe_from_dict(given)
            return self._calibrated(recipe, model, at)
        except RecipeError as error:
            raise self._refuse(at, str(error)) from None

    def _calibrated(self, recipe: Recipe, model: Model, at: YamlPath) -> Recipe:
        if not recipe.needs_calibration:
            return recipe
        values = recipe.to_dict()
        values["calibration"] |= model.calibration.model_dump(mode="json", exclude_none=True)
        texts = values["calibration"]["texts"]
        values["calibration"]["texts"] = [self._anywhere(text, at) for text in texts]
        return recipe_from_dict(values, where=recipe.name)

    def _anywhere(self, url: str, place: YamlPath) -> str:
        """A local path as any process of this machine finds it; URLs as they are."""
        if "://" in url or url.startswith("hf:"):
            return url
        path = Path(url).expanduser()
        if path.is_absolute():
            return str(path)
        if self._folder is None:
            raise self._refuse(
                place, f"{url} is relative, but this catalog lies in no folder; write a full URL"
            )
        return os.path.normpath(self._folder / path)  # storage URLs hold no ".."

    def _refuse(self, place: YamlPath, text: str) -> CatalogError:
        return CatalogError(f"{self._document.where}:{self._document.line_of(place)}: {text}")
