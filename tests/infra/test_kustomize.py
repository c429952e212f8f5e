"""Our reading of the kustomizations is Kustomize's, and the overlays change what they say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.kustomized import KustomizeError, render
from tests.infra.validators import INFRA

pytestmark = pytest.mark.infra

FOLDERS = ("base", "overlays/dev", "overlays/gpu-spot")


def _by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["kind"], one["metadata"]["name"]): one for one in objects}


def _cluster(folder: str) -> dict[str, Any]:
    objects = _by_name(render(INFRA / "kubernetes" / folder))
    return objects["RayCluster", "quantfleet"]["spec"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_kubectl_makes_the_same_of_it(folder: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; it is only compared with")
    path = INFRA / "kubernetes" / folder
    done = subprocess.run([kubectl, "kustomize", path], capture_output=True, check=True, timeout=60)
    assert _by_name(list(yaml.safe_load_all(done.stdout))) == _by_name(render(path))


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: []\nnamePrefix: dev-\n")
    with pytest.raises(KustomizeError, match="namePrefix"):
        render(tmp_path)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_worker_waits_for_work_and_the_head_does_none(folder: str) -> None:
    cluster = _cluster(folder)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"]
    assert [group["minReplicas"] for group in cluster["workerGroupSpecs"]] in ([0, 0], [0])


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_runs_as_root_or_without_limit(folder: str) -> None:
    for found in render(INFRA / "kubernetes" / folder):
        for pod in _pods(found):
            # What the namespace enforces, by the standard "restricted".
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert "memory" in container["resources"]["limits"]


def _pods(value: Any) -> list[dict[str, Any]]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [pod for one in inner for pod in _pods(one)]
    return [value, *found] if isinstance(value, dict) and "containers" in value else found


@pytest.mark.parametrize("folder", FOLDERS)
def test_tokens_come_from_secrets_that_are_not_in_the_repository(folder: str) -> None:
    objects = render(INFRA / "kubernetes" / folder)
    assert not [one for one in objects if one["kind"] == "Secret"]
    assert _cluster(folder)["authOptions"] == {
        "mode": "token",
        "secretName": "quantfleet-ray-token",
    }


def test_spot_nodes_are_asked_for_by_gpu_workers_alone() -> None:
    cpu, gpu = _cluster("overlays/gpu-spot")["workerGroupSpecs"]
    assert "affinity" not in cpu["template"]["spec"]
    pod = gpu["template"]["spec"]
    assert pod["affinity"]["nodeAffinity"]
    tolerated = {toleration["key"] for toleration in pod["tolerations"]}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= tolerated
    assert pod["terminationGracePeriodSeconds"] < 30


def test_nothing_starts_by_itself_in_dev() -> None:
    jobs = [o for o in render(INFRA / "kubernetes/overlays/dev") if o["kind"] == "CronJob"]
    assert len(jobs) == 2
    assert all(job["spec"]["suspend"] for job in jobs)
