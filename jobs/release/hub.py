"""A repository of the Hugging Face hub, and what the hub answers, in plain words.

The token is huggingface_hub's own business: it finds it in the environment or where a person has
logged in, and it is neither read nor printed here.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.logging import log_event
from jobs.release.origin import REPOSITORY
from pipeline.canonical import sha256
from pipeline.errors import PipelineError, StorageError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

_PREFIX = "hf://"
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_LONGEST = 300


class HubError(StorageError):
    """The hub cannot be used; the message says what it answered, and the remedy."""


class HubRequestError(PipelineError):
    """Something that the hub does not take from anyone."""


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a repository.

    Attributes:
        blob: its SHA-1, as git has it; of a large file, of a pointer to it.
        sha256: of a large file; "" of those that git itself holds.
    """

    size_bytes: int
    blob: str
    sha256: str

    def holds(self, content: bytes) -> bool:
        """Whether these bytes are its content."""
        if self.sha256:
            return self.sha256 == sha256(content)
        header = f"blob {len(content)}\0".encode()
        return self.blob == hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, kw_only=True)
class HubTree:
    """What a repository holds at one commit."""

    commit: str
    files: Mapping[str, HubFile]


def repository_of(url: str) -> str:
    """The repository, as owner/name, that hf://owner/name means.

    Raises:
        HubRequestError: anything else.
    """
    name = url.removeprefix(_PREFIX).rstrip("/")
    if not url.startswith(_PREFIX) or not REPOSITORY.fullmatch(name):
        raise HubRequestError(
            f"{url[:_LONGEST]!r}: not a repository of the Hugging Face hub; write it as "
            "hf://owner/name"
        )
    return name


