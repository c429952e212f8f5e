"""What a release holds: a run's artifact, or one of its exports, and all that is known of it.

Everything is read from storage, from records that carry their digests; no weights are read.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jobs.logging import log_event, url_name
from jobs.reachable import finished_manifest
from jobs.release.origin import CARD_FILE, Origin, find_origin
from pipeline.errors import DamagedObjectError, ExportError, MissingObjectError
from pipeline.export.manifest import EXPORT_KEY, ExportManifest
from pipeline.export.settings import EXPORTS_PREFIX
from pipeline.model.preset import CONFIG_FILE, is_legal
from pipeline.plain.plan import MODEL_KEY, is_plain, layer_records
from pipeline.plan import Plan, read_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.run.evaluations import Evaluation, find_evaluations
from pipeline.run.records import (
    ARTIFACT_PREFIX,
    CODES_PREFIX,
    MANIFEST_KEY,
    FileDigest,
    LayerRecord,
    Manifest,
    PartRecord,
)
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.record import MAX_RECORD_BYTES

EVAL_FILE = "eval.json"
SUMS_FILE = "SHA256SUMS"

Form: TypeAlias = Literal["kerashub", "keras", "compressed-tensors", "gptq", "dense"]
"""What a release is loaded by: stock KerasHub, stock Keras, or what reads that export."""

_SOURCES_CARD = "SOURCE_README.md"
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of a release, where it lies.

    Attributes:
        store, key: of the object.
    """

    store: ObjectStore
    key: str
    digest: FileDigest

    def read(self) -> bytes:
        """Its content, checked against its digest; see `ObjectStore.get`."""
        return self.store.get(self.key, sha256=self.digest.sha256, size=self.digest.size_bytes)


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run, read once for its artifact and all of its exports.

    Attributes:
        plan: None of a plain Keras model.
        layers: in the model's order.
        loaded_bytes: memory that the artifact's variables take; None of a plain Keras model.
    """

    store: ObjectStore
    manifest: Manifest
    plan: Plan | None
    recipe: Recipe
    layers: tuple[LayerRecord, ...]
    source_url: str
    source_bytes: int
    loaded_bytes: int | None
    evaluations: tuple[Evaluation, ...]

    @functools.cached_property
    def origin(self) -> Origin:
        """What the source says of itself; of a single file, its name."""
        if self.plan is None:
            return Origin(name=url_name(self.source_url))
        files = artifact_files(self)
        names = {_SOURCES_CARD: CARD_FILE}
        carried = (name for name in files if is_legal(name) or name in names)
        return find_origin(
            self.source_url, {names.get(name, name): files[name].read() for name in carried}
        )

    @property
    def schemes(self) -> Counter[str]:
        """Number of layers by scheme, in the order of their first layers."""
        return Counter(x.scheme.policy for x in self.layers if x.scheme is not None)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a release holds.

    Attributes:
        files: by their names in the release.
        digest_of, digest: name and SHA-256 of the record that names all files.
        export: its manifest; None of an artifact.
        config: config.json of an export.
    """

    run: FinishedRun
    form: Form
    files: Mapping[str, StoredFile]
    digest_of: str
    digest: str
    export: ExportManifest | None = None
    config: Mapping[str, Any] | None = None

    @property
    def stored_bytes(self) -> int:
        """Of the weights alone."""
        weights = (".h5", ".safetensors", ".keras")
        return sum(f.digest.size_bytes for n, f in self.files.items() if n.endswith(weights))


