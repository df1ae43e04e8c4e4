"""`gpt2ml check MODEL`: proof that a converted model is right, on the user's own machine."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import gpt2ml_torch
from gpt2ml_torch import kernels
from gpt2ml_torch.checking import Finding, check_model
from gpt2ml_torch.checking.machine import free_bytes
from gpt2ml_torch.commands.output import one_line, printable, write_json
from gpt2ml_torch.commands.parsing import add_options, given
from gpt2ml_torch.commands.program import report_error
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.options import OptionError, check_options, option

EXAMPLES = (
    "gpt2ml check out.safetensors",
    "gpt2ml check out.safetensors --source ckpt_dir --report report.md",
)
_MARKS = {"pass": "ok  ", "fail": "FAIL", "info": "    "}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Which model file to check, against what, and how to report."""

    model: str = option(
        positional=True, path=True, help="a .safetensors file made by the converter"
    )
    source: str | None = option(
        None,
        path=True,
        metavar="CHECKPOINT",
        help="compare each tensor with the checkpoint it came from",
    )
    device: str = option("auto", help="cpu, cuda, cuda:1 ...")
    precisions: bool = option(
        True,
        flags="--no-precisions",
        inverted=True,
        help="leave out what concerns this machine: precisions and their speed",
    )
    json: bool = option(False, flags="--json", help="everything as one JSON object")
    report: str | None = option(
        None, path=True, metavar="FILE", help="write a Markdown report for a bug report"
    )

    def __post_init__(self) -> None:
        check_options(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, CheckOptions)


def run(arguments: argparse.Namespace) -> int:
    options = CheckOptions(**given(arguments, CheckOptions))
    _check_places(options)
    findings: list[Finding] = []
    with ModelFile.open(options.model) as file:
        for finding in _findings(file, options):
            findings.append(finding)
            if not options.json:
                text = one_line(finding.text)  # it quotes names that the file holds
                print(f"{_MARKS[finding.verdict]} {finding.name}: {text}", flush=True)
    good = all(finding.verdict != "fail" for finding in findings)
    environment = describe_environment()
    if options.json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        write_json({"passed": good, "environment": environment, "findings": listed})
    if options.report is not None:
        report = _markdown(findings, environment, good=good)
        Path(options.report).write_text(report, encoding="utf-8")
    if not good and not options.json:
        print("This model is not right; see the lines marked FAIL.")
    return 0 if good else 1


def _check_places(options: CheckOptions) -> None:
    """Notice before the work, which takes minutes, what could not be read or written after it."""
    if options.source is not None:
        importlib.import_module("convert.inputs").locate(Path(options.source))
    if options.report is None:
        return
    report = Path(options.report)
    if report.exists() and Path(options.model).exists() and report.samefile(options.model):
        raise OptionError("{report} is the model itself; name another file")
    with report.open("a", encoding="utf-8"):
        pass


def _findings(file: ModelFile, options: CheckOptions) -> Iterator[Finding]:
    yield from check_model(file, device=options.device, precisions=options.precisions)
    if options.source is not None:
        yield compare_with_source(file, Path(options.source))


def compare_with_source(file: ModelFile, source: Path) -> Finding:
    """Make each tensor from the checkpoint again and compare it with the file's, bit for bit."""
    # The converter is built on this package, so it is looked up when it is needed.
    locate = importlib.import_module("convert.inputs").locate
    differing_tensors = importlib.import_module("convert.comparison").differing_tensors
    try:
        differing = differing_tensors(file, locate(source))
    except (ValueError, OSError) as error:
        # It may name paths, which a finding must not.
        report_error("gpt2ml", error, context=f"reading {source}")
        return Finding("source", "fail", "the checkpoint could not be converted again")
    if differing:
        shown = ", ".join(differing[:3]) + (" ..." if len(differing) > 3 else "")
        count = f"{len(differing)} tensors are" if len(differing) > 1 else "1 tensor is"
        text = f"{count} not the checkpoint's in {file.precision}: {shown}"
        return Finding("source", "fail", text, {"differing": differing})
    statistics = len(file.slots)
    text = f"all {len(file.tensors)} tensors are the checkpoint's in {file.precision}, bit for bit"
    text += f", and so are {statistics} of the optimizer" if statistics else ""
    return Finding("source", "pass", text)


def describe_environment() -> dict[str, Any]:
    """What a bug report needs: versions and hardware, no names and no paths."""
    cpu = torch.device("cpu")
    return {
        "gpt2ml_torch": gpt2ml_torch.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "free_memory_bytes": free_bytes(cpu),
        "kernels": kernels.load_kernels(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _markdown(findings: list[Finding], environment: dict[str, Any], *, good: bool) -> str:
    lines = [f"# gpt2ml check: {'passed' if good else 'FAILED'}", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in environment.items()]
    lines += ["", "| check | verdict | finding |", "|---|---|---|"]
    for finding in findings:
        cells = (finding.name, finding.verdict, finding.text)
        escaped = (printable(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join([*lines, ""])
