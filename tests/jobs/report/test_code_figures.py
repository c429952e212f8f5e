from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from jobs.release.contents import read_run
from jobs.report.code_figures import logged_histograms, worst_codes
from jobs.report.run_report import run_report
from pipeline.run.code_histograms import CodeHistogram
from pipeline.storage.object_store import ObjectStore
from tests.jobs.release.runs import copied
from tests.jobs.report.test_figures import layer
from tests.jobs.report.test_timeline import event


def counts(weight: int, num_bins: int = 32) -> CodeHistogram:
    """Of some layer: the middle bins hold most."""
    middle = num_bins // 2
    codes = tuple(weight * (middle - abs(i - middle)) for i in range(num_bins))
    scales = tuple(max(0, 8 - abs(i - 12)) for i in range(24))
    lowest = -128 if num_bins == 32 else 0
    return CodeHistogram(lowest=lowest, codes=codes, ends=(0, weight), scale=0.01, scales=scales)


def test_the_worst_by_rounding_s_error_come_first_and_no_more_than_six() -> None:
    layers = [layer(0, f"l{i}", 0.1 * i) for i in range(9)]
    histograms = {one.path: counts(1) for one in layers if one.name != "l8"}
    found = worst_codes(layers, histograms)
    # The worst of all is not shown, since no log tells of its codes.
    assert [one.layer.name for one in found] == ["l7", "l6", "l5", "l4", "l3", "l2"]
    assert [one.codes.name for one in found] == [f"codes-{i}" for i in range(1, 7)]


def test_of_equals_and_without_calibration_the_weights_error_decides() -> None:
    alike = [layer(0, "a", 4.0, weight_error=0.1), layer(0, "b", 4.0, weight_error=0.2)]
    alone = [layer(0, "c", None, weight_error=0.1), layer(0, "d", None, weight_error=0.3)]
    histograms = {one.path: counts(1) for one in alike + alone}
    assert [one.layer.name for one in worst_codes(alike + alone, histograms)] == ["b", "a"]
    assert [one.layer.name for one in worst_codes(alone, histograms)] == ["d", "c"]
    assert worst_codes(alike, {}) == ()


def test_bars_are_shares_of_all_weights_and_of_all_scales() -> None:
    histogram = counts(3, num_bins=8)
    [found] = worst_codes([layer(0, "a", 1.0)], {"0/a": histogram})
    values = found.codes.spec["data"]["values"]
    assert [(one["from"], one["to"], one["code"]) for one in values[:2]] == [
        (-0.5, 0.5, "0"),
        (0.5, 1.5, "1"),
    ]
    assert [one["count"] for one in values] == list(histogram.codes)
    assert abs(sum(one["share"] for one in values) - 1) < 1e-3
    scales = found.scales.spec["data"]["values"]
    assert (scales[0]["from"], scales[12]["from"], scales[-1]["to"]) == (0.125, 1.0, 8.0)
    assert (scales[0]["scale"], scales[-1]["scale"]) == ("below 0.15", "above 6.73")
    assert found.share_at_ends == (0.0, 3 / histogram.num_weights)
    eights = worst_codes([layer(0, "a", 1.0)], {"0/a": counts(1)})[0].codes.spec["data"]["values"]
    assert (eights[0]["code"], eights[-1]["code"]) == ("-128 to -121", "120 to 127")


def test_the_last_word_of_the_logs_counts_and_what_is_none_is_left_out() -> None:
    old, new = counts(1).to_dict(), counts(2).to_dict()
    logs = [
        (event(9, "committed", histograms={"a": new, "b": {"codes": [1]}, "c": 3}),),
        (event(1, "committed", histograms={"a": old}), event(2, "committed", histograms=[old])),
    ]
    assert logged_histograms(logs) == {"a": counts(2)}


def logged(run: ObjectStore, histograms: dict[str, Any]) -> str:
    """The page of a run one more of whose drivers told of these layers."""
    line = {
        "time": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).isoformat(),
        "event": "committed",
        "part": 1,
        "histograms": histograms,
    }
    run.put("events/of-codes.jsonl", json.dumps(line).encode())
    return run_report(read_run(run, run.root_url)).decode()


def test_a_page_shows_codes_only_of_layers_that_a_log_tells_of(tmp_path: Path) -> None:
    run = copied(tmp_path / "run")
    layers = [one.path for one in read_run(run, run.root_url).layers if one.scheme is not None]
    before = run_report(read_run(run, run.root_url)).decode()
    assert "Codes and scales" not in before
    assert 'id="codes-1"' not in before
    some = {path: counts(1, num_bins=16).to_dict() for path in layers[:2]}
    page = logged(run, some | {"<b>no layer</b>": counts(1).to_dict()})
    assert "Codes and scales of the 2 layers that lost most" in page
    assert f"tells of the codes of 2 of {len(layers)} layers" in page
    assert page.count('data-figure="codes-') == page.count('data-figure="scales-') == 2
    assert "no layer" not in page
    whole = logged(run, {path: counts(1, num_bins=16).to_dict() for path in layers})
    assert "tells of the codes of" not in whole
    assert whole.count('data-figure="codes-') == min(6, len(layers))
