"""Compile every program of a block of Llama's 8B shape for an H100, on a machine without one.

    make check-cuda

Prints for each its temporary memory, kernels and calls of libraries. Fails where a product is not
cuBLAS', where the solver has too many programs or kernels, where a block in bfloat16 keeps
attention scores, and where a block takes more memory for a window than its plan foresees. No speed
is measured (see `topology`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

_VOCABULARY = 128256
_GIB = 1 << 30
_KERNELS = "fusion|custom-call|copy|sort|reduce|cholesky"
# Of cuBLASLt, which plans count with what compiled programs keep.
_WORKSPACE_BYTES = 32 << 20


@dataclass(frozen=True)
class Compiled:
    """One program.

    Attributes:
        calls: how often it calls each library's function.
        triton: how many products it has Triton do.
        kernels: fusions and calls in it; what a loop repeats is counted once.
        loops: how many loops it has, each step of which the host starts.
        scores_bytes: of its largest array of float32 with two axes of a window's length and a
            third, as attention's scores have it.
    """

    name: str
    temporary_bytes: int
    calls: Counter[str]
    triton: int
    kernels: int
    seconds: float
    loops: int
    scores_bytes: int = 0

    @classmethod
    def of(cls, name: str, lowered: Any, length: int = 0) -> Compiled:
        start = time.monotonic()
        compiled = lowered.compile()
        text = compiled.as_text()
        return cls(
            name,
            int(compiled.memory_analysis().temp_size_in_bytes),
            Counter(re.findall(r'custom_call_target="([^"]+)"', text)),
            len(re.findall(r"__triton_gemm|__triton_nested_gemm_fusion", text)),
            len(re.findall(rf"= (?:\([^()]*\)|\S+) (?:{_KERNELS})\(", text)),
            time.monotonic() - start,
            len(re.findall(r" while\(", text)),
            _scores_bytes(text, length) if length else 0,
        )

    def row(self) -> str:
        calls = ", ".join(f"{count} × {name}" for name, count in sorted(self.calls.items()))
        return (
            f"{self.name:56} {self.temporary_bytes / _GIB:7.2f} GiB {self.kernels:5} kernels  "
            f"{calls or '–'}{f', {self.triton} × Triton' if self.triton else ''}"
            f"{f', {self.loops} loops' if self.loops else ''}"
            f"{f', {self.scores_bytes / _GIB:.2f} GiB of scores' if self.scores_bytes else ''}"
        )


def _scores_bytes(text: str, length: int) -> int:
    """Of a compiled program's text; what lies within one kernel is never in memory."""
    fused = set(re.findall(r"\bcalls=%([\w.-]+)", text))
    largest = 0
    for computation in re.split(r"\n\s*\n", text):
        header = re.match(r"\s*(?:ENTRY )?%([\w.-]+)", computation)
        if header is None or header[1] in fused:
            continue
        for shape in re.findall(r"\bf32\[([\d,]+)\]", computation):
            axes = list(map(int, shape.split(",")))
            if axes.count(length) >= 2 and math.prod(axes) > length**2:
                largest = max(largest, 4 * math.prod(axes))
    return largest


@dataclass(frozen=True)
class CompiledBlock:
    """A block's stages, for one window.

    Attributes:
        foreseen_bytes: what a plan foresees for a micro-batch in a layer.
    """

    dtype: str
    length: int
    stages: Sequence[Compiled]
    memory: Any
    foreseen_bytes: int

    def problems(self) -> list[str]:
        found = []
        if self.dtype == "bfloat16":
            if self.memory.attention != "cudnn":
                found.append("attention is not cuDNN's")
            found += [f"{x.name}: keeps scores" for x in self.stages if x.scores_bytes]
        needed = max(x.temporary_bytes for x in self.stages)
        if needed > self.foreseen_bytes + _WORKSPACE_BYTES:
            found.append(f"takes {needed / _GIB:.2f} GiB of {self.foreseen_bytes / _GIB:.2f}")
        return [f"{self.dtype}, {self.length} tokens: {problem}" for problem in found]


