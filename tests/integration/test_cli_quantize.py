"""What a user's mistake costs: one line on stderr, an exit code, and nothing at the output.

Most of it runs in this process, without a cluster; `test_ray_run` does the same on a real one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

import jobs.quantize
from jobs.cli.main import main
from jobs.execute import Compute
from pipeline.executor.protocol import (
    Allocation,
    ComputeSpec,
    Handle,
    NodeRoom,
)
from pipeline.model.preset import read_preset
from pipeline.plan import read_plan
from pipeline.planning.make_plan import make_plan
from pipeline.run.records import file_key
from pipeline.storage.object_store import open_store
from pipeline.storage.record import with_digest
from tests.faults.test_disk_full import small_disk
from tests.models.tiny import tiny_preset
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.presets import overflowing_preset
from tests.pipeline.tiny_runs import QuickWorker, lasting, recipe, source, text_file
from tests.s3 import S3Server


class LateExecutor(LocalExecutor):
    """Its workers are made at the first call of one, from the plan that is there then."""

    def __init__(self, num_workers: int, source_url: str, run_url: str) -> None:
        super().__init__([None] * num_workers)
        self._urls = source_url, run_url
        self._made = False

    def submit(
        self, worker: int, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Handle[Any]:
        if not self._made:
            plan = read_plan(open_store(self._urls[1]))
            super().__init__([QuickWorker(plan, *self._urls) for _ in self._workers])
            self._made = True
        return super().submit(worker, method, *args, **kwargs)


def use_this_process(monkeypatch: pytest.MonkeyPatch, *nodes: NodeRoom) -> None:
    """Plan and quantize in this process instead of on a cluster."""

    @contextlib.contextmanager
    def open_compute(
        spec: ComputeSpec, source_url: str, run_url: str, **_: Any
    ) -> Iterator[Compute]:
        allocation = Allocation(workers=2, threads=2, nodes=nodes)
        yield Compute(allocation, lambda: LateExecutor(2, source_url, run_url))

    monkeypatch.setattr(jobs.quantize, "open_compute", open_compute)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    use_this_process(monkeypatch)


class Command:
    """The command line, and what it said.

    Attributes:
        out, err: what the last call printed.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str | Path) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        self.out, self.err = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    @property
    def complaint(self) -> str:
        """The one line that a mistake costs."""
        [line] = [line for line in self.err.splitlines() if line.startswith("quantfleet: ")]
        assert self.err.splitlines()[-1] == line
        assert "Traceback" not in self.err + self.out
        return line.removeprefix("quantfleet: ")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def recipe_file(folder: Path, scheme: str = "gptq", **calibration: Any) -> Path:
    values = recipe(scheme, **calibration).to_dict()
    path = folder / f"{scheme}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def damaged_copy(folder: Path, damage: Callable[[Path], None], **options: Any) -> Path:
    """A preset of one's own, after `damage` to its folder."""
    path = folder / "preset"
    shutil.copytree(source(**options), path)
    damage(path)
    return path


def truncate(preset: Path) -> None:
    weights = preset / "model.weights.h5"
    weights.write_bytes(weights.read_bytes()[:-1000])


def flip_metadata(preset: Path) -> None:
    weights = preset / "model.weights.h5"
    data = bytearray(weights.read_bytes())
    data[data.index(b"_query_dense") + 3] ^= 1
    weights.write_bytes(bytes(data))


def flip_signature(preset: Path) -> None:
    weights = preset / "model.weights.h5"
    data = bytearray(weights.read_bytes())
    data[1] ^= 1
    weights.write_bytes(bytes(data))


def remove_weights(preset: Path) -> None:
    (preset / "model.weights.h5").unlink()


def break_json(preset: Path) -> None:
    (preset / "config.json").write_text("{")


