"""Several LoRA adapters over one model: each request gets the one that its `model` names."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from gpt2ml_torch import Generator, kernels
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.finetuning import load_adapter
from gpt2ml_torch.serving import Scheduler
from tests.helpers.server import PROMPT, ServerProcess, ask, complete
from tests.serving.test_scheduler import PROMPTS, options_of

pytestmark = [
    pytest.mark.skipif(not kernels.load_kernels(), reason="no compiler or no AVX2"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def adapted(shipped_model: Path, adapter_folders: dict[str, Path]) -> Generator:
    generator = Generator.from_pretrained(shipped_model, batch_size=4)
    for name, folder in adapter_folders.items():
        generator.add_adapter(name, load_adapter(folder, generator.model))
    return generator


def test_requests_with_random_adapters_write_what_each_writes_alone(adapted: Generator) -> None:
    """Equal prompts too, which must share nothing where their adapters differ."""
    draw = random.Random(11)
    requests = [
        (
            draw.choice(PROMPTS) * draw.choice((1, 1, 12)),
            {**options_of(draw), "adapter": draw.choice((None, "poems", "news"))},
        )
        for _ in range(60)
    ]
    alone = [adapted.generate(p, return_full_text=False, **options)[0] for p, options in requests]
    with Scheduler(adapted, max_rows=5, max_queue=100, prefix_tokens=500) as scheduler:
        handles = []
        for number, (prompt, options) in enumerate(requests):
            handles.append(scheduler.submit(prompt, **options))
            if number % 9 == 4:
                scheduler.submit(prompt, max_new_tokens=500, adapter="news").cancel()
            time.sleep(draw.choice((0, 0, 0.002, 0.01)))
        assert [handle.result(60) for handle in handles] == alone
    assert any(handle.cached_tokens for handle in handles)


def test_an_adapter_may_be_added_while_texts_are_written(
    shipped_model: Path, adapter_folders: dict[str, Path], adapted: Generator
) -> None:
    generator = Generator.from_pretrained(shipped_model)
    options: dict[str, Any] = {"max_new_tokens": 60, "seed": 1}
    with Scheduler(generator, max_rows=3) as scheduler:
        running = []
        for name in (None, "poems", "news"):
            if name is not None:
                folder = adapter_folders[name]
                generator.add_adapter(name, load_adapter(folder, generator.model))
            running.append(scheduler.submit(PROMPT, adapter=name, **options))
        found = [handle.result(60) for handle in running]
    assert found == [
        adapted.generate(PROMPT, adapter=name, return_full_text=False, **options)[0]
        for name in (None, "poems", "news")
    ]


def test_the_model_of_a_request_chooses_the_adapter(
    adapted_server: ServerProcess, adapted: Generator
) -> None:
    body = {"max_tokens": 16, "seed": 4, "top_k": 5}
    for name, adapter in (("demo", None), ("poems", "poems"), ("news", "news")):
        answer = complete(adapted_server, **body, model=name)
        assert answer["model"] == name
        (expected,) = adapted.generate(
            PROMPT,
            adapter=adapter,
            max_new_tokens=16,
            seed=4,
            top_k=5,
            return_full_text=False,
        )
        assert answer["choices"][0]["text"] == expected


def test_adapters_are_listed_beside_the_model(adapted_server: ServerProcess) -> None:
    _, listed, _ = ask(adapted_server, "/v1/models")
    assert [(model["id"], model.get("parent")) for model in listed["data"]] == [
        ("demo", None),
        ("poems", "demo"),
        ("news", "demo"),
    ]
    assert ask(adapted_server, "/v1/models/news")[1]["id"] == "news"
    body = {"prompt": PROMPT, "model": "prose"}
    status, answer, _ = ask(adapted_server, "/v1/completions", body)
    assert status == 404
    assert "'demo', 'poems', 'news'" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["poems"], "--adapter is 'poems'; expected NAME=FOLDER"),
        (["=folder"], "--adapter is '=folder'; expected NAME=FOLDER"),
        (["a=FOLDER", "a=FOLDER"], "--adapter gives the name 'a' twice"),
        (["demo=FOLDER"], "--adapter gives the name 'demo' twice, or the model's"),
        (["a=MISSING"], "is no adapter: expected a folder with adapter_config.json"),
    ],
)
def test_a_wrong_adapter_is_one_line_before_the_model_is_loaded(
    adapters: list[str],
    message: str,
    shipped_model: Path,
    adapter_folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [adapter.replace("FOLDER", str(adapter_folders["poems"])) for adapter in adapters]
    words = [word for adapter in given for word in ("--adapter", adapter)]
    assert main(["serve", str(shipped_model), "--port", "0", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "loaded" not in error


def test_generate_writes_with_an_adapter(
    shipped_model: Path,
    adapter_folders: dict[str, Path],
    adapted: Generator,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--adapter", str(adapter_folders["poems"]), "--seed", "4", "--max-new-tokens", "16"]
    assert main(["generate", str(shipped_model), PROMPT, *words]) == 0
    (expected,) = adapted.generate(PROMPT, adapter="poems", seed=4, max_new_tokens=16)
    assert capsys.readouterr().out.strip() == expected.strip()
