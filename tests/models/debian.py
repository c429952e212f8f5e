"""Files of Debian packages, fetched once, without installing them.

`apt-get download` takes a package from whichever mirror the machine is set up for, and checks it by
apt's own signatures; `dpkg-deb` opens it. Another release of Debian has other files, so whoever
keeps numbers keeps a digest of the texts beside them.
"""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path


def package_files(package: str, pattern: str, cache: Path) -> dict[str, bytes]:
    """The contents of a package's files, by path, in the order of their paths.

    Args:
        package: such as "r-cran-janeaustenr"; fetched unless the cache has it.
        pattern: a regular expression, searched for in each path, such as "./usr/share/doc/x/y.txt".
        cache: a folder for packages.

    Raises:
        RuntimeError: apt-get or dpkg-deb is missing or fails, or no file matches.
    """
    file = _fetched(package, cache)
    archive = _run(["dpkg-deb", "--fsys-tarfile", str(file)], f"opening {file}")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and re.search(pattern, member.name):
                found[member.name] = content.read()
    if not found:
        raise RuntimeError(f"{file}: no file matches {pattern}; another version of the package?")
    return {path: found[path] for path in sorted(found)}


def _fetched(package: str, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    for file in sorted(cache.glob(f"{package}_*.deb")):
        return file
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # no half a file in the cache
        _run(["apt-get", "download", package], f"fetching {package}", Path(folder))
        [file] = Path(folder).glob("*.deb")
        return file.rename(cache / file.name)


def _run(command: list[str], doing: str, folder: Path | None = None) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, cwd=folder).stdout
    except FileNotFoundError:
        raise RuntimeError(f"{doing}: no {command[0]}; this needs Debian or Ubuntu") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["failed"]
        raise RuntimeError(f"{doing}: {lines[-1]}; apt-get update?") from None
