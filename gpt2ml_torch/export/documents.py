"""The small files of an exported folder: JSON, Python code and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.export.names import DEFAULTS_KEY, LINES_KEY, MODEL_TYPE, SOURCE_KEY
from gpt2ml_torch.export.tokenizer_json import (
    END_TOKEN,
    special_tokens,
    tokenizer_json,
    unreadable_lines,
)
from gpt2ml_torch.tokenizer import Tokenizer

CODE_FILES = ("configuration_gpt2ml.py", "modeling_gpt2ml.py")

_AUTO_MAP = {
    "AutoConfig": "configuration_gpt2ml.GPT2MLConfig",
    "AutoModel": "modeling_gpt2ml.GPT2MLModel",
    "AutoModelForCausalLM": "modeling_gpt2ml.GPT2MLForCausalLM",
}
# Defaults for generation that have the same name and meaning in transformers' `generate`.
_SHARED_DEFAULTS = (
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("typical_p", "num_beams", "repetition_penalty", "no_repeat_ngram_size"),
)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def to_json(value: Mapping[str, Any]) -> str:
    """Indented JSON text with a final newline."""
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def config_json(
    config: GPT2MLConfig,
    *,
    dtype: str,
    code: bool,
    source: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of config.json, with the source and generation defaults for converting back."""
    return {
        "architectures": ["GPT2MLForCausalLM"],
        **({"auto_map": _AUTO_MAP} if code else {}),
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        **config.to_dict(),
        "mlp_initializer_range": config.mlp_initializer_range,
        "layer_norm_eps": config.layer_norm_eps,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        SOURCE_KEY: dict(source),
        DEFAULTS_KEY: dict(defaults),
    }


def generation_config_json(
    config: GPT2MLConfig, tokenizer: Tokenizer | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of generation_config.json: banned ids, and the defaults that `generate` knows.

    Without a tokenizer it is not known which ids lie outside the vocabulary; they aren't banned.
    """
    values = {name: defaults[name] for name in _SHARED_DEFAULTS if name in defaults}
    if any(name in values for name in _SAMPLING):
        values.setdefault("do_sample", True)
    if values.get("do_sample") is False or values.get("temperature") == 0:
        values = {name: value for name, value in values.items() if name not in _SAMPLING}
        values["do_sample"] = False
    ends = list(defaults.get("eos_token_id", ()))
    if ends:
        values["eos_token_id"] = ends
    banned = () if tokenizer is None else tokenizer.banned_ids
    suppressed = sorted({*banned, *defaults.get("suppress_tokens", ())} - set(ends))
    if suppressed:
        values["suppress_tokens"] = suppressed
    return {"_from_model_config": False, "pad_token_id": config.pad_token_id, **values}


def tokenizer_files(tokenizer: Tokenizer, config: GPT2MLConfig) -> dict[str, str]:
    """The texts of tokenizer.json and tokenizer_config.json, by name."""
    has_end = END_TOKEN in special_tokens(tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        # Other programs require an end token. It is given here and not in the model's
        # configuration, because the model was trained without one.
        **({"eos_token": END_TOKEN} if has_end else {}),
        "split_special_tokens": True,  # "[MASK]" in a text is text
        "clean_up_tokenization_spaces": False,
        LINES_KEY: unreadable_lines(tokenizer),
    }
    content = json.dumps(tokenizer_json(tokenizer), ensure_ascii=False) + "\n"
    return {"tokenizer.json": content, "tokenizer_config.json": to_json(settings)}


def code_files() -> dict[str, str]:
    """The texts of the classes for transformers, which import nothing else from this package."""
    folder = Path(__file__).resolve().parent.parent / "hf"
    return {name: (folder / name).read_text(encoding="utf-8") for name in CODE_FILES}


def model_card(config: GPT2MLConfig, *, dtype: str, code: bool, source: Mapping[str, Any]) -> str:
    """The text of README.md: an example, sizes, source and licence."""
    origin = "\n".join(f"| {name} | {value} |" for name, value in source.items()) or "| unknown | |"
    needs = "" if code else "import gpt2ml_torch.hf  # registers the model's classes\n"
    trust = ", trust_remote_code=True" if code else ""
    return _CARD.format(
        parameters=f"{config.num_parameters:,}",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        mlp=config.intermediate_size,
        positions=config.max_position_embeddings,
        tokens=f"{config.vocab_size:,}",
        dtype=dtype,
        origin=origin,
        needs=needs,
        trust=trust,
    )


_CARD = """\
---
language: zh
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2-ml, chinese]
---

# GPT2_ML

A Chinese language model of the architecture of [GPT2_ML](https://github.com/imcaspar/gpt2-ml),
exported by gpt2ml-torch. The block is Grover's, which is neither OpenAI's GPT-2 nor BERT.

```python
{needs}from transformers import pipeline

write = pipeline("text-generation", "PATH/OF/THIS/FOLDER"{trust})
print(write("今天天气不错", max_new_tokens=64, do_sample=True, top_k=5)[0]["generated_text"])
```

| | |
|---|---|
| parameters | {parameters} in {dtype} |
| sizes | {layers} layers, width {width}, {heads} heads, MLP {mlp}, {positions} positions, \
{tokens} token ids |

The model was trained without begin and end tokens: a text ends by its length or at a stop string
such as 。.
[PAD], [UNK] and the other special tokens are never written (`suppress_tokens` in
generation_config.json). Texts longer than {positions} tokens need gpt2ml-torch's `Generator`, whose
window slides. gpt2ml-torch's `gpt2ml convert` turns this folder, also after further training, back
into its own file.

## Source

| | |
|---|---|
{origin}

## Licence

Apache License 2.0, like the original model and code (imcaspar/gpt2-ml). The model was trained on
texts from the Chinese web and reproduces their errors and bias.
"""
