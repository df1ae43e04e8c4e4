"""Folders of the exported class, also as other programs write them, back to the one file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2ml_torch import GPT2ML, Tokenizer
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.export.folder import ExportOptions, export_folder
from gpt2ml_torch.modelfile.reader import ModelFile
from tests.helpers.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "model.safetensors"
    tiny_model(tiny_tokenizer()).save_pretrained(
        path,
        tokenizer=tiny_tokenizer(),
        source={"name": "tiny", "step": 7},
        generation={"top_k": 5, "stop": ["。"]},
    )
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return export_folder(original, tmp_path / "folder")


def _back(folder: Path, *options: str) -> ModelFile:
    out = folder.with_name("back.safetensors")
    assert main(["convert", str(folder), str(out), *options]) == 0
    return ModelFile.open(out)


def _assert_same(found: ModelFile, original: Path) -> None:
    expected = ModelFile.open(original)
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(found.tensor(name), expected.tensor(name)), name
    assert found.config == expected.config
    assert found.vocab == expected.vocab
    assert found.generation == expected.generation


def _tie(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


def _join(weights: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        for kind in ("weight", "bias"):
            before = f"model.layers.{layer}.self_attn."
            parts = [weights.pop(f"{before}{name}_proj.{kind}") for name in "qkv"]
            weights[f"{before}qkv_proj.{kind}"] = torch.cat(parts)


def _base_only(weights: dict[str, torch.Tensor]) -> None:
    for name in list(weights):
        weights[name.removeprefix("model.")] = weights.pop(name)


def _wrapped(weights: dict[str, torch.Tensor]) -> None:
    _tie(weights)
    for name in list(weights):
        weights[f"module.{name}"] = weights.pop(name)


@pytest.mark.parametrize("change", [None, _tie, _join, _base_only, _wrapped])
def test_a_folder_comes_back_bit_for_bit(
    folder: Path, original: Path, change: Callable[[dict[str, torch.Tensor]], None] | None
) -> None:
    if change is not None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = _back(folder)
    _assert_same(found, original)
    assert found.source["name"] == "tiny"
    assert found.source["imported"] == {"name": "model.safetensors"}


def test_shards_and_a_pickled_state_dict_come_back(original: Path, tmp_path: Path) -> None:
    folder = export_folder(original, tmp_path / "shards", ExportOptions(shard_size="30KB"))
    _assert_same(_back(folder), original)
    folder = export_folder(original, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    _assert_same(_back(folder, "--force"), original)


def test_bfloat16_comes_back_exactly(original: Path, tmp_path: Path) -> None:
    folder = export_folder(original, tmp_path / "folder", ExportOptions(dtype="bfloat16"))
    expected = GPT2ML.from_pretrained(original).bfloat16().state_dict()
    narrow, wide = _back(folder, "--dtype", "bfloat16"), _back(folder, "--force")
    for name, tensor in expected.items():
        assert torch.equal(wide.tensor(name), tensor.float())
    assert narrow.dtype == "bfloat16"


def test_a_folder_that_transformers_saved_comes_back(
    folder: Path, original: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generation_config.eos_token_id = model.config.eos_token_id = 102  # as TRL does
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    torch.save({}, tmp_path / "saved" / "training_args.bin")
    _assert_same(_back(tmp_path / "saved"), original)


def test_a_header_whose_size_begins_like_a_pickle_is_read(folder: Path, original: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    for padding in range(0, 256, 8):
        save_file(weights, path, {"format": "pt", "padding": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    _assert_same(_back(folder), original)


def test_what_a_training_program_leaves_beside_the_weights_is_left_alone(
    folder: Path, original: Path
) -> None:
    """Above all the pickled weights that a folder began with, and pickles that would run code."""
    zeros = {
        name: torch.zeros_like(w) for name, w in load_file(folder / "model.safetensors").items()
    }
    torch.save(zeros, folder / "pytorch_model.bin")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    (folder / "trainer_state.json").write_text("{}")
    _assert_same(_back(folder), original)


def test_tokens_added_to_the_tokenizer_are_noted(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({"id": 144, "content": "<|user|>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    _back(folder)
    assert "added to the tokenizer are left out and become plain text: '<|user|>'" in (
        "".join(capfd.readouterr())
    )


def test_without_our_settings_the_tokens_are_the_same(folder: Path, original: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    expected = Tokenizer.from_pretrained(original)
    assert _back(folder).tokenizer() == expected


def _set(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _index(shard: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        weight_map = {"a": "model-00001-of-00002.safetensors", "b": shard}
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def _twice(name: str, entry: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text().rstrip().removesuffix("}")
        (folder / name).write_text(f"{text}, {entry}}}")

    return change


def _token(token: str, id_: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        vocab = content["model"]["vocab"]
        content["model"]["vocab"] = {**{t: i for t, i in vocab.items() if t != "hello"}, token: id_}
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return change


def _gpt2(folder: Path) -> None:
    weights = {
        "transformer.wte.weight": torch.zeros(50, 8),
        "transformer.wpe.weight": torch.zeros(16, 8),
        "transformer.h.0.ln_1.weight": torch.zeros(8),
        "transformer.h.0.attn.c_attn.weight": torch.zeros(8, 24),
        "transformer.h.0.mlp.c_fc.bias": torch.zeros(32),
        "transformer.ln_f.weight": torch.zeros(8),
    }
    save_file(weights, folder / "model.safetensors")
    _set("config.json", model_type="gpt2", n_embd=8, hidden_size=8)(folder)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard elsewhere": (_index("../../etc/passwd"), "expected the name of a file beside it"),
    "a shard by its path": (_index("/etc/passwd"), "expected the name of a file beside it"),
    "a missing shard": (_index("model-00002-of-00002.safetensors"), "missing in"),
    "OpenAI's GPT-2": (_gpt2, "another architecture, OpenAI's GPT-2"),
    "another model": (_set("config.json", model_type="llama"), "architecture, 'llama'"),
    "other sizes": (_set("config.json", hidden_size=64), "contradicts the checkpoint"),
    "a tokenizer of another kind": (_set("tokenizer.json", model={"type": "BPE"}), "WordPiece"),
    "ids that are no ids": (
        _set("tokenizer.json", model={"type": "WordPiece", "vocab": {"a": 10**12}}),
        "not whole numbers",
    ),
    "lines that are no lines": (
        _set("tokenizer_config.json", gpt2ml_vocab_lines={"-1": "x"}),
        "something other than numbered lines",
    ),
    "a line far away": (
        _set("tokenizer_config.json", gpt2ml_vocab_lines={"99999": "x"}),
        "no line 99999",
    ),
    "a shard of a long name": (_index("x" * 5000), "expected the name of a file beside it"),
    "two numbers of heads": (
        _twice("config.json", '"num_attention_heads": 4'),
        "'num_attention_heads' is '2' and '4'",
    ),
    "two vocabularies": (_twice("tokenizer.json", '"model": {}'), "contradicts itself"),
    "another formula": (_set("config.json", layer_norm_eps=1e-12), "layer_norm_eps is 1e-12"),
    "an id of two tokens": (_token("new", 5), "gives the id 5 to '[unused5]' and 'new'"),
    "a token of two lines": (_token("a\nb", 145), "can't be a line of a vocabulary"),
    "defaults of no kind": (
        _set("config.json", gpt2ml_generation={"evil": 1}),
        "gpt2ml_generation: unknown generation option 'evil'",
    ),
    "an origin that is none": (_set("config.json", gpt2ml_source=[1]), "expected a JSON object"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_foreign_folder_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, message = HOSTILE[name]
    damage(folder)
    # Code in the folder, and code elsewhere that it names, is never run.
    (folder / "modeling_gpt2ml.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    assert main(["convert", str(folder), str(folder / "back.safetensors")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "back.safetensors").exists()
    assert not (folder / "ran").exists()
