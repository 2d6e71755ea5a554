"""Documents to tokens, and which of those tokens are learned.

A text is learned from its first token to its last. Of a conversation only what the assistant says is, and the token
with which its turn ends; the rest is there to be read. Each kind of tokenizer has its own way to write a conversation:

    llama3, tiktoken   Meta's for Llama 3: <|start_header_id|>role<|end_header_id|>, two line feeds, content, <|eot_id|>
    sentencepiece      Meta's for Llama 2: begin of text, [INST] question [/INST] answer, end of text, for every turn
    huggingface        the chat template of the tokenizer's own folder
    bytes              role, colon, line feed, content, end of text

What the messages spell is text in all of them, so no message can end its own turn or begin another's.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np

from titan.config.schema import RecordFormat, SourceConfig, TokenizerKind
from titan.data.conversation import BadConversation, check_messages
from titan.data.tokenizer import JsonTokenizer, Tokenizer, mend
from titan.errors import ConfigError, Problem

_LLAMA2_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


@dataclass(frozen=True)
class Encoded:
    """The tokens of a document."""

    tokens: np.ndarray
    """Shape: (N,), uint32."""
    learned: np.ndarray | None = None
    """Which of them count as labels. Shape: (N,), bool. None: all do."""


class Encoder:
    """Turns the documents of a source into tokens.

    Raises:
        ConfigError: If the source holds conversations and the tokenizer has no way to write them.
    """

    def __init__(self, tokenizer: Tokenizer, config: SourceConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self._template = None
        if config.format is RecordFormat.chat and isinstance(tokenizer, JsonTokenizer):
            self._template = ChatTemplate(tokenizer)

    def encode(self, content: str | list[Any]) -> Encoded:
        """Return the tokens of a document.

        Args:
            content: A text, or with data.format=chat a list of messages, each with a role and content.

        Raises:
            BadConversation: If the messages cannot be encoded.
        """
        if self.config.format is RecordFormat.text:
            assert isinstance(content, str), "a source gives what its format says"
            return Encoded(self.tokenizer.encode(content))
        messages = check_messages(content)
        if self._template is not None:
            return self._template.encode(messages)
        if self.tokenizer.config.kind is TokenizerKind.sentencepiece:
            return encode_llama2(self.tokenizer, messages)
        if self.tokenizer.config.kind is TokenizerKind.bytes:
            return encode_plain(self.tokenizer, messages)
        return encode_llama3(self.tokenizer, messages)


def encode_llama3(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> Encoded:
    """Write a conversation as Llama 3 reads it. A tool's answer has the role ipython there.

    Source:
        Meta's package llama-models, ChatFormat; https://www.llama.com/docs/model-cards-and-prompt-formats/
    """
    special = tokenizer.special
    tokens = _Tokens()
    tokens.add([special["<|begin_of_text|>"]], False)
    for message in messages:
        role = "ipython" if message["role"] == "tool" else message["role"]
        tokens.add([special["<|start_header_id|>"]], False)
        tokens.add(tokenizer.encode_text(role), False)
        tokens.add([special["<|end_header_id|>"]], False)
        tokens.add(tokenizer.encode_text("\n\n"), False)
        is_learned = message["role"] == "assistant"
        tokens.add(tokenizer.encode_text(message["content"]), is_learned)
        tokens.add([special["<|eot_id|>"]], is_learned)
    return tokens.encoded()


def encode_llama2(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> Encoded:
    """Write a conversation as Llama 2 reads it: [INST] <<SYS>> system <</SYS>> question [/INST] answer.

    Its marks are text and not tokens, so a message that spells one is refused, as in Meta's own code.

    Raises:
        BadConversation: If user and assistant do not take turns, or if a message has one of the format's marks.

    Source:
        https://github.com/meta-llama/llama, llama/generation.py, chat_completion.
    """
    for message in messages:
        if mark := next((mark for mark in _LLAMA2_MARKS if mark in message["content"]), None):
            raise BadConversation(f"a message has {mark} in it, a mark of Llama 2's format", "a mark of the format")
    system = ""
    if messages[0]["role"] == "system":
        system, messages = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n", messages[1:]
    roles = [message["role"] for message in messages]
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(roles)):
        raise BadConversation(
            f"Llama 2's format has user and assistant take turns, but here: {', '.join(roles)}", "roles out of turn"
        )
    tokens = _Tokens()
    for index in range(0, len(messages), 2):
        question = messages[index]["content"] if index else system + messages[index]["content"]
        prompt = f"[INST] {question.strip()} [/INST]"
        asked = tokenizer.encode_text(prompt)
        tokens.add([tokenizer.bos], False)
        if index + 1 == len(messages):
            tokens.add(asked, False)
            break
        turn = tokenizer.encode_text(f"{prompt} {messages[index + 1]['content'].strip()} ")
        same = min(len(asked), len(turn))
        differs = np.flatnonzero(asked[:same] != turn[:same])
        same = int(differs[0]) if len(differs) else same
        tokens.add(turn[:same], False)
        tokens.add(turn[same:], True)
        tokens.add([tokenizer.eos], True)
    return tokens.encoded()


def encode_plain(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> Encoded:
    """Write a conversation in plain words, where there is no format: role, colon, line feed, content, end of text."""
    tokens = _Tokens()
    tokens.add([tokenizer.bos], False)
    for message in messages:
        is_learned = message["role"] == "assistant"
        tokens.add(tokenizer.encode_text(f"{message['role']}:\n"), False)
        tokens.add(tokenizer.encode_text(message["content"]), is_learned)
        tokens.add([tokenizer.eos], is_learned)
    return tokens.encoded()


class _Tokens:
    """Tokens, piece by piece."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._learned: list[np.ndarray] = []

    def add(self, tokens: np.ndarray | list[int], is_learned: bool) -> None:
        self._pieces.append(np.asarray(tokens, np.uint32))
        self._learned.append(np.full(len(tokens), is_learned))

    def encoded(self) -> Encoded:
        return Encoded(np.concatenate(self._pieces), np.concatenate(self._learned))


