"""`quantfleet compose`: an artifact made of the blocks of finished runs, within a size.

Nothing is solved. What each block of each run alone costs the model is measured and kept; the
blocks are chosen by that; the choice is measured beside the runs that are no larger than the
target, before any of it is written; and the better result is made of copies of their files.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from jobs.composition_tables import Outlook
from jobs.composition_texts import AskedTexts, CompositionTexts, read_composition_texts
from jobs.evaluating import Rows, keep, measure
from jobs.execute import Compute, DriverOptions, check_identity, open_compute
from jobs.logging import is_json, log_event, print_json, print_result, set_run, status, url_name
from jobs.reachable import absolute, check_writable, finished_manifest, reachable
from jobs.release.cards import update_cards
from jobs.report.run_report import update_report
from jobs.summary import Summary, summary_table
from pipeline.artifact.loading import load_hints
from pipeline.composition.composed_plan import (
    GivenRun,
    check_composable,
    composed_plan,
    read_given_run,
)
from pipeline.composition.decision import (
    Decision,
    JudgedRun,
    Target,
    blocks_bytes,
    check_target,
    measured_cost,
    options_of,
    question,
)
from pipeline.composition.parts import copy_parts, seal
from pipeline.composition.sensitivities import Sensitivity, measure_blocks
from pipeline.errors import (
    DamagedObjectError,
    MissingObjectError,
    PipelineError,
    PlanMismatchError,
    UniformResultKeptError,
    UnusableResultError,
)
from pipeline.evaluation.batches import EvaluationSet
from pipeline.evaluation.tasks import read_tasks
from pipeline.executor.protocol import ComputeSpec, FunctionRunner
from pipeline.fidelity import Fidelity, fidelity_of
from pipeline.model.preset import CONFIG_FILE, check_preset
from pipeline.plain.plan import is_plain
from pipeline.plan import PLAN_KEY, Plan, read_plan
from pipeline.remote_planning import identity
from pipeline.run.claim import check_empty, claim
from pipeline.run.commits import read_manifest
from pipeline.run.evaluations import find_evaluations, measured_on
from pipeline.run.records import MANIFEST_KEY
from pipeline.run.worker_api import PartsOfRuns
from pipeline.run.worst_windows import find_worst_windows
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.overlap import check_apart


@dataclass(frozen=True, kw_only=True)
class ComposeJob:
    """What to compose, where to put it, and what to choose and judge it by.

    Attributes:
        source_url: the preset, if it has moved; "" where the first run says.
        asked: what to measure sensitivities and judge results on.
    """

    run_urls: tuple[str, ...]
    output_url: str
    target: Target
    asked: AskedTexts
    source_url: str = ""
    options: DriverOptions = field(default_factory=DriverOptions)


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
        found = runner.run(identity, source_url, compute.allocation.threads)
        check_identity(plan, found, source_url, finished=True)
        return read_composition_texts(job.asked, runs, source_url, runner)

    spec = plan.resuming(spec, finished=True)
    with open_compute(spec, source_url, job.run_urls[0], address=address) as compute:
        with status("checking the source, cutting texts"):
            texts = compute.plan(read_texts)
        _Composing(job, runs, store, compute, texts, source_url).run(
            dry_run=dry_run, as_json=as_json
        )


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


@dataclass(frozen=True)
class _Composing:
    """One composition under way.

    Attributes:
        store: opened at its root.
    """

    job: ComposeJob
    runs: Sequence[GivenRun]
    store: ObjectStore
    compute: Compute
    texts: CompositionTexts
    source_url: str

    def run(self, *, dry_run: bool, as_json: bool) -> None:
        """See `compose`."""
        if not dry_run:
            self._decided_before()  # or refused, before it takes long
        sensitivities = self._sensitivities()
        choices, numbers = options_of(self.runs, sensitivities)
        target = self.job.target
        if target.block_bytes(self.runs[0]) < choices.least_bytes:
            raise UnusableResultError(
                f"{target}: only blocks with which the model's answers are not finite are small "
                "enough; raise it, or name other runs"
            )
        choice = choices.within(target.block_bytes(self.runs[0]))
        assert choice is not None
        outlook = Outlook.of(self.runs, target, sensitivities, choices, numbers, choice)
        if dry_run:
            print_result(outlook, outlook.tables(), as_json=as_json)
            return
        log_event("chosen", "", {"choice": asdict(outlook.choice)}, table=outlook.tables())
        # From the decision on: another driver of the same output may have been told otherwise.
        with self.job.options.acquire_lease(self.store) as held:
            decision, found = self._decided(outlook, held.check)
            plan = self._make(decision, held.check)
        fidelity = self._judged(decision, found)
        summary = Summary.of(
            plan,
            self.store,
            read_manifest(self.store),
            self.compute.estimate(plan),
            {},
            wall_seconds=0.0,
            fidelity=fidelity,
        )
        update_cards(self.store)
        update_report(self.store)
        said = decision.outcome
        if as_json:
            found_out = {"decision": decision.content(), "summary": summary.to_dict()}
            print_json(asdict(outlook) | found_out)
        if not as_json or is_json():
            log_event("finished", "", {"summary": summary.to_dict()}, table=summary_table(summary))
            log_event("composed", said)
            for hint in load_hints(self.store):
                log_event("loadable", hint)
        if decision.kept is not None:
            raise UniformResultKeptError(said)
        if fidelity.not_finite is not None:
            raise UnusableResultError(
                f"{self.job.output_url}: the result gives {fidelity.not_finite}; raise the target, "
                "or name other runs"
            )

    def _sensitivities(self) -> tuple[tuple[Sensitivity, ...], ...]:
        given = self.texts.measured
        at_once = self.compute.evaluation_pass(self.runs[0].plan, given)
        with status("measuring what each block alone costs the model"):
            return measure_blocks(
                self.compute.executor,
                self.store,
                self.runs,
                given,
                tokens_per_pass=at_once,
                tell=partial(log_event, "measured"),
            )

    def _evaluated(self, picked: Sequence[int]) -> Rows:
        """What is found of an artifact of which run `picked[b]` gives block b."""
        plan = composed_plan(self.runs, picked, self.job.target.recipe_name)
        given = self.texts.judged
        return measure(
            self.compute.executor,
            given,
            self.compute.evaluation_pass(plan, given),
            PartsOfRuns(
                plan=plan, run_urls=tuple(run.store.root_url for run in self._givers(plan))
            ),
        )

    @property
    def _question(self) -> dict[str, Any]:
        """What the decision depends on, but for what is measured."""
        measured_windows = self.texts.measured.windows
        assert measured_windows is not None
        return question(
            self.job.target,
            [run.manifest.record_sha256 for run in self.runs],
            measured_windows.digest,
            self.texts.judged_digest,
        )

    def _decided_before(self) -> Decision | None:
        """What was decided before; None if that is damaged, since the same would be decided again.

        Raises:
            PlanMismatchError: another composition is there.
        """
        try:
            made = Decision.read(self.store, Decision.key)
        except MissingObjectError:
            return None
        except DamagedObjectError as error:
            log_event("damaged", f"{error}; it is decided again", level=logging.WARNING)
            return None
        if made.question == self._question:
            return made
        if self.store.exists(PLAN_KEY):
            raise PlanMismatchError(
                f"{self.store.url(Decision.key)} is of another composition: other runs, target or "
                "texts; choose another --output, or judge what is there with quantfleet evaluate"
            )
        return None

    def _decided(
        self, outlook: Outlook, check_lease: Callable[[], None]
    ) -> tuple[Decision, Mapping[tuple[int, ...], Rows]]:
        """The decision, as it was made before or is made now, and what was measured for it now."""
        before = self._decided_before()
        if before is not None:
            return before, {}
        wanted = self._question
        picked = outlook.choice.picked
        found: dict[tuple[int, ...], Rows] = {}
        costs: dict[int, float] = {}
        limit = self.job.target.block_bytes(self.runs[0])
        if len(set(picked)) > 1:
            found[picked] = self._evaluated(picked)
            for number, run in enumerate(self.runs):
                if blocks_bytes(run) <= limit:
                    uniform = (number,) * len(picked)
                    found[uniform] = self._evaluated(uniform)
                    costs[number] = self._cost(found[uniform])
        measured = self._cost(found[picked]) if found else None
        best = min(costs, key=lambda number: (costs[number], number), default=None)
        kept = None
        if best is not None and measured is not None and costs[best] < measured:
            kept = best
        made = Decision(
            target=self.job.target,
            windows_sha256=wanted["windows"],
            judged_on=wanted["judged_on"],
            runs=tuple(
                JudgedRun(
                    recipe=run.name,
                    plan_digest=run.plan.digest,
                    manifest_sha256=run.manifest.record_sha256,
                    size_bytes=run.size_bytes,
                    expected=outlook.runs[number].expected,
                    measured=_finite(costs.get(number)),
                )
                for number, run in enumerate(self.runs)
            ),
            picked=picked,
            size_bytes=outlook.choice.num_bytes,
            expected=outlook.choice.expected,
            measured=_finite(measured),
            kept=kept,
        )
        check_lease()
        self.store.put(made.key, made.to_json())
        return made, found

    def _cost(self, found: Rows) -> float:
        return measured_cost(fidelity_of(self.texts.judged, found))

    def _make(self, decision: Decision, check_lease: Callable[[], None]) -> Plan:
        """Claim the output, copy parts and write the manifest; what is done is not done again."""
        plan = composed_plan(self.runs, decision.givers, self.job.target.recipe_name)
        plan = dataclasses.replace(plan, source_url=self.source_url)
        windows = None
        for run in self.runs:
            tokens = plan.tokens
            if tokens is not None and run.plan.tokens == tokens and run.store.exists(tokens.key):
                windows = run.store.get(tokens.key, sha256=tokens.digest)
                break
        plan = claim(self.store, plan, windows)
        if self.store.exists(MANIFEST_KEY):
            log_event("finished before", f"{self.job.output_url}: composed before")
            return plan
        with status("copying the parts"):
            copy_parts(
                self.store,
                plan,
                self._givers(plan),
                check_lease=check_lease,
                tell=partial(log_event, "copied"),
            )
        self.compute.executor.run(seal, self.store.root_url, self.source_url)
        return plan

    def _givers(self, plan: Plan) -> list[GivenRun]:
        """The run that gives each part."""
        by_manifest = {run.manifest.record_sha256: run for run in self.runs}
        return [by_manifest[origin.manifest_sha256] for origin in plan.composed]

    def _judged(self, decision: Decision, found: Mapping[tuple[int, ...], Rows]) -> Fidelity:
        """The figures of what is kept.

        They are stored where they were asked for, and not those of the texts that the choice was
        made by.
        """
        manifest = read_manifest(self.store).record_sha256
        judged, asked = self.texts.judged, self.job.asked
        given = judged if asked.evaluated_on else EvaluationSet(tasks=judged.tasks)
        for one in find_evaluations(self.store, manifest, partial(log_event, "damaged")):
            is_same = asked.judges and one.measured_on == measured_on(given)
            # They are written last.
            if is_same and (not given.text_sets or find_worst_windows(self.store, one)):
                return Fidelity.from_figures(one.figures)
        rows = found.get(decision.givers) or self._evaluated(decision.givers)
        if not asked.judges:
            return fidelity_of(judged, rows)
        rows = rows[len(judged.batches) - len(given.batches) :]  # those of tasks are last
        return keep(self.compute.executor, self.store, self.source_url, manifest, given, rows)


def _finite(cost: float | None) -> float | None:
    return None if cost is None or cost == float("inf") else cost
