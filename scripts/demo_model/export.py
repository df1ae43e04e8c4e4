"""Export a training run: a checkpoint in the original's form, and its model card.

The files are written by TensorFlow, under the published names, with the optimizer's slots.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convert.configs import original_dialect
from convert.mapping import TENSORFLOW, Recipe, recipes
from convert.tensorflow import Variable, write_checkpoint
from gpt2ml_torch.kv_cache import KVCache
from gpt2ml_torch.model import GPT2ML

PROMPTS = (
    "今天天气不错",
    "双十一",
    "科学空间",
    "春眠不觉晓，",
    "千山鸟飞绝，",
    "一片孤城万仞山，",
    "月",
)
SPECIAL = 104  # ids of [PAD], [unused1..99], [UNK], [CLS], [SEP], [MASK]
LINE = re.compile("([^，。]*)([，。])")


def tf_variables(
    model: GPT2ML, slots: Mapping[Tensor, Mapping[str, Tensor]], step: int
) -> dict[str, NDArray[Any]]:
    """Weights, Adafactor slots and `global_step` by the original's names; kernels are (in, out)."""
    plan = recipes(model.config.num_hidden_layers, TENSORFLOW)
    variables: dict[str, NDArray[Any]] = {"global_step": np.array(step, dtype=np.int64)}
    for key, parameter in model.named_parameters():
        for name, value in plan[key].parts(parameter.detach()):
            variables[name] = value.contiguous().numpy()
        for name, value in _slots(plan[key], slots[parameter]):
            variables[name] = value.contiguous().numpy()
    return variables


def _slots(recipe: Recipe, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's statistics of one weight, split and named as its variables are."""
    for slot, statistic in state.items():
        if recipe.transpose:  # a kernel's rows are the weight's columns
            slot = {"vr": "vc", "vc": "vr"}[slot]
        parts = statistic.chunk(len(recipe.sources))
        for source, part in zip(recipe.sources, parts, strict=True):
            yield f"{source}/adafactor_{slot}", part.flatten()


def save_tf(folder: Path, variables: Mapping[str, NDArray[Any]]) -> None:
    """Write `model.ckpt-N.{index,data-00000-of-00001,meta}` and `checkpoint`; remove older ones."""
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("model.ckpt-*"), *folder.glob("checkpoint")):
        old.unlink()
    prefix = folder / f"model.ckpt-{variables['global_step']}"
    write_checkpoint(prefix, {name: Variable.of(value) for name, value in variables.items()})
    with tf.Graph().as_default() as graph:
        # Only what a Saver needs: `import_meta_graph(...).restore(...)` brings every variable back.
        saver = tf.compat.v1.train.Saver(
            {
                name: tf.raw_ops.VariableV2(shape=value.shape, dtype=value.dtype, name=name)
                for name, value in sorted(variables.items())
            }
        )
        definition = graph.as_graph_def()
        for node in definition.node:
            node.attr.pop("_class", None)  # placement hints: a third of the file
        tf.compat.v1.train.export_meta_graph(
            f"{prefix}.meta",
            graph_def=definition,
            saver_def=saver.saver_def,
            strip_default_attrs=True,
        )
    (folder / "checkpoint").write_text(
        f'model_checkpoint_path: "{prefix.name}"\nall_model_checkpoint_paths: "{prefix.name}"\n'
    )


def save_beside(folder: Path, model: GPT2ML, vocabulary: Sequence[str]) -> None:
    """Write config.json in the original's dialect, and vocab.txt."""
    config = json.dumps(original_dialect(model.config), indent=2)
    (folder / "config.json").write_text(config + "\n")
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")


@torch.inference_mode()
def sample(
    model: GPT2ML, prompts: Sequence[Sequence[int]], *, new_tokens: int, top_k: int, seed: int
) -> list[list[int]]:
    """Continue each prompt by random sampling among the `top_k` best; no special tokens.

    Prompts of one length are continued together.
    """
    generator = torch.Generator().manual_seed(seed)
    continuations: dict[int, list[int]] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
        cache = KVCache(model.config, batch_size=len(places), length=length + new_tokens)
        ids = torch.tensor([prompts[place] for place in places])  # (B, T)
        fed = 0
        while ids.shape[1] < length + new_tokens:
            positions = torch.arange(fed, ids.shape[1]).expand(len(places), -1)
            logits = model(ids[:, fed:], positions=positions, cache=cache)[:, -1]  # (B, V)
            logits[:, :SPECIAL] = -torch.inf
            best, candidates = logits.topk(top_k)  # (B, k)
            choice = torch.multinomial(best.softmax(-1), 1, generator=generator)
            fed = ids.shape[1]
            ids = torch.cat([ids, candidates.gather(1, choice)], 1)
        continuations.update(zip(places, ids[:, length:].tolist(), strict=True))
    return [continuations[place] for place in range(len(prompts))]


class Metre(NamedTuple):
    """Shares of generated lines and couplets that are regular, and the number of lines."""

    lines: float
    couplets: float
    counted: int


def measure_metre(texts: Sequence[tuple[int, str]]) -> Metre:
    """The regular share of (form, text): lines of `form` characters, ending in ， and 。 by turns.

    Each text starts with its prompt, one line with its ，, which is not counted; nor is an
    unfinished last line.
    """
    lines, couplets = [], []
    for form, text in texts:
        found = [
            len(line) == form and mark == "，。"[index % 2]
            for index, (line, mark) in enumerate(LINE.findall(text))
        ]
        lines += found[1:]
        couplets += [all(pair) for pair in zip(found[2::2], found[3::2], strict=False)]
    return Metre(sum(lines) / len(lines), sum(couplets) / max(len(couplets), 1), len(lines))


def metre_prompts(held_out: Mapping[int, Sequence[str]], *, count: int) -> list[tuple[int, str]]:
    """(form, first line with its ，) of a number of held-out poems of each form."""
    return [
        (form, poem[: form + 1])
        for form, poems in held_out.items()
        for poem in random.Random(form).sample(list(poems), min(count, len(poems)))
    ]
