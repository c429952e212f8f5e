"""What Kustomize makes of infra/kubernetes, by as much of Kustomize as is used there.

Anything else in a kustomization is refused, so that nothing is passed over in silence; where
kubectl is installed, a test compares this with what kubectl itself makes of the same files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_KEYS = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "images", "patches"}


class KustomizeError(ValueError):
    """A kustomization that is wrong, or uses what is not known here."""


def render(folder: Path) -> list[dict[str, Any]]:
    """The objects that a kustomization's folder stands for, as `kubectl kustomize` prints them."""
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    _only(wanted, _KEYS, "kustomization")
    objects = [found for name in wanted["resources"] for found in _resources(folder / name)]
    objects += [_config_map(folder, given) for given in wanted.get("configMapGenerator", ())]
    for patch in wanted.get("patches", ()):
        _only(patch, {"target", "patch"}, "patch")
        targets = [found for found in objects if _is_meant(found, patch["target"])]
        if not targets:
            raise KustomizeError(f"{folder}: no object is {patch['target']}")
        for target in targets:
            for operation in yaml.safe_load(patch["patch"]):
                _apply(target, operation)
    images = {
        image["name"]: f"{image['newName']}:{image['newTag']}" for image in wanted.get("images", ())
    }
    for found in objects:
        _rename_images(found, images)
        if found["kind"] == "Namespace":
            found["metadata"]["name"] = wanted.get("namespace", found["metadata"]["name"])
        elif "namespace" in wanted:
            found["metadata"]["namespace"] = wanted["namespace"]
    return objects


def _resources(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_dir():
        yield from render(path)
    elif not path.exists():
        raise KustomizeError(f"{path.parent.name}/kustomization.yaml: no resource {path.name}")
    else:
        # Aliases would make two places of a document one object, which a patch would change twice.
        documents = yaml.safe_load_all(path.read_text(encoding="utf-8"))
        yield from (_unshared(document) for document in documents if document)


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(one) for key, one in value.items()}
    return [_unshared(one) for one in value] if isinstance(value, list) else copy.copy(value)


def _config_map(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    _only(given, {"name", "files", "literals", "options"}, "configMapGenerator")
    if given.get("options") != {"disableNameSuffixHash": True}:
        raise KustomizeError(f"{given['name']}: only without a suffix")
    missing = [name for name in given.get("files", ()) if not (folder / name).exists()]
    if missing:
        raise KustomizeError(f"{given['name']}: no file {', '.join(missing)}")
    data = {name: (folder / name).read_text(encoding="utf-8") for name in given.get("files", ())}
    data |= dict(line.split("=", 1) for line in given.get("literals", ()))
    metadata = {"name": given["name"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _is_meant(found: dict[str, Any], target: dict[str, str]) -> bool:
    _only(target, {"kind", "name"}, "target")
    known = {"kind": found["kind"], "name": found["metadata"].get("name")}
    return all(known[key] == value for key, value in target.items())


def _apply(document: Any, operation: dict[str, Any]) -> None:
    """One operation of RFC 6902."""
    _only(operation, {"op", "path", "value"}, "operation")
    *parents, last = operation["path"].removeprefix("/").split("/")
    try:
        for name in parents:
            document = document[int(name)] if isinstance(document, list) else document[name]
    except (KeyError, IndexError, ValueError):
        raise KustomizeError(f"no {operation['path']} to {operation['op']}") from None
    match operation["op"], document:
        case "add", list() if last == "-":
            document.append(operation["value"])
        case "add", dict():
            document[last] = operation["value"]
        case "replace", dict() if last in document:
            document[last] = operation["value"]
        case "remove", list():
            del document[int(last)]
        case _:
            raise KustomizeError(f"cannot {operation['op']} {operation['path']}")


def _rename_images(value: Any, images: dict[str, str]) -> None:
    if isinstance(value, dict):
        for container in value.get("containers") or ():
            container["image"] = images.get(container["image"], container["image"])
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            _rename_images(inner, images)


def _only(given: dict[str, Any], known: set[str], what: str) -> None:
    if unknown := sorted(given.keys() - known):
        raise KustomizeError(f"{what} has {', '.join(unknown)}, which nothing reads")
