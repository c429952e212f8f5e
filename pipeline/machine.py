"""What decides how results are rounded: the machine, and the versions of packages."""

from __future__ import annotations

import importlib.metadata
import os

import jax

# Packages that compute the result; other versions may round differently.
_PACKAGES = ("quantfleet", "jax", "jaxlib", "keras", "keras-hub", "numpy", "ml-dtypes", "h5py")


def machine(threads: int) -> dict[str, str]:
    """The kind of machine that this process runs on; other kinds may round differently.

    With the environment's XLA_FLAGS, of which some decide rounding, where there are any.
    """
    found = {
        "platform": jax.default_backend(),
        "device": str(jax.devices()[0].device_kind),
        "threads": str(threads),
    }
    if flags := os.environ.get("XLA_FLAGS", "").split():
        found["XLA_FLAGS"] = " ".join(flags)
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that compute the result."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
