"""Large catalogs whose runs all look finished in storage, without real models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from jobs.catalog.catalog_file import Catalog, parse_catalog
from jobs.catalog.catalog_runs import catalog_runs
from jobs.catalog.request import Request, run_prefix, save_request
from jobs.publish.releases import publish
from jobs.publish.verdict import Verdict, save_verdict
from jobs.publish.verified_files import VerifiedFiles
from pipeline.canonical import sha256
from pipeline.run.records import MANIFEST_KEY, FileDigest, Manifest
from pipeline.storage.object_store import ObjectStore, open_store

FILES = {f"artifact/model_{part:05d}.weights.h5": bytes([part]) * 100 for part in range(6)}
SOURCE_FILES = {"config.json": b"{}" * 500, "model.weights.h5": b"w" * 1000}


def catalog_text(url: str, num_entries: int) -> str:
    """A catalog below a URL that names so many models, in one recipe each."""
    models = "".join(
        f"  - {{name: m{i:04d}, preset: {url}/presets/m{i:04d}}}\n" for i in range(num_entries)
    )
    return f"root: {url}/fleet\ndefaults: {{recipes: [int8]}}\nmodels:\n{models}"


def write_sources(
    url: str,
    num_entries: int,
    store: ObjectStore | None = None,
    files: Mapping[str, bytes] = SOURCE_FILES,
) -> None:
    """A config and weights for each model.

    Args:
        store: at `url`, if another way leads there.
    """
    at = store or open_store(url)

    def write(i: int) -> None:
        for name, content in files.items():
            at.put(f"presets/m{i:04d}/{name}", content)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(num_entries)))


def done_catalog(url: str, num_entries: int) -> Catalog:
    """A catalog all of whose runs are published."""
    write_sources(url, num_entries)
    text = catalog_text(url, num_entries)
    catalog = parse_catalog(text, where="catalog.yaml", folder=None)
    root = open_store(catalog.root_url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda request: finish(root, request), _requests(catalog)))
    return catalog


def _requests(catalog: Catalog) -> Iterator[Request]:
    for run in catalog_runs(catalog):
        assert run.request is not None
        yield run.request


def finish(root: ObjectStore, request: Request, more: Mapping[str, bytes] | None = None) -> None:
    """Leave in storage what carrying a request out would.

    Args:
        more: other files of the run, which no manifest names.
    """
    prefix = run_prefix(request.run_id)
    for key, data in {**FILES, **(more or {})}.items():
        root.put(f"{prefix}{key}", data)
    manifest = Manifest(
        plan_digest="0" * 64,
        files={k: FileDigest(sha256=sha256(d), size_bytes=len(d)) for k, d in FILES.items()},
        records={},
        provenance={},
    )
    root.put(f"{prefix}{MANIFEST_KEY}", manifest.to_json())
    [(_, versions)] = root.folders([prefix])
    VerifiedFiles.of(request.run_id, manifest, versions).save(root)
    save_request(root, request)
    verdict = Verdict(
        request_id=request.request_id,
        model=request.model,
        recipe_name=request.recipe_name,
        run_id=request.run_id,
        plan_digest="0" * 64,
        manifest_sha256=manifest.record_sha256,
        source_bytes=2000,
        stored_bytes=600,
        quality=None,
        gate=None,
    )
    save_verdict(root, verdict)
    publish(root, request, verdict)