class Repository:
    """One repository at one revision. Nothing that is read from it is trusted."""

    def __init__(self, name: str, revision: str = "main") -> None:
        if not _REVISION.fullmatch(revision) or ".." in revision:
            raise HubRequestError(f"--revision {revision[:_LONGEST]!r}: not the name of a branch")
        import huggingface_hub
        from huggingface_hub.utils.tqdm import disable_progress_bars

        # Its warnings name URLs with signatures, and what they tell of is tried again.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        disable_progress_bars()
        self.name = name
        self.revision = revision
        self._api: HfApi = huggingface_hub.HfApi(
            endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="quantfleet"
        )

    @property
    def url(self) -> str:
        """For people, to open."""
        tree = "" if self.revision == "main" else f"/tree/{self.revision}"
        return f"{self._hub}/{self.name}{tree}"

    @property
    def _hub(self) -> str:
        """The hub's address, without a name and password that it may be reached with."""
        return re.sub(r"//[^/@]*@", "//", self._api.endpoint)

    def find(self, *, private: bool) -> HubTree | None:
        """What is there; None if there is no such repository, or no such branch of it.

        Args:
            private: whether nobody else may see it.

        Raises:
            HubRequestError: it is there for everybody to see, and must not be.
            HubError: the hub cannot be reached, or refuses.
        """
        from huggingface_hub import errors

        with self._answers("asking for the repository"):
            try:
                info = self._api.model_info(self.name)
            except errors.GatedRepoError:
                raise
            except errors.RepositoryNotFoundError as error:
                # The hub says so too where it knows nobody by this token.
                if error.response.status_code == 401:
                    raise
                return None
        if private and not info.private:
            raise HubRequestError(
                f"{self.name}: it is there, and public; make it private in its settings on the "
                "hub, or leave out --private"
            )
        with self._answers("listing its files"):
            try:
                commit = self._api.model_info(self.name, revision=self.revision).sha
            except errors.RevisionNotFoundError:
                return None
            return HubTree(commit=str(commit), files=self._list(str(commit)))

    def _list(self, commit: str) -> dict[str, HubFile]:
        from huggingface_hub.hf_api import RepoFile

        entries = self._api.list_repo_tree(self.name, recursive=True, revision=commit)
        return {
            entry.path: HubFile(
                size_bytes=entry.size,
                blob=entry.blob_id,
                sha256="" if entry.lfs is None else entry.lfs.sha256,
            )
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def make(self, *, private: bool) -> HubTree:
        """Make the repository, and the branch, if they are not there; what is there then."""
        with self._answers("making the repository"):
            self._api.create_repo(self.name, private=private or None, exist_ok=True)
            if self.revision != "main":
                self._api.create_branch(self.name, branch=self.revision, exist_ok=True)
        found = self.find(private=private)
        if found is None:
            raise HubError(f"{self._hub}: {self.name} was made, but is not there; try again")
        return found

    def read(self, name: str, commit: str) -> bytes:
        """The content of a small file."""
        with (
            tempfile.TemporaryDirectory(prefix="quantfleet-hub-") as folder,
            self._answers(f"reading {name}"),
        ):
            path = self._api.hf_hub_download(self.name, name, revision=commit, local_dir=folder)
            return Path(path).read_bytes()

    def send(self, files: Mapping[str, bytes]) -> list[CommitOperationAdd]:
        """Send files ahead; nobody sees them before they are committed.

        What the hub holds already is not sent again. Small ones travel with the commit.
        """
        from huggingface_hub import CommitOperationAdd

        with self._answers(f"sending {', '.join(files)}"):
            # A stream goes by git's protocol for large files, bytes by Xet's, where that is
            # installed. The former tells what is there already by the digests that are known here.
            additions = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=io.BytesIO(content))
                for name, content in files.items()
            ]
            self._api.preupload_lfs_files(self.name, additions, revision=self.revision)
            return additions

    def deletion(self, name: str) -> CommitOperationDelete:
        """A file to be deleted by a commit."""
        from huggingface_hub import CommitOperationDelete

        return CommitOperationDelete(path_in_repo=name, is_folder=False)

    def commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        message: str,
        *,
        onto: str,
    ) -> None:
        """Make everything visible at once.

        Args:
            onto: the commit that must be the last one so far.
        """
        with self._answers("committing"), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self._api.create_commit(
                self.name,
                operations,
                commit_message=message,
                revision=self.revision,
                parent_commit=onto,
            )
        for warning in told:
            log_event("note", f"the hub: {_one_line(warning.message)}")

    @contextmanager
    def _answers(self, doing: str) -> Iterator[None]:
        """Turn whatever huggingface_hub raises into one line.

        Use it around its calls only. They share no base exception: connections, answers that are no
        JSON, and what its threads raise all differ.
        """
        try:
            yield
        except PipelineError:
            raise
        except Exception as error:
            raise self._error(doing, error) from error

    def _error(self, doing: str, error: BaseException) -> PipelineError:
        from huggingface_hub import errors

        # An upload wraps what happened to it.
        causes: list[Any] = [error, error.__cause__]
        answered = next((e for e in causes if isinstance(e, errors.HfHubHTTPError)), None)
        where = f"{self._hub}: {_one_line(doing)}, {self.name}"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return HubError(f"{where}: HF_HUB_OFFLINE forbids it; unset it")
        if answered is None:
            if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
                # Of what it was given, such as the metadata of a card.
                return HubRequestError(f"{where}: {_one_line(error)}")
            cause = type(error.__cause__ or error).__name__
            return HubError(
                f"{where}: the hub cannot be reached, or broke off ({cause}); check the network, "
                "HF_ENDPOINT and proxies, and do it again: what was sent is not sent again"
            )
        code = answered.response.status_code
        said = _one_line(answered.server_message or "")
        said = f"HTTP {code}" + (f", {said}" if said else "")
        match code:
            case 401:
                remedy = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
            case 403:
                remedy = (
                    "this token may not do that; use one with write access to this owner's "
                    "repositories"
                )
            case 404:
                remedy = "no such owner or repository for this token; check the name and the token"
            case 409 | 412:
                remedy = "someone else changed the repository meanwhile; do it again"
            case 400 | 413 | 422:
                return HubRequestError(f"{where}: {said}: the hub does not take this")
            case _:
                remedy = "do it again later: what was sent is not sent again"
        return HubError(f"{where}: {said}; {remedy}")


def _one_line(text: object) -> str:
    """Without a URL's name and password, and what it is asked with, which may be a signature."""
    line = re.sub(r"(https?://)[^\s/@]*@", r"\1", " ".join(str(text).split()))
    line = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
