from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.release.contents import read_run
from jobs.report.comparison import comparison
from jobs.report.comparison_figures import Point, pareto_figure, pareto_front, ratio_figure
from pipeline.canonical import digest_of
from pipeline.run.worst_windows import WorstWindows
from pipeline.storage.object_store import ObjectStore, open_store
from tests.jobs.release.runs import copied, evaluate
from tests.jobs.report.test_figures import layer


def keep_lost(run: ObjectStore, *lost: float | None) -> None:
    """Keep what every window lost, beside the run's one evaluation."""
    [evaluation] = read_run(run, run.root_url).evaluations
    WorstWindows(
        manifest_sha256=evaluation.manifest_sha256,
        evaluation=digest_of(evaluation.measured_on),
        windows=(),
        lost={"": lost},
    ).save(run)


@pytest.fixture
def two(tmp_path: Path) -> dict[str, ObjectStore]:
    """The same result twice, as if the second had lost more."""
    first = copied(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    second = open_store(str(tmp_path / "second"))
    return {one.root_url: one for one in (first, second)}


def row(text: str, label: str) -> list[str]:
    """The cells of a row of a table."""
    line = next(one for one in text.splitlines() if f'<th scope="row">{label}</th>' in one)
    return [cell.partition("</td>")[0] for cell in line.split("<td>")[1:]]


def test_runs_are_compared_by_what_both_were_evaluated_on(two: dict[str, ObjectStore]) -> None:
    first, second = two.values()
    assert "No two of these runs were evaluated on the same texts" in comparison(two).decode()
    evaluate(first, 22.0)
    assert "No two of these runs" in comparison(two).decode()
    evaluate(second, 25.0)
    keep_lost(first, 0.1, 0.2, 0.3, None)
    keep_lost(second, 0.2, 0.4, 0.2, 0.9)
    text = comparison(two).decode()
    assert row(text, "perplexity") == ["20", "22", "25"]
    assert row(text, "layers") == ["14 × int4/16"] * 2
    assert row(text, "B") == ["all", "+0.0667", "0.0882", "1 of 3", "no"]
    assert 'id="pareto"' in text
    assert "of different sources" not in text


def test_differences_beyond_chance_are_told_apart(two: dict[str, ObjectStore]) -> None:
    first, second = two.values()
    evaluate(first)
    evaluate(second)
    keep_lost(first, 0.1, 0.2, 0.3)
    keep_lost(second, 0.04, 0.15, 0.24)
    assert row(comparison(two).decode(), "B")[-2:] == ["3 of 3", "yes"]
    keep_lost(second, 0.1)  # of other windows
    assert "Window by window" not in comparison(two).decode()


def test_the_front_holds_what_no_other_beats_in_both() -> None:
    points = [
        Point(name=name, recipe=name, stored_bytes=stored, loss=loss)
        for name, stored, loss in (
            ("A", 4, 0.1),
            ("B", 3, 0.2),
            ("C", 3, 0.3),
            ("D", 5, 0.1),
            ("E", 2, 0.9),
            ("F", 6, 0.05),
        )
    ]
    assert [one.name for one in pareto_front(points)] == ["E", "B", "A", "F"]
    found = pareto_figure(points, "loss")
    assert found is not None
    assert len(found.spec["layer"][1]["data"]["values"]) == 6
    assert pareto_figure(points[:1], "loss") is None


def test_layers_of_both_runs_are_compared_and_equal_ones_lie_in_the_middle() -> None:
    first = [layer(0, "a", 2.0), layer(0, "b", 4.0), layer(1, "a", None), layer(None, "c", 1.0)]
    second = [layer(0, "a", 1.0), layer(0, "b", 16.0), layer(1, "a", 3.0), layer(None, "c", 2.0)]
    found = ratio_figure(first, second)
    assert found is not None
    values = found.spec["data"]["values"]
    assert [(v["block"], v["layer"], v["ratio"]) for v in values] == [(0, "a", 0.5), (0, "b", 4.0)]
    assert found.spec["encoding"]["color"]["scale"]["domain"] == [0.25, 4.0]
    assert ratio_figure(first, [layer(7, "x", 1.0)]) is None


def test_the_command_needs_a_place_and_other_runs(
    two: dict[str, ObjectStore], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = list(two)
    page = tmp_path / "page.html"
    for arguments, said in (
        (urls, "with --to FILE.html"),
        ([urls[0], urls[0], "--to", str(page)], "given more than once"),
        ([*urls, str(tmp_path / "nothing"), "--to", str(page)], "nothing"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["report", *arguments])
        assert stopped.value.code in (2, 4)
        [told] = capsys.readouterr().err.splitlines()
        assert said in told
        assert not page.exists()
    with pytest.raises(SystemExit) as stopped:
        main(["report", *urls, "--to", str(page), "--json"])
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out) == {
        "url": str(page),
        "size_bytes": page.stat().st_size,
    }
