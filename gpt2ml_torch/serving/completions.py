"""The completions request: JSON from a stranger to checked prompts and a `GenerationConfig`.

Source: OpenAI's API reference, "Create completion". Fields of our own carry the names of
`GenerationConfig`, which are transformers'.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt2ml_torch.generation import GenerationConfig
from gpt2ml_torch.serving.errors import APIError, invalid
from gpt2ml_torch.tokenizer import Tokenizer

Prompt = str | tuple[int, ...]

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_BIASES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int = 4096
    max_samples: int = 16  # texts of one request: prompts times n
    max_prompt_tokens: int = 16_384
    max_body: int = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """One checked request; `config` holds everything that decides the text."""

    model: str | None
    prompts: tuple[Prompt, ...]
    config: GenerationConfig
    n: int
    max_tokens: int  # 0: only the prompt is read
    logprobs: int | None  # alternatives for each token, if wanted
    echo: bool
    stream: bool
    include_usage: bool


# -- one value ------------------------------------------------------------------------------------


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise invalid(f"{name} is {_shown(value)}; expected true or false", param=name)
    return value


def _whole(low: int, high: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if type(value) is float and value.is_integer():  # JSON knows one kind of number
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise invalid(
                f"{name} is {_shown(value)}; expected a whole number from {low} to {high}",
                param=name,
            )
        return value

    return check


def _number(low: float, high: float, *, above: bool = False) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        fits = (
            type(value) in (int, float)
            and (low < value if above else low <= value)
            and value <= high
        )
        if not fits:
            bounds = f"above {low:g}" if above else f"from {low:g}"
            raise invalid(
                f"{name} is {_shown(value)}; expected a number {bounds} to {high:g}", param=name
            )
        return float(value)

    return check


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(f"{name} is {_shown(value)}; expected a string", param=name)
    return _unicode(name, value)


def _stops(name: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > MAX_STOPS:
        raise invalid(
            f"{name} is {_shown(value)}; expected a string or up to {MAX_STOPS} of them", param=name
        )
    for stop in values:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise invalid(
                f"{name} holds {_shown(stop)}; expected strings of 1 to {MAX_STOP_LENGTH} "
                "characters",
                param=name,
            )
    return tuple(_unicode(name, stop) for stop in values)


def _biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise invalid(
            f"{name} is {_shown(value)}; expected an object of up to {MAX_BIASES} token ids and "
            "numbers",
            param=name,
        )
    pairs = []
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise invalid(f"{name} holds the key {_shown(key)}; expected a token id", param=name)
        pairs.append((int(key), _number(-100, 100)(name, bias)))
    return tuple(pairs)


def _choice(*choices: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise invalid(
                f"{name} is {_shown(value)}; expected one of {', '.join(choices)}", param=name
            )
        return str(value)

    return check


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unicode(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(
            f"{name} holds half of a surrogate pair, no Unicode text", param=name
        ) from None
    return text


# Fields that pass into `GenerationConfig`: the request's name -> the config's name, the check.
_CONFIG_FIELDS: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    "temperature": ("temperature", _number(0, 100)),
    "top_p": ("top_p", _number(0, 1, above=True)),
    "top_k": ("top_k", _whole(-1, 1 << 20)),
    "min_p": ("min_p", _number(0, 1)),
    "typical_p": ("typical_p", _number(0, 1, above=True)),
    "repetition_penalty": ("repetition_penalty", _number(0, 100, above=True)),
    "presence_penalty": ("presence_penalty", _number(-2, 2)),
    "frequency_penalty": ("frequency_penalty", _number(-2, 2)),
    "no_repeat_ngram_size": ("no_repeat_ngram_size", _whole(0, 1024)),
    "logit_bias": ("logit_bias", _biases),
    "stop": ("stop", _stops),
    "seed": ("seed", _whole(-(1 << 63), (1 << 64) - 1)),
    "top_p_rule": ("top_p_rule", _choice("huggingface", "grover")),
}
_OTHER_FIELDS = (
    *("model", "prompt", "max_tokens", "min_tokens", "n", "best_of", "stream", "stream_options"),
    *("logprobs", "echo", "suffix", "user", "num_beams"),
)


def parse_request(
    body: Any, *, limits: Limits, tokenizer: Tokenizer, vocab_size: int, defaults: GenerationConfig
) -> CompletionRequest:
    """Check a request's JSON; raises `APIError` naming the field."""
    if not isinstance(body, dict):
        raise invalid(f"the body is {_shown(body)}; expected a JSON object")
    _check_names(body)
    given = {name: value for name, value in body.items() if value is not None}
    n = _read(given, "n", _whole(1, limits.max_samples), 1)
    stream = _read(given, "stream", _boolean, False)
    echo = _read(given, "echo", _boolean, False)
    _check_unsupported(given, n)
    prompts = _prompts(given.get("prompt"), limits, tokenizer, vocab_size)
    if len(prompts) * n > limits.max_samples:
        raise invalid(
            f"{len(prompts)} prompts times n={n} are more than {limits.max_samples} texts; send "
            "several requests",
            param="n",
        )
    max_tokens = _read(given, "max_tokens", _whole(0, limits.max_tokens), DEFAULT_MAX_TOKENS)
    if max_tokens == 0 and not echo:
        raise invalid("max_tokens is 0, which needs echo", param="max_tokens")
    return CompletionRequest(
        model=_read(given, "model", _text, None),
        prompts=prompts,
        config=_config(given, max_tokens, vocab_size, defaults),
        n=n,
        max_tokens=max_tokens,
        logprobs=_read(given, "logprobs", _whole(0, MAX_TOP_LOGPROBS), None),
        echo=echo,
        stream=stream,
        include_usage=_include_usage(given, stream),
    )


