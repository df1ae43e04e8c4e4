"""The texts in one JSON value of a training file, and the shapes that are recognised."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gpt2ml_torch.options import OptionError

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

# Question and answer, by their names in published data sets. The fields in brackets may be between
# them.
_PAIRS = (
    ("prompt", (), "completion"),
    ("prompt", (), "response"),
    ("prompt", (), "output"),
    ("prompt", (), "answer"),
    ("instruction", ("input", "context"), "output"),
    ("instruction", ("input", "context"), "response"),
    ("input", (), "output"),
    ("input", (), "target"),
    ("inputs", (), "targets"),
    ("question", (), "answer"),
    ("question", (), "response"),
    ("query", (), "response"),
    ("query", (), "answer"),
)
# An article, or a poem, with its title or without.
_ARTICLES = ("content", "body", "article", "paragraphs")
# Names of a list of all documents.
_LISTS = frozenset(("data", "documents", "texts", "rows", "items", "examples"))
_CONVERSATIONS = ("messages", "conversations", "conversation")
_ANSWERING_ROLES = frozenset(("assistant", "gpt", "bot", "model", "chatgpt", "chatglm"))
_READ_ROLES = frozenset(
    ("user", "human", "prompter", "system", "developer", "tool", "function", "observation")
)
_EXPECTED = 'expected a string, {"text": ...}, {"prompt": ..., "completion": ...} or another shape'
_CURE = "name the fields with {text_field}, or with {prompt_field} and {completion_field}"


class Part(NamedTuple):
    """A text of a record, in order."""

    text: str
    learned: bool  # or only read


class Record(NamedTuple):
    """The texts of one document, and the shape in which they were found."""

    parts: tuple[Part, ...]
    shape: str  # such as "text" or "instruction, input -> output"


@dataclass(frozen=True)
class Fields:
    """The names of the fields with the texts, if they would not be recognised.

    Raises `ValueError` for a prompt without a completion, a completion without a prompt, and for
    either beside a text.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            given, other = "prompt", "completion"
            if self.prompt is None:
                given, other = other, given
            raise OptionError(f"{{{given}_field}} is set without {{{other}_field}}; expected both")
        if self.text is not None and self.prompt is not None:
            raise OptionError("both {text_field} and {prompt_field} are set; expected one of them")
        for name in ("text", "prompt", "completion"):
            if getattr(self, name) == "":
                raise OptionError(f"{{{name}_field}} is empty; expected the name of a field")

    @property
    def given(self) -> bool:
        """Whether any field is named, so that nothing has to be recognised."""
        return self.text is not None or self.prompt is not None


def read_record(value: object, fields: Fields) -> Record:
    """The texts of a JSON value. An empty text is an empty string, which the caller counts.

    Raises `ValueError`, without file and line, for values of no known shape, fields that hold no
    string, and halves of surrogate pairs.
    """
    if value is None:  # a row that was empty
        return Record((Part("", True),), "null")
    if isinstance(value, str) and not fields.given:
        return Record((Part(_whole(value, "the text"), True),), "strings")
    if not isinstance(value, dict):
        raise ValueError(f"found {_kind(value)}; {_expectation(fields)}")
    if fields.text is not None:
        return _texts(value, (fields.text,))
    if fields.prompt is not None and fields.completion is not None:
        return _pair(value, fields.prompt, [], fields.completion)
    return _recognised(value)


def _recognised(value: dict[str, object]) -> Record:
    for name in _CONVERSATIONS:
        if isinstance(value.get(name), list):
            return Record(tuple(_turns(value[name], name)), name)
    if "text" in value:
        for extra in ("prompt", "completion"):
            if extra in value:
                raise OptionError(f"found both text and {extra}; {_CURE}")
        return _texts(value, ("text",))
    for first, between, last in _PAIRS:
        if first in value and last in value:
            return _pair(value, first, [name for name in between if name in value], last)
    for name in _ARTICLES:
        if name in value:
            return _texts(value, ("title", name) if "title" in value else (name,))
    for name, other in (("prompt", "completion"), ("completion", "prompt")):
        if name in value:
            raise OptionError(f"found {name} but no {other}; expected both, or {_CURE}")
    raise _unknown_shape(value)


