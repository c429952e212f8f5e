"""Which quantizer, at which setting, is better, on which text, and by how many standard errors.

    python -m tests.benchmarks.quality run --results DIR --draws 0 1 2 'quantfleet 3' 'rounding 3'
    python -m tests.benchmarks.quality table --results DIR
    python -m tests.benchmarks.quality compare --results DIR 'quantfleet 3' 'quantfleet 3 {…}'

`rows` says how a row is written. Every row quantizes the blocks of SmolLM2-135M-Instruct, dithered,
from the same float32 weights and the same calibration windows, draw by draw. One judge runs all
results on the same windows of four kinds of text beside the float model: perplexity, the divergence
of their next-token distributions (KL, nats: mean and 99th percentile), and how often the likeliest
token is another. Three kinds are unlike any calibration text; they come from Debian's packages,
downloaded at the first run. `--quick` takes about a minute a row.
"""
