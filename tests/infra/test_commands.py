"""Every `quantfleet` command in infra/ is one that the program has, with options that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.infra.quantfleet_commands import Command, commands, refusal

pytestmark = pytest.mark.infra

# Of a command that a file has twice, the first: in code, where arguments must not be missing.
COMMANDS = {str(command): command for command in reversed(commands())}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_command_is_one_that_the_program_has(command: Command) -> None:
    assert refusal(command.words, is_mention=command.is_mention) is None


def test_the_commands_that_matter_are_found() -> None:
    found = {(command.where, command.words[0]) for command in COMMANDS.values()}
    assert {
        ("kubernetes/base/nightly.yaml", "nightly"),
        ("kubernetes/base/collect.yaml", "gc"),
        ("kubernetes/jobs/ray-job.yaml", "submit"),
        ("kubernetes/jobs/ray-cron-job.yaml", "nightly"),
        ("compose.yaml", "submit"),
        ("vms/quantfleet-nightly.service", "nightly"),
        ("vms/crontab", "nightly"),
        ("vms/crontab", "gc"),
        ("laptop/nightly.sh", "nightly"),
        ("container/Dockerfile", "--help"),
        ("README.md", "nightly"),
    } <= found


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.sh", 'exec "$bin/quantfleet" gc x --delete\n', ("gc", "x", "--delete")),
        ("a.sh", "set -a; cd x && quantfleet gc \\\n  x | tee y\n", ("gc", "x")),
        ("a.yaml", "command: [quantfleet, gc, x]\n", ("gc", "x")),
        ("a.yaml", "args: [ray, job, submit, --, quantfleet, gc, x]\n", ("gc", "x")),
        ("a.yaml", "entrypoint: >-\n  quantfleet gc x\n  --delete\n", ("gc", "x", "--delete")),
        ("a.yaml", "# run `quantfleet gc x` first\n", ("gc", "x")),
        ("a.md", "```sh\nquantfleet gc x   # why\n```\n", ("gc", "x")),
        ("a.md", "see `quantfleet gc x`\n", ("gc", "x")),
        (
            "a.md",
            "```sh\ncp -n quantfleet x\nray job submit -- quantfleet gc x\n```\n",
            ("gc", "x"),
        ),
        ("Dockerfile", 'CMD ["quantfleet", "--help"]\n', ("--help",)),
    ],
)
def test_a_command_is_found_wherever_it_stands(
    name: str, text: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    assert [command.words for command in commands(tmp_path)] == [words]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("quantise", "x"), "No such command"),
        (("gc",), "Missing argument"),
        (("gc", "x", "--delet"), "No such option"),
        (("gc", "x", "--lease-seconds", "soon"), "valid number"),
        (("gc", "x", "y"), "unexpected extra argument"),
    ],
)
def test_a_typo_is_refused(words: tuple[str, ...], said: str) -> None:
    assert said in (refusal(words) or "")
