"""`gpt2ml serve MODEL`: OpenAI's completions endpoint and a page, for many people at once."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import ipaddress
import logging
import os
from pathlib import Path

from gpt2ml_torch.commands.common import WriteOptions, load_generator
from gpt2ml_torch.commands.parsing import add_options, given
from gpt2ml_torch.options import OptionError, option
from gpt2ml_torch.serving.config import ServeConfig

EXAMPLES = (
    "gpt2ml serve out.safetensors",
    "gpt2ml serve out.safetensors --quantize int4 --host 0.0.0.0 --api-key SECRET",
    "gpt2ml serve out.safetensors --adapter poems=adapter",
)
KEY_VARIABLE = "GPT2ML_API_KEY"

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(ServeConfig, WriteOptions):
    """Which model to serve, with which adapters, and how."""

    adapter: tuple[str, ...] = option(
        (),
        path=True,
        metavar="NAME=FOLDER",
        help="also serve this LoRA adapter over the model, under this name",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [self.served_name]
        for adapter in self.adapter:
            name, folder = _parts(adapter)
            if not (name and folder and name.isprintable()):
                raise OptionError("{adapter} is {!r}; expected NAME=FOLDER", adapter)
            if name in names:
                raise OptionError("{adapter} gives the name {!r} twice, or the model's", name)
            names.append(name)

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.name or Path(self.model).stem

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters' folders by name."""
        return dict(map(_parts, self.adapter))


def _parts(adapter: str) -> tuple[str, str]:
    name, _, folder = adapter.partition("=")
    return name, folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its adapters, the address and the limits."""
    add_options(parser, ServeOptions, without=("batch_size",))


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    options = ServeOptions(**given(arguments, ServeOptions))
    try:
        runner = importlib.import_module("gpt2ml_torch.serving.runner")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"serving needs the package {error.name}; pip install 'gpt2ml-torch[serve]'"
        ) from None
    with runner.listen(options.host, options.port) as sock:  # before the model takes its time
        generator = load_generator(options, assistant=options.assistant, adapters=options.adapters)
        keys = (*options.api_key, *filter(None, [os.environ.get(KEY_VARIABLE)]))
        host, port, *_ = sock.getsockname()
        _say_where(host, port, keys)
        runner.serve(
            generator,
            sock,
            options,
            name=options.served_name,
            api_keys=keys,
            log_level="warning" if options.quiet else "info",
        )
    return 0


def _say_where(host: str, port: int, keys: tuple[str, ...]) -> None:
    shown = f"[{host}]" if ":" in host else host
    _logger.info("listening on http://%s:%d/", shown, port)
    if ipaddress.ip_address(host).is_loopback:
        _logger.info("only this machine can ask; --host lets others")
    elif not keys:
        _logger.warning("every machine that reaches %s can ask: no --api-key was given", shown)
