"""Functions that a driver has run by a process with JAX and Keras (see `FunctionRunner`).

The driver imports this module, so JAX, Keras and all that needs them are imported where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pipeline.errors import CalibrationTextError, PipelineError
from pipeline.evaluation.choices import TaskRows, task_rows
from pipeline.evaluation.tasks import read_tasks
from pipeline.executor.protocol import DeviceMemory, ExecutorError, FunctionRunner
from pipeline.export.description import ExportDescription, MadeExport
from pipeline.export.manifest import ExportRequest
from pipeline.export.settings import ExportSettings
from pipeline.plain.plan import PlainPlan
from pipeline.plan import Plan, read_plan
from pipeline.planning.machines import Machine
from pipeline.recipe.recipe import Calibration, Recipe
from pipeline.run.records import Manifest
from pipeline.run.worker_api import WorkerApi
from pipeline.storage.object_store import open_store
from pipeline.weights.digests import SizedPath, VariableDigest, part_digests, shares

Variables: TypeAlias = tuple[tuple[SizedPath, ...], ...]
"""Of each part, the paths of its stored variables, and their bytes."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What of a plan can be found out without planning again; see `Plan`."""

    source_files_sha256: str
    machine: dict[str, str]
    versions: dict[str, str]


def start_worker(source_url: str, run_url: str) -> Callable[..., WorkerApi]:
    """Import what takes long; returns a function that opens the worker, once the run is claimed.

    It takes the URL of another run on the same source that the worker is to be of, if any.

    Raises:
        ExecutorError: Keras runs on another backend, or not on the GPU that the process is given.
    """
    import keras

    from pipeline.compilation import watch_compilation
    from pipeline.machine import check_device
    from pipeline.worker.worker import Worker

    if keras.backend.backend() != "jax":
        raise ExecutorError(f"a worker started with Keras on {keras.backend.backend()}, not JAX")
    check_device()
    watch_compilation()
    # The plan comes from storage: it is too large for an argument that restarts must find again.
    return lambda url=run_url: Worker(read_plan(open_store(url)), source_url, url)


def plan_run(source_url: str, recipe: Recipe, threads: int) -> tuple[Plan, bytes | None]:
    """The plan, and the token windows that it names, serialized.

    Raises:
        PipelineError: a source, recipe or calibration that cannot be carried out.
    """
    plan, windows, _ = _plan(source_url, recipe, threads, read_weights=True)
    return plan, windows


def plan_by_metadata(
    source_url: str, recipe: Recipe, threads: int
) -> tuple[Plan, bytes | None, Variables]:
    """The same without the weights' digests (see `Plan.is_complete`), and what there is to read.

    Raises:
        PipelineError: as `plan_run`.
    """
    return _plan(source_url, recipe, threads, read_weights=False)


def plan_for_costs(source_url: str, recipe: Recipe, threads: int) -> Plan:
    """A plan whose work is that of the run, made without reading weights or texts.

    Raises:
        PipelineError: a source or recipe that cannot be carried out.
    """
    from pipeline.model.preset import read_preset
    from pipeline.planning.make_plan import make_plan

    preset = read_preset(source_url)
    return make_plan(preset, recipe, threads=threads, read_weights=False, read_texts=False).plan


def _plan(
    source_url: str, recipe: Recipe, threads: int, *, read_weights: bool
) -> tuple[Plan, bytes | None, Variables]:
    from pipeline.model.preset import read_preset
    from pipeline.planning.make_plan import make_plan

    preset = read_preset(source_url)
    found = make_plan(preset, recipe, threads=threads, read_weights=read_weights)
    windows = None if found.windows is None else found.windows.to_bytes()
    return found.plan, windows, found.variables


