from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import keras_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pipeline.weights.hdf5
from pipeline.errors import SourceError
from pipeline.model.blocks import find_blocks
from pipeline.model.preset import PresetFiles, read_preset
from pipeline.storage.object_store import open_store
from pipeline.weights.digests import values_digest
from pipeline.weights.source import Source, open_source
from pipeline.weights.weight_files import num_not_finite
from tests.benchmarks.minilm import preset_folder
from tests.models.stock_load import load_stock
from tests.models.tiny import ARCHITECTURES
from tests.pipeline.presets import shared_preset, stock_task
from tests.selection import by_default

# KerasHub leaves the file open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*vocabulary.spm:ResourceWarning")

GATE = "layers/llama_transformer_decoder_1/_feedforward_gate_dense/vars/0"


def source_of(path: Path | str) -> Source:
    return open_source(read_preset(str(path)))


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many bytes of a source's files were read so far."""
    sizes: list[int] = []
    read = PresetFiles.read

    def counted(preset: PresetFiles, *args: Any) -> bytes:
        data = read(preset, *args)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(PresetFiles, "read", counted)
    return lambda: sum(sizes)


def values(model: Any) -> dict[str, Any]:
    return {variable.path: np.asarray(variable.value) for variable in model.variables}


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A preset that a test may change."""
    return shutil.copytree(shared_preset("Llama3"), tmp_path / "preset")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same, in many files: groups are cut in two between some of them."""
    path = tmp_path / "sharded"
    stock_task("Llama3").backbone.save_to_preset(str(path), max_shard_size=80e-6)
    for name in ("config.json", "task.json"):
        shutil.copy(shared_preset("Llama3") / name, path / name)
    return path


@pytest.fixture
def minilm(tmp_path: Path) -> Path:
    """A Hugging Face model that a test may change."""
    return shutil.copytree(preset_folder(), tmp_path / "minilm")


@pytest.mark.parametrize("architecture", by_default(ARCHITECTURES, ["Gemma"]))
def test_every_variable_is_what_stock_kerashub_loads(architecture: str) -> None:
    source = source_of(shared_preset(architecture))
    expected = values(stock_task(architecture))
    found = source.read(source.paths)
    assert set(found) == {path for path in expected if "seed_generator" not in path}
    for path, value in found.items():
        assert value.dtype == np.float32
        assert np.array_equal(value, expected[path]), path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_floats_come_as_they_are_stored(dtype: str) -> None:
    source = source_of(shared_preset("Llama3", dtype=dtype, tied=False))
    found = source.read(source.paths)
    wanted = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[dtype]
    assert {value.dtype for value in found.values()} == {wanted}
    # Stock KerasHub turns them into float32.
    expected = values(stock_task("Llama3", dtype=dtype, tied=False))
    for path, value in found.items():
        assert np.array_equal(value.astype(np.float32), expected[path]), path
    assert {variable.dtype for variable in source.variables().values()} == {dtype}


def test_shards_hold_what_the_single_file_holds(sharded: Path) -> None:
    one, many = source_of(shared_preset("Llama3")), source_of(sharded)
    assert len(many.weights.file_names) > 3
    assert one.paths == many.paths
    expected, found = one.read(one.paths), many.read(many.paths)
    for path in one.paths:
        assert np.array_equal(found[path], expected[path])
    assert {v.file for v in many.variables().values()} == set(many.weights.file_names)


def test_a_block_and_the_rest_are_read_apart() -> None:
    source = source_of(shared_preset("Bert"))
    graph = find_blocks(source.skeleton)
    parts = [source.layer_paths(block.layer) for block in graph.blocks]
    parts.append(source.rest_paths(graph))
    assert sorted(path for part in parts for path in part) == sorted(source.paths)
    assert "mlm_head/output_bias" in parts[-1]  # of task.weights.h5
    block = source.read_layer(graph.blocks[1].layer)
    assert set(block) == set(parts[1])
    assert all(path.startswith("transformer_layer_1/") for path in block)


def test_of_a_file_only_the_block_that_is_asked_for_is_read(bytes_read: Callable[[], int]) -> None:
    path = shared_preset("Llama3", hidden_dim=512, intermediate_dim=1024, num_blocks=4)
    source = source_of(path)
    block = source.read_layer(find_blocks(source.skeleton).blocks[2].layer)
    block_bytes = sum(value.nbytes for value in block.values())
    file_bytes = (path / "model.weights.h5").stat().st_size
    assert block_bytes < file_bytes / 4
    assert block_bytes <= bytes_read() < 1.2 * block_bytes
    assert all(variable._value is None for variable in source.skeleton.model.variables)


