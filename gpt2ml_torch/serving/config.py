"""The options of `gpt2ml serve`, each stated once."""

from __future__ import annotations

import dataclasses

from gpt2ml_torch.options import OptionError, check_options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How to serve a model. Raises `ValueError`, naming the field, for values out of range."""

    host: str = option(
        "127.0.0.1",
        group="address",
        help="address to listen on; 0.0.0.0 lets other machines ask, which calls for a key",
    )
    port: int = option(8000, low=0, high=65535, group="address", help="port; 0 takes a free one")
    allowed_host: tuple[str, ...] = option(
        (), group="address", metavar="NAME", help="further name that clients call this server by"
    )
    api_key: tuple[str, ...] = option(
        (),
        group="address",
        metavar="KEY",
        help="key that clients must send; GPT2ML_API_KEY holds one out of sight of other users",
    )
    name: str | None = option(
        None, group="address", default_text="the file's name", help="what clients call the model"
    )
    max_rows: int = option(8, low=1, high=1024, group="limits", help="texts written at a time")
    max_memory: float | None = option(
        None,
        above=0,
        high=1e6,
        metavar="GIB",
        group="limits",
        default_text="as needed",
        help="memory of the key-value cache, which lowers the number of texts at a time",
    )
    max_queue: int = option(
        64, low=0, high=100_000, group="limits", help="texts that may wait; more get status 429"
    )
    max_tokens: int = option(
        4096, low=1, high=1_000_000, group="limits", help="tokens that a text may ask for"
    )
    max_prompt_tokens: int = option(
        16_384, low=1, high=1_000_000, group="limits", help="tokens of a prompt"
    )
    max_samples: int = option(
        16, low=1, high=1024, group="limits", help="texts of one request: prompts times n"
    )
    prefix_cache_tokens: int = option(
        1024,
        low=0,
        high=10_000_000,
        group="limits",
        help="tokens of prompts whose keys and values are kept for requests that share them",
    )
    drain_seconds: float = option(
        30.0,
        low=0,
        high=86_400,
        group="limits",
        help="time that running texts have to end after SIGTERM or Ctrl-C",
    )
    log_prompts: bool = option(
        False, flags="--log-prompts", group="log", help="write prompts to the log"
    )

    def __post_init__(self) -> None:
        check_options(self)
        for key in self.api_key:
            if not key or not key.isprintable() or key != key.strip():
                raise OptionError(
                    "{api_key} is empty, or has spaces around it, or characters that can't be shown"
                )
