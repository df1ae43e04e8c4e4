"""Memory and speed of fine-tuning at the published size, for this project and transformers' GPT-2.

    scripts/bench finetune                          # every setting, a table in benchmarks/
    scripts/bench finetune bfloat16 --layers 4      # one setting on a smaller model

Each setting runs in a process of its own, on random weights that it loads from a file as `gpt2ml
finetune` does. Memory is the peak resident set, less the one of a process that only imports torch.
Speed is measured for our bfloat16 setting and for transformers' GPT-2 of the same size with the
same optimizer, step in the backward pass and checkpointing; both stay loaded and take turns. The
other settings take one step. Writes RESULT.json and RESULT.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpt2ml_torch import GPT2MLConfig
from gpt2ml_torch.finetuning import estimate_memory
from scripts.benchmarks import machine
from scripts.benchmarks.program import ROOT, finish, make_parser, start
from scripts.benchmarks.tuning_contestant import SETTINGS, settings_of
from scripts.benchmarks.weights import write_random_model

TARGETS = {"bfloat16": 4.0, "float32": 7.0, "lora": 3.6, "lora-int8": 2.6}  # GiB, at 48 layers
PEER = "transformers"
ALL = (*SETTINGS, PEER)

logger = logging.getLogger("bench")


class Contestant:
    """A process that takes steps on request; `facts` holds its latest answers."""

    def __init__(self, setting: str, options: argparse.Namespace, model: Path) -> None:
        logger.info("loading %s", setting)
        self.setting = setting
        command = [sys.executable, "-m", "scripts.benchmarks.tuning_contestant"]
        sizes = [str(options.layers), str(options.tokens)]
        self._process = subprocess.Popen(
            [*command, setting, str(model), *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.seconds: list[float] = []
        self.facts = self._answer()

    def step(self) -> None:
        """Take one step and note its time."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self.facts |= self._answer()
        self.seconds.append(self.facts["seconds"])
        logger.info("%s: %.1f s, %.2f GiB", self.setting, self.seconds[-1], self.facts["peak_gib"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.setting} ended with status {self._process.wait()}")
        return dict(json.loads(line))

    def row(self) -> dict[str, Any]:
        """The measurements; the first step, which allocates, is not counted for speed."""
        row = {key: self.facts[key] for key in ("peak_gib", "weights_gib")}
        row["setting"] = self.setting
        if len(self.seconds) == 1:
            return row
        seconds = statistics.median(self.seconds[1:])
        return row | {
            "seconds": round(seconds, 2),
            "tokens_per_second": round(self.facts["tokens"] / seconds, 2),
            "flops_per_second": self.facts["flops"] / seconds,
        }

    def stop(self) -> None:
        self._process.communicate()


def main() -> None:
    parser = make_parser("finetune", __doc__, out="finetuning")
    parser.add_argument("settings", nargs="*", choices=[*ALL, []], metavar="SETTING")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2, help="steps timed, after a warm-up step")
    options = start(parser)
    result = measure(options, options.settings or list(ALL))
    finish(options.out, result, markdown(result))


def measure(options: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """The memory of each setting, and the speed of bfloat16 and the peer, taking turns."""
    config = dataclasses.replace(GPT2MLConfig.mega(), num_hidden_layers=options.layers)
    rates = {name: matmul_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    bare = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.tuning_contestant"],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        check=True,
    )
    baseline = float(json.loads(bare.stdout)["peak_gib"])
    rows = []
    with tempfile.TemporaryDirectory(prefix="gpt2ml-bench-") as folder:
        model = Path(folder) / "random.safetensors"
        write_random_model(model, config, torch.bfloat16)
        pair = [setting for setting in settings if setting in ("bfloat16", PEER)]
        alone = [[setting] for setting in settings if setting not in pair]
        for group in [pair, *alone]:
            contestants = [Contestant(setting, options, model) for setting in group]
            for _ in range(1 + (options.steps if group == pair else 0)):
                for contestant in contestants:
                    contestant.step()
            for contestant in contestants:
                rows.append(contestant.row())
                contestant.stop()
    for row in rows:
        row["above_import_gib"] = round(row["peak_gib"] - baseline, 3)
        if "seconds" in row:
            row["share_of_matmul_rate"] = round(row["flops_per_second"] / max(rates.values()), 3)
        if row["setting"] != PEER:
            foretold = estimate_memory(settings_of(row["setting"], length=options.tokens), config)
            row["predicted_gib"] = round(foretold.total / 2**30 - baseline, 3)
    return {
        "machine": machine.describe(),
        "layers": options.layers,
        "tokens": options.tokens,
        "steps": options.steps,
        "import_torch_gib": round(baseline, 3),
        "matmul_gflops": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
        "rows": sorted(rows, key=lambda row: settings.index(row["setting"])),
    }


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations per second of a product of the MLP's size, the best of seven."""
    x = torch.randn(1024, 1536, dtype=dtype)
    weight = torch.randn(6144, 1536, dtype=dtype)
    seconds = [machine.seconds_of(lambda: torch.nn.functional.linear(x, weight)) for _ in range(7)]
    return 2 * x.numel() * len(weight) / min(seconds)


def markdown(result: dict[str, Any]) -> str:
    """The table, with the targets if this is the size that they were set for."""
    about, rates = result["machine"], result["matmul_gflops"]
    whole = (result["layers"], result["tokens"]) == (48, 1024)
    lines = [
        f"{about['date']}, {about['processor']}, {about['cores']} cores, "
        f"{about['memory_gib']} GiB, GPU: {about['gpu']}; torch {about['torch']}. "
        f"{result['layers']} layers of the published size, 1 × {result['tokens']:,} tokens a step, "
        "gradient checkpointing. Memory: peak resident set above what `import torch` takes "
        f"({result['import_torch_gib']:.2f} GiB), loading included. Speed: median of "
        f"{result['steps']} steps after one more. Products of the MLP's size run at "
        f"{rates['float32']:.0f} Gflop/s in float32, {rates['bfloat16']:.0f} in bfloat16.",
        "",
        "| setting | memory, GiB | target | predicted | tokens/s | of the matmul rate |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        target = TARGETS.get(row["setting"]) if whole else None
        timed = "seconds" in row
        speed = f"{row['tokens_per_second']:.1f}" if timed else ""
        share = f"{row['share_of_matmul_rate']:.0%}" if timed else ""
        lines.append(
            f"| {row['setting']} | {row['above_import_gib']:.2f} | "
            f"{f'≤ {target}' if target else ''} | {row.get('predicted_gib', '')} | "
            f"{speed} | {share} |"
        )
    speeds = {row["setting"]: row.get("tokens_per_second") for row in result["rows"]}
    ours, peer = speeds.get("bfloat16"), speeds.get(PEER)
    if ours and peer:
        ratio = ours / peer
        lines += ["", f"Ours in bfloat16 / transformers GPT-2, taking turns: {ratio:.2f}"]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
