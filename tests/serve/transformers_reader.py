"""Run as a script in an environment with transformers: the outputs of exported checkpoints.

    python transformers_reader.py

Standard input is a JSON list of {"folder", "inputs", "outputs"}: a checkpoint, a file of token ids,
and where to save the logits for them (of a base model, its last hidden states); or of {"folder",
"texts"}. The last line of standard output is a JSON list: the class of each model, or each text's
token ids.
"""

import json
import sys

import numpy as np
import torch
import transformers


def load(folder):
    """The model that config.json names, with every weight from the checkpoint."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    # Its other implementations leave out Gemma 2's soft caps.
    options = {"dtype": "auto", "attn_implementation": "eager"}
    model, found = model_class.from_pretrained(folder, **options, output_loading_info=True)
    wrong = {name: sorted(keys) for name, keys in found.items() if keys}
    # A base model's pooler has no counterpart in KerasHub's backbone.
    missing = [key for key in wrong.pop("missing_keys", []) if "pooler" not in key]
    if missing or wrong:
        raise SystemExit(f"{folder}: not loaded whole: missing {missing}, {wrong}")
    return model.eval()


def main():
    """Load and run the checkpoints listed on standard input."""
    torch.set_num_threads(1)
    described = []
    for job in json.load(sys.stdin):
        if "texts" in job:
            tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
            described.append([tokenizer(text).input_ids for text in job["texts"]])
            continue
        model = load(job["folder"])
        token_ids = torch.from_numpy(np.load(job["inputs"])).long()
        with torch.no_grad():
            more = {"decoder_input_ids": token_ids} if model.config.is_encoder_decoder else {}
            answer = model(token_ids, **more)
        values = answer.logits if hasattr(answer, "logits") else answer.last_hidden_state
        np.save(job["outputs"], values.float().numpy())
        described.append(type(model).__name__)
    sys.stdout.write(json.dumps(described) + "\n")


if __name__ == "__main__":
    main()
