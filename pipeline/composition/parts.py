"""Making the artifact of a composition: its runs' files, its own records, index and dtype map.

Every file of weights is a copy, checked against the digest in its run's manifest. Records are the
runs' own, but for the plan that they belong to and the record that they follow; the accounts in
them are of how the layers were solved where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.composition.composed_plan import GivenRun
from pipeline.errors import DamagedObjectError
from pipeline.plan import Plan, read_plan
from pipeline.run.commits import commit_part, committed_parts, quarantine
from pipeline.run.records import PartRecord
from pipeline.storage.object_store import ObjectStore, open_store


def composed_records(plan: Plan, givers: Sequence[GivenRun]) -> dict[int, PartRecord]:
    """The records of a composition's parts, by number.

    Args:
        givers: the run that gives each part.
    """
    records: dict[int, PartRecord] = {}
    previous = ""
    for part, run in enumerate(givers):
        given = run.records[part]
        follows = previous if plan.chained and part > 1 else ""
        records[part] = replace(given, plan_digest=plan.digest, previous=follows)
        previous = records[part].record_sha256
    return records


def copy_parts(
    store: ObjectStore,
    plan: Plan,
    givers: Sequence[GivenRun],
    *,
    check_lease: Callable[[], None],
    tell: Callable[[str], None],
) -> None:
    """Commit the parts of a claimed composition that are not committed, one in memory at a time.

    Args:
        store: opened at the composition's root.
        givers: the run that gives each part.
        check_lease: raises if another driver has taken over.
        tell: is told how far it is, and of what was found damaged.

    Raises:
        DamagedObjectError: a file is not what its run committed.
    """
    found = committed_parts(
        store,
        PartRecord,
        plan_digest=plan.digest,
        num_blocks=plan.num_blocks,
        chained=plan.chained,
        verify=True,
    )
    for finding in found.findings:
        tell(f"{finding.problem}; it is copied again")
    if found.findings:
        check_lease()
        quarantine(store, found.findings)
    for part, record in composed_records(plan, givers).items():
        if part in found.parts:
            continue
        check_lease()
        run = givers[part].store
        files = {
            key: run.get(key, sha256=file.sha256, size=file.size_bytes)
            for key, file in record.files.items()
        }
        commit_part(store, record, files)
        tell(f"part {part} is committed, of {len(givers)}")


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
    found = committed_parts(
        store,
        PartRecord,
        plan_digest=plan.digest,
        num_blocks=plan.num_blocks,
        chained=plan.chained,
        verify=False,
    )
    for finding in found.findings:
        raise DamagedObjectError(f"{finding.problem}; repeat the command to copy it again")
    model = ModelState(plan, source_url)
    finalize(plan, store, model.preset_files(), model.parts, found.parts)
