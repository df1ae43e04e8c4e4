"""Write the files of this folder again, from live TensorFlow: `python -m tests.golden`.

They hold what `tests.helpers.reference.HELD` names: the weights (as float16, which holds them
exactly), the token ids and the results of tests/tf_reference.py. The bits of TensorFlow's sums
depend on its version and on the processor's vector instructions, which stand in `made_on`.
"""

from __future__ import annotations

import numpy as np

from tests.golden.machine import made_on
from tests.helpers.reference import FOLDER, GOLDEN, HELD, joined
from tests.helpers.weights import Array
from tests.tf_reference import results


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


if __name__ == "__main__":
    main()
