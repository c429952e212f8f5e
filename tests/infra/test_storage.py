"""Storage policies: what roles may do is what they need, and no more.

Policies are read off the CloudFormation template; moto, which can ask for signatures and decide by
policies as AWS does, stands for S3.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
import yaml

from jobs.gc import collect
from jobs.publish.verified_files import verified_files_key
from pipeline.errors import StorageError
from pipeline.export.manifest import EXPORT_KEY, REQUEST_KEY, discard, forget_progress
from pipeline.export.settings import ExportSettings
from pipeline.plan import PLAN_KEY
from pipeline.remote_planning import export_result
from pipeline.storage.object_store import open_store
from tests.infra.validators import INFRA
from tests.pipeline.tiny_runs import execute, planned
from tests.s3 import ACCESS_KEY, SECRET_KEY, S3Server, serve_s3

pytestmark = pytest.mark.infra

BUCKET = "fleet"
ROOT = "production"


def _template() -> dict[str, Any]:
    text = (INFRA / "storage" / "bucket.yaml").read_text()
    # Only what policies refer to: the bucket's name, and the root below it.
    text = text.replace("!GetAtt Bucket.Arn", f"arn:aws:s3:::{BUCKET}")
    text = re.sub(r"!(Ref|Sub|GetAtt) ", "", text)
    text = text.replace("${Bucket.Arn}", f"arn:aws:s3:::{BUCKET}").replace("${Root}", ROOT)
    return yaml.safe_load(text)["Resources"]


def policy(role: str) -> dict[str, Any]:
    return _template()[f"{role.capitalize()}Policy"]["Properties"]["PolicyDocument"]


def may(role: str, action: str, key: str) -> bool:
    """Whether a statement allows it, as IAM matches: `*` stands for slashes too."""
    for statement in policy(role)["Statement"]:
        actions, resources = (
            [given] if isinstance(given, str) else given
            for given in (statement["Action"], statement["Resource"])
        )
        if action in actions and any(
            fnmatch.fnmatchcase(f"arn:aws:s3:::{BUCKET}/{key}", resource) for resource in resources
        ):
            return True
    return False


RUN = f"{ROOT}/runs/llama-int8-0123abcd"
PUBLISHED = [
    f"{ROOT}/models/llama/int8/current.json",
    f"{ROOT}/models/llama/int8/history/000001.json",
    f"{ROOT}/requests/llama-int8-0123abcd.json",
]
KEPT = [f"{RUN}/plan.json", f"{RUN}/manifest.json", f"{RUN}/events/00001.jsonl"]


@pytest.mark.parametrize("key", [*PUBLISHED, *KEPT, f"{RUN}/activations/x", f"{RUN}/artifact/x"])
def test_workers_delete_nothing(key: str) -> None:
    assert not may("worker", "s3:DeleteObject", key)
    assert may("worker", "s3:PutObject", key) == key.startswith(RUN)


@pytest.mark.parametrize("key", [*PUBLISHED, *KEPT, "sources/llama/config.json"])
def test_drivers_delete_nothing_that_was_published_or_decided(key: str) -> None:
    assert not may("driver", "s3:DeleteObject", key)


@pytest.mark.parametrize(
    "part", ["activations", "artifact", "codes", "exports", "records", "tokens"]
)
def test_drivers_clear_what_no_run_needs_and_what_is_damaged(part: str) -> None:
    assert may("driver", "s3:DeleteObject", f"{RUN}/{part}/x")


@pytest.mark.parametrize("role", ["reader", "worker", "driver", "collector"])
def test_nobody_touches_old_versions_or_sources(role: str) -> None:
    actions = {
        action
        for statement in policy(role)["Statement"]
        for action in (
            [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        )
    }
    known = {"s3:ListBucket", "s3:GetBucketLocation", "s3:GetObject"}
    assert actions <= known | {"s3:PutObject", "s3:DeleteObject"}
    for action in ("s3:PutObject", "s3:DeleteObject"):
        assert not may(role, action, "sources/llama/model.weights.h5")


@pytest.mark.parametrize("key", [*PUBLISHED, "sources/llama/config.json"])
def test_the_collector_deletes_runs_and_nothing_that_was_published(key: str) -> None:
    assert not may("collector", "s3:DeleteObject", key)
    assert not may("collector", "s3:PutObject", key)
    assert all(may("collector", "s3:DeleteObject", kept) for kept in KEPT)


def test_both_forms_of_the_lifecycle_say_the_same() -> None:
    given = _template()["Bucket"]["Properties"]["LifecycleConfiguration"]["Rules"]
    expected = json.loads((INFRA / "storage" / "lifecycle.json").read_text())["Rules"]
    for rule in given:
        rule["ID"] = rule.pop("Id")
        rule["Filter"] = {"Prefix": rule.pop("Prefix")}
    assert given == expected


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with serve_s3() as server:
        server.create_bucket(BUCKET)
        yield server


def test_a_server_takes_the_lifecycle(s3: S3Server) -> None:
    rules = json.loads((INFRA / "storage" / "lifecycle.json").read_text())
    s3.client().put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=rules)
    kept = s3.client().get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    assert [rule["ID"] for rule in kept] == ["abandoned-uploads", "deleted-and-overwritten"]


@pytest.fixture(scope="module")
def keys(s3: S3Server) -> dict[str, dict[str, str]]:
    """Access keys of a user for each role."""
    iam = boto3.client(
        "iam",
        endpoint_url=s3.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
    )
    found = {}
    for role in ("worker", "driver", "collector"):
        iam.create_user(UserName=role)
        document = json.dumps(policy(role))
        iam.put_user_policy(UserName=role, PolicyName=role, PolicyDocument=document)
        found[role] = iam.create_access_key(UserName=role)["AccessKey"]
    return found


@pytest.fixture
def as_role(
    s3: S3Server, keys: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """Make this process somebody with one role's policy, on a server that decides by it."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)

    def become(role: str) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys[role]["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[role]["SecretAccessKey"])

    with s3.demanding_credentials():
        yield become


@pytest.mark.exhaustive
def test_a_whole_run_needs_no_more_than_the_drivers_role(as_role: Callable[[str], None]) -> None:
    """Driver and worker are both in this process, but what the driver may holds the worker's."""
    as_role("driver")
    store = open_store(f"s3://{BUCKET}/{RUN}")
    manifest, _ = execute(planned("awq", num_samples=4, sequence_length=64), store, keep_every=1)
    assert set(manifest.files) <= set(store.list())
    # What is damaged is moved aside and made again.
    damaged = min(key for key in manifest.files if key.endswith(".h5"))
    store.put(damaged, b"damaged")
    store.delete(damaged)
    with pytest.raises(StorageError, match="AccessDenied"):
        store.delete(PLAN_KEY)


@pytest.mark.exhaustive
def test_an_export_needs_no_more_than_the_workers_role_and_the_drivers_to_clear_up(
    as_role: Callable[[str], None],
) -> None:
    run_url = f"s3://{BUCKET}/{ROOT}/runs/tiny-int8-11111111"
    as_role("driver")
    execute(planned("int8"), open_store(run_url), keep_every=1)
    as_role("worker")
    made = export_result(run_url, ExportSettings(format="dense"), f"{run_url}/exports/dense")
    as_role("driver")
    store = open_store(made.url)
    assert store.exists(REQUEST_KEY)
    forget_progress(store)
    assert set(store.list()) == {*made.manifest.files, EXPORT_KEY}
    discard(store, made.manifest.request)
    assert store.list() == (REQUEST_KEY,)


def test_the_collectors_role_is_enough_to_delete_a_run(
    as_role: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    as_role("driver")
    root = open_store(f"s3://{BUCKET}/{ROOT}")
    run_id = "tiny-int8-00000000"
    execute(planned("int8"), open_store(f"s3://{BUCKET}/{ROOT}/runs/{run_id}"), keep_every=1)
    root.put(verified_files_key(run_id), b"{}")
    # As a catalog's root has it, of which nothing was published yet.
    root.put(f"requests/{run_id}.json", b"{}")
    as_role("collector")
    url = f"s3://{BUCKET}/{ROOT}"
    collect(url, delete=True, lease_seconds=1.0, as_json=True, unpublished=True)
    [swept] = [one for one in json.loads(capsys.readouterr().out) if run_id in one["url"]]
    assert (swept["deleted"], swept["skipped"]) == (True, "")
    assert [key for key in root.list() if run_id in key] == [f"requests/{run_id}.json"]


def test_a_worker_that_deletes_is_refused(as_role: Callable[[str], None]) -> None:
    as_role("worker")
    store = open_store(f"s3://{BUCKET}/{RUN}-2")
    store.create("activations/1/0.npy", b"numbers")
    assert store.get("activations/1/0.npy") == b"numbers"
    with pytest.raises(StorageError, match="AccessDenied"):
        store.delete("activations/1/0.npy")
    with pytest.raises(StorageError, match="AccessDenied"):
        open_store(f"s3://{BUCKET}/{ROOT}/models/llama/int8").put("current.json", b"mine")
