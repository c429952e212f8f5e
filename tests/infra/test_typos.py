"""Slips that people make, for each kind of file in infra/: each is refused, by file and by fault.

`test_validated.py` shows that each validator can fail; here are the mistakes that reach a cluster:
fields, types and values; names, ports and labels that two files spell otherwise; options that a
program lacks; variables that nothing reads.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.infra import (
    environment_names,
    kubernetes_names,
    machine_names,
    metric_names,
    other_commands,
    quantfleet_commands,
    validators,
)
from tests.infra.test_validated import KINDS
from tests.infra.validators import INFRA, ROOT

pytestmark = pytest.mark.infra

# Each with what it is about; anything else is not asked of it here, to be quick.
NAMES = {
    environment_names: ("container", "compose", "vms", "laptop", "kubernetes"),
    machine_names: ("container", "compose", "vms", "storage"),
    metric_names: ("observability",),
    kubernetes_names: ("kubernetes", "README"),
    quantfleet_commands: ("container", "compose", "vms", "laptop", "kubernetes", "README"),
    other_commands: ("compose", "vms", "laptop", "kubernetes", "README"),
}
DOCKERFILE = "container/Dockerfile"
CLUSTER = "kubernetes/base/ray-cluster.yaml"
NIGHTLY = "kubernetes/base/nightly.yaml"
POLICIES = "kubernetes/base/network-policies.yaml"
BASE = "kubernetes/base/kustomization.yaml"
DEV = "kubernetes/overlays/dev/kustomization.yaml"
SPOT = "kubernetes/overlays/gpu-spot/kustomization.yaml"
RAY_JOB = "kubernetes/jobs/ray-job.yaml"
RAY_CRON = "kubernetes/jobs/ray-cron-job.yaml"
AWS = "vms/ray-aws.yaml"
GCP = "vms/ray-gcp.yaml"
SERVICE = "vms/quantfleet-nightly.service"
TIMER = "vms/quantfleet-nightly.timer"
BUCKET = "storage/bucket.yaml"
RULES = "observability/rules.yaml"
BOARD = "observability/dashboard.json"
# A file, what stands in it, what somebody wrote, and what is said to that.
TYPOS = [
    (DOCKERFILE, "FROM builder AS gpu", "FROM bulder AS gpu", "bulder"),
    (DOCKERFILE, "--from=gpu-builder", "--from=gpu_builder", "gpu_builder"),
    (DOCKERFILE, "COPY quantizer quant", "COPY quantiser quant", "quantiser"),
    (DOCKERFILE, "RAY_AUTH_MODE=token", "RAY_AUTH_MOD=token", "RAY_AUTH_MOD"),
    (DOCKERFILE, "STATS_ENABLED=0", "STATS_ENABLED=1", "RAY_USAGE_STATS_ENABLED is 1"),
    (DOCKERFILE, "QUANTFLEET_NODE_PATIENCE", "QUANTFLEET_NODES_PATIENCE", "nothing reads"),
    (DOCKERFILE, "52365", "52356", "HEALTHCHECK"),
    (DOCKERFILE, "u.urlopen('http", "u.urlopen(('http", "no Python"),
    (DOCKERFILE, "USER 1000:1000", "USER root", "root"),
    (DOCKERFILE, '"quantfleet", "--help"', '"quantfleet", "--hlep"', "No such option"),
    ("container/Dockerfile.dockerignore", "!infra/container/gpu.lock\n", "", "gpu.lock"),
    ("compose.yaml", "command: [moto_server, -H", "command: [moto_server, --hots", "--hots"),
    ("compose.yaml", "worker: {condition", "wroker: {condition", "wroker"),
    ("compose.yaml", "target: demo", "target: demmo", "demmo"),
    ("compose.yaml", "http://s3:5555", "http://s3:5556", "another port"),
    ("compose.yaml", "--address=head:6379", "--address=haed:6379", "haed"),
    ("compose.yaml", "AWS_ENDPOINT_URL:", "AWS_ENDPOINT:", "nothing reads AWS_ENDPOINT"),
    ("compose.yaml", "- --num-cpus=0", "- --num-cpu=0", "No such option"),
    ("compose.yaml", "- --wait", "- --wiat", "No such option"),
    ("compose.yaml", "condition: service_completed_", "condition: service_complete_", "service_c"),
    (
        "compose.yaml",
        "      - data:/home/ray/out\n",
        "      - dat:/home/ray/out\n",
        "no volume dat",
    ),
    ("compose.yaml", "  demo:\n", "   demo:\n", "compose.yaml"),
    (BASE, "- nightly.yaml", "- nightl.yaml", "nightl.yaml"),
    (BASE, "name: quantfleet-gpu", "name: quantfleet-gp", "image quantfleet-gpu"),
    (BASE, "newTag: 0.1.0-gpu", "newTag: 0.1.0-gpv", "image registry"),
    (BASE, "namespace: quantfleet", "namespce: quantfleet", "namespce"),
    (BASE, "QUANTFLEET_LOG=json", "QUANTFLEET_LOG=jsn", "QUANTFLEET_LOG is jsn"),
    (BASE, "- name: quantfleet-settings", "- name: quantfleet-setting", "no ConfigMap"),
    (DEV, "/spec/workerGroupSpecs/1}", "/spec/workerGroupsSpecs/1}", "workerGroupsSpecs"),
    (DEV, "maxReplicas, value: 2", "maxReplicas, value: two", "'two'"),
    (DEV, "op: replace", "op: repalce", "repalce"),
    (SPOT, "operator: In", "operator: Inn", "Inn"),
    (SPOT, "effect: NoSchedule}", "efect: NoSchedule}", "efect"),
    ("kubernetes/base/namespace.yaml", "kind: Namespace", "kind: Namespaces", "Namespaces"),
    ("kubernetes/base/service-accounts.yaml", "quantfleet-worker", "quantfleet-workers", "no Serv"),
    (
        "kubernetes/base/service-accounts.yaml",
        "automountServiceAccountToken: false",
        'automountServiceAccountToken: "no"',
        "boolean",
    ),
    ("kubernetes/base/disruption-budgets.yaml", "node-type: head", "node-type: haed", "no pod has"),
    ("kubernetes/base/disruption-budgets.yaml", "AlwaysAllow", "Allways", "AlwaysAllow"),
    (POLICIES, 'submitter: "true"', 'submiter: "true"', "no pod has"),
    (POLICIES, "port: 8265", "port: 8256", "8256"),
    (POLICIES, "protocol: UDP", "protocol: UPD", "UPD"),
    (POLICIES, "podSelector: {}", "podSelectors: {}", "podSelector"),
    (NIGHTLY, "concurrencyPolicy: Forbid", "concurrencyPolicy: Forbidden", "is none of"),
    (NIGHTLY, "schedule: 0 2 * * *", "schedule: 0 25 * * *", "schedule"),
    (NIGHTLY, "timeZone: Etc/UTC", "timeZone: Etc/UCT+1", "timeZone"),
    (NIGHTLY, "key: auth_token", "key: auth-token", "no key auth-token"),
    (NIGHTLY, "name: RAY_AUTH_TOKEN", "name: RAY_AUTH_TOKN", "nothing reads RAY_AUTH_TOKN"),
    (NIGHTLY, "quantfleet-head-svc", "quantfleet-head", "no service"),
    (NIGHTLY, "head-svc:8265", "head-svc:8266", "no containerPort"),
    (NIGHTLY, "/catalogs/nightly-catalog", "/catalogs/nightly", "in no ConfigMap"),
    (NIGHTLY, "- submit\n", "- submitt\n", "No such command"),
    (NIGHTLY, "- nightly\n", "- nightyl\n", "No such command"),
    (NIGHTLY, "backoffLimit: 3", "backoffLimit: three", "integer"),
    (NIGHTLY, "memory: 1Gi", "memory: 1Gib", "no quantity"),
    (NIGHTLY, "restartPolicy: Never", "restartPolicy: Nver", "Never"),
    ("kubernetes/base/collect.yaml", "--delete]", "--delte]", "No such option"),
    ("kubernetes/base/collect.yaml", "quantfleet-collector", "quantfleet-colector", "no Service"),
    (
        "kubernetes/base/nightly-catalog.yaml",
        "max_perplexity_inc",
        "max_perplexty_inc",
        "perplexty",
    ),
    (CLUSTER, "rayVersion: 2.60.0", "rayVersion: 2.61.0", "requirements.lock"),
    (CLUSTER, "secretName: quantfleet-ray-token", "secretName: quantfleet-token", "no Secret"),
    (CLUSTER, "version: v2", "version: v3", "v3"),
    (CLUSTER, "num-gpus:", "num-gpu:", "No such option"),
    (CLUSTER, "restartPolicy: Never", "restartPolicy: Always", "autoscaler v2"),
    (CLUSTER, "port: 52365", "port: 52366", "probe"),
    (CLUSTER, '/port: "8080"', '/port: "8081"', "no containerPort"),
    (CLUSTER, "{name: catalogs, mountPath", "{name: catalog, mountPath", "no volume"),
    (CLUSTER, "image: quantfleet-gpu", "image: quantfleet-cpu", "not REGISTRY/…:0.1.0-gpu"),
    (CLUSTER, "minReplicas: 0", 'minReplicas: "0"', "integer"),
    (CLUSTER, "minReplicas: 0", "minReplicas: 9", "above maxReplicas"),
    (CLUSTER, "memory: 32Gi", "memory: 32GiB", "32GiB"),
    (RAY_JOB, "--at-once 4", "--at-one 4", "No such option"),
    (RAY_JOB, "activeDeadlineSeconds", "activeDeadlineSecond", "activeDeadlineSecond"),
    (RAY_JOB, "K8sJobMode", "K8sJob", "K8sJobMode"),
    (RAY_JOB, "K8sJobMode\n", "K8sJobMode\n  ttlSecondsAfterFinished: 60\n", "shutdownAfterJobFi"),
    (RAY_JOB, "cluster: quantfleet", "cluster: quantfleets", "clusterSelector"),
    (RAY_JOB, "0.1.0-cpu", "0.1.1-cpu", "none of base's"),
    (RAY_JOB, "dev/submitter", "dev/submiter", "NetworkPolicy"),
    (RAY_CRON, "schedule: 0 2", "schedule: 60 2", "schedule"),
    (RAY_CRON, "nightly /catalogs", "nigthly /catalogs", "No such command"),
    (RAY_CRON, "namespace: quantfleet", "namespace: quantfleets", "namespace"),
    (RAY_CRON, "submissionMode", "submitMode", "submitMode"),
    (AWS, "quantfleet-worker}", "quantfleet-workers}", "instance profile"),
    (AWS, "InstanceType: g6", "InstanceTyp: g6", "InstanceTyp"),
    (AWS, "VolumeSize: 100", 'VolumeSize: "100"', "VolumeSize"),
    (AWS, "MarketType: spot", "MarketType: spott", "MarketType"),
    (AWS, "head_node_type: head", "head_node_type: haed", "head_node_type"),
    (AWS, "--metrics-export-port=8080", "--metrics-port=8080", "No such option"),
    (AWS, "infra/vms/ray.env", "infra/vms/rays.env", "rays.env"),
    (AWS, "max_workers: 8", "max_workers: many", "many"),
    (GCP, "resources: {CPU: 8, GPU: 1}", "resources: {}", "how many CPUs"),
    (GCP, "provisioningModel: SPOT", "provisioningModel: SPOTS", "SPOTS"),
    (GCP, "machineType: g2", "machineTyp: g2", "machineTyp"),
    (GCP, "ssh_user: ubuntu", "ssh_user: debian", "mounted"),
    (GCP, "--autoscaling-config", "--autoscaler-config", "No such option"),
    (SERVICE, "Type=oneshot", "Type=oneshoot", "oneshoot"),
    (SERVICE, "[Service]", "[Sevice]", "Sevice"),
    (SERVICE, "User=ubuntu", "User=quantfleet", "as whom Ray runs"),
    (SERVICE, "--address auto", "--adress auto", "No such option"),
    (SERVICE, "NoNewPrivileges", "PrivateTmp=yes\nNoNewPrivileges", "hides Ray's sockets"),
    (SERVICE, "=/etc/quantfleet.env", "=/etc/quantfleets.env", "quantfleets.env"),
    (SERVICE, "TimeoutStopSec=60", "TimeoutStopSec=60x", "time value"),
    (TIMER, "WantedBy=timers.target", "WantedBy=timer.target", "no target wants it"),
    (TIMER, "RandomizedDelaySec=5m", "RandomizedDelay=5m", "RandomizedDelay"),
    ("vms/quantfleet-collect.timer", "Sun *-*-*", "Son *-*-*", "calendar"),
    ("vms/quantfleet-collect.service", "--delete", "--delte", "No such option"),
    ("vms/crontab", "quantfleet gc", "quantfleet cg", "No such command"),
    ("vms/crontab", "0 12 * * 0", "0 12 * * 8", "0 12 * * 8"),
    ("vms/crontab", "0 2 * * * set", "0 2 * * set", "set -a"),
    ("vms/crontab", "cd /home/ubuntu/", "cd /home/ubunut/", "ubunut"),
    ("vms/ray.env.example", "QUANTFLEET_LOG=json", "QUANTFLEET_LOGS=json", "nothing reads"),
    ("vms/ray.env.example", "KERAS_BACKEND=jax", "KERAS_BACKEND=jaxx", "jaxx"),
    (BUCKET, "s3:ListBucket", "s3:ListBuckets", "listbuckets"),
    (BUCKET, "NoncurrentDays: 30", "NoncurrentDay: 30", "NoncurrentDay"),
    (BUCKET, "!Ref DriverPolicy", "!Ref DriversPolicy", "DriversPolicy"),
    (BUCKET, "Effect: Allow", "Effect: Alow", "Alow"),
    ("storage/lifecycle.json", '"DaysAfterInitiation": 2', '"DaysAfterInitiation": "2"', "Days"),
    ("storage/lifecycle.json", '"Filter": {"Prefix"', '"Filter": {"Prefx"', "Prefx"),
    (RULES, "ray_quantfleet_runs_total", "ray_quantfleet_run_total", "nothing emits"),
    (RULES, "by (model, recipe, outcome)", "by (model, reciepe, outcome)", "label reciepe"),
    (RULES, 'outcome="failed"', 'outcome="faild"', "no run ends as faild"),
    (RULES, "$labels.catalog", "$labels.catalogue", "label catalogue"),
    (RULES, "for: 5m", "for: 5min", "5min"),
    (RULES, "annotations:", "anotations:", "anotations"),
    ("observability/prometheus.yaml", "- rules.yaml", "- rule.yaml", "rule.yaml"),
    ("observability/prometheus.yaml", "scrape_interval: 15s", "scrape_interval: 15", "duration"),
    (BOARD, "ray_quantfleet_blocks_total", "ray_quantfleet_block_total", "nothing emits"),
    (BOARD, "sum by (stage)", "sum by (stages)", "label stages"),
    (BOARD, '"legendFormat"', '"legend"', "legend"),
    (BOARD, '"type": "stat"', '"type": "stats"', "stats"),
    ("laptop/up.sh", '"$bin/moto_server" -H', '"$bin/moto_server" --hots', "--hots"),
    ("laptop/up.sh", "--dashboard-agent-listen-port", "--dashboard-agent-port", "No such option"),
    ("laptop/up.sh", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=tokn", "tokn"),
    ("laptop/up.sh", "[[ -e $state/pids ]]", "[[ -e $stat/pids ]]", "stat"),
    ("laptop/down.sh", "    fi\n", "", "SC1"),
    ("laptop/nightly.sh", 'quantfleet" nightly', 'quantfleet" nigthly', "No such command"),
    ("laptop/catalog.yaml", "windows: 2", "windws: 2", "windws"),
    ("README.md", "quantfleet rollback", "quantfleet rolback", "No such command"),
    (
        "README.md",
        "`quantfleet nightly --dry-run` first",
        "`quantfleet nightly --dryrun` first",
        "No s",
    ),
    ("README.md", "--target gpu", "--target gpus", "no stage gpus"),
    (
        "README.md",
        "push registry.example.com/quantfleet:0.1.0-gpu",
        "push quantfleet:gpu",
        "no manif",
    ),
    (
        "README.md",
        "apply -k infra/kubernetes/overlays",
        "apply -k infra/kubernetes/overlay",
        "no file",
    ),
    ("README.md", "secret generic quantfleet-ray-token", "secret generic ray-token", "no Secret"),
    ("README.md", "--from-literal=auth_token", "--from-literal=token", "no key auth_token"),
    ("README.md", "cronjob/quantfleet-nightly", "cronjob/nightly", "no cronjob/nightly"),
    ("README.md", "-n quantfleet wait", "-n quantfleets wait", "no namespace"),
    ("README.md", "(#how-much-it-takes)", "(#what-it-takes)", "no heading"),
    ("README.md", "`storage/bucket.yaml` makes", "`storage/buckets.yaml` makes", "no file"),
    ("README.md", "ray up infra/vms/ray-aws.yaml", "ray upp infra/vms/aws.yaml", "no file"),
    ("README.md", "   make venv\n   (umask", "   make env\n   (umask", "no target env"),
]


def said_against(spoilt: str, infra: Path) -> Iterator[str]:
    """What everything that reads a file says, one after the other."""
    if spoilt.endswith(".yaml") and not _is_yaml(infra / spoilt):
        # Nothing else can read it.
        yield from (f"{spoilt}: {said}" for said in validators.yaml_style(infra / spoilt))
        return
    for names, about in NAMES.items():
        if spoilt.startswith(about):
            yield from names.faults(infra, ROOT)
    for kind in KINDS.values():
        if kind.check == validators.yaml_style:
            continue
        for pattern in kind.files:
            for path in sorted(infra.glob(pattern)):
                if path == infra / spoilt or (
                    path.is_dir() and (infra / spoilt).is_relative_to(path)
                ):
                    yield from (f"{path.relative_to(infra)}: {said}" for said in kind.check(path))


def _is_yaml(path: Path) -> bool:
    try:
        return any(yaml.compose_all(re.sub(r"!(Ref|Sub|GetAtt) ", "", path.read_text())))
    except yaml.YAMLError:
        return False


@pytest.mark.parametrize("names", NAMES, ids=lambda names: names.__name__.rpartition(".")[2])
def test_names_agree(names: object) -> None:
    assert names.faults(INFRA, ROOT) == []


# By default, test_validated shows that each validator refuses a typo.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("spoilt", "right", "wrong", "said"), TYPOS, ids=[f"{t[0]}: {t[2].strip()}" for t in TYPOS]
)
def test_a_slip_is_refused_by_file_and_fault(
    spoilt: str, right: str, wrong: str, said: str, tmp_path: Path
) -> None:
    infra = tmp_path / "infra"
    shutil.copytree(INFRA, infra)
    text = (infra / spoilt).read_text()
    assert right in text
    (infra / spoilt).write_text(text.replace(right, wrong, 1))
    heard = []
    for fault in said_against(spoilt, infra):
        heard.append(fault)
        if said in fault:
            return
    pytest.fail(f"{said!r} in none of {heard}")
