"""A catalog as Ray Jobs: a real head, nodes, dashboard, token and S3; what is killed is healed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.artifact.verification import ask_stock
from tests.integration.ray_head import (
    ROOT,
    TOKEN,
    Head,
    Node,
    await_that,
    kill,
    processes_of,
    serve_head,
    serve_node,
)
from tests.models.tiny import tiny_preset
from tests.pipeline.tiny_runs import TEXT
from tests.s3 import ACCESS_KEY, SECRET_KEY, S3Server, serve_s3

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None,
        reason="Ray's dashboard is not installed; install ray[default]",
    ),
]
BUCKET = "quantfleet-jobs"
ARCHITECTURES = {"llama": "Llama3", "gpt": "GPT2", "qwen": "Qwen3"}
NUM_BLOCKS = {"llama": 4, "gpt": 12}


@dataclass(frozen=True)
class Outcome:
    """What a call of the command left."""

    status: int
    out: str
    err: str

    @property
    def found(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("moto", marks=pytest.mark.slow, id="moto"),
        pytest.param("radosgw", marks=pytest.mark.radosgw, id="radosgw"),
    ],
)
def s3(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    """Instead of the one that tests share, in whose bucket something may lie."""
    with ExitStack() as stack:
        if request.param == "moto":
            server = stack.enter_context(serve_s3())
        else:
            server = request.getfixturevalue("radosgw")
        server.create_bucket(BUCKET)
        # Of an earlier time: tests that go from process to process set the module up again.
        server.empty_bucket(BUCKET)
        yield server


@pytest.fixture(scope="module")
def head(s3: S3Server) -> Iterator[Head]:
    """One without CPUs: it runs drivers alone, as on Kubernetes."""
    with serve_head(0, s3.environment | {"QUANTFLEET_LOG": "json"}) as running:
        yield running


@pytest.fixture(scope="module")
def nodes(head: Head) -> Iterator[dict[str, Node]]:
    """Where workers run, by name; either has room for all that is done at once."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(serve_node(head, name, 2)) for name in ("node-a", "node-b")
        }


