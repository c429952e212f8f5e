"""Read and write a plain Keras model as one `.keras` file, without trusting the file that is read.

Such a file is a ZIP archive of a config and an HDF5 file of weights. Before Keras reads it, its
config may name only classes of Keras and KerasHub that run no code, and its weights must be those
of the model that the config describes, with no links, and no more bytes than that model takes.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.weights_file import read_weights_file, weights_file_bytes
from pipeline.errors import SourceError, WeightsFileError
from pipeline.model.preset import keras_errors
from pipeline.model.skeleton import check_trusted
from pipeline.model.weight_layout import weight_layout
from pipeline.plain.plan import SUFFIX
from pipeline.storage.user_files import driver_errors, find_given_files, open_given_file
from quantizer import save_model
from quantizer.keras_format.generated_names import apart

_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_MAX_FILE_BYTES = 64 << 30
_MAX_CONFIG_BYTES = 64 << 20
_PIECE_BYTES = 16 << 20
# A model is saved with its optimizer: Adam's has two values for each of the model's.
_MAX_COPIES = 5
_SMALL_BYTES = 1 << 20
# The first time that a ZIP archive can hold.
_NO_TIME = (1980, 1, 1, 0, 0, 0)


def read_file(url: str) -> bytes:
    """Read a `.keras` file whole.

    Raises:
        SourceError: there is no single such file, it cannot be read, or it is larger than 64 GiB.
    """
    files = find_given_files(url, error_type=SourceError)
    if len(files) > 1:
        raise SourceError(f"{url}: {len(files)} files; name a single {SUFFIX} file")
    content = bytearray()
    with driver_errors(url, SourceError), open_given_file(files[0]) as stream:
        while piece := stream.read(_PIECE_BYTES):
            content += piece
            if len(content) > _MAX_FILE_BYTES:
                raise SourceError(
                    f"{url}: larger than {_MAX_FILE_BYTES >> 30} GiB; is it a Keras model?"
                )
    return bytes(content)


def load_model(data: bytes, where: str) -> keras.Model:
    """Check the content of a `.keras` file, then load it with Keras, in safe mode, not compiled.

    Args:
        where: the file, for messages.

    Raises:
        SourceError: damaged, hostile, with classes of other packages or assets, or not a model.
    """
    config, weights = _members(data, where)
    check_trusted(config, where)
    remedy = "save it again with Keras, as model.save('model.keras')"
    problem = f"{where}: Keras cannot make the model of its config"
    try:
        with (
            keras_errors(problem, remedy),
            apart(),
            keras.StatelessScope(initialize_variables=False),
        ):
            skeleton = keras.saving.deserialize_keras_object(config, safe_mode=True)
    except RecursionError:
        raise SourceError(f"{problem}: it is nested too deeply") from None
    if not isinstance(skeleton, keras.Model):
        raise SourceError(f"{where}: holds a {type(skeleton).__name__}, not a Keras model")
    _check_weights(skeleton, weights, where)
    with tempfile.TemporaryDirectory(prefix="quantfleet-keras-") as folder:
        path = Path(folder, f"model{SUFFIX}")
        path.write_bytes(data)
        with keras_errors(f"{where}: Keras cannot load it", remedy, {folder: where}), apart():
            return keras.models.load_model(path, compile=False, safe_mode=True)


def model_bytes(model: keras.Model) -> bytes:
    """A `.keras` file of a model; its bytes depend on the model alone, and on no time.

    Raises:
        LayerError: as `quantizer.save_model`.
    """
    with tempfile.TemporaryDirectory(prefix="quantfleet-keras-") as folder:
        path = Path(folder, f"model{SUFFIX}")
        save_model(model, path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    # Keras itself reads no metadata.
    metadata = json.loads(members[_METADATA])
    del metadata["date_saved"]
    members[_METADATA] = json.dumps(metadata).encode()
    # Codes of 2 and 3 bits take a byte each in memory, and less in a file.
    stored = members[_WEIGHTS]
    members[_WEIGHTS] = weights_file_bytes(read_weights_file(stored, max_bytes=len(stored)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, _NO_TIME), members[name])
    return buffer.getvalue()


def _members(data: bytes, where: str) -> tuple[dict[str, Any], bytes]:
    """The config, as JSON, and the weights file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            names = sorted(member.filename for member in members)
            others = sorted(set(names) - {_CONFIG, _METADATA, _WEIGHTS})
            if others or len(names) != len(set(names)) or not {_CONFIG, _WEIGHTS} <= set(names):
                raise SourceError(
                    f"{where}: holds {', '.join(names[:9])}, where config.json, metadata.json and "
                    "model.weights.h5 are expected; models with assets, such as vocabularies, "
                    "cannot be quantized: save the part between its text layers and its output"
                )
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED:
                    raise SourceError(
                        f"{where}: {member.filename} is compressed, which Keras does not do; save "
                        "the model again with Keras"
                    )
            if archive.getinfo(_CONFIG).file_size > _MAX_CONFIG_BYTES:
                raise SourceError(f"{where}: its config has more than {_MAX_CONFIG_BYTES} bytes")
            config, weights = json.loads(archive.read(_CONFIG)), archive.read(_WEIGHTS)
    except (zipfile.BadZipFile, ValueError, RecursionError, NotImplementedError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{where}: not a .keras file ({' '.join(str(error).split())[:200]}); older .h5 files "
            "have to be loaded and saved again with Keras, as model.save('model.keras')"
        ) from None
    if not isinstance(config, dict):
        raise SourceError(f"{where}: its config is not a JSON object")
    # What a model was compiled with is not part of the result.
    config.pop("compile_config", None)
    return config, weights


def _check_weights(skeleton: keras.Model, weights: bytes, where: str) -> None:
    """Check the weights file against the variables of the model.

    Raises:
        SourceError: it lacks variables, has others' shapes, or holds NaN or infinity.
    """
    layout = weight_layout(skeleton)
    num_elements = sum(math.prod(stored.shape) for stored in layout)
    try:
        found = read_weights_file(weights, max_bytes=_MAX_COPIES * 4 * num_elements + _SMALL_BYTES)
    except WeightsFileError as error:
        raise SourceError(f"{where}: {error}; save the model again with Keras") from None
    for stored in layout:
        value = _value(found, stored.h5_group, stored.index)
        if value is None:
            raise SourceError(
                f"{where}: lacks {stored.key}, which holds {stored.variable.path}; the file is "
                "incomplete, or of another model"
            )
        if value.shape != stored.shape:
            raise SourceError(
                f"{where}: {stored.key} has the shape {list(value.shape)}, but "
                f"{stored.variable.path} has {list(stored.shape)}"
            )
        if value.dtype.kind not in "iub" and not np.isfinite(value.astype(np.float32)).all():
            raise SourceError(
                f"{where}: {stored.variable.path} holds NaN or infinity; the model was trained or "
                "saved with a fault, and would not compute anything"
            )


def _value(found: Mapping[str, list[NDArray[Any]]], group: str, index: int) -> NDArray[Any] | None:
    arrays = found.get(group, [])
    return arrays[index] if index < len(arrays) else None
