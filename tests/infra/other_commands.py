"""Commands in infra/ other than `quantfleet`: those of Ray, moto, make, docker, kubectl, Python.

Ray's own parser reads its commands, as `ray start` from a launcher's file or from rayStartParams.
Of the others, what they name in this repository must be there.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from tests.infra.kubernetes_names import made_secrets
from tests.infra.kustomized import KustomizeError, render
from tests.infra.machine_names import stages

_CODE = re.compile(r"^ *```sh\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_RAY = re.compile(
    r"(?:^|bin/|[\s(])ray\"? (?P<rest>(?:start|job|up|attach|down|status)\b[^\n;|&>`]*)"
)
_VARIABLE = re.compile(r"\"?\$(\{[^}]*\}|\w+)\"?")


def faults(infra: Path, root: Path) -> list[str]:
    """Each with the file that it stands in."""
    found = []
    for path in sorted(infra.rglob("*")):
        if path.suffix in (".yaml", ".sh", ".md", ".service") or path.name in ("crontab",):
            where = path.relative_to(infra)
            for words in _calls(path):
                if said := refusal(words):
                    found.append(f"{where}: {' '.join(words)}: {said}")
    text = (infra / "README.md").read_text()
    lines = "\n".join(_CODE.findall(text)).replace("\\\n", " ").splitlines()
    try:
        objects = render(infra / "kubernetes" / "base")
    except KustomizeError as error:
        return [*found, str(error)]
    for line in lines:
        found += [
            f"README.md: {line.strip()}: {said}" for said in _of_line(line, infra, root, objects)
        ]
    found += [f"README.md: {said}" for said in _of_prose(text, infra)]
    return found


def refusal(words: list[str]) -> str | None:
    """What a program's own parser says against a command line, which is not carried out."""
    match words:
        case ["ray", *arguments]:
            return _of_ray(arguments)
        case ["moto_server", *arguments]:
            import moto.server

            known = set(re.findall(r'"(--?[a-zA-Z-]+)"', inspect.getsource(moto.server)))
            unknown = [word for word in arguments if word.startswith("-") and word not in known]
            return f"no option {', '.join(unknown)}" if unknown else None
    return None


def _of_ray(arguments: list[str]) -> str | None:
    from ray.scripts.scripts import cli

    command: Any = cli
    try:
        while isinstance(command, click.Group):
            context = click.Context(command)
            name, command, arguments = command.resolve_command(context, arguments)
        command.make_context(name, list(arguments))
    except click.exceptions.Exit:
        return None
    except click.ClickException as error:
        return error.format_message()
    return None


def _calls(path: Path) -> Iterator[list[str]]:
    """Command lines of Ray and moto, wherever they stand."""
    text = path.read_text(encoding="utf-8")
    match path.suffix:
        case ".yaml":
            for document in yaml.safe_load_all(re.sub(r"!(Ref|Sub|GetAtt) ", "", text)):
                yield from _in_values(document)
        case ".md":
            for block in _CODE.findall(text):
                yield from _in_shell(block)
        case _:
            lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
            yield from _in_shell("\n".join(lines))


def _in_values(value: Any) -> Iterator[list[str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "rayStartParams":
                yield ["ray", "start", "--head", *(f"--{key}={one}" for key, one in inner.items())]
            yield from _in_values(inner)
    elif isinstance(value, list):
        if value and all(isinstance(word, str) for word in value):
            if value[0] in ("ray", "moto_server"):
                yield [word.replace("$$", "$") for word in value]
            else:
                for word in value:
                    yield from _in_shell(word)
        else:
            for inner in value:
                yield from _in_values(inner)


def _in_shell(code: str) -> Iterator[list[str]]:
    for call in _RAY.finditer(code.replace("\\\n", " ")):
        yield ["ray", *shlex.split(_VARIABLE.sub("1", call["rest"]), comments=True)]
    for rest in re.findall(r"moto_server\"? (-[^\n;|&>]*)", code):
        yield ["moto_server", *shlex.split(_VARIABLE.sub("1", rest))]


def _of_line(line: str, infra: Path, root: Path, objects: list[dict[str, Any]]) -> Iterator[str]:
    """What a line of README.md's code names in this repository."""
    words = line.split("#")[0].replace("(", " ").split()
    if "make" in words[:1]:
        targets = re.findall(r"^([a-z0-9-]+):", (root / "Makefile").read_text(), re.MULTILINE)
        yield from (f"no target {word}" for word in words[1:] if word not in targets)
    if words[:2] == ["docker", "build"]:
        target = words[words.index("--target") + 1]
        if target not in stages(infra):
            yield f"no stage {target}"
    images = set(re.findall(r'"image": "([^"]+)"', json.dumps(objects)))
    if words[:1] == ["docker"] and words[1] in ("build", "push"):
        image = words[words.index("-t") + 1] if "-t" in words else words[-1]
        if image not in images:
            yield f"no manifest uses {image}"
    if words[:1] == ["kubectl"]:
        yield from _of_kubectl(words, objects)
    for word in words:
        path = word.strip("\"')").removeprefix("file://")
        if path.startswith("infra/"):
            there = any(infra.glob(path.removeprefix("infra/")))
            if not there and path.removeprefix("infra/vms/") not in _ignored(infra):
                yield f"no file {path}"


def _ignored(infra: Path) -> list[str]:
    """What people make there themselves."""
    return (infra / "vms" / ".gitignore").read_text().splitlines()


def _of_kubectl(words: list[str], objects: list[dict[str, Any]]) -> Iterator[str]:
    known = {f"{one['kind'].lower()}/{one['metadata']['name']}" for one in objects}
    namespaces = {one["metadata"]["namespace"] for one in objects if "namespace" in one["metadata"]}
    for before, word in itertools.pairwise(words):
        if before in ("-n", "namespace") and word not in namespaces:
            yield f"no namespace {word}"
        named = word.removeprefix("--from=")
        if re.match(r"(cronjob|raycluster)/", named) and named not in known:
            yield f"no {named}"


def _of_prose(text: str, infra: Path) -> Iterator[str]:
    """Links to headings, and files that are named."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for anchor in re.findall(r"\]\(#([^)]*)\)", text):
        if anchor not in anchors:
            yield f"no heading #{anchor}"
    folders = r"(?:base|container|jobs|kubernetes|laptop|observability|overlays|storage|vms)"
    for name in re.findall(rf"`({folders}/[\w./-]+)`", text):
        places = (infra, infra / "kubernetes")
        if not any((p / name).exists() or (p / f"{name}.example").exists() for p in places):
            yield f"no file {name}"
    for name in re.findall(r"secret.*?(quantfleet-[a-z-]+)`", text, re.IGNORECASE):
        if name not in made_secrets(infra):
            yield f"no Secret {name}"
