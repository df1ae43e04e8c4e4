"""Results of the TensorFlow model, and real TensorFlow checkpoints of it: what everything else is
held against.

The model itself is `scripts.tf_model`, which the benchmarks time too. To make a checkpoint by hand:

    python -m tests.tf_reference OUT_DIR --layers 5 --width 96 --heads 3 --mlp 200 --vocab 211
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from scripts.tf_model import TFReference as TFReference
from tests.helpers.reference import Case
from tests.helpers.tf_adafactor import TFAdafactor
from tests.helpers.weights import (
    Array,
    Sizes,
    Weights,
    adafactor_slots,
    loud_weights,
)

PREFIX = "model.ckpt-100000"


def results(case: Case, what: str, dtype: str) -> Weights:
    """What `Case` gives out under these words, by name; low-precision logits as float32 arrays,
    which hold them exactly.
    """
    weights, ids = case.weights, case.ids
    reference = TFReference(weights, heads=case.sizes.heads, dtype=dtype)
    if what == "logits":
        wide = "float64" if dtype == "float64" else "float32"
        return {"logits": tf.cast(reference.logits(ids[:, :-1]), wide).numpy()}
    if what == "cached":
        return {"logits": _decode_stepwise(reference, ids[:, :-1])}
    loss, gradients = reference.loss_and_gradients(ids)
    if what == "gradients":
        return {"loss": np.array(loss), **gradients}
    optimizer = TFAdafactor({name: weight.astype(dtype) for name, weight in weights.items()})
    optimizer.step(gradients, 1e-2)
    return {**optimizer.weights, **optimizer.slots}


def _decode_stepwise(reference: TFReference, ids: Array) -> Array:
    """Logits through the reference's own cache: five tokens at once, then one by one."""
    logits, cache = reference.decode(ids[:, :5], cache=None)
    pieces = [logits]
    for at in range(5, ids.shape[1]):
        logits, cache = reference.decode(ids[:, at : at + 1], cache=cache)
        pieces.append(logits)
    return np.asarray(tf.concat(pieces, axis=1).numpy())


def write_checkpoint(
    folder: str | os.PathLike[str],
    sizes: Sizes,
    weights: Mapping[str, Array],
    *,
    prefix: str = PREFIX,
    slots: bool = True,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder as the original's training leaves it, and return the checkpoint's prefix.

    It holds `prefix`.{index, data-00000-of-00001, meta}, the `checkpoint` state file, config.json
    and vocab.txt. `config` overrides single entries of config.json. The variables take the dtypes
    of `weights`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Array] = dict(weights)
    if slots:
        rng = np.random.default_rng(1)
        shapes = {name: weight.shape for name, weight in weights.items()}
        for name, shape in adafactor_slots(shapes):
            values[name] = rng.random(shape, dtype=np.float32)
    step = re.search(r"\d+$", prefix)
    values["global_step"] = np.array(int(step.group()) if step else 0, np.int64)
    path = _save(folder / prefix, values)
    (folder / "config.json").write_text(
        json.dumps({**original_config(sizes), **(config or {})}, indent=2)
    )
    (folder / "vocab.txt").write_bytes("".join(f"{t}\n" for t in vocabulary(sizes)).encode())
    return path


def _save(path: Path, values: Mapping[str, Array]) -> Path:
    """Through the original's own writer: reference variables in a graph, and a V2 Saver."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        initializers = [
            v1.get_variable(
                name,
                shape=value.shape,
                dtype=tf.as_dtype(value.dtype),
                initializer=v1.zeros_initializer(),
                use_resource=False,
            ).initializer
            for name, value in values.items()
        ]
        # Fed, not written into the graph as constants: the .meta file stays small.
        fed = zip((op.inputs[1] for op in initializers), values.values(), strict=True)
        session.run(initializers, dict(fed))
        saver = v1.train.Saver(write_version=v1.train.SaverDef.V2)
        return Path(saver.save(session, str(path)))


def original_config(sizes: Sizes) -> dict[str, Any]:
    """config.json in the dialect of the original repository (configs/mega.json)."""
    return {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.width,
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.014142135623731,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": sizes.positions,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
    }


def vocabulary(sizes: Sizes) -> list[str]:
    """A BERT vocabulary of the right size: the special tokens at their published ids where there is
    room.
    """
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    if sizes.vocab <= max(special):
        special = dict(enumerate(special.values()))
    return [special.get(index, chr(0x4E00 + index)) for index in range(sizes.vocab)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tf_reference",
        description="Write a TensorFlow checkpoint of a random GPT2_ML in the published layout.",
    )
    parser.add_argument("folder", type=Path)
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prefix", default=PREFIX)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--no-slots", dest="slots", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sizes = Sizes(**{name: getattr(args, name) for name in vars(Sizes())})
    if sizes.width % sizes.heads:
        parser.error(f"--width {sizes.width} is not divisible by --heads {sizes.heads}")
    weights = {
        name: tf.cast(weight, args.dtype).numpy()
        for name, weight in loud_weights(sizes, seed=args.seed).items()
    }
    path = write_checkpoint(args.folder, sizes, weights, prefix=args.prefix, slots=args.slots)
    print(path)


if __name__ == "__main__":
    main()
