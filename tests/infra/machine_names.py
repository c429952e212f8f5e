"""What files for containers and machines say of each other: services, stages, roles, users."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.exceptions
import botocore.session
import yaml
from botocore.validate import validate_parameters

from tests.infra.kubernetes_names import AGENT_PORT

# Of Google Cloud's Instance, as far as it is used; Google's client has no offline validator.
_GCP = {
    "machineType": str,
    "disks": list,
    "networkInterfaces": list,
    "serviceAccounts": list,
    "guestAccelerators": list,
    "scheduling": dict,
}
_SCHEDULING = {
    "provisioningModel": {"SPOT", "STANDARD"},
    "onHostMaintenance": {"TERMINATE", "MIGRATE"},
    "automaticRestart": {True, False},
}


def faults(infra: Path, root: Path) -> list[str]:
    """Each with the file that it stands in."""
    checks = {
        "container/Dockerfile": _of_dockerfile,
        "compose.yaml": _of_compose,
        "vms/ray-aws.yaml": _of_aws,
        "vms/ray-gcp.yaml": _of_gcp,
    }
    found = [f"{name}: {fault}" for name, check in checks.items() for fault in check(infra, root)]
    for path in sorted((infra / "vms").iterdir()):
        if path.suffix in (".service", ".timer") or path.name == "crontab":
            found += [f"vms/{path.name}: {fault}" for fault in _of_unit(path, infra)]
    return found


def stages(infra: Path) -> list[str]:
    """Names of the images that the Dockerfile has."""
    text = (infra / "container" / "Dockerfile").read_text()
    return re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE)


def _of_dockerfile(infra: Path, root: Path) -> Iterator[str]:
    text = (infra / "container" / "Dockerfile").read_text().replace("\\\n", " ")
    sent = (infra / "container" / "Dockerfile.dockerignore").read_text().splitlines()
    known = ["${PYTHON_IMAGE}"]
    for name, arguments in re.findall(r"^([A-Z]+) +(.*)$", text, re.MULTILINE):
        words = arguments.split()
        match name:
            case "FROM":
                if words[0] not in known:
                    yield f"FROM {words[0]} is no stage before it"
                known.append(words[-1])
            case "COPY" if words[0].startswith("--from="):
                if words[0].removeprefix("--from=") not in known:
                    yield f"COPY {words[0]} is no stage before it"
            case "COPY":
                for source in words[:-1]:
                    place = infra if source.startswith("infra/") else root
                    path = place / source.removeprefix("infra/")
                    if not path.exists() or f"!{source}" not in sent:
                        yield f"COPY {source}: no such file, or .dockerignore keeps it back"
            case "HEALTHCHECK":
                command = json.loads(arguments[arguments.index("[") :])
                yield from _of_python(command)
                if f":{AGENT_PORT}/api/healthz" not in command[-1]:
                    yield f"HEALTHCHECK asks another than Ray's agent, {AGENT_PORT}/api/healthz"
    users = re.findall(r"^USER (.*)$", text, re.MULTILINE)
    if not users or any(re.match(r"(0|root)\b", user) for user in users):
        yield "runs as root"


def _of_python(command: list[str]) -> Iterator[str]:
    if command[:2] == ["python", "-c"]:
        try:
            ast.parse(command[2])
        except SyntaxError as error:
            yield f"no Python: {command[2]} ({error})"


def _of_compose(infra: Path, root: Path) -> Iterator[str]:
    given = yaml.safe_load((infra / "compose.yaml").read_text())
    services = given["services"]
    for name, service in services.items():
        built = service.get("build", {})
        if built and built["target"] not in stages(infra):
            yield f"{name}: target {built['target']} is no stage of the Dockerfile"
        if built and not (infra / built["context"] / built["dockerfile"]).resolve().is_file():
            yield f"{name}: no dockerfile {built['dockerfile']}"
        for other, how in service.get("depends_on", {}).items():
            if other not in services:
                yield f"{name}: depends_on {other}, which is no service"
            elif how["condition"] == "service_healthy" and services[other].get(
                "healthcheck", {}
            ).get("disable"):
                yield f"{name}: waits for {other} to be healthy, which nothing checks"
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            there = (infra / source).exists() if "/" in source else source in given["volumes"]
            if not there:
                yield f"{name}: no volume {source}"
        yield from (f"{name}: {fault}" for fault in _of_hosts(service, services))
    images = {service["image"] for service in services.values()}
    if not any("build" in service for service in services.values()) or len(images) != 1:
        yield f"the images {', '.join(sorted(images))}, of which one is built"


def _of_hosts(service: dict[str, Any], services: dict[str, Any]) -> Iterator[str]:
    values = [*map(str, service.get("environment", {}).values()), *service.get("command", ())]
    for value in values:
        for host in re.findall(r"(?:http://|--address=)([a-z0-9.]+):\d+", str(value)):
            if host not in services:
                yield f"{value}: {host} is no service"
    moto = next((s["command"] for s in services.values() if s["command"][0] == "moto_server"), None)
    for value in service.get("environment", {}).values():
        url = re.fullmatch(r"http://\w+:(\d+)", str(value))
        if url and moto and url[1] not in moto:
            yield f"{value}: the S3 server listens at another port"


def _of_aws(infra: Path, root: Path) -> Iterator[str]:
    """Each node as boto3 checks what it is about to ask for; and its role exists."""
    given = yaml.safe_load((infra / "vms" / "ray-aws.yaml").read_text())
    model = botocore.session.Session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    roles = (infra / "storage" / "bucket.yaml").read_text()
    for name, kind in given["available_node_types"].items():
        wanted = {"MinCount": 1, "MaxCount": 1}
        # Ray makes a network interface of these.
        config = {key: v for key, v in kind["node_config"].items() if key != "SubnetIds"}
        try:
            validate_parameters(config | wanted, shape)
        except botocore.exceptions.ParamValidationError as error:
            yield f"{name}: {' '.join(str(error).split())}"
        profile = config["IamInstanceProfile"].get("Name")
        if f"InstanceProfileName: {profile}\n" not in roles:
            yield f"{name}: storage/bucket.yaml makes no instance profile {profile}"
        options = config.get("InstanceMarketOptions", {}).get("MarketType", "spot")
        if options not in shape.members["InstanceMarketOptions"].members["MarketType"].enum:
            yield f"{name}: no MarketType {options}"
    yield from _of_launcher(given, infra)


def _of_gcp(infra: Path, root: Path) -> Iterator[str]:
    given = yaml.safe_load((infra / "vms" / "ray-gcp.yaml").read_text())
    for name, kind in given["available_node_types"].items():
        config = kind["node_config"]
        for key, value in config.items():
            if not isinstance(value, _GCP.get(key, ())):
                yield f"{name}: {key} is none of {', '.join(_GCP)}, or of another type"
        scheduling = config.get("scheduling")
        for key, value in scheduling.items() if isinstance(scheduling, dict) else ():
            if value not in _SCHEDULING.get(key, ()):
                yield f"{name}: scheduling has no {key}: {value}"
        # Ray does not look up what a machine type of Google's has, and starts none for work that
        # needs what a type is not known to have.
        if "CPU" not in kind["resources"]:
            yield f"{name}: resources do not say how many CPUs there are"
        if ("guestAccelerators" in config) != bool(kind["resources"].get("GPU")):
            yield f"{name}: resources and guestAccelerators do not agree about GPUs"
    yield from _of_launcher(given, infra)


def _of_launcher(given: dict[str, Any], infra: Path) -> Iterator[str]:
    """Files that commands on nodes read are in the checkout that they get."""
    text = json.dumps(given)
    for name in re.findall(r"~/quantfleet/infra/([\w./-]+)", text):
        if not (infra / name).exists() and not (infra / f"{name}.example").exists():
            yield f"no file infra/{name}"
    home = f"/home/{given['auth']['ssh_user']}/quantfleet"
    if list(given["file_mounts"]) != [home]:
        yield f"the checkout is not mounted at {home}"


def _of_unit(path: Path, infra: Path) -> Iterator[str]:
    """Units and crontab run on the head as the user that started Ray there."""
    launcher = yaml.safe_load((infra / "vms" / "ray-aws.yaml").read_text())
    [home] = launcher["file_mounts"]
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines)
    if path.suffix == ".timer" and not path.with_suffix(".service").exists():
        yield "starts no unit"
    if path.suffix == ".timer" and "WantedBy=timers.target" not in lines:
        yield "no target wants it, so that nothing enables it"
    if path.suffix == ".service":
        user = launcher["auth"]["ssh_user"]
        if f"User={user}" not in lines:
            yield f"User is not {user}, as whom Ray runs"
        if f"WorkingDirectory={home}" not in lines:
            yield f"WorkingDirectory is not {home}"
        if "--address" in text and "PrivateTmp=yes" in lines:
            yield "PrivateTmp hides Ray's sockets"
    for place in re.findall(r"(?:ExecStart=|cd )(/\S+)", text):
        if not place.startswith(home):
            yield f"{place} is not in {home}"
    readme = (infra / "README.md").read_text()
    for place in set(re.findall(r"/etc/[\w./-]+", text)):
        if place not in readme:
            yield f"README.md does not say how {place} gets there"
