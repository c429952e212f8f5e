"""Texts are streamed from real files and data sets; each mistake names its file and remedy."""

import gzip
import json
import uuid

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from s3fs import S3FileSystem

from pipeline.calibration.texts import HubSource, parse_hub_source, read_texts
from pipeline.errors import CalibrationTextError
from pipeline.recipe.recipe import Calibration
from pipeline.recipe.recipe_file import load_recipe
from tests.s3 import serve_s3


def read(*sources, text_field="text"):
    return read_texts(Calibration(texts=sources, text_field=text_field))


def write_lines(path, *texts, field="text"):
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts))
    return str(path)


def write_parquet(path, *texts, field="text"):
    table = pyarrow.table({"id": list(range(len(texts))), field: list(texts)})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return str(path)


@pytest.fixture
def memory():
    """A directory of its own in fsspec's memory."""
    root = f"memory://{uuid.uuid4()}"
    fsspec.filesystem("memory").makedirs(root)
    yield root
    fsspec.filesystem("memory").rm(root, recursive=True)


# --- files


def test_every_format_gives_its_documents_in_order(tmp_path):
    texts = ["one", "zwei ä", "three\nlines\n", "four", "five"]
    assert list(read(write_lines(tmp_path / "a.jsonl", *texts))) == texts
    assert list(read(write_parquet(tmp_path / "a.parquet", *texts))) == texts
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert list(read(str(tmp_path / "a.txt"))) == ["one\n\ntwo\n"]


def test_compressed_files_read_as_plain_ones(tmp_path):
    content = (json.dumps({"text": "one"}) + "\n").encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"two"))
    assert list(read(f"{tmp_path}/a.jsonl.gz", f"{tmp_path}/a.txt.gz")) == ["one", "two"]


def test_the_order_in_which_files_were_made_is_irrelevant(tmp_path):
    for directory, names in (("x", "abcd"), ("y", "dbca")):
        (tmp_path / directory).mkdir()
        for name in names:
            (tmp_path / directory / f"{name}.txt").write_text(name)
    assert list(read(f"{tmp_path}/x/*.txt")) == list(read(f"{tmp_path}/y/*.txt")) == list("abcd")


def test_any_storage_is_read_through_its_url(memory):
    for name in "ba":
        with fsspec.open(f"{memory}/texts/{name}.jsonl", "w") as file:
            file.write(json.dumps({"text": name}))
        table = pyarrow.table({"text": [f"parquet {name}"]})
        with fsspec.open(f"{memory}/texts/{name}.parquet", "wb") as file:
            pyarrow.parquet.write_table(table, file)
    assert list(read(f"{memory}/texts/*.jsonl")) == ["a", "b"]
    assert list(read(f"{memory}/**/*.parquet")) == ["parquet a", "parquet b"]
    assert list(read(f"{memory}/texts/b.jsonl")) == ["b"]


def test_texts_and_recipes_are_read_from_s3(monkeypatch):
    with serve_s3() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()  # of other endpoints
        server.create_bucket("given")
        table = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({"text": ["p1", "p2"]}), table)
        for key, content in {
            "x/b.jsonl": b'{"text": "b"}\n',
            "x/a.jsonl.gz": gzip.compress(b'{"text": "a"}\n'),
            "x/c.parquet": table.getvalue().to_pybytes(),
            "mine.yaml": b"name: mine\nscheme: {mode: int8}\n",
        }.items():
            server.client().put_object(Bucket="given", Key=key, Body=content)
        texts = read("s3://given/x/*.jsonl*", "s3://given/x/c.parquet")
        assert list(texts) == ["a", "p1", "b", "p2"]
        assert load_recipe("s3://given/mine.yaml").name == "mine"
        with pytest.raises(CalibrationTextError, match=r"s3://given/none\.txt: no such file"):
            read("s3://given/none.txt")
        with (
            server.demanding_credentials(),
            pytest.raises(
                CalibrationTextError, match=r"s3://given/new\.txt: .*set AWS_ACCESS_KEY_ID"
            ),
        ):
            read("s3://given/new.txt")
    S3FileSystem.clear_instance_cache()


