import numpy as np
import pytest

from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.run import activations
from pipeline.storage.object_store import ObjectStore, open_store

_fresh = iter(range(1_000_000))


@pytest.fixture
def store() -> ObjectStore:
    return open_store(f"memory://test-activations/{next(_fresh)}")


def entering(block: int, shard: int, num_values: int = 1) -> list[list[np.ndarray]]:
    """What enters a block: values of three micro-batches."""
    draw = np.random.default_rng([block, shard])
    return [
        [draw.standard_normal((2, 5, 3 + index), np.float32) for index in range(num_values)]
        for _ in range(3)
    ]


def keep(store: ObjectStore, block: int, num_shards: int = 2) -> None:
    kept = {s: activations.save(store, block, s, entering(block, s)) for s in range(num_shards)}
    activations.finish(store, block, kept)


def shard_key(block: int, shard: int) -> str:
    [found] = [k for k in store_keys(block) if f"shard-{shard:05d}" in k]
    return found


def store_keys(block: int) -> list[str]:
    return [f"activations/{block:05d}/shard-{shard:05d}.safetensors" for shard in range(2)]


@pytest.mark.parametrize("num_values", [1, 2, 12])
def test_saved_activations_load_bit_for_bit(num_values: int, store: ObjectStore) -> None:
    expected = entering(3, 0, num_values)
    activations.finish(store, 3, {0: activations.save(store, 3, 0, expected)})
    found = activations.load(store, 3, 0)
    assert [len(batch) for batch in found] == [num_values] * 3
    for batch, wanted in zip(found, expected, strict=True):
        for a, b in zip(batch, wanted, strict=True):
            assert np.array_equal(a, b)
            assert a.dtype == b.dtype


def test_the_same_hidden_states_are_the_same_bytes(store: ObjectStore) -> None:
    assert activations.save(store, 1, 0, entering(0, 0)) == activations.save(
        store, 2, 0, entering(0, 0)
    )


def test_latest_finds_the_last_complete_set_up_to_the_block(store: ObjectStore) -> None:
    assert activations.latest(store, 9, 2) == 0
    for block in (2, 4, 6):
        keep(store, block)
    assert activations.latest(store, 9, 2) == 6
    assert activations.latest(store, 5, 2) == 4
    assert activations.latest(store, 1, 2) == 0
    assert activations.latest(store, 9, 3) == 0  # of other shards


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "index"])
def test_a_damaged_set_is_skipped_and_never_loaded(store: ObjectStore, damage: str) -> None:
    keep(store, 2)
    keep(store, 4)
    key = "activations/00004/index.json" if damage == "index" else shard_key(4, 1)
    data = store.get(key)
    match damage:
        case "flip":
            store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
        case "cut" | "index":
            store.put(key, data[:-2])
        case "delete":
            store.delete(key)
    assert activations.latest(store, 9, 2) == 2
    with pytest.raises((DamagedObjectError, MissingObjectError)):
        activations.load(store, 4, 1)


@pytest.mark.parametrize("content", [b"[]", b'{"0": 1}', b'{"x": ["", 1]}', b'{"0": [1]}', b"\xff"])
def test_a_malformed_index_counts_as_damaged(store: ObjectStore, content: bytes) -> None:
    keep(store, 2)
    store.put("activations/00002/index.json", content)
    assert activations.latest(store, 9, 2) == 0


def test_a_set_without_its_index_does_not_count(store: ObjectStore) -> None:
    for shard in range(2):
        activations.save(store, 7, shard, entering(7, shard))
    assert activations.latest(store, 9, 2) == 0


def test_only_the_newest_two_sets_stay(store: ObjectStore) -> None:
    for block in (2, 4, 6, 8):
        keep(store, block)
    activations.discard(store, 6)
    # Block 8's set is newer than the one to keep.
    assert {key.split("/")[1] for key in store.list("activations/")} == {"00004", "00006", "00008"}


def test_unknown_objects_are_left_alone(store: ObjectStore) -> None:
    keep(store, 2)
    store.put("activations/notes.txt", b"mine")
    assert activations.latest(store, 9, 2) == 2
    activations.discard(store, 2)
    assert store.exists("activations/notes.txt")
