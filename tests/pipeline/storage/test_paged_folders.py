"""Folders are listed many to a page, and what lies between them is jumped over."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage.backend import Version
from pipeline.storage.paged_folders import Page, folders_by_pages

NAMES = st.text("ab-/", min_size=1, max_size=5)


def version(key: str) -> Version:
    return Version(token=key, size_bytes=len(key), modified=0.0)


class Pages:
    """A store of keys whose pages have so many of them."""

    def __init__(self, keys: set[str], length: int) -> None:
        self.keys, self.length = sorted(keys), length
        self.requests = 0

    def read(self, prefix: str, after: str) -> Page:
        self.requests += 1
        found = [key for key in self.keys if key.startswith(prefix) and key > after]
        entries = tuple((key, version(key)) for key in found[: self.length])
        return Page(entries=entries, token="more" if len(found) > self.length else "")

    def list_one(self, prefix: str) -> Iterator[tuple[str, Version]]:
        return ((key, version(key)) for key in self.keys if key.startswith(prefix))


@given(
    st.sets(NAMES, max_size=40),
    st.sets(st.text("ab-", min_size=1, max_size=2), min_size=1, max_size=8),
    st.integers(1, 5),
)
def test_each_folder_has_its_objects_in_few_requests(
    keys: set[str], folders: set[str], length: int
) -> None:
    pages = Pages(keys, length)
    prefixes = sorted(f"{name}/" for name in folders)
    found = dict(folders_by_pages(pages.read, pages.list_one, prefixes))
    held = {
        prefix: {key.removeprefix(prefix): version(key) for key in keys if key.startswith(prefix)}
        for prefix in prefixes
    }
    for of_folder in (*found.values(), *held.values()):
        of_folder.pop("", None)  # a folder's own name is no key
    assert found == held
    assert list(found) == prefixes
    # No more than if each were listed alone.
    alone = (sum(key.startswith(prefix) for key in keys) // length + 1 for prefix in prefixes)
    assert pages.requests <= sum(alone)


def test_folders_side_by_side_share_pages() -> None:
    keys = {f"runs/{run:04d}/{file}" for run in range(1000) for file in range(10)}
    pages = Pages(keys, 1000)
    found = list(
        folders_by_pages(pages.read, pages.list_one, [f"runs/{i:04d}/" for i in range(1000)])
    )
    assert {len(files) for _, files in found} == {10}
    assert pages.requests == 10
    pages.requests = 0
    assert (
        len(list(folders_by_pages(pages.read, pages.list_one, ["runs/0000/", "runs/0999/"]))) == 2
    )
    assert pages.requests == 2  # and nothing of what is between them


def test_a_store_that_lists_in_no_order_is_listed_folder_by_folder() -> None:
    pages = Pages({"a/1", "a/2", "b/1"}, 1000)
    entries = tuple((key, version(key)) for key in ("b/1", "a/2", "a/1"))
    found = folders_by_pages(lambda *_: Page(entries=entries), pages.list_one, ["a/", "b/"])
    assert {prefix: set(files) for prefix, files in found} == {"a/": {"1", "2"}, "b/": {"1"}}


def test_a_store_that_gives_a_page_without_keys_is_listed_folder_by_folder() -> None:
    pages = Pages({"a/1", "b/1"}, 1000)
    found = folders_by_pages(
        lambda *_: Page(entries=(), token="more"), pages.list_one, ["a/", "b/"]
    )
    assert {prefix: set(files) for prefix, files in found} == {"a/": {"1"}, "b/": {"1"}}
