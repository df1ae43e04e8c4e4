"""Packed weights: the kernel against float64, rows independent of each other, odd sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpt2ml_torch import GPT2ML, GPT2MLConfig, kernels
from gpt2ml_torch.kernels import ops, packing
from gpt2ml_torch.precision import PACKABLE, Precision

BITS = {precision.value: precision.bits for precision in PACKABLE}
# (N, K): odd ones, and inputs in several blocks
SIZES = ((16, 32), (17, 33), (100, 200), (33, 7), (48, 640), (1, 1), (515, 160), (40, 1500))

# Relative error (root mean square) that rounding the inputs may cost: half a bfloat16 step spread
# evenly is 2**-9 / sqrt(3), and 1/127 of a group's largest value in int8 likewise. Twice that.
INPUT_ROUNDING = {
    "float32": 1e-6,
    "float16": 1e-6,
    "bfloat16": 0.004,
    "int8": 0.015,
    "int4": 0.015,
}

needs_kernels = pytest.mark.skipif(
    not kernels.load_kernels(), reason="no compiler or no AVX2: PyTorch's operators run instead"
)


def packed(outputs: int, inputs: int, precision: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    return kernels.pack(torch.randn(outputs, inputs), precision)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_product_agrees_with_float64_of_the_unpacked_weight(
    outputs: int, inputs: int, precision: str
) -> None:
    weight, scale = packed(outputs, inputs, precision)
    plain = kernels.unpack(weight, scale, BITS[precision], outputs, inputs).double()
    bias = torch.randn(outputs)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 128):
        x = torch.randn(rows, inputs)
        found = kernels.packed_linear(x, weight, scale, bias, bits=BITS[precision], outputs=outputs)
        expected = F.linear(x.double(), plain, bias.double())
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < INPUT_ROUNDING[precision]


@needs_kernels
@pytest.mark.parametrize("precision", BITS)
def test_inputs_on_the_quantised_grid_are_multiplied_exactly(precision: str) -> None:
    """With inputs that need no rounding only the float32 sums differ from float64."""
    weight, scale = packed(80, 256, precision)
    plain = kernels.unpack(weight, scale, BITS[precision], 80, 256).double()
    x = torch.randint(-127, 128, (9, 256)).float()
    x[:, ::32] = 127  # every group's scale is then 1
    found = kernels.packed_linear(x, weight, scale, None, bits=BITS[precision], outputs=80)
    assert relative_error(found, F.linear(x.double(), plain)) < 1e-6


@needs_kernels
@pytest.mark.parametrize("byte", [0, 255])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_largest_integers_do_not_overflow(precision: str, byte: int) -> None:
    """Sums of the smallest or the largest weights times the largest inputs, of either sign."""
    weight, scale = packed(32, 1024, precision)
    assert scale is not None
    weight.fill_(byte)
    scale.fill_(1)
    plain = kernels.unpack(weight, scale, BITS[precision], 32, 1024).double()
    x = torch.full((9, 1024), 127.0)
    x[::2] = -127
    found = kernels.packed_linear(x, weight, scale, None, bits=BITS[precision], outputs=32)
    assert relative_error(found, F.linear(x.double(), plain)) < 1e-6


@needs_kernels
@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inputs", "count"), [(200, 200), (1100, 600)])  # in one block, in several
def test_a_row_does_not_depend_on_its_neighbours_or_the_threads(
    inputs: int, count: int, precision: str, dtype: torch.dtype
) -> None:
    weight, scale = packed(100, inputs, precision)
    x = torch.randn(count, inputs, dtype=dtype)

    def product(rows: torch.Tensor) -> torch.Tensor:
        return kernels.packed_linear(rows, weight, scale, None, bits=BITS[precision], outputs=100)

    together = product(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 23, 64, count):
                assert torch.equal(product(x[-rows:]), together[-rows:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", BITS)
def test_shapes_strides_and_dtypes_of_the_input_are_free(precision: str) -> None:
    weight, scale = packed(20, 40, precision)

    def product(x: torch.Tensor) -> torch.Tensor:
        return kernels.packed_linear(x, weight, scale, None, bits=BITS[precision], outputs=20)

    x = torch.randn(40, 3, 2)
    assert torch.equal(product(x.permute(2, 1, 0)), product(x.permute(2, 1, 0).contiguous()))
    assert product(torch.randn(40)).shape == (20,)
    assert product(torch.randn(0, 5, 40)).shape == (0, 5, 20)
    for dtype in (torch.bfloat16, torch.float16):
        y = product(x.permute(2, 1, 0).to(dtype))
        assert y.dtype == dtype
        assert relative_error(y, product(x.permute(2, 1, 0)).double()) < 0.02


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_reaches_its_own_row_only(precision: str, bad: float) -> None:
    weight, scale = packed(20, 40, precision)
    x = torch.randn(3, 40)
    x[1, 17] = bad
    y = kernels.packed_linear(x, weight, scale, None, bits=BITS[precision], outputs=20)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("precision", BITS)
def test_kernel_and_fallback_agree(precision: str) -> None:
    weight, scale = packed(100, 200, precision)
    x, bias = torch.randn(5, 200), torch.randn(100)
    fast = kernels.packed_linear(x, weight, scale, bias, bits=BITS[precision], outputs=100)
    slow = ops.unpacked_linear(x, weight, scale, bias, BITS[precision], 100)
    assert relative_error(fast, slow.double()) < INPUT_ROUNDING[precision]


def test_unpacking_gives_back_what_was_packed() -> None:
    weight = torch.randn(100, 200)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        precision = str(dtype).removeprefix("torch.")
        found = kernels.unpack(*kernels.pack(weight, precision), BITS[precision], 100, 200)
        assert torch.equal(found, weight.to(dtype).float())
    for precision, bound in (("int8", 0.007), ("int4", 0.095)):  # of normal weights
        found = kernels.unpack(*kernels.pack(weight, precision), BITS[precision], 100, 200)
        assert relative_error(found, weight.double()) < bound
        # Packing again must change nothing, or saving a packed model would wear it down.
        again = kernels.unpack(*kernels.pack(found, "int8"), 8, 100, 200)
        assert relative_error(again, found.double()) < 0.007


@needs_kernels
@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_packs_as_pytorch_does(precision: str, dtype: torch.dtype) -> None:
    for outputs, inputs in SIZES:
        weight = (torch.randn(outputs, inputs) * torch.logspace(-4, 4, outputs)[:, None]).to(dtype)
        weight[:: max(outputs // 2, 1), : inputs // 2] = 0
        found = kernels.pack(weight, precision)
        expected = packing.empty_packed(outputs, inputs, Precision(precision))
        packing.pack_rows(weight, *expected, BITS[precision])
        assert torch.equal(found[0], expected[0])
        assert found[1] is None or torch.equal(found[1], expected[1])  # type: ignore[arg-type]


def test_weights_that_are_zero_or_that_a_precision_cannot_hold() -> None:
    for precision in ("int8", "int4"):
        packed_zeros = kernels.pack(torch.zeros(16, 32), precision)
        assert not kernels.unpack(*packed_zeros, BITS[precision], 16, 32).any()
        with pytest.raises(ValueError, match="NaN or infinity"):
            kernels.pack(torch.full((16, 32), float("nan")), precision)
    with pytest.raises(ValueError, match="beyond the largest of float16"):
        kernels.pack(torch.full((16, 32), 1e5), "float16")


def test_a_weight_that_does_not_fit_is_an_error() -> None:
    weight, scale = packed(20, 40, "int8")
    with pytest.raises(RuntimeError):
        kernels.packed_linear(torch.randn(2, 100), weight, scale, None, bits=8, outputs=20)
    with pytest.raises(ValueError, match="float32, bfloat16, float16, int8, int4"):
        Precision.FLOAT64.packed_shapes(16, 32)


@pytest.mark.parametrize("precision", BITS)
def test_the_operator_is_declared_as_it_behaves(precision: str) -> None:
    weight, scale = packed(20, 40, precision)
    x = torch.randn(3, 40, requires_grad=True)
    torch.library.opcheck(
        torch.ops.gpt2ml.packed_linear.default, (x, weight, scale, None, BITS[precision], 20)
    )


@pytest.mark.parametrize("precision", BITS)
def test_gradient_of_the_input_is_that_of_the_unpacked_weight(precision: str) -> None:
    weight, scale = packed(20, 40, precision)
    plain = kernels.unpack(weight, scale, BITS[precision], 20, 40)
    x, towards = torch.randn(3, 40, requires_grad=True), torch.randn(3, 20)
    kernels.packed_linear(x, weight, scale, None, bits=BITS[precision], outputs=20).backward(
        towards
    )
    assert x.grad is not None
    torch.testing.assert_close(x.grad, towards @ plain)


@pytest.mark.parametrize("quantize", PACKABLE)
def test_a_packed_model_agrees_with_its_unpacked_twin(quantize: str) -> None:
    config = GPT2MLConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=32,
    )
    model, twin = GPT2ML(config).eval(), GPT2ML(config).eval()
    kernels.pack_model(model, quantize)
    twin.load_state_dict(
        {
            name: module.dequantized()
            if name.endswith("weight")
            and isinstance(
                module := model.get_submodule(name.rpartition(".")[0]),
                kernels.PackedLinear | kernels.PackedEmbedding,
            )
            else model.state_dict()[name]
            for name in twin.state_dict()
        }
    )
    token_ids = torch.randint(0, 100, (2, 9))
    with torch.no_grad():
        found, expected = model(token_ids), twin.double()(token_ids)
    assert relative_error(found, expected) < 3 * INPUT_ROUNDING[quantize]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(token_ids), found)
    empty = kernels.pack_model(GPT2ML(config).to("meta").eval(), quantize)
    empty.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(empty(token_ids), found)