SOURCE_DAMAGES = {
    "truncated": (truncate, "model.weights.h5"),
    "metadata flipped": (flip_metadata, "model.weights.h5"),
    "signature flipped": (flip_signature, "model.weights.h5"),
    "no weights": (remove_weights, "model.weights.h5"),
    "no json": (break_json, "config.json"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("damage", SOURCE_DAMAGES)
def test_a_damaged_source_is_named_and_nothing_is_written(
    damage: str, command: Command, tmp_path: Path
) -> None:
    spoil, named = SOURCE_DAMAGES[damage]
    preset = damaged_copy(tmp_path, spoil)
    output = tmp_path / "out"
    assert command("quantize", preset, "--recipe", "int8", "--output", output) == 2
    assert str(preset) in command.complaint
    assert named in command.complaint
    assert not output.exists()


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no preset": (["PRESET=/nowhere/llama"], ["/nowhere/llama", "config.json"]),
    "unknown recipe": (["--recipe", "gtpq-w4-g128"], ["gtpq-w4-g128", "did you mean gptq-w4-g128"]),
    "no recipe file": (["--recipe", "/nowhere/r.yaml"], ["/nowhere/r.yaml"]),
    "no texts": (["--texts", "/nowhere/t.txt"], ["/nowhere/t.txt"]),
    "binary texts": (["--texts", "BINARY"], ["binary.jsonl"]),
    "too little text": (["--num-samples", "4000"], ["num_samples"]),
    "unknown device": (["--device", "tpu"], ["--device", "tpu"]),
    "no evaluation texts": (["--evaluate-on", "/nowhere/e.txt"], ["/nowhere/e.txt"]),
    "too few windows": (["--evaluate-on", "TEXT", "--windows", "9999"], ["--windows 9999"]),
    "no output": (["--output", ""], ["URL is empty"]),
    "password in the output": (["--output", "s3://me:pw@bucket/x"], ["password"]),
    "no option's value": (["--workers", "0"], ["--workers"]),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_costs_one_line_and_nothing_is_written(
    mistake: str, command: Command, tmp_path: Path
) -> None:
    given, fragments = MISTAKES[mistake]
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(bytes(range(256)))
    preset = str(source())
    if given[0].startswith("PRESET="):
        preset = given[0].removeprefix("PRESET=")
        given = given[1:]
    replaced = {"BINARY": str(binary), "TEXT": str(text_file())}
    output = tmp_path / "out"
    defaults = ["--recipe", str(recipe_file(tmp_path)), "--output", str(output)]
    status = command("quantize", preset, *defaults, *(replaced.get(g, g) for g in given))
    assert status in (2, 3)
    for fragment in fragments:
        assert fragment in command.complaint
    assert "pw" not in command.complaint
    assert not output.exists()


@pytest.mark.usefixtures("here")
def test_an_output_in_the_preset_is_refused_and_nothing_is_written(
    command: Command, tmp_path: Path
) -> None:
    preset = damaged_copy(tmp_path, lambda folder: None)
    (tmp_path / "link").symlink_to(preset)
    before = sorted(preset.rglob("*"))
    for output in (preset / "quantized", tmp_path / "link" / "q", preset, tmp_path):
        assert command("quantize", preset, "--recipe", "int8", "--output", output) == 2
        assert f"{output}: the output" in command.complaint
        assert "beside the preset" in command.complaint
    assert sorted(preset.rglob("*")) == before
    assert sorted(tmp_path.iterdir()) == [tmp_path / "link", preset]


@pytest.mark.usefixtures("here")
def test_a_wrong_column_is_refused_with_those_that_are_there(
    command: Command, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"body": "some text"}) for _ in range(3)))
    output = tmp_path / "out"
    given = ["--recipe", recipe_file(tmp_path, texts=[str(texts)]), "--output", output]
    assert command("quantize", source(), *given) == 2
    assert "body" in command.complaint
    assert "text_field" in command.complaint
    assert not output.exists()