def compile_block(where: Any, length: int, dtype: str) -> CompiledBlock:
    """The stages of a block, on one window of so many tokens."""
    import jax

    from pipeline.model.blocks import find_blocks
    from pipeline.model.call_shapes import taken_by
    from pipeline.model.inputs import input_layout
    from pipeline.model.preset import read_preset
    from pipeline.model.skeleton import build_skeleton
    from pipeline.planning.estimates import micro_batch_bytes
    from pipeline.planning.input_groups import embedded_shapes
    from pipeline.worker.block_program import BlockProgram
    from tests.cuda.llama import LLAMA_8B
    from tests.cuda.topology import placed, tracing_for_h100

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B.config(_VOCABULARY)))
        skeleton = build_skeleton(read_preset(folder), dtype)
    graph = find_blocks(skeleton)
    values = embedded_shapes(graph, input_layout(skeleton), _windows(length), 1)
    block = graph.blocks[0]
    taken = taken_by(block.calls[0], dict(values))
    with tracing_for_h100():
        program = BlockProgram(block, {target.name: "hessian" for target in block.targets}, taken)
    weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in block.layer.weights]
    found, live = [], tuple(taken)
    names = [" and ".join(x.rpartition("/")[2] for x in g.targets) for g in program.groups]
    for stage, name in zip(program._stages, [*names, "the block's output"], strict=True):
        given = placed([weights[i] for i in stage.reads] + list(live), where)
        lowered = stage.run.lower(*given)
        found.append(Compiled.of(f"{dtype}, {length}: up to {name}", lowered, length))
        known = [*live, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in lowered.out_info)]
        live = tuple(known[i] for i in stage.leaves)
    widest = max(group.in_features for group in program.groups)
    return CompiledBlock(
        dtype,
        length,
        found,
        program.memory,
        micro_batch_bytes(length, widest, program.memory.largest_array_bytes),
    )


def _windows(length: int) -> Any:
    import numpy as np

    from pipeline.calibration.windows import TokenWindows

    return TokenWindows(
        tokens=np.zeros((1, length), np.int32),
        lengths=np.full(1, length, np.int32),
        fingerprint="",
        num_documents=1,
    )


def compile_statistics(where: Any, in_features: int) -> list[Compiled]:
    """A Gram's update by 2,048 rows, its merge with another, and its end."""
    import jax
    import jax.numpy as jnp

    from pipeline.worker import statistics
    from tests.cuda.topology import placed

    edges = statistics._bands(in_features)
    bands = tuple(jax.ShapeDtypeStruct((b - a, in_features - a), jnp.float32) for a, b in edges)
    rows = jax.ShapeDtypeStruct((1, 2048, in_features), jnp.float32)
    bands, rows = placed((bands, rows), where)
    add = statistics._add.lower(bands, rows, None, "hessian", (-1,))
    merge = statistics._merge_in_place.lower(bands, bands, "hessian")
    whole = statistics._whole.lower(bands)
    return [
        Compiled.of(f"Gram of {in_features}, 2,048 rows more", add),
        Compiled.of(f"Gram of {in_features}, merged", merge),
        Compiled.of(f"Gram of {in_features}, whole", whole),
    ]


def compile_evaluation(where: Any, length: int) -> Compiled:
    """The comparison of source and artifact on a window; attention is as in `compile_block`."""
    import jax
    import jax.numpy as jnp

    from pipeline.worker.evaluate import _logit_sums
    from tests.cuda.topology import placed

    logits = jax.ShapeDtypeStruct((1, length, _VOCABULARY), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    keep = jax.ShapeDtypeStruct((1, length - 1), jnp.bool_)
    lowered = _logit_sums.lower(*placed((logits, logits, tokens, keep), where))
    return Compiled.of(f"evaluation of {length} tokens", lowered)


class _Jit:
    """Stands for `jax.jit` in the quantizer: what it compiles ahead is compiled for the device."""

    def __init__(self, jit: Any, where: Any, found: dict[str, Compiled]) -> None:
        self.jit, self.where, self.found = jit, where, found

    def __call__(self, function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda later: self(later, **options)
        compiled, outer = self.jit(function, **options), self

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled(*args, **kwargs)

        def trace(*args: Any, **kwargs: Any) -> Any:
            import jax

            from tests.cuda.topology import placed

            # What is computed ahead, such as zeros, lies on this machine's CPU.
            args, kwargs = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x,
                (args, kwargs),
            )
            traced = compiled.trace(*placed(args, outer.where), **placed(kwargs, outer.where))
            outer.compile(function.__name__, traced)
            return _Traced(traced.out_info)

        call.trace = trace  # type: ignore[attr-defined]
        return call

    def compile(self, name: str, traced: Any) -> None:
        lowered = traced.lower()
        text = lowered.as_text()
        if text not in self.found:
            self.found[text] = Compiled.of(f"solver: {name}", lowered)


@dataclass(frozen=True)
class _Traced:
    out_info: Any

    def lower(self) -> _Traced:
        return self

    def compile(self) -> None:
        """It is done."""


def compile_solver(where: Any, shapes: Sequence[tuple[int, int]]) -> list[Compiled]:
    """What solving weights of these shapes runs, and what AWQ runs for the first."""
    import jax

    assert not any(name.startswith("quantizer") for name in sys.modules)
    found: dict[str, Compiled] = {}
    original, backend = jax.jit, jax.default_backend
    jax.jit = _Jit(original, where, found)
    jax.default_backend = lambda: "gpu"
    try:
        solve = importlib.import_module("quantizer.gptq.solve")
        schemes = importlib.import_module("quantizer.schemes")
        scheme = schemes.GPTQScheme(
            weight_bits=4,
            group_size=128,
            activation_order=True,
            scale_search=True,
            refinement_sweeps=2,
        )
        for out_features, in_features in shapes:
            solve.compile_solver(out_features, in_features, scheme, scale_dtype="bfloat16")
        _compile_awq(*shapes[0])
    finally:
        jax.jit, jax.default_backend = original, backend
    return list(found.values())


def _compile_awq(out_features: int, in_features: int) -> None:
    """One choice of input scales, with all that may be searched."""
    import jax
    import jax.numpy as jnp

    awq = importlib.import_module("quantizer.awq")
    weight, vector, gram = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((in_features, out_features), (in_features,), (in_features, in_features))
    )
    awq._attempt(
        weight,
        vector,
        vector,
        vector,
        gram,
        group_size=128,
        search=True,
        scale_dtype="bfloat16",
        together=awq._all_groups_together(),
    )


