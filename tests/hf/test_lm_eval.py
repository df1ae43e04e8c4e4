"""EleutherAI's harness on an exported folder, with tasks of local files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gpt2ml_torch import GPT2ML, Tokenizer
from gpt2ml_torch.generation.scoring import token_logprobs

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval (extra [hf-programs]) is missing")

TEXT = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
CHOICE = """\
task: poem_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
target_delimiter: ""
"""
ROLLING = """\
task: poem_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


def test_the_harness_runs_without_further_options(
    exported: Path, ours: GPT2ML, our_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    row = {"start": "春眠不觉晓，", "good": "处处闻啼鸟。", "bad": "，，，，，，", "text": TEXT}
    data = tmp_path / "data.json"
    data.write_text(json.dumps(row) + "\n")
    (tmp_path / "choice.yaml").write_text(CHOICE.format(data=data))
    (tmp_path / "rolling.yaml").write_text(ROLLING.format(data=data))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(exported), "trust_remote_code": True},
        tasks=["poem_choice", "poem_rolling"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    assert results["poem_choice"]["acc,none"] == 1.0
    # The harness predicts the first token too, from the end token.
    ids = [our_tokenizer.token_to_id("[SEP]") or 0, *our_tokenizer.encode(TEXT)]
    expected = -math.fsum(token_logprobs(ours, [ids], batch_size=1)[0])  # the text is one word
    found = math.log(results["poem_rolling"]["word_perplexity,none"])
    assert found == pytest.approx(expected, rel=1e-4)
