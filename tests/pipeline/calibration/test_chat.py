"""Conversations are rendered as Hugging Face renders them, by a model's template, in a sandbox."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.calibration.chat import ChatTemplate, contents_alone
from pipeline.calibration.texts import read_texts
from pipeline.errors import CalibrationTextError, PipelineError, SourceError
from pipeline.model.chat_template import find_chat_template
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.model.tokenizer import preset_tokenizer
from pipeline.planning.token_windows import token_windows
from pipeline.recipe.recipe import Calibration
from tests.models.smollm2_weights import read_checkpoint
from tests.pipeline.presets import shared_preset

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the manner of Mistral's.
INST = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}
    {%- if message.role == 'user' %}
        {{- ' [INST] ' + message.content + ' [/INST]' }}
    {%- else %}
        {% generation %}{{- ' ' + message.content | trim }}{{ eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}"""
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "the fox "},
]


def template(source: str, **special_tokens: str) -> ChatTemplate:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"} | special_tokens
    return ChatTemplate(where="chat_template.jinja", source=source, special_tokens=tokens)


def test_a_conversation_is_rendered_without_a_prompt_for_an_answer() -> None:
    assert template(CHATML).render(TALK, "") == (
        "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\nthe fox <|im_end|>\n"
    )
    assert template(INST).render(TALK, "") == "<s> [INST] the dog [/INST] the fox</s>"


def test_what_templates_may_use_is_there_and_the_date_stands_still() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %} {{ strftime_now('%d %b %Y') }} {{ tools is none }}"
    )
    given = [{"role": "user", "content": "<é>"}, {"role": "user", "content": "2"}]
    rendered = template(source).render(given, "")
    assert rendered == '{"role": "user", "content": "<é>"} 26 Jul 2024 True'


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ messages[0].content.nothing.of_this }}",
        "{{ 1 + 'a' }}",
        "{{ 1 // 0 }}",
        "{{ raise_exception('not like this') }}",
        "{{ messages[9].content }}",
    ],
)
def test_what_a_template_must_not_or_cannot_is_refused_by_line(source: str) -> None:
    talk = [{"role": "user", "content": "a secret"}]
    with pytest.raises(CalibrationTextError, match=r"^a\.jsonl:3: chat_template\.jinja") as caught:
        template(source).render(talk, "a.jsonl:3")
    assert "chat to false" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_template_is_named() -> None:
    with pytest.raises(SourceError, match=r"chat_template\.jinja: not a chat template \(Template"):
        template("{% for %}").render(TALK, "")


def test_contents_alone_have_nothing_of_a_template() -> None:
    assert contents_alone(TALK) == "the dog\n\nthe fox "
    parts = [{"type": "text", "text": "look"}, {"type": "image"}, {"type": "text", "text": "!"}]
    assert contents_alone([{"role": "user", "content": parts}, *TALK[1:]]) == "look\n!\n\nthe fox "
    assert contents_alone([{"role": "assistant", "content": None}]) == ""


# --- where the template is found


def preset(folder: Path, architecture: str = "Qwen3", **files: Any) -> Path:
    """A preset of one's own, with files beside: text, or JSON values."""
    path = folder / "preset"
    shutil.copytree(shared_preset(architecture), path)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text)
    return path


def found(path: Path) -> ChatTemplate:
    files = read_preset(str(path))
    return find_chat_template(files, preset_tokenizer(files).special_texts)


def test_a_template_is_found_where_hugging_face_keeps_it(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "bos_token": {"content": "<a>"},
        "eos_token": "<b>",
        "pad_token": None,
    }
    one = preset(tmp_path / "1", tokenizer_config__json=config | {"chat_template": CHATML})
    assert found(one).source == CHATML
    assert found(one).special_tokens["bos_token"] == "<a>"
    assert found(one).special_tokens["eos_token"] == "<b>"
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    two = preset(tmp_path / "2", tokenizer_config__json=config | {"chat_template": several})
    assert found(two).source == CHATML
    # The file decides, as there.
    three = preset(
        tmp_path / "3",
        tokenizer_config__json=config | {"chat_template": "old"},
        chat_template__jinja=CHATML,
    )
    assert found(three).source == CHATML
    # KerasHub's presets have no such JSON: the tokenizer says what its tokens are.
    four = preset(tmp_path / "4", "Llama3", chat_template__jinja=INST)
    assert found(four).special_tokens["bos_token"] == "<|begin_of_text|>"
    assert found(four).special_tokens["eos_token"] == "<|end_of_text|>"


@pytest.mark.parametrize(
    "config", [{}, {"chat_template": None}, {"chat_template": [{"name": "rag", "template": "x"}]}]
)
def test_a_model_without_a_template_is_refused_with_what_to_give(
    config: dict[str, Any], tmp_path: Path
) -> None:
    path = preset(tmp_path, tokenizer_config__json=config)
    with pytest.raises(SourceError, match=r"no chat template.*copy the chat_template\.jinja") as e:
        found(path)
    assert "chat to false" in str(e.value)


