"""GPTQModel on one job of `quality.peers`; runs in an environment of its own.

    python -P peer_gptqmodel.py JOB.json

JOB.json: model, tokens (.npy, [windows, length]), bits, group_size, options, output.
"""

# mypy: disable-error-code="import-not-found"
# The environment of the tests has none of these packages.

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

if (os.cpu_count() or 1) < 3:
    # Its own choice there, one worker, is one too few for it to start.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tokens = np.load(job["tokens"]).tolist()
    # Everything else is its default, which is group-aware activation order.
    config = QuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        sym=False,
        format="gptq_v2",  # the one that stores every zero point
        device="cpu",
        offload_to_disk=False,
        wait_for_submodule_finalizers=True,  # or packing goes on after `quantize`, unmeasured
        **job["options"],
    )
    model = GPTQModel.load(job["model"], config, dtype=torch.float32)
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in tokens]
    began = time.perf_counter()
    model.quantize(rows, calibration_sort=None, batch_size=1)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        # The kernel takes no float32; and scales are saved as float16 in any case.
        saved = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        weights = _effective_weights(saved.model)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, job["output"])
    print(json.dumps({"seconds": seconds}))


def _effective_weights(model: Any) -> dict[str, torch.Tensor]:
    """What each quantized layer multiplies by, [out_features, in_features]."""
    with torch.inference_mode():
        return {
            f"{name}.weight": layer(torch.eye(layer.in_features, dtype=torch.float16)).T.float()
            for name, layer in model.model.layers.named_modules(prefix="model.layers")
            if isinstance(layer, BaseQuantLinear)
        }


if __name__ == "__main__":
    main()