def plan_others(
    source_url: str,
    recipes: Sequence[Recipe],
    threads: int,
    like: Plan,
    windows: bytes | None,
) -> tuple[Plan, ...]:
    """Plans of recipes that differ in nothing but their schemes from one that is planned.

    Neither weights nor texts are read again.

    Args:
        like: the one that is planned, without its weights' digests in a dry run.
        windows: that it names, serialized.

    Raises:
        PipelineError: as `plan_run`.
    """
    from pipeline.calibration.windows import TokenWindows
    from pipeline.model.preset import read_preset
    from pipeline.planning.make_plan import make_plan

    preset = read_preset(source_url)
    given = None if windows is None else TokenWindows.from_bytes(windows)
    plans = (
        make_plan(preset, recipe, threads=threads, read_weights=False, given=given).plan
        for recipe in recipes
    )
    digests = [part.source_sha256 for part in like.parts]
    return tuple(plan.of_source(digests) for plan in plans)


def read_share(
    source_url: str, dtype: str | None, share: Sequence[SizedPath], threads: int
) -> dict[str, VariableDigest]:
    """The digests of some of a source's variables, in the dtype that the recipe asks for.

    Raises:
        SourceError: values that cannot be read, or are not finite.
    """
    from pipeline.model.preset import read_preset
    from pipeline.weights.digests import read_in_threads
    from pipeline.weights.source import open_source

    source = open_source(read_preset(source_url).in_dtype(dtype))
    source.variables()  # before threads share it
    return read_in_threads(source, share, threads).result()


def plan_on(
    runner: FunctionRunner, source_url: str, recipe: Recipe, threads: int
) -> tuple[Plan, bytes | None]:
    """`plan_run`, with the weights read by all processes of a runner.

    One process cuts the texts while it reads. Where there are several, one plans by metadata
    first, so that what cannot be done is refused before any weight is read.
    """
    if runner.num_processes == 1:
        return runner.run(plan_run, source_url, recipe, threads)
    plan, windows, variables = runner.run(plan_by_metadata, source_url, recipe, threads)
    every = [variable for of_part in variables for variable in of_part]
    read = runner.run_each(
        read_share,
        [(source_url, recipe.dtype, x, threads) for x in shares(every, runner.num_processes)],
    )
    found = {path: digest for share in read for path, digest in share.items()}
    return plan.of_source(part_digests(variables, found)), windows


def identity(source_url: str, threads: int) -> Identity:
    """What a plan made now would say of source, machine and versions.

    Weights are not read: each part's are checked against the plan when they are.

    Raises:
        PipelineError: the source cannot be read.
    """
    from pipeline.machine import machine, versions
    from pipeline.model.preset import read_preset
    from pipeline.weights.source import open_source

    return Identity(
        source_files_sha256=open_source(read_preset(source_url)).files_digest(),
        machine=machine(threads),
        versions=versions(),
    )


def found_device_memory() -> DeviceMemory:
    """What a worker may use of its device."""
    from pipeline.worker.device_memory import device_memory

    return device_memory()


def evaluation_windows(
    source_url: str,
    text_sets: Mapping[str, tuple[str, ...]],
    num_windows: int,
    length: int | None,
    chat: bool | None,
    inputs: dict[str, str],
) -> dict[str, bytes]:
    """Token windows of each set of texts to judge a result by, serialized.

    Args:
        text_sets: by name; "" for those without one.
        num_windows: of each.
        length: of a window in tokens; None for 512, or what the model takes if that is less.
        chat: how conversations are read, as `Calibration.chat`.
        inputs: arrays for what texts do not determine, as `Calibration.inputs`.

    Raises:
        PipelineError: texts that are missing, unreadable or too few.
    """
    from pipeline.calibration.windows import EVALUATION_WINDOWS
    from pipeline.model.preset import read_preset
    from pipeline.model.skeleton import build_skeleton
    from pipeline.planning.token_windows import most_tokens, token_windows

    preset = read_preset(source_url)
    skeleton = build_skeleton(preset)
    length = length or min(512, most_tokens(skeleton) or 512)
    found = {}
    for name, texts in text_sets.items():
        calibration = Calibration(
            texts=texts,
            inputs=inputs,
            chat=chat,
            num_samples=num_windows,
            sequence_length=length,
            sampling="sequential",
        )
        try:
            windows = token_windows(preset, skeleton, calibration, EVALUATION_WINDOWS)
            found[name] = windows.to_bytes()
        except CalibrationTextError as error:
            raise CalibrationTextError(f"{name}: {error}" if name else str(error)) from None
    return found