def test_looking_at_all_variables_reads_none_of_their_data(bytes_read: Callable[[], int]) -> None:
    path = shared_preset("Llama3", hidden_dim=512, intermediate_dim=1024, num_blocks=4)
    source = source_of(path)
    variables = source.variables()
    stored_bytes = sum(variable.num_bytes for variable in variables.values())
    assert bytes_read() < stored_bytes / 5


def test_reads_from_an_object_store() -> None:
    path = shared_preset("Llama3")
    store = open_store("memory://models/llama")
    for file in sorted(path.rglob("*")):
        if file.is_file():
            store.put(str(file.relative_to(path)), file.read_bytes())
    remote, local = source_of("memory://models/llama"), source_of(path)
    assert remote.files_digest() == local.files_digest()
    values = remote.read(remote.paths)
    assert values_digest(values) == values_digest(local.read(local.paths))
    for name, value in values.items():
        assert np.array_equal(value, local.read([name])[name])


def test_the_digests_are_of_what_decides_the_model(preset: Path) -> None:
    def digests() -> tuple[str, str]:
        source = source_of(preset)
        return source.files_digest(), values_digest(source.read(source.paths))

    files, values = digests()
    (preset / "README.md").write_text("How nice")
    assert digests() == (files, values)
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        file[GATE][0, 0] += 1
    assert digests()[0] == files
    assert digests()[1] != values
    (preset / "config.json").write_text((preset / "config.json").read_text() + " ")
    assert digests()[0] != files


def test_the_values_digest_covers_path_dtype_shape_and_bits() -> None:
    value = np.arange(6, dtype=np.float32)
    given: list[dict[str, np.ndarray]] = [
        {"a": value},
        {"b": value},
        {"a": value.reshape(2, 3)},
        {"a": value.view(np.int32)},
        {"a": value + 1},
        {"a": value, "b": value},
    ]
    assert len({values_digest(one) for one in given}) == len(given)
    transposed = np.asfortranarray(value.reshape(2, 3))
    assert values_digest({"a": transposed}) == values_digest(given[2])


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50_000])