def test_sources_take_turns(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", "a1", "a2", "a3")
    second = write_parquet(tmp_path / "b.parquet", "b1")
    third = write_lines(tmp_path / "c.jsonl", "c1", "c2")
    assert list(read(first, second, third)) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_blank_documents_are_passed_over(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", "", "one", " \n ", "two")
    assert list(read(source)) == ["one", "two"]


def test_texts_are_streamed(tmp_path):
    # The damage further in is not met by who stops before it.
    source = write_lines(tmp_path / "a.jsonl", "one", "two")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("damage\n")
    texts = read(source)
    assert [next(texts), next(texts)] == ["one", "two"]
    with pytest.raises(CalibrationTextError, match=rf"{source}:3: not JSON"):
        next(texts)


def test_an_early_stop_leaves_no_file_open(tmp_path):
    # An unclosed file is a ResourceWarning, and so an error.
    for source in (
        write_lines(tmp_path / "a.jsonl", *"abc"),
        write_parquet(tmp_path / "a.parquet", *"abc"),
    ):
        texts = read(source)
        next(texts)
        del texts


# --- mistakes, met before the first document is asked for


def test_a_missing_file_is_named(tmp_path, memory):
    for source in (
        f"{tmp_path}/none.jsonl",
        f"{tmp_path}/*.jsonl",
        f"{memory}/a.txt",
        f"{memory}/*.txt",
    ):
        with pytest.raises(CalibrationTextError, match="no such file; check the path") as caught:
            read(source)
        assert source in str(caught.value)


def test_all_sources_are_checked_before_the_first_text(tmp_path):
    good = write_lines(tmp_path / "a.jsonl", "one")
    with pytest.raises(CalibrationTextError, match="none"):
        read(good, f"{tmp_path}/none.txt")


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_a_wrong_column_is_refused_with_those_there_are(tmp_path, write):
    suffix = "jsonl" if write is write_lines else "parquet"
    source = write(tmp_path / f"a.{suffix}", "one", field="content")
    with pytest.raises(CalibrationTextError, match="no column 'text'") as caught:
        read(source)
    assert str(caught.value).endswith("set calibration.text_field to one of id, content")
    assert f"a.{suffix}" in str(caught.value)
    assert list(read(source, text_field="content")) == ["one"]


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_a_column_without_text_is_refused_by_row(tmp_path, write):
    suffix = "jsonl" if write is write_lines else "parquet"
    source = write(tmp_path / f"a.{suffix}", None)
    with pytest.raises(CalibrationTextError, match=r"1: 'text' holds NoneType, not text; choose"):
        read(source)
    with pytest.raises(CalibrationTextError, match=r"1: 'id' holds int, not text; choose"):
        read(source, text_field="id")


def test_a_source_without_any_text_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text(" \n")
    for source in (
        f"{tmp_path}/empty.jsonl",
        f"{tmp_path}/blank.txt",
        write_lines(tmp_path / "a.jsonl", "", " "),
        write_parquet(tmp_path / "a.parquet", ""),
    ):
        with pytest.raises(CalibrationTextError, match="no document has any text") as caught:
            read(source)
        assert source in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON: "),
        (b'"text"', "holds str, not an object such as"),
        (b"\xff", "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
    ],
    ids=["cut", "str", "bytes", "deep"],
)
def test_a_line_that_is_no_object_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + line + b"\n")
    with pytest.raises(
        CalibrationTextError, match=rf"^{tmp_path}/a.jsonl:2: {message}.*one object per line"
    ):
        read(f"{tmp_path}/a.jsonl")


def test_a_text_in_another_encoding_is_named_by_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ntwo ä".encode("latin-1"))
    with pytest.raises(CalibrationTextError, match=r"a\.txt:2: not UTF-8 text .*; convert"):
        read(f"{tmp_path}/a.txt")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.txt.gz"])
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is something else")
    with pytest.raises(CalibrationTextError, match=rf"{name}: cannot be read: .*; check the file"):
        read(f"{tmp_path}/{name}")


def test_a_format_that_the_name_does_not_tell_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text\none\n")
    with pytest.raises(CalibrationTextError, match=r"a.csv: cannot tell its format; .*\.parquet"):
        read(f"{tmp_path}/a.csv")


def test_a_directory_is_refused_with_what_to_write(tmp_path):
    with pytest.raises(CalibrationTextError, match=r"a directory; name its files, such as .*\*\."):
        read(str(tmp_path))


def test_chained_urls_are_refused():
    with pytest.raises(CalibrationTextError, match="chained URLs are not supported"):
        read("simplecache::memory://a.txt")


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path, monkeypatch):
    folder = tmp_path / "[v1] data"
    folder.mkdir()
    for name in ("cal.jsonl", "what?.jsonl", "a::b.jsonl", "a*.jsonl", "ab.jsonl"):
        write_lines(folder / name, name)
    assert list(read(f"{tmp_path}/[v1] data/cal.jsonl")) == ["cal.jsonl"]
    assert list(read(f"file://{tmp_path}/[v1] data/what?.jsonl")) == ["what?.jsonl"]
    assert list(read(f"{tmp_path}/[v1] data/a*.jsonl")) == ["a*.jsonl"]
    monkeypatch.chdir(folder)
    assert list(read("a::b.jsonl", "../[v1] data/cal.jsonl")) == ["a::b.jsonl", "cal.jsonl"]


def test_brackets_of_a_glob_may_be_part_of_a_name(tmp_path):
    (tmp_path / "[v1] data").mkdir()
    for name in ("a1.txt", "a2.txt", "a3.txt"):
        (tmp_path / "[v1] data" / name).write_text(name)
        (tmp_path / name).write_text(f"outer {name}")
    assert list(read(f"{tmp_path}/[v1] data/*.txt")) == ["a1.txt", "a2.txt", "a3.txt"]
    assert list(read(f"{tmp_path}/a[12].txt")) == ["outer a1.txt", "outer a2.txt"]


