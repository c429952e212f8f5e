from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils._http import default_client_factory

from jobs.cli.main import main
from jobs.push import PushJob, push_run
from jobs.release.cards import update_cards
from pipeline.run.commits import read_manifest
from pipeline.run.evaluations import find_evaluations
from pipeline.run.records import FileDigest
from pipeline.storage.object_store import ObjectStore, open_store
from tests.hub import OWNER, READ_TOKEN, TOKEN, FakeHub, Repo, fake_hub
from tests.jobs.release.runs import copied, evaluate, finished

# huggingface_hub 2.4 sends files in a way that its HTTP client calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = f"{OWNER}/tiny"
TARGET = f"hf://{NAME}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def run(tmp_path: Path) -> ObjectStore:
    found = copied(tmp_path / "run")
    evaluate(found)
    return found


def push(run: ObjectStore, what: str = "artifact", **options: Any) -> None:
    job = PushJob(run_url=run.root_url, repository_url=TARGET, what=what, **options)
    push_run(job, dry_run=False, as_json=False)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["push", *arguments])
    code: Any = stopped.value.code
    return int(code)


def check_sums(repo: Repo, branch: str = "main") -> None:
    """As `sha256sum --check SHA256SUMS` does, of every file that was pushed."""
    files = repo.contents(branch)
    sums = dict(line.split("  ")[::-1] for line in files["SHA256SUMS"].decode().splitlines())
    assert set(sums) == set(files) - {"SHA256SUMS", ".gitattributes"}
    for name, digest in sums.items():
        assert hashlib.sha256(files[name]).hexdigest() == digest


@pytest.mark.parametrize("what", ["artifact", "compressed-tensors"])
def test_a_release_becomes_visible_whole_and_in_one_commit(
    hub: FakeHub, run: ObjectStore, what: str
) -> None:
    push(run, what)
    repo = hub.repos[NAME]
    assert len(repo.branches["main"]) == 2
    check_sums(repo)
    prefix = "artifact/" if what == "artifact" else "exports/ct/"
    files = repo.contents()
    for key in run.list(prefix):
        assert files[key.removeprefix(prefix)] == run.get(key)
    card = files["README.md"].decode()
    assert f"{'hf://' if what == 'artifact' else ''}{NAME}" in card
    assert "sha256sum --check SHA256SUMS" in card
    assert json.loads(files["eval.json"])["evaluations"]
    assert str(finished().parent).encode() not in b"".join(files.values())


