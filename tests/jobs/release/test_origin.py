from __future__ import annotations

from pathlib import Path

import pytest

from jobs.release.origin import find_origin, front_matter
from pipeline.errors import PipelineError
from tests.jobs.release.runs import CARD, LICENSE

MIT = "MIT License\n\nCopyright\n\nPermission is hereby granted, free of charge, to any person"


def folder(path: Path, **files: str) -> str:
    path.mkdir(parents=True)
    for name, text in {"config.json": "{}", **files}.items():
        (path / name.replace("_md", ".md")).write_text(text)
    return str(path)


def test_a_source_says_its_license_and_languages_in_its_card(tmp_path: Path) -> None:
    origin = find_origin(folder(tmp_path / "model", README_md=CARD, LICENSE=MIT), {})
    assert (origin.name, origin.repository) == ("model", "")
    assert (origin.license.id, origin.license.said_by) == ("apache-2.0", "README.md")
    assert (origin.languages, origin.datasets) == (("en", "no"), ("someone/texts",))
    assert origin.legal_files == ("LICENSE",)


@pytest.mark.parametrize(
    ("text", "known"),
    [(LICENSE, "apache-2.0"), (MIT, "mit"), ("LLAMA 3.2 COMMUNITY LICENSE", "other")],
    ids=["apache", "mit", "another"],
)
def test_without_a_card_the_text_of_the_license_is_recognized(
    tmp_path: Path, text: str, known: str
) -> None:
    origin = find_origin(folder(tmp_path / "model", LICENSE=text), {})
    assert (origin.license.id, origin.license.said_by) == (known, "LICENSE")


def test_a_license_that_only_mentions_another_is_not_taken_for_it(tmp_path: Path) -> None:
    text = "Our own terms.\nParts are under the Apache License, Version 2.0, January 2004 "
    assert find_origin(folder(tmp_path / "model", LICENSE=text), {}).license.id == "other"


def test_what_the_source_does_not_say_stays_unsaid(tmp_path: Path) -> None:
    origin = find_origin(folder(tmp_path / "model"), {})
    assert origin.license.id == origin.license.said_by == ""
    assert (origin.languages, origin.datasets, origin.legal_files) == ((), (), ())


def test_of_several_licenses_none_is_chosen(tmp_path: Path) -> None:
    card = "---\nlicense: [mit, apache-2.0]\n---\n"
    assert find_origin(folder(tmp_path / "model", README_md=card), {}).license.id == ""


def test_a_folder_of_the_hubs_cache_tells_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--someone--small-model" / "snapshots" / ("0a" * 20)
    origin = find_origin(folder(snapshot), {})
    assert origin.name == origin.repository == "someone/small-model"


def test_a_source_that_is_gone_is_known_by_what_came_along(tmp_path: Path) -> None:
    origin = find_origin(str(tmp_path / "gone" / "model"), {"LICENSE": MIT.encode()})
    assert (origin.name, origin.license.id) == ("model", "mit")
    assert len(origin.notes) == 1
    assert str(tmp_path) not in origin.notes[0]


@pytest.mark.parametrize(
    "head",
    ["license: *missing", "a: &a [*a]\nlicense: mit", "license: !!python/name:os.system", "- mit"],
    ids=["no such anchor", "recursive", "object", "list"],
)
def test_metadata_that_cannot_be_trusted_is_left_out(tmp_path: Path, head: str) -> None:
    card = f"---\n{head}\n---\n"
    origin = find_origin(folder(tmp_path / "model", README_md=card), {})
    assert origin.license.id in ("", "mit")
    if "*missing" in head or "!!" in head:
        assert "README.md was left out" in origin.notes[0]


@pytest.mark.parametrize(
    "value", ["'Apache 2.0'", "'mit\\nmalicious: true'", "'<script>'", "{a: b}", "7"]
)
def test_a_license_that_is_no_name_of_one_is_not_carried(tmp_path: Path, value: str) -> None:
    card = f"---\nlicense: {value}\n---\n"
    assert find_origin(folder(tmp_path / "model", README_md=card), {}).license.id == ""


def test_front_matter_must_be_text() -> None:
    assert front_matter(b"# No head\n---\nlicense: mit\n---\n") == {}
    with pytest.raises(PipelineError, match="UTF-8"):
        front_matter(b"---\nlicense: \xff\n---\n")
