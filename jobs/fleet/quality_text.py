"""A result's quality in a few words, for tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def quality_text(quality: Mapping[str, Any] | None) -> str:
    """See `jobs.publishing.gate.figures`; a dash where nothing was measured."""
    if quality is None:
        return "–"
    before, after = quality["source_perplexity"], quality["result_perplexity"]
    if before is not None and after is not None:
        return f"perplexity {before:.4g} → {after:.4g}"
    if quality["cosine"] is not None:
        return f"cosine {quality['cosine']:.5f}"
    return "no number"
