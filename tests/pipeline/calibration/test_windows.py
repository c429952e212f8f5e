"""Windows are the same everywhere, share no token, and are stored under their content."""

import hashlib
from itertools import count, islice

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.calibration import windows as cutting
from pipeline.calibration.windows import EVALUATION_WINDOWS, TextStream, TokenWindows, shard_bounds
from pipeline.errors import CalibrationTextError
from pipeline.recipe.recipe import Calibration
from pipeline.recipe.text_sources import mixed, shares


def settings_of(**changes):
    values = {"texts": ("a.txt",), "num_samples": 3, "sequence_length": 4, "sampling": "sequential"}
    return Calibration(**values | changes)


def make_windows(texts, tokenize, calibration, **special):
    """Windows of texts without weights."""
    streams = [TextStream.of_all(texts, calibration)]
    return cutting.make_windows(streams, tokenize, calibration, **special)


def words(text):
    """A tokenizer: each word is a number."""
    return [int(word) for word in text.split()]


def numbered(num_documents, num_tokens):
    """Documents whose tokens are all different: 1, 2, 3…"""
    numbers = count(1)
    return [
        " ".join(str(number) for number in islice(numbers, num_tokens))
        for _ in range(num_documents)
    ]


def test_documents_are_joined_by_the_end_token_and_cut():
    windows = make_windows(["1 2 3", "4 5", "6 7 8 9 10"], words, settings_of(), end_token=99)
    assert windows.tokens.tolist() == [[1, 2, 3, 99], [4, 5, 99, 6], [7, 8, 9, 10]]
    assert windows.tokens.dtype == np.int32
    assert windows.mask.all()
    assert windows.num_documents == 3


def test_every_window_begins_with_the_start_token():
    windows = make_windows(numbered(4, 5), words, settings_of(), start_token=77)
    assert windows.tokens.tolist() == [[77, 1, 2, 3], [77, 4, 5, 6], [77, 7, 8, 9]]


def test_without_packing_a_window_is_one_document_cut_or_padded():
    windows = make_windows(
        ["1 2 3 4 5", "", "6", "7 8"],
        words,
        settings_of(packing=False),
        start_token=77,
        end_token=99,
        pad_token=50,
    )
    assert windows.tokens.tolist() == [[77, 1, 2, 99], [77, 6, 99, 50], [77, 7, 8, 99]]
    assert windows.lengths.tolist() == [4, 3, 4]
    assert windows.mask.tolist() == [[True] * 4, [True, True, True, False], [True] * 4]


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
    st.integers(2, 7),
    st.integers(1, 4),
    st.integers(0, 2**63 - 1),
    st.sampled_from(["sequential", "random"]),
)
def test_windows_are_disjoint_runs_of_the_joined_text(sizes, length, wanted, seed, sampling):
    numbers = count()
    texts = [" ".join(str(n) for n in islice(numbers, size)) for size in sizes]
    calibration = settings_of(
        num_samples=wanted, sequence_length=length, seed=seed, sampling=sampling
    )
    possible = sum(sizes) // length
    if possible < wanted:
        with pytest.raises(CalibrationTextError, match=f"give {possible} windows"):
            make_windows(texts, words, calibration)
        return
    windows = make_windows(texts, words, calibration)
    starts = windows.tokens[:, 0]
    assert (windows.tokens == starts[:, None] + np.arange(length)).all()
    assert (starts % length == 0).all()
    assert (np.diff(starts) > 0).all()  # disjoint, in the order of the texts
    assert windows.digest == make_windows(iter(texts), words, calibration).digest


def test_the_first_windows_read_no_more_text_than_they_hold():
    def endless():
        for number in count():
            read.append(number)
            yield "1 2 3 4"

    read = []
    make_windows(endless(), words, settings_of(num_samples=5))
    assert len(read) == 5
    read = []
    make_windows(endless(), words, settings_of(num_samples=5, sampling="random", pool_factor=3))
    assert len(read) == 15


def test_a_random_draw_is_bit_for_bit_what_it_always_was():
    # Digests of stored windows must not change with NumPy or with this package.
    calibration = settings_of(sampling="random", seed=7, pool_factor=10)
    windows = make_windows(numbered(30, 4), words, calibration)
    assert windows.tokens[:, 0].tolist() == [25, 93, 97]
    assert windows.digest == "397b8be2d24aab006d2cec7ecafbbbc3ff4ca20664a2423be753c16a30c9f10d"


