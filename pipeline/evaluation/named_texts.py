"""Which texts a result is evaluated on: some without a name, and named sets.

Each set has figures, and limits, of its own: what a result keeps on texts like its calibration's
says little of others.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import CalibrationTextError

SET_NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
# In front of "=": what could be neither a URL, a data set of the hub nor a path with folders.
_NAMED = re.compile(r"([^/:?*=]*)=(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class EvaluatedTexts:
    """The texts to evaluate a result on.

    Attributes:
        texts: without a name.
        sets: by name.
    """

    texts: tuple[str, ...] = ()
    sets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.texts or self.sets)

    @property
    def by_name(self) -> dict[str, tuple[str, ...]]:
        """Each set, by name; those without one, under "", are the first."""
        unnamed = {"": self.texts} if self.texts else {}
        return unnamed | {name: self.sets[name] for name in sorted(self.sets)}

    @property
    def arguments(self) -> tuple[str, ...]:
        """What `parse_texts` makes these of."""
        named = (f"{name}={url}" for name in sorted(self.sets) for url in self.sets[name])
        return (*self.texts, *named)


def parse_texts(given: Iterable[str]) -> EvaluatedTexts:
    """Texts as the command line takes them: URL, or NAME=URL.

    Raises:
        CalibrationTextError: nothing, or a name that is not valid, or is given twice.
    """
    texts: list[str] = []
    sets: dict[str, tuple[str, ...]] = {}
    for one in given:
        if not one.strip():
            raise CalibrationTextError(
                "a text to evaluate on is empty; give a URL, or NAME=URL; is a variable not set?"
            )
        match = _NAMED.fullmatch(one)
        if match is None:
            texts.append(one)
            continue
        name, url = match.groups()
        if not re.fullmatch(SET_NAME_PATTERN, name) or not url:
            raise CalibrationTextError(
                f"{one}: a set of texts is NAME=URL, its name matches {SET_NAME_PATTERN}; rename "
                f"it, or, if {one} is a file, write ./{one}"
            )
        if name in sets:
            raise CalibrationTextError(
                f"{one}: {name} is {sets[name][0]} already; give each set a name of its own, or "
                "one glob for several files"
            )
        sets[name] = (url,)
    return EvaluatedTexts(texts=tuple(texts), sets=sets)


def unknown_name(name: str, known: Collection[str]) -> str:
    """That a set is not evaluated, in words, with the name that may have been meant."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    sets: Sequence[str] = sorted(known) or ["none"]
    return f"no set of texts named {name} is evaluated; {hint}the named sets are {', '.join(sets)}"
