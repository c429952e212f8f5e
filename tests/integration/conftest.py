"""What tests of a real Ray cluster share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.executor.ray_cluster import connect
from tests.integration.ray_cluster import RunningCluster, quiet_environment


@pytest.fixture(scope="module")
def driver(cluster: RunningCluster) -> Iterator[None]:
    """This process, connected to the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quiet_environment().items():
            patch.setenv(name, value)
        with connect(cluster.address):
            yield