def test_seeds_draw_different_windows_and_all_of_the_pool():
    texts = numbered(30, 4)
    draws = [
        make_windows(texts, words, settings_of(sampling="random", seed=seed, pool_factor=10))
        for seed in range(60)
    ]
    assert len({draw.digest for draw in draws}) > 50
    assert {start for draw in draws for start in draw.tokens[:, 0]} == set(range(1, 121, 4))
    assert len({draw.fingerprint for draw in draws}) == 1


def test_the_fingerprint_is_that_of_the_documents_read():
    calibration = settings_of(num_samples=1)
    one, same, other = (
        make_windows(texts, words, calibration)
        for texts in (["1 2", "3 4", "unread"], ["1 2", "3 4"], ["1", "2 3 4"])
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert (one.tokens == other.tokens).all()
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize("packing", [True, False])
def test_too_little_text_tells_how_many_windows_there_are_and_what_to_do(packing):
    with pytest.raises(CalibrationTextError) as caught:
        make_windows(numbered(2, 5), words, settings_of(packing=packing, num_samples=8))
    assert "2 documents with 10 tokens give 2 windows of 4 tokens, but num_samples is 8" in str(
        caught.value
    )
    assert "set num_samples to at most 2, or name more texts" in str(caught.value)


def test_too_few_texts_to_evaluate_on_are_not_called_calibrations():
    for tokens, remedy in ((5, "set windows to at most 2, or name more texts"), (1, "name more")):
        with pytest.raises(CalibrationTextError) as caught:
            make_windows(
                numbered(2, tokens), words, settings_of(num_samples=8), names=EVALUATION_WINDOWS
            )
        said = str(caught.value)
        assert said.startswith("texts to evaluate on: 2 documents")
        assert f"but windows is 8; {remedy}" in said
        assert not any(word in said for word in ("calibration", "num_samples", "sequence_length"))


def test_no_window_at_all_asks_for_shorter_ones():
    with pytest.raises(CalibrationTextError, match=r"give 0 windows .*; lower sequence_length"):
        make_windows(["1 2 3"], words, settings_of())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], "int64 of shape (1, 2)"),
        ([1.5], "float64 of shape (1,)"),
        (["a"], "list of integers was expected"),
        ([1, -1], "token -1 is not between 0 and 9"),
        ([1, 10], "token 10 is not between 0 and 9; is this the model's own tokenizer?"),
    ],
)
def test_what_is_no_token_of_the_model_is_refused(tokens, message):
    with pytest.raises(CalibrationTextError) as caught:
        make_windows(["a"], lambda text: tokens, settings_of(), vocabulary_size=10)
    assert message in str(caught.value)
    assert str(caught.value).startswith("document 1: ")


def test_special_tokens_must_leave_room():
    calibration = settings_of(sequence_length=2, packing=False)
    with pytest.raises(CalibrationTextError, match="no room for text beside 2 special"):
        make_windows(["1"], words, calibration, start_token=1, end_token=2)


# --- of sources with weights


def weighted(**changes):
    texts = ({"url": "a.txt", "weight": 3}, {"url": "b.txt", "weight": 1})
    return settings_of(texts=texts, num_samples=8, **changes)


def of_sources(calibration, *documents):
    each = zip(calibration.weighted_texts, calibration.window_shares, documents, strict=True)
    streams = [TextStream(documents=d, num_windows=n, source=text) for text, n, d in each]
    return cutting.make_windows(streams, words, calibration)


@given(
    st.lists(st.integers(1, 1000).map(lambda n: n / 100), min_size=1, max_size=9),
    st.integers(1, 2000),
)
def test_shares_are_within_one_of_their_quotas_and_add_up(weights, number):
    found = shares(weights, number)
    assert sum(found) == number
    whole = sum(weights)
    assert all(abs(n - number * w / whole) < 1 + 1e-6 for n, w in zip(found, weights, strict=True))


@pytest.mark.parametrize(
    ("weights", "number", "expected"),
    [
        ([0.1, 0.2, 0.7], 10, (1, 2, 7)),  # in binary these are no tenths
        ([1, 1, 1], 16, (6, 5, 5)),  # what is left goes to the first of equals
        ([2, 1], 16, (11, 5)),  # 10 2/3 and 5 1/3: to the largest remainder
        ([1000, 1], 16, (16, 0)),
    ],
)
def test_what_is_left_over_goes_to_the_largest_remainders(weights, number, expected):
    assert shares(weights, number) == expected


