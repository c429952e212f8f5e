"""`quantfleet compose`: an artifact made of the blocks of finished runs, within a size.

Nothing is solved. What each block of each run alone costs the model is measured and kept; the
blocks are chosen by that; the choice is measured beside the runs that are no larger than the
target, before any of it is written; and the better result is made of copies of their files.
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import asdict, dataclass, field

from jobs.composing import Composing
from jobs.composition_texts import AskedTexts, CompositionTexts, read_composition_texts
from jobs.execute import DriverOptions, check_identity, open_compute
from jobs.finished_result import print_finished
from jobs.logging import log_event, print_result, set_run, status, url_name
from jobs.reachable import absolute, check_writable, finished_manifest, reachable
from jobs.release.cards import update_cards
from jobs.report.run_report import update_report
from jobs.run_exports import (
    arguments_of,
    check_exports,
    foresee_exports,
    make_exports,
    refuse_exports,
    want_exports,
)
from jobs.summary import Summary
from jobs.termination import Terminated
from pipeline.composition.composed_plan import GivenRun, check_composable, read_given_run
from pipeline.composition.decision import check_target
from pipeline.composition.target import Target
from pipeline.errors import (
    PipelineError,
    PlanMismatchError,
    UniformResultKeptError,
    UnusableResultError,
)
from pipeline.evaluation.tasks import read_tasks
from pipeline.executor.protocol import ComputeSpec, FunctionRunner
from pipeline.export.settings import ExportSettings
from pipeline.model.preset import CONFIG_FILE, check_preset
from pipeline.plain.plan import is_plain
from pipeline.plan import PLAN_KEY, read_plan
from pipeline.remote_planning import identity
from pipeline.run.claim import check_empty
from pipeline.run.commits import read_manifest
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.overlap import check_apart


@dataclass(frozen=True, kw_only=True)
class ComposeJob:
    """What to compose, where to put it, and what to choose and judge it by.

    Attributes:
        source_url: the preset, if it has moved; "" where the first run says.
        by_layers: whether layers of a block may come from several runs.
        asked: what to measure sensitivities and judge results on.
        exports: what to export the result as.
    """

    run_urls: tuple[str, ...]
    output_url: str
    target: Target
    asked: AskedTexts
    source_url: str = ""
    exports: tuple[ExportSettings, ...] = ()
    by_layers: bool = False
    options: DriverOptions = field(default_factory=DriverOptions)

    @property
    def command(self) -> str:
        """What goes on with this composition, and ends as it would have."""
        words = ["quantfleet", "compose", *self.run_urls, *str(self.target).split()]
        words += ["--output", self.output_url]
        if self.source_url:
            words += ["--source", self.source_url]
        if self.by_layers:
            words.append("--by-layers")
        words += [*self.asked.arguments, *arguments_of(self.exports)]
        return shlex.join(words)


def compose(
    job: ComposeJob,
    spec: ComputeSpec,
    address: str | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure, choose, compare, and make the better result; or go on with that.

    Args:
        dry_run: end with the choice; of all that is measured, sensitivities alone are kept.

    Raises:
        UniformResultKeptError: a run measured better than the choice, and was kept.
        PipelineError: runs that do not fit together, or a target that cannot be met.
    """
    job = dataclasses.replace(
        job,
        run_urls=tuple(map(absolute, job.run_urls)),
        output_url=absolute(job.output_url),
        source_url=absolute(job.source_url),
    )
    set_run(run=url_name(job.output_url), recipe=job.target.recipe_name)
    refuse_exports(job.exports)
    read_tasks(job.asked.tasks)
    for url in job.run_urls:
        check_apart(url, job.output_url, "run")
    store = reachable(job.output_url, PLAN_KEY)
    check_writable(store)
    _check_free(store)
    runs = [_given_run(url) for url in job.run_urls]
    check_composable(runs)
    check_target(job.target, runs)
    source_url = job.source_url or runs[0].plan.source_url
    set_run(
        run=url_name(job.output_url),
        model=url_name(source_url),
        recipe=job.target.recipe_name,
    )
    check_apart(source_url, job.output_url)
    check_preset(reachable(source_url, CONFIG_FILE))
    plan = runs[0].plan

    def read_texts(runner: FunctionRunner) -> CompositionTexts:
        # Before all else, since it reads no weights.
        for run in runs if job.exports else ():
            _foresee(run, job.exports, source_url, runner)
        found = runner.run(identity, source_url, compute.allocation.threads)
        check_identity(plan, found, source_url, finished=True)
        return read_composition_texts(job.asked, runs, source_url, runner)

    spec = plan.resuming(spec, finished=True)
    with open_compute(spec, source_url, job.run_urls[0], address=address) as compute:
        with status("checking the source, cutting texts"):
            texts = compute.plan(read_texts)
        composing = Composing(
            target=job.target,
            recipe_name=job.target.recipe_name,
            runs=runs,
            store=store,
            compute=compute,
            texts=texts,
            source_url=source_url,
            by_layers=job.by_layers,
        )
        _run(job, composing, dry_run=dry_run, as_json=as_json)


