"""The pair of blocks without Ray and the command line, for machines where Ray is not installed.

    python -m tests.cuda.pair_local MODEL RECIPE OUTPUT DEVICE DTYPE

One worker in this process does the same work, one call after another: nothing is read or committed
beside it. Prints what `quantfleet quantize --json` does, as far as `pair` reads it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from jobs.room import place_activations
from pipeline.executor.protocol import Allocation
from pipeline.executor.worker_environment import worker_environment


def main() -> None:
    model, recipe_file, output, device, dtype = sys.argv[1:]
    threads = os.cpu_count() or 1
    allocation = Allocation(workers=1, threads=threads, gpus=int(device == "gpu"))
    # Before JAX is imported.
    os.environ |= worker_environment(allocation)

    import jax

    from pipeline.machine import check_device
    from pipeline.model.preset import read_preset
    from pipeline.planning.estimates import estimate
    from pipeline.planning.make_plan import make_plan
    from pipeline.recipe.recipe_file import load_recipe
    from pipeline.run.claim import claim
    from pipeline.run.driver import quantize
    from pipeline.run.events import EventLog
    from pipeline.storage.object_store import open_store
    from pipeline.worker.device_memory import device_memory
    from pipeline.worker.worker import Worker
    from tests.pipeline.local_executor import LocalExecutor

    check_device()
    recipe = load_recipe(recipe_file).model_copy(update={"dtype": dtype})
    planned = make_plan(read_preset(model), recipe, threads=threads)
    Path(output).mkdir(parents=True, exist_ok=True)
    store = open_store(output)
    assert planned.windows is not None
    plan = claim(store, planned.plan, planned.windows.to_bytes())
    costs = place_activations(estimate(plan, 1, jax.local_device_count()), [device_memory()])
    start = time.monotonic()
    log = EventLog(store, plan, allocation)
    worker = Worker(plan, model, output)
    quantize(
        plan,
        store,
        LocalExecutor([worker]),
        log.also(lambda step: None),
        place=lambda workers: costs.activations,
    )
    print(
        json.dumps(
            {
                "wall_seconds": time.monotonic() - start,
                "device_bytes": costs.device_bytes,
                "device_peak_bytes": device_memory().peak_bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