def test_what_is_there_is_not_sent_again(
    hub: FakeHub, run: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    push(run)
    assert len(set(hub.received)) == len(hub.received) == 3
    hub.requests.clear()
    capsys.readouterr()
    assert command(run.root_url, TARGET) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    evaluate(run, perplexity=21.0)
    push(run)
    assert len(hub.received) == 3
    assert len(hub.repos[NAME].branches["main"]) == 3
    check_sums(hub.repos[NAME])


def test_a_dry_run_sends_nothing(
    hub: FakeHub, run: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run.root_url, TARGET, "--dry-run", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["repository"], printed["delete"]) == (NAME, [])
    assert {"README.md", "eval.json", "SHA256SUMS"} < set(printed["send"])
    assert printed["files"] == len(printed["send"])
    assert hub.repos == {}
    assert {method for method, _ in hub.requests} == {"GET"}


def test_a_dry_run_without_the_hub_lists_every_file(
    run: ObjectStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    assert command(run.root_url, TARGET, "--dry-run", "--json") == 0
    told = capsys.readouterr()
    printed = json.loads(told.out)
    assert printed["files"] == len(printed["send"]) > 3
    assert "the hub cannot be reached" in told.err
    assert "every file is listed to be sent" in told.err


def test_a_file_of_the_hub_that_differs_is_replaced_and_others_stay(
    hub: FakeHub, run: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = hub.add(NAME, {"config.json": b"{}", "notes.txt": b"mine", "old.safetensors": b"?"})
    push(run)
    files = repo.contents()
    assert files["config.json"] == run.get("artifact/config.json")
    assert files["notes.txt"] == b"mine"
    assert "old.safetensors is there, and is no part of this release" in capsys.readouterr().err


def test_what_an_earlier_release_left_goes_with_the_next_commit(
    hub: FakeHub, run: ObjectStore
) -> None:
    push(run)
    repo = hub.repos[NAME]
    repo.head()["notes.txt"] = b"mine"
    push(run, "compressed-tensors")
    names = set(repo.head())
    assert "model-00001-of-00003.safetensors" in names
    assert "notes.txt" in names
    assert not any(name.endswith(".h5") or name == "task.json" for name in names)
    assert len(repo.branches["main"]) == 3
    check_sums_of = {
        name: content for name, content in repo.contents().items() if name != "notes.txt"
    }
    assert len(check_sums_of) == len(names) - 1


def test_a_list_of_a_stranger_deletes_nothing_that_changed(hub: FakeHub, run: ObjectStore) -> None:
    large = b"large"
    digest = hashlib.sha256(large).hexdigest()
    listed = (
        f"{'0' * 64}  kept.safetensors\n{'0' * 64}  ../x\nnonsense\n{'0' * 64}  .gitattributes\n"
    )
    repo = hub.add(NAME, {"kept.safetensors": digest, "SHA256SUMS": listed.encode()})
    repo.objects[digest] = large
    push(run)
    assert {"kept.safetensors", ".gitattributes"} < set(repo.head())


def test_a_branch_and_a_private_repository_are_made_if_asked(
    hub: FakeHub, run: ObjectStore
) -> None:
    push(run, private=True, revision="w4")
    repo = hub.repos[NAME]
    assert repo.private
    assert set(repo.contents()) == {".gitattributes"}
    check_sums(repo, "w4")
    card = repo.content("README.md", "w4").decode()
    assert 'snapshot_download("someone/tiny", revision="w4")' in card


def test_a_new_branch_keeps_nothing_of_the_release_that_it_begins_with(
    hub: FakeHub, run: ObjectStore
) -> None:
    push(run)
    push(run, "compressed-tensors", revision="vllm")
    repo = hub.repos[NAME]
    check_sums(repo)
    check_sums(repo, "vllm")
    assert any(name.endswith(".h5") for name in repo.head())
    assert not any(name.endswith(".h5") for name in repo.head("vllm"))


def test_a_result_that_gives_no_numbers_is_not_pushed(
    hub: FakeHub, run: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    [one] = find_evaluations(run, read_manifest(run).record_sha256, pytest.fail)
    broken = {**one.figures, "not_finite": "values that are not finite in 2 of 2 windows"}
    dataclasses.replace(one, figures=broken).save(run)
    assert command(run.root_url, TARGET) == 5
    assert "not finite in 2 of 2 windows, so it is not pushed" in capsys.readouterr().err
    assert hub.requests == []


def test_a_card_that_a_person_edited_is_pushed_as_it_is(hub: FakeHub, run: ObjectStore) -> None:
    update_cards(run)
    run.put("README.md", b"---\nlicense: mit\n---\n# Mine\n")
    push(run)
    assert hub.repos[NAME].content("README.md").endswith(b"# Mine\n")
    check_sums(hub.repos[NAME])


def test_the_card_of_the_source_makes_room(hub: FakeHub, run: ObjectStore) -> None:
    """As in the artifact of a KerasHub preset, whose small files all come along."""
    card = b"---\nlicense: mit\n---\n# The source's own card\n"
    manifest = read_manifest(run)
    for name, content in {"README.md": card, "eval.json": b"of the source"}.items():
        run.put(f"artifact/{name}", content)
        digest = FileDigest(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
        manifest.files[f"artifact/{name}"] = digest
    run.put(manifest.key, manifest.to_json())
    push(run)
    repo = hub.repos[NAME]
    check_sums(repo)
    assert repo.content("SOURCE_README.md") == card
    assert b"quantized by quantfleet" in repo.content("README.md")
    assert json.loads(repo.content("eval.json"))["version"] == 1


def test_a_run_is_pushed_from_a_store_without_a_disk(hub: FakeHub, run: ObjectStore) -> None:
    remote = open_store("memory://pushed/run")
    for key in run.list():
        remote.put(key, run.get(key))
    push(run)
    whole = hub.repos.pop(NAME).contents()
    push(remote)
    assert hub.repos[NAME].contents() == whole


def test_a_damaged_file_is_not_sent(
    hub: FakeHub, run: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "artifact/model_00001.weights.h5"
    data = bytearray(run.get(key))
    data[100] ^= 1
    run.put(key, bytes(data))
    assert command(run.root_url, TARGET) == 4
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"{key} is damaged" in line
    assert len(hub.repos[NAME].branches["main"]) == 1


class KilledError(BaseException):
    """No handler of errors sees it, as none sees SIGKILL."""


@pytest.mark.parametrize(
    ("answered", "every"),
    [
        pytest.param(True, 8, id="after some"),
        pytest.param(False, 2, id="before many", marks=pytest.mark.exhaustive),
        pytest.param(True, 1, id="after all", marks=pytest.mark.slow),
        pytest.param(False, 1, id="before all", marks=pytest.mark.slow),
    ],
)
def test_a_push_that_dies_at_any_request_ends_the_same_when_it_is_repeated(
    hub: FakeHub, run: ObjectStore, answered: bool, every: int
) -> None:
    push(run)
    whole = hub.repos[NAME].contents()
    total = len(hub.requests)
    assert total > 20
    left = 0

    def die(message: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError

    def dying_client() -> Any:
        client = default_client_factory()
        client.event_hooks = {"response" if answered else "request": [die]}
        return client

    try:
        for number in range(0, total, every):
            hub.repos.clear()
            hub.received.clear()
            left = number
            huggingface_hub.set_client_factory(dying_client)
            with pytest.raises(KilledError):
                push(run)
            seen = hub.repos[NAME].contents() if NAME in hub.repos else {}
            assert set(seen) <= {".gitattributes"} or seen == whole
            huggingface_hub.set_client_factory(default_client_factory)
            push(run)
            assert hub.repos[NAME].contents() == whole
            assert len(hub.repos[NAME].branches["main"]) == 2
            assert sorted(hub.received) == sorted(set(hub.received))
    finally:
        huggingface_hub.set_client_factory(default_client_factory)


@pytest.mark.parametrize(
    ("answers", "code", "message"),
    [
        ({"/api/models": (401, "Invalid username or password.")}, 3, "hf auth login"),
        ({"repos/create": (403, "Forbidden")}, 3, "this token may not do that"),
        ({"repos/create": (404, "no such org")}, 3, "no such owner or repository"),
        ({"/commit/": (412, "A commit has happened since")}, 3, "someone else changed"),
        ({"/commit/": (500, "<html>oops</html>")}, 3, "HTTP 500"),
        ({"validate-yaml": (502, "<html>oops</html>")}, 3, "broke off (JSONDecodeError)"),
        ({"validate-yaml": (400, "license is wrong")}, 2, "license is wrong"),
        ({"/preupload/": (413, "too large")}, 2, "HTTP 413"),
    ],
    ids=["401", "403", "404", "412", "500", "502", "metadata", "413"],
)
def test_what_the_hub_answers_costs_one_line(
    hub: FakeHub,
    run: ObjectStore,
    capsys: pytest.CaptureFixture[str],
    answers: dict[str, tuple[int, str]],
    code: int,
    message: str,
) -> None:
    hub.answer.update(answers)
    assert command(run.root_url, TARGET) == code
    captured = capsys.readouterr()
    [line] = captured.err.strip().splitlines()
    assert message in line
    assert "Signature" not in captured.err
    assert TOKEN not in captured.err + captured.out
    assert all(set(repo.contents()) == {".gitattributes"} for repo in hub.repos.values())


def test_a_token_that_may_only_read_is_refused_before_anything_is_sent(
    hub: FakeHub,
    run: ObjectStore,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    hub.add(NAME)
    assert command(run.root_url, TARGET) == 3
    assert "HTTP 403" in capsys.readouterr().err
    assert hub.received == []


def test_a_hub_out_of_reach_costs_one_line(
    run: ObjectStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://user:password@127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert command(run.root_url, TARGET) == 3
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "the hub cannot be reached, or broke off (ConnectError)" in line
    assert "password" not in line


def test_a_repository_for_everybody_is_not_private(
    hub: FakeHub, run: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(NAME)
    assert command(run.root_url, TARGET, "--private") == 2
    assert "it is there, and public" in capsys.readouterr().err
    assert hub.received == []


def test_a_file_that_the_hub_ignores_is_missed(
    hub: FakeHub, run: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(NAME, {".gitignore": b"task.json\n"})
    assert command(run.root_url, TARGET) == 3
    assert "task.json is not there as it was sent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["https://huggingface.co/a/b"], "write it as hf://owner/name"),
        (["hf://a"], "write it as hf://owner/name"),
        (["hf://a/../b"], "write it as hf://owner/name"),
        ([TARGET, "--revision", "../x"], "not the name of a branch"),
        ([TARGET, "--export", "gptq"], "no finished export as gptq below it"),
        ([TARGET, "--export", "/nowhere"], "no export.json there"),
    ],
)
def test_a_mistake_costs_one_line(
    hub: FakeHub,
    run: ObjectStore,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert command(run.root_url, *arguments) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert hub.requests == []


def test_the_command_tells_nobody_the_token(hub: FakeHub, run: ObjectStore) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jobs.cli.main", "--log-format=json"),
            *("push", run.root_url, TARGET, "--json"),
        ],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["url"] == f"{hub.endpoint}/{NAME}"
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN.encode() not in hub.seen
    assert all(TOKEN.encode() not in content for content in hub.repos[NAME].contents().values())
    for key in run.list():
        assert TOKEN.encode() not in run.get(key)
    assert "keras" not in done.stderr
