"""Errors for the user to act on; the command line prints each as one line."""

from __future__ import annotations

from typing import ClassVar


class PipelineError(ValueError):
    """Base of every error that `pipeline` raises on purpose."""

    exit_code: ClassVar[int] = 2
    """Of the command: 2 bad input, 3 unusable storage or cluster, 4 damaged, 5 unfit result,
    6 another result kept than the one that was asked for."""


class SourceError(PipelineError):
    """A source model that is missing, damaged, or of a type that cannot be quantized."""


class RecipeError(PipelineError):
    """A recipe that is unknown, cannot be read, or does not fit the model."""


class CalibrationTextError(PipelineError):
    """Calibration texts that are missing, unreadable, or too few."""


class CalibrationInputError(PipelineError):
    """Arrays for a model's inputs that are missing, unreadable, or not what the model takes."""


class TaskError(PipelineError):
    """Questions that are missing or unreadable, or that a model cannot answer."""


class StorageError(PipelineError):
    """Object storage that cannot be used; the message names the URL and the remedy."""

    exit_code = 3


class StorageUrlError(StorageError):
    """A storage URL that cannot be opened, or not for what it was given for."""

    exit_code = 2


class MissingObjectError(StorageError, FileNotFoundError):
    """There is no object under this key."""


class ObjectExistsError(StorageError, FileExistsError):
    """An object that may be written only once already holds other bytes."""


class DamagedObjectError(StorageError):
    """An object whose bytes are not those that were written."""

    exit_code = 4


class StatisticsError(PipelineError):
    """Stored statistics that a run needs are missing or damaged; they can be made again."""

    exit_code = 4


class DivergenceError(PipelineError):
    """Two executions of the same work gave different bytes; nothing more may be published."""

    exit_code = 4


class LeaseHeldError(PipelineError):
    """Another driver is working on this run."""

    exit_code = 3


class LeaseLostError(PipelineError):
    """Another driver has taken over this run."""

    exit_code = 3


class PlanMismatchError(PipelineError):
    """A run directory belongs to another plan."""


class WeightsFileError(PipelineError):
    """A weights file that is damaged, hostile, or not of the model at hand."""


class ArtifactError(PipelineError):
    """A result that stock KerasHub could not load; the message says what is wrong."""


class UnusableResultError(PipelineError):
    """A result whose answers are not finite; it is kept, and must not be used."""

    exit_code = 5


class UniformResultKeptError(PipelineError):
    """A composition measured worse than a run whose blocks are all of one kind, which was kept."""

    exit_code = 6


class ExportError(PipelineError):
    """A result, or a layer of it, that has no place in the format asked for."""
