"""Training the exported model with the programs that people train with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers (extra [hf]) is missing")

POEMS = [
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。",
] * 4
STEPS = 3


def _options(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": len(POEMS),
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 0,
        "bf16": False,
        **options,
    }


def _losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_lowers_the_loss(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate (extra [hf]) is missing")
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**_options(tmp_path)),
        train_dataset=[tokenizer(poem) for poem in POEMS],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    losses = _losses(trainer)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["full", "lora", "packing"])
def test_trl_trains_a_folder_without_further_options(
    exported: Path, tmp_path: Path, kind: str
) -> None:
    trl = pytest.importorskip("trl", reason="TRL (extra [hf-programs]) is missing")
    peft = pytest.importorskip("peft", reason="peft (extra [hf]) is missing")
    datasets = pytest.importorskip("datasets", reason="datasets (extra [hf-programs]) is missing")
    arguments = trl.SFTConfig(
        **_options(tmp_path, packing=kind == "packing", max_length=64), trust_remote_code=True
    )
    trainer = trl.SFTTrainer(
        model=str(exported),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": POEMS}),
        peft_config=peft.LoraConfig() if kind == "lora" else None,
    )
    ids = trainer.train_dataset[0]["input_ids"]
    assert set(ids).isdisjoint({0, 100, 101, 102, 103})  # no end token, and not its letters
    trainer.train()
    losses = _losses(trainer)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "down_proj"]], ids=str)
def test_peft_adapts_with_and_without_target_modules(model: Any, targets: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft (extra [hf]) is missing")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    named = {name for name, _ in adapted.named_modules() if name.endswith("lora_A")}
    kinds = {name.rpartition(".")[0].rpartition(".")[2] for name in named}
    wanted = {
        "None": {"q_proj", "v_proj"},
        "all-linear": {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"},
    }
    assert kinds == wanted.get(str(targets), set(targets or ()))
    loss = adapted(torch.tensor([[219, 758, 207]]), labels=torch.tensor([[219, 758, 207]])).loss
    loss.backward()


def test_accelerate_places_and_empties_the_model(exported: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate (extra [hf]) is missing")
    placed = transformers.AutoModelForCausalLM.from_pretrained(
        exported, trust_remote_code=True, device_map="auto"
    )
    assert placed(torch.tensor([[219]])).logits.shape == (1, 1, 4608)
    config = transformers.AutoConfig.from_pretrained(exported, trust_remote_code=True)
    with accelerate.init_empty_weights():
        empty = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


def test_a_saved_model_loads_elsewhere_with_its_code(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "saved", max_shard_size="2MB")
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    assert (folder / "modeling_gpt2ml.py").is_file()
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = transformers.AutoTokenizer.from_pretrained(folder)("春眠[MASK]", return_tensors="pt")
    assert torch.equal(ids["input_ids"], tokenizer("春眠[MASK]", return_tensors="pt")["input_ids"])
    with torch.inference_mode():
        assert torch.equal(again(**ids).logits, model(**ids).logits)
    assert again.generation_config.suppress_tokens == model.generation_config.suppress_tokens