def _read(
    given: Mapping[str, Any], name: str, check: Callable[[str, Any], Any], default: Any
) -> Any:
    return check(name, given[name]) if name in given else default


def _check_names(body: Mapping[str, Any]) -> None:
    known = (*_CONFIG_FIELDS, *_OTHER_FIELDS)
    for name in body:
        if name not in known:
            close = difflib.get_close_matches(name[:60], known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise APIError(
                400,
                f"unrecognized request argument: {_shown(name)}{hint}",
                param=name[:60],
                code="unknown_parameter",
            )


def _check_unsupported(given: Mapping[str, Any], n: int) -> None:
    if _read(given, "suffix", _text, ""):
        raise invalid("suffix is not supported: the model only writes forward", param="suffix")
    if _read(given, "best_of", _whole(1, 1 << 20), n) != n:
        raise invalid("best_of is not supported, except equal to n", param="best_of")
    if _read(given, "num_beams", _whole(1, 1024), 1) != 1:
        raise invalid(
            "num_beams is not supported by the server; Generator.generate searches with beams",
            param="num_beams",
        )
    _read(given, "user", _text, None)


def _include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not set(options) <= {
        "include_usage",
        "include_obfuscation",
    }:
        raise invalid(
            f"stream_options is {_shown(options)}; expected an object with include_usage",
            param="stream_options",
        )
    if not stream:
        raise invalid("stream_options needs stream", param="stream_options")
    return _read(options, "include_usage", _boolean, False)


def _config(
    given: Mapping[str, Any], max_tokens: int, vocab_size: int, defaults: GenerationConfig
) -> GenerationConfig:
    options = {
        field: check(name, given[name])
        for name, (field, check) in _CONFIG_FIELDS.items()
        if name in given
    }
    options["top_k"] = max(options.get("top_k", 0), 0)  # -1 means all, as in vLLM
    for id_, _ in options.get("logit_bias", ()):
        if id_ >= vocab_size:
            raise invalid(
                f"logit_bias names the id {id_}; the model has 0 to {vocab_size - 1}",
                param="logit_bias",
            )
    options["max_new_tokens"] = max(max_tokens, 1)
    options["min_new_tokens"] = _read(given, "min_tokens", _whole(0, max(max_tokens, 0)), 0)
    # Of the file's own defaults only those that say what may be written; how it is drawn is the
    # request's, with OpenAI's defaults.
    kept = ("eos_token_id", "suppress_tokens", "allow_tokens", "bad_words")
    options |= {name: getattr(defaults, name) for name in kept}
    try:
        return GenerationConfig(**options)
    except ValueError as error:
        raise invalid(str(error)) from None


def _prompts(
    value: Any, limits: Limits, tokenizer: Tokenizer, vocab_size: int
) -> tuple[Prompt, ...]:
    if value is None:
        raise invalid("prompt is missing; expected a string, or token ids", param="prompt")
    if isinstance(value, str):
        items: Sequence[Any] = [value]
    elif isinstance(value, list) and value and all(type(item) is int for item in value):
        items = [value]
    else:
        items = value
    if not isinstance(items, list) or not items:
        raise invalid(
            f"prompt is {_shown(value)}; expected a string, a list of strings, token ids, or a "
            "list of token ids",
            param="prompt",
        )
    if len(items) > limits.max_samples:
        raise invalid(
            f"prompt holds {len(items)} prompts; this server takes up to {limits.max_samples} at a "
            "time",
            param="prompt",
        )
    return tuple(_prompt(item, limits, tokenizer, vocab_size) for item in items)


def _prompt(item: Any, limits: Limits, tokenizer: Tokenizer, vocab_size: int) -> Prompt:
    if isinstance(item, str):
        text = _unicode("prompt", item)
        length = len(tokenizer.encode(text))
        prompt: Prompt = text
    elif isinstance(item, list) and all(type(id_) is int for id_ in item):
        length = len(item)
        prompt = tuple(item)
        if any(not 0 <= id_ < vocab_size for id_ in prompt):
            raise invalid(
                f"prompt holds a token id that the model lacks; it has 0 to {vocab_size - 1}",
                param="prompt",
            )
    else:
        raise invalid(f"prompt holds {_shown(item)}; expected text or token ids", param="prompt")
    if not length:
        raise invalid(
            "prompt holds no token, and the model knows no begin token: give at least one "
            "character",
            param="prompt",
        )
    if length > limits.max_prompt_tokens:
        raise APIError(
            400,
            f"prompt has {length} tokens; this server takes up to {limits.max_prompt_tokens}",
            param="prompt",
            code="context_length_exceeded",
        )
    return prompt
