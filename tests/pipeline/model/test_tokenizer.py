from __future__ import annotations

import json
import shutil
from pathlib import Path

import keras_hub
import pytest

from pipeline.errors import SourceError
from pipeline.model.preset import read_preset
from pipeline.model.tokenizer import preset_tokenizer
from tests.benchmarks.minilm import preset_folder
from tests.models.tiny import ARCHITECTURES
from tests.pipeline.presets import shared_preset

# KerasHub leaves the file open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*vocabulary.spm:ResourceWarning")

TEXT = "the quick brown fox"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gives_the_tokens_of_stock_kerashub(architecture: str) -> None:
    path = shared_preset(architecture)
    stock = keras_hub.tokenizers.Tokenizer.from_preset(str(path))
    tokenizer = preset_tokenizer(read_preset(str(path)))
    assert tokenizer(TEXT) == [int(token) for token in stock(TEXT)]
    assert len(tokenizer(TEXT)) > 3
    assert tokenizer.vocabulary_size == stock.vocabulary_size()
    assert tokenizer.special_ids["end"] == stock.end_token_id


def test_reads_a_hugging_face_tokenizer() -> None:
    tokenizer = preset_tokenizer(read_preset(str(preset_folder())))
    assert tokenizer.vocabulary_size == 30522
    assert tokenizer("The quick") == [1996, 4248]
    assert tokenizer.special_ids["sep"] == 102


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pieces_are_one_for_each_token_and_together_the_text(architecture: str) -> None:
    tokenizer = preset_tokenizer(read_preset(str(shared_preset(architecture))))
    tokens = tokenizer("the quick brown fox – naïve 日本")
    pieces = tokenizer.pieces(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == tokenizer.tokenizer.detokenize(tokens)
    assert sum(map(bool, pieces)) > 3


@pytest.mark.parametrize(
    ("missing", "expected"),
    [("tokenizer.json", "tokenizer.json is missing"), ("assets", "tokenizer cannot be built")],
)
def test_says_what_is_missing(tmp_path: Path, missing: str, expected: str) -> None:
    path = shutil.copytree(shared_preset("Llama3"), tmp_path / "preset")
    if (path / missing).is_dir():
        shutil.rmtree(path / missing)
    else:
        (path / missing).unlink()
    with pytest.raises(SourceError, match=expected) as caught:
        preset_tokenizer(read_preset(str(path)))
    assert "\n" not in str(caught.value)


def test_refuses_classes_of_others(tmp_path: Path) -> None:
    path = shutil.copytree(shared_preset("Llama3"), tmp_path / "preset")
    saved = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps({**saved, "module": "os"}))
    with pytest.raises(SourceError, match="of module 'os'"):
        preset_tokenizer(read_preset(str(path)))
