"""Write the files of this folder again, from live TensorFlow: `python -m tests.golden`.

They hold what `tests.helpers.reference.HELD` names: the weights (as float16, which holds them
exactly), the token ids and the results of scripts/tf_model.py. The bits of TensorFlow's sums
depend on its version and on the processor's vector instructions, which stand in `made_on`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gpt2ml_torch.checking import arithmetic
from tests.golden.machine import made_on
from tests.helpers.parity import tf_weights_of
from tests.helpers.reference import FOLDER, GOLDEN, HELD, joined
from tests.helpers.weights import Array
from tests.tf_reference import TFReference, results

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    total = 0
    for name, case in GOLDEN.items():
        arrays: dict[str, Array] = {"made_on": np.array(made_on()), "ids": case.ids}
        arrays["weights/float16"] = joined(case.weights, case, "weights").astype(np.float16)
        for what, dtype in HELD[name]:
            arrays[f"{what}/{dtype}"] = joined(results(case, what, dtype), case, what)
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
        total += path.stat().st_size
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    print(f"{total:,} bytes in all")
    write_known_logits(ROOT / "gpt2ml_torch" / "checking" / "reference.json")


def write_known_logits(path: Path) -> None:
    """The answers that `gpt2ml check` compares the arithmetic of an installation with."""
    weights = {
        name: value.numpy() for name, value in tf_weights_of(arithmetic.known_weights()).items()
    }
    reference = TFReference(weights, heads=arithmetic.CONFIG.num_attention_heads)
    logits = reference.logits([arithmetic.TOKEN_IDS])[0].numpy().tolist()
    rows = ",\n".join(f"  {json.dumps(row)}" for row in logits)
    path.write_text(f'{{"logits": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    main()
