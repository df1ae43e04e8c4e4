"""What GPT2ML promises beside its logits: names, shapes, errors, dropout, initial weights, copies
and files.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gpt2ml_torch import GPT2ML, GPT2MLConfig
from tests.helpers.parity import (
    ODD_SIZES,
    config_of,
    loud_model,
    random_ids,
    state_dict_of,
    to_torch,
)
from tests.helpers.weights import loud_weights

SIZES = ODD_SIZES[0]
KEYS_OF_A_BLOCK = [
    f"{module}.{kind}"
    for module in (
        "attention.qkv",
        "attention.output",
        "mlp_norm",
        "mlp.up",
        "mlp.down",
        "output_norm",
    )
    for kind in ("weight", "bias")
]


@pytest.fixture
def model(device: torch.device) -> GPT2ML:
    return loud_model(SIZES)[0].to(device)


@pytest.fixture
def ids(device: torch.device) -> Tensor:
    return to_torch(random_ids(SIZES)).to(device)


def test_the_keys_are_those_of_the_file_format() -> None:
    model = GPT2ML(config_of(SIZES))
    expected = {"token_embedding.weight", "position_embedding.weight"}
    expected |= {"embedding_norm.weight", "embedding_norm.bias"}
    expected |= {f"blocks.{n}.{key}" for n in range(SIZES.layers) for key in KEYS_OF_A_BLOCK}
    assert set(model.state_dict()) == expected
    shapes = {name: value.shape for name, value in state_dict_of(loud_weights(SIZES)).items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


def test_num_parameters_counts_every_weight_once() -> None:
    for sizes in ODD_SIZES:
        config = config_of(sizes)
        assert config.num_parameters == sum(p.numel() for p in GPT2ML(config).parameters())
    # The two published checkpoints.
    assert GPT2MLConfig.mega(vocab_size=21130).num_parameters == 1_393_944_576
    assert GPT2MLConfig.mega(vocab_size=8021).num_parameters == 1_373_809_152


def test_logits_have_the_models_dtype_and_a_place_for_every_token(
    model: GPT2ML, ids: Tensor
) -> None:
    logits = model(ids)
    assert logits.shape == (*ids.shape, SIZES.vocab)
    assert logits.dtype == torch.float64
    assert torch.equal(model(ids.int()), logits)


def test_explicit_positions_may_be_int32(model: GPT2ML, ids: Tensor) -> None:
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    assert torch.equal(model(ids, positions=positions.int()), model(ids))


def test_logits_of_a_place_depend_on_nothing_after_it(model: GPT2ML, ids: Tensor) -> None:
    other = ids.clone()
    other[:, 20:] = (other[:, 20:] + 1) % SIZES.vocab
    assert torch.equal(model(other)[:, :20], model(ids)[:, :20])


def test_no_tokens_give_no_logits(model: GPT2ML, ids: Tensor) -> None:
    assert model(ids[:, :0]).shape == (2, 0, SIZES.vocab)


@pytest.mark.parametrize("bad", [-1, SIZES.vocab, 2**40, -(2**40)])
def test_ids_out_of_range_are_refused(model: GPT2ML, ids: Tensor, bad: int) -> None:
    ids[1, 7] = bad
    with pytest.raises(ValueError, match=rf"token id {bad} is out of range.* < {SIZES.vocab}"):
        model(ids)


def test_more_tokens_than_positions_are_refused(model: GPT2ML, ids: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"41 tokens were given; .* {SIZES.positions} positions"):
        model(torch.cat([ids, ids[:, :1]], dim=1))


@pytest.mark.parametrize("bad", [-1, SIZES.positions])
def test_positions_out_of_range_are_refused(model: GPT2ML, ids: Tensor, bad: int) -> None:
    positions = torch.arange(5, device=ids.device).repeat(2, 1)
    positions[1, 2] = bad
    with pytest.raises(ValueError, match=rf"position {bad} is out of range.* < {SIZES.positions}"):
        model(ids[:, :5], positions=positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.complex64])
def test_ids_that_are_no_integers_are_refused(
    model: GPT2ML, ids: Tensor, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=f"token_ids is {dtype}.*expected"):
        model(ids.clamp(max=9).to(dtype))


@pytest.mark.parametrize("shape", [(), (5,), (2, 5, 1)])
def test_ids_of_another_shape_are_refused(model: GPT2ML, shape: tuple[int, ...]) -> None:
    zeros = torch.zeros(shape, dtype=torch.int64, device=model.device)
    with pytest.raises(ValueError, match=re.escape(f"of shape {shape}")):
        model(zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_positions_that_are_no_integers_are_refused(
    model: GPT2ML, ids: Tensor, dtype: torch.dtype
) -> None:
    positions = torch.arange(5, device=ids.device).expand(2, 5).to(dtype)
    with pytest.raises(ValueError, match=f"positions is {dtype}"):
        model(ids[:, :5], positions=positions)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 4), (2, 5, 1)])
def test_positions_of_another_shape_are_refused(
    model: GPT2ML, ids: Tensor, shape: tuple[int, ...]
) -> None:
    positions = torch.zeros(shape, dtype=torch.int64, device=ids.device)
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        model(ids[:, :5], positions=positions)


def test_dropout_stands_after_the_context_projection_and_after_the_mlp_and_nowhere_else() -> None:
    model = GPT2ML(config_of(SIZES)).train()
    dropped: list[tuple[Tensor, Tensor]] = []
    projected: list[Tensor] = []
    for block in model.blocks:
        drop, modules = block.get_submodule("dropout"), ("attention.output", "mlp.down")
        drop.register_forward_hook(lambda _, args, out: dropped.append((args[0], out)))
        for name in modules:
            block.get_submodule(name).register_forward_hook(
                lambda _, args, out: projected.append(out)
            )
    model(to_torch(random_ids(SIZES)))
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == SIZES.layers
    assert len(projected) == 2 * SIZES.layers
    for (given, _), projection in zip(dropped, projected, strict=True):
        assert torch.equal(given, projection)
    # 0.1 of the elements are 0, the others grow by 1 / 0.9.
    zeros = torch.cat([(out == 0).flatten() for _, out in dropped]).double()
    assert abs(zeros.mean() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / zeros.numel())
    for given, out in dropped:
        kept = out != 0
        torch.testing.assert_close(out[kept], given[kept] / 0.9)


def test_nothing_but_these_dropouts_is_random(ids: Tensor) -> None:
    model = loud_model(SIZES)[0].to(ids.device)
    expected = model(ids)
    assert torch.equal(model(ids), expected)
    model.train()
    assert not torch.equal(model(ids), model(ids))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert torch.equal(model(ids), expected)


def test_initial_weights_are_drawn_as_tensorflow_draws_them() -> None:
    """Truncated at two standard deviations, which leaves 0.88 of the one asked for."""
    tf = pytest.importorskip("tensorflow")
    config = GPT2MLConfig(
        vocab_size=5000,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
    )
    torch.manual_seed(0)
    state = GPT2ML(config).state_dict()
    for name, weight in state.items():
        if weight.ndim == 1:
            assert torch.all(weight == (1 if name.endswith("norm.weight") else 0)), name
            continue
        std = 0.02 if ".mlp." in name else config.initializer_range
        theirs = tf.compat.v1.truncated_normal_initializer(stddev=std, seed=0)(
            shape=weight.shape, dtype=tf.float32
        ).numpy()
        assert weight.abs().max() <= 2 * std
        assert weight.abs().max() == pytest.approx(abs(theirs).max(), rel=0.01)
        tolerance = 5 / math.sqrt(weight.numel())  # five standard errors, and more
        assert weight.std().item() == pytest.approx(theirs.std(), rel=tolerance)
        assert abs(weight.mean().item()) < tolerance * std


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_and_pickles_compute_the_same(dtype: torch.dtype) -> None:
    model, _ = loud_model(SIZES, dtype=dtype)
    ids = to_torch(random_ids(SIZES))
    expected = model(ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids), expected)
        with torch.no_grad():
            twin.token_embedding.weight.zero_()
    assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saving_and_loading_gives_the_same_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = loud_model(SIZES, dtype=dtype)
    path = tmp_path / "model.safetensors"
    model.save_pretrained(path)
    again = GPT2ML.from_pretrained(path)
    assert again.config == model.config
    assert not again.training
    assert again.dtype == dtype
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    again.save_pretrained(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_loaded_model_can_be_trained_and_saved_over_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    loud_model(SIZES, dtype=torch.float32)[0].save_pretrained(path)
    model = GPT2ML.from_pretrained(path)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(to_torch(random_ids(SIZES))).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(path)
    for name, weight in GPT2ML.from_pretrained(path).state_dict().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_dtype_asked_for_is_the_one_rounded_to(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = loud_model(SIZES, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model.safetensors")
    loaded = GPT2ML.from_pretrained(tmp_path / "model.safetensors", dtype=dtype)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(dtype)), name
