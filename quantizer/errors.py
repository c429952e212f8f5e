"""Errors that a user can act on: each message says where, what was found and what to change."""


class QuantizationError(ValueError):
    """Base of every error that `quantizer` raises on purpose."""


class SchemeError(QuantizationError):
    """An invalid scheme, or one that this layer cannot take."""


class CalibrationError(QuantizationError):
    """Calibration inputs or statistics that are missing or that no solver can use."""


class UnusableStatisticsError(CalibrationError):
    """Calibration statistics that are empty, not finite, all zero, or of another shape."""


class WeightError(QuantizationError):
    """A weight that is not finite, or of the wrong shape."""


class LayerError(QuantizationError):
    """A Keras layer that stock Keras could not load in this scheme."""
