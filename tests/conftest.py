"""What must hold before any test module is imported."""

import os
from typing import TYPE_CHECKING

# Keras chooses TensorFlow when nobody chooses.
os.environ.setdefault("KERAS_BACKEND", "jax")

from collections.abc import Iterator

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.integration.ray_cluster import RunningCluster
    from tests.s3 import S3Server

# An example that compiles is slow once and fast after: a deadline would only be flaky.
# Built on the current profile: with CI set that is Hypothesis' own deterministic one.
settings.register_profile("quantfleet", settings.default, deadline=None)
settings.load_profile("quantfleet")


@pytest.fixture(scope="session", autouse=True)
def compiled(pytestconfig: pytest.Config) -> None:
    """Programs that any test process has compiled, in pytest's own cache: `make clean` removes it.

    Many tests trace anew what others have traced; then they need not compile it again.
    """
    import jax

    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # Only where its size has a limit does JAX lock the folder: nobody reads what is half written.
    jax.config.update("jax_compilation_cache_max_size", 1 << 30)


@pytest.fixture(scope="session")
def s3() -> Iterator["S3Server"]:
    """One object store for all tests that need no more of it than a bucket."""
    from tests.s3 import serve_s3

    with serve_s3() as server:
        server.create_bucket("quantfleet")
        yield server


@pytest.fixture(scope="session")
def cluster(s3: "S3Server") -> Iterator["RunningCluster"]:
    """One cluster, whose nodes have the credentials of the store in their environment."""
    from tests.integration.ray_cluster import serve_ray

    with serve_ray(s3.environment) as running:
        yield running