@pytest.fixture(scope="module")
def catalog(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, four runs, everything in S3; the first two take long enough to be disturbed."""
    folder = tmp_path_factory.mktemp("catalog")
    client = s3.client()
    for name, architecture in ARCHITECTURES.items():
        preset = tiny_preset(architecture, folder / name, num_blocks=NUM_BLOCKS.get(name, 2))
        for path in sorted(preset.rglob("*")):
            if path.is_file():
                key = f"presets/{name}/{path.relative_to(preset)}"
                client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
    client.put_object(Bucket=BUCKET, Key="texts/a.txt", Body=TEXT.encode())
    client.put_object(Bucket=BUCKET, Key="texts/b.txt", Body=TEXT[::-1].encode())
    gptq = {
        "name": "gptq",
        "scheme": {"mode": "gptq", "weight_bits": 4, "group_size": 16},
        "calibration": {
            "texts": [f"s3://{BUCKET}/texts/a.txt"], "num_samples": 4, "sequence_length": 32,
        },
    }  # fmt: skip
    hopeless = {**gptq, "name": "gptq-w2", "scheme": {"mode": "gptq", "weight_bits": 2}}
    hopeless["scheme"]["group_size"] = -1
    models = [
        {"name": name, "preset": f"s3://{BUCKET}/presets/{name}", "recipes": [gptq]}
        for name in ARCHITECTURES
    ]
    models[0]["priority"] = 9
    models[1]["priority"] = 8
    models[2] |= {
        "recipes": ["int8", hopeless],
        "evaluate_on": [f"s3://{BUCKET}/texts/b.txt"],
        "windows": 2,
        "gate": {"max_divergence": 0.001},
    }
    file = folder / "catalog.yaml"
    values = {
        "root": f"s3://{BUCKET}/fleet",
        "defaults": {"resources": {"workers": 1, "threads": 1}},
        "models": models,
    }
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def command(head: Head, *arguments: object, **environment: str) -> list[str]:
    return [sys.executable, "-m", "jobs.cli.main", *map(str, arguments)]


def call(head: Head, *arguments: object, **environment: str) -> Outcome:
    finished = subprocess.run(
        command(head, *arguments),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=head.environment | environment,
        timeout=600,
    )
    for line in finished.stderr.splitlines():
        assert "traceback" not in json.loads(line), line
    return Outcome(finished.returncode, finished.stdout, finished.stderr)


@contextmanager
def submitting(head: Head, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command(head, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=head.environment,
    )
    try:
        yield process
    finally:
        process.kill()
        print(process.communicate()[1])  # what pytest shows of a failure


def some_lie_at(s3: S3Server, prefix: str) -> bool:
    return bool(s3.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)["KeyCount"])


def driver_of(request: str, run: str, s3: S3Server) -> int:
    """The process that carries a request out, once it has committed a part, and logged that."""
    await_that(lambda: some_lie_at(s3, f"fleet/runs/{run}/events/"), request)
    # The shell that Ray starts it with comes first, with the same words.
    return processes_of(f"fulfil s3://{BUCKET}/fleet/requests/{request}")[-1]


def driver_lines(head: Head, request: str) -> list[dict[str, Any]]:
    """What the drivers of a request printed.

    Ray itself begins each log, its C++ core tells of objects that a dead node held, and a shell
    may end it.
    """
    files = head.session_folder.rglob(f"job-driver-{request}-*.log")
    lines = [line for path in sorted(files) for line in path.read_text().splitlines()]
    others = re.compile(
        r"\S+ \S+\tINFO job_manager\.py|Running entrypoint for job|Killed$"
        r"|\[[\d-]+ [\d:,]+ [A-Z] \d+ \d+\] \w+\.cc:\d+: "
    )
    return [json.loads(line) for line in lines if not others.match(line)]


def test_a_wrong_token_and_an_absent_cluster_start_nothing(
    head: Head, catalog: Path, s3: S3Server
) -> None:
    given = ("submit", catalog, "--address")
    for address, environment, said in (
        (head.address, {"RAY_AUTH_TOKEN": "f" * 64}, "refuses the token; set RAY_AUTH_TOKEN"),
        (head.address, {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}, "refuses the token"),
        ("http://127.0.0.1:9", {}, "no Ray cluster answers at http://127.0.0.1:9"),
        ("ftp://somewhere", {}, "--address must be that of the cluster's dashboard"),
    ):
        outcome = call(head, *given, address, **environment)
        assert outcome.status == 3, outcome.err
        assert outcome.out == ""
        [line] = outcome.err.strip().splitlines()
        assert said in line
        assert "f" * 64 not in line
    listed = s3.client().list_objects_v2(Bucket=BUCKET, Prefix="fleet/")
    assert listed["KeyCount"] == 0


def test_a_catalog_is_carried_out_though_a_driver_and_a_node_are_killed(
    head: Head,
    nodes: dict[str, Node],
    catalog: Path,
    s3: S3Server,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = time.monotonic()
    dry = call(head, "nightly", catalog, "--dry-run", "--json")
    assert dry.status == 0, dry.err
    assert {one["result"] for one in dry.found} == {"to do"}
    by_name = {f"{one['model']} {one['recipe']}": one for one in dry.found}
    assert len(by_name) == 4
    first, second = by_name["llama gptq"], by_name["gpt gptq"]
    given = ("submit", catalog, "--address", head.address, "--at-once", 2, "--poll-seconds", 1)

    # The submitter itself is killed, too: its jobs go on, and the next one attaches to them.
    with submitting(head, *given, "--wait") as process:
        driver = driver_of(first["request_id"], first["run_id"], s3)
        kill(process.pid)
    kill(driver)
    driver_of(second["request_id"], second["run_id"], s3)
    [used] = head.nodes_of_job(f"{second['request_id']}-attempt1")
    kill(nodes[used].raylet)
    assert not some_lie_at(s3, f"fleet/runs/{second['run_id']}/manifest.json")
    await_that(lambda: head.state_of_node(used) == "DEAD", f"the end of {used}")
    [left] = set(nodes) - {used}
    assert head.state_of_node(left) == "ALIVE"

    healed = call(head, *given, "--wait", "--json")
    tasks = {f"{one['model']} {one['recipe']}": one for one in healed.found["jobs"]}
    assert healed.status == 5, healed.err
    states = {name: task["state"] for name, task in tasks.items()}
    assert states.pop("qwen gptq-w2") == "gate failed"
    assert set(states.values()) == {"published"}, healed.err
    assert "more than 0.001" in tasks["qwen gptq-w2"]["text"]
    assert tasks["llama gptq"]["job"].endswith("-attempt2")
    assert head.state_of_node(used) == "DEAD"

    # Everything is in storage: status needs no cluster, and a night has nothing to do.
    status = call(head, "status", catalog, "--json", RAY_ADDRESS="")
    assert [row["state"] for row in status.found].count("published") == 3
    assert [row["state"] for row in status.found].count("gate failed") == 1
    again = call(head, "nightly", catalog, "--json")
    assert again.status == 5
    assert {one["result"] for one in again.found} == {"up to date", "gate failed"}
    assert not any(one["solved"] for one in again.found)
    log = call(head, "logs", f"s3://{BUCKET}/fleet/runs/{tasks['llama gptq']['run_id']}")
    assert log.out.count(" started ") == 2
    assert " resumed " in log.out
    # The driver of the other run outlived its workers' node.
    log = call(head, "logs", f"s3://{BUCKET}/fleet/runs/{second['run_id']}")
    assert " lost " in log.out

    with capsys.disabled():
        read = {f"{one['model']} {one['recipe']}": one["bytes_read"] for one in again.found}
        took = time.monotonic() - start
        print(f"\n{len(tasks)} runs, {used} lost, in {took:.0f} s; read to decide: {read}")

    # Stock KerasHub loads each from where its pointer leads.
    client = s3.client()
    with tempfile.TemporaryDirectory() as folder:
        presets = []
        for name in states:
            model, recipe = name.split()
            key = f"fleet/models/{model}/{recipe}/current.json"
            body = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            artifact = f"fleet/{json.loads(body)['content']['release']['artifact']}/"
            target = Path(folder, name.replace(" ", "-"))
            for entry in client.list_objects_v2(Bucket=BUCKET, Prefix=artifact)["Contents"]:
                path = target / entry["Key"].removeprefix(artifact)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read())
            presets.append(target)
        tokens = np.arange(1, 9, dtype=np.int32)[None]
        answer = ask_stock(presets, [tokens] * len(presets))
    assert all(np.isfinite(outputs).all() for outputs in answer.outputs)

    # What drivers tell is for machines, and names the run, also when a node is lost.
    told = driver_lines(head, second["request_id"])
    assert {line["run"] for line in told} == {second["run_id"]}
    assert {"committed", "layer", "lost", "published"} <= {line["event"] for line in told}
    assert {line["level"] for line in told if line["event"] == "lost"} == {"warning"}

    # No secret of the store, nor the token, is in storage or in Ray's logs.
    written = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="fleet/"):
        for entry in page["Contents"]:
            body = client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
            written[entry["Key"]] = body
    for path in head.session_folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            written[str(path)] = path.read_bytes()
    for secret in (SECRET_KEY, ACCESS_KEY, TOKEN):
        assert [name for name, data in written.items() if secret.encode() in data] == []


def test_a_job_is_cancelled_and_its_run_goes_on_later(
    head: Head, nodes: dict[str, Node], catalog: Path, tmp_path: Path, s3: S3Server
) -> None:
    values = yaml.safe_load(catalog.read_text())
    values["models"] = [{**values["models"][0], "name": "again"}]
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(values))
    given = ("submit", file, "--address", head.address, "--poll-seconds", 1, "--json")
    started = call(head, *given)
    [task] = started.found["jobs"]
    assert task["state"] == "running"
    assert call(head, *given).found["jobs"][0]["job"] == task["job"]  # attached
    driver_of(task["request_id"], task["run_id"], s3)
    stopped = call(head, "cancel", task["request_id"], "--address", head.address, "--json")
    assert stopped.found == [task["job"]]
    outcome = call(head, *given, "--wait")
    assert outcome.status == 0, outcome.err
    [task] = outcome.found["jobs"]
    assert (task["state"], task["job"][-8:]) == ("published", "attempt2")
