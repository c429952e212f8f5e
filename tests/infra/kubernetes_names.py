"""What one Kubernetes object says of another holds: names, labels, ports, keys, images, times.

Schemas see one object at a time, so that an account, label or port that is spelt otherwise in two
places passes them and fails in the cluster. The last part is what KubeRay's operator refuses beyond
its schemas, as far as it concerns what is used here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.infra.kubernetes_values import refused_values, within
from tests.infra.kustomized import KustomizeError, render

# Where the agent of every Ray node tells of its health; no container names it as a port.
AGENT_PORT = 52365
_QUANTITY = re.compile(r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i|m)?")


def faults(infra: Path, root: Path) -> list[str]:
    """Of every kustomization, and of what is created beside it."""
    folder = infra / "kubernetes"
    found = []
    try:
        base = render(folder / "base")
        for place in (folder / "base", *sorted((folder / "overlays").iterdir())):
            objects = base if place.name == "base" else render(place)
            found += [f"{place.relative_to(infra)}: {fault}" for fault in _of(objects, infra, root)]
    except KustomizeError as error:
        return [str(error)]
    for path in sorted((folder / "jobs").iterdir()):
        where = path.relative_to(infra)
        [job] = yaml.safe_load_all(path.read_text())
        found += [f"{where}: {fault}" for fault in _of_job(job, base)]
    return found


def _of(objects: list[dict[str, Any]], infra: Path, root: Path) -> Iterator[str]:
    for one in objects:
        name = f"{one['kind']} {one['metadata']['name']}"
        for fault in (
            *_of_references(one, objects, infra),
            *_of_selectors(one, objects),
            *_of_ports(one, objects),
            *_of_commands(one, objects),
            *_of_images(one, root),
            *refused_values(one, root),
        ):
            yield f"{name}: {fault}"


def _of_job(job: dict[str, Any], base: list[dict[str, Any]]) -> Iterator[str]:
    spec = job["spec"].get("jobTemplate", job["spec"])
    cluster = _named(base, "RayCluster")
    if spec["clusterSelector"] != {"ray.io/cluster": next(iter(cluster))}:
        yield f"clusterSelector {spec['clusterSelector']} is not {', '.join(cluster)}"
    if job["metadata"]["namespace"] not in _named(base, "Namespace"):
        yield f"namespace {job['metadata']['namespace']} is not that of base/"
    known = {image for one in base for image in _images(one)}
    yield from (f"image {image} is none of base's" for image in _images(job) if image not in known)
    yield from _of_references(job, base, None)
    yield from _of_commands(job, base)
    yield from refused_values(job, None)
    for labels in _labels(job):
        if not any(
            _selects(one["spec"]["podSelector"], labels)
            for one in base
            if one["kind"] == "NetworkPolicy" and one["spec"].get("podSelector")
        ):
            yield f"no NetworkPolicy lets pods with {labels} reach anything"


def _of_references(
    one: dict[str, Any], objects: list[dict[str, Any]], infra: Path | None
) -> Iterator[str]:
    """Accounts, ConfigMaps and volumes that exist; Secrets that the documents say how to make."""
    for value in within(one):
        account = value.get("serviceAccountName")
        if account is not None and account not in _named(objects, "ServiceAccount"):
            yield f"serviceAccountName {account} is no ServiceAccount of these"
        for key in ("configMapRef", "configMap"):
            wanted = value.get(key)
            if isinstance(wanted, dict) and wanted["name"] not in _named(objects, "ConfigMap"):
                yield f"{key} {wanted['name']} is no ConfigMap of these"
        if "containers" in value:
            volumes = {volume["name"] for volume in value.get("volumes", ())}
            mounted = {m["name"] for c in value["containers"] for m in c.get("volumeMounts", ())}
            yield from (f"volumeMounts: no volume {name}" for name in sorted(mounted - volumes))
        if infra is not None:
            yield from _of_secrets(value, made_secrets(infra))


def _of_secrets(value: dict[str, Any], made: dict[str, set[str]]) -> Iterator[str]:
    wanted = []
    if isinstance(given := value.get("secretKeyRef"), dict):
        wanted = [(given["name"], given["key"])]
    if isinstance(given := value.get("secretRef"), dict):
        wanted = [(given["name"], None)]
    if isinstance(given := value.get("authOptions"), dict):
        # The key that KubeRay reads.
        wanted = [(given["secretName"], "auth_token")]
    for name, key in wanted:
        if name not in made:
            yield f"no Secret {name} is made by README.md"
        elif key not in {None, *made[name]}:
            yield f"Secret {name} has no key {key} by README.md"


def made_secrets(infra: Path) -> dict[str, set[str]]:
    """Secrets that README.md makes, and their keys."""
    text = (infra / "README.md").read_text().replace("\\\n", " ")
    return {
        name: set(re.findall(r"--from-literal=(\w+)=", rest))
        for name, rest in re.findall(r"create secret generic (\S+)(.*)", text)
    }


def _of_selectors(one: dict[str, Any], objects: list[dict[str, Any]]) -> Iterator[str]:
    """A selector that no pod matches protects nothing, and lets nothing pass."""
    pods = [labels for other in objects for labels in _labels(other)]
    for selector in _selectors(one):
        if not any(_selects(selector, labels) for labels in pods):
            yield f"no pod has the labels {selector.get('matchLabels')}"


def _selectors(one: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if one["kind"] == "PodDisruptionBudget":
        yield one["spec"]["selector"]
    if one["kind"] == "NetworkPolicy":
        yield one["spec"].get("podSelector", {})
        yield from (value["podSelector"] for value in within(one) if _is_peer(value))


def _is_peer(value: dict[str, Any]) -> bool:
    return "podSelector" in value and "policyTypes" not in value


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def _labels(one: dict[str, Any]) -> list[dict[str, str]]:
    """Of each kind of pod that an object stands for, with what KubeRay adds."""
    name, spec = one["metadata"].get("name"), one.get("spec", {})
    if one["kind"] == "RayCluster":
        return [
            _template(spec["headGroupSpec"]) | _rays(name, "head"),
            *(_template(g) | _rays(name, "worker") for g in spec["workerGroupSpecs"]),
        ]
    if one["kind"] == "CronJob":
        return [_template(spec["jobTemplate"]["spec"])]
    job = spec.get("jobTemplate", spec)
    if "submitterPodTemplate" in job:
        return [dict(job["submitterPodTemplate"].get("metadata", {}).get("labels", {}))]
    return []


def _template(given: dict[str, Any]) -> dict[str, str]:
    return dict(given["template"].get("metadata", {}).get("labels", {}))


def _rays(cluster: str, kind: str) -> dict[str, str]:
    return {"ray.io/cluster": cluster, "ray.io/node-type": kind}


def _of_ports(one: dict[str, Any], objects: list[dict[str, Any]]) -> Iterator[str]:
    """Ports that containers have: of probes, of rules between pods, of what Prometheus scrapes."""
    ours = _ports(objects)
    for value in within(one):
        probed = value.get("httpGet")
        if isinstance(probed, dict) and (probed["port"], probed["path"]) != (
            AGENT_PORT,
            "/api/healthz",
        ):
            yield f"probe {probed} is not that of Ray's agent, {AGENT_PORT}/api/healthz"
        scraped = value.get("prometheus.io/port")
        if scraped is not None and int(scraped) not in ours:
            yield f"prometheus.io/port {scraped} is no containerPort"
        if one["kind"] == "NetworkPolicy" and "ports" in value:
            between = "from" in value or any(map(_is_peer, value.get("to", ())))
            for port in value["ports"] if between else ():
                if port["port"] not in ours:
                    yield f"port {port['port']} is no containerPort"


def _ports(objects: list[dict[str, Any]]) -> set[int]:
    return {v["containerPort"] for one in objects for v in within(one) if "containerPort" in v}


def _of_commands(one: dict[str, Any], objects: list[dict[str, Any]]) -> Iterator[str]:
    """Services and catalogs that commands name."""
    words = [
        word
        for value in within(one)
        for text in (value.get("entrypoint"), *(value.get("command") or ()))
        if isinstance(text, str)
        for word in text.split()
    ]
    known = {f"{name}-head-svc" for name in _named(objects, "RayCluster")} | {"127.0.0.1"}
    catalogs = {key for o in objects if o["kind"] == "ConfigMap" for key in o["data"]}
    for word in words:
        if called := re.fullmatch(r"http://([^:/]+):(\d+)", word):
            if called[1] not in known:
                yield f"{word}: no service of this name; there is {', '.join(sorted(known))}"
            if int(called[2]) not in _ports(objects):
                yield f"{word}: no containerPort {called[2]}"
        if word.startswith("/catalogs/") and word.removeprefix("/catalogs/") not in catalogs:
            yield f"{word} is in no ConfigMap"


def _of_images(one: dict[str, Any], root: Path) -> Iterator[str]:
    """Pushed names with this project's version; GPUs with the image that can use them."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for container in _containers(one):
        image = container["image"]
        wanted = "gpu" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
        if not re.fullmatch(rf"[^/]+/.+:{re.escape(project['version'])}-{wanted}", image):
            yield f"image {image}, not REGISTRY/…:{project['version']}-{wanted}"
        for amounts in container["resources"].values():
            for name, amount in amounts.items():
                if not _QUANTITY.fullmatch(str(amount)):
                    yield f"{name} {amount} is no quantity"


def _images(one: dict[str, Any]) -> list[str]:
    return [container["image"] for container in _containers(one)]


def _containers(one: dict[str, Any]) -> list[dict[str, Any]]:
    return [found for value in within(one) for found in value.get("containers") or ()]


def _named(objects: list[dict[str, Any]], kind: str) -> list[str]:
    return [one["metadata"]["name"] for one in objects if one["kind"] == kind]