# --- texts


def read(path: Path, chat: bool | None, **options: Any) -> list[str]:
    calibration = Calibration(texts=(str(path),), chat=chat, **options)
    return list(read_texts(calibration, template(CHATML) if chat else None))


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RENDERED = template(CHATML).render(TALK, "")


def test_conversations_are_read_as_chosen_and_refused_without_a_choice(tmp_path: Path) -> None:
    jsonl = lines(tmp_path / "a.jsonl", {"messages": TALK})
    parquet = tmp_path / "a.parquet"
    # What one message lacks and another has is null in a table.
    rows = [{"messages": [TALK[0], {**TALK[1], "name": "me"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    for path, place in ((jsonl, "a.jsonl:1"), (parquet, "a.parquet: row 1")):
        assert read(path, chat=True) == [RENDERED]
        assert read(path, chat=False) == ["the dog\n\nthe fox "]
        with pytest.raises(
            CalibrationTextError, match=rf"{place}: 'messages' holds conv"
        ) as caught:
            read(path, chat=None)
        for option in ("calibration.chat to true (--chat)", "to false (--no-chat)"):
            assert option in str(caught.value)
        assert "dog" not in str(caught.value)


def test_texts_stay_texts(tmp_path: Path) -> None:
    both = lines(tmp_path / "a.jsonl", {"text": "one", "messages": TALK})
    assert read(both, chat=None) == ["one"]
    assert read(both, chat=False) == ["one"]
    assert read(both, chat=True) == [RENDERED]
    (tmp_path / "a.txt").write_text("plain")
    assert read(tmp_path / "a.txt", chat=True) == ["plain"]


def test_any_column_may_hold_conversations(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"talk": TALK, "id": 3})
    assert read(path, chat=True, text_field="talk") == [RENDERED]
    with pytest.raises(CalibrationTextError, match=r"no column 'text'; .* one of talk, id"):
        read(path, chat=True)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"content": "x"}], "message 1 has no role; write"),
        ([{"from": "human", "value": "x"}], "message 1 has no role; write"),
        ([], "holds list, not text"),
        (["a"], "holds list, not text"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
    ],
)
def test_what_is_no_conversation_is_named(messages: Any, problem: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": messages})
    with pytest.raises(
        CalibrationTextError, match=rf"a\.jsonl:2: 'messages'.*{re.escape(problem)}"
    ):
        read(path, chat=True)


# --- tokens


def windows(path: Path, texts: Path, **options: Any) -> list[int]:
    """The one window's tokens."""
    files = read_preset(str(path))
    calibration = Calibration(
        texts=(str(texts),),
        chat=True,
        num_samples=1,
        sampling="sequential",
        packing=False,
        **options,
    )
    made = token_windows(files, build_skeleton(files), calibration)
    return [int(token) for token in made.tokens[0, : made.lengths[0]]]


def test_control_tokens_are_tokens_and_text_between_them_is_text(tmp_path: Path) -> None:
    path = preset(tmp_path, chat_template__jinja=CHATML)
    tokenizer = preset_tokenizer(read_preset(str(path)))
    start, stop = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    assert start is not None
    assert stop is not None
    expected: list[int] = []
    for message in TALK:
        expected += [start, *tokenizer(f"{message['role']}\n{message['content']}"), stop]
        expected += tokenizer("\n")
    end = tokenizer.special_ids["end"]
    texts = lines(tmp_path / "a.jsonl", {"messages": TALK})
    assert windows(path, texts, sequence_length=64) == [*expected, end]


@pytest.mark.parametrize("architecture", ["Llama3", "Mistral"])
def test_no_token_begins_or_ends_a_conversation_twice(architecture: str, tmp_path: Path) -> None:
    path = preset(tmp_path, architecture, chat_template__jinja=INST)
    special = preset_tokenizer(read_preset(str(path))).special_ids
    texts = lines(tmp_path / "a.jsonl", {"messages": TALK})
    tokens = windows(path, texts, sequence_length=128)
    assert tokens.count(special["start"]) == tokens.count(special["end"]) == 1
    assert (tokens[0], tokens[-1]) == (special["start"], special["end"])


def test_a_model_without_a_template_is_refused_before_texts_are_cut(tmp_path: Path) -> None:
    texts = lines(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(PipelineError, match="no chat template"):
        windows(preset(tmp_path), texts, sequence_length=64)


@pytest.mark.exhaustive
def test_a_real_model_s_own_template_renders_its_conversations() -> None:
    source = read_checkpoint(num_blocks=1).metadata["tokenizer.chat_template"]
    assert template(source).render(TALK, "") == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"<|im_end|>\n{RENDERED}"
    )
    assert {"<|im_start|>", "<|im_end|>"} <= set(template(source).control_tokens)
