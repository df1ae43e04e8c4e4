"""Results that were wrong without a word, by example and variation.

Damaged `.bin` files are in tests/convert/test_pytorch_bin.py, adapters that do not fit in
tests/finetuning/test_adapters.py, articles that were joined in tests/finetuning/data/test_lines.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from gpt2ml_torch import Generator
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.model import GPT2ML
from tests.helpers.tiny import tiny_model, tiny_tokenizer

TEXT = "今天天气不错双十一科学空间，。春眠不觉晓处闻啼鸟"


@pytest.mark.parametrize(("positions", "tokens"), [(8, 8), (8, 9), (8, 10), (8, 24), (5, 6)])
def test_score_predicts_each_token_from_as_many_as_fit(positions: int, tokens: int) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, positions=positions)
    ids = tokenizer.encode(TEXT)[:tokens]
    (found,) = Generator(model, tokenizer, compile=False, pack=False).score([TEXT[:tokens]])
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

    def counted(ids: torch.Tensor) -> torch.Tensor:
        rows.append(len(ids))
        return forward(ids)

    monkeypatch.setattr(generator.model, "hidden_states", counted)
    (found,) = generator.score([TEXT * 4])
    assert len(found.token_logprobs) == len(found.token_ids) - 1
    assert sum(rows) <= 1 + math.ceil((len(TEXT) * 4 - 9) / 4)


@pytest.mark.parametrize(
    ("tensor", "value"),
    [("blocks.0.mlp_norm.weight", math.nan), ("blocks.1.mlp.up.bias", math.inf)],
)
def test_score_names_a_tensor_that_is_not_finite(
    tensor: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.safetensors"
    save(broken(tensor, value), path)
    assert main(["score", str(path), "今天天气", "--json", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert repr(tensor) in err
    assert err.count("\n") == 1


def test_score_says_that_logits_overflowed_where_all_weights_are_finite() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.token_embedding.weight.mul_(3e38)
        model.embedding_norm.weight.mul_(1e10)
        model.token_embedding.weight.clamp_(-3e38, 3e38)
    with pytest.raises(ValueError, match=r"the logits overflowed in float32"):
        Generator(model, tokenizer, compile=False, pack=False).score(["今天天气"])


@pytest.mark.parametrize("options", [[], ["--top-k", "5"], ["--num-beams", "3"], ["--json"]])
@pytest.mark.parametrize(
    ("tensor", "value"),
    [("blocks.0.mlp_norm.weight", math.nan), ("blocks.1.mlp.up.bias", math.inf)],
)
def test_generate_names_a_tensor_that_is_not_finite(
    options: list[str],
    tensor: str,
    value: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.safetensors"
    save(broken(tensor, value), path)
    assert main(["generate", str(path), "今天", "--quiet", "--no-compile", *options]) == 2
    out, err = capsys.readouterr()
    assert tensor in err
    assert err.count("\n") == 1
    assert out.strip() in ("", "今天")


@pytest.mark.parametrize("positions", [64, 65])
def test_a_text_of_one_token_is_valid_json(
    positions: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.safetensors"
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, positions=positions).save_pretrained(path, tokenizer=tokenizer)
    assert main(["score", str(path), "今", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] is None


def broken(tensor: str, value: float) -> GPT2ML:
    model = tiny_model(tiny_tokenizer())
    with torch.no_grad():
        model.get_parameter(tensor)[0] = value
    return model


def save(model: GPT2ML, path: Path) -> None:
    model.save_pretrained(path, tokenizer=tiny_tokenizer(), allow_non_finite=True)
