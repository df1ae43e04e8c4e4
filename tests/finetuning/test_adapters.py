"""Adapters of strangers: what peft saves merges as peft merges it, anything else is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt2ml_torch import GPT2ML
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.finetuning.adapters import merge_adapter
from gpt2ml_torch.modelfile import ModelFile

peft = pytest.importorskip("peft")

Tensors = dict[str, Tensor]
UP = "base_model.model.blocks.0.mlp.up.lora_A.weight"


def make_adapter(model: Path, folder: Path, **settings: Any) -> Any:
    """An adapter with loud random weights, saved by peft; gives the model that it is on."""
    torch.manual_seed(3)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["attention.qkv", "mlp.up"]} | settings
    adapted = peft.get_peft_model(GPT2ML.from_pretrained(model), peft.LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=float("magnitude" in name), std=0.2)
    adapted.save_pretrained(str(folder))
    return adapted


@pytest.fixture(scope="module")
def adapter(tuning_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter of the tiny model; don't write into it."""
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(tuning_files / "model.safetensors", folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {
            "rank_pattern": {"mlp.up": 2, r"blocks\.1\.attention\.qkv": 7},
            "alpha_pattern": {"up": 3},
        },
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only", "lora_bias": False},
        {"lora_bias": True},
        {"modules_to_save": ["mlp_norm"]},
        {"target_modules": r"blocks\.[01]\.mlp\.(up|down)", "exclude_modules": ["blocks.1.mlp.up"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["token_embedding", "position_embedding", "mlp.down"]},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_merging_gives_the_weights_that_peft_gives(
    settings: dict[str, Any], tuning_files: Path, tmp_path: Path
) -> None:
    model = tuning_files / "model.safetensors"
    make_adapter(model, tmp_path / "adapter", **settings)
    loaded = peft.PeftModel.from_pretrained(GPT2ML.from_pretrained(model), tmp_path / "adapter")
    expected = loaded.merge_and_unload().state_dict()
    merge_adapter(model, tmp_path / "adapter", tmp_path / "out.safetensors")
    found, before = ModelFile.open(tmp_path / "out.safetensors").state_dict(), load_file(model)
    changed = {name for name in before if not torch.equal(before[name], found[name])}
    assert changed == {name for name in before if not torch.equal(before[name], expected[name])}
    assert changed
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_is_rounded_once_to_the_dtype_of_the_file(
    dtype: torch.dtype, tuning_files: Path, adapter: Path, tmp_path: Path
) -> None:
    model = GPT2ML.from_pretrained(tuning_files / "model.safetensors", dtype=dtype)
    model.save_pretrained(tmp_path / "model.safetensors")
    merge_adapter(tmp_path / "model.safetensors", adapter, tmp_path / "out.safetensors")
    weights, name = load_file(adapter / "adapter_model.safetensors"), "blocks.1.mlp.up.weight"
    b, a = (weights[UP.replace(".0.", ".1.").replace("_A", side)] for side in ("_B", "_A"))
    exact = load_file(tmp_path / "model.safetensors")[name].double() + b.double() @ a.double() * 1.5
    found = load_file(tmp_path / "out.safetensors")[name]
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=3.1e-8
    )


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    "prefix",
    ["", "base_model.model.base_model.model.", "module.base_model.model.", "_orig_mod.module."],
)
def test_what_wrappers_put_before_a_name_is_understood(
    prefix: str, tuning_files: Path, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "renamed")
    file = tmp_path / "renamed" / "adapter_model.safetensors"
    save_file(
        renamed(lambda name: prefix + name.removeprefix("base_model.model."))(load_file(file)), file
    )
    for folder in (adapter, tmp_path / "renamed"):
        out = tmp_path / f"{folder.name}.safetensors"
        merge_adapter(tuning_files / "model.safetensors", folder, out)
    expected, found = (
        load_file(tmp_path / f"{name}.safetensors") for name in (adapter.name, "renamed")
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def edited(**changes: Any) -> Callable[[Path], None]:
    """Change settings in a folder's adapter_config.json."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def reweighed(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    """Change the tensors in a folder's adapter_model.safetensors."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return edit


def overwritten(name: str, data: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return edit


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(data: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        (folder / "adapter_model.bin").write_bytes(data)

    return edit


def with_value(value: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {UP: tensors[UP].fill_(value)}


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "another name for blocks": (
        reweighed(renamed(lambda name: name.replace("blocks", "layers"))),
        "8 tensors of the adapter without a place in the model ('base_model.model.layers.0",
    ),
    "a prefix of another model": (
        reweighed(renamed(lambda name: name.replace("blocks", "transformer.blocks"))),
        "8 places in the model without a tensor of the adapter ('blocks.0",
    ),
    "one block only": (
        reweighed(lambda tensors: {n: v for n, v in tensors.items() if ".1." in n}),
        "4 places in the model without a tensor",
    ),
    "one matrix missing": (
        reweighed(lambda tensors: {n: v for n, v in tensors.items() if n != UP}),
        "1 places in the model without a tensor of the adapter ('blocks.0.mlp.up.lora_A.weight')",
    ),
    "a tensor too many": (
        reweighed(lambda tensors: tensors | {"base_model.model.lm_head.weight": torch.ones(3)}),
        "1 tensors of the adapter without a place in the model ('base_model.model.lm_head",
    ),
    "the same weight twice": (
        reweighed(lambda tensors: tensors | {f"module.{UP}": tensors[UP].clone()}),
        "name the same weight",
    ),
    "no tensor": (reweighed(lambda tensors: {}), "8 places in the model without a tensor"),
    "more layers than the model has": (
        reweighed(renamed(lambda name: name.replace(".1.", ".7."))),
        "without a place in the model ('base_model.model.blocks.7",
    ),
    "NaN": (reweighed(with_value(float("nan"))), "holds NaN or infinite numbers"),
    "infinity": (reweighed(with_value(float("-inf"))), "holds NaN or infinite numbers"),
    "sums beyond float32": (reweighed(with_value(3e38)), "makes blocks.0.mlp.up.weight infinite"),
    "whole numbers": (
        reweighed(lambda tensors: tensors | {UP: tensors[UP].to(torch.int32)}),
        "expected floating-point numbers",
    ),
    "another width": (
        reweighed(lambda tensors: tensors | {UP: torch.ones(4, 33)}),
        "has shape (4, 33); the model and the adapter's rank make it (4, 32)",
    ),
    "another rank": (edited(r=5), "make it (5, 32)"),
    "another rank for one": (edited(rank_pattern={"mlp.up": 3}), "make it (3, 32)"),
    "alpha NaN": (edited(lora_alpha=float("nan")), "lora_alpha is nan; expected a finite number"),
    "alpha infinite": (edited(lora_alpha=float("inf")), "lora_alpha is inf"),
    "alpha in words": (edited(lora_alpha="16"), "lora_alpha is '16'"),
    "alpha of one infinite": (edited(alpha_pattern={"up": 1e999}), "alpha_pattern is inf"),
    "rank zero": (edited(r=0), "r is 0"),
    "other targets": (edited(target_modules=["mlp.down"]), "8 tensors of the adapter without a"),
    "targets that are none": (edited(target_modules=["c_attn"]), "names no layer of the model"),
    "no targets": (edited(target_modules=None), "target_modules is empty"),
    "an endless pattern": (edited(target_modules="(a*)*b"), "can't be used"),
    "no pattern": (edited(target_modules="(mlp"), "can't be used"),
    "another method": (edited(peft_type="IA3"), "peft_type is 'IA3'"),
    "changed base weights": (edited(init_lora_weights="pissa"), "changes the base model's"),
    "a setting of the future": (edited(use_qalora=True), "'use_qalora' is True, which this"),
    "no JSON": (overwritten("adapter_config.json", b"{"), "adapter_config.json: it is not JSON"),
    "not an object": (overwritten("adapter_config.json", b"[1]"), "expected an object"),
    "deep JSON": (overwritten("adapter_config.json", b"[" * 100_000), "it is not JSON"),
    "two alphas": (
        overwritten("adapter_config.json", b'{"lora_alpha": 1, "lora_alpha": 2}'),
        "it contradicts itself: 'lora_alpha' is '1' and '2'",
    ),
    "a huge configuration": (overwritten("adapter_config.json", b" " * (1 << 21)), "is damaged"),
    "a file cut off": (cut, "adapter_model.safetensors is damaged"),
    "no safetensors": (overwritten("adapter_model.safetensors", b"hello"), "is damaged"),
    "an empty file": (overwritten("adapter_model.safetensors", b""), "is damaged"),
    "no pickle": (pickled(b"hello"), "can't be read as a pickled adapter"),
    "a pickle that runs code": (
        pickled(b"cos\nsystem\n(S'touch pwned'\ntR."),
        "can't be read as a pickled adapter",
    ),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "lacks"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "is no adapter"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_adapter_that_does_not_fit_is_one_line_and_nothing_is_written(
    name: str,
    tuning_files: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, message = BAD[name]
    shutil.copytree(adapter, tmp_path / "bad")
    damage(tmp_path / "bad")
    model, out = tuning_files / "model.safetensors", tmp_path / "out.safetensors"
    assert main(["merge", str(model), str(tmp_path / "bad"), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_pickled_adapter_is_read_as_the_other_format_is(
    tuning_files: Path, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "pickled")
    file = tmp_path / "pickled" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "pickled" / "adapter_model.bin")
    file.unlink()
    for folder in (adapter, tmp_path / "pickled"):
        out = tmp_path / f"{folder.name}.safetensors"
        merge_adapter(tuning_files / "model.safetensors", folder, out, source={"name": "x"})
    outs = [tmp_path / f"{name}.safetensors" for name in (adapter.name, "pickled")]
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_an_adapter_that_was_never_trained_is_merged_with_a_warning(
    tuning_files: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(adapter, tmp_path / "zero")
    reweighed(lambda tensors: {n: v * ("_A" in n) for n, v in tensors.items()})(tmp_path / "zero")
    model, out = tuning_files / "model.safetensors", tmp_path / "out.safetensors"
    merge_adapter(model, tmp_path / "zero", out)
    assert "adds nothing" in caplog.text
    expected, found = load_file(model), load_file(out)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
