"""Which rows, and how much of their correlations, quantize experts best: on text that is not seen.

python -m tests.benchmarks.experts             3 and 4 bits, three seeds: the table of the docs
python -m tests.benchmarks.experts --bits 3    one width
python -m tests.benchmarks.experts --trained 250   the same with experts trained for so many steps

The mixture is `tests.benchmarks.upcycled`'s. A seed has calibration text and a router of its own;
the text of evaluation is the same for all. What is compared is the output of down at the rows that
the router sends to each expert, and the output of the whole bank, with gate and up quantized too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from quantizer import GPTQScheme, HessianSum, solve
from quantizer.expert_solver import EXPERT_SHRINKAGE
from quantizer.solver import solve_stack
from tests.benchmarks.trained_mixture import Texts, read_texts, trained_mixture
from tests.benchmarks.upcycled import (
    INTERMEDIATE,
    NUM_EXPERTS,
    PER_TOKEN,
    Expert,
    FeedForward,
    Float32,
    Mixture,
    read_feed_forward,
)

TOKENS_PER_EXPERT = (128, 800, 4000)
_CLUSTERED = 8000
_GROUP_SIZE = 64
_MORE_DAMPING = 0.3

Rows = Callable[["Reads"], HessianSum]


@dataclass(frozen=True)
class Reads:
    """What an expert's down reads in calibration: at all tokens, and at those sent to it."""

    all_TI: Float32
    routed_TI: Float32
    weights_T: Float32

    def every_token(self) -> HessianSum:
        return HessianSum.of(self.all_TI)

    def routed(self) -> HessianSum:
        return HessianSum.of(self.routed_TI)

    def weighted(self) -> HessianSum:
        return HessianSum.of(self.routed_TI * self.weights_T[:, None])


def _no_knowledge(in_features: int) -> HessianSum:
    return HessianSum(np.eye(in_features, dtype=np.float32), 1)


def _shrunk(hessian: HessianSum) -> HessianSum:
    return hessian.shrunk(EXPERT_SHRINKAGE)


def below(rows_per_input: int) -> Callable[[HessianSum], HessianSum]:
    """Correlations scaled down by rows / floor, below a floor of rows."""

    def remedy(hessian: HessianSum) -> HessianSum:
        share = min(1.0, hessian.num_rows / (rows_per_input * hessian.gram_CC.shape[0]))
        scaled_CC = np.asarray(hessian.gram_CC) * np.float32(share)
        np.fill_diagonal(scaled_CC, hessian.diagonal())
        return HessianSum(scaled_CC, hessian.num_rows)

    return remedy


@dataclass(frozen=True)
class Variant:
    """A way to calibrate down."""

    rows: Rows
    remedy: Callable[[HessianSum], HessianSum] = lambda hessian: hessian
    damping: float = 0.01


VARIANTS = {
    "rounding": Variant(lambda reads: _no_knowledge(reads.all_TI.shape[1])),
    "all tokens": Variant(Reads.every_token),
    "all tokens, shrunk": Variant(Reads.every_token, _shrunk),
    "routed": Variant(Reads.routed),
    "routed · weight²": Variant(Reads.weighted),
    f"routed, damping {_MORE_DAMPING:g}": Variant(Reads.routed, damping=_MORE_DAMPING),
    "routed, rows / inputs": Variant(Reads.routed, below(1)),
    "routed, rows / 4 inputs": Variant(Reads.routed, below(4)),
    "routed, shrunk (ours)": Variant(Reads.routed, _shrunk),
    "routed · weight², shrunk": Variant(Reads.weighted, _shrunk),
}
BANKS = {
    "rounding": ("rounding", "rounding"),
    "all tokens everywhere": ("all tokens", "all tokens"),
    "routed everywhere": ("routed", "routed"),
    "routed, shrunk everywhere": ("routed, shrunk", "routed, shrunk (ours)"),
    "gate, up: all; down: routed": ("all tokens", "routed"),
    "gate, up: all; down: weight², shrunk": ("all tokens", "routed · weight², shrunk"),
    "gate, up: all; down: shrunk (ours)": ("all tokens", "routed, shrunk (ours)"),
    "gate, up: all, shrunk; down: shrunk": ("all tokens, shrunk", "routed, shrunk (ours)"),
}
"""How gate and up are calibrated, and how down is."""