def _check_free(store: ObjectStore) -> None:
    """Refuse an output that holds anything but a composition, before anything is measured."""
    if not store.exists(PLAN_KEY):
        check_empty(store)
    elif not read_plan(store).composed:
        raise PlanMismatchError(
            f"{store.url(PLAN_KEY)} is the plan of a run that is no composition; choose another "
            "--output"
        )


def _given_run(url: str) -> GivenRun:
    store = reachable(url, PLAN_KEY)
    if is_plain(finished_manifest(store, url)):
        raise PipelineError(
            f"{url}: the result of a plain Keras model, whose blocks are not known and lie in one "
            "file; compose runs on presets"
        )
    if read_plan(store).makes != "artifact":
        raise PipelineError(f"{url}: statistics of a model, and no result; name a finished run")
    return read_given_run(store)


def _foresee(
    run: GivenRun, exports: tuple[ExportSettings, ...], source_url: str, runner: FunctionRunner
) -> None:
    """Refuse exports that a run's blocks have no place in; say what no kernel would take."""
    recipe = run.plan.recipe
    foreseen = foresee_exports(runner, source_url, recipe, exports, dry_run=False)
    check_exports(runner, source_url, run.plan, exports)
    foreseen.warn(recipe)


def _run(job: ComposeJob, composing: Composing, *, dry_run: bool, as_json: bool) -> None:
    """See `compose`."""
    store = composing.store
    if not dry_run:
        composing.decided_before()  # or refused, before it takes long
    try:
        outlook = composing.outlook()
        if dry_run:
            print_result(outlook, outlook.tables(), as_json=as_json)
            return
        log_event("chosen", "", {"choice": asdict(outlook.choice)}, table=outlook.tables())
        wanted = {settings.key: settings.to_json() for settings in job.exports}
        # From the decision on: another driver of the same output may have been told otherwise.
        with job.options.acquire_lease(store) as held:
            decision, found = composing.decided(outlook, held.check)
            plan = composing.make(decision, held.check, wanted=wanted)
        want_exports(store, job.exports)
        fidelity = composing.judged(job.asked, decision, found)
        made = make_exports(composing.compute, store, job.exports)
    except (UnusableResultError, PlanMismatchError):
        raise  # it would end so again
    except (Exception, KeyboardInterrupt, Terminated):
        if not dry_run:
            log_event("resumable", f"to go on from what is measured and copied: {job.command}")
        raise
    summary = Summary.of(
        plan,
        store,
        read_manifest(store),
        composing.compute.estimate(plan),
        {},
        wall_seconds=0.0,
        fidelity=fidelity,
    )
    update_cards(store)
    update_report(store)
    values = {"decision": decision.content(), "summary": summary.to_dict()}
    print_finished(
        summary,
        store,
        made,
        values=asdict(outlook) | values,
        composed=decision.outcome,
        as_json=as_json,
    )
    if decision.kept is not None:
        raise UniformResultKeptError(decision.outcome)
    if fidelity.not_finite is not None:
        raise UnusableResultError(
            f"{job.output_url}: the result gives {fidelity.not_finite}; raise the target, "
            "or name other runs"
        )
