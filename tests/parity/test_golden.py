"""tests/golden holds what the TensorFlow reference computes, and parity is tested on it alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2ml_torch.checking import arithmetic
from tests.helpers.parity import tf_weights_of, to_float64
from tests.helpers.reference import FOLDER, GOLDEN, HELD, golden
from tests.helpers.weights import short_weights

ROOT = Path(__file__).resolve().parents[2]
# Largest difference, relative to the largest value, where the sums are taken in another order than
# they were when the files were written: some hundred units in the last place.
OTHER_SUMS = {"float64": 1e-13, "float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_results_are_what_live_tensorflow_computes(name: str) -> None:
    """Bit for bit where TensorFlow's version and the processor's vectors are the same, and within
    the rounding of another order of sums elsewhere.
    """
    tf_reference = pytest.importorskip("tests.tf_reference")
    from tests.golden.machine import made_on

    case = GOLDEN[name]
    with np.load(FOLDER / f"{name}.npz") as file:
        same_machine = str(file["made_on"]) == made_on()
    for what, dtype in HELD[name]:
        held = golden(name, what, dtype)
        assert held is not None
        for key, live in tf_reference.results(case, what, dtype).items():
            if same_machine:
                assert np.array_equal(held[key], live), (what, dtype, key)
            elif what == "adafactor" and "key_layer/bias" in key:
                pass  # its gradient is zero except for rounding, which Adafactor scales to a step
            else:
                largest = max(np.abs(array).max() for array in held.values())
                error = np.abs(held[key] - live).max()
                assert error <= OTHER_SUMS[dtype] * largest, (what, dtype, key)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_weights_and_ids_are_the_cases(name: str) -> None:
    case = GOLDEN[name]
    weights = golden(name, "weights", "float16")
    assert weights is not None
    for key, weight in short_weights(case.sizes, seed=case.seed).items():
        assert np.array_equal(weights[key].astype(np.float32), weight), key
    with np.load(FOLDER / f"{name}.npz") as file:
        assert np.array_equal(file["ids"], case.ids)


def test_the_answers_that_gpt2ml_check_knows_are_the_references() -> None:
    tf_reference = pytest.importorskip("tests.tf_reference")
    weights = {k: v.numpy() for k, v in tf_weights_of(arithmetic.known_weights()).items()}
    reference = tf_reference.TFReference(weights, heads=arithmetic.CONFIG.num_attention_heads)
    live = to_float64(reference.logits([arithmetic.TOKEN_IDS])[0])
    torch.testing.assert_close(arithmetic.known_logits(), live, rtol=0, atol=1e-13)


def test_golden_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("*.npz")) < 2_000_000


def test_parity_of_logits_gradients_and_optimizer_runs_without_tensorflow() -> None:
    code = (
        "import sys, pytest; sys.modules['tensorflow'] = None; "
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/parity/test_logits.py', "
        "'tests/parity/test_gradients.py', 'tests/parity/test_optimizer.py', "
        "'-k', 'agree or decodes or adafactor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "GPT2ML_REFERENCE": "golden"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 10, done.stdout
