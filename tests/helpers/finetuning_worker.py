"""Fine-tunings in processes of their own, for the tests: run, killed again and again, or measured.

python -m tests.helpers.finetuning_worker run '{"model": ...}' STOP_AFTER [... STOP_AFTER]
python -m tests.helpers.finetuning_worker kill '{"model": ...}' TIMES SEED
python -m tests.helpers.finetuning_worker memory '{"model": ...}'        # prints the peak, in bytes
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from gpt2ml_torch.finetuning.config import FinetuneConfig
from gpt2ml_torch.finetuning.distributed import processes
from gpt2ml_torch.finetuning.memory import peak_gib, tune_allocator
from gpt2ml_torch.finetuning.reporting import read_metrics
from gpt2ml_torch.finetuning.run import finetune


def main() -> None:
    """Do what the arguments say."""
    mode, *rest = sys.argv[1:]
    if mode == "run":
        with processes():
            for text, stop_after in zip(rest[::2], rest[1::2], strict=True):
                run(_config(text), int(stop_after))
    elif mode == "memory":
        tune_allocator()
        finetune(_config(rest[0]))
        print(int(peak_gib() * 2**30))
    else:
        kill_and_resume(_config(rest[0]), times=int(rest[1]), seed=int(rest[2]))


def _config(text: str) -> FinetuneConfig:
    values = json.loads(text)
    return FinetuneConfig(**values | {"data": tuple(values["data"])})


def run(config: FinetuneConfig, stop_after: int) -> None:
    """Fine-tune; interrupted after so many steps."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= stop_after

    finetune(config, should_stop=should_stop)


def kill_and_resume(config: FinetuneConfig, *, times: int, seed: int) -> None:
    """Start the run, kill it at a random moment, resume it, ..., and let it end; prints the steps
    it had reached.
    """
    import dataclasses

    draw = random.Random(seed)
    reached = []
    for attempt in range(times + 1):
        has_checkpoint = any((config.run_folder / "checkpoints").glob("step-????????"))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                finetune(dataclasses.replace(config, resume=has_checkpoint, overwrite=True))
                code = 0
            finally:
                os._exit(code)
        if attempt < times:
            time.sleep(draw.uniform(0.05, 0.4))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        reached.append(_steps(config.run_folder / "metrics.jsonl"))
    assert status == 0, f"the last run ended with {status}"
    print(json.dumps(reached))


def _steps(path: Path) -> int:
    rows: list[dict[str, Any]] = read_metrics(path) if path.exists() else []
    return max((row["step"] for row in rows), default=0)


if __name__ == "__main__":
    main()
