"""Results that were wrong without a word, by example and variation."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gpt2ml_torch import GPT2ML, Generator
from gpt2ml_torch.commands.common import read_lines
from gpt2ml_torch.finetuning import tokenize_files
from gpt2ml_torch.modelfile import ModelFile
from tests.generation.test_unequal_blocks import (
    eager_backend,
    needs_compiler,
    plain_model,
    steps,
)
from tests.helpers import checkpoint_factory as factory
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.register.conftest import Run

TEXT = "今天天气不错双十一科学空间，。春眠不觉晓处闻啼鸟"
ODD_NUMBERS = [("blocks.0.mlp_norm.weight", math.nan), ("blocks.1.mlp.up.bias", math.inf)]

# Compiled generation of models whose blocks are not all alike.


class Looked(nn.Linear):
    """Finds its factor outside of itself, by what it is."""

    factors: dict[nn.Module, float]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factors[self]


class Stepped(nn.Linear):
    """Finds its factor in an object."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.settings.factor  # type: ignore[operator, union-attr]


class Settings:
    __slots__ = ("factor",)
    factor: float


def scale_by_table(model: GPT2ML) -> None:
    Looked.factors = {}
    for number, block in enumerate(model.blocks):
        block.mlp.up.__class__ = Looked
        Looked.factors[block.mlp.up] = 1.0 + number


def scale_by_settings(model: GPT2ML) -> None:
    for number, block in enumerate(model.blocks):
        block.mlp.up.__class__ = Stepped
        block.mlp.up.settings = settings = Settings()
        settings.factor = 1.0 + number


def scale_by_closures(model: GPT2ML) -> None:
    for number, block in enumerate(model.blocks):
        inner = block.mlp.forward
        block.mlp.forward = lambda x, inner=inner, n=number: inner(x) * (n + 1)


def scale_by_tensors(model: GPT2ML) -> None:
    for number, block in enumerate(model.blocks):
        block.mlp.up.register_buffer("factor", torch.tensor(1.0 + number))
        block.mlp.up.register_forward_hook(lambda module, _, output: output * module.factor)


def adapt_with_different_scales(model: GPT2ML) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up"], r=2, init_lora_weights=False)
    torch.manual_seed(3)
    peft.inject_adapter_in_model(config, model)
    for number, block in enumerate(model.blocks):
        block.mlp.up.scaling["default"] = 1.0 + number
    model.blocks[3].mlp.up.enable_adapters(False)


