"""What a large catalog costs to decide, to list and to sweep: requests, seconds and memory.

    export KERAS_BACKEND=jax
    python -m tests.benchmarks.fleet                          1,000 and 10,000 models on S3
    python -m tests.benchmarks.fleet --entries 1000 --on disk

Each model is published, in one recipe: a source of 13 files, a run of 80. The commands are run as a
user runs them, each in a process of its own, and find nothing to do. S3 is `paged_store`, in a
process too, which answers every request after 20 ms. On a shared machine compare processor seconds;
a command's time is no less than those.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jobs.catalog.catalog_file import parse_catalog
from jobs.catalog.catalog_runs import catalog_runs
from pipeline.storage.object_store import ObjectStore, open_store
from tests.benchmarks.paged_store import Bucket, BucketBackend, serve
from tests.jobs.fleet import large_catalog
from tests.pipeline.tiny_runs import planned
from tests.s3 import environment

_URL = "s3://fleet/team"
_NUM_BLOCKS = 32
_LATENCY_SECONDS = 0.02
_COMMANDS = ("catalog check", "nightly --dry-run", "status", "gc")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a command took.

    Attributes:
        requests: by kind; none on a disk.
        peak_bytes: of memory.
    """

    seconds: float
    processor_seconds: float
    peak_bytes: int
    requests: dict[str, int]


def fill(store: ObjectStore, root: ObjectStore, num_entries: int) -> None:
    """Publish every model of the catalog at a store, whose own root is the folder fleet/ of it."""
    url = store.root_url
    shards = {f"model_{i:05d}.weights.h5": b"w" * 1000 for i in range(10)}
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.weights.json": b"{}", **shards}
    large_catalog.write_sources(url, num_entries, store, files)
    parts = range(_NUM_BLOCKS + 1)
    large_catalog.FILES.clear()
    large_catalog.FILES.update(
        {f"artifact/model_{part:05d}.weights.h5": bytes([part]) * 100 for part in parts}
        | {f"artifact/{name}.json": b"{}" for name in ("config", "task", "tokenizer")}
    )
    more = {f"records/block-{part:05d}.json": b"{}" for part in parts}
    plan = planned("int8").plan.to_json()
    more |= {"plan.json": plan, "events/1.jsonl": b"", "leases/00001.json": b"{}"}
    text = large_catalog.catalog_text(url, num_entries)
    for run in catalog_runs(parse_catalog(text, where="catalog.yaml", folder=None)):
        assert run.request is not None, run.problem
        large_catalog.finish(root, run.request, more)


def serve_catalog(num_entries: int) -> None:
    """Fill a bucket, print where it is served, and how much it was asked whenever a line comes."""
    bucket = Bucket()
    with serve(bucket) as server:
        os.environ |= environment(server.url)
        here = ObjectStore(_URL, BucketBackend(bucket, "team"))
        fill(here, ObjectStore(f"{_URL}/fleet", BucketBackend(bucket, "team/fleet")), num_entries)
        server.latency_seconds = _LATENCY_SECONDS
        print(server.url, flush=True)
        server.requests.clear()
        for _ in sys.stdin:
            print(json.dumps(server.requests), flush=True)
            server.requests.clear()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a catalog's models and runs lie.

    Attributes:
        environment: of commands.
        server: of the store; None on a disk.
    """

    url: str
    environment: dict[str, str]
    server: subprocess.Popen[str] | None = None

    def requests(self) -> dict[str, int]:
        """Those since the last time, by kind."""
        if self.server is None:
            return {}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write("\n")
        self.server.stdin.flush()
        found: dict[str, int] = json.loads(self.server.stdout.readline())
        return found


@contextmanager
def on_s3(num_entries: int) -> Iterator[Place]:
    """A catalog in a store that a process of its own serves."""
    words = [sys.executable, "-m", "tests.benchmarks.fleet", "--serve", str(num_entries)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        try:
            yield Place(url=_URL, environment=environment(url), server=server)
        finally:
            server.terminate()


@contextmanager
def on_disk(num_entries: int) -> Iterator[Place]:
    """A catalog in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        fill(store, open_store(f"{folder}/fleet"), num_entries)
        yield Place(url=folder, environment={})


def measure(command: str, target: str, place: Place) -> Measured:
    """Run a command of quantfleet's to its end."""
    name, *options = command.split()
    words = [name, *options, target] if name == "catalog" else [name, target, *options]
    place.requests()
    start = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli.start", *words, "--json"],
            stdout=out,
            env=os.environ | place.environment,
        )
        _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"quantfleet {' '.join(words)}: exit code {process.returncode}")
    return Measured(
        seconds=seconds,
        processor_seconds=used.ru_utime + used.ru_stime,
        peak_bytes=used.ru_maxrss << 10,
        requests=place.requests(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--on", choices=("s3", "disk"), default="s3")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        serve_catalog(given.serve)
        return
    print(
        "| models | command | seconds | of a processor | MiB at most | requests: list, get, all |"
    )
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for number in given.entries:
        with (
            {"s3": on_s3, "disk": on_disk}[given.on](number) as place,
            tempfile.NamedTemporaryFile("w", suffix=".yaml") as file,
        ):
            file.write(large_catalog.catalog_text(place.url, number))
            file.flush()
            for command in _COMMANDS:
                target = f"{place.url}/fleet" if command == "gc" else file.name
                found = measure(command, target, place)
                asked = found.requests
                counts = f"{asked.get('list', 0)}, {asked.get('get', 0)}, {sum(asked.values())}"
                print(
                    f"| {number:,} | {command} | {found.seconds:.1f} | "
                    f"{found.processor_seconds:.1f} | {found.peak_bytes / 2**20:.0f} | "
                    f"{counts if place.server else '–'} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