Errors = dict[tuple[str, int], float]


def run_seed(
    layer: FeedForward, seed: int, seeds: int, bits: int, mixture: Mixture | None = None
) -> tuple[Errors, Errors]:
    """Errors of down and of the bank, by variant and tokens an expert; shares of the outputs.

    Args:
        mixture: one whose router is not of the seed's text.
    """
    share = len(layer.calibration_TH) // seeds
    text_TH = layer.calibration_TH[seed * share : (seed + 1) * share]
    mixture = mixture or Mixture.of(layer, text_TH[:_CLUSTERED], seed)
    held = mixture.route(layer.evaluation_TH)
    tests = [held.of_expert(number) for number in range(NUM_EXPERTS)]
    down_errors: Errors = {}
    bank_errors: Errors = {}
    for tokens in TOKENS_PER_EXPERT:
        inputs_TH = text_TH[: tokens * NUM_EXPERTS // PER_TOKEN]
        routing = mixture.route(inputs_TH)
        experts = mixture.experts
        sent = [routing.of_expert(number) for number in range(NUM_EXPERTS)]
        down: dict[str, list[Float32]] = {name: [] for name in VARIANTS}
        for expert, (rows, weights_T) in zip(experts, sent, strict=True):
            all_TI = expert.hidden(inputs_TH)
            reads = Reads(all_TI, all_TI[rows], weights_T)
            for name, variant in VARIANTS.items():
                down[name].append(_solved(expert.down_HI, reads, variant, bits))
        gate_up = _gate_up(experts, inputs_TH, [rows for rows, _ in sent], bits)
        hidden = [
            expert.hidden(layer.evaluation_TH[rows])
            for expert, (rows, _) in zip(experts, tests, strict=True)
        ]
        exact = [one.down_HI for one in experts]
        energy = sum(map(_output_energy, hidden, exact))
        for name, kernels in down.items():
            differences = [kernel - down_HI for kernel, down_HI in zip(kernels, exact, strict=True)]
            down_errors[name, tokens] = sum(map(_output_energy, hidden, differences)) / energy
        exact_TH = _output(experts, layer.evaluation_TH, tests)
        for name, (first, second) in BANKS.items():
            quantized = [
                Expert(gate_IH, up_IH, kernel_HI)
                for (gate_IH, up_IH), kernel_HI in zip(gate_up[first], down[second], strict=True)
            ]
            lost = _squares(_output(quantized, layer.evaluation_TH, tests) - exact_TH)
            bank_errors[name, tokens] = lost / _squares(exact_TH)
    return down_errors, bank_errors


def _solved(down_HI: Float32, reads: Reads, variant: Variant, bits: int) -> Float32:
    scheme = GPTQScheme(weight_bits=bits, group_size=_GROUP_SIZE, hessian_damping=variant.damping)
    hessian = variant.remedy(variant.rows(reads))
    return solve(down_HI, hessian, scheme).weight.dequantize()


def _gate_up(
    experts: Sequence[Expert], inputs_TH: Float32, sent: Sequence[NDArray[np.intp]], bits: int
) -> dict[str, list[tuple[Float32, Float32]]]:
    """Gate and up of all experts, by what calibrates them."""
    scheme = GPTQScheme(weight_bits=bits, group_size=_GROUP_SIZE)
    matrices = [np.concatenate([one.gate_IH, one.up_IH]) for one in experts]
    unknown, everything = _no_knowledge(inputs_TH.shape[1]), HessianSum.of(inputs_TH)
    routed = [HessianSum.of(inputs_TH[rows]) for rows in sent]
    results = {
        "rounding": solve_stack(matrices, unknown, scheme),
        "all tokens": solve_stack(matrices, everything, scheme),
        "all tokens, shrunk": solve_stack(matrices, _shrunk(everything), scheme),
        "routed": [solve(*pair, scheme) for pair in zip(matrices, routed, strict=True)],
        "routed, shrunk": [
            solve(matrix, _shrunk(hessian), scheme)
            for matrix, hessian in zip(matrices, routed, strict=True)
        ],
    }
    return {
        name: [
            (kernel[:INTERMEDIATE], kernel[INTERMEDIATE:])
            for kernel in (result.weight.dequantize() for result in solved)
        ]
        for name, solved in results.items()
    }


def _output(
    experts: Sequence[Expert], inputs_TH: Float32, sent: Sequence[tuple[NDArray[np.intp], Float32]]
) -> Float32:
    output_TH = np.zeros_like(inputs_TH)
    for expert, (rows, weights_T) in zip(experts, sent, strict=True):
        hidden_TI = expert.hidden(inputs_TH[rows])
        output_TH[rows] += weights_T[:, None] * (hidden_TI @ expert.down_HI.T)
    return output_TH


def _output_energy(hidden_TI: Float32, kernel_HI: Float32) -> float:
    return _squares(hidden_TI @ kernel_HI.T)


def _squares(rows: Float32) -> float:
    return float(np.sum(np.square(rows), dtype=np.float64))


def _shown(table: Table, names: Sequence[str], found: Sequence[Errors]) -> None:
    """A row for each variant: the seeds' mean and its standard error, in percent."""
    for name in names:
        cells = []
        for tokens in TOKENS_PER_EXPERT:
            percent = 100 * np.array([errors[name, tokens] for errors in found])
            error = percent.std(ddof=1) / len(percent) ** 0.5 if len(percent) > 1 else np.nan
            cells.append(f"{percent.mean():.2f} ± {error:.2f}")
        table.add_row(name, *cells)


def _trained(texts: Texts, seed: int, steps: int, console: Console) -> Mixture:
    """A trained mixture, of which the first and the last loss and the experts' shares are told."""
    mixture, losses = trained_mixture(texts, seed, steps)
    chosen = mixture.route(texts.layer.evaluation_TH).experts_TK
    shares = np.bincount(chosen.reshape(-1), minlength=NUM_EXPERTS) / len(chosen)
    console.print(
        f"seed {seed}: loss {losses[0]:.2f} to {np.mean(losses[-10:]):.2f}; experts get "
        f"{shares.min():.0%} to {shares.max():.0%} of other text's tokens"
    )
    return mixture


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.experts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trained", type=int, default=0, metavar="STEPS")
    arguments = parser.parse_args()
    console, start = Console(), time.monotonic()
    each = max(TOKENS_PER_EXPERT) * NUM_EXPERTS // PER_TOKEN
    seeds = range(arguments.seeds)
    mixtures: list[Mixture | None] = [None for _ in seeds]
    if arguments.trained:
        texts = read_texts(arguments.seeds * each, 4096)
        layer = texts.layer
        mixtures = [_trained(texts, seed, arguments.trained, console) for seed in seeds]
    else:
        layer = read_feed_forward(arguments.seeds * each, 4096)
    for bits in arguments.bits:
        found = [run_seed(layer, seed, len(seeds), bits, mixtures[seed]) for seed in seeds]
        for title, names, of_seeds in (
            ("down", VARIANTS, [down for down, _ in found]),
            ("the bank", BANKS, [bank for _, bank in found]),
        ):
            table = Table(title=f"{bits} bits: lost output of {title}, % on other text")
            table.add_column("calibrated by")
            for tokens in TOKENS_PER_EXPERT:
                table.add_column(f"{tokens} tokens an expert", justify="right")
            _shown(table, list(names), of_seeds)
            console.print(table)
    console.print(
        f"{NUM_EXPERTS} experts, {PER_TOKEN} for a token; gate and up have "
        f"{layer.gate_IH.shape[1]} inputs, down {INTERMEDIATE}; {arguments.seeds} seeds with "
        f"standard errors; {time.monotonic() - start:.0f} s."
    )


if __name__ == "__main__":
    main()
