"""List many folders of an object store in few requests: pages in key order, gaps jumped over.

A page has a thousand keys, most folders far fewer. So the pages of a common prefix are read, each
from where the last one ended or, if that is before it, from the next folder that is asked for. That
takes no more requests than a listing of each folder would, and as few as one for every thousand
objects where folders lie side by side.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.storage.backend import Version


@dataclass(frozen=True, kw_only=True)
class Page:
    """A part of a listing.

    Attributes:
        entries: keys and versions, in the keys' order.
        token: of the next one; "" of the last.
    """

    entries: tuple[tuple[str, Version], ...]
    token: str = ""


ReadPage = Callable[[str, str], Page]
"""Of a prefix and a key: the page of keys with this prefix that come after the key; "" for all."""


def folders_by_pages(
    read: ReadPage,
    list_one: Callable[[str], Iterable[tuple[str, Version]]],
    prefixes: Sequence[str],
) -> Iterator[tuple[str, dict[str, Version]]]:
    """Yield each folder with its objects, by key below it.

    Args:
        list_one: all objects of one folder, where a store lists in no order, as S3's directory
            buckets do, or gives pages without keys.
        prefixes: sorted; each ends in "/", and none is within another.
    """
    common = os.path.commonprefix(list(prefixes))  # noqa: RUF071 - letters, not folders
    found: dict[str, Version] = {}
    place, after, is_last = 0, "", False
    while place < len(prefixes) and not is_last:
        # Strictly after: the folder's own name is no key.
        after = max(after, prefixes[place])
        page = read(common, after)
        is_last = not page.token
        keys = [after, *(key for key, _ in page.entries)]
        is_stuck = not page.entries and not is_last  # there is more, but no key to go on from
        if is_stuck or any(map(operator.le, keys[1:], keys)):
            for prefix in prefixes[place:]:
                yield prefix, {key.removeprefix(prefix): one for key, one in list_one(prefix)}
            return
        after = keys[-1]
        prefix = prefixes[place]
        for key, version in page.entries:
            while not key.startswith(prefix):
                if key < prefix:
                    break  # between two folders
                yield prefix, found
                found, place = {}, place + 1
                if place == len(prefixes):
                    return
                prefix = prefixes[place]
            else:
                found[key[len(prefix) :]] = version
    for prefix in prefixes[place:]:
        yield prefix, found
        found = {}
