"""Training goes on with the statistics of the original's optimizer, as the original would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from convert.__main__ import main as convert
from gpt2ml_torch import GPT2ML
from gpt2ml_torch.finetuning import Adafactor, FinetuneConfig, finetune, parameter_groups
from gpt2ml_torch.finetuning.optimizers import start_from
from gpt2ml_torch.modelfile import ModelFile
from tests.helpers.finetuning_runs import metrics
from tests.helpers.parity import make_model, state_dict_of, tf_weights_of
from tests.helpers.weights import Array, Sizes, Weights, loud_weights

tf_adafactor = pytest.importorskip("tests.helpers.tf_adafactor", reason="needs TensorFlow")
tf_reference = pytest.importorskip("tests.tf_reference", reason="needs TensorFlow")

SIZES = Sizes(layers=2, width=12, heads=2, mlp=20, vocab=211, positions=16)
RATE = 1e-2


def trained_slots(weights: Weights) -> Weights:
    """The statistics after a few steps with random gradients, under the names of a Saver.

    Not just random numbers: the means of a matrix's `vr` and `vc` are the same, since both are
    averages of the same squares.
    """
    draw = np.random.default_rng(0)
    optimizer = tf_adafactor.TFAdafactor(weights)
    for _ in range(3):
        scales = {name: np.exp(draw.standard_normal(w.shape)) for name, w in weights.items()}
        gradients = {
            name: (0.1 * scale * draw.standard_normal(scale.shape)).astype(weights[name].dtype)
            for name, scale in scales.items()
        }
        optimizer.step(gradients, RATE)
    return optimizer.slots


def our_slots(slots: Weights, weights: Weights) -> dict[str, Tensor]:
    """The original's statistics under our names and in our orientation.

    Spread over their matrices, which `state_dict_of` joins and transposes as it does weights.
    """
    rows, columns, found = {}, {}, {}
    for name, weight in weights.items():
        v, vr, vc = (slots.get(f"{name}/adafactor_{slot}") for slot in ("v", "vr", "vc"))
        if v is not None:
            rows[name] = columns[name] = v
        elif vr is not None and vc is not None:
            rows[name] = np.broadcast_to(vr[:, None], weight.shape)
            columns[name] = np.broadcast_to(vc, weight.shape)
    by_row, by_column = state_dict_of(rows), state_dict_of(columns)
    for name, spread in by_row.items():
        if spread.ndim == 1:
            found[f"{name}.v"] = spread
            continue
        pair = (spread, by_column[name])
        ours = pair if "embedding" in name else pair[::-1]  # kernels are transposed
        parts = 3 if "qkv" in name else 1
        found[f"{name}.vr"] = ours[0][:, 0].contiguous()
        found[f"{name}.vc"] = ours[1].unflatten(0, (parts, -1))[:, 0].contiguous()
    return found


@pytest.mark.parametrize("size", [1e-3, 10.0], ids=["not clipped", "clipped"])
def test_the_next_step_from_given_statistics_is_the_originals(size: float) -> None:
    weights = {name: w.astype(np.float64) for name, w in loud_weights(SIZES).items()}
    slots = trained_slots(weights)
    model, reference = make_model(SIZES, weights), tf_adafactor.TFAdafactor(weights, slots)
    optimizer = Adafactor(parameter_groups(model), lr=RATE)
    start_from(optimizer, model, our_slots(slots, weights))
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn_like(parameter)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    reference.step({n: g.numpy() for n, g in tf_weights_of(gradients).items()}, RATE)
    optimizer.step()
    for name, expected in state_dict_of(reference.weights).items():
        found = model.get_parameter(name).detach()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_a_missing_or_misshapen_statistic_is_an_error() -> None:
    weights = loud_weights(SIZES)
    slots = our_slots(trained_slots(weights), weights)
    model = make_model(SIZES, weights)
    name = "blocks.1.mlp.up.weight.vr"
    for damaged in ({k: v for k, v in slots.items() if k != name}, {**slots, name: torch.ones(3)}):
        with pytest.raises(ValueError, match=rf"{name} is (missing|of shape \(3,\)); expected"):
            start_from(Adafactor(parameter_groups(model)), model, damaged)


def test_statistics_of_what_is_not_trained_are_left_out() -> None:
    weights = loud_weights(SIZES)
    slots = our_slots(trained_slots(weights), weights)
    model = make_model(SIZES, weights)
    model.get_submodule("blocks.0").requires_grad_(False)
    optimizer = Adafactor(parameter_groups(model))
    start_from(optimizer, model, slots)
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a TensorFlow checkpoint, and model.safetensors that kept its optimizer."""
    folder = tmp_path_factory.mktemp("keep-optimizer")
    weights = loud_weights(SIZES)
    tf_reference.write_checkpoint(folder, SIZES, weights | trained_slots(weights), slots=False)
    try:
        assert convert([str(folder), str(folder / "model.safetensors"), "--keep-optimizer"]) == 0
    except SystemExit:  # unknown option
        pytest.skip("this converter keeps no optimizer yet")
    return folder


def texts(model: Path) -> str:
    """A document of each row's length, without tokens that the reference would count otherwise."""
    ids = np.random.default_rng(3).integers(104, SIZES.vocab, 17)
    vocab = (ModelFile.open(model).vocab or "").split("\n")
    return "".join(vocab[id_] for id_ in ids)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_on_a_converted_file_that_kept_its_optimizer_takes_the_originals_next_step(
    converted: Path, fresh: bool, tmp_path: Path
) -> None:
    model, out = converted / "model.safetensors", tmp_path / "out.safetensors"
    text = texts(model)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    config = FinetuneConfig(
        model=str(model),
        data=(str(tmp_path / "text.txt"),),
        out=str(out),
        cache=str(tmp_path / "cache"),
        steps=1,
        learning_rate=RATE,
        schedule="constant",
        warmup=0,
        dropout=0.0,
        precision="float32",
        valid_share=0.0,
        fresh_optimizer=fresh,
    )
    finetune(config)
    started = next(row for row in metrics(out) if row["kind"] == "start")
    assert started["fresh_optimizer"] is fresh
    reference = tf_adafactor.TFAdafactor(
        loud_weights(SIZES), None if fresh else _slots_in(converted)
    )
    ids = np.array([[int(t) for t in _ids(model, text)]])
    _, gradients = tf_reference.TFReference(
        reference.weights, heads=SIZES.heads
    ).loss_and_gradients(ids)
    reference.step(gradients, RATE)
    found = tf_weights_of(ModelFile.open(out).state_dict())
    for name, expected in reference.weights.items():
        if "key_layer/bias" not in name:  # its gradient is nothing but rounding
            np.testing.assert_allclose(found[name].numpy(), expected, atol=2e-5, err_msg=name)


def _ids(model: Path, text: str) -> list[int]:
    from gpt2ml_torch import Tokenizer

    return Tokenizer.from_pretrained(model).encode(text)


def _slots_in(folder: Path) -> dict[str, Array]:
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(folder))
    names = (name for name in reader.get_variable_to_shape_map() if "/adafactor_" in name)
    return {name: reader.get_tensor(name) for name in names}


def test_the_model_itself_loads_without_its_optimizer(converted: Path) -> None:
    GPT2ML.from_pretrained(converted / "model.safetensors")
