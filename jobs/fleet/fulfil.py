"""`quantfleet fulfil`: one request, from wherever storage says it stands to its release."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from jobs.catalog.request import Request, request_key, run_store
from jobs.fleet.carrying_out import carry_out, evaluated, plan_of, whole_manifest
from jobs.fleet.workplace import Enter, Workplace
from jobs.logging import log_event, set_run, status
from jobs.metrics import RunMetrics
from jobs.publish.releases import Release, find_current, publish
from jobs.publish.verdict import Verdict, failures, figures, find_verdict, save_verdict
from jobs.publish.verified_files import note_whole
from pipeline.errors import (
    DamagedObjectError,
    LeaseHeldError,
    MissingObjectError,
    PipelineError,
)
from pipeline.executor.protocol import Executor
from pipeline.fidelity import Fidelity
from pipeline.plan import PLAN_KEY, Plan, read_plan
from pipeline.run import lease
from pipeline.run.commits import damaged_files
from pipeline.run.driver import claim
from pipeline.run.records import ARTIFACT_PREFIX, Manifest
from pipeline.storage.object_store import ObjectStore


class GateFailedError(PipelineError):
    """A result that is not good enough; it is kept, and what was published before stays."""

    exit_code = 5


@dataclass(frozen=True, kw_only=True)
class Fulfilled:
    """What became of a request.

    Attributes:
        verdict: on the result.
        releases: under each of its names; none where the gate was not passed.
        solved: whether anything had to be quantized.
    """

    request: Request
    verdict: Verdict
    releases: tuple[Release, ...]
    solved: bool


@dataclass(frozen=True, kw_only=True)
class _Artifact:
    """A finished run, found whole."""

    run_id: str
    plan: Plan
    manifest: Manifest
    solved: bool = False


def fulfil(
    root: ObjectStore,
    request: Request,
    enter: Enter,
    *,
    wait: bool,
    lease_seconds: float = lease.TERM_SECONDS,
) -> Fulfilled:
    """Quantize what is not quantized, measure, verify, judge, and publish.

    Whoever does so again, or at the same time, finds done what was done; a cluster is joined only
    if something is to be computed.

    Args:
        root: the catalog's.
        enter: joins a cluster.
        wait: for another driver of the same run to end.

    Raises:
        LeaseHeldError: another drives the run, and `wait` is False.
        PipelineError: with what to do about it.
    """
    set_run(run=request.run_id, model=request.model, recipe=request.recipe_name)
    store = run_store(root, request.run_id)
    held = lease.acquire(
        store, seconds=lease_seconds, wait=wait, tell=lambda text: log_event("waiting", text)
    )
    with held, _Work(request, enter) as work:
        artifact = _at_rest(root, request) or _made(root, request, work, held)
        is_known, fidelity = _known_quality(root, request, artifact)
        if not is_known:
            _, executor = work.at(run_store(root, artifact.run_id))
            fidelity = evaluated(request, artifact.plan, executor)
        verdict = _judged(request, artifact, fidelity)
        # A last look at everything, just before readers are sent there.
        _verify(root, artifact)
        save_verdict(root, verdict)
        held.check()
        releases = publish(root, request, verdict) if verdict.passed else ()
        if fidelity is not None:
            judged = fidelity
            work.tell(lambda metrics: metrics.judged(judged))
        work.tell(lambda metrics: metrics.ended("finished" if verdict.passed else "gate_failed"))
    return Fulfilled(request=request, verdict=verdict, releases=releases, solved=artifact.solved)


class _Work:
    """A cluster, joined when it is first needed, with a executor on one run at a time."""

    def __init__(self, request: Request, enter: Enter) -> None:
        self.metrics = RunMetrics(model=request.model, recipe=request.recipe_name)
        self._request = request
        self._enter = enter
        self._stack = contextlib.ExitStack()
        self._at: tuple[str, Workplace, Executor] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, PipelineError) and not isinstance(error, LeaseHeldError):
            self.tell(lambda metrics: metrics.ended("failed"))
        self._stack.__exit__(kind, error, trace)

    def tell(self, what: Callable[[RunMetrics], None]) -> None:
        """Tell Prometheus something, if a cluster was joined: who finds all done tells nothing."""
        if self._at is not None:
            what(self.metrics)

    def at(self, store: ObjectStore) -> tuple[Workplace, Executor]:
        """Where a run is worked on, and by whom."""
        if self._at is None or self._at[0] != store.root_url:
            # The executor of another run would keep what this one needs.
            self._stack.close()
            needs = self._request.needs
            if needs.threads is None and store.exists(PLAN_KEY):
                # As the run was begun: their number decides rounding.
                threads = int(read_plan(store).machine["threads"])
                needs = dataclasses.replace(needs, threads=threads)
            place = self._stack.enter_context(self._enter(needs))
            self._at = store.root_url, place, place.hire(self._request.source_url, store.root_url)
        return self._at[1], self._at[2]


def _at_rest(root: ObjectStore, request: Request) -> _Artifact | None:
    """The artifact, if it is finished and whole: the request's own run, or what took its place."""
    for run_id in dict.fromkeys(_candidates(root, request)):
        store = run_store(root, run_id)
        manifest, _ = whole_manifest(store)
        if manifest is not None:
            return _Artifact(run_id=run_id, plan=read_plan(store), manifest=manifest)
    return None


