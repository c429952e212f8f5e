"""Run as a script in an environment with GPTQModel: the logits of exported checkpoints.

    python gptqmodel_reader.py

Standard input is a JSON list of {"folder", "inputs", "outputs"}, as for `transformers_reader`.
"""

import json
import sys

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel


def main():
    """Load and run the checkpoints listed on standard input."""
    torch.set_num_threads(1)
    for job in json.load(sys.stdin):
        # Its kernels take no float32.
        options = {"device": "cpu", "backend": BACKEND.TORCH, "dtype": torch.float16}
        model = GPTQModel.load(job["folder"], **options).model
        if not any(hasattr(module, "qweight") for module in model.modules()):
            raise SystemExit(f"{job['folder']}: no layer is quantized")
        token_ids = torch.from_numpy(np.load(job["inputs"])).long()
        with torch.no_grad():
            np.save(job["outputs"], model(token_ids).logits.float().numpy())


if __name__ == "__main__":
    main()