def test_half_a_surrogate_pair_is_named_without_its_document(tmp_path):
    # As other programs write JSON that cut a text between the halves.
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "a secret \\ud83d\\n"}\n')
    texts = read(f"{tmp_path}/a.jsonl")
    assert next(texts) == "fine"
    with pytest.raises(
        CalibrationTextError, match=r"a\.jsonl:2: .*'\\ud83d'.*; remove it"
    ) as caught:
        next(texts)
    assert "secret" not in str(caught.value)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert list(read(f"{tmp_path}/b.jsonl")) == ["\N{GRINNING FACE}"]


def test_no_error_shows_a_document(tmp_path):
    document = "a secret " * 1000
    table = pyarrow.table({"text": pyarrow.array([document.encode() + b"\xff"])})
    table = table.set_column(0, "text", pyarrow.array([b"\xff" + document.encode()]).view("string"))
    pyarrow.parquet.write_table(table, tmp_path / "broken.parquet")
    broken = {
        "as a key.jsonl": json.dumps({document: 1}).encode(),
        "in a list.jsonl": json.dumps({"text": [document]}).encode(),
        "as a str.jsonl": json.dumps(document).encode(),
        "cut.jsonl": json.dumps({"text": document}).encode()[:-1],
        "other encoding.jsonl": b'{"text": "' + document.encode() + b'\xff"}',
        "surrogate.jsonl": json.dumps({"text": f"{document}\ud800"}).encode(),
        "encoding.txt": document.encode() + b"\xff",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    for name in (*broken, "broken.parquet"):
        with pytest.raises(CalibrationTextError, match=name) as caught:
            read(f"{tmp_path}/{name}")
        assert str(caught.value).count("secret") < 10, name
        assert "\n" not in str(caught.value)


def test_unknown_storage_is_refused():
    with pytest.raises(CalibrationTextError, match=r"nowhere://a\.txt: cannot be read: .*nowhere"):
        read("nowhere://a.txt")


def test_a_file_named_twice_is_refused(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", "one")
    with pytest.raises(CalibrationTextError, match=r"a.jsonl is already read through .*; name it"):
        read(source, f"{tmp_path}/*.jsonl")


def test_a_document_beyond_all_measure_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.calibration.texts.MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 101)
    for source in (write_lines(tmp_path / "a.jsonl", "x" * 101), f"{tmp_path}/a.txt"):
        with pytest.raises(CalibrationTextError, match="more than 100 bytes; split it"):
            read(source)


# --- Hugging Face data sets


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:imdb", {"name": "imdb"}),
        ("hf:allenai/c4", {"name": "allenai/c4"}),
        ("hf:allenai/c4/en", {"name": "allenai/c4", "config": "en"}),
        ("hf:c4?config=en&split=test", {"name": "c4", "config": "en", "split": "test"}),
        ("hf:a/b?revision=abc", {"name": "a/b", "revision": "abc"}),
        ("hf:/a/b/c/d", {"name": "/a/b/c/d"}),
        ("hf:./a?split=test", {"name": "./a", "split": "test"}),
    ],
)
def test_a_data_set_is_named_like_this(source, expected):
    assert parse_hub_source(source) == HubSource(source=source, **expected)


@pytest.mark.parametrize("source", ["hf:", "hf:a//b", "hf:a/b/c/d", "hf:a/b/c?config=d", "hf:a/"])
def test_a_name_of_another_form_is_refused(source):
    with pytest.raises(CalibrationTextError, match="not the name of a data set; write hf:<owner>"):
        read(source)


@pytest.mark.parametrize("source", ["hf:a?splt=train", "hf:a?split=", "hf:a?code=true"])
def test_an_unknown_option_is_refused(source):
    with pytest.raises(CalibrationTextError, match=r"the options after \? are"):
        read(source)


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A data set in a directory, with a train and a test split; the hub is out of reach."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", "one", "", "two")
    write_lines(tmp_path / "set" / "test.jsonl", "three")
    return f"hf:{tmp_path}/set"


def test_a_data_set_is_streamed_by_split(data_set):
    assert list(read(data_set)) == ["one", "two"]
    assert list(read(f"{data_set}?split=test")) == ["three"]


def test_a_data_set_of_parquet_is_streamed(tmp_path):
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet", "one", "two", "three", field="content")
    assert list(read(f"hf:{tmp_path}/set", text_field="content")) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("option", "text_field", "message"),
    [
        ("?split=dev", "text", "cannot be read: .*dev.*train"),
        ("?config=en", "text", "cannot be read: .*en"),
        ("/none", "text", "check the path"),
        ("", "content", "row 1: no column 'content'; .* one of id, text"),
        ("", "id", "row 1: 'id' holds int"),
    ],
)
def test_a_mistake_about_a_data_set_is_named(data_set, option, text_field, message):
    with pytest.raises(CalibrationTextError, match=message) as caught:
        read(data_set + option, text_field=text_field)
    assert str(caught.value).startswith(data_set + option)
    assert "\n" not in str(caught.value)


def test_a_data_set_out_of_reach_is_named(data_set):
    with pytest.raises(CalibrationTextError, match=r"hf:allenai/c4/en: .*; check"):
        read("hf:allenai/c4/en")
