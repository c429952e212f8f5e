"""Records are read and written again and again: what that needs is built once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pipeline.canonical import canonical_json, digest_of
from pipeline.storage import record
from pipeline.storage.record import StoredRecord, with_digest


@dataclass(frozen=True, kw_only=True)
class Note(StoredRecord):
    text: str


def test_what_reads_and_writes_a_class_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = record.TypeAdapter

    def counted(kind: type) -> object:
        built.append(kind)
        return original(kind)

    monkeypatch.setattr(record, "TypeAdapter", counted)
    for text in ("one", "two"):
        note = Note(text=text)
        assert Note.from_json(note.to_json()) == note
        assert len(note.record_sha256) == 64
    assert built == [Note]


@pytest.mark.parametrize("content", [{}, [], "a\n\nb", 1.5, {"é": [{"lines": "\n  "}, [], {}]}])
def test_what_is_stored_is_canonical_itself(content: object) -> None:
    expected = canonical_json({"content": content, "sha256": digest_of(content)})
    assert with_digest(content) == expected
