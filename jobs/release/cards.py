"""The cards of a finished run, written beside what they describe: README.md and eval.json.

They follow from what is stored, so no digest covers them, and they are written anew whenever more
is known. A card that a person has edited is left as it is.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from rich.table import Table
from rich.text import Text

from jobs.logging import log_event, print_result, status
from jobs.reachable import absolute, reachable
from jobs.release.contents import (
    EVAL_FILE,
    Contents,
    FinishedRun,
    artifact_contents,
    export_contents,
    intact_exports,
    read_run,
)
from jobs.release.loading import Place
from jobs.release.model_card import CardSettings, model_card
from jobs.release.origin import CARD_FILE
from jobs.release.quality import eval_json
from pipeline.canonical import sha256
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.run.records import ARTIFACT_PREFIX, Digest
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.record import StoredRecord

CARD_RECORD_KEY = "card.json"


@dataclass(frozen=True, kw_only=True)
class CardRecord(StoredRecord):
    """What a card was written with, and how to tell whether a person has edited it.

    Attributes:
        readme_sha256: of the card, and of the one that it was written over, in case that this was
            interrupted.
    """

    settings: CardSettings
    readme_sha256: Annotated[tuple[Digest, ...], Field(max_length=2)]


@dataclass(frozen=True, kw_only=True)
class WrittenCard:
    """A card where it lies.

    Attributes:
        edited: by a person, and left as it was.
        evaluations: how many it tells of.
    """

    url: str
    form: str
    edited: bool
    evaluations: int


def card_store(contents: Contents) -> ObjectStore:
    """Where a card lies: in an export's folder; beside the artifact, which has its files only."""
    if contents.export is None:
        return contents.run.store
    return next(iter(contents.files.values())).store


def read_card_record(contents: Contents) -> CardRecord | None:
    """What the card that is there was written with; None if none was, or that is not known."""
    try:
        return CardRecord.read(card_store(contents), CARD_RECORD_KEY)
    except (MissingObjectError, DamagedObjectError):
        return None


def edited_card(contents: Contents) -> bytes | None:
    """The card that is there if a person has edited or written it; else None."""
    try:
        found = card_store(contents).get(CARD_FILE)
    except MissingObjectError:
        return None
    record = read_card_record(contents)
    ours = record is not None and sha256(found) in record.readme_sha256
    return None if ours else found


def write_card(
    contents: Contents, settings: CardSettings | None = None, *, overwrite: bool = False
) -> WrittenCard:
    """Write a card and eval.json where the card lies.

    Args:
        settings: None for those that the card was written with before.
        overwrite: write over a card that a person has edited.
    """
    store = card_store(contents)
    record = read_card_record(contents)
    if settings is None:
        settings = CardSettings() if record is None else record.settings
    edited = None if overwrite else edited_card(contents)
    _write(store, EVAL_FILE, eval_json(contents))
    if edited is None:
        place = Place(folder=ARTIFACT_PREFIX.rstrip("/") if contents.form == "kerashub" else ".")
        card = model_card(contents, settings, place)
        written = tuple(dict.fromkeys((sha256(card), *_digest_there(store))))
        record = CardRecord(settings=settings, readme_sha256=written)
        _write(store, CARD_RECORD_KEY, record.to_json())
        _write(store, CARD_FILE, card)
    return WrittenCard(
        url=store.url(CARD_FILE),
        form=contents.form,
        edited=edited is not None,
        evaluations=len(contents.run.evaluations),
    )


def _digest_there(store: ObjectStore) -> tuple[str, ...]:
    try:
        return (sha256(store.get(CARD_FILE)),)
    except MissingObjectError:
        return ()


def _write(store: ObjectStore, key: str, content: bytes) -> None:
    """Write an object, unless it has this content."""
    with contextlib.suppress(MissingObjectError):
        if store.get(key) == content:
            return
    store.put(key, content)


def write_cards(run: FinishedRun) -> tuple[WrittenCard, ...]:
    """Write the cards of a run's artifact, and of the exports below it, as they were before."""
    return tuple(write_card(one) for one in (artifact_contents(run), *intact_exports(run)))


def update_cards(store: ObjectStore) -> None:
    """Write the cards of the run at a store's root anew, after something of it has changed."""
    with status("writing the model card"):
        write_cards(read_run(store, store.root_url))


def card_run(
    run_url: str,
    to_url: str | None,
    settings: CardSettings,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the cards of a finished run, and say where they are.

    Args:
        to_url: an export's folder, to write only its card.
        settings: empty fields keep what a card was written with before.

    Raises:
        DamagedObjectError: the run is not finished, or a record is damaged.
        ExportError: no export of this run is there.
    """
    store = reachable(absolute(run_url))
    with status("reading what is known of the run"):
        run = read_run(store, run_url)
        if to_url is None:
            wanted = (artifact_contents(run), *intact_exports(run))
        else:
            wanted = (export_contents(run, open_store(absolute(to_url))),)
        cards = []
        for contents in wanted:
            record = read_card_record(contents)
            given = settings if record is None else settings.over(record.settings)
            cards.append(write_card(contents, given, overwrite=overwrite))
    for note in run.origin.notes:
        log_event("note", note)
    for card in cards:
        if card.edited:
            log_event(
                "note", f"{card.url} was edited, and is left as it is; --overwrite writes it anew"
            )
    print_result(cards, _table(cards), as_json=as_json)


def _table(cards: list[WrittenCard]) -> Table:
    table = Table("card", "of", "evaluations")
    for card in cards:
        where = card.url.removeprefix("file://")
        table.add_row(Text(where), card.form, str(card.evaluations) if card.evaluations else "none")
    return table
