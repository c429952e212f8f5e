"""`quantfleet push`: a finished result to a repository of the Hugging Face hub.

Every file is checked against its digest as it is read, and sent ahead, one in memory at a time; one
commit then makes all of them visible. Whatever was sent before an interruption is not sent again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from rich.table import Column, Table
from rich.text import Text

from jobs.logging import log_event, print_json, print_result, status
from jobs.quantities import size
from jobs.reachable import absolute, reachable
from jobs.release.cards import card_store, edited_card, read_card_record
from jobs.release.contents import (
    EVAL_FILE,
    SUMS_FILE,
    Contents,
    FinishedRun,
    artifact_contents,
    export_contents,
    intact_exports,
    read_run,
)
from jobs.release.hub import HubError, HubTree, Repository, repository_of
from jobs.release.loading import Place
from jobs.release.model_card import CardSettings, model_card
from jobs.release.origin import CARD_FILE
from jobs.release.quality import eval_json
from pipeline.canonical import sha256
from pipeline.errors import ExportError, UnusableResultError
from pipeline.export.code_formats import ExportFormat
from pipeline.export.manifest import EXPORT_KEY
from pipeline.run.evaluations import not_finite
from pipeline.storage.object_store import open_store

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

ARTIFACT = "artifact"
_SUM = re.compile(r"([0-9a-f]{64})  ([^\n]+)")
# Small enough for git to hold, and to be read for its digest.
_MAX_GIT_BYTES = 10 << 20
_BATCH_BYTES = 8 << 20
_WEIGHTS = (".safetensors", ".h5", ".keras", ".bin", ".gguf", ".msgpack", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class PushJob:
    """What to push, and where to.

    Attributes:
        repository_url: hf://owner/name.
        what: "artifact", the format of an export below the run, or an export's folder.
        private: whether a repository that has to be made is private.
    """

    run_url: str
    repository_url: str
    what: str = ARTIFACT
    private: bool = False
    revision: str = "main"


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file to be pushed."""

    name: str
    size_bytes: int
    sha256: str
    read: Callable[[], bytes]


def push_run(job: PushJob, *, dry_run: bool, as_json: bool) -> None:
    """Push what a job names, or say what would be sent.

    Raises:
        DamagedObjectError: the run is not finished, or a file is not what was committed.
        UnusableResultError: an evaluation found answers that are not finite.
        HubError, HubRequestError: the hub refuses, or cannot be reached.
    """
    repository = Repository(repository_of(job.repository_url), job.revision)
    with status("reading what is known of the run"):
        run = read_run(reachable(absolute(job.run_url)), job.run_url)
        _check_usable(run)
        contents = _chosen(run, job.what)
        files = _files(contents, repository)
    for note in run.origin.notes:
        log_event("note", note)
    found = None
    try:
        with status(f"asking the hub for {repository.name}"):
            found = repository.find(private=job.private)
    except HubError as error:
        if not dry_run:
            raise
        log_event(
            "hub not asked",
            f"{error}; what is there already is not known, so every file is listed to be sent",
            level=logging.WARNING,
        )
    stale = () if found is None else _stale(repository, found, files)
    missing = [file for file in files if not _is_there(found, file)]
    num_bytes = sum(file.size_bytes for file in files)
    summary = {
        "repository": repository.name,
        "revision": repository.revision,
        "url": repository.url,
        "form": contents.form,
        "files": len(files),
        "bytes": num_bytes,
        "send": [file.name for file in missing],
        "delete": list(stale),
    }
    if dry_run:
        print_result(summary, _table(files, missing, stale), as_json=as_json)
        return
    if found is None:
        with status(f"making {repository.name}"):
            found = repository.make(private=job.private)
        # A new branch begins with what the main one holds.
        stale = _stale(repository, found, files)
        missing = [file for file in files if not _is_there(found, file)]
    if missing or stale:
        named = " ".join(run.origin.name.split())[:100]
        message = f"{named}, {run.recipe.name}: {contents.form}, by quantfleet"
        _send(repository, found, missing, stale, message)
        _check(repository, files, private=job.private)
    if as_json:
        print_json(summary)
    else:
        sent = f"{len(missing)} of {len(files)} files sent" if missing or stale else "nothing to do"
        log_event("pushed", f"{repository.url}: {sent}, {size(num_bytes)} in all", summary)


def _check_usable(run: FinishedRun) -> None:
    if reason := not_finite(run.evaluations):
        raise UnusableResultError(
            f"{run.store.root_url}: the result gives {reason}, so it is not pushed; quantize again "
            "in bfloat16 or float32 (--dtype), or by another scheme"
        )