def _candidates(root: ObjectStore, request: Request) -> Iterator[str]:
    """Runs whose artifacts have the bytes that the request asks for."""
    yield request.run_id
    verdict = find_verdict(root, request.request_id)
    if verdict is not None:
        yield verdict.run_id
    current = find_current(root, request.model, request.recipe_name)
    if current is not None:
        before = _asked(root, current.release)
        if before is not None and before.run_id == request.run_id:
            yield current.release.run_id


def _asked(root: ObjectStore, release: Release) -> Request | None:
    """The request that a release fulfils; None where it cannot be read."""
    try:
        return Request.read(root, request_key(release.request_id))
    except (MissingObjectError, DamagedObjectError):
        return None


def _made(root: ObjectStore, request: Request, work: _Work, held: lease.Lease) -> _Artifact:
    store = run_store(root, request.run_id)
    _, damaged = whole_manifest(store)
    place, executor = work.at(store)
    with status("planning: reading the preset, checking every layer, cutting texts"):
        plan, windows = plan_of(request, store, executor, place)
    if not store.exists(PLAN_KEY):
        twin = _published_twin(root, request, plan)
        if twin is not None:
            log_event(
                "same content",
                f"{request.request_id}: files were written again, but their content is that of "
                f"{twin.run_id}; nothing to quantize",
            )
            return twin
        plan = claim(store, plan, windows)
    manifest = carry_out(plan, store, executor, place, held, damaged, work.metrics)
    return _Artifact(run_id=request.run_id, plan=plan, manifest=manifest, solved=True)


def _published_twin(root: ObjectStore, request: Request, plan: Plan) -> _Artifact | None:
    """What is published now, if the very same plan made it, and it is whole."""
    current = find_current(root, request.model, request.recipe_name)
    if current is None or current.release.plan_digest != plan.digest:
        return None
    manifest, _ = whole_manifest(run_store(root, current.release.run_id))
    if manifest is None:
        return None
    return _Artifact(run_id=current.release.run_id, plan=plan, manifest=manifest)


def _known_quality(
    root: ObjectStore, request: Request, artifact: _Artifact
) -> tuple[bool, Fidelity | None]:
    """Whether the artifact's quality, on the texts that the request names, is known; and it."""
    if not request.evaluation_texts:
        return True, None
    manifest_sha256 = artifact.manifest.record_sha256
    verdict = find_verdict(root, request.request_id)
    if verdict is not None and verdict.manifest_sha256 == manifest_sha256 and verdict.quality:
        return True, Fidelity(**verdict.quality)
    current = find_current(root, request.model, request.recipe_name)
    if current is None or current.release.manifest_sha256 != manifest_sha256:
        return False, None
    before = _asked(root, current.release)
    same = before is not None and all(
        getattr(before, name) == getattr(request, name)
        for name in ("evaluation_texts", "evaluation_windows", "evaluation")
    )
    quality = current.release.quality
    return (True, Fidelity(**quality)) if same and quality else (False, None)


def _judged(request: Request, artifact: _Artifact, fidelity: Fidelity | None) -> Verdict:
    weights = [
        entry.size_bytes
        for key, entry in artifact.manifest.files.items()
        if key.startswith(f"{ARTIFACT_PREFIX}model_") and key.endswith(".weights.h5")
    ]
    return Verdict(
        request_id=request.request_id,
        model=request.model,
        recipe_name=request.recipe_name,
        run_id=artifact.run_id,
        plan_digest=artifact.plan.digest,
        manifest_sha256=artifact.manifest.record_sha256,
        source_bytes=sum(part.source_bytes for part in artifact.plan.parts),
        stored_bytes=sum(weights),
        quality=figures(fidelity),
        gate=None if request.gate is None else dataclasses.asdict(request.gate),
        failures=failures(request.gate, fidelity),
    )


def _verify(root: ObjectStore, artifact: _Artifact) -> None:
    """Read and hash everything once more, and note which versions of the files that was.

    Raises:
        DamagedObjectError: something was damaged since it was found whole.
    """
    store = run_store(root, artifact.run_id)
    versions = store.versions()
    damaged = damaged_files(store, artifact.manifest)
    if damaged:
        raise DamagedObjectError(
            f"{len(damaged)} objects are damaged, the first: {damaged[0].problem}; nothing was "
            "published: start again, which makes them again"
        )
    note_whole(root, artifact.run_id, artifact.manifest, versions)


def fulfilled_json(done: Fulfilled) -> dict[str, object]:
    """Plain JSON values, for machines."""
    return {
        "request_id": done.request.request_id,
        "solved": done.solved,
        "verdict": dataclasses.asdict(done.verdict),
        "releases": [dataclasses.asdict(release) for release in done.releases],
    }
