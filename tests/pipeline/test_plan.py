import dataclasses
import json

import pytest

from pipeline.canonical import canonical_json
from pipeline.plan import Plan
from pipeline.storage.record import RecordError
from tests.pipeline.tiny_runs import planned


def test_a_plan_survives_storage() -> None:
    for scheme in ("gptq", "int8"):
        plan = planned(scheme).plan
        assert Plan.from_json(plan.to_json()) == plan
        assert Plan.from_json(plan.to_json()).digest == plan.digest


def test_the_digest_covers_all_that_decides_bytes() -> None:
    plan = planned("gptq").plan
    assert plan.tokens is not None
    others = [
        dataclasses.replace(plan, source_files_sha256="0" * 64),
        dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"name": "x"})),
        dataclasses.replace(plan, tokens=dataclasses.replace(plan.tokens, digest="0" * 64)),
        dataclasses.replace(plan, tokens=None),
        dataclasses.replace(plan, parts=plan.parts[:-1]),
        dataclasses.replace(plan, machine={**plan.machine, "threads": "3"}),
        dataclasses.replace(plan, versions={**plan.versions, "jax": "0"}),
        dataclasses.replace(plan, policies={}),
    ]
    digests = {plan.digest, *(other.digest for other in others)}
    assert len(digests) == len(others) + 1
    assert dataclasses.replace(plan, source_url="elsewhere").digest == plan.digest


def test_other_content_is_reported_as_damage() -> None:
    data = planned("gptq").plan.to_json()
    values = json.loads(data)
    cases = [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        data[:-1],
        data.replace(b'"parts"', b'"party"'),
        data + b"\n",
        canonical_json(values | {"extra": 1}),
        canonical_json(values | {"parts": 3}),
        canonical_json(values | {"machine": {"threads": 2}}),
        json.dumps(values, indent=1).encode(),
    ]
    for case in cases:
        with pytest.raises(RecordError, match=r"not JSON|not a record|digest|version") as raised:
            Plan.from_json(case)
        assert "\n" not in str(raised.value)
