"""The page that says which families are supported, written from the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import keras
import keras_hub

from tests.families.matrix import SCHEMES, Outcome
from tests.families.tiny_families import OUT_OF_SCOPE, not_yet_tried

PAGE = Path(__file__).parents[2] / "docs" / "support.md"

_HEADINGS = {"gptq": "gptq, 4 bits", "int8": "int8"}
_INTRODUCTION = """\
# Supported families

Written by `python -m tests.families --write`, with KerasHub {keras_hub} and Keras {keras}. Each
family of KerasHub that takes text is built small, with random weights, and quantized. *Works*
means: planned, quantized, loaded by stock Keras twice in one process, and its answers are those
that the stored numbers stand for by NumPy's account. A share says how much of the weights that the
recipe asks for is quantized; the rest stays in float, and the plan says why. Experts count where
they have codes, though stock Keras holds them as floats. Below half of the weights,
`--allow-partial` is needed. All others are refused while planning, before weights are read, with
the message below the table.
"""


def page(outcomes: Sequence[Outcome]) -> str:
    """The whole page; of some families only, if not all were tried."""
    notes = list(dict.fromkeys(o.message for o in outcomes if o.message))
    lines = [
        _INTRODUCTION.format(keras_hub=keras_hub.__version__, keras=keras.__version__),
        f"| family | {' | '.join(_HEADINGS[scheme] for scheme in SCHEMES)} |",
        f"| --- |{' --- |' * len(SCHEMES)}",
    ]
    for family in dict.fromkeys(outcome.family for outcome in outcomes):
        cells = [_cell(o, notes) for o in outcomes if o.family == family]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    lines += [f"| {name} | not yet tried | not yet tried |" for name in not_yet_tried()]
    lines.append("")
    lines += [f"{number}. {_escaped(note)}" for number, note in enumerate(notes, start=1)]
    lines += ["", "Out of scope:", ""]
    lines += _out_of_scope(OUT_OF_SCOPE.items())
    return "\n".join(lines) + "\n"


def _cell(outcome: Outcome, notes: Sequence[str]) -> str:
    if outcome.kind == "works":
        if outcome.share >= 0.995:
            return "works"
        allowed = ", with `--allow-partial`" if outcome.partial else ""
        return f"works for {outcome.share:.0%}{allowed}"
    word = "refused" if outcome.kind == "refused" else "**fails**"
    return f"{word} ({notes.index(outcome.message) + 1})"


def _out_of_scope(reasons: Iterable[tuple[str, str]]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    return [f"- {reason}: {', '.join(of_reason)}" for reason, of_reason in names.items()]


def _escaped(message: str) -> str:
    return message.replace("|", r"\|").replace("<", "&lt;").replace("_", r"\_")