def read_run(store: ObjectStore, run_url: str) -> FinishedRun:
    """Read all that is known of a finished run.

    Raises:
        DamagedObjectError: the run is not finished, or a record is damaged.
    """
    manifest = finished_manifest(store, run_url)
    evaluations = find_evaluations(store, manifest.record_sha256, _tell_of_damage)
    if is_plain(manifest):
        given = manifest.provenance
        return FinishedRun(
            store=store,
            manifest=manifest,
            plan=None,
            recipe=recipe_from_dict(given["recipe"], where=store.url(MANIFEST_KEY)),
            layers=layer_records(manifest),
            source_url=given["source_url"],
            source_bytes=given["source_bytes"],
            loaded_bytes=None,
            evaluations=evaluations,
        )
    plan = read_plan(store)
    records = [
        PartRecord.from_json(store.get(key, sha256=digest, at_most=MAX_RECORD_BYTES))
        for key, digest in sorted(manifest.records.items())
    ]
    return FinishedRun(
        store=store,
        manifest=manifest,
        plan=plan,
        recipe=plan.recipe,
        layers=tuple(layer for r in sorted(records, key=_number) for layer in r.layers),
        source_url=plan.source_url,
        source_bytes=sum(part.source_bytes for part in plan.parts),
        loaded_bytes=sum(record.loaded_bytes for record in records),
        evaluations=evaluations,
    )


def _tell_of_damage(text: str) -> None:
    log_event("damaged", text, level=logging.WARNING)


def _number(record: PartRecord) -> int:
    return record.part


def artifact_files(run: FinishedRun) -> dict[str, StoredFile]:
    """The files of a run's artifact, by their names in a release.

    A card that came along from the source makes room for the result's own. Codes stay with the
    run: stock KerasHub, which a release of the artifact is for, reads none, and exports are
    releases of their own.
    """
    files = {}
    for key, digest in sorted(run.manifest.files.items()):
        if key.startswith(CODES_PREFIX):
            continue
        name = key.removeprefix(ARTIFACT_PREFIX)
        name = _SOURCES_CARD if name == CARD_FILE else name
        files[name] = StoredFile(store=run.store, key=key, digest=digest)
    return files


def artifact_contents(run: FinishedRun) -> Contents:
    """What a release of the artifact holds."""
    return Contents(
        run=run,
        form="keras" if MODEL_KEY in run.manifest.files else "kerashub",
        files=artifact_files(run),
        digest_of=MANIFEST_KEY,
        digest=run.manifest.record_sha256,
    )


def export_contents(run: FinishedRun, store: ObjectStore) -> Contents:
    """What a release of an export holds.

    Args:
        store: opened at the export's folder.

    Raises:
        ExportError: there is no finished export, or it is of another run.
        DamagedObjectError: what describes it is damaged.
    """
    if not store.exists(EXPORT_KEY):
        raise ExportError(
            f"{store.root_url}: no {EXPORT_KEY} there, so no finished export; write it with "
            "quantfleet export"
        )
    export = ExportManifest.read(store, EXPORT_KEY)
    if not _is_of(run, export):
        raise ExportError(
            f"{store.url(EXPORT_KEY)}: an export of another run than {run.store.root_url}; export "
            "this one to a folder of its own"
        )
    files = {
        name: StoredFile(store=store, key=name, digest=digest)
        for name, digest in sorted(export.files.items())
    }
    form: Any = export.request.format
    return Contents(
        run=run,
        form=form,
        files=files,
        digest_of=EXPORT_KEY,
        digest=export.record_sha256,
        export=export,
        config=json.loads(files[CONFIG_FILE].read()),
    )


def intact_exports(run: FinishedRun) -> tuple[Contents, ...]:
    """The finished exports below a run; those of an earlier result in its place are left out.

    So are damaged ones, which are told of: nobody may have use for them.
    """
    found = []
    ends = f"/{EXPORT_KEY}"
    for key in run.store.list(EXPORTS_PREFIX):
        if not key.endswith(ends):
            continue
        store = open_store(f"{run.store.root_url}/{key.removesuffix(ends)}")
        try:
            if _is_of(run, ExportManifest.read(store, EXPORT_KEY)):
                found.append(export_contents(run, store))
        except (DamagedObjectError, MissingObjectError) as error:
            _tell_of_damage(f"left out: {error}")
    return tuple(found)


def _is_of(run: FinishedRun, export: ExportManifest) -> bool:
    return export.request.source_manifest_sha256 == run.manifest.record_sha256
