"""The environment of all tests, set before a test module is imported, and what they share."""

import gc
import os
import signal
from typing import TYPE_CHECKING

# Left to itself, Keras chooses TensorFlow.
os.environ.setdefault("KERAS_BACKEND", "jax")

from collections.abc import Generator, Iterator

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

    Many tests trace what others have traced, and then need not compile it again: also what takes
    no time, since a process that has just started compiles hundreds of those. `make clean` empties
    the cache. JAX reads these variables when it is imported, which few tests need.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in the background of a shell: children would inherit it, and tests interrupt those.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert config.cache is not None
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Without a limit to its size, of which JAX would look through the whole folder at each program,
    # nothing is locked: who meets a file that another process is writing is to compile, silently.
    unlucky = "ignore:Error reading persistent compilation cache entry:UserWarning"
    given = os.environ.get("PYTHONWARNINGS", "")
    if unlucky not in given.split(","):
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (given, unlucky)))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Let each of several processes begin to import test modules at another place of a folder.

    pytest rewrites the assertions of a module when it is first imported, which takes as long as all
    else of collecting, and keeps the result in a file for whoever comes next. Side by side in the
    same order, all would rewrite everything.
    """
    report = yield
    worker = getattr(collector.config, "workerinput", None)
    if worker is not None and isinstance(collector, pytest.Directory) and report.passed:
        number = int(worker["workerid"].removeprefix("gw"))
        first = len(report.result) * number // worker["workercount"]
        report.result = [*report.result[first:], *report.result[:first]]
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the modules that start clusters: they take long, and wait more than they compute.

    So one process of pytest runs them beside whatever the others do, and its clusters serve all.
    """
    if hasattr(config, "workerinput"):  # see above: all processes are to know the same order
        items.sort(key=lambda item: item.path.parts)
    waiting = {item.path for item in items if any(map(item.get_closest_marker, ("ray", "radosgw")))}
    items.sort(key=lambda item: item.path not in waiting)


def pytest_collection_finish() -> None:
    """Leave out of garbage collections all test modules, and later what each of them has kept.

    Keras collects whenever a layer loses a variable, as each does that is quantized, and that takes
    a second where all lives that a session of tests has imported, built and compiled.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def kept() -> Iterator[None]:
    """See `pytest_collection_finish`."""
    yield
    # Here, and not before the next module: its filters may turn our warnings into errors.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def s3() -> Iterator["S3Server"]:
    """One object store for all tests that need nothing but a bucket."""
    from tests.s3 import serve_s3

    with serve_s3() as server:
        server.create_bucket("quantfleet")
        yield server


@pytest.fixture(scope="session")
def radosgw() -> Iterator["S3Server"]:
    """Another, real one, for tests marked so; each makes its own buckets."""
    from tests.radosgw import serve_radosgw

    with serve_radosgw() as server:
        yield server


@pytest.fixture(scope="session")
def cluster(s3: "S3Server") -> Iterator["RunningCluster"]:
    """One cluster, with the store's credentials in its nodes' environment."""
    from tests.integration.ray_cluster import serve_ray

    with serve_ray(s3.environment) as running:
        yield running