def token_texts(source_url: str, texts: Sequence[Sequence[int]]) -> list[list[str]]:
    """The text of each token of some texts, by the source's tokenizer."""
    from pipeline.model.preset import read_preset
    from pipeline.model.tokenizer import preset_tokenizer

    tokenizer = preset_tokenizer(read_preset(source_url))
    return [tokenizer.pieces(tokens) for tokens in texts]


def question_rows(source_url: str, tasks: tuple[str, ...]) -> tuple[TaskRows, ...]:
    """Files of questions, as the tokens that a model reads.

    Raises:
        PipelineError: files that are missing or hold no questions, or a model that cannot answer.
    """
    from pipeline.model.preset import read_preset
    from pipeline.model.skeleton import build_skeleton
    from pipeline.planning.token_windows import question_tokens

    preset = read_preset(source_url)
    tokens = question_tokens(preset, build_skeleton(preset))
    return tuple(task_rows(task, tokens) for task in read_tasks(tasks))


def plan_plain(source_url: str, recipe: Recipe, threads: int) -> PlainPlan:
    """Read and check everything that a run on a `.keras` file needs, and choose the schemes.

    Raises:
        PipelineError, QuantizationError: a file, recipe or calibration that cannot be used.
    """
    from pipeline.plain.run import make_plan

    return make_plan(source_url, recipe, threads)


def quantize_plain(plan: PlainPlan, output_url: str) -> Manifest:
    """Carry out a plan on a `.keras` file, and commit its result: the model, then the manifest.

    Raises:
        PipelineError, QuantizationError: the source changed, a layer cannot be calibrated, or
            the output holds something else.
    """
    from pipeline.plain.run import carry_out

    return carry_out(plan, open_store(output_url))


def preview_exports(
    source_url: str, recipe: Recipe, exports: tuple[ExportSettings, ...]
) -> tuple[ExportDescription, ...]:
    """What exports of a run would be, before it is planned; no weights are read.

    Raises:
        PipelineError: one of them is impossible, or nothing can be planned.
    """
    from pipeline.model.preset import read_preset
    from pipeline.planning.export_preview import preview_export

    preset = read_preset(source_url)
    return tuple(preview_export(preset, recipe, settings) for settings in exports)


def check_planned_exports(source_url: str, plan: Plan, exports: tuple[ExportSettings, ...]) -> None:
    """Check exports of a planned run; no weights are read.

    Raises:
        PipelineError: one of them is impossible.
    """
    from pipeline.model.preset import read_preset
    from pipeline.planning.export_preview import check_planned_export

    preset = read_preset(source_url)
    for settings in exports:
        check_planned_export(preset, plan, settings)


def servability(source_url: str, recipe: Recipe) -> ExportDescription | str:
    """What the default export of a run would be; or, in words, why there can be none."""
    try:
        return preview_exports(source_url, recipe, (ExportSettings(),))[0]
    except PipelineError as error:
        return str(error)


def request_of_export(run_url: str, settings: ExportSettings) -> ExportRequest:
    """Everything that decides the bytes of a finished run's export.

    Raises:
        PipelineError: it is not finished, or cannot be exported so.
    """
    from pipeline.export.exporting import request_of

    return request_of(open_store(run_url), settings)


def export_result(run_url: str, settings: ExportSettings, to_url: str) -> MadeExport:
    """Export a finished run; see `pipeline.export.exporting.export_run`.

    Raises:
        PipelineError: it is not finished, or cannot be exported so.
    """
    from pipeline.export.exporting import export_run

    return export_run(open_store(run_url), settings, to_url)


def measured_machine(threads: int) -> Machine:
    """The CPUs of this process, measured in about a second (see `pipeline.planning.machines`)."""
    from pipeline.planning.measured_machine import measure_machine

    return measure_machine(threads)
