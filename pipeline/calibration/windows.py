"""Cut calibration texts into token windows of one length.

The same texts, tokenizer and settings give the same bytes on every machine and under every version
of NumPy; windows are stored under the digest of their content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import CalibrationTextError
from pipeline.recipe.recipe import Calibration
from pipeline.recipe.text_sources import WeightedText, mixed

Tokenize = Callable[[str], ArrayLike]
_INPUT = "inputs/"
_Int32 = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class TextStream:
    """Documents, and how many windows they are to give.

    Attributes:
        source: where they come from, if that has a weight; None for all of a calibration's texts.
    """

    documents: Iterable[str]
    num_windows: int
    source: WeightedText | None = None

    @classmethod
    def of_all(cls, documents: Iterable[str], calibration: Calibration) -> Self:
        """The documents of all texts, interleaved."""
        return cls(documents=documents, num_windows=calibration.num_samples)


@dataclass(frozen=True, kw_only=True)
class WindowNames:
    """How whoever asked for windows calls what they may change, for messages.

    Attributes:
        texts, number: the texts, and how many windows there are to be.
        length: of a window; "" where it is not theirs to choose.
    """

    texts: str
    number: str
    length: str = ""


CALIBRATION_WINDOWS = WindowNames(
    texts="calibration.texts", number="num_samples", length="sequence_length"
)
EVALUATION_WINDOWS = WindowNames(texts="texts to evaluate on", number="windows")


def make_windows(
    streams: Sequence[TextStream],
    tokenize: Tokenize,
    calibration: Calibration,
    *,
    start_token: int | None = None,
    end_token: int | None = None,
    pad_token: int = 0,
    vocabulary_size: int | None = None,
    decoder_start: tuple[int, ...] = (),
    inputs: Mapping[str, NDArray[Any]] | None = None,
    names: WindowNames = CALIBRATION_WINDOWS,
) -> TokenWindows:
    """Cut texts into token windows, reading no more texts than necessary.

    With packing, documents are joined, each followed by `end_token`, and cut into full windows
    that do not overlap; the remainder is dropped. Without packing, a window holds one document,
    truncated or padded. Windows of several streams share no document, and alternate as evenly as
    their numbers allow (see `mixed`).

    Args:
        streams: documents without any token are skipped.
        tokenize: gives a document's tokens [num_tokens], without special tokens.
        start_token: first token of every window.
        end_token: put after every document, even a truncated one.
        pad_token: fills up a window without packing.
        vocabulary_size: upper bound of the tokens; JAX would clip larger ones silently.
        decoder_start, inputs: see `TokenWindows`.
        names: for messages.

    Raises:
        CalibrationTextError: too few texts, or values that are not tokens of the vocabulary.
    """
    num_samples, sequence_length = calibration.num_samples, calibration.sequence_length
    num_special = (start_token is not None) + (0 if calibration.packing else end_token is not None)
    if sequence_length <= num_special:
        raise CalibrationTextError(
            f"calibration.sequence_length {sequence_length} leaves no room for text beside "
            f"{num_special} special tokens; raise it"
        )
    cut = _packed if calibration.packing else _one_each
    factor = calibration.pool_factor if calibration.sampling == "random" else 1
    log = _ReadingLog()
    pools, num_documents = [], []
    for stream in streams:
        counted = log.num_documents, log.num_tokens
        documents = log.tokens_of(stream.documents, tokenize, vocabulary_size)
        windows = cut(documents, sequence_length, _special(start_token), _special(end_token))
        pool = list(islice(windows, factor * stream.num_windows))
        num_documents.append(log.num_documents - counted[0])
        if len(pool) < stream.num_windows:
            num_tokens = log.num_tokens - counted[1]
            raise CalibrationTextError(
                _too_few(stream, len(pool), num_documents[-1], num_tokens, calibration, names)
            )
        pools.append(pool)
    counts = [stream.num_windows for stream in streams]
    drawn = _draw([len(pool) for pool in pools], counts, calibration)
    order = mixed(counts)
    chosen = [pools[source][drawn[source][number]] for source, number in order]
    has_weights = any(stream.source is not None for stream in streams)
    tokens = np.full((num_samples, sequence_length), pad_token, np.int32)
    for row, window in zip(tokens, chosen, strict=True):
        row[: len(window)] = window
    return TokenWindows(
        tokens=tokens,
        lengths=np.array([len(window) for window in chosen], np.int32),
        fingerprint=log.hash.hexdigest(),
        num_documents=log.num_documents,
        decoder_start=decoder_start,
        inputs=inputs or {},
        source_of=np.array([source for source, _ in order], np.int32) if has_weights else None,
        source_documents=tuple(num_documents) if has_weights else (),
    )


def shard_bounds(num_samples: int, samples_per_shard: int) -> tuple[tuple[int, int], ...]:
    """Cut windows into calibration shards, fixed slices [a, b); the last may be shorter."""
    if num_samples < 1 or samples_per_shard < 1:
        raise ValueError(
            f"num_samples and samples_per_shard must be positive, got {num_samples} and "
            f"{samples_per_shard}"
        )
    return tuple(
        (start, min(start + samples_per_shard, num_samples))
        for start in range(0, num_samples, samples_per_shard)
    )


class _ReadingLog:
    """Counts and hashes the documents that were read."""

    def __init__(self) -> None:
        self.num_documents = 0
        self.num_tokens = 0
        self.hash = hashlib.sha256()

    def tokens_of(
        self, texts: Iterable[str], tokenize: Tokenize, vocabulary_size: int | None
    ) -> Iterator[_Int32]:
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            # The length prefix makes the hash depend on where documents begin.
            self.hash.update(len(content).to_bytes(8, "little") + content)
            self.num_documents += 1
            tokens = _checked(tokenize(text), vocabulary_size, self.num_documents)
            self.num_tokens += len(tokens)
            if len(tokens):
                yield tokens


def _checked(given: Any, vocabulary_size: int | None, num_documents: int) -> _Int32:
    tokens = np.asarray(given)
    if tokens.size == 0:
        return np.zeros(0, np.int32)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise CalibrationTextError(
            f"document {num_documents}: the tokenizer gave {tokens.dtype} of shape {tokens.shape} "
            "where a list of integers was expected; use dtype int32 and no sequence_length"
        )
    limit = np.iinfo(np.int32).max if vocabulary_size is None else vocabulary_size
    if tokens.min() < 0 or tokens.max() >= limit:
        raise CalibrationTextError(
            f"document {num_documents}: token {tokens.min() if tokens.min() < 0 else tokens.max()} "
            f"is not between 0 and {limit - 1}; is this the model's own tokenizer?"
        )
    return tokens.astype(np.int32)


def _special(token: int | None) -> _Int32:
    return np.array([] if token is None else [token], np.int32)


def _packed(
    documents: Iterator[_Int32], length: int, start: _Int32, end: _Int32
) -> Iterator[_Int32]:
    num_text = length - len(start)
    parts: list[_Int32] = []
    num_waiting = 0
    for document in documents:
        parts += [document, end]
        num_waiting += len(document) + len(end)
        if num_waiting >= num_text:
            joined = np.concatenate(parts)
            num_used = num_waiting - num_waiting % num_text
            for text in joined[:num_used].reshape(-1, num_text):
                yield np.concatenate([start, text])
            parts, num_waiting = [joined[num_used:]], num_waiting - num_used


def _one_each(
    documents: Iterator[_Int32], length: int, start: _Int32, end: _Int32
) -> Iterator[_Int32]:
    num_text = length - len(start) - len(end)
    for document in documents:
        yield np.concatenate([start, document[:num_text], end])


def _draw(
    pools: Sequence[int], wanted: Sequence[int], calibration: Calibration
) -> list[Sequence[int]]:
    """Of each pool of so many windows, the indices of those chosen, ascending."""
    if calibration.sampling == "sequential":
        return [range(number) for number in wanted]
    # Raw bits are the same in every version of NumPy; what Generator makes of them is not.
    keys = np.random.PCG64(calibration.seed).random_raw(sum(pools))
    of_pools = np.split(keys, np.cumsum(pools)[:-1])
    return [
        sorted(np.argsort(of_pool, kind="stable")[:number].tolist())
        for of_pool, number in zip(of_pools, wanted, strict=True)
    ]


def _too_few(
    stream: TextStream,
    num_windows: int,
    num_documents: int,
    num_tokens: int,
    calibration: Calibration,
    names: WindowNames,
) -> str:
    length, wanted = calibration.sequence_length, calibration.num_samples
    where = names.texts if stream.source is None else stream.source.url
    found = (
        f"{where}: {num_documents} documents with {num_tokens} tokens give {num_windows} windows "
        f"of {length} tokens, but "
    )
    if stream.source is not None:
        needed = stream.num_windows
        return (
            f"{found}its weight {stream.source.weight:g} asks for {needed} of the {wanted}"
            f"{f', {needed * length} tokens' if calibration.packing else ''}; give it more texts, "
            "lower its weight, or lower num_samples or sequence_length"
        )
    found = f"{found}{names.number} is {wanted}"
    if num_windows:
        return f"{found}; set {names.number} to at most {num_windows}, or name more texts"
    return f"{found}; {f'lower {names.length}, or ' if names.length else ''}name more texts"


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenWindows:
    """The calibration input; equal windows have equal bytes, and so equal digests."""

    tokens: _Int32
    """[num_samples, sequence_length]"""
    lengths: _Int32
    """[num_samples]: how many tokens of each window are text; the rest is padding."""
    fingerprint: str
    """SHA-256 of the documents that were read, in order."""
    num_documents: int
    """How many that were."""
    decoder_start: tuple[int, ...] = ()
    """What the decoder begins with, where an encoder reads the first half of each window."""
    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Arrays for other inputs of the model, by name, [num_samples, …]."""
    source_of: _Int32 | None = None
    """[num_samples]: the number of each window's source, where texts have weights."""
    source_documents: tuple[int, ...] = ()
    """How many documents of each source were read, where texts have weights."""

    def __post_init__(self) -> None:
        fits = self.tokens.ndim == 2 and self.lengths.shape == self.tokens.shape[:1]
        if not fits or {self.tokens.dtype, self.lengths.dtype} != {np.dtype(np.int32)}:
            raise CalibrationTextError(
                "token windows are int32 tokens [num_samples, sequence_length] and lengths "
                f"[num_samples], not {self.tokens.dtype} {list(self.tokens.shape)} and "
                f"{self.lengths.dtype} {list(self.lengths.shape)}; make them again"
            )
        if self.source_of is not None and self.source_of.shape != self.lengths.shape:
            raise CalibrationTextError(
                f"token windows: {list(self.source_of.shape)} sources of {len(self.lengths)} "
                "windows; make them again"
            )
        for name, array in self.inputs.items():
            if array.shape[:1] != self.lengths.shape:
                raise CalibrationTextError(
                    f"token windows: input {name} has the shape {list(array.shape)} where there "
                    f"are {len(self.lengths)} windows; make them again"
                )

    def chosen(self, rows: Sequence[int]) -> TokenWindows:
        """Some of the windows, in this order."""
        indices = list(rows)
        return replace(
            self,
            tokens=self.tokens[indices],
            lengths=self.lengths[indices],
            inputs={name: array[indices] for name, array in self.inputs.items()},
            source_of=None if self.source_of is None else self.source_of[indices],
        )

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[num_samples, sequence_length]: True where a token is text."""
        return np.arange(self.tokens.shape[1])[None, :] < self.lengths[:, None]

    def to_bytes(self) -> bytes:
        """A safetensors file; without metadata, which has no fixed order."""
        arrays: dict[str, NDArray[Any]] = {
            "fingerprint": np.frombuffer(bytes.fromhex(self.fingerprint), np.uint8),
            "lengths": self.lengths,
            "num_documents": np.array([self.num_documents], np.int64),
            "tokens": self.tokens,
        }
        if self.decoder_start:
            arrays["decoder_start"] = np.array(self.decoder_start, np.int32)
        if self.source_of is not None:
            arrays["source_of"] = self.source_of
            arrays["source_documents"] = np.array(self.source_documents, np.int64)
        arrays |= {f"{_INPUT}{name}": array for name, array in self.inputs.items()}
        return safetensors.numpy.save(arrays)

    @classmethod
    def from_bytes(cls, content: bytes) -> TokenWindows:
        """The inverse of `to_bytes`.

        Raises:
            CalibrationTextError: damaged, or not token windows.
        """
        try:
            found = safetensors.numpy.load(content)
            windows = cls(
                tokens=found["tokens"],
                lengths=found["lengths"],
                fingerprint=found["fingerprint"].tobytes().hex(),
                num_documents=int(found["num_documents"][0]),
                decoder_start=tuple(map(int, found.get("decoder_start", ()))),
                inputs={
                    name.removeprefix(_INPUT): array
                    for name, array in sorted(found.items())
                    if name.startswith(_INPUT)
                },
                source_of=found.get("source_of"),
                source_documents=tuple(map(int, found.get("source_documents", ()))),
            )
        except (safetensors.SafetensorError, KeyError, IndexError) as error:
            raise CalibrationTextError(
                f"token windows: damaged ({error}); delete the file, and it is made again"
            ) from error
        if windows.to_bytes() != content:
            raise CalibrationTextError(
                "token windows: not as they were written; delete the file, and it is made again"
            )
        return windows

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `to_bytes()`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def key(self) -> str:
        """Storage key, named by the digest."""
        return f"tokens/{self.digest}.safetensors"
