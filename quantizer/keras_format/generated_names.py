"""Names that Keras generates, made the same in every process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from keras.src.backend.common import global_state

MANY = 1000
"""More objects of one kind than any process makes."""


class ManyMade(defaultdict[str, int]):
    """Keras' counts of the names that it generated, as if it had made many objects before."""

    def __init__(self) -> None:
        super().__init__(lambda: MANY)

    def __contains__(self, name: object) -> bool:
        return True


@contextmanager
def apart(made: defaultdict[str, int] | None = None) -> Iterator[None]:
    """Isolate what is built in this block from Keras' global state, in both directions.

    Keras numbers the names that it generates per process. It also initializes every waiting
    variable with random values as soon as anything is traced, which would fill a model that is to
    have none.

    Args:
        made: receives how many names Keras generated, by their beginning.
    """
    own: dict[str, Any] = {
        "object_name_uids": defaultdict(int) if made is None else made,
        "uninitialized_variables": [],
    }
    kept = {name: global_state.get_global_attribute(name) for name in own}
    for name, value in own.items():
        global_state.set_global_attribute(name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            global_state.set_global_attribute(name, value)
