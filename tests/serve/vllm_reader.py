"""Run as a script in an environment with vLLM: what it makes of exported checkpoints.

    python vllm_reader.py

Standard input is a JSON list of {"folder", "dtype", "inputs", "prompt"}: a checkpoint, the dtype to
compute in, a file of token ids [windows, length], and a text. The last line of standard output is a
JSON list of {"perplexity", "text", "layers"}: over the windows, what follows the prompt, and the
class that multiplies with each kind of quantized layer.
"""

import json
import math
import os
import sys

import numpy as np

# Its workers are threads of this process, whose output is ours.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def schemes(model):
    """The class of each quantized layer's scheme, and of the kernel that it chose."""
    found = set()
    for module in model.modules():
        scheme = getattr(module, "scheme", None)
        if scheme is not None:
            kernel = getattr(scheme, "kernel", None)
            found.add(" ".join(type(one).__name__ for one in (scheme, kernel) if one is not None))
    return sorted(found)


def answer(job):
    """Load one checkpoint, and run it."""
    from vllm import LLM, SamplingParams

    windows = np.load(job["inputs"])
    length = windows.shape[1] + 1
    options = {"dtype": job["dtype"], "max_model_len": length, "max_num_seqs": 1}
    model = LLM(job["folder"], enforce_eager=True, **options)
    greedy = SamplingParams(max_tokens=12, temperature=0)
    text = model.generate([job["prompt"]], greedy, use_tqdm=False)[0].outputs[0].text
    prompts = [{"prompt_token_ids": row.tolist()} for row in windows]
    scored = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = model.generate(prompts, scored, use_tqdm=False)
    logs = [
        by_token[int(token)].logprob
        for row, output in zip(windows, outputs, strict=True)
        for token, by_token in zip(row[1:], output.prompt_logprobs[1:], strict=True)
    ]
    [layers] = model.apply_model(schemes)
    return {"perplexity": math.exp(-np.mean(logs)), "text": text, "layers": layers}


def main():
    """Answer the jobs on standard input."""
    answers = [answer(job) for job in json.load(sys.stdin)]
    sys.stdout.write("\n" + json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
