"""Records round-trip, and a single changed byte is noticed."""

import dataclasses
import json

import pytest

from pipeline.canonical import canonical_json, digest_of, sha256
from pipeline.errors import PipelineError
from pipeline.run.records import (
    FileDigest,
    LayerRecord,
    Manifest,
    PartRecord,
    codes_key,
    file_key,
    manifest_of,
    record_key,
)
from pipeline.storage.record import RecordError
from quantizer.schemes import GPTQScheme

PLAN = "a" * 64
RECORD = PartRecord(
    part=7,
    plan_digest=PLAN,
    file=file_key(7),
    sha256=sha256(b"weights"),
    size_bytes=7,
    loaded_bytes=2**40,
    previous="b" * 64,
    layers=(
        LayerRecord(
            path="llama_backbone/transformer_layer_6/self_attention/query",
            scheme=GPTQScheme(weight_bits=3),
            account={"loss": 0.1 + 0.2, "damping": 1e-300, "notes": ["é", None, True, {}]},
        ),
        LayerRecord(path="router", note="routers stay in floating point"),
    ),
)
REST = PartRecord(
    part=0, plan_digest=PLAN, file=file_key(0), sha256="0" * 64, size_bytes=0, loaded_bytes=0
)
WITH_CODES = dataclasses.replace(RECORD, codes=FileDigest(sha256=sha256(b"codes"), size_bytes=5))
MANIFEST = manifest_of(
    PLAN, {7: RECORD, 0: REST}, {"artifact/config.json": b"{}"}, {"keras": "3.15.1"}
)


def test_a_part_without_codes_does_not_mention_them():
    assert b"codes" not in RECORD.to_json()
    assert RECORD.files.keys() == {"artifact/model_00007.weights.h5"}


def test_a_manifest_names_the_codes_of_every_part():
    codes = "codes/model_00007.safetensors"
    assert codes_key(7) == codes
    assert list(WITH_CODES.files) == ["artifact/model_00007.weights.h5", codes]
    manifest = manifest_of(PLAN, {7: WITH_CODES, 0: REST}, {}, {})
    assert manifest.files[codes] == WITH_CODES.codes


def test_a_part_is_named_for_its_file_and_its_block():
    assert (file_key(0), record_key(0)) == ("artifact/model_00000.weights.h5", "records/rest.json")
    assert file_key(7) == "artifact/model_00007.weights.h5"
    assert record_key(7) == "records/block-00006.json" == RECORD.key


@pytest.mark.parametrize(
    "written",
    [RECORD, WITH_CODES, REST, MANIFEST],
    ids=["block", "block with codes", "rest", "manifest"],
)
def test_records_round_trip(written):
    data = written.to_json()
    read = type(written).from_json(data)
    assert read == written
    assert read.to_json() == data
    assert json.loads(data)["sha256"] == digest_of(written.content())


@pytest.mark.parametrize("written", [RECORD, MANIFEST], ids=lambda w: type(w).__name__)
def test_every_flipped_bit_and_every_truncation_is_noticed(written):
    data = written.to_json()
    for i in range(len(data)):
        flipped = data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :]
        with pytest.raises(RecordError):
            type(written).from_json(flipped)
        with pytest.raises(RecordError):
            type(written).from_json(data[:i])
    with pytest.raises(RecordError):
        type(written).from_json(data + b" ")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"part": -1}, "part: "),
        ({"part": "7"}, "part: "),
        ({"part": True}, "part: "),
        ({"part": 8}, "part 8 names the file"),
        ({"file": "artifact/../model_00007.weights.h5"}, "part 7 names the file"),
        ({"size_bytes": -1}, "size_bytes: "),
        ({"size_bytes": 7.0}, "size_bytes: "),
        ({"sha256": "A" * 64}, "sha256: "),
        ({"plan_digest": ""}, "plan_digest: "),
        ({"previous": "b"}, "previous"),
        ({"layers": [{"path": 3}]}, "layers.0.path: "),
        ({"layers": [{}]}, "layers.0.path: "),
        ({"host": "worker-3"}, "host: "),
    ],
)
def test_invalid_content_is_refused_despite_a_correct_digest(change, problem):
    content = {**RECORD.content(), **change}
    signed = canonical_json({"content": content, "sha256": digest_of(content)})
    with pytest.raises(RecordError, match=problem) as caught:
        PartRecord.from_json(signed)
    assert isinstance(caught.value, PipelineError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"3", b"{}", b'{"content": 3}', b"\xff", b"[" * 100_000, b"9" * 5000,
     b'{"content": {"part": NaN}}'],
    ids=range(10),
)  # fmt: skip
def test_anything_but_a_record_is_refused(data):
    for kind in (PartRecord, Manifest):
        with pytest.raises(RecordError):
            kind.from_json(data)


def test_a_manifest_names_every_byte_of_the_artifact():
    assert MANIFEST.files == {
        "artifact/model_00000.weights.h5": FileDigest(sha256="0" * 64, size_bytes=0),
        "artifact/model_00007.weights.h5": FileDigest(sha256=sha256(b"weights"), size_bytes=7),
        "artifact/config.json": FileDigest(sha256=sha256(b"{}"), size_bytes=2),
    }
    assert MANIFEST.records == {
        "records/rest.json": REST.record_sha256,
        "records/block-00006.json": RECORD.record_sha256,
    }
    other_order = manifest_of(
        PLAN, {0: REST, 7: RECORD}, {"artifact/config.json": b"{}"}, {"keras": "3.15.1"}
    )
    assert other_order.to_json() == MANIFEST.to_json()
