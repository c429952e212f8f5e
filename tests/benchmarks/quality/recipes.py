"""Built-in recipes from bits to quality to time, from the results of this benchmark.

Measure them first, such as `… quality run --results FOLDER 'quantfleet int8' 'quantfleet
gptq-w4-g64'`; this then writes what `quantfleet recipes` shows, and docs/recipes.md:

    python -m tests.benchmarks.quality.recipes --results FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.recipe.measured import MEASURED_FILE, NOT_MEASURED, PLAINEST, MeasuredRecipe
from pipeline.recipe.recipe_file import builtin_recipes
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int8Scheme
from tests.benchmarks.quality.results import FULL, Results, values
from tests.benchmarks.quality.rows import LENGTH, OURS, SAMPLES
from tests.benchmarks.quality.statistics import estimate

PAGE = Path(__file__).parents[3] / "docs" / "recipes.md"
_DIGITS = 4
_HEAD = """\
# Recipes: bits, quality, time

Written by `python -m tests.benchmarks.quality.recipes` from measured results; what was not measured
is said to be so. KL is the mean divergence from the source's next-token distribution, in nats a
token, by kind of text; time is that of quantizing, relative to `{plainest}`. {measure}

| recipe | bits a weight in blocks | KL | time |
| --- | ---: | --- | ---: |
"""


def collect(results: Results) -> dict[str, Any]:
    """The content of `measured.json`."""
    found = {}
    seconds = {}
    kinds: list[str] = []
    num_windows = 0
    for name in builtin_recipes():
        judged = results.of_row(f"{OURS} {name}", FULL)
        if not judged:
            continue
        draws = sorted(judged)
        kinds = list(judged[draws[0]].values)
        num_windows = len(judged[draws[0]].values[kinds[0]]["kl"])
        took = sorted(one.seconds["quantizing"] for one in judged.values())
        seconds[name] = took[len(took) // 2]
        means = {kind: estimate(values(judged, draws, kind, "kl")).mean for kind in kinds}
        found[name] = {
            "divergence": {kind: float(f"{mean:.{_DIGITS}g}") for kind, mean in means.items()},
            "num_draws": len(draws),
        }
    plainest = seconds.get(PLAINEST)
    for name, one in found.items():
        ratio = None if plainest is None else float(f"{seconds[name] / plainest:.{_DIGITS}g}")
        one["relative_seconds"] = ratio
    measure = ""
    if found:
        measure = (
            f"SmolLM2-135M-Instruct, calibrated on {SAMPLES} windows of {LENGTH} tokens of "
            f"Python's manual, judged on {num_windows} windows each of {', '.join(kinds)}"
        )
    return {"measure": measure, "recipes": found}


def page(content: Mapping[str, Any]) -> str:
    """docs/recipes.md for the content of `measured.json`."""
    measured = {name: MeasuredRecipe(**found) for name, found in content["recipes"].items()}
    lines = []
    for name, recipe in builtin_recipes().items():
        known = measured.get(name)
        quality = NOT_MEASURED if known is None else known.divergence_text
        time = NOT_MEASURED if known is None else known.time_text
        lines.append(f"| `{name}` | {_bits(recipe.scheme)} | {quality} | {time} |\n")
    measure = (
        f"Measured on {content['measure']}." if content["measure"] else "None is measured yet."
    )
    return _HEAD.format(plainest=PLAINEST, measure=measure) + "".join(lines)


def _bits(scheme: Any) -> int:
    """Of a code, without scales."""
    match scheme:
        case GPTQScheme():
            return scheme.weight_bits
        case Int8Scheme() | Float8Scheme():
            return 8
        case AWQScheme():
            return 4
    return 4  # int4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="a folder")
    content = collect(Results(parser.parse_args().results))
    MEASURED_FILE.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    PAGE.write_text(page(content))
    print(f"{len(content['recipes'])} recipes are measured: {MEASURED_FILE}, {PAGE}")


if __name__ == "__main__":
    main()
