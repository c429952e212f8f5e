"""Which kernel of vLLM would multiply with an exported layer, or why none would.

Facts of vLLM 0.33. They change with its versions and differ by GPU (Machete needs Hopper), so they
are advice, and nothing is refused for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from pipeline.export.code_formats import CodeFormat, ExportFormat, code_format
from pipeline.storage.record import STRICT
from quantizer.schemes import Scheme

_MACHETE_GROUPS = (-1, 64, 128)
_MARLIN_GROUPS = (-1, 32, 64, 128)
# vLLM multiplies with these at once, as one layer.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingKernel:
    """What vLLM would do with a layer.

    Attributes:
        name: of the kernel; "" if there is none for it.
        reason: why there is none, or what has to be known.
    """

    name: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedTensor:
    """A tensor of the checkpoint that holds a matrix, for people.

    Attributes:
        module: the name of its module.
        layers: paths of the layers that it comes from.
        scheme: what those were quantized in; "" for float.
        stored: how it is stored.
        kernel: what vLLM would multiply with; reason says why there is none, or what to know.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    module: str
    layers: tuple[str, ...]
    scheme: str
    stored: str
    kernel: str
    reason: str = ""


def serving_kernel(
    module: str, as_format: ExportFormat, formats: Mapping[str, CodeFormat]
) -> ServingKernel:
    """What vLLM would do with a quantized module of a checkpoint.

    Args:
        formats: of all quantized modules, by name.
    """
    found = formats[module]
    if as_format == "dense":
        return ServingKernel(name="dense", reason="stored in float: no memory is saved")
    others = _different_partners(module, formats)
    if others:
        return ServingKernel(
            reason=f"vLLM fuses it with {', '.join(others)}, which would need the same scheme"
        )
    if found.is_float or found.activations == "int8":
        return ServingKernel(name="w8a8 float8" if found.is_float else "w8a8 int8")
    if found.bits in (2, 3):
        return ServingKernel(
            name="Humming",
            reason=f"{found.bits} bits: Humming is vLLM's only kernel; transformers and GPTQModel "
            "take them too",
        )
    if as_format == "gptq" and not found.symmetric:
        return ServingKernel(
            reason="vLLM reads symmetric gptq checkpoints only; GPTQModel and transformers take it"
        )
    names = []
    if found.group_size in _MACHETE_GROUPS:
        names.append("Machete")
    if found.group_size in _MARLIN_GROUPS and (found.symmetric or found.bits == 4):
        names.append("Marlin")
    if not names:
        known = _MACHETE_GROUPS if found.bits == 8 and not found.symmetric else _MARLIN_GROUPS
        groups = ", ".join(map(str, known[1:]))
        return ServingKernel(
            reason=f"groups of {found.group_size}: kernels for {found.bits} bits "
            f"{'symmetric' if found.symmetric else 'asymmetric'} have groups of {groups}, or -1"
        )
    return ServingKernel(name=" or ".join(names))


def served_by(scheme: Scheme) -> str:
    """What serves layers of one scheme, exported as compressed-tensors, in a few words."""
    found = code_format(scheme)
    if found is None:
        return "KerasHub; others take it dense"
    kernel = serving_kernel("layer", "compressed-tensors", {"layer": found})
    vllm = [f"vLLM ({kernel.name})"] if kernel.name else []
    return ", ".join([*vllm, "transformers"])


def _different_partners(module: str, formats: Mapping[str, CodeFormat]) -> Sequence[str]:
    """The modules that vLLM fuses with this one although their formats differ."""
    parent, _, own = module.rpartition(".")
    for names in _FUSED:
        if own in names:
            partners = (f"{parent}.{name}" for name in names if name != own)
            return [name for name in partners if formats.get(name) != formats[module]]
    return ()
