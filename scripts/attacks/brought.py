"""Checkpoints with other names and files around the weights: the weights are converted exactly."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from convert.tensorflow import TensorFlowCheckpoint, Variable, write_checkpoint
from convert.to_tf import to_tf
from gpt2ml_torch import GPT2ML
from scripts.attacks.pickles import community
from scripts.attacks.tools import CONFIG, TOKENS, convert, write_model

SLOTS = ("Adam", "Adam_1", "Momentum", "Adagrad", "adam_m", "lamb_v", "RMSProp_1", "accum_grad",
         "ExponentialMovingAverage", "sm3/0", "slow")  # fmt: skip
STATE_SCOPES = ("OptimizeLoss/", "training/Adam/", "ExponentialMovingAverage/", "accum_grads/",
                "optimizer/slots/")  # fmt: skip
SCALARS = ("beta1_power", "learning_rate", "local_step", "loss_scale/good_steps", "x/beta2_power")
SCOPES = ("newslm/", "model/newslm/", "", "tower_0/model/", "bert/")
PREFIXES = ("module.", "_orig_mod.", "model.", "transformer.", "base_model.", "net.")
INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WRAPPERS = ("state_dict", "model", "module", "model_state_dict", "generator", "checkpoint", "学生")
BESIDE = ("training_args.bin", "optimizer.pt", "rng_state.pth", "._pytorch_model.bin",
          "._vocab.txt", ".DS_Store", "old-vocab.txt", "readme.md", "scheduler.pt")  # fmt: skip


class Attack:
    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = GPT2ML.from_pretrained(write_model(folder / "model.safetensors"))
        self._weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._state = {name: tensor.contiguous() for name, tensor in community(model).items()}
        report = to_tf(folder / "model.safetensors", folder / "tf")
        source = TensorFlowCheckpoint(report.prefix)
        names = (name for name in source.tensors if name != "global_step")
        self._arrays = {name: np.array(source.read(name)) for name in names}
        self._folder, self._out = folder / "brought", folder / "out.safetensors"

    def __call__(self, draw: random.Random) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        (self._folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
        (self._folder / "config.json").write_text(json.dumps(CONFIG.to_dict()), encoding="utf-8")
        for name in draw.sample(BESIDE, draw.randrange(4)):
            (self._folder / name).write_bytes(b"\0\5\x16\7" + draw.randbytes(50))
        self._out.unlink(missing_ok=True)
        what = self._tensorflow(draw) if draw.random() < 0.5 else self._pytorch(draw)
        try:
            convert(self._folder, self._out)
        except (ValueError, OSError) as error:
            raise AssertionError(f"{what}: {error}") from error
        for name, tensor in GPT2ML.from_pretrained(self._out).state_dict().items():
            assert torch.equal(tensor, self._weights[name]), f"{what}: {name} differs"

    def _tensorflow(self, draw: random.Random) -> str:
        scope = draw.choice(SCOPES)
        moved = {name.replace("newslm/", scope, 1): a for name, a in self._arrays.items()}
        tensors: dict[str, Any] = dict(moved)
        slots = draw.sample(SLOTS, draw.randrange(4))
        outer = draw.choice(("", "OptimizeLoss/", "training/"))
        for slot in slots:
            tensors.update({f"{outer}{name}/{slot}": array for name, array in moved.items()})
        scopes = draw.sample(STATE_SCOPES, draw.randrange(2))
        for state in scopes:
            tensors.update({f"{state}{name}": array + 1 for name, array in moved.items()})
        for name in draw.sample(SCALARS, draw.randrange(3)):
            tensors[name] = draw.choice((np.float32(1), np.zeros(1, np.float32), np.int64(3)))
        write_checkpoint(
            self._folder / "model.ckpt-7", {name: Variable.of(a) for name, a in tensors.items()}
        )
        if draw.random() < 0.3:
            (self._folder / "model.ckpt-7.data-00000-of-00002").write_bytes(b"stray")
        return f"scope {scope!r}, slots {slots} under {outer!r}, copies under {scopes}"

    def _pytorch(self, draw: random.Random) -> str:
        prefix = "".join(draw.sample(PREFIXES, draw.randrange(4)))
        inner = draw.choice((None, *INNER))
        state = {
            prefix + (name.replace("h.0.", f"h.0.{inner}.") if inner else name): tensor
            for name, tensor in self._state.items()
        }
        if draw.random() < 0.5:
            return f"{prefix!r}, {inner} in {self._write_shards(draw, state)}"
        wrappers = draw.sample(WRAPPERS, draw.randrange(3))
        value: Any = state
        for wrapper in wrappers:
            value = {wrapper: value, "epoch": 3, "optimizer": {"state": {}, "lr": 1.0}}
        name = draw.choice(("pytorch_model.bin", "model.pt", "x.pth", "last.ckpt"))
        zipped = draw.random() < 0.7
        torch.save(value, self._folder / name, _use_new_zipfile_serialization=zipped)
        return f"{prefix!r}, {inner} in {wrappers} in {name}"

    def _write_shards(self, draw: random.Random, state: dict[str, torch.Tensor]) -> str:
        """Write the state in shards, as safetensors or pickles, with or without an index."""
        suffix, stem = draw.choice(((".bin", "pytorch_model"), (".safetensors", "model")))
        count, names = draw.randint(1, 4), draw.sample(sorted(state), len(state))
        weight_map: dict[str, str] = {}
        for number in range(count):
            part = {name: state[name] for name in names[number::count]}
            path = self._folder / f"{stem}-{number + 1:05d}-of-{count:05d}{suffix}"
            if suffix == ".bin":
                torch.save(part, path)
            else:
                save_file(part, path)
            weight_map.update(dict.fromkeys(part, path.name))
        if draw.random() < 0.5:
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
            (self._folder / f"{stem}{suffix}.index.json").write_text(text, encoding="utf-8")
        return f"{count} shards {suffix}"
