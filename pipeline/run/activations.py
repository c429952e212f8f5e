"""Activations kept in storage, so that a resumed run need not start from the tokens.

They are a cache: whoever finds them missing or damaged computes them again. A set is named by the
block that it enters, and its index is written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from pipeline.canonical import canonical_json, sha256
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.storage.object_store import ObjectStore

PREFIX = "activations/"


@dataclass(frozen=True, slots=True)
class Kept:
    """A stored shard: digest and size of its object."""

    sha256: str
    size_bytes: int


def store(
    store: ObjectStore, block: int, shard: int, hidden_states: Sequence[NDArray[np.float32]]
) -> Kept:
    """Write what enters `block` for one shard, [micro_batch, sequence, hidden] each."""
    data = safetensors.numpy.save(
        {f"{i:05d}": hidden_states for i, hidden_states in enumerate(hidden_states)}
    )
    store.put(_shard_key(block, shard), data)
    return Kept(sha256(data), len(data))


def load(store: ObjectStore, block: int, shard: int) -> list[NDArray[np.float32]]:
    """Read what `store` wrote.

    Raises:
        DamagedObjectError, MissingObjectError: it is not as the set's index says.
    """
    kept = _index(store, block)[shard]
    data = store.get(_shard_key(block, shard), sha256=kept.sha256, size=kept.size_bytes)
    arrays = safetensors.numpy.load(data)
    return [arrays[name] for name in sorted(arrays)]


def finish(store: ObjectStore, block: int, kept: Mapping[int, Kept]) -> None:
    """Write the set's index, which makes it usable."""
    entries = {str(shard): [one.sha256, one.size_bytes] for shard, one in kept.items()}
    store.put(_index_key(block), canonical_json(entries))


def latest(store: ObjectStore, block: int, num_shards: int) -> int:
    """The last block up to `block` that a whole, undamaged set enters; 0 if there is none."""
    for candidate in sorted(_sets(store), reverse=True):
        if candidate <= block and _is_whole(store, candidate, num_shards):
            return candidate
    return 0


def discard(store: ObjectStore, keep: int) -> None:
    """Delete all sets before block `keep`'s but the last."""
    sets = _sets(store)
    for block in sorted(block for block in sets if block < keep)[:-1]:
        for key in sets[block]:
            store.delete(key)


def needed(store: ObjectStore) -> frozenset[str]:
    """The keys of the last two sets that have an index, which a resumed run may begin from."""
    sets = _sets(store)
    whole = [block for block in sorted(sets) if _index_key(block) in sets[block]]
    return frozenset(key for block in whole[-2:] for key in sets[block])


def _is_whole(store: ObjectStore, block: int, num_shards: int) -> bool:
    try:
        index = _index(store, block)
        if sorted(index) != list(range(num_shards)):
            return False
        for shard, kept in index.items():
            store.verify(_shard_key(block, shard), sha256=kept.sha256, size=kept.size_bytes)
    except (DamagedObjectError, MissingObjectError):
        return False
    return True


def _index(store: ObjectStore, block: int) -> dict[int, Kept]:
    data = store.get(_index_key(block))
    try:
        return {int(shard): Kept(*entry) for shard, entry in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedObjectError(f"{store.url(_index_key(block))}: damaged ({error})") from None


def _sets(store: ObjectStore) -> dict[int, list[str]]:
    """The keys of every set, whole or not, by the block that it enters."""
    found: dict[int, list[str]] = {}
    for key in store.list(PREFIX):
        block, separator, _ = key.removeprefix(PREFIX).partition("/")
        if separator and block.isdecimal():
            found.setdefault(int(block), []).append(key)
    return found


def _shard_key(block: int, shard: int) -> str:
    return f"{PREFIX}{block:05d}/shard-{shard:05d}.safetensors"


def _index_key(block: int) -> str:
    return f"{PREFIX}{block:05d}/index.json"
