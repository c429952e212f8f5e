"""How blocks of finished runs become one artifact: measured, chosen, compared, copied.

Whoever composes (`quantfleet compose`, say) checks what it is given, holds the output's lease, and
judges and reports the result; what is between is the same for all, and is here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from jobs.composition_tables import Outlook
from jobs.composition_texts import AskedTexts, CompositionTexts
from jobs.evaluating import Rows, keep, measure
from jobs.execute import Compute
from jobs.logging import log_event, status
from pipeline.composition.composed_plan import (
    GivenRun,
    Pick,
    composed_plan,
    part_bytes,
    parts_of_runs,
)
from pipeline.composition.decision import (
    Decision,
    JudgedRun,
    OtherChoice,
    blocks_bytes,
    measured_cost,
    options_of,
    question,
)
from pipeline.composition.layer_choice import LayerChoice, LayerChoices
from pipeline.composition.layer_errors import measure_layers
from pipeline.composition.parts import assemble_each, copy_parts, seal
from pipeline.composition.sensitivities import Sensitivity, measure_blocks
from pipeline.composition.target import Target
from pipeline.errors import (
    DamagedObjectError,
    MissingObjectError,
    PlanMismatchError,
    UnusableResultError,
)
from pipeline.evaluation.batches import EvaluationSet
from pipeline.fidelity import Fidelity, fidelity_of
from pipeline.plan import PLAN_KEY, Plan
from pipeline.run.claim import claim
from pipeline.run.commits import Finding, quarantine, read_manifest
from pipeline.run.evaluations import find_evaluations, measured_on
from pipeline.run.records import MANIFEST_KEY
from pipeline.run.worst_windows import find_worst_windows
from pipeline.storage.object_store import ObjectStore

_MOST_SIZES = 8
"""How often a choice by layers is made smaller until its files are: by a few bytes, if at all."""


@dataclass(frozen=True, kw_only=True)
class Composing:
    """One composition under way.

    Attributes:
        recipe_name: of the composition, where it is not one run alone.
        runs: as `check_composable` and `check_target` let pass.
        store: of the output, opened at its root.
        source_url: where the source is now.
        beside: prefixes of what the output may hold before it is claimed (see `check_empty`).
        kept_in_runs: whether each run keeps what its blocks cost, for other compositions of it;
            else the output does.
        by_layers: whether layers of a block may come from several runs.
    """

    target: Target
    recipe_name: str
    runs: Sequence[GivenRun]
    store: ObjectStore
    compute: Compute
    texts: CompositionTexts
    source_url: str
    beside: tuple[str, ...] = ()
    kept_in_runs: bool = False
    by_layers: bool = False

    def outlook(self) -> Outlook:
        """Measure what each block alone costs, keep that, and choose by it.

        Raises:
            UnusableResultError: only blocks that spoil the model are small enough.
        """
        sensitivities = self._sensitivities()
        choices, numbers = options_of(self.runs, sensitivities)
        limit = self.target.block_bytes(self.runs[0])
        if limit < choices.least_bytes:
            raise UnusableResultError(
                f"{self.target}: only blocks with which the model's answers are not finite are "
                "small enough; raise it, or name other runs"
            )
        choice = choices.within(limit)
        assert choice is not None
        outlook = Outlook.of(self.runs, self.target, sensitivities, choices, numbers, choice)
        if not self.by_layers:
            return outlook
        found = self._choice_by_layers(sensitivities)
        if found is None or (found.picked, found.layers) == (outlook.choice.picked, ()):
            why = "no other is small enough" if found is None else "it is the best by layers too"
            log_event("by layers", f"the choice of whole blocks stands alone: {why}")
            return outlook
        return dataclasses.replace(outlook, by_layers=outlook.point(self.runs, found))

    def _choice_by_layers(
        self, sensitivities: Sequence[Sequence[Sensitivity]]
    ) -> LayerChoice | None:
        """The best choice of layers that the target has room for, with its exact size."""
        given = self.texts.measured
        at_once = self.compute.evaluation_pass(self.runs[0].plan, given)
        with status("measuring what layers alone do to their blocks"):
            errors = measure_layers(
                self.compute.executor,
                self._kept_at,
                self.runs,
                given,
                tokens_per_pass=at_once,
                tell=partial(log_event, "measured"),
            )
        choices = LayerChoices(self.runs, sensitivities, errors)
        limit = self.target.block_bytes(self.runs[0])
        most = limit
        for _ in range(_MOST_SIZES):
            found = choices.within(most)
            if found is None:
                return None
            size = self._exact_size(found)
            if size <= limit:
                return dataclasses.replace(found, size_bytes=size)
            most = min(most, found.size_bytes) - (size - limit)
        return None

    def _exact_size(self, choice: LayerChoice) -> int:
        """Of all blocks: those that come from several runs are put together to know it."""
        plan = composed_plan(self.runs, choice.picked, self.recipe_name, choice.layers)
        mixed = sorted({one.block + 1 for one in choice.layers})
        made = assemble_each(
            self.compute.executor, parts_of_runs(plan, self.runs), self.source_url, "", mixed
        )
        whole = [
            part_bytes(self.runs[number].records[part])
            for part, number in enumerate(choice.picked, 1)
            if part not in mixed
        ]
        return sum(one.size_bytes for one in made) + sum(whole)

    @property
    def _kept_at(self) -> list[ObjectStore]:
        """Where what is measured of each run is kept."""
        return [run.store if self.kept_in_runs else self.store for run in self.runs]

    def _sensitivities(self) -> tuple[tuple[Sensitivity, ...], ...]:
        given = self.texts.measured
        at_once = self.compute.evaluation_pass(self.runs[0].plan, given)
        with status("measuring what each block alone costs the model"):
            return measure_blocks(
                self.compute.executor,
                self._kept_at,
                self.runs,
                given,
                tokens_per_pass=at_once,
                tell=partial(log_event, "measured"),
            )

    def evaluated(self, pick: Pick) -> Rows:
        """What is found of the artifact that such parts of the runs make."""
        picked, layers = pick
        plan = composed_plan(self.runs, picked, self.recipe_name, layers)
        given = self.texts.judged
        return measure(
            self.compute.executor,
            given,
            self.compute.evaluation_pass(plan, given),
            parts_of_runs(plan, self.runs),
        )

    @property
    def question(self) -> dict[str, Any]:
        """What the decision depends on, but for what is measured."""
        measured_windows = self.texts.measured.windows
        assert measured_windows is not None
        return question(
            self.target,
            [run.manifest.record_sha256 for run in self.runs],
            measured_windows.digest,
            self.texts.judged_digest,
            by_layers=self.by_layers,
        )

    def decided_before(self) -> Decision | None:
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
        if made.question == self.question:
            return made
        if self.store.exists(PLAN_KEY):
            raise PlanMismatchError(
                f"{self.store.url(Decision.key)} is of another composition: other runs, target or "
                "texts; choose another --output, or judge what is there with quantfleet evaluate"
            )
        return None

    def decided(
        self, outlook: Outlook, check_lease: Callable[[], None]
    ) -> tuple[Decision, Mapping[Pick, Rows]]:
        """The decision, as it was made before or is made now, and what was measured for it now.

        Args:
            check_lease: raises if another driver has taken over, which may decide otherwise.
        """
        before = self.decided_before()
        if before is not None:
            return before, {}
        wanted = self.question
        found: dict[Pick, Rows] = {}
        costs: dict[int, float] = {}
        limit = self.target.block_bytes(self.runs[0])
        mixed = [x for x in (outlook.choice, outlook.by_layers) if x is not None and x.is_mixed]
        for point in mixed:
            found[point.pick] = self.evaluated(point.pick)
        if mixed:
            for number, run in enumerate(self.runs):
                if blocks_bytes(run) <= limit:
                    uniform = ((number,) * len(outlook.choice.picked), ())
                    found[uniform] = self.evaluated(uniform)
                    costs[number] = self._cost(found[uniform])
        # Of equal ones whole blocks, which come first.
        mixed.sort(key=lambda point: self._cost(found[point.pick]))
        choice = mixed[0] if mixed else outlook.choice
        measured = self._cost(found[choice.pick]) if mixed else None
        other = None
        for point in mixed[1:]:
            other = OtherChoice(
                by="layers" if point.layers else "blocks",
                size_bytes=point.num_bytes,
                expected=point.expected,
                measured=_finite(self._cost(found[point.pick])),
            )
        best = min(costs, key=lambda number: (costs[number], number), default=None)
        kept = None
        if best is not None and measured is not None and costs[best] < measured:
            kept = best
        made = Decision(
            target=self.target,
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
            picked=choice.picked,
            size_bytes=choice.num_bytes,
            expected=choice.expected,
            measured=_finite(measured),
            kept=kept,
            by_layers=self.by_layers,
            layers=choice.layers,
            other=other,
        )
        check_lease()
        self.store.put(made.key, made.to_json())
        return made, found

    def _cost(self, found: Rows) -> float:
        return measured_cost(fidelity_of(self.texts.judged, found))

    def make(
        self,
        decision: Decision,
        check_lease: Callable[[], None],
        *,
        damaged: Sequence[Finding] = (),
        wanted: Mapping[str, bytes] = MappingProxyType({}),
    ) -> Plan:
        """Claim the output, copy parts and write the manifest; what is done is not done again.

        Args:
            damaged: found in what was finished before; it is moved aside and made again.
            wanted: exports to note, by key, beside a new plan.
        """
        picked, layers = decision.given
        plan = composed_plan(self.runs, picked, self.recipe_name, layers)
        plan = dataclasses.replace(plan, source_url=self.source_url)
        windows = None
        for run in self.runs:
            tokens = plan.tokens
            if tokens is not None and run.plan.tokens == tokens and run.store.exists(tokens.key):
                windows = run.store.get(tokens.key, sha256=tokens.digest)
                break
        plan = claim(self.store, plan, windows, wanted, others=self.beside)
        if damaged:
            check_lease()
            quarantine(self.store, damaged)
        elif self.store.exists(MANIFEST_KEY):
            log_event("finished before", f"{self.store.root_url}: composed before")
            return plan
        with status("copying the parts"):
            copy_parts(
                self.store,
                plan,
                self.runs,
                assembled=partial(
                    assemble_each,
                    self.compute.executor,
                    parts_of_runs(plan, self.runs),
                    self.source_url,
                    self.store.root_url,
                ),
                check_lease=check_lease,
                tell=partial(log_event, "copied"),
            )
        self.compute.executor.run(seal, self.store.root_url, self.source_url)
        return plan

    def judged(self, asked: AskedTexts, decision: Decision, found: Mapping[Pick, Rows]) -> Fidelity:
        """The figures of what is kept.

        They are stored where they were asked for, and not those of the texts that the choice was
        made by.

        Args:
            found: what was measured for the decision.
        """
        manifest = read_manifest(self.store).record_sha256
        judged = self.texts.judged
        given = judged if asked.evaluated_on else EvaluationSet(tasks=judged.tasks)
        for one in find_evaluations(self.store, manifest, partial(log_event, "damaged")):
            is_same = asked.judges and one.measured_on == measured_on(given)
            # They are written last.
            if is_same and (not given.text_sets or find_worst_windows(self.store, one)):
                return Fidelity.from_figures(one.figures)
        rows = found.get(decision.given) or self.evaluated(decision.given)
        if not asked.judges:
            return fidelity_of(judged, rows)
        rows = rows[len(judged.batches) - len(given.batches) :]  # those of tasks are last
        return keep(self.compute.executor, self.store, self.source_url, manifest, given, rows)


def _finite(cost: float | None) -> float | None:
    return None if cost is None or cost == float("inf") else cost
