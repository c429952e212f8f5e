"""The same value always gives the same bytes, and they read back as the same value."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.canonical import CanonicalJsonError, canonical_json, digest_of, sha256
from pipeline.errors import PipelineError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


def shuffled(value, seed):
    """The same value with its dicts filled in another order."""
    if isinstance(value, dict):
        items = list(value.items())
        random.Random(seed).shuffle(items)
        return {key: shuffled(item, seed) for key, item in items}
    if isinstance(value, list):
        return [shuffled(item, seed) for item in value]
    return value


@given(VALUES, st.integers())
def test_order_of_keys_does_not_matter_and_nothing_is_lost(value, seed):
    data = canonical_json(value)
    assert canonical_json(shuffled(value, seed)) == data
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, indent=2)
    assert data == text.encode() + b"\n"
    assert repr(json.loads(data)) == repr(json.loads(json.dumps(value, sort_keys=True)))
    assert canonical_json(json.loads(data)) == data
    assert digest_of(value) == sha256(data)


def test_the_form_is_fixed():
    value = {"b": (1, 0.1, -0.0, 1e300), "a": {"é": None, "": True}}
    assert canonical_json(value).decode() == (
        '{\n  "a": {\n    "": true,\n    "é": null\n  },\n'
        '  "b": [\n    1,\n    0.1,\n    -0.0,\n    1e+300\n  ]\n}\n'
    )
    assert digest_of({}) == "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"layers": [{"loss": math.nan}]}, r"\$\.layers\[0\]\.loss is nan"),
        ([math.inf], r"\$\[0\] is inf"),
        ([-math.inf], r"\$\[0\] is -inf"),
        ({"a": {1: 2}}, r"\$\.a has the key 1"),
        ({True: 2}, r"the key True"),
        ({"a": np.float32(1)}, r"\$\.a is a float32, which JSON lacks"),
        ({"a": np.arange(3)}, r"\$\.a is a ndarray"),
        ({"a": {3}}, r"\$\.a is a set"),
        ({"a": b""}, r"\$\.a is a bytes"),
        ({"a": "\ud800"}, r"\$\.a contains half a surrogate pair"),
        ({"\udfff": 1}, r"a key of \$ contains half a surrogate pair"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_place(value, where):
    with pytest.raises(CanonicalJsonError, match=where) as caught:
        canonical_json(value)
    assert isinstance(caught.value, PipelineError)
    str(caught.value).encode()
