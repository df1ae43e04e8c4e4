"""The compiled engine: the eager one's tokens, nothing compiled again, and the fallback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from gpt2ml_torch import GPT2ML, Generator, Tokenizer, kernels
from gpt2ml_torch.generation import engine
from tests.helpers.tiny import tiny_model, tiny_tokenizer

needs_compiler = pytest.mark.skipif(
    engine.why_no_compiler() is not None, reason=str(engine.why_no_compiler())
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=["plain", "float32", "int8"])
def model(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> GPT2ML:
    """Plain, or packed on a machine without kernels: those are not compiled."""
    model = tiny_model(tokenizer, positions=400)
    if request.param != "plain":
        kernels.pack_model(model, request.param)
        for module in model.modules():
            if isinstance(module, kernels.PackedLinear | kernels.PackedEmbedding):
                module.has_kernel = False
    return model


@pytest.fixture(scope="module")
def eager(model: GPT2ML, tokenizer: Tokenizer) -> Generator:
    return Generator(model, tokenizer, compile=False, pack=False)


@pytest.fixture(scope="module")
def compiled(model: GPT2ML, tokenizer: Tokenizer) -> Generator:
    """Warmed up for texts of up to 32 tokens, in batches of 1, 2 and 4 rows."""
    generator = Generator(model, tokenizer, compile=True, pack=False)
    for rows in (1, 2, 4):
        generator.engine.warm_up(rows=rows, tokens=32)
    assert generator.engine.compiled
    return generator


@pytest.fixture
def no_recompilation() -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@needs_compiler
@pytest.mark.usefixtures("no_recompilation")
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 110},
        {"top_k": 3, "temperature": 0.7, "seed": 5},
        {"top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 6},
        {"do_sample": False, "no_repeat_ngram_size": 3},
        {"stop": ["。"], "min_new_tokens": 3, "bad_words": ["眠"]},
        {"num_return_sequences": 2, "top_k": 4},
    ],
)
def test_compiled_text_is_eager_text_and_nothing_is_compiled_anew(
    compiled: Generator, eager: Generator, options: dict[str, Any]
) -> None:
    sizes = set(compiled.engine._steps)
    options = {"seed": 1, "max_new_tokens": 30, **options}
    for prompts in ("今天天气不错", ["双", "春眠不觉晓，处处闻啼鸟。花落知多少。"]):
        assert compiled.generate(prompts, **options) == eager.generate(prompts, **options)
    assert compiled.engine.compiled
    assert set(compiled.engine._steps) == sizes


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.2},
        {"presence_penalty": 0.5, "min_new_tokens": 9, "eos_token_id": [104], "forced_start": "双"},
    ],
    ids=str,
)
def test_a_step_that_chooses_the_next_tokens_is_one_graph(
    tokenizer: Tokenizer, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: nothing in it depends on a value, so other values need no other graph.

    Only traced, since the compiler's C++ for 64-bit integers, which no step on the CPU has, writes
    past the end of sizes that don't fill a vector (PyTorch 2.13).
    """
    compile = torch.compile

    def trace(function: Any, *, fullgraph: bool, dynamic: bool, options: Any) -> Any:
        return compile(function, fullgraph=fullgraph, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", trace)
    model = tiny_model(tokenizer, positions=400)
    eager = Generator(model, tokenizer, compile=False, pack=False)
    generator = Generator(model, tokenizer, compile=True, pack=False)
    generator.engine.on_cuda = True
    prompts = ["今天天气不错", "双"]
    generator.generate(prompts, seed=1, max_new_tokens=30, **options)
    steps = set(generator.engine._steps)
    assert any(engine.decode_and_choose in key for key in steps)
    assert not any(engine.decode in key for key in steps)
    others = {"seed": 2, "max_new_tokens": 24, **options, "temperature": 0.8}
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = generator.generate(prompts, **others)
    assert found == eager.generate(prompts, **others)
    assert set(generator.engine._steps) == steps
    assert generator.engine.compiled


@needs_compiler
def test_an_assistant_compiles_each_size_once(tokenizer: Tokenizer) -> None:
    model, helper = (tiny_model(tokenizer, positions=400, seed=seed) for seed in (0, 1))
    eager = Generator(model, tokenizer, compile=False, pack=False)
    helped = Generator(model, tokenizer, compile=True, assistant=helper, pack=False)
    own = Generator(model, tokenizer, compile=True, assistant=model, pack=False)
    for generator in (helped, own):  # wrong guesses, right guesses
        options: dict[str, Any] = {"max_new_tokens": 24, "top_k": 3}
        generator.generate("今天天气不错", seed=1, **options)
        assert generator.assistant is not None
        engines = generator.engine, generator.assistant
        sizes = [set(engine._steps) for engine in engines]
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = generator.generate("双十一", seed=2, **options)
        assert found == eager.generate("双十一", seed=2, **options)
        assert [set(engine._steps) for engine in engines] == sizes
        assert all(engine.compiled for engine in engines)


@pytest.mark.skipif(not kernels.load_kernels(), reason="the kernels could not be built")
def test_a_model_on_the_kernels_has_nothing_to_compile(tokenizer: Tokenizer) -> None:
    model = kernels.pack_model(tiny_model(tokenizer, positions=400), "int8")
    generator = Generator(model, tokenizer, compile=True)
    with mock.patch.object(torch, "compile") as compiles:
        generator.engine.warm_up()
        generator.generate("今天天气不错", max_new_tokens=5)
    compiles.assert_not_called()


@needs_compiler
def test_each_block_is_a_call_of_a_nested_region(compiled: Generator) -> None:
    """So that the generated code of one layer serves all of them."""
    model = tiny_model(compiled.tokenizer, layers=5)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    used = engine.Engine(model)
    cache = used.new_cache(1, 32)
    step = torch.compile(engine.decode, fullgraph=True, backend=keep)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        step(model, used._plan, zero, zero, cache.keys, cache.values)
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if "invoke_subgraph" in str(node.target)]
    assert len(calls) == 5


