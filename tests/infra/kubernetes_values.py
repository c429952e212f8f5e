"""What the API server and KubeRay's operator refuse although their schemas take it.

As far as it concerns what is used here: choices, times, lengths of names, and what of Ray's
resources must go together.
"""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.infra.cron_times import is_cron_schedule

# Kubernetes' schemas and KubeRay's take any text for these; the API server and the operator do not.
_CHOICES = {
    "concurrencyPolicy": {"Allow", "Forbid", "Replace"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "op": {"add", "remove", "replace"},
    "operator": {"In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt", "Equal"},
    "pod-security.kubernetes.io/enforce": {"privileged", "baseline", "restricted"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
    "unhealthyPodEvictionPolicy": {"AlwaysAllow", "IfHealthyBudget"},
}
_MOST_NAME = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}


def refused_values(one: dict[str, Any], root: Path | None) -> Iterator[str]:
    """Of one object; where the repository's root is given, Ray's version is compared too."""
    yield from _of_times(one.get("spec", {}))
    yield from _of_choices(one)
    yield from _of_kuberay(one, root)


def _of_times(spec: dict[str, Any]) -> Iterator[str]:
    if "schedule" in spec and not is_cron_schedule(spec["schedule"]):
        yield f"schedule {spec['schedule']!r} is none"
    if "timeZone" in spec and spec["timeZone"] not in zoneinfo.available_timezones():
        yield f"timeZone {spec['timeZone']} is none"


def _of_choices(one: dict[str, Any]) -> Iterator[str]:
    for value in within(one):
        for key in _CHOICES.keys() & value.keys():
            if value[key] not in _CHOICES[key]:
                yield f"{key} {value[key]} is none of {', '.join(sorted(_CHOICES[key]))}"


def _of_kuberay(one: dict[str, Any], root: Path | None) -> Iterator[str]:
    """What the operator refuses although its schemas take it."""
    name = one["metadata"].get("name", one["metadata"].get("generateName", "") + "xxxxx")
    if len(name) > _MOST_NAME.get(one["kind"], 63):
        yield f"name {name} is too long for KubeRay"
    if one["kind"] == "RayCluster":
        spec = one["spec"]
        if root is not None:
            lock = (root / "requirements.lock").read_text()
            [locked] = re.findall(r"^ray(?:\[\w+\])?==(\S+)", lock, re.MULTILINE)
            if spec["rayVersion"] != locked:
                yield f"rayVersion {spec['rayVersion']}, where requirements.lock has {locked}"
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield "autoscaler v2 takes only restartPolicy: Never"
            # Of other types they are refused by the schema.
            least, most = (group.get(name) for name in ("minReplicas", "maxReplicas"))
            if isinstance(least, int) and isinstance(most, int) and least > most:
                yield f"{group['groupName']}: minReplicas is above maxReplicas"
    if one["kind"] in ("RayJob", "RayCronJob"):
        spec = one["spec"].get("jobTemplate", one["spec"])
        if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
            yield "KubeRay takes no ttlSecondsAfterFinished without shutdownAfterJobFinishes"


def within(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in an object."""
    if isinstance(value, dict):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        yield from within(one)
