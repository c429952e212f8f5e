"""A result that fails its gate is never published; a person may roll back and promote."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.jobs.fleet.tiny_catalog import TinyCatalog, tiny_catalog


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyCatalog]:
    """One model in int8 under the recipe's name "best", with a gate that it keeps."""
    with tiny_catalog(tmp_path_factory.mktemp("catalog")) as catalog:
        catalog.add(
            "alpha",
            [best(mode="int8")],
            evaluate_on=["texts/other.txt"],
            windows=1,
            gate={"max_divergence": 0.01},
            retention={"keep": 1},
        )
        code, found = catalog.nightly()
        assert (code, found["alpha best"]["result"]) == (0, "published"), catalog.err
        yield catalog


def best(**scheme: object) -> dict[str, object]:
    texts = {"texts": ["texts/english.txt"], "num_samples": 4, "sequence_length": 64}
    return {"name": "best", "scheme": scheme, "calibration": texts}


def test_gate_rollback_promote_and_gc(published: TinyCatalog) -> None:
    """In one test, since each step builds on those before."""
    catalog, [model] = published, published.values["models"]
    first = catalog.current("alpha", "best")

    # A bad recipe does not pass: what was published stays, and the code and the report say why.
    model["recipes"] = [best(mode="gptq", weight_bits=2, group_size=-1)]
    code, found = catalog.nightly()
    assert code == 5
    assert found["alpha best"]["result"] == "gate failed"
    assert "divergence" in found["alpha best"]["text"]
    assert "more than 0.01" in found["alpha best"]["text"]
    assert catalog.current("alpha", "best") == first
    verdicts = catalog.root.list("verdicts/")
    judged = [json.loads(catalog.root.get(key))["content"] for key in verdicts]
    [bad] = [one for one in judged if one["failures"]]
    assert catalog.root.exists(f"runs/{bad['run_id']}/manifest.json")
    assert bad["quality"]["divergence"] > 0.01

    # It would only fail again, so it is reported and not done again.
    catalog.work.opened = 0
    code, found = catalog.nightly()
    assert (code, found["alpha best"]["result"]) == (5, "gate failed")
    assert catalog.work.opened == 0
    # Another gate judges it by the figures that are known, though it was never released.
    catalog.work.calls.clear()
    model["gate"] = {"max_divergence": 0.011}
    code, found = catalog.nightly()
    assert (code, found["alpha best"]["result"]) == (5, "gate failed")
    assert "more than 0.011" in found["alpha best"]["text"]
    assert catalog.work.calls["evaluate"] == 0
    model["gate"] = {"max_divergence": 0.01}
    request = f"{catalog.root.root_url}/requests/{bad['request_id']}.json"
    code, printed = catalog.call("fulfil", request)
    assert code == 5
    assert printed["releases"] == []
    assert "what was published before stays" in catalog.err

    # It was never published, so it cannot be promoted either.
    root = catalog.root.root_url
    assert catalog.call("promote", root, "alpha", "best", bad["run_id"])[0] == 2
    assert "was never published as alpha in best" in catalog.err

    # A wider gate lets it pass: judged anew, not quantized anew.
    catalog.work.calls.clear()
    model["gate"] = {"max_divergence": 100.0}
    code, found = catalog.nightly()
    assert (code, found["alpha best"]["result"]) == (0, "published")
    assert catalog.work.solves == 0
    second = catalog.current("alpha", "best")
    assert second["release"]["number"] == 2
    assert second["release"]["run_id"] == bad["run_id"]

    # Moved back by hand, it stays so, though the catalog wants the other.
    code, moved = catalog.call("rollback", root, "alpha", "best")
    assert code == 0
    assert moved["release"] == first["release"]
    assert moved["set_aside"] == [bad["run_id"]]
    code, found = catalog.nightly()
    assert (code, found["alpha best"]["result"]) == (0, "set aside")
    assert f"quantfleet promote {root} alpha best {bad['run_id']}" in found["alpha best"]["text"]
    assert catalog.current("alpha", "best") == moved
    assert catalog.call("rollback", root, "alpha", "best")[0] == 2
    assert "no release before the current one" in catalog.err

    # And forth again.
    code, moved = catalog.call("promote", root, "alpha", "best", bad["run_id"])
    assert (code, moved["release"]) == (0, second["release"])
    assert catalog.nightly()[1]["alpha best"]["result"] == "up to date"

    # With one release to keep, the first may be collected; until then nothing is lost.
    first_run = first["release"]["run_id"]
    code, swept = catalog.call("gc", root)
    assert code == 0
    gone = [one["url"] for one in swept if one["garbage"] and "release" in str(one["garbage"])]
    assert gone == [f"{root}/runs/{first_run}"]
    assert catalog.root.exists(f"runs/{first_run}/manifest.json")
    assert catalog.call("gc", root, "--delete")[0] == 0
    assert catalog.root.list(f"runs/{first_run}/") == ()
    assert catalog.root.exists(f"runs/{bad['run_id']}/manifest.json")
    assert catalog.call("rollback", root, "alpha", "best")[0] == 4
    assert "the artifact of release 1 is gone" in catalog.err
    assert catalog.current("alpha", "best")["release"] == second["release"]
    assert catalog.nightly()[1]["alpha best"]["result"] == "up to date"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("alpha", "int8"), "nothing was ever published as alpha in int8"),
        (("../alpha", "best"), "is not a valid model name"),
        (("alpha", "a/b"), "is not a valid recipe name"),
    ],
)
def test_rollback_rejects_names_that_were_never_published(
    published: TinyCatalog, arguments: tuple[str, str], message: str
) -> None:
    assert published.call("rollback", published.root.root_url, *arguments)[0] == 2
    assert message in published.err
