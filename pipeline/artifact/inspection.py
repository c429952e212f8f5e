"""Look a finished preset over before Keras reads it: Keras' safe mode stops code, but no bombs.

An artifact may have come from anywhere, and a manifest vouches only for its bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from pipeline.artifact.parts import INDEX_FILE, cut_parts, decode_part, weights_index
from pipeline.artifact.shard_file import read_shard
from pipeline.errors import ArtifactError
from pipeline.source.blocks import find_blocks
from pipeline.source.preset import read_preset
from pipeline.source.skeleton import build_skeleton
from pipeline.source.trusted import check_trusted

_TASK_WEIGHTS = "task.weights.h5"


def inspect_artifact(folder: Path) -> None:
    """Make sure that a preset holds nothing but a model of KerasHub's.

    Its JSON names Keras' and KerasHub's own classes alone; its weights files hold exactly the
    model's variables, and no more bytes than those take.

    Raises:
        PipelineError: something else, by file.
    """
    preset = read_preset(str(folder))
    for name, data in sorted(preset.json_files.items()):
        if name == INDEX_FILE:
            continue
        try:
            check_trusted(json.loads(data), f"{folder}/{name}")
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{folder}/{name}: {error}") from error
    skeleton = build_skeleton(preset)
    blocks = [block.layer for block in find_blocks(skeleton).blocks]
    parts = cut_parts(skeleton.stored, blocks)
    if preset.json_files.get(INDEX_FILE) != weights_index(parts):
        raise ArtifactError(f"{folder}/{INDEX_FILE}: not the index of this model's files")
    known = {part.file for part in parts} | {_TASK_WEIGHTS}
    for name in sorted(preset.sizes):
        if name.endswith((".h5", ".safetensors", ".bin", ".keras", ".pkl")) and name not in known:
            raise ArtifactError(f"{folder}/{name}: a weights file that the model does not have")
    for part in parts:
        decode_part(part, (folder / part.file).read_bytes())
    if _TASK_WEIGHTS in preset.sizes:
        # At most all of the model, in its widest dtype.
        most = sum(4 * math.prod(variable.shape) for variable in skeleton.model.variables)
        read_shard((folder / _TASK_WEIGHTS).read_bytes(), max_bytes=most)