def share_a_block(model: GPT2ML) -> None:
    model.blocks[4] = model.blocks[1]


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        scale_by_table,
        scale_by_settings,
        scale_by_closures,
        scale_by_tensors,
        adapt_with_different_scales,
        share_a_block,
    ],
    ids=lambda change: change.__name__,
)
def test_compiled_steps_are_the_eager_ones_where_blocks_differ(
    change: Callable[[GPT2ML], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    eager_backend(monkeypatch)
    model = plain_model()
    change(model)
    expected = steps(model.eval(), compile=False)
    assert not torch.allclose(steps(plain_model(), compile=False), expected, atol=1e-3)
    torch.testing.assert_close(steps(model, compile=True), expected, rtol=1e-5, atol=1e-5)


# Damaged checkpoints.


def write_zip(folder: Path, state: dict[str, Tensor]) -> list[Path]:
    torch.save(state, folder / "pytorch_model.bin")
    return [folder / "pytorch_model.bin"]


def write_two_shards(folder: Path, state: dict[str, Tensor]) -> list[Path]:
    names, paths = list(state), []
    for part in (1, 2):
        path = folder / f"pytorch_model-0000{part}-of-00002.bin"
        torch.save({name: state[name] for name in names[part - 1 :: 2]}, path)
        paths.append(path)
    return paths


@pytest.mark.parametrize("write", [write_zip, write_two_shards])
def test_one_flipped_bit_is_an_error_or_changes_no_weight(
    write: Callable[[Path, dict[str, Tensor]], list[Path]], tmp_path: Path, run: Run
) -> None:
    weights = factory.tf_weights()
    factory.write_beside(tmp_path)
    files = write(tmp_path, factory.community_state_dict(weights))
    expected, out = factory.expected_tensors(weights), tmp_path / "out.safetensors"
    draw, refused = random.Random(2), 0
    for _ in range(20):
        path = draw.choice(files)
        sound = path.read_bytes()
        damaged = bytearray(sound)
        bit = draw.randrange(8 * len(sound))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        ran = run.convert(tmp_path, out, "--force")
        path.write_bytes(sound)
        if ran.status == 0:
            found = ModelFile.open(out).state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            out.unlink()
        else:
            assert ran.is_one_line
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("kind", ["legacy", "safetensors"])
def test_that_nothing_could_be_verified_is_said(kind: str, tmp_path: Path, run: Run) -> None:
    state = factory.community_state_dict(factory.tf_weights())
    factory.write_beside(tmp_path)
    if kind == "legacy":
        path = tmp_path / "pytorch_model.bin"
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        copies = {name: value.clone() for name, value in state.items()}
        save_file(copies, tmp_path / "model.safetensors")
    ran = run.convert(tmp_path, tmp_path / "out.safetensors")
    assert "verified    nothing: this file format has no checksums" in ran.out


# Adapters that do not fit the model.

UP = "base_model.model.blocks.{}.mlp.up.lora_{}.weight"
Tensors = dict[str, Tensor]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["mlp.up"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write_adapter(folder, adapter_tensors())
    return folder


def adapter_tensors() -> Tensors:
    torch.manual_seed(0)
    shapes = {"A": (2, 32), "B": (64, 2)}
    return {UP.format(n, side): torch.randn(shapes[side]) for n in range(2) for side in "AB"}


def write_adapter(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "adapter_model.safetensors")


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (renamed("blocks", "layers"), 4),
        (renamed("blocks", "transformer.blocks"), 4),
        (renamed("base_model.model.", "base_model.model.model."), 4),
        (renamed("lora_A.weight", "lora_A.default.weight"), 2),
        (renamed("lora_B", "lora_b"), 2),
        (lambda tensors: {n: value for n, value in tensors.items() if ".1." in n}, 2),
        (lambda tensors: {n: value for n, value in tensors.items() if "lora_A" in n}, 2),
        (lambda tensors: {}, 4),
    ],
    ids=["layers", "transformer", "model", "default", "lora_b", "one block", "half", "none"],
)
def test_places_without_a_tensor_are_named_and_nothing_is_written(
    change: Callable[[Tensors], Tensors], missing: int, model_file: Path, adapter: Path, run: Run
) -> None:
    write_adapter(adapter, change(adapter_tensors()))
    out = adapter.with_name("out")
    for words in (
        ("merge", model_file, adapter, "--out", out),
        ("export", model_file, out, "--adapter", adapter),
    ):
        ran = run(*words)
        assert ran.is_one_line
        assert f"{missing} places in the model without a tensor of the adapter ('blocks." in ran.err
        if found := change(adapter_tensors()).keys() - adapter_tensors().keys():
            assert f"{len(found)} tensors of the adapter without a place in the model" in ran.err
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, "4", True, None, 0, [4]])
def test_an_alpha_that_is_no_number_is_refused(
    value: object, model_file: Path, adapter: Path, run: Run
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": value}))
    ran = run("merge", model_file, adapter, "--out", adapter.with_name("out"))
    assert ran.is_one_line
    assert f"lora_alpha is {value!r}; expected a finite number" in ran.err
    assert not adapter.with_name("out").exists()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float64"])
def test_an_adapter_of_any_float_dtype_is_added(
    dtype: str, model_file: Path, adapter: Path, run: Run
) -> None:
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in adapter_tensors().items()}
    write_adapter(adapter, renamed("base_model.", "module.base_model.")(tensors))
    out = adapter.with_name("out.safetensors")
    assert run("merge", model_file, adapter, "--out", out).status == 0
    a, b = (tensors[UP.format(1, side)].double() for side in "AB")
    name = "blocks.1.mlp.up.weight"
    before, after = (ModelFile.open(path).tensor(name) for path in (model_file, out))
    torch.testing.assert_close(after.double(), before.double() + 2 * b @ a, rtol=1e-6, atol=1e-6)


# Models that hold NaN or infinity.


def save_broken(path: Path, tensor: str, value: float, *, times: float = 1.0) -> Path:
    model = tiny_model(tiny_tokenizer())
    with torch.no_grad():
        model.get_parameter(tensor)[0] = value
        model.get_parameter(tensor).mul_(times)
    model.save_pretrained(path, tokenizer=tiny_tokenizer(), allow_non_finite=True)
    return path


@pytest.mark.parametrize(("tensor", "value"), ODD_NUMBERS)
@pytest.mark.parametrize(
    "words",
    [
        ("generate", "{}", "今天", "--no-compile"),
        ("generate", "{}", "今天", "--no-compile", "--top-k", "5", "--json", "--logprobs"),
        ("generate", "{}", "今天", "--no-compile", "--num-beams", "3"),
        ("generate", "{}", "今天", "--no-compile", "--quantize", "int4"),
        ("generate", "{}", "今天", "--no-compile", "--dtype", "float16", "--quantize", "none"),
        ("score", "{}", "今天天气", "--json"),
        ("quantize", "{}", "--out", "{}.out"),
        ("export", "{}", "{}.out"),
        ("convert", "{}", "{}.out", "--to-tf"),
    ],
    ids=" ".join,
)
def test_the_tensor_that_is_not_finite_is_named(
    words: tuple[str, ...], tensor: str, value: float, tmp_path: Path, run: Run
) -> None:
    path = save_broken(tmp_path / "bad.safetensors", tensor, value)
    ran = run(
        *(word.format(path) for word in words), *(["--quiet"] * (words[0] in ("generate", "score")))
    )
    assert ran.status == 2
    assert ran.out.strip() in ("", "今天")
    assert repr(tensor) in ran.err
    assert ran.err.count("\n") == 1
    assert [found.name for found in tmp_path.iterdir()] == ["bad.safetensors"]