def test_without_a_compiler_it_runs_eagerly_and_says_so_once(
    model: GPT2ML,
    tokenizer: Tokenizer,
    eager: Generator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        generator = Generator(model, tokenizer, compile=True, pack=False)
        texts = generator.generate(["今天", "双"], seed=0, max_new_tokens=5)
    assert texts == eager.generate(["今天", "双"], seed=0, max_new_tokens=5)
    assert len(caplog.records) == 1
    assert "uncompiled" in caplog.text
    assert "no-such-compiler" in caplog.text


def test_a_failing_compilation_runs_eagerly_and_says_so_once(
    model: GPT2ML,
    tokenizer: Tokenizer,
    eager: Generator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the backend broke\nin many lines")

    monkeypatch.setattr(engine, "why_no_compiler", lambda: None)
    monkeypatch.setattr(engine.Engine, "_compile", lambda *_, **__: fail)
    with caplog.at_level(logging.WARNING):
        texts = Generator(model, tokenizer, pack=False).generate("今天", seed=0, max_new_tokens=5)
    assert texts == eager.generate("今天", seed=0, max_new_tokens=5)
    assert [record.getMessage() for record in caplog.records] == [
        "generation runs uncompiled: RuntimeError: the backend broke"
    ]


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_writes_what_the_cpu_writes(
    model: GPT2ML, tokenizer: Tokenizer, compile: bool, no_tf32: None
) -> None:
    prompts = ["今天天气不错", "双", "春眠不觉晓"]
    options: dict[str, Any] = {"seed": 3, "max_new_tokens": 40, "top_k": 10, "top_p": 0.9}
    expected = Generator(model, tokenizer, compile=False, pack=False).generate(prompts, **options)
    on_cuda = tiny_model(tokenizer, positions=400).cuda()
    assert Generator(on_cuda, tokenizer, compile=compile).generate(prompts, **options) == expected
    helped = Generator(on_cuda, tokenizer, compile=compile, assistant=on_cuda)
    assert helped.generate(prompts[0], **options) == expected[:1]