def test_windows_of_sources_alternate_so_that_every_shard_sees_all():
    windows = of_sources(weighted(), numbered(9, 5), ["900 901 902 903 904 905 906 907 908"])
    assert windows.source_of.tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    firsts = windows.tokens[:, 0]
    assert firsts[windows.source_of == 0].tolist() == [1, 5, 9, 13, 17, 21]
    assert firsts[windows.source_of == 1].tolist() == [900, 904]
    assert windows.source_documents == (5, 1)
    assert windows.num_documents == 6
    assert mixed([1, 2]) == [(1, 0), (0, 0), (1, 1)]


def test_a_source_draws_from_a_pool_of_its_own():
    # Whatever the other holds, its windows are drawn alike.
    calibration = weighted(sampling="random", seed=3, pool_factor=4)
    one, other = (of_sources(calibration, numbered(99, 5), numbered(n, 4)) for n in (8, 4))
    own = [windows.tokens[windows.source_of == 0].tolist() for windows in (one, other)]
    assert own[0] == own[1]
    assert len({tuple(window) for window in own[0]}) == 6


def test_a_source_that_is_too_short_for_its_share_is_named():
    with pytest.raises(CalibrationTextError) as caught:
        of_sources(weighted(), numbered(9, 5), ["1 2", "3 4 5"])
    assert str(caught.value) == (
        "b.txt: 2 documents with 5 tokens give 1 windows of 4 tokens, but its weight 1 asks for 2 "
        "of the 8, 8 tokens; give it more texts, lower its weight, or lower num_samples or "
        "sequence_length"
    )


def test_windows_of_sources_come_back_from_their_bytes():
    windows = of_sources(weighted(), numbered(9, 5), numbered(3, 5))
    back = TokenWindows.from_bytes(windows.to_bytes())
    assert back.source_of.tolist() == windows.source_of.tolist()
    assert back.source_documents == windows.source_documents
    some = windows.chosen([2, 0])
    assert some.source_of.tolist() == windows.source_of[[2, 0]].tolist()


# --- as stored


def some_windows():
    return make_windows(["1 2 3", "4", "5 6"], words, settings_of(packing=False))


def test_windows_come_back_from_their_bytes():
    windows = some_windows()
    content = windows.to_bytes()
    back = TokenWindows.from_bytes(content)
    assert back.to_bytes() == content
    assert (back.tokens == windows.tokens).all()
    assert (back.lengths == windows.lengths).all()
    assert (back.fingerprint, back.num_documents) == (windows.fingerprint, 3)
    assert back.key == f"tokens/{hashlib.sha256(content).hexdigest()}.safetensors"


def test_any_safetensors_reader_can_read_them():
    windows = some_windows()
    found = safetensors.numpy.load(windows.to_bytes())
    assert (found["tokens"] == windows.tokens).all()


def test_damaged_bytes_are_refused():
    content = some_windows().to_bytes()
    tensors = safetensors.numpy.load(content)
    wrong = [
        b"",
        content[:-1],
        safetensors.numpy.save({"tokens": tensors["tokens"]}),
        safetensors.numpy.save(tensors, metadata={"by": "another"}),
        safetensors.numpy.save(tensors | {"tokens": tensors["tokens"].astype(np.int64)}),
        safetensors.numpy.save(tensors | {"lengths": tensors["lengths"][:1]}),
        safetensors.numpy.save(tensors | {"more": tensors["lengths"]}),
    ]
    for damaged in wrong:
        with pytest.raises(CalibrationTextError, match=r"token windows.*; .* again$"):
            TokenWindows.from_bytes(damaged)


# --- shards


@given(st.integers(1, 300), st.integers(1, 300))
def test_shards_cover_every_window_once_in_order(num_samples, samples_per_shard):
    slices = shard_bounds(num_samples, samples_per_shard)
    assert [i for start, stop in slices for i in range(start, stop)] == list(range(num_samples))
    assert all(stop - start == samples_per_shard for start, stop in slices[:-1])
    assert 0 < slices[-1][1] - slices[-1][0] <= samples_per_shard


@pytest.mark.parametrize("bad", [(0, 1), (1, 0), (4, -2)])
def test_shards_of_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="must be positive"):
        shard_bounds(*bad)
