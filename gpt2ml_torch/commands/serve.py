"""`gpt2ml serve MODEL`: OpenAI's completions endpoint and a page, for many people at once."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import ipaddress
import logging
import os
from pathlib import Path

from gpt2ml_torch.commands.common import LoadOptions, load_generator
from gpt2ml_torch.commands.parsing import add_options, given
from gpt2ml_torch.serving.config import ServeConfig

EXAMPLES = (
    "gpt2ml serve out.safetensors",
    "gpt2ml serve out.safetensors --quantize int4 --host 0.0.0.0 --api-key SECRET",
)
KEY_VARIABLE = "GPT2ML_API_KEY"

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(ServeConfig, LoadOptions):
    """Which model to serve, and how."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the address and the limits."""
    add_options(parser, ServeOptions, without=("batch_size",))
    parser.add_argument(
        "--adapter",
        metavar="NAME=FOLDER",
        action="append",
        help="refused: a LoRA adapter is served merged, see gpt2ml merge",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    if arguments.adapter:
        folder = arguments.adapter[0].partition("=")[2] or "FOLDER"
        raise ValueError(
            "--adapter: the kernels add no LoRA adapter to packed weights for some rows alone; "
            f"gpt2ml merge {arguments.model} {folder} --out merged.safetensors, and serve that by "
            "a process of its own"
        )
    options = ServeOptions(**given(arguments, ServeOptions))
    try:
        runner = importlib.import_module("gpt2ml_torch.serving.runner")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"serving needs the package {error.name}; pip install 'gpt2ml-torch[serve]'"
        ) from None
    with runner.listen(options.host, options.port) as sock:  # before the model takes its time
        generator = load_generator(options)
        keys = (*options.api_key, *filter(None, [os.environ.get(KEY_VARIABLE)]))
        host, port, *_ = sock.getsockname()
        _say_where(host, port, keys)
        runner.serve(
            generator,
            sock,
            options,
            name=options.name or Path(options.model).stem,
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
