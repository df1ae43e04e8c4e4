"""LoRA adapters beside packed weights: each text is its own, whatever is written beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2ml_torch import GPT2ML, Generator, kernels
from gpt2ml_torch.finetuning import load_adapter, merge_adapter
from tests.helpers.adapters import write_adapter

PROMPT = "春眠不觉晓"

pytestmark = [
    pytest.mark.skipif(not kernels.load_kernels(), reason="no compiler or no AVX2"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def folders(shipped_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "poems": write_adapter(shipped_model, folder / "poems", seed=1),
        "news": write_adapter(
            shipped_model, folder / "news", seed=2, rank=20, targets=["attention.qkv", "mlp.up"]
        ),
    }


@pytest.fixture(scope="module")
def generator(shipped_model: Path, folders: dict[str, Path]) -> Generator:
    generator = Generator.from_pretrained(shipped_model, quantize="int8", batch_size=4)
    for name, folder in folders.items():
        generator.add_adapter(name, load_adapter(folder, generator.model))
    return generator


@pytest.fixture(scope="module")
def merged(
    shipped_model: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Generator]:
    """Each adapter merged into float32 weights."""
    folder = tmp_path_factory.mktemp("merged")
    generators = {}
    for name, adapter in folders.items():
        merge_adapter(shipped_model, adapter, folder / f"{name}.safetensors")
        path = folder / f"{name}.safetensors"
        generators[name] = Generator.from_pretrained(path, quantize="float32")
    return generators


@pytest.fixture(scope="module")
def beside(shipped_model: Path, folders: dict[str, Path]) -> Generator:
    """Both adapters beside float32 weights."""
    generator = Generator.from_pretrained(shipped_model, quantize="float32")
    for name, folder in folders.items():
        generator.add_adapter(name, load_adapter(folder, generator.model))
    return generator


@pytest.mark.parametrize("name", ["poems", "news"])
def test_a_text_is_that_of_the_merged_model(
    name: str, beside: Generator, merged: dict[str, Generator]
) -> None:
    """In float32, where both round alike: the same greedy text, and log-probabilities to 1e-4."""
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "logprobs": True}
    (expected,) = merged[name].complete(PROMPT, **options)
    (found,) = beside.complete(PROMPT, adapter=name, **options)
    (without,) = beside.complete(PROMPT, **options)
    assert found.text == expected.text != without.text
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT * 204], ids=["short", "past the window"])
def test_beams_are_those_of_the_merged_model(
    prompt: str, beside: Generator, merged: dict[str, Generator]
) -> None:
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12}
    found = beside.complete(prompt, adapter="news", **options)
    expected = merged["news"].complete(prompt, **options)
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)


def test_an_adapter_of_the_exported_class_is_the_one_trained_here(
    shipped_model: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    from gpt2ml_torch.finetuning.adapter_export import export_adapter

    export_adapter(shipped_model, folders["poems"], tmp_path / "exported")
    generator = Generator.from_pretrained(shipped_model, quantize="float32")
    for name, folder in (("own", folders["poems"]), ("exported", tmp_path / "exported")):
        generator.add_adapter(name, load_adapter(folder, generator.model))
    own, exported = generator.complete(
        [PROMPT] * 2,
        [generator.defaults.replace(adapter=name, do_sample=False) for name in ("own", "exported")],
        logprobs=True,
    )
    assert own.text == exported.text
    assert own.logprobs == pytest.approx(exported.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 4, "repetition_penalty": 1.2},
        {"max_new_tokens": 40},  # with the long prompt, past the window of 1,024 tokens
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_texts_with_several_adapters_are_what_each_is_alone(
    options: dict[str, Any], generator: Generator
) -> None:
    names = ["poems", None, "news", "poems", None]
    prompts = [PROMPT, PROMPT, PROMPT, PROMPT * 200, "床前明月光"]
    configs = [
        generator.defaults.replace(adapter=name, seed=seed, **({"max_new_tokens": 20} | options))
        for seed, name in enumerate(names)
    ]
    alone = [
        generator.generate(prompt, config)[0]
        for prompt, config in zip(prompts, configs, strict=True)
    ]
    assert generator.generate(prompts, configs) == alone
    assert len(set(alone[:3])) == 3


def test_texts_without_an_adapter_are_those_of_a_generator_without_any(
    generator: Generator, shipped_model: Path
) -> None:
    plain = Generator.from_pretrained(shipped_model, quantize="int8")
    options: dict[str, Any] = {"seed": 3, "max_new_tokens": 40, "num_return_sequences": 3}
    assert generator.generate(PROMPT, **options) == plain.generate(PROMPT, **options)


def test_an_unknown_adapter_is_an_error_that_names_the_known_ones(generator: Generator) -> None:
    with pytest.raises(ValueError, match="adapter is 'prose'; the generator has 'poems', 'news'"):
        generator.generate(PROMPT, adapter="prose")
    with pytest.raises(ValueError, match="there is an adapter 'poems' already"):
        generator.engine.add_adapter("poems", generator.engine.adapters._packed["news"])


def test_a_model_that_is_not_packed_takes_no_adapter(
    shipped_model: Path, folders: dict[str, Path]
) -> None:
    model = GPT2ML.from_pretrained(shipped_model)
    packed = Generator.from_pretrained(shipped_model, quantize="int8")
    plain = Generator(model, packed.tokenizer, pack=False, compile=False)
    adapter = load_adapter(folders["poems"], model)
    with pytest.raises(ValueError, match="this model is not packed, on cpu; merge the adapter"):
        plain.add_adapter("poems", adapter)
    packed.add_adapter("poems", adapter)
    kernels.unpack_model(packed.model)
    with pytest.raises(ValueError, match="no longer packed"):
        packed.generate(PROMPT, adapter="poems")


def test_two_adapters_do_not_share_a_prompt(generator: Generator) -> None:
    """Equal prompts are read once for each adapter."""
    configs = [
        generator.defaults.replace(adapter=name, do_sample=False, max_new_tokens=1)
        for name in ("poems", "news", None)
    ]
    logprobs = [
        completion.logprobs
        for completion in generator.complete([PROMPT] * 3, configs, logprobs=True)
    ]
    assert len({round(values[0], 4) for values in logprobs}) == 3
    assert torch.isfinite(torch.tensor(logprobs)).all()
