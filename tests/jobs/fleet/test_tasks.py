"""A catalog's tasks are read before any work, answered once, and limited by its gate."""

from __future__ import annotations

import json
from pathlib import Path

from jobs.publish.verdict import find_verdict
from pipeline.run.evaluations import find_evaluations
from pipeline.storage.object_store import open_store
from tests.jobs.fleet.tiny_catalog import tiny_catalog

QUESTIONS = [
    {"question": f"The fox jumps {number} times over the", "choices": ["dog", "box"], "answer": 0}
    for number in range(1, 9)
]


def test_tasks_are_refused_answered_and_limited(tmp_path: Path) -> None:
    with tiny_catalog(tmp_path) as catalog:
        questions = catalog.folder / "texts" / "foxes.jsonl"
        broken = [*QUESTIONS[:3], {**QUESTIONS[3], "answer": 2}]
        questions.write_text("".join(f"{json.dumps(row)}\n" for row in broken))
        gate = {"max_flips": 1.0}
        catalog.add("alpha", ["int8"], tasks=["texts/foxes.jsonl"], gate=gate)
        code, found = catalog.nightly()
        assert code != 0
        assert "foxes.jsonl:4: 'answer' is '2', but there are 2 choices" in str(found)
        assert catalog.work.solves == catalog.work.calls["evaluate"] == 0

        questions.write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS))
        code, found = catalog.nightly()
        assert code == 0, catalog.err
        assert found["alpha int8"]["result"] == "published"
        release = catalog.current("alpha", "int8")["release"]
        [task] = release["quality"]["tasks"]
        assert (task["name"], task["num_questions"]) == ("foxes", 8)
        assert release["quality"]["source_perplexity"] is None
        run = open_store(str(catalog.folder / "results" / "runs" / release["run_id"]))
        [evaluation] = find_evaluations(run, release["manifest_sha256"])
        assert list(evaluation.measured_on["tasks"]) == ["foxes"]
        assert evaluation.figures["tasks"] == [task]

        # A limit that nothing meets: what is known is not measured again.
        gate |= {"min_recovery": 100.0}
        before = catalog.work.calls["evaluate"]
        code, found = catalog.nightly()
        assert code == 5
        verdict = find_verdict(catalog.root, found["alpha int8"]["request_id"])
        assert verdict is not None
        assert any(text.startswith("task foxes: ") for text in verdict.failures)
        assert catalog.work.calls["evaluate"] == before == 1