# What a panel takes in the column loop and in refinement, by function.
PANEL_PROGRAMS = (
    ("_unsolved_panel", "_solve_panel", "_with_panel"),
    ("_unrefined_panel", "_refine_panel", "_with_refined"),
)
_MOST_SOLVER_PROGRAMS = 60


def solver_problems(found: Sequence[Compiled], widths: int) -> list[str]:
    """What the programs of the solver have that they should not, for so many in_features."""
    from quantizer.gptq.factor import PANEL, TILE

    problems = []
    if len(found) > _MOST_SOLVER_PROGRAMS:
        problems.append(f"the solver has {len(found)} programs, over {_MOST_SOLVER_PROGRAMS}")
    calls = sum((one.calls for one in found), Counter[str]())
    if calls["cusolver_potrf_ffi"] != widths:
        problems.append(f"{calls['cusolver_potrf_ffi']} calls of cuSOLVER factor {widths} widths")
    # Of a search's coarse and fine steps; a loop over groups would be one more.
    for one in found:
        if one.name in ("solver: find_grid", "solver: _attempt") and one.loops > 2:
            problems.append(f"{one.name}: {one.loops} loops")
    for names in PANEL_PROGRAMS:
        kernels = 0
        for name in names:
            alike = [one for one in found if one.name == f"solver: {name}"]
            kernels += max(one.kernels for one in alike)
            problems += [f"{one.name}: has loops" for one in alike if one.loops]
        print(f"{' + '.join(names)}: {kernels * TILE / PANEL:.2f} kernels a tile")
        if kernels > PANEL // TILE:
            problems.append(
                f"{names[1]}: {kernels} kernels for the {PANEL // TILE} tiles of a panel"
            )
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 8192], help="of a window")
    parser.add_argument("--no-solver", action="store_true", help="which takes two minutes")
    arguments = parser.parse_args()
    from pipeline.executor.worker_environment import with_gpu_flags

    # Before JAX is imported; as workers on GPUs have it.
    os.environ |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    os.environ["XLA_FLAGS"] = with_gpu_flags(os.environ.get("XLA_FLAGS", ""))
    from tests.cuda.topology import h100

    where = h100()
    [device] = where.device_set
    print(f"{device.device_kind}, {os.environ['XLA_FLAGS']}")
    found: list[Compiled] = []
    problems: list[str] = []

    def show(compiled: Sequence[Compiled]) -> None:
        found.extend(compiled)
        for one in compiled:
            print(one.row(), flush=True)

    if not arguments.no_solver:
        show(compile_solver(where, [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]))
        print(f"{len(found)} programs of the solver")
        problems += solver_problems(found, widths=2)
    from tests.cuda.decoding import compile_decoding  # it imports the quantizer

    for dtype in ("bfloat16", "float32"):
        for length in arguments.tokens:
            block = compile_block(where, length, dtype)
            show(block.stages)
            problems += block.problems()
    for length in arguments.tokens:
        show([compared := compile_evaluation(where, length)])
        if compared.temporary_bytes > length * _VOCABULARY:
            problems.append(f"{compared.name}: copies logits")
    for in_features in (4096, 14336):
        show(compile_statistics(where, in_features))
    for decoding in compile_decoding(where, 4096, 14336):
        show([decoding.program])
        problems += decoding.problems()
    problems += [f"{one.name}: products by Triton" for one in found if one.triton]
    print(*problems, f"{len(found)} programs, {len(problems)} problems", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
