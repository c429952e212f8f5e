"""Experts as codes of a checkpoint: a matrix each, out of the codes of all that lie in one file.

transformers stacks the tensors of single experts again when it loads them, and decodes all by the
scheme of the group that names experts by a pattern; it takes no zero points of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline.errors import ExportError
from pipeline.export.code_formats import CodeFormat, ExportFormat
from pipeline.export.codes import Matrix
from pipeline.export.kernels import ServingKernel
from pipeline.model.expert_tensors import ExpertTensor, is_of_one_expert, of_any_expert
from quantizer.expert_codes import ExpertCodes, code_format
from quantizer.schemes import Scheme

_KERNEL_BITS = (4, 8)
"""Of vLLM's kernels for experts with integer weights."""


def expert_format(tensor: ExpertTensor, scheme: Scheme, as_format: ExportFormat) -> CodeFormat:
    """The format of an expert's codes.

    Raises:
        ExportError: no runtime reads such experts.
    """
    path, (bits, group_size, symmetric) = tensor.variable, code_format(scheme)
    if as_format == "gptq":
        raise ExportError(
            f"{path}: experts are exported as compressed-tensors alone; use --format "
            "compressed-tensors or dense"
        )
    if not symmetric:
        raise ExportError(
            f"{path}: transformers reads no zero points of experts; quantize them with gptq and "
            "symmetric: true, or int8, or use --format dense"
        )
    if group_size != -1 and tensor.in_features % group_size:
        raise ExportError(
            f"{path}: {tensor.in_features} inputs are not divisible into groups of {group_size}, "
            "and other runtimes have no shorter last group; quantize with a group_size that "
            f"divides {tensor.in_features} (or -1), or use --format dense"
        )
    whole = group_size == tensor.in_features
    return CodeFormat(bits=bits, symmetric=symmetric, group_size=-1 if whole else group_size)


def check_experts(formats: Mapping[str, CodeFormat]) -> None:
    """Check that experts have one format.

    Args:
        formats: of all quantized modules, by name.

    Raises:
        ExportError: they have several, of which transformers would take the first for all.
    """
    first: dict[CodeFormat, str] = {}
    for module, found in formats.items():
        if is_of_one_expert(f"{module}."):
            first.setdefault(found, module)
    if len(first) > 1:
        (a, one), (b, other) = list(first.items())[:2]
        raise ExportError(
            f"transformers reads experts of one scheme; {one} has {a.described}, and {other} has "
            f"{b.described}: give all experts one scheme, or use --format dense"
        )


def targets(modules: Iterable[str]) -> list[str]:
    """How compressed-tensors names modules: experts by a pattern for all of a layer."""
    named = (
        f"re:{of_any_expert(module)}" if is_of_one_expert(f"{module}.") else module
        for module in modules
    )
    return list(dict.fromkeys(named))


def expert_matrix(codes: ExpertCodes, tensor: ExpertTensor, found: CodeFormat) -> Matrix:
    """One expert's codes, out of those of its bank."""
    rows = slice(tensor.start, tensor.stop)
    return Matrix(
        format=found,
        codes_RC=codes.codes_ERC[tensor.expert, rows],
        scale_RG=codes.scale_ERG[tensor.expert, rows].astype("float32"),
        zero_RG=codes.zero_ERG[tensor.expert, rows],
    )


def expert_kernel(found: CodeFormat) -> ServingKernel:
    """What vLLM would do with experts of a format."""
    if found.bits in _KERNEL_BITS:
        return ServingKernel(name="experts", reason="vLLM's kernels for experts, not tried here")
    return ServingKernel(
        reason=f"{found.bits} bits: vLLM has no kernel for experts; transformers takes them"
    )
