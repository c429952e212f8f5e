"""What an evaluation found of each window of text, and the text of the worst ones.

The figures tell two results apart that were judged on the same windows, and the texts what went
wrong.

A record of its own beside each evaluation, and no part of what is published: it holds pieces of the
texts themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from pipeline.canonical import digest_of
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.evaluation.batches import EvaluationSet
from pipeline.fidelity import RowFidelity, WindowFidelity, windows_by_set
from pipeline.run.evaluations import Evaluation
from pipeline.run.records import Digest
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import STRICT, StoredRecord

_PREFIX = "worst-windows/"
_MOST_OF_A_SET = 2
_MOST_WINDOWS = 8
_MOST_TOKENS = 200
"""Of a window; of a longer one, those in a row that lost most."""

Decode = Callable[[Sequence[Sequence[int]]], list[list[str]]]
"""The text of each token of some texts, which together are the text."""


@dataclass(frozen=True, kw_only=True)
class WorstWindow:
    """One of them; what is not finite is None.

    Attributes:
        text_set: "" of texts without a name.
        number: of the window in its set, from 0.
        count: predicted tokens; for an encoder, compared vectors.
        divergence: its mean, in nats a token; None for an encoder.
        cosine: its mean, of an encoder.
        start: the first token that `text` shows.
        text: pieces, each with the divergence of the token that it is; None where there is none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    text_set: str
    number: int
    count: int
    divergence: float | None = None
    source_perplexity: float | None = None
    result_perplexity: float | None = None
    cosine: float | None = None
    start: int
    text: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True, kw_only=True)
class WorstWindows(StoredRecord):
    """Those of one evaluation.

    Attributes:
        manifest_sha256: of the result.
        evaluation: digest of what it was measured on.
        windows: of each set in turn, the worst first.
        lost: by set, of every window in its order: the mean divergence in nats a token, or of an
            encoder one less its mean cosine; None where that is not finite.
    """

    manifest_sha256: Digest
    evaluation: Digest
    windows: tuple[WorstWindow, ...]
    lost: dict[str, tuple[float | None, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        evaluation: Evaluation,
        given: EvaluationSet,
        found: Sequence[Sequence[RowFidelity]],
        decode: Decode,
    ) -> Self:
        """Choose them by what was found of each row of each batch (see `fidelity_of`)."""
        by_set = windows_by_set(given, found)
        of_each = min(_MOST_OF_A_SET, max(1, _MOST_WINDOWS // max(1, len(by_set))))
        chosen = [
            (name, number, of_set[number])
            for name, of_set in list(by_set.items())[:_MOST_WINDOWS]
            for number in sorted(range(len(of_set)), key=lambda i: _rank(of_set[i]))[:of_each]
        ]
        stretches = [_stretch(given, *one) for one in chosen]
        texts = decode([tokens for _, tokens, _ in stretches])
        return cls(
            manifest_sha256=evaluation.manifest_sha256,
            evaluation=digest_of(evaluation.measured_on),
            windows=tuple(
                replace(
                    _figures(name, number, window),
                    start=start,
                    text=tuple(zip(pieces, map(_finite, lost), strict=True)),
                )
                for (name, number, window), (start, _, lost), pieces in zip(
                    chosen, stretches, texts, strict=True
                )
            ),
            lost={name: tuple(map(_lost, of_set)) for name, of_set in by_set.items()},
        )

    def save(self, run: ObjectStore) -> None:
        """Write the record, over an earlier one of the same texts."""
        run.put(_key(self.evaluation), self.to_json())


def find_worst_windows(run: ObjectStore, evaluation: Evaluation) -> WorstWindows | None:
    """Those of an evaluation; None where it kept none, or only damaged ones are left."""
    digest = digest_of(evaluation.measured_on)
    try:
        found = WorstWindows.read(run, _key(digest))
    except (MissingObjectError, DamagedObjectError):
        return None
    ours = (found.manifest_sha256, found.evaluation) == (evaluation.manifest_sha256, digest)
    return found if ours else None


def _key(evaluation: str) -> str:
    return f"{_PREFIX}{evaluation}.json"


def _rank(window: WindowFidelity) -> float:
    """Less for a worse one, by what a token or a vector loses; least where it is not finite."""
    if not window.count:
        return math.inf
    closeness = window.cosine if _is_encoders(window) else -window.divergence
    return closeness / window.count if math.isfinite(closeness) else -math.inf


def _lost(window: WindowFidelity) -> float | None:
    if not window.count:
        return None
    mean = (window.cosine if _is_encoders(window) else window.divergence) / window.count
    value = 1 - mean if _is_encoders(window) else mean
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _is_encoders(window: WindowFidelity) -> bool:
    return not len(window.divergences)


def _stretch(
    given: EvaluationSet, name: str, number: int, window: WindowFidelity
) -> tuple[int, list[int], list[float | None]]:
    """Where the shown tokens start, those tokens, and what each lost."""
    windows = given.text_sets[name]
    tokens: NDArray[np.int32] = windows.tokens[number][: windows.lengths[number]]
    lost: list[float | None] = [None] * len(tokens)
    start = 0
    if len(window.divergences) == len(tokens) - 1:  # the first is not predicted
        lost[1:] = [float(value) for value in window.divergences]
        start = _worst_start(window.divergences)
    end = start + _MOST_TOKENS
    return start, [int(token) for token in tokens[start:end]], lost[start:end]


def _worst_start(divergences: NDArray[np.float32]) -> int:
    """The first token of the stretch that lost most, among all tokens."""
    last = len(divergences) + 1 - _MOST_TOKENS
    if last <= 0:
        return 0
    values = np.nan_to_num(divergences.astype(np.float64), posinf=1e6, neginf=0.0, nan=1e6)
    # sums[i] is of the stretch from token i, whose own divergence is at i - 1.
    total = np.concatenate([[0.0, 0.0], np.cumsum(values)])
    sums = total[_MOST_TOKENS:] - total[: last + 1]
    return int(np.argmax(sums))


def _figures(name: str, number: int, window: WindowFidelity) -> WorstWindow:
    known: Mapping[str, float | None] = (
        {"cosine": _finite(window.cosine / window.count) if window.count else None}
        if _is_encoders(window)
        else {
            "divergence": _finite(window.divergence / window.count),
            "source_perplexity": _perplexity(window.source_loss / window.count),
            "result_perplexity": _perplexity(window.result_loss / window.count),
        }
    )
    return WorstWindow(text_set=name, number=number, count=window.count, start=0, text=(), **known)


def _perplexity(loss: float) -> float | None:
    return _finite(math.exp(loss)) if loss < 700 else None  # NaN is not less either


def _finite(value: float | None) -> float | None:
    """To as many digits as anyone reads."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
