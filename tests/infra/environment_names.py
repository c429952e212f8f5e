"""Environment variables that infra/ sets: each is read by something, and its value is taken."""

from __future__ import annotations

import re
from pathlib import Path

# Of others, as far as they are used here.
_OTHERS = {
    "AWS_ACCESS_KEY_ID",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_SECRET_ACCESS_KEY",
    "KERAS_BACKEND",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_VISIBLE_DEVICES",
    "PIP_DISABLE_PIP_VERSION_CHECK",
    "PIP_NO_CACHE_DIR",
    "PIP_NO_INPUT",
    "PIP_ONLY_BINARY",
    "PIP_ROOT_USER_ACTION",
    "PYTHONUNBUFFERED",
    "PYTHON_IMAGE",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_HEAD_IP",
    "RAY_USAGE_STATS_ENABLED",
}
_VALUES = {
    "KERAS_BACKEND": r"jax",
    "RAY_AUTH_MODE": r"token",
    "RAY_USAGE_STATS_ENABLED": r"0",
    "QUANTFLEET_LOG": r"json",
    "QUANTFLEET_NODE_PATIENCE": r"\d+",
}
_NAME = re.compile(
    r"(?<![\w<])(?:AWS|KERAS|NVIDIA|PIP|PYTHON|QUANTFLEET|RAY)[A-Z]*_[A-Z0-9_]*[A-Z0-9]\b|PYTHONU\w+"
)
_READ = re.compile(r"[\"'](QUANTFLEET_[A-Z_]+)[\"']")
_ASSIGNED = re.compile(r"\b([A-Z][A-Z_]+)(?:=|: )\"?([^\s\"\\`,]+)")


def faults(infra: Path, root: Path) -> list[str]:
    """Each with the file that it stands in."""
    sources = [
        path for part in ("jobs", "pipeline") for path in sorted((root / part).rglob("*.py"))
    ]
    read = {name for path in sources for name in _READ.findall(path.read_text(encoding="utf-8"))}
    files = [p for p in sorted(infra.rglob("*")) if p.is_file() and p.suffix in _SUFFIXES]
    # A script's own settings are read where they stand.
    own = {
        n for p in files if p.suffix == ".sh" for n in re.findall(r"\$\{(\w+)[:}]", p.read_text())
    }
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        where = path.relative_to(infra)
        for name in sorted(set(_NAME.findall(text)) - _OTHERS - read - own):
            found.append(f"{where}: nothing reads {name}")
        for name, value in _ASSIGNED.findall(text):
            if name in _VALUES and not re.fullmatch(_VALUES[name], value):
                found.append(f"{where}: {name} is {value}, not {_VALUES[name]}")
    return found


_SUFFIXES = {"", ".example", ".json", ".md", ".service", ".sh", ".yaml"}
