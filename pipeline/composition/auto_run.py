"""The folder of a result whose widths are chosen: an ordinary run for each choice, below it.

`OUT/choices/w3/` is the run of all blocks at three bits, and so on. They are claimed first, and the
note that they belong together last. `OUT/plan.json` comes once it is known which block comes from
where; the choices are needed until `OUT/manifest.json` is there, and not after that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from pipeline.composition.sensitivities import COMPOSITION_PREFIX
from pipeline.recipe.auto_recipe import AutoRecipe, AutoRecipeField
from pipeline.run.records import Digest
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.record import StoredRecord

CHOICES_PREFIX = "choices/"
_CHOICE = re.compile(rf"(?:^|/){CHOICES_PREFIX}w[2348]$")


@dataclass(frozen=True, kw_only=True)
class AutoRun(StoredRecord):
    """What a result is chosen from.

    Attributes:
        recipe: that was asked for.
        plans: digests of the choices' plans, in their order.
    """

    key: ClassVar[str] = f"{COMPOSITION_PREFIX}auto.json"

    recipe: AutoRecipeField
    source_url: str
    plans: tuple[Digest, ...]

    @classmethod
    def find(cls, store: ObjectStore) -> AutoRun | None:
        """The one that was begun at a store's root, if any.

        Raises:
            DamagedObjectError: its note cannot be read.
        """
        return cls.read(store, cls.key) if store.exists(cls.key) else None


def choice_stores(run_url: str, recipe: AutoRecipe) -> tuple[ObjectStore, ...]:
    """Where the choices' runs are, in their order."""
    return tuple(open_store(f"{run_url}/{CHOICES_PREFIX}w{bits}") for bits in recipe.scheme.choices)


def result_of_choice(run: str) -> str | None:
    """The folder of the result that a folder's run is a choice of; None if it is none."""
    found = _CHOICE.search(run)
    return None if found is None else run[: found.start()]
