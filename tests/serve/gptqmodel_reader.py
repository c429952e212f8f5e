"""Run as a script in an environment with GPTQModel: the logits of exported checkpoints.

    python gptqmodel_reader.py

Standard input is a JSON list of {"folder", "inputs", "outputs"}, as for `transformers_reader`.
The last line of standard output is a JSON list: the number of quantized layers of each.
"""

import json
import sys

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel


def main():
    """Load and run the checkpoints listed on standard input."""
    torch.set_num_threads(1)
    counts = []
    for job in json.load(sys.stdin):
        # Its kernels take no float32.
        options = {"device": "cpu", "backend": BACKEND.TORCH, "dtype": torch.float16}
        model = GPTQModel.load(job["folder"], **options).model
        counts.append(sum(hasattr(module, "qweight") for module in model.modules()))
        if not counts[-1]:
            raise SystemExit(f"{job['folder']}: no layer is quantized")
        token_ids = torch.from_numpy(np.load(job["inputs"])).long()
        with torch.no_grad():
            np.save(job["outputs"], model(token_ids).logits.float().numpy())
    sys.stdout.write("\n" + json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