def test_what_is_not_finite_is_converted_back_on_request(tmp_path: Path, run: Run) -> None:
    path = save_broken(tmp_path / "bad.safetensors", *ODD_NUMBERS[0])
    there, back = tmp_path / "tf", tmp_path / "back.safetensors"
    assert run.convert("--to-tf", path, there, "--allow-non-finite").status == 0
    assert run.convert(there, back).is_one_line
    assert run.convert(there, back, "--allow-non-finite", "--no-vocab").status == 0
    assert bool(ModelFile.open(back).tensor(ODD_NUMBERS[0][0]).isnan().any())


@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_weight_that_float16_lacks_is_not_blamed_on_the_file(
    command: str, tmp_path: Path, run: Run
) -> None:
    path = save_broken(tmp_path / "large.safetensors", "blocks.1.mlp.down.weight", 1.0, times=1e6)
    words = (command, path, "今天", "--no-compile", "--quantize", "none", "--quiet")
    ran = run(*words, "--dtype", "float16")
    assert ran.is_one_line
    assert "'blocks.1.mlp.down.weight' has NaN or infinity in float16; load it in" in ran.err
    assert run(*words).status == 0


def test_scores_say_that_logits_overflowed_where_all_weights_are_finite() -> None:
    model = tiny_model(tiny_tokenizer())
    with torch.no_grad():
        model.token_embedding.weight.mul_(3e38).clamp_(-3e38, 3e38)
        model.embedding_norm.weight.mul_(1e10)
    with pytest.raises(ValueError, match=r"the logits overflowed in float32"):
        Generator(model, tiny_tokenizer(), compile=False, pack=False).score(["今天天气"])


def test_a_text_of_one_token_is_valid_json(model_file: Path, run: Run) -> None:
    ran = run("score", model_file, "今", "--json", "--quiet")
    assert json.loads(ran.out)["perplexity"] is None


# Scores of texts longer than the model's positions.


@pytest.mark.parametrize(("positions", "tokens"), [(8, 8), (8, 9), (8, 10), (8, 24), (5, 6)])
def test_score_predicts_each_token_from_as_many_as_fit(positions: int, tokens: int) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, positions=positions)
    ids = tokenizer.encode(TEXT)[:tokens]
    # In one call with a shorter and a longer text, which are read in the same batch.
    texts = [TEXT[:tokens], TEXT[:3], TEXT]
    found = Generator(model, tokenizer, compile=False, pack=False).score(texts)[0]
    with torch.no_grad():
        expected = [
            model(torch.tensor([ids[max(end - positions, 0) : end]]))[0, -1]
            .log_softmax(-1)[ids[end]]
            .item()
            for end in range(1, tokens)
        ]
    assert list(found.token_logprobs) == pytest.approx(expected, abs=1e-4)


def test_scoring_a_long_text_reads_a_bounded_number_of_tokens_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpt2ml_torch.generation.scoring._SLIDING_TOKENS", 64)
    tokenizer = tiny_tokenizer()
    generator = Generator(tiny_model(tokenizer, positions=8), tokenizer, compile=False)
    rows: list[int] = []
    forward = generator.model.hidden_states

    def counted(ids: Tensor) -> Tensor:
        rows.append(len(ids))
        return forward(ids)

    monkeypatch.setattr(generator.model, "hidden_states", counted)
    (found,) = generator.score([TEXT * 4])
    assert len(found.token_logprobs) == len(found.token_ids) - 1
    assert sum(rows) <= 1 + math.ceil((len(TEXT) * 4 - 9) / 4)


# Articles and prompts that were joined.

BLANK = ["\u200b", "\ufeff", " \u200b\u3000", "\u2060\u00ad", "\u0301", "\U000e0001"]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\r\r\n"], ids=repr)
@pytest.mark.parametrize("blank", BLANK, ids=ascii)
def test_articles_and_prompts_stay_apart(blank: str, end: str, tmp_path: Path) -> None:
    texts = ["今天天气不错", "春眠不觉晓", "处闻啼鸟"]
    file = tmp_path / "a.txt"
    file.write_bytes(f"{end}{blank}{end}".join(texts).encode())
    tokenizer = tiny_tokenizer()
    corpus = tokenize_files([file], tokenizer, cache_dir=tmp_path / "cache", workers=1)
    found = [tokenizer.decode([int(i) for i in corpus[n]]) for n in range(len(corpus))]
    assert found == texts
    assert read_lines(str(file)) == texts
