"""A row of the table: a quantizer at a setting, written as one line of text.

    quantfleet 3                                    our GPTQ as our recipes have it, 3 bits
    quantfleet 3 {hessian_damping: 0.1}             with an option of the scheme
    quantfleet 3 {texts: [manual, novels]}          calibrated on other texts
    quantfleet auto {target_bits: 3.5}              of several widths, within a size
    quantfleet int8                                 a built-in recipe, embeddings included
    llmcompressor 3 {observer: mse}                 a peer, with options for its script
    rounding 3                                      to nearest, on min-max grids

Options that are fields of a calibration or of a recipe go there, all others to the scheme (or to
the peer). Calibration windows come from `texts`: manual (Python's) and novels (not those that are
judged on).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe.auto_recipe import MODE as AUTO
from pipeline.recipe.auto_recipe import AnyRecipe
from pipeline.recipe.recipe import Calibration, Recipe
from pipeline.recipe.recipe_file import any_recipe_from_dict, load_recipe

GROUP_SIZE = 64
OURS, ROUNDING = "quantfleet", "rounding"
SAMPLES, LENGTH = 16, 512
_CALIBRATION = {"texts": ["manual"], "num_samples": SAMPLES, "sequence_length": LENGTH}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is quantized how.

    Attributes:
        quantizer: quantfleet, a peer or rounding.
        recipe: bits of a GPTQ in groups of 64, as text, or that they are chosen by block; or the
            name of a built-in recipe.
        options: everything that differs from the quantizer's defaults.
    """

    quantizer: str
    recipe: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Row:
        """Read a row.

        Raises:
            ValueError: not written as above.
        """
        quantizer, _, rest = text.strip().partition(" ")
        recipe, brace, options = rest.partition("{")
        try:
            found = yaml.safe_load(brace + options) if brace else {}
        except yaml.YAMLError:
            found = None
        if not isinstance(found, dict) or not recipe.strip():
            raise ValueError(
                f"{text!r} is no row; write: QUANTIZER BITS {{option: value}}, such as "
                "'llmcompressor 3 {observer: mse}'"
            )
        return cls(quantizer=quantizer, recipe=recipe.strip(), options=found)

    def __str__(self) -> str:
        options = yaml.safe_dump(self.options, default_flow_style=True, width=10_000).strip()
        return f"{self.quantizer} {self.recipe} {options if self.options else ''}".strip()

    @property
    def bits(self) -> int:
        """Raises ValueError for a built-in recipe."""
        return int(self.recipe)

    def calibration(self, texts: dict[str, Path], draw: int) -> Calibration:
        """Its windows: those of a draw are the same for every quantizer.

        Args:
            texts: files by the name that rows give them.
            draw: the seed.
        """
        given = {k: v for k, v in self.options.items() if k in Calibration.model_fields}
        values = _CALIBRATION | given | {"seed": draw}
        return Calibration.model_validate(
            values | {"texts": [_named(source, texts) for source in values["texts"]]}
        )

    @property
    def setting(self) -> dict[str, Any]:
        """The options that are for the quantizer."""
        return {k: v for k, v in self.options.items() if k not in Calibration.model_fields}

    def our_recipe(self, calibration: Calibration) -> AnyRecipe:
        """Ours, as the package's recipes have it, with this row's options.

        Raises:
            PipelineError: no such recipe, or options that it does not take.
        """
        fields = {k: v for k, v in self.setting.items() if k in Recipe.model_fields}
        scheme = {k: v for k, v in self.setting.items() if k not in Recipe.model_fields}
        is_auto = self.recipe == AUTO
        if is_auto or self.recipe.isdecimal():
            # Embeddings stay in float, as the peers leave them.
            bits = 3 if is_auto else self.bits
            values = load_recipe(f"gptq-w{bits}-g{GROUP_SIZE}").to_dict() | {"embeddings": None}
        else:
            values = load_recipe(self.recipe).to_dict()
        values["scheme"] = values["scheme"] | scheme
        values["calibration"] = calibration.model_dump(mode="json")
        if is_auto:
            values["scheme"]["mode"] = AUTO
            del values["scheme"]["weight_bits"]
        return any_recipe_from_dict(values | fields)

    def to_json(self) -> str:
        """Canonical: equal rows give equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def _named(source: Any, texts: dict[str, Path]) -> Any:
    if isinstance(source, dict):  # a weighted source
        return source | {"url": _named(source["url"], texts)}
    if source not in texts:
        raise ValueError(f"texts: {source!r} is none of {', '.join(sorted(texts))}")
    return str(texts[source])
