"""Making the artifact of a composition: its runs' files, its own records, index and dtype map.

Files of weights are copies, checked against the digests in their runs' records, unless layers of a
part come from several runs: then its file is written anew, with the same arrays. Records are the
runs' own, but for the plan that they belong to and the record that they follow; the accounts in
them are of how the layers were solved where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.composition.composed_plan import GivenRun
from pipeline.errors import DamagedObjectError, DivergenceError
from pipeline.executor.protocol import FunctionRunner
from pipeline.plan import PartOrigin, Plan, read_plan
from pipeline.run.commits import Committed, commit_part, committed_parts, quarantine
from pipeline.run.records import FileDigest, PartRecord, codes_key, file_key
from pipeline.run.worker_api import PartsOfRuns
from pipeline.storage.object_store import ObjectStore, open_store


def copy_parts(
    store: ObjectStore,
    plan: Plan,
    runs: Sequence[GivenRun],
    *,
    assembled: Callable[[Sequence[int]], Sequence[AssembledPart]],
    check_lease: Callable[[], None],
    tell: Callable[[str], None],
) -> None:
    """Commit the parts of a claimed composition that are not committed, one in memory at a time.

    Args:
        store: opened at the composition's root.
        runs: all that the plan's parts come from.
        assembled: makes the files of some parts, by number, that come from several runs (see
            `assemble`).
        check_lease: raises if another driver has taken over.
        tell: is told how far it is, and of what was found damaged.

    Raises:
        DamagedObjectError: a file is not what its run committed.
    """
    found = _committed(store, plan, verify=True)
    for finding in found.findings:
        tell(f"{finding.problem}; it is made again")
    if found.findings:
        check_lease()
        quarantine(store, found.findings)
    by_manifest = {run.manifest.record_sha256: run for run in runs}
    due = [n for n, x in enumerate(plan.composed) if x.layers and n not in found.parts]
    if due:
        check_lease()
    made = {one.part: one for one in (assembled(due) if due else ())}
    previous = ""
    for part, origin in enumerate(plan.composed):
        if part not in found.parts:
            check_lease()
            run = by_manifest[origin.manifest_sha256]
            record = replace(
                run.records[part],
                plan_digest=plan.digest,
                previous=previous if plan.chained and part > 1 else "",
            )
            if part in made:
                record = _mixed_record(record, origin, by_manifest, made[part])
                # Its files are there: those of all such parts are made first.
                _create(store, record.key, record.to_json())
            else:
                files = {
                    key: run.store.get(key, sha256=file.sha256, size=file.size_bytes)
                    for key, file in record.files.items()
                }
                commit_part(store, record, files)
            tell(f"part {part} is committed, of {len(plan.composed)}")
            previous = record.record_sha256
        else:
            previous = found.parts[part].record_sha256


def _mixed_record(
    record: PartRecord,
    origin: PartOrigin,
    by_manifest: Mapping[str, GivenRun],
    made: AssembledPart,
) -> PartRecord:
    """The record of a part that comes from several runs, with each one's accounts of its layers."""
    layers = {layer.path: layer for layer in record.layers}
    for some in origin.layers:
        theirs = by_manifest[some.manifest_sha256].records[record.part].layers
        layers |= {layer.path: layer for layer in theirs if layer.path in some.layers}
    return replace(
        record,
        sha256=made.weights.sha256,
        size_bytes=made.weights.size_bytes,
        loaded_bytes=made.loaded_bytes,
        codes=made.codes,
        layers=tuple(layers[layer.path] for layer in record.layers),
    )


@dataclass(frozen=True, kw_only=True)
class AssembledPart:
    """The files of a part that comes from several runs.

    Attributes:
        codes: of the file of codes, if it has one.
        loaded_bytes: memory that its variables take once loaded.
    """

    part: int
    weights: FileDigest
    codes: FileDigest | None
    loaded_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.weights.size_bytes + (0 if self.codes is None else self.codes.size_bytes)


def assemble_each(
    runner: FunctionRunner, of: PartsOfRuns, source_url: str, run_url: str, parts: Sequence[int]
) -> list[AssembledPart]:
    """Call `assemble` for some parts, spread over the processes."""
    shares = [parts[i :: runner.num_processes] for i in range(runner.num_processes)]
    given = [(of, source_url, run_url, share) for share in shares if share]
    if not given:
        return []
    return [one for made in runner.run_each(assemble, given) for one in made]


def assemble(
    of: PartsOfRuns, source_url: str, run_url: str, parts: Sequence[int]
) -> list[AssembledPart]:
    """Make the files of parts that come from several runs, one part in memory at a time.

    Needs Keras, so that a worker is to call it (see `FunctionRunner`).

    Args:
        run_url: where to write them, as any number of times; "" only tells what they would be.

    Raises:
        DamagedObjectError: a run's file is not what it committed.
        DivergenceError: other bytes are there.
    """
    from pipeline.artifact.mixed_part import composed_files
    from pipeline.worker.model_state import ModelState

    model = ModelState(of.plan, source_url)
    store = open_store(run_url) if run_url else None
    made = []
    for part in parts:
        files = composed_files(of, model.parts, part)
        if store is not None:
            for key, content in files.items():
                _create(store, key, content)
        digests = {key: FileDigest.of(content) for key, content in files.items()}
        made.append(
            AssembledPart(
                part=part,
                weights=digests[file_key(part)],
                codes=digests.get(codes_key(part)),
                loaded_bytes=model.parts[part].num_bytes,
            )
        )
    return made


def _create(store: ObjectStore, key: str, content: bytes) -> None:
    try:
        store.create(key, content)
    except FileExistsError as error:
        raise DivergenceError(
            f"{store.url(key)} holds other bytes than were made of the same runs now; nothing was "
            "overwritten. Compose again in an empty folder, on the machines that the runs were "
            "made on"
        ) from error


def seal(run_url: str, source_url: str) -> None:
    """Write the small files and the manifest of a composition whose parts are all committed.

    Needs Keras, so that a worker is to call it (see `FunctionRunner`).

    Raises:
        DamagedObjectError: a part is not committed, or is not what its record says.
    """
    from pipeline.artifact.parts import finalize
    from pipeline.worker.model_state import ModelState

    store = open_store(run_url)
    plan = read_plan(store)
    found = _committed(store, plan, verify=False)
    for finding in found.findings:
        raise DamagedObjectError(f"{finding.problem}; repeat the command to copy it again")
    model = ModelState(plan, source_url)
    finalize(plan, store, model.preset_files(), model.parts, found.parts)


def _committed(store: ObjectStore, plan: Plan, *, verify: bool) -> Committed[PartRecord]:
    """See `committed_parts`."""
    return committed_parts(
        store,
        PartRecord,
        plan_digest=plan.digest,
        num_blocks=plan.num_blocks,
        chained=plan.chained,
        verify=verify,
    )