def overwrite(file: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


def damage_structure(file: Path) -> None:
    data = bytearray(file.read_bytes())
    with h5py.File(file) as opened:
        place = h5py.h5o.get_info(opened[GATE].id).addr
    data[place : place + 64] = b"\xff" * 64
    file.write_bytes(data)


def changing(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return apply


def replacing(make: Callable[[h5py.Group, str], None]) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        group, _, name = GATE.rpartition("/")
        del file[GATE]
        make(file[group], name)

    return changing(change)


def virtual(group: h5py.Group, name: str) -> None:
    layout = h5py.VirtualLayout(shape=(64, 128), dtype="f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(64, 128))
    group.create_virtual_dataset(name, layout)


def external(group: h5py.Group, name: str) -> None:
    size = 64 * 128 * 4
    group.create_dataset(name, (64, 128), "f4", external=[("/etc/passwd", 0, size)])


def soft(group: h5py.Group, name: str) -> None:
    group[name] = h5py.SoftLink("/layers/reversible_embedding/vars/0")


def external_link(group: h5py.Group, name: str) -> None:
    group[name] = h5py.ExternalLink("/etc/passwd", "x")


def huge_chunks(group: h5py.Group, name: str) -> None:
    options = {"chunks": (64 << 10, 1 << 10), "maxshape": (None, None), "compression": "gzip"}
    group.create_dataset(name, (64, 128), "f4", **options)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (cut_short, "truncated"),
        (overwrite, "not HDF5"),
        (damage_structure, f"{GATE}: damaged"),
        (changing(lambda file: file.pop(GATE)), f"{GATE}, which holds .* is missing"),
        (replacing(lambda group, name: group.create_group(name)), "a group, where"),
        (replacing(lambda group, name: group.create_dataset(name, (64, 64), "f4")), r"\(64, 64\)"),
        (replacing(lambda group, name: group.create_dataset(name, (64, 128), "i4")), "dtype int32"),
        (replacing(lambda group, name: group.create_dataset(name, (64, 128), "V2")), "2-byte type"),
        (replacing(soft), "reached by SoftLink"),
        (replacing(external_link), "reached by ExternalLink"),
        pytest.param(replacing(virtual), "in other files", id="virtual"),
        pytest.param(replacing(external), "in other files", id="external"),
        (replacing(huge_chunks), "chunks of"),
    ],
)
def test_a_bad_weights_file_is_refused_and_named(
    preset: Path, harm: Callable[[Path], None], expected: str
) -> None:
    harm(preset / "model.weights.h5")
    source = source_of(preset)
    for use in (source.variables, lambda: source.read(source.paths)):
        with pytest.raises(SourceError, match=expected) as caught:
            use()
        assert "model.weights.h5" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_bad_dataset_does_not_keep_others_from_being_read(preset: Path) -> None:
    damage_structure(preset / "model.weights.h5")
    source = source_of(preset)
    assert len(source.read_layer(find_blocks(source.skeleton).blocks[0].layer)) == 9


def test_a_compressed_dataset_is_read(preset: Path) -> None:
    expected = source_of(preset).read(["transformer_layer_1/feedforward_gate_dense/kernel"])
    [value] = expected.values()
    replacing(lambda group, name: group.create_dataset(name, data=value, compression="gzip"))(
        preset / "model.weights.h5"
    )
    found = source_of(preset).read(expected)
    assert np.array_equal(*found.values(), value)


def test_a_file_that_shrinks_while_in_use_is_noticed(preset: Path) -> None:
    source = source_of(preset)
    cut_short(preset / "model.weights.h5")
    with pytest.raises(SourceError, match="the source changed while in use"):
        source.read(source.paths)


def test_weights_that_are_missing_are_named(preset: Path, sharded: Path) -> None:
    (preset / "model.weights.h5").unlink()
    with pytest.raises(SourceError, match=r"model\.weights\.h5 is missing"):
        source_of(preset).variables()
    (sharded / "model_00001.weights.h5").unlink()
    with pytest.raises(SourceError, match=r"model_00001\.weights\.h5 is missing"):
        source_of(sharded).variables()
    with pytest.raises(SourceError, match="no weights file holds a variable nonsense"):
        source_of(sharded).read(["nonsense"])


@pytest.mark.parametrize("name", ["../model.weights.h5", "/etc/passwd", 3])
def test_a_shard_elsewhere_is_refused(sharded: Path, name: object) -> None:
    file = sharded / "model.weights.json"
    index = json.loads(file.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    file.write_text(json.dumps(index))
    with pytest.raises(SourceError, match="is not a file beside it"):
        source_of(sharded).variables()


def test_a_hugging_face_model_is_what_stock_kerashub_loads() -> None:
    source = source_of(preset_folder())
    expected = values(load_stock(keras_hub.models.BertBackbone, preset_folder()))
    found = source.read(source.paths)
    assert set(found) == {path for path in expected if "seed_generator" not in path}
    for path, value in found.items():
        assert np.array_equal(value, expected[path]), path


def test_of_safetensors_only_the_block_that_is_asked_for_is_read(
    bytes_read: Callable[[], int],
) -> None:
    source = source_of(preset_folder())
    block = source.read_layer(find_blocks(source.skeleton).blocks[2].layer)
    block_bytes = sum(value.nbytes for value in block.values())
    assert block_bytes < bytes_read() < block_bytes + (64 << 10)


def shard_safetensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard, part in enumerate((names[::2], names[1::2])):
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_safetensors_hold_what_the_single_file_holds(minilm: Path) -> None:
    single = source_of(preset_folder())
    shard_safetensors(minilm)
    source = source_of(minilm)
    layer = find_blocks(source.skeleton).blocks[3].layer
    expected, found = single.read_layer(layer), source.read_layer(layer)
    for path in expected:
        assert np.array_equal(found[path], expected[path])
    assert len(source.weights.file_names) == 2


def test_tensors_of_another_dtype_are_cast_as_keras_casts(minilm: Path) -> None:
    tensors = load_file(minilm / "model.safetensors")
    halved = {
        name: value.astype(ml_dtypes.bfloat16) if value.dtype == np.float32 else value
        for name, value in tensors.items()
    }
    save_file(halved, minilm / "model.safetensors")
    name = "transformer_layer_0/self_attention_layer/query/kernel"
    source = source_of(minilm)
    [value] = source.read([name]).values()
    [exact] = source_of(preset_folder()).read([name]).values()
    assert value.dtype == np.float32  # as config.json says
    assert np.array_equal(value, exact.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert source.casts() == {"bfloat16 to float32": len(source.paths)}


def drop_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors["encoder.layer.1.intermediate.dense.weight"]
    save_file(tensors, file)


def shrink_tensor(file: Path) -> None:
    tensors = load_file(file)
    name = "encoder.layer.1.intermediate.dense.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:100])
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (cut_short, "truncated"),
        (lambda file: file.write_bytes(b"\xff" * 100), "not a safetensors file"),
        (lambda file: file.write_bytes((5).to_bytes(8, "little") + b"x" * 100), "damaged header"),
        pytest.param(lambda file: file.write_bytes(b""), "not a safetensors file", id="empty"),
        (lambda file: file.unlink(), r"model\.safetensors is missing"),
        (drop_tensor, r"encoder\.layer\.1\.intermediate\.dense\.weight is missing"),
        (shrink_tensor, r"encoder\.layer\.1\.intermediate\.dense\.weight, stored as \(100, 384\)"),
    ],
)
def test_a_bad_safetensors_file_is_refused_and_named(
    minilm: Path, harm: Callable[[Path], None], expected: str
) -> None:
    harm(minilm / "model.safetensors")
    with pytest.raises(SourceError, match=expected) as caught:
        source_of(minilm).variables()
    assert "\n" not in str(caught.value)


def test_values_that_are_not_finite_are_counted_and_named(preset: Path) -> None:
    changing(lambda file: file[GATE].__setitem__((slice(2, 4), 5), [np.nan, np.inf]))(
        preset / "model.weights.h5"
    )
    source = source_of(preset)
    assert source.variables()
    with pytest.raises(
        SourceError, match=rf"model\.weights\.h5: {GATE}: 2 of 8192 values are NaN or infinite"
    ):
        source.read(source.paths)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_that_are_not_finite_are_found_in_any_layout(dtype: str) -> None:
    value = np.ones((3, 700, 1100), dtype)
    value[1, 2, 3], value[2, :, 7] = np.nan, -np.inf
    for layout in (value, value.transpose(2, 0, 1), value[:, ::-1], value[1, 2, 3]):
        assert num_not_finite(layout) == (1 if layout.ndim == 0 else 701)
    assert num_not_finite(value[:0]) == 0


def test_a_slow_store_does_not_keep_other_threads_from_using_h5py(
    preset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker reads one block while it writes another."""
    monkeypatch.setattr(pipeline.weights.hdf5, "_LARGE_BYTES", 1)
    source = source_of(preset)
    expected = source.read(source.paths)
    sizes = {value.nbytes for value in expected.values()}
    read, during = PresetFiles.read, 0

    def write() -> None:
        with h5py.File(io.BytesIO(), "w") as file:
            file["a"] = np.arange(3)

    def slow(preset: PresetFiles, name: str, start: int = 0, stop: int | None = None) -> bytes:
        nonlocal during
        data = read(preset, name, start, stop)
        if len(data) in sizes:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(write).result(timeout=60)
            during += 1
        return data

    monkeypatch.setattr(PresetFiles, "read", slow)
    found = source.read(source.paths)
    assert during == len(expected)
    for path, value in expected.items():
        assert np.array_equal(found[path], value)


@pytest.mark.parametrize("kind", ["plain", "chunked", "compressed", "big-endian", "unwritten"])
def test_values_are_read_past_h5py_only_where_they_lie_as_they_are(
    kind: str, tmp_path: Path
) -> None:
    values_RC = np.arange(12, dtype=np.float32).reshape(3, 4)
    how: dict[str, Any] = {
        "chunked": {"chunks": (1, 4)},
        "compressed": {"chunks": (3, 4), "compression": "gzip"},
        "big-endian": {"dtype": ">f4"},
        "unwritten": {"fillvalue": 7.0},
    }.get(kind, {})
    for userblock in (0, 512):
        with h5py.File(tmp_path / f"{userblock}.h5", "w", userblock_size=userblock) as file:
            dataset = file.create_dataset("a", (3, 4), **{"dtype": "f4", **how})
            if kind != "unwritten":
                dataset[:] = values_RC
        with h5py.File(tmp_path / f"{userblock}.h5") as file:
            start = pipeline.weights.hdf5._contiguous_from(file["a"])
        assert (start is not None) == (kind == "plain" and not userblock)
        if start is not None:
            data = (tmp_path / "0.h5").read_bytes()[start : start + values_RC.nbytes]
            assert data == values_RC.tobytes()
