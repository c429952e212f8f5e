"""One cluster, and one object store that it can reach, for all tests of the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.ray_cluster import RunningCluster, serve_ray
from tests.s3 import S3Server, serve_s3


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with serve_s3() as server:
        server.create_bucket("quantfleet")
        yield server


@pytest.fixture(scope="session")
def cluster(s3: S3Server) -> Iterator[RunningCluster]:
    """Its nodes have the credentials of the store in their environment, as deployed ones do."""
    with serve_ray(s3.environment) as running:
        yield running
