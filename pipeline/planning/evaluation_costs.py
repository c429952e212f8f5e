"""What comparing a result with its source takes: text, flops, and memory of a worker's GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.evaluation.batches import TOKENS_PER_PASS, EvaluationSet
from pipeline.plan import Plan
from pipeline.planning.estimates import (
    DEVICE_PROGRAMS_BYTES,
    attention_scores_bytes,
    hidden_features,
    micro_batch_bytes,
)
from pipeline.planning.stored_sizes import source_bits
from pipeline.tokens_plan import TokensPlan

# A block as read, and what of it Keras' quantized layers decode to compute with.
_BLOCK_COPIES = 2
# What is outside the blocks, for both models' heads, and decoded tables.
_REST_COPIES = 3
# A row's logits by both models, and one of them as the head computes it.
_LOGIT_COPIES = 3
# What the source has left to its head, what passes the artifact, and what a decoder or masks add.
_STATE_COPIES = 3


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Text that source and result are compared on.

    Attributes:
        num_windows, sequence_length: of the text.
    """

    num_windows: int
    sequence_length: int

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.sequence_length

    def as_tokens(self, plan: Plan, num_windows: int) -> TokensPlan:
        """Some of the windows as the blocks would take them in calibration."""
        return TokensPlan(
            key="",
            digest="",
            fingerprint="",
            num_samples=num_windows,
            sequence_length=self.sequence_length,
            micro_batch=max(1, 1024 // self.sequence_length),
            shards=((0, num_windows),),
            attention="scores" if plan.tokens is None else plan.tokens.attention,
        )

    def worker_windows(self, workers: int) -> int:
        """Windows of the worker that has most."""
        return math.ceil(self.num_windows / workers)


def head_flops(plan: Plan, num_tokens: int) -> float:
    """Of what is outside the blocks: each matrix or table there counts as the output head's."""
    return 2.0 * sum(layer.num_weights for layer in plan.parts[0].layers) * num_tokens


@dataclass(frozen=True, kw_only=True)
class EvaluationMemory:
    """What a worker's GPU has to hold to evaluate.

    Attributes:
        fixed_bytes: whatever passes the blocks together: programs, weights, one batch within a
            block, one row's logits.
        logits_bytes: of these, for the logits, which are of one row at a time.
        longest: tokens of the longest row.
        batch_tokens: the fewest that can pass the blocks together.
        token_bytes: of each of those that do, between two blocks.
    """

    fixed_bytes: int
    logits_bytes: int
    longest: int
    batch_tokens: int
    token_bytes: int

    @classmethod
    def of(cls, plan: Plan, given: EvaluationSet) -> EvaluationMemory:
        """Of a plan's result, on these rows.

        A model whose output is not over its largest table, such as an encoder without a head, needs
        less.
        """
        rest, *blocks = plan.parts
        number_bytes = source_bits(plan) // 8
        longest = max(batch.length for batch in given.batches)
        batch_tokens = max(batch.num_tokens for batch in given.batches)
        hidden = hidden_features(plan)
        widest = max([hidden, *(layer.in_features for part in blocks for layer in part.layers)])
        within = attention_scores_bytes(batch_tokens, longest, hidden)
        if plan.tokens is not None and plan.tokens.attention == "cudnn":
            planned = plan.tokens.micro_batch * plan.tokens.sequence_length
            within = plan.tokens.largest_array_bytes * batch_tokens // planned
        vocabulary = max((layer.num_rows for layer in rest.layers), default=hidden)
        logits = _LOGIT_COPIES * longest * vocabulary * number_bytes
        weights = max(
            _REST_COPIES * rest.source_bytes,
            *(_BLOCK_COPIES * part.source_bytes for part in blocks),
        )
        batch = micro_batch_bytes(batch_tokens, widest, within)
        return cls(
            fixed_bytes=DEVICE_PROGRAMS_BYTES + weights + max(batch, logits),
            logits_bytes=logits,
            longest=longest,
            batch_tokens=batch_tokens,
            token_bytes=_STATE_COPIES * hidden * number_bytes,
        )

    @property
    def least_bytes(self) -> int:
        """With one batch at a time."""
        return self.fixed_bytes + self.batch_tokens * self.token_bytes

    def tokens_per_pass(self, num_bytes: int) -> int:
        """How many tokens can pass the blocks together in so much memory, from one batch on."""
        return min(TOKENS_PER_PASS, max(num_bytes - self.fixed_bytes, 0) // self.token_bytes)
