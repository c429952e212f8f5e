"""Errors that a user can act on; each message says where, what was seen and what to change."""


class QuantizationError(ValueError):
    """Base of every error that `quantizer` raises on purpose."""


class SchemeError(QuantizationError):
    """A scheme, or a scheme for this layer, that cannot be carried out."""


class CalibrationError(QuantizationError):
    """Calibration statistics that are missing, empty, of the wrong shape or not finite."""


class WeightError(QuantizationError):
    """A weight that is not finite, or of the wrong shape."""


class LayerError(QuantizationError):
    """A Keras layer that stock Keras could not load in the wanted scheme."""
