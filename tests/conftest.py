"""The environment of all tests, set before a test module is imported, and what they share."""

import os
import signal
from typing import TYPE_CHECKING

# Left to itself, Keras chooses TensorFlow.
os.environ.setdefault("KERAS_BACKEND", "jax")

from collections.abc import Iterator

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.integration.ray_cluster import RunningCluster
    from tests.s3 import S3Server

# The first example compiles and the others do not, so a deadline would only be flaky.
# Based on the current profile: where CI is set, that is Hypothesis' deterministic one.
settings.register_profile("quantfleet", settings.default, deadline=None)
settings.load_profile("quantfleet")


def pytest_configure(config: pytest.Config) -> None:
    """Share compiled programs among all test processes and their children, in pytest's cache.

    Many tests trace what others have traced, and then need not compile it again. `make clean`
    empties the cache. JAX reads these variables when it is imported, which few tests need.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in the background of a shell: children would inherit it, and tests interrupt those.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert config.cache is not None
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    # JAX locks the folder only if its size is limited; without, readers meet half-written files.
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(1 << 30)


@pytest.fixture(scope="session")
def s3() -> Iterator["S3Server"]:
    """One object store for all tests that need nothing but a bucket."""
    from tests.s3 import serve_s3

    with serve_s3() as server:
        server.create_bucket("quantfleet")
        yield server


@pytest.fixture(scope="session")
def cluster(s3: "S3Server") -> Iterator["RunningCluster"]:
    """One cluster, with the store's credentials in its nodes' environment."""
    from tests.integration.ray_cluster import serve_ray

    with serve_ray(s3.environment) as running:
        yield running
