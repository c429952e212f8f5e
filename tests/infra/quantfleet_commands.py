"""Every `quantfleet …` in infra/, as its words: in shell code, YAML lists, units and documents."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import typer.main
import yaml
from typer.core import TyperGroup

from jobs.cli.main import app
from tests.infra.validators import INFRA

_CODE_BLOCK = re.compile(r"^ *```(?:sh|console)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# In prose: at least a word after the name.
_INLINE = re.compile(r"`(quantfleet [a-z][^`…]*)`")
# Where a command begins, or at the end of its path; elsewhere the word is an argument.
_CALL = re.compile(
    r"(?:^\s*|[;&|(]\s*|\bexec |-- |/)quantfleet\"?[ ](?P<rest>[a-z-][^;&|\n)`]*)", re.MULTILINE
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One call.

    Attributes:
        where: the file.
        words: what follows `quantfleet`.
        is_mention: prose that names it, and may leave its arguments out.
    """

    where: str
    words: tuple[str, ...]
    is_mention: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.words)}"


def commands(folder: Path = INFRA) -> list[Command]:
    """All of them, in the order of files."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in (".pyc", ".lock"):
            where = str(path.relative_to(folder))
            text = path.read_text(encoding="utf-8")
            found += [Command(where=where, words=words) for words in _in_code(path, text)]
            found += [
                Command(where=where, words=words, is_mention=True)
                for inline in _INLINE.finditer(text)
                for words in _in_shell(inline[1])
            ]
    return found


def _in_code(path: Path, text: str) -> Iterator[tuple[str, ...]]:
    match path.suffix:
        case ".yaml":
            for document in yaml.safe_load_all(_plain(text)):
                yield from _in_values(document)
        case ".md":
            for block in _CODE_BLOCK.finditer(text):
                yield from _in_shell(block[1])
        case "" if path.name == "Dockerfile":
            for exec_form in re.findall(r"^(?:CMD|ENTRYPOINT) (\[.*\])$", text, re.MULTILINE):
                yield from _in_values(json.loads(exec_form))
        case ".sh" | ".service" | "":
            lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
            yield from _in_shell("\n".join(lines))


def _plain(text: str) -> str:
    """YAML without the tags of CloudFormation."""
    return re.sub(r"!(Ref|Sub|GetAtt) ", "", text)


def _in_values(value: Any) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "entrypoint" and isinstance(inner, str):
                yield from _in_shell(inner)
            yield from _in_values(inner)
    elif isinstance(value, list):
        if "quantfleet" in value and all(isinstance(word, str) for word in value):
            yield tuple(value[value.index("quantfleet") + 1 :])
        for inner in value:
            yield from _in_values(inner)


def _in_shell(code: str) -> Iterator[tuple[str, ...]]:
    for call in _CALL.finditer(code.replace("\\\n", " ")):
        # Redirections and a comment are the shell's, not the command's.
        words = shlex.split(call["rest"].split(" > ")[0], comments=True)
        # What a script hands on is its caller's.
        yield tuple(word for word in words if word != "$@")


@functools.cache
def _program() -> Any:
    return typer.main.get_command(app)


def refusal(words: tuple[str, ...], *, is_mention: bool = False) -> str | None:
    """What the program's own parser says against a command line, which is not carried out."""
    program = _program()
    context = program.make_context("quantfleet", [], resilient_parsing=True)
    context.resilient_parsing = False
    arguments = list(words)
    try:
        # Down to the command that is meant; what begins with "-" belongs to no command.
        while isinstance(program, TyperGroup) and arguments and not arguments[0].startswith("-"):
            name, program, arguments = program.resolve_command(context, arguments)
            context = program.make_context(name, [], parent=context, resilient_parsing=True)
            context.resilient_parsing = False
        program.make_context(context.info_name, arguments, parent=context.parent)
    except typer.Exit:
        return None
    except typer.TyperException as error:
        said = error.format_message()
        return None if is_mention and said.startswith("Missing ") else said
    return None


def faults(infra: Path, root: Path) -> list[str]:
    """Commands that the program does not have, each with the file that it stands in."""
    found = [
        (command, refusal(command.words, is_mention=command.is_mention))
        for command in commands(infra)
    ]
    return [f"{command}: {said}" for command, said in found if said is not None]