class ChatTemplate:
    """The template of a tokenizer's folder, in a sandbox: it comes from the hub, and is a program.

    Where the assistant's words are in what it makes is found with its prompt for generation: a conversation up to an
    answer and that prompt is how the whole one begins, up to that answer. So a token is learned if it begins between
    there and the last special token of the turn.

    The clock is not given to it: the rows of a run must be the same tomorrow. Templates fall back on a date of their
    own.
    """

    def __init__(self, tokenizer: JsonTokenizer) -> None:
        self.tokenizer = tokenizer
        source = tokenizer.file.chat_template
        where = f"tokenizer.path = {tokenizer.config.path}"
        if source is None:
            raise ConfigError(
                [
                    Problem(
                        f"data.format = chat, but {where} has no chat template",
                        "It stands in tokenizer_config.json or chat_template.jinja.",
                        "tokenizer.path=/path/to/its/instruct/version   or  data.format=text",
                    )
                ]
            )
        special = sorted(tokenizer.special, key=len, reverse=True)  # of two that begin alike the longer one is meant
        self._special = re.compile("|".join(map(re.escape, special)) or _NEVER)
        self._single = [token for token in special if len(token) == 1]
        self._beginnings = re.compile("|".join(_beginnings(special)) or _NEVER)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            problem = Problem(f"{where} has a chat template that cannot be read", str(error))
            raise ConfigError([problem]) from error

    def encode(self, messages: list[dict[str, str]]) -> Encoded:
        """Return the tokens of a conversation, and which are the assistant's.

        Raises:
            BadConversation: If the template refuses it, or does not write it one turn after the other.
        """
        guard, mark, *free = self._unused(messages)
        stand_ins = dict(zip(self._single, free, strict=True))
        messages = [
            message | {"content": self._guard(mend(message["content"]), guard, stand_ins)} for message in messages
        ]
        whole = self._render(messages)
        spans = self._spans(messages, whole)
        text, spans = self._mark(whole, spans, guard, mark, stand_ins)
        tokens, places = self.tokenizer.encode_marked(text, mark)
        starts = np.array([start for start, _ in places], np.int64)
        learned = np.zeros(len(tokens), bool)
        for start, stop in spans:
            learned |= (starts >= start) & (starts < stop)
        return Encoded(tokens, learned)

    def _render(self, messages: list[dict[str, str]], with_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=with_prompt,
                **self.tokenizer.file.variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise BadConversation(f"the chat template refuses it: {error}", "refused by the chat template") from error

    def _spans(self, messages: list[dict[str, str]], whole: str) -> list[tuple[int, int]]:
        """Return where in the whole the answers are: from the end of the prompt to that of the turn's last token."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._render(messages[:index], with_prompt=True), self._render(messages[: index + 1])
            if not (whole.startswith(before) and whole.startswith(after) and len(before) <= len(after)):
                raise BadConversation(
                    f"the chat template writes message {index + 1} in another way when it is the last, "
                    "so where the assistant's words are cannot be told",
                    "not written turn by turn",
                )
            spans.append((len(before), self._end_of_turn(whole, len(before), len(after))))
        return spans

    def _end_of_turn(self, whole: str, start: int, stop: int) -> int:
        """Return where a turn's last special token ends, if nothing but blanks comes after it."""
        turn = whole[start:stop].rstrip()
        return start + len(turn) if any(turn.endswith(token) for token in self.tokenizer.special) else stop

    def _guard(self, content: str, guard: str, stand_ins: dict[str, str]) -> str:
        """Break every special token that a message spells, with a character that is taken out again.

        One of a single character cannot be broken: another character stands for it meanwhile.
        """
        return self._beginnings.sub(lambda found: stand_ins.get(found[0], found[0] + guard), content)

    def _mark(
        self, whole: str, spans: list[tuple[int, int]], guard: str, mark: str, stand_ins: dict[str, str]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Put marks for the template's special tokens, and messages' own characters back; the spans move along."""
        marks = self.tokenizer.marks_of(mark)
        edges = [0, *(edge for span in spans for edge in span), len(whole)]
        pieces = []
        for start, stop in itertools.pairwise(edges):
            piece = self._special.sub(lambda found: marks[found[0]], whole[start:stop]).replace(guard, "")
            for token, stand_in in stand_ins.items():
                piece = piece.replace(stand_in, token)
            pieces.append(piece)
        moved = np.cumsum([len(piece) for piece in pieces]).tolist()
        return "".join(pieces), [(moved[2 * index], moved[2 * index + 1]) for index in range(len(spans))]

    def _unused(self, messages: list[dict[str, str]]) -> list[str]:
        """Return characters that stand for nothing in Unicode and are in no message: a guard, a mark, stand-ins."""
        used = {char for message in messages for char in _NONCHARACTER.findall(message["content"])}
        free = [char for char in _NO_CHARACTERS if char not in used]
        count = 2 + len(self._single)
        if len(free) < count:
            raise BadConversation(
                f"it has {len(used)} of the code points in it that are no characters, and {count} of them are needed",
                "too many noncharacters",
            )
        return free[:count]


def _beginnings(special: list[str]) -> list[str]:
    """Return patterns of the first characters of special tokens, where the rest of one follows."""
    rests: dict[str, list[str]] = {}
    for token in special:
        rests.setdefault(token[0], []).append(re.escape(token[1:]))
    return [f"{re.escape(first)}(?={'|'.join(after)})" for first, after in rests.items()]


_NO_CHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
"""Code points that Unicode keeps free for use inside of a program."""
_NEVER = r"(?!)"
_NONCHARACTER = re.compile(f"[{_NO_CHARACTERS}]")


class _Generation(jinja2.ext.Extension):
    """{% generation %}, with which newer templates mark the assistant's words; titan finds those without it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """Return what transformers renders chat templates with, less the clock."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
