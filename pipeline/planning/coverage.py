"""How much of what a model reads its calibration shows it, and whether that is too little.

A quantizer fits what calibration shows. Text of one kind leaves most of the vocabulary unseen; few
tokens leave correlations between inputs to chance; an input that is never active has none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from pipeline.calibration.windows import TokenWindows
from pipeline.plan import Plan

MIN_VOCABULARY_SHARE = 0.05
"""Of the vocabulary's tokens. Of SmolLM2's 49,152, 16 windows of 512 tokens of one kind of text
show 2.8% to 3.6%, and at 3 bits perplexity on novels then doubles; three kinds mixed show 8.3%
with 32,768 tokens and 19.6% with 262,144."""
MOST_TOKENS_WANTED = 10_000
"""However large a vocabulary is: those for many languages are seen in part alone by text of one."""
MIN_TOKENS_PER_INPUT = 8.0
"""Of the layer with the most inputs. With n tokens for each input, the eigenvalues of a sample
covariance spread over (1 ± √(1/n))² times the true ones, even where all of these are equal
(Marchenko and Pastur 1967): at 8 by a factor of 4.4, at 2 by one of 34."""
MAX_FAINT_SHARE = 0.1
"""Of a layer's inputs: the weights of so many are rounded as if there were no calibration."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What calibration shows of a model's inputs.

    Attributes:
        num_tokens: in all windows, without padding.
        distinct_tokens: of the vocabulary, that occur.
        vocabulary_size: None where the model has no table of tokens.
        widest_input: inputs of the layer with the most, of those that are fitted to correlations
            between inputs; None where there is none, as with float8.
    """

    num_tokens: int
    distinct_tokens: int
    vocabulary_size: int | None
    widest_input: int | None

    @classmethod
    def of(cls, plan: Plan, windows: TokenWindows) -> Self | None:
        """What a plan's windows show; None if they are no text.

        Experts, each with rows of its own, do not count; they have figures of their own.
        """
        tokens = windows.tokens[windows.mask]
        groups = [g for part in plan.parts for g in part.groups if not g.experts]
        if not tokens.size or not groups:
            return None
        widths = [g.in_features for g in groups if g.statistics == "hessian"]
        tables = [x.out_features for x in plan.parts[0].layers if x.kind == "embedding"]
        return cls(
            num_tokens=int(tokens.size),
            distinct_tokens=len(np.unique(tokens)),
            # Beside it there are only shorter tables, of positions or types.
            vocabulary_size=max(tables, default=None),
            widest_input=max(widths, default=None),
        )

    @classmethod
    def read(cls, plan: Plan, content: Callable[[], bytes]) -> Self | None:
        """What a plan's stored windows show; None if they are no text alone.

        Arrays beside texts, such as images, may take gigabytes, and are not read for this.

        Args:
            content: reads the windows.
        """
        calibration = plan.recipe.calibration
        if plan.tokens is None or calibration is None or calibration.inputs:
            return None
        return cls.of(plan, TokenWindows.from_bytes(content()))

    @property
    def vocabulary_share(self) -> float | None:
        """Of the vocabulary, what occurs."""
        return self.distinct_tokens / self.vocabulary_size if self.vocabulary_size else None

    @property
    def tokens_per_input(self) -> float | None:
        """Of the layer with the most inputs."""
        return self.num_tokens / self.widest_input if self.widest_input else None

    @property
    def text(self) -> str:
        """In words."""
        share = self.vocabulary_share
        of = "" if share is None else f", {share:.1%} of the vocabulary"
        found = f"{self.num_tokens} tokens, {self.distinct_tokens} different ones{of}"
        each = self.tokens_per_input
        if each is None:
            return found
        return f"{found}; {each:.1f} for each of the widest layer's {self.widest_input} inputs"

    def warnings(self) -> Iterator[str]:
        """What is too little, in words."""
        size = self.vocabulary_size or 0
        wanted = min(MIN_VOCABULARY_SHARE * size, MOST_TOKENS_WANTED)
        if self.distinct_tokens < wanted:
            yield (
                f"calibration shows {self.distinct_tokens} of the vocabulary's {size} tokens, "
                f"fewer than {wanted:.0f}: the result may be much worse on other kinds of text; "
                "calibrate on more kinds (texts with weights), and more windows (num_samples)"
            )
        each = self.tokens_per_input
        if self.widest_input is not None and each is not None and each < MIN_TOKENS_PER_INPUT:
            wanted = math.ceil(MIN_TOKENS_PER_INPUT * self.widest_input)
            yield (
                f"calibration has {each:.1f} tokens for each of the widest "
                f"layer's {self.widest_input} inputs, fewer than {MIN_TOKENS_PER_INPUT:g}: chance "
                f"correlations count as true ones; give it {wanted} tokens or more (num_samples)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {
            "vocabulary_share": self.vocabulary_share,
            "tokens_per_input": self.tokens_per_input,
        }


def faint_warnings(faint: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Where calibration found too many inputs with next to no energy, in words.

    Args:
        faint: how many there are, and of how many inputs, by layer path.
    """
    many = {p: (n, of) for p, (n, of) in faint.items() if n > MAX_FAINT_SHARE * of}
    if many:
        path = max(many, key=lambda p: (many[p][0] / many[p][1], p))
        number, of = many[path]
        yield (
            f"in {len(many)} layers more than {MAX_FAINT_SHARE:.0%} of the inputs had next to no "
            f"energy in calibration, in {path} {number} of {of}: their weights are as good as "
            "rounded to nearest; calibrate on more kinds of text"
        )