def _unknown_shape(value: dict[str, object]) -> ValueError:
    names = ", ".join(map(repr, itertools.islice(value, 5))) or "none"
    for name, inner in value.items():
        if not isinstance(inner, list) or not re.fullmatch("[A-Za-z_]+", name):
            continue
        is_lines = all(isinstance(item, str) for item in inner)  # of one document
        if not is_lines or len(value) == 1 or name in _LISTS:
            return ValueError(
                f"no field text, nor prompt and completion; found {names}; if the documents are "
                f"the elements of {name}: jq -c '.{name}[]' OLD > NEW.jsonl"
            )
    return OptionError("no field text, nor prompt and completion; found {}; " + _CURE, names)


def _expectation(fields: Fields) -> str:
    if not fields.given:
        return _EXPECTED
    names = [name for name in (fields.text, fields.prompt, fields.completion) if name is not None]
    return f"expected an object with {' and '.join(map(repr, names))}"


def _texts(value: dict[str, object], names: tuple[str, ...]) -> Record:
    """Several fields as one text, each on its own line."""
    text = "\n".join(filter(None, (_string(value, name) for name in names)))
    return Record((Part(text, True),), ", ".join(names))


def _pair(value: dict[str, object], first: str, between: list[str], last: str) -> Record:
    read = [first, *between]
    prompt = "\n".join(filter(None, (_string(value, name) for name in read)))
    parts = (Part(prompt, False), Part(_string(value, last), True))
    return Record(parts, f"{', '.join(read)} -> {last}")


def _turns(turns: object, name: str) -> Iterator[Part]:
    """The text of each turn of a conversation; the assistant's turns are learned."""
    assert isinstance(turns, list)
    for number, turn in enumerate(turns, 1):
        where = f"turn {number} of {name}"
        if not isinstance(turn, dict):
            raise ValueError(f"{where} is {_kind(turn)}; expected an object with role and content")
        spoken = [role for role in turn if role in _ANSWERING_ROLES | _READ_ROLES]
        if spoken and "role" not in turn and "from" not in turn:
            for role in spoken:  # {"human": ..., "assistant": ...}
                yield Part(_content(turn[role], where), role in _ANSWERING_ROLES)
            continue
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in _ANSWERING_ROLES | _READ_ROLES:
            shown = json.dumps(role, ensure_ascii=False)[:40]
            raise ValueError(f"the role in {where} is {shown}; expected user or assistant")
        field = next((key for key in ("content", "value", "text") if key in turn), None)
        content = turn[field] if field is not None else None
        yield Part(_content(content, where), role in _ANSWERING_ROLES)


def _content(content: object, where: str) -> str:
    """The text of a turn: a string, nothing (a tool is called), or a list of typed parts."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "\n".join(text for text in texts if isinstance(text, str))
    if content is None:
        return ""
    if not isinstance(content, str):
        raise ValueError(f"the content of {where} is {_kind(content)}; expected a string")
    return _whole(content, f"the content of {where}")


def _string(value: dict[str, object], name: str) -> str:
    """A field's text; null, the export of an empty cell of a table, is an empty text."""
    if name not in value:
        names = ", ".join(map(repr, itertools.islice(value, 5))) or "none"
        raise ValueError(f"no field {name!r}; found {names}")
    text = value[name]
    if text is None:
        return ""
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        text = "\n".join(text)
    if not isinstance(text, str):
        raise ValueError(f"{name} is {_kind(text)}; expected a string")
    return _whole(text, name)


def _whole(text: str, name: str) -> str:
    if _LONE_SURROGATE.search(text):
        raise ValueError(f"{name} holds half a surrogate pair (\\ud800 to \\udfff); write it whole")
    return text


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    for kind, name in ((dict, "an object"), (list, "an array"), (str, "a string")):
        if isinstance(value, kind):
            return name
    return "a number"
