"""Exports as part of a run: foreseen before any work, made when it is finished."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.execute import Compute
from jobs.export import exported_json, kernels_table, log_exported, log_notes
from jobs.logging import log_event, status
from pipeline.errors import (
    DamagedObjectError,
    ExportError,
    ObjectExistsError,
    PlanMismatchError,
)
from pipeline.executor.protocol import FunctionRunner
from pipeline.export.description import ExportDescription, MadeExport
from pipeline.export.manifest import EXPORT_KEY, REQUEST_KEY, discard, forget_progress
from pipeline.export.settings import ExportSettings, wanted_exports
from pipeline.plan import Plan
from pipeline.recipe.recipe import Recipe
from pipeline.remote_planning import (
    check_planned_exports,
    export_result,
    preview_exports,
    request_of_export,
    servability,
)
from pipeline.run.commits import read_manifest
from pipeline.run.evaluations import find_evaluations, not_finite
from pipeline.storage.object_store import ObjectStore, open_store

# What asks for an export, before the format's name: of `quantfleet export`, of `quantize`, and in a
# catalog.
_EXPORTS_OPTION = "--format "
_OPTION = "--export "
CATALOG_OPTION = "export: "


@dataclass(frozen=True, kw_only=True)
class ForeseenExports:
    """What would serve a run's result.

    Attributes:
        asked: a description of each export that was asked for.
        otherwise: of an export that nobody asked for, or why there can be none; None if that does
            not matter.
    """

    asked: tuple[ExportDescription, ...] = ()
    otherwise: ExportDescription | str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found: dict[str, Any] = {
            "exports": [{**one.facts(), "tensors": one.tensors} for one in self.asked]
        }
        if self.otherwise is not None:
            found["export"] = self._otherwise()
        return found

    def show(self, name: str = "") -> None:
        """Print a table for each export that was asked for, else a line.

        Args:
            name: of the run, where there are several.
        """
        for one in self.asked:
            title = " ".join(filter(None, (name, f"exported as {one.format}")))
            log_event("export", "", one.facts(), table=kernels_table(one.tensors, title))
            log_notes(one)
        if self.otherwise is not None:
            log_event("export", self._otherwise())

    def warn(self, recipe: Recipe) -> None:
        """Before hours are spent, say what no runtime would serve well."""
        log_notes(*self.asked)
        if isinstance(self.otherwise, str):
            text = f"recipe {recipe.name} is meant to be served, but: {self._otherwise()}"
            log_event("note", text, level=logging.WARNING)
        elif self.otherwise is not None:
            log_notes(self.otherwise)

    def _otherwise(self) -> str:
        if isinstance(self.otherwise, str):
            return f"the result could not be exported as compressed-tensors: {self.otherwise}"
        assert self.otherwise is not None
        return (
            f"vLLM's kernels for the result exported as {self.otherwise.format}: "
            f"{self.otherwise.kernels}; add --export {self.otherwise.format} to see which, and to "
            "export it"
        )


def foresee_exports(
    runner: FunctionRunner,
    source_url: str,
    recipe: Recipe,
    exports: tuple[ExportSettings, ...],
    *,
    dry_run: bool,
    option: str = _OPTION,
) -> ForeseenExports:
    """Find out what would serve a run's result, where somebody asks for that.

    Args:
        dry_run: somebody wants to know what can be known.
        option: what asks for an export here, before the format's name.

    Raises:
        ExportError: what was asked for is impossible, and what to do instead.
    """
    if exports:
        with _named(option):
            return ForeseenExports(asked=runner.run(preview_exports, source_url, recipe, exports))
    if dry_run or recipe.servable:
        otherwise = runner.run(servability, source_url, recipe)
        if isinstance(otherwise, str):
            otherwise = otherwise.replace(_EXPORTS_OPTION, option)
        return ForeseenExports(otherwise=otherwise)
    return ForeseenExports()


@contextlib.contextmanager
def _named(option: str) -> Iterator[None]:
    """Let a refusal name as its remedy what a person can give here."""
    try:
        yield
    except ExportError as error:
        raise ExportError(str(error).replace(_EXPORTS_OPTION, option)) from None


def check_exports(
    runner: FunctionRunner,
    source_url: str,
    plan: Plan,
    exports: tuple[ExportSettings, ...],
    *,
    option: str = _OPTION,
) -> None:
    """Check what only a plan knows of the exports that were asked for, before it is carried out.

    Args:
        option: as for `foresee_exports`.

    Raises:
        ExportError: one is impossible, and what to do instead.
    """
    folds = any(group.fold is not None for part in plan.parts for group in part.groups)
    if exports and folds:
        with _named(option):
            runner.run(check_planned_exports, source_url, plan, exports)


def refuse_exports(exports: Sequence[ExportSettings]) -> None:
    """Refuse exports that a result of several widths cannot have.

    Raises:
        ExportError: names the format.
    """
    for one in exports:
        if one.format == "gptq":
            raise ExportError(
                "--export gptq: that format holds one width for all layers, and here each block "
                "has the one that is chosen for it; give --export compressed-tensors or dense"
            )


def make_exports(
    compute: Compute, run: ObjectStore, asked: Sequence[ExportSettings] = ()
) -> tuple[MadeExport, ...]:
    """Make the exports of a finished run that are asked for now, or were before and are missing.

    None of a result that an evaluation found to give values that are not finite.

    Args:
        run: opened at the run's root.

    Raises:
        PipelineError: one cannot be made; what was written stays, and is gone on with.
    """
    wanted = tuple(dict.fromkeys((*asked, *pending_exports(run))))
    if not wanted:
        return ()
    evaluations = find_evaluations(
        run,
        read_manifest(run).record_sha256,
        lambda text: log_event("damaged", text, level=logging.WARNING),
    )
    if reason := not_finite(evaluations):
        text = f"not exported, since the result gives {reason}"
        log_event("note", text, level=logging.WARNING)
        return ()

    def make(runner: FunctionRunner) -> tuple[MadeExport, ...]:
        return tuple(_make(runner, run, one, f"{run.root_url}/{one.folder}") for one in wanted)

    with status(f"exporting as {' and '.join(one.format for one in wanted)}, a block at a time"):
        return compute.plan(make, with_workers=False)


def _make(
    runner: FunctionRunner, run: ObjectStore, settings: ExportSettings, to_url: str
) -> MadeExport:
    made = runner.run(export_result, run.root_url, settings, to_url)
    # Here, since workers may not delete.
    forget_progress(open_store(to_url))
    return made


def make_own_export(
    runner: FunctionRunner, run: ObjectStore, settings: ExportSettings
) -> MadeExport:
    """Make an export in a folder of the run that is named for all that decides its bytes.

    Nobody else writes there, so what is damaged in it, or left of an interrupted deletion, is made
    again. Hold the run's lease.

    Raises:
        PipelineError: it cannot be made.
    """
    request = runner.run(request_of_export, run.root_url, settings)
    url = f"{run.root_url}/{settings.folder}-{request.record_sha256[:12]}"
    try:
        return _make(runner, run, settings, url)
    except (DamagedObjectError, ObjectExistsError, PlanMismatchError):
        discard(open_store(url), request)
        return _make(runner, run, settings, url)


def pending_exports(run: ObjectStore) -> tuple[ExportSettings, ...]:
    """The exports that a run was started with, and that are not finished."""
    return tuple(
        one
        for one in wanted_exports(run)
        # The request goes last of what a finished export leaves behind.
        if not run.exists(f"{one.folder}/{EXPORT_KEY}") or run.exists(f"{one.folder}/{REQUEST_KEY}")
    )


def want_exports(run: ObjectStore, exports: Sequence[ExportSettings]) -> None:
    """Note in a claimed run what to export, for whoever resumes it."""
    for settings in exports:
        run.put(settings.key, settings.to_json())


def arguments_of(exports: Sequence[ExportSettings]) -> list[str]:
    """What asks for exports on the command line, which has one --like for all of them."""
    words = [word for one in exports for word in ("--export", one.format)]
    like = next((one.like_url for one in exports if one.like_url is not None), None)
    return words if like is None else [*words, "--like", like]


def exports_json(made: Sequence[MadeExport]) -> dict[str, Any]:
    """What was exported, as plain JSON values; nothing where nothing was."""
    return {"exports": [exported_json(one) for one in made]} if made else {}


def log_exports(made: Sequence[MadeExport]) -> None:
    """Say what was exported, a line each."""
    for one in made:
        log_exported(one)
