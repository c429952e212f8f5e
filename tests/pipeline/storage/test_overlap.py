"""An output that would change its source, or that holds it, is refused however it is spelled."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.storage.overlap import check_apart


@pytest.mark.parametrize(
    ("source", "output", "how"),
    [
        ("s3://bucket/model", "s3://bucket/model/quantized", "inside the preset's own folder"),
        ("s3://bucket/model/", "s3a://bucket/model/out/", "inside the preset's own folder"),
        ("s3://bucket", "s3://bucket/out", "inside the preset's own folder"),
        ("s3://bucket/model", "s3://bucket/model/", "is the preset itself"),
        ("s3://bucket/runs/model", "s3://bucket/runs", "holds the preset"),
        ("memory://m", "memory://m/out", "inside the preset's own folder"),
    ],
)
def test_urls_that_overlap_are_refused(source: str, output: str, how: str) -> None:
    with pytest.raises(PipelineError, match=how) as raised:
        check_apart(source, output)
    assert str(raised.value).startswith(f"{output}: ")
    assert "beside the preset" in str(raised.value)


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("s3://bucket/model", "s3://bucket/model-quantized"),
        ("s3://bucket/a/model", "s3://bucket/b/model"),
        ("s3://bucket/model", "/bucket/model"),
        ("s3://one/model", "s3://two/model/out"),
        ("s3://one/model", "gs://one/model/out"),
    ],
)
def test_neighbours_are_not(source: str, output: str) -> None:
    check_apart(source, output)
    check_apart(output, source)


def test_local_paths_are_the_same_through_links_and_however_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "models" / "model"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "out").symlink_to(model / "later")  # nothing is there yet
    monkeypatch.chdir(model)
    monkeypatch.setenv("HOME", str(tmp_path))
    inside = (
        "quantized",
        "./a/b/",
        "../model/quantized",
        f"{tmp_path}/link/quantized",
        f"file://{model}/quantized",
        f"file://{tmp_path}/link/quantized/",
        f"{tmp_path}/out",
        "~/link/quantized",
    )
    for output in inside:
        for source in (str(model), ".", f"file://{model}/", f"{tmp_path}/link"):
            with pytest.raises(PipelineError, match="inside the preset's own folder"):
                check_apart(source, output)
    for output in (".", f"{tmp_path}/link/", f"file://{model}"):
        with pytest.raises(PipelineError, match="is the preset itself"):
            check_apart(str(model), output)
    with pytest.raises(PipelineError, match="holds the preset"):
        check_apart(f"{tmp_path}/link", "..")
    for output in ("../quantized", f"{model}-4bit", f"{tmp_path}/elsewhere"):
        check_apart(".", output)