@pytest.mark.usefixtures("here")
def test_groups_larger_than_a_layer_are_refused_with_the_remedy(
    command: Command, tmp_path: Path
) -> None:
    texts = ["--texts", text_file(), "--num-samples", 8, "--sequence-length", 64]
    given = ["--recipe", "gptq-w4-g128", *texts, "--output", tmp_path / "out"]
    assert command("quantize", source(), *given) == 2
    assert "group_size of at most 64" in command.complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("here")
def test_too_little_memory_is_refused_with_the_numbers(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = (
        NodeRoom(workers=1, memory_bytes=1 << 40),
        NodeRoom(workers=2, memory_bytes=1 << 30),
    )
    use_this_process(monkeypatch, large, small)
    given = ["--recipe", recipe_file(tmp_path), "--output", tmp_path / "out"]
    assert command("quantize", source(), *given) == 3
    assert "too little memory" in command.complaint
    assert "1.0 GiB" in command.complaint
    assert "--workers 1" in command.complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("here")
def test_a_missing_bucket_is_named(
    command: Command, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    given = ["--recipe", "int8", "--output", "s3://no-such-bucket/out"]
    assert command("quantize", source(), *given) == 3
    assert "s3://no-such-bucket/out" in command.complaint
    assert "bucket" in command.complaint
    assert command(
        "quantize", "s3://no-such-bucket/in", "--recipe", "int8", "--output", tmp_path / "o"
    ) in (2, 3)
    assert "s3://no-such-bucket/in" in command.complaint


@pytest.mark.slow  # a store that does not answer is given two minutes
@pytest.mark.usefixtures("here")
def test_a_store_that_cannot_be_reached_is_named(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3Server
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    given = ["--recipe", "int8", "--output", "s3://bucket/out"]
    assert command("quantize", source(), *given) == 3
    assert "cannot be reached" in command.complaint


@pytest.mark.usefixtures("here")
def test_an_output_that_is_a_file_is_refused(command: Command, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text("mine")
    assert command("quantize", source(), "--recipe", "int8", "--output", output) in (2, 3)
    assert str(output) in command.complaint
    assert output.read_text() == "mine"


@pytest.mark.usefixtures("here")
def test_a_full_temporary_folder_is_named(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = source()
    given = ["--recipe", recipe_file(tmp_path), "--output", tmp_path / "out", "--dry-run"]
    with small_disk(tmp_path / "disk", 1 << 12) as folder:
        (folder / "mine").write_bytes(bytes(1 << 12))
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        assert command("quantize", preset, *given) == 3
    assert str(folder) in command.complaint
    assert "No space left on device; free some space, or set TMPDIR" in command.complaint


@pytest.mark.usefixtures("here")
def test_nan_in_the_source_is_refused_by_name(command: Command, tmp_path: Path) -> None:
    def spoil(preset: Path) -> None:
        with h5py.File(preset / "model.weights.h5", "r+") as file:
            found: list[str] = []
            file.visit(
                lambda name: found.append(name) if name.endswith("_query_dense/vars/0") else None
            )
            file[sorted(found)[1]][0, 0, 0] = np.nan

    preset = damaged_copy(tmp_path, spoil)
    output = tmp_path / "out"
    assert command("quantize", preset, "--recipe", "int8", "--output", output) == 2
    assert "decoder_1/_self_attention_layer/_query_dense" in command.complaint
    assert not (output / "manifest.json").exists()
    assert not (output / file_key(2)).exists()


@pytest.mark.usefixtures("here")
def test_another_plan_in_the_output_is_refused_and_nothing_changes(
    command: Command, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert command("quantize", source(), "--recipe", "int8", "--output", output) == 0
    store = open_store(str(output))
    before = lasting(store)
    assert command("quantize", source(), "--recipe", "int4", "--output", output) == 2
    assert "plan of another run (other recipe" in command.complaint
    other = tiny_preset("Llama3", tmp_path / "other", num_blocks=3, seed=1)
    assert command("quantize", other, "--recipe", "int8", "--output", output) == 2
    assert "other source_digest" in command.complaint
    again = ("--source", other, "--evaluate-on", text_file())
    assert command("resume", output) == 0
    assert command("evaluate", output, *again) == 2
    assert "changed since the run was planned" in command.complaint
    assert lasting(store) == before


@pytest.mark.usefixtures("here")
def test_the_same_command_on_a_finished_run_does_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    given = ("quantize", source(), "--recipe", "int8", "--output", output, "--json")
    assert command(*given) == 0
    first = json.loads(command.out)
    before = lasting(open_store(str(output)))

    def no_work(*args: Any) -> None:
        raise AssertionError("a worker was asked")

    monkeypatch.setattr(LocalExecutor, "submit", no_work)
    for again in (given, ("resume", output, "--json")):
        assert command(*again) == 0
        assert "finished before" in command.err
        assert json.loads(command.out)["manifest_sha256"] == first["manifest_sha256"]
    assert command(*given, "--dry-run") == 0
    assert "finished before" in command.err, "else its cost is taken for one still to be paid"
    assert lasting(open_store(str(output))) == before


@pytest.mark.usefixtures("here")
def test_resume_refuses_where_it_would_round_otherwise(command: Command, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert command("quantize", source(), "--recipe", "int8", "--output", output) == 0
    plan = json.loads((output / "plan.json").read_bytes())["content"]
    assert plan["machine"]["threads"] == "2"
    (output / "manifest.json").unlink()
    plan_file = output / "plan.json"
    plan_file.write_bytes(with_digest(plan | {"versions": plan["versions"] | {"jax": "0.0.1"}}))
    assert command("resume", output) == 2
    assert "jax" in command.complaint
    assert "0.0.1" in command.complaint


@pytest.mark.usefixtures("here")
def test_resume_and_evaluate_say_when_there_is_no_run(command: Command, tmp_path: Path) -> None:
    assert command("resume", tmp_path / "nothing") == 2
    assert "no run was started" in command.complaint
    assert command("evaluate", tmp_path / "nothing", "--evaluate-on", text_file()) == 2
    assert "no run was started" in command.complaint
    assert command("evaluate", tmp_path / "nothing") == 2
    assert "--evaluate-on" in command.complaint
    assert command("verify", tmp_path / "nothing") == 4
    assert "neither manifest.json nor plan.json is there" in command.complaint
    assert not (tmp_path / "nothing").exists()


@pytest.mark.usefixtures("here")
def test_a_dry_run_prints_the_plan_and_writes_nothing(command: Command, tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = ["--recipe", recipe_file(tmp_path), "--output", output, "--dry-run"]
    assert command("quantize", source(), *given, "--json") == 0
    printed = json.loads(command.out)
    assert len(printed["plan"]["parts"]) == 4
    assert printed["estimate"]["worker_bytes"] > 0
    assert printed["cost"]["machine"]["name"] == "this machine"
    assert printed["cost"]["seconds"] > 0
    assert command("quantize", source(), *given, "--on", "8xH100") == 0
    assert "gptq/4/32" in command.err
    assert "cost on 8 × H100: a model, not a measurement" in command.err
    assert "GPU-hours" in command.err
    assert not output.exists()


@pytest.mark.usefixtures("here")
def test_what_stays_in_float_is_listed_with_the_reason(command: Command, tmp_path: Path) -> None:
    given = ["--recipe", recipe_file(tmp_path), "--output", tmp_path / "out", "--dry-run"]
    assert command("quantize", source("Bert"), *given) == 0
    notes = [line for line in command.err.splitlines() if line.startswith("left in float: ")]
    assert any("pooled_dense" in line for line in notes), command.err


@pytest.mark.usefixtures("here")
def test_quantize_evaluates_and_says_how_to_load(command: Command, tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = ["--recipe", "int8", "--output", output, "--evaluate-on", text_file(), "--windows", 2]
    assert command("quantize", source(), *given, "--json") == 0
    fidelity = json.loads(command.out)["fidelity"]
    assert fidelity["num_windows"] == 2
    assert 0 <= fidelity["divergence"] < 0.1
    assert json.loads((output / "eval.json").read_text())["evaluations"][0]["figures"] == fidelity
    assert "| perplexity |" in (output / "README.md").read_text()
    questions = tmp_path / "common.jsonl"
    questions.write_text('{"question": "The dog is", "choices": ["lazy", "a box"], "answer": 3}')
    assert command("evaluate", output, "--tasks", questions) == 2
    assert f"{questions}:1: 'answer' is '3', but there are 2 choices" in command.complaint
    assert "worker(s)" not in command.err, "before any worker is asked for"
    questions.write_text('{"question": "The dog is", "choices": ["lazy", "a box"], "answer": 0}')
    set_of_texts = ["--evaluate-on", f"dogs={text_file()}", "--windows", 1]
    assert command("evaluate", output, "--tasks", questions, *set_of_texts) == 0
    assert "task common    acc " in command.err
    assert "quality, dogs  perplexity " in command.err
    assert "| dogs: perplexity |" in (output / "README.md").read_text()
    assert len(json.loads((output / "eval.json").read_text())["evaluations"]) == 2
    assert f"Llama3CausalLM.from_preset('{output}/artifact')" in command.err
    assert command("verify", output, "--no-stock") == 0


@pytest.mark.exhaustive
@pytest.mark.usefixtures("here")
def test_a_result_whose_answers_are_not_finite_is_named_and_fails(
    command: Command, tmp_path: Path
) -> None:
    preset, output = overflowing_preset(tmp_path / "in"), tmp_path / "out"
    given = ["--evaluate-on", text_file(), "--windows", 2, "--json"]
    assert command("quantize", preset, "--recipe", "int4", "--output", output, *given) == 5
    assert "not finite in 2 of 2 windows" in command.complaint
    assert "block 0 (transformer_layer_0)" in command.complaint
    assert "--dtype" in command.complaint
    fidelity = json.loads(command.out)["fidelity"]
    assert fidelity["result_perplexity"] is None
    assert fidelity["not_finite"] in command.complaint
    assert command("evaluate", output, *given) == 5


def children_of(process_id: int) -> set[int]:
    text = Path(f"/proc/{process_id}/task/{process_id}/children").read_text()
    return {int(number) for number in text.split()}


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_while_planning_ends_the_command_and_its_child(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    given = ["--recipe", str(recipe_file(tmp_path)), "--output", str(tmp_path / "out")]
    # A process started in a shell's background inherits that Ctrl-C is ignored.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from jobs.cli.main import main; main()"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", program, "quantize", str(source()), *given, "--dry-run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (children := children_of(command.pid)):
        assert command.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)  # it imports JAX for longer
    command.send_signal(number)
    output, _ = command.communicate(timeout=20)
    assert command.returncode == status, output
    assert "Traceback" not in output
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_dry_run_on_this_machine_starts_no_ray(tmp_path: Path) -> None:
    given = ["--recipe", str(recipe_file(tmp_path)), "--output", str(tmp_path / "out")]
    program = (
        "import sys; from jobs.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'ray', 'jax', 'keras'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "quantize", str(source()), *given, "--dry-run", "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    printed = json.loads(done.stdout)
    assert printed["plan_digest"] is None
    # A worker of as many threads plans the same, and reads the weights too.
    threads = printed["resources"]["threads"]
    plan = make_plan(read_preset(str(source())), recipe("gptq"), threads=threads).plan
    content = json.loads(json.dumps(plan.content()))
    for part in content["parts"]:
        part["source_sha256"] = ""
    assert printed["plan"] == content
