"""Packages of Debian: their files are read without installing them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.models.debian import package_files
from tests.models.test_r_strings import entry, serialized
from tests.models.texts import novels

pytestmark = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs Debian's dpkg-deb")


def build(package: str, files: dict[str, bytes], tmp_path: Path) -> Path:
    """A package as `apt-get download` leaves it in the cache."""
    root, cache = tmp_path / package, tmp_path / "cache"
    (root / "DEBIAN").mkdir(parents=True)
    cache.mkdir()
    (root / "DEBIAN/control").write_text(
        f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: M <m@m.example>\n"
        "Description: D\n"
    )
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    command = ["dpkg-deb", "--build", "-Zgzip", str(root), str(cache / f"{package}_1_all.deb")]
    subprocess.run(command, check=True, capture_output=True)
    return cache


def test_files_are_found_by_path_in_order(tmp_path: Path) -> None:
    files = {"usr/doc/b.txt": b"2", "usr/doc/a.txt": b"1", "usr/doc/c.html": b"3"}
    cache = build("manual", files, tmp_path)
    found = package_files("manual", r"\.txt$", cache)
    assert list(found.items()) == [("./usr/doc/a.txt", b"1"), ("./usr/doc/b.txt", b"2")]
    with pytest.raises(RuntimeError, match=r"no file matches \\\.pdf\$; another version"):
        package_files("manual", r"\.pdf$", cache)


def test_novels_to_judge_by_are_not_those_to_calibrate_on(tmp_path: Path) -> None:
    books = ("EMMA", "MANSFIELD PARK", "NORTHANGER ABBEY", "Persuasion", "PRIDE", "SENSE")
    content = b"".join(
        entry(serialized([title.encode(), b"", f"{title} {'word ' * 900}".encode(), b""]))
        for title in books
    )
    cache = build("r-cran-janeaustenr", {"usr/lib/data/Rdata.rdb": content}, tmp_path)
    judged, calibrated = novels(cache), novels(cache, for_calibration=True)
    assert [text.split("\n\n")[0] for text in judged] == ["EMMA", "Persuasion"]
    assert [text.split("\n\n")[0] for text in calibrated] == [*books[1:3], *books[4:]]
