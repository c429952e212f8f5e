"""Conversations as a model sees them: rendered by its own chat template.

A template comes with a model, so it runs in jinja2's sandbox. What it is given is what Hugging
Face's `apply_chat_template` gives it, without tools and without a prompt for an answer, so that the
same templates work; the date is a fixed one, or the same texts would differ from day to day.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import CalibrationTextError, SourceError

Conversation = Sequence[Mapping[str, Any]]

# Of Llama 3's own template, where it is told none.
_TODAY = datetime.date(2024, 7, 26)
_MAX_CHARACTERS = 64 * 1024 * 1024
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How a model's conversations are written.

    Attributes:
        where: the file, for messages.
        source: in jinja2's language.
        special_tokens: by their names in templates, such as "bos_token".
    """

    where: str
    source: str
    special_tokens: Mapping[str, str]

    def render(self, conversation: Conversation, where: str) -> str:
        """A whole conversation as text.

        Args:
            conversation: messages, each with a "role" and a "content".
            where: the conversation's place, for messages.

        Raises:
            SourceError: the template itself is broken.
            CalibrationTextError: the template refuses the conversation.
        """
        given = {
            **self.special_tokens,
            "messages": conversation,
            "add_generation_prompt": False,
            "tools": None,
            "documents": None,
        }
        compiled = self._compiled
        pieces, length = [], 0
        try:
            for piece in compiled.generate(given):
                pieces.append(piece)
                length += len(piece)
                if length > _MAX_CHARACTERS:
                    _refuse(f"it makes more than {_MAX_CHARACTERS} characters of it")
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise CalibrationTextError(
                f"{where}: {self.where} cannot render this conversation ({_shown(error)}); correct "
                "its messages, or set calibration.chat to false to take their contents alone"
            ) from None
        return "".join(pieces)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """What may be a token of its own in what is rendered; the vocabulary tells which is."""
        marks = re.findall(r"<[^<>\s]+>|\[/?[A-Z_]+\]", self.source)
        return tuple(dict.fromkeys([*self.special_tokens.values(), *marks]))

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _TODAY.strftime
        try:
            return environment.from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise SourceError(
                f"{self.where}: not a chat template ({_shown(error)}); correct it, or set "
                "calibration.chat to false"
            ) from None


class _GenerationBlocks(Extension):
    """`{% generation %}` marks what a model writes, for training; here it is text like other."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateRuntimeError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter is for HTML, and escapes what models are not used to.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _shown(error: Exception) -> str:
    text = " ".join(str(error).split())[:_SHOWN_CHARACTERS]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def contents_alone(conversation: Conversation) -> str:
    """The messages' texts, with nothing of a template, with an empty line between them."""
    return "\n\n".join(filter(None, (_text_of(message.get("content")) for message in conversation)))


def _text_of(content: Any) -> str:
    """A message's text; of parts, such as texts and images, those that are text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))
