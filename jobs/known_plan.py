"""What planning a run on a source found out, for the next: digests of weights, token windows."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.executor.protocol import FunctionRunner
from pipeline.plan import Plan
from pipeline.recipe.recipe import Recipe
from pipeline.remote_planning import plan_on, plan_others


@dataclass
class KnownPlan:
    """The last plan that was made on a source, by workers of one machine and number of threads.

    Attributes:
        key: of what decides weights' digests and token windows; "" before anything was planned.
        windows: that the plan names, serialized.
    """

    key: str = ""
    plan: Plan | None = None
    windows: bytes | None = None

    def plan_next(
        self, runner: FunctionRunner, source_url: str, recipe: Recipe, threads: int, key: str
    ) -> tuple[Plan, bytes | None]:
        """Plan a run, as `plan_on`; where the key is that of the last one, without reading again.

        The run itself checks all weights against their digests as it reads them.

        Args:
            key: equal for recipes with the same calibration, dtype, texts and source.

        Raises:
            PipelineError: a source, recipe or calibration that cannot be carried out.
        """
        like = self.plan
        has_windows = self.windows is not None or not recipe.needs_calibration
        if like is not None and key == self.key and has_windows:
            [plan] = runner.run(plan_others, source_url, [recipe], threads, like, self.windows)
            if plan.source_files_sha256 == like.source_files_sha256:
                return plan, self.windows if plan.tokens is not None else None
        plan, windows = plan_on(runner, source_url, recipe, threads)
        self.key, self.plan, self.windows = key, plan, windows
        return plan, windows