def _chosen(run: FinishedRun, what: str) -> Contents:
    """What of a run is to be pushed."""
    if what == ARTIFACT:
        return artifact_contents(run)
    if what not in get_args(ExportFormat):
        return export_contents(run, open_store(absolute(what)))
    found = [export for export in intact_exports(run) if export.form == what]
    if not found:
        raise ExportError(
            f"{run.store.root_url}: no finished export as {what} below it; write it with "
            f"quantfleet export --format {what}, or name its folder with --export"
        )
    if len(found) > 1:
        folders = ", ".join(card_store(export).root_url for export in found)
        raise ExportError(
            f"{run.store.root_url}: {len(found)} exports as {what} below it; name the folder of "
            f"one with --export: {folders}"
        )
    return found[0]


def _files(contents: Contents, repository: Repository) -> list[_File]:
    """All files of a release, in the order in which they are sent."""
    stored = {
        name: _File(
            name=name,
            size_bytes=file.digest.size_bytes,
            sha256=file.digest.sha256,
            read=file.read,
        )
        for name, file in contents.files.items()
    }
    made = {CARD_FILE: _card(contents, repository), EVAL_FILE: eval_json(contents)}
    if contents.export is not None:
        made[EXPORT_KEY] = contents.export.to_json()
    files = stored | {name: _made(name, content) for name, content in made.items()}
    files = dict(sorted(files.items()))
    sums = "".join(f"{file.sha256}  {name}\n" for name, file in files.items() if name != SUMS_FILE)
    return list((files | {SUMS_FILE: _made(SUMS_FILE, sums.encode())}).values())


def _made(name: str, content: bytes) -> _File:
    return _File(name=name, size_bytes=len(content), sha256=sha256(content), read=lambda: content)


def _card(contents: Contents, repository: Repository) -> bytes:
    edited = edited_card(contents)
    if edited is not None:
        log_event("note", f"the {CARD_FILE} that a person has edited is pushed as it is")
        return edited
    record = read_card_record(contents)
    settings = CardSettings() if record is None else record.settings
    place = Place(repository=repository.name, revision=repository.revision)
    return model_card(contents, settings, place)


def _is_there(found: HubTree | None, file: _File) -> bool:
    """Whether the hub has a file already, with the very same content."""
    there = None if found is None else found.files.get(file.name)
    if there is None or there.size_bytes != file.size_bytes:
        return False
    if there.sha256:
        return there.sha256 == file.sha256
    return file.size_bytes <= _MAX_GIT_BYTES and there.holds(file.read())


def _stale(repository: Repository, found: HubTree, files: list[_File]) -> tuple[str, ...]:
    """What an earlier release left, by its own list, and this one does not have.

    Anything else in the repository stays; weights among it are told of, since readers may take
    them for this model's.
    """
    stale = []
    names = {file.name for file in files}
    if SUMS_FILE in found.files and found.files[SUMS_FILE].size_bytes <= _MAX_GIT_BYTES:
        listed = repository.read(SUMS_FILE, found.commit).decode("utf-8", "replace")
        for line in listed.splitlines():
            if (known := _SUM.fullmatch(line)) is None:
                continue
            there = found.files.get(known[2])
            changed = there is None or there.sha256 not in ("", known[1])
            if not changed and known[2] not in names and not known[2].startswith("."):
                stale.append(known[2])
    for name in sorted(set(found.files) - names - set(stale)):
        if name.endswith(_WEIGHTS):
            log_event(
                "note",
                f"{repository.url}: {name} is there, and is no part of this release; it stays",
            )
    return tuple(stale)


def _send(
    repository: Repository,
    found: HubTree,
    missing: list[_File],
    stale: tuple[str, ...],
    message: str,
) -> None:
    """Send files ahead, one by one, and make them visible together."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for batch in _batches(missing):
        names = batch[0].name if len(batch) == 1 else f"{len(batch)} files from {batch[0].name} on"
        with status(f"sending {names}"):
            operations += repository.send({file.name: file.read() for file in batch})
    operations += map(repository.deletion, stale)
    with status("committing"):
        repository.commit(operations, message, onto=found.commit)


def _batches(files: list[_File]) -> list[list[_File]]:
    """Files to be in memory at the same time: small ones together, large ones alone."""
    batches: list[list[_File]] = []
    for file in files:
        fits = batches and sum(f.size_bytes for f in batches[-1]) + file.size_bytes <= _BATCH_BYTES
        if fits:
            batches[-1].append(file)
        else:
            batches.append([file])
    return batches


def _check(repository: Repository, files: list[_File], *, private: bool) -> None:
    """Make sure that the hub has all files now: one that its .gitignore names is left out."""
    found = repository.find(private=private)
    lost = [file.name for file in files if not _is_there(found, file)]
    if lost:
        raise HubError(
            f"{repository.url}: {lost[0]} is not there as it was sent ({len(lost)} of "
            f"{len(files)} files); see whether a .gitignore there names it, or someone else pushed "
            "meanwhile, and do it again"
        )


def _table(files: list[_File], missing: list[_File], stale: tuple[str, ...]) -> Table:
    table = Table("file", Column("bytes", justify="right"), "")
    for file in files:
        table.add_row(Text(file.name), size(file.size_bytes), "send" if file in missing else "")
    for name in stale:
        table.add_row(Text(name), "", "delete: of an earlier release")
    return table
