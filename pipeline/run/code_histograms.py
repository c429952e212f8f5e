"""Which codes a layer's weights have, and how its scales spread: counts for a run's log.

They are for people; nothing in a run's result depends on them, and no record names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

NUM_CODE_BINS = (4, 8, 16, 32)
"""Of 2, 3, 4 and 8 bits: a bin for each code, but of 8 bits one for eight of them."""
NUM_SCALE_BINS = 24
SCALE_OCTAVES = 3
"""Scales from the median's eighth to its eightfold have bins; what lies beyond is in the outer two.

Most layers' groups lie within: their widest is some few times their typical one.
"""
_MOST = 1 << 53
"""Weights that a log may tell of: what JSON's readers count exactly."""


@dataclass(frozen=True, kw_only=True)
class CodeHistogram:
    """Of all weights of one quantized layer.

    Attributes:
        lowest: the first code of the first bin.
        codes: how many weights have each code, or each eight, from the lowest on; their number is
            one of `NUM_CODE_BINS`.
        ends: how many have the lowest and the highest code that the scheme rounds to.
        scale: the median distance of the values that two neighbouring codes stand for.
        scales: how many of these distances there are by log2(distance / median), in
            `NUM_SCALE_BINS` bins of equal width from -SCALE_OCTAVES to SCALE_OCTAVES.
    """

    lowest: int
    codes: tuple[int, ...]
    ends: tuple[int, int]
    scale: float
    scales: tuple[int, ...]

    @property
    def codes_per_bin(self) -> int:
        return 256 // len(self.codes) if len(self.codes) == max(NUM_CODE_BINS) else 1

    @property
    def num_weights(self) -> int:
        return sum(self.codes)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, in as many digits of the scale as a reader sees."""
        return {
            "lowest": self.lowest,
            "codes": list(self.codes),
            "ends": list(self.ends),
            "scale": float(f"{self.scale:.4g}"),
            "scales": list(self.scales),
        }

    @classmethod
    def from_log(cls, value: object) -> CodeHistogram | None:
        """The inverse of `to_dict`; None for what is not well formed, since anyone may write it."""
        if not isinstance(value, dict):
            return None
        lowest, scale = value.get("lowest"), value.get("scale")
        codes, ends, scales = (value.get(name) for name in ("codes", "ends", "scales"))
        if not (_are_counts(codes) and _are_counts(ends) and _are_counts(scales)):
            return None
        if len(codes) not in NUM_CODE_BINS or len(ends) != 2 or len(scales) != NUM_SCALE_BINS:
            return None
        if not isinstance(lowest, int) or isinstance(lowest, bool) or not -128 <= lowest <= 0:
            return None
        if not isinstance(scale, float | int) or isinstance(scale, bool):
            return None
        if not 0 <= scale < _MOST or not sum(codes) or not sum(scales) or max(ends) > sum(codes):
            return None
        return cls(
            lowest=lowest,
            codes=tuple(codes),
            ends=(ends[0], ends[1]),
            scale=float(scale),
            scales=tuple(scales),
        )


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one < _MOST for one in value
    )
