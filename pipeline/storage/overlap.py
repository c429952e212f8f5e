"""Places that must not lie inside each other, such as what is read, and what is written."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import PipelineError

_SAME_STORE = {"s3a": "s3", "local": "file"}


def check_apart(source_url: str, output_url: str, what: str = "preset") -> None:
    """Refuse an output that would change its source, or that holds it.

    Below its source, a run's files would become the source's: it could not be resumed. Above it,
    the source's files would count as the run's. Nothing is opened, and nothing need exist.

    Args:
        source_url: path or URL of a preset, or of what else is read.
        output_url: path or URL of what is written.
        what: is read.

    Raises:
        PipelineError: one is the other, or lies inside it, be it through links, a relative path or
            another spelling of the URL.
    """
    source, output = _place(source_url), _place(output_url)
    if source == output:
        how = f"is the {what} itself ({source_url})"
    elif source == output[: len(source)]:
        how = f"lies inside the {what}'s own folder, {source_url}"
    elif output == source[: len(output)]:
        how = f"holds the {what}, {source_url}"
    else:
        return
    raise PipelineError(
        f"{output_url}: the output {how}; the two would take each other's files for their own; "
        f"write to a folder beside the {what}, not inside or above it"
    )


def is_inside(url: str, folder_url: str) -> bool:
    """Whether a place is a folder, or lies inside it, in whatever spelling."""
    place, folder = _place(url), _place(folder_url)
    return place[: len(folder)] == folder


def _place(url: str) -> list[str]:
    """The store, and the names on the way from its root."""
    scheme, separator, path = url.partition("://")
    if not separator:
        scheme, path = "file", url
    scheme = _SAME_STORE.get(scheme.lower(), scheme.lower())
    if scheme == "file":
        # Through links, as far as the path exists.
        return [scheme, *Path(path).expanduser().resolve().parts]
    return [scheme, *(name for name in path.split("/") if name)]
