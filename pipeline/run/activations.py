"""Activations saved in storage, so that a resumed run need not start from the tokens.

They are a cache: a set that is missing or damaged is computed again. A set holds what enters one
block, for all calibration shards. Its index is written last, and makes it usable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import safetensors.numpy
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pipeline.canonical import canonical_json, sha256
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.storage.object_store import ObjectStore

PREFIX = "activations/"


class SavedShard(NamedTuple):
    """Digest and size of a shard's object."""

    sha256: str
    size_bytes: int


_INDEX: TypeAdapter[dict[int, SavedShard]] = TypeAdapter(dict[int, SavedShard])
"""By shard."""


def save(
    store: ObjectStore, block: int, shard: int, batches: Sequence[Sequence[NDArray[Any]]]
) -> SavedShard:
    """Write one shard of what enters `block`.

    Args:
        batches: of each micro-batch, the values that earlier blocks made, which are the hidden
            states [micro_batch, sequence, hidden] and rarely more.
    """
    named = {_name(i, j): array for i, batch in enumerate(batches) for j, array in enumerate(batch)}
    data = safetensors.numpy.save(named)
    store.put(_shard_key(block, shard), data)
    return SavedShard(sha256(data), len(data))


def _name(batch: int, index: int) -> str:
    # The first has the name that it had when there was no second.
    return f"{batch:05d}/{index:03d}" if index else f"{batch:05d}"


def load(store: ObjectStore, block: int, shard: int) -> list[list[NDArray[Any]]]:
    """Read what `save` wrote.

    Raises:
        DamagedObjectError, MissingObjectError: it is not as the set's index says.
    """
    saved = _index(store, block)[shard]
    data = store.get(_shard_key(block, shard), sha256=saved.sha256, size=saved.size_bytes)
    arrays = safetensors.numpy.load(data)
    batches: dict[str, list[NDArray[Any]]] = {}
    for name in sorted(arrays):
        batches.setdefault(name.partition("/")[0], []).append(arrays[name])
    return list(batches.values())


def finish(store: ObjectStore, block: int, shards: Mapping[int, SavedShard]) -> None:
    """Write the set's index, which makes it usable."""
    store.put(_index_key(block), canonical_json({str(i): saved for i, saved in shards.items()}))


def latest(store: ObjectStore, block: int, num_shards: int) -> int:
    """The last block up to `block` that has a complete, undamaged set; 0 if none has."""
    candidates = [
        candidate for candidate in sorted(_sets(store.list(PREFIX))) if candidate <= block
    ]
    return next((c for c in reversed(candidates) if _is_whole(store, c, num_shards)), 0)


def discard(store: ObjectStore, keep: int) -> None:
    """Delete the sets of the blocks before `keep`, except the last of them."""
    sets = _sets(store.list(PREFIX))
    for block in sorted(block for block in sets if block < keep)[:-1]:
        for key in sets[block]:
            store.delete(key)


def needed(keys: Iterable[str]) -> frozenset[str]:
    """Of a run's keys, those of the last two sets with an index; it may resume from either."""
    sets = _sets(keys)
    complete = [block for block in sorted(sets) if _index_key(block) in sets[block]]
    return frozenset(key for block in complete[-2:] for key in sets[block])


def _is_whole(store: ObjectStore, block: int, num_shards: int) -> bool:
    try:
        index = _index(store, block)
        if sorted(index) != list(range(num_shards)):
            return False
        for shard, saved in index.items():
            store.verify(_shard_key(block, shard), sha256=saved.sha256, size=saved.size_bytes)
    except (DamagedObjectError, MissingObjectError):
        return False
    return True


def _index(store: ObjectStore, block: int) -> dict[int, SavedShard]:
    data = store.get(_index_key(block))
    try:
        return _INDEX.validate_json(data)
    except ValidationError as error:
        raise DamagedObjectError(
            f"{store.url(_index_key(block))} is damaged: {error.errors()[0]['msg']}"
        ) from None


def _sets(keys: Iterable[str]) -> dict[int, list[str]]:
    """Of a run's keys, those of every set, complete or not, by block."""
    sets: dict[int, list[str]] = {}
    for key in keys:
        if not key.startswith(PREFIX):
            continue
        block, separator, _ = key.removeprefix(PREFIX).partition("/")
        if separator and block.isdecimal():
            sets.setdefault(int(block), []).append(key)
    return sets


def _shard_key(block: int, shard: int) -> str:
    return f"{PREFIX}{block:05d}/shard-{shard:05d}.safetensors"


def _index_key(block: int) -> str:
    return f"{PREFIX}{block:05d}/index.json"
