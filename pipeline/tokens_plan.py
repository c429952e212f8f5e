"""Which calibration windows a run has, and how they are divided among shards and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from pipeline.storage.record import STRICT

_HELD_BACK_STEP = 5
"""Has no divisor in common with eight, so that all places take their turns."""


@dataclass(frozen=True, kw_only=True)
class SourceTokens:
    """What calibration sees of one weighted source of texts.

    Attributes:
        num_windows: its share.
        num_documents: that were read for them.
        num_tokens: in its windows, without padding.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    num_windows: int
    num_documents: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class TokensPlan:
    """The calibration windows, and how they are divided.

    Attributes:
        key: storage key of the token windows; digest is the SHA-256 of that object.
        fingerprint: SHA-256 of the texts.
        num_samples, sequence_length: number of windows, and of tokens in each.
        micro_batch: windows that pass a block together.
        shards: ranges [a, b) of windows, the leaves of the reduction tree.
        attention: on a GPU, "cudnn" where cuDNN computes it, without scores; omitted elsewhere.
        largest_array_bytes: on a GPU, of what a block computes for a micro-batch; attention's
            scores where they are kept. Omitted on CPUs.
        sources: in the recipe's order, where its texts have weights; omitted where they have none.
        held_back_every: of so many micro-batches one is held back: what was made of the others is
            judged on it. Omitted where nothing is judged.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    key: str
    digest: str
    fingerprint: str
    num_samples: int
    sequence_length: int
    micro_batch: int
    shards: tuple[tuple[int, int], ...]
    attention: Literal["scores", "cudnn"] = "scores"
    largest_array_bytes: int = 0
    sources: tuple[SourceTokens, ...] = ()
    held_back_every: int = 0

    def is_held_back(self, window: int) -> bool:
        """Whether the micro-batch that begins with this window is held back."""
        if not self.held_back_every:
            return False
        # Shards hold whole micro-batches, so that they are numbered across shards. Of each run of
        # them another one, since windows of several sources alternate.
        run, place = divmod(window // self.micro_batch, self.held_back_every)
        return place == (self.held_back_every - 1 + _HELD_BACK_STEP * run) % self.held_back_every

    @property
    def held_back_batches(self) -> tuple[int, ...]:
        """Numbers of the micro-batches that are held back."""
        starts = range(0, self.num_samples, self.micro_batch)
        return tuple(number for number, a in enumerate(starts) if self.is_held_back(a))

    @property
    def num_held_back(self) -> int:
        """Windows that are held back."""
        starts = [number * self.micro_batch for number in self.held_back_batches]
        return sum(min(self.micro_batch, self.num_samples - start) for start in starts)
