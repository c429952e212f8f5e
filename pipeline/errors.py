"""Errors that a user can act on; the command line prints each as one line."""

from __future__ import annotations


class PipelineError(ValueError):
    """Base of every error that `pipeline` raises on purpose."""
