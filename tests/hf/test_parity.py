"""The exported class against the TensorFlow reference itself, live or from tests/golden.

Compared: logits and gradients of the class that the folder's own code makes, in float64, from a
file with the reference's loud weights, within 1e-12 (logits near 5 in size) and 1e-10 of the
largest gradient; and in lower precisions by the 2x rule, against a model written out plainly.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2ml_torch.export.folder import export_folder
from gpt2ml_torch.export.names import exported_names
from tests.helpers.parity import (
    assert_within_twice,
    cross_entropy,
    inputs_of,
    largest_error,
    model_of,
    plain_logits,
    state_dict_of,
    tf_weights_of,
    to_float64,
    to_torch,
)
from tests.helpers.reference import GOLDEN, Case

transformers = pytest.importorskip("transformers", reason="transformers (extra [hf]) is missing")

TOLERANCE = 1e-12
ATTENTION = ["eager", "sdpa", "flex_attention"]
ODD = GOLDEN["odd"]


@pytest.fixture(autouse=True)
def _without_compilation() -> Iterator[None]:
    """flex_attention is compiled for each shape, which takes long and is PyTorch's own affair."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _exported(case: Case, folder: Path, **options: Any) -> Any:
    ours = model_of(case, options.get("dtype", torch.float64))
    ours.save_pretrained(folder / "model.safetensors")
    export_folder(folder / "model.safetensors", folder / "exported")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "exported", trust_remote_code=True, **options
    )


@pytest.mark.parametrize("implementation", ATTENTION)
@pytest.mark.parametrize("name", GOLDEN)
def test_float64_logits_are_the_references(tmp_path: Path, name: str, implementation: str) -> None:
    case = GOLDEN[name]
    model = _exported(case, tmp_path, dtype=torch.float64, attn_implementation=implementation)
    with torch.inference_mode():
        found = model(inputs_of(case)).logits
    assert found.dtype == torch.float64
    assert largest_error(found, to_float64(case.logits())) <= TOLERANCE


@pytest.mark.parametrize("implementation", ATTENTION)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_float64_logits_of_padded_rows_are_the_references(
    tmp_path: Path, side: str, implementation: str
) -> None:
    model = _exported(ODD, tmp_path, dtype=torch.float64, attn_implementation=implementation)
    inputs, exact = inputs_of(ODD), to_float64(ODD.logits())
    lengths = (19, 5, 14)
    ids, mask = torch.zeros(3, 19, dtype=torch.long), torch.zeros(3, 19, dtype=torch.long)
    places = [slice(19 - n, 19) if side == "left" else slice(0, n) for n in lengths]
    for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
        ids[row, place], mask[row, place] = inputs[row, :length], 1
    logits = model(ids, attention_mask=mask).logits
    for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
        assert largest_error(logits[row, place], exact[row, :length]) <= TOLERANCE


@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # the latter since 5.24
@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
@torch.inference_mode()
def test_float64_logits_through_a_cache_are_the_references(
    tmp_path: Path, kind: str, name: str
) -> None:
    model = _exported(ODD, tmp_path, dtype=torch.float64)
    inputs, exact = inputs_of(ODD), to_float64(ODD.cached_logits())
    length = inputs.shape[1]
    size = {"max_cache_len": length} if kind == "StaticCache" else {}
    cache = getattr(transformers, kind)(config=model.config, **size)
    for start, end in pairwise([0, *range(5, length + 1)]):
        found = model(inputs[:, start:end], **{name: cache}, use_cache=True).logits
        assert largest_error(found, exact[:, start:end]) <= TOLERANCE
    with pytest.raises(ValueError, match="either cache or past_key_values"):
        model(inputs[:, :1], past_key_values=cache, cache=cache)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["odd", "heads-of-64"])
def test_float64_gradients_are_the_references(
    tmp_path: Path, name: str, implementation: str
) -> None:
    case = GOLDEN[name]
    model = _exported(case, tmp_path, dtype=torch.float64, attn_implementation=implementation)
    tf_loss, tf_gradients = case.loss_and_gradients()
    tokens = to_torch(case.ids)
    loss = cross_entropy(model(tokens[:, :-1]).logits, tokens)
    loss.backward()
    assert loss.item() == pytest.approx(tf_loss, rel=TOLERANCE)
    theirs = dict(model.named_parameters())
    found = tf_weights_of(
        {
            ours: torch.cat([theirs[part].grad for part in exported_names(ours)])
            for ours in state_dict_of(case.weights)
        }
    )
    assert found.keys() == tf_gradients.keys()
    largest = max(abs(gradient).max() for gradient in tf_gradients.values())
    for key, exact in tf_gradients.items():
        assert largest_error(found[key], to_float64(exact)) <= 1e-10 * largest, key


@pytest.mark.parametrize("implementation", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_lower_precisions_stray_at_most_twice_as_far_as_plain_operations(
    tmp_path: Path, dtype: torch.dtype, implementation: str
) -> None:
    model = _exported(ODD, tmp_path, dtype=dtype, attn_implementation=implementation)
    inputs, exact = inputs_of(ODD), to_float64(ODD.logits())
    state: dict[str, Tensor] = {
        name: weight.to(dtype) for name, weight in state_dict_of(ODD.weights).items()
    }
    plain = plain_logits(state, inputs, heads=ODD.sizes.heads)
    assert_within_twice(model(inputs).logits, plain, exact, dtype)
