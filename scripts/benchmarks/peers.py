"""Other programs that run a model of these dimensions, each by its own fast path.

No other library runs GPT2_ML's block, so the peers run GPT-2 with the same layers, widths and
vocabulary: matrices and cache have the same sizes, and the norms are in other places. Every class
has `prefill(tokens) -> seconds` and `decode(batch, new_tokens) -> seconds`, which excludes the
prompts of 128 tokens. A peer that is not installed raises `ImportError`, and the table says so.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2ml_torch.config import GPT2MLConfig

PROMPT = 128
GGUF_TYPES = {"bfloat16": "BF16", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}


def random_ids(batch: int, tokens: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(200, vocab_size - 200, (batch, tokens))


class TransformersGPT2:
    """`transformers`' GPT2LMHeadModel: eager, or static cache with `torch.compile`."""

    def __init__(
        self,
        config: GPT2MLConfig,
        precision: str,
        folder: Path | None = None,
        *,
        compile: bool,
        device: str = "cpu",
    ) -> None:
        import transformers

        settings = transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_position_embeddings,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_inner=config.intermediate_size,
            bos_token_id=None,
            eos_token_id=None,
        )
        dtype = getattr(torch, precision)
        with torch.device("meta"):
            model: Any = transformers.GPT2LMHeadModel(settings)
        self.model = model.to(dtype).to_empty(device=device).eval()
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        self.vocab_size = config.vocab_size
        self.compile = compile

    def _generate(self, batch: int, tokens: int, new_tokens: int) -> float:
        ids = torch.from_numpy(random_ids(batch, tokens, self.vocab_size)).to(self.model.device)
        options: dict[str, Any] = {}
        if self.compile:
            options["cache_implementation"] = "static"
        started = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=5,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                disable_compile=not self.compile,
                **options,
            ).cpu()  # waits for a GPU
        return time.perf_counter() - started

    def prefill(self, tokens: int) -> float:
        return self._generate(1, tokens, 1)

    def decode(self, batch: int, new_tokens: int) -> float:
        return self._generate(batch, PROMPT, new_tokens + 1) - self._generate(batch, PROMPT, 1)


class LlamaCpp:
    """llama.cpp by the C API that llama-cpp-python binds; a batch has one token of every row."""

    def __init__(self, config: GPT2MLConfig, precision: str, folder: Path) -> None:
        import llama_cpp

        path = folder / f"{GGUF_TYPES[precision]}.gguf"
        if not path.exists():
            write_gguf(path, config, GGUF_TYPES[precision])
        self.api, self.vocab_size = llama_cpp, config.vocab_size
        llama_cpp.llama_backend_init()
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        model_options = llama_cpp.llama_model_default_params()
        model_options.use_mmap = False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_options)
        self.contexts: dict[int, Any] = {}

    def _context(self, rows: int) -> Any:
        """An empty context for `rows` rows, with room for the longest prompt or the texts."""
        if rows not in self.contexts:
            options = self.api.llama_context_default_params()
            options.n_ctx, options.n_seq_max = (1024 if rows == 1 else rows * 256), rows
            options.n_batch = options.n_ubatch = 1024
            options.n_threads = options.n_threads_batch = torch.get_num_threads()
            self.contexts[rows] = self.api.llama_init_from_model(self.model, options)
        context = self.contexts[rows]
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        return context

    def _feed(self, context: Any, ids: np.ndarray, start: int) -> None:
        """Decode `ids`, (batch, tokens), from position `start` on; logits of the last ones."""
        rows, tokens = ids.shape
        batch = self.api.llama_batch_init(ids.size, 0, 1)
        batch.n_tokens = ids.size
        for place, ((row, column), token) in enumerate(np.ndenumerate(ids)):
            batch.token[place], batch.pos[place] = int(token), start + column
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
            batch.logits[place] = column == tokens - 1
        if self.api.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed for {rows} x {tokens} tokens")
        self.api.llama_synchronize(context)
        self.api.llama_batch_free(batch)

    def prefill(self, tokens: int) -> float:
        context = self._context(1)
        ids = random_ids(1, tokens, self.vocab_size)
        started = time.perf_counter()
        self._feed(context, ids, 0)
        return time.perf_counter() - started

    def decode(self, batch: int, new_tokens: int) -> float:
        context = self._context(batch)
        self._feed(context, random_ids(1, PROMPT, self.vocab_size), 0)
        memory = self.api.llama_get_memory(context)
        for row in range(1, batch):
            self.api.llama_memory_seq_cp(memory, 0, row, -1, -1)
        steps = random_ids(batch, new_tokens, self.vocab_size)
        started = time.perf_counter()
        for step in range(new_tokens):
            self._feed(context, steps[:, step : step + 1], PROMPT + step)
        return time.perf_counter() - started


def write_gguf(path: Path, config: GPT2MLConfig, kind: str) -> None:
    """Write a GPT-2 of these dimensions with random weights, quantised by the `gguf` package."""
    import gguf

    writer = gguf.GGUFWriter(path, "gpt2")
    _add_metadata(writer, config, kind)
    quantisation = getattr(gguf.GGMLQuantizationType, kind)
    for name, values in _gguf_tensors(config, lambda m: gguf.quants.quantize(m, quantisation)):
        quantised = values.dtype != np.float32
        writer.add_tensor(name, values, raw_dtype=quantisation if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: Any, config: GPT2MLConfig, kind: str) -> None:
    """Add the sizes, and a tokenizer without merges, which llama.cpp requires."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_file_type({"BF16": 32, "F16": 1, "Q8_0": 7, "Q4_0": 2}[kind])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{index}".encode() for index in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _gguf_tensors(
    config: GPT2MLConfig, quantise: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors by their names in the format; matrices except the positions are quantised."""
    random = np.random.default_rng(0)
    width, mlp = config.hidden_size, config.intermediate_size
    made: dict[tuple[int, int], np.ndarray] = {}  # one matrix of each shape serves all layers

    def matrix(rows: int, columns: int) -> np.ndarray:
        if (rows, columns) not in made:
            values = random.standard_normal((rows, columns), dtype=np.float32) * 0.02
            made[rows, columns] = quantise(values)
        return made[rows, columns].copy()

    def norm(name: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{name}.weight", np.ones(width, np.float32)
        yield f"{name}.bias", np.zeros(width, np.float32)

    yield "token_embd.weight", matrix(config.vocab_size, width)
    positions = random.standard_normal((config.max_position_embeddings, width), dtype=np.float32)
    yield "position_embd.weight", positions * np.float32(0.02)
    yield from norm("output_norm")
    shapes = {
        "attn_qkv": (3 * width, width),
        "attn_output": (width, width),
        "ffn_up": (mlp, width),
        "ffn_down": (width, mlp),
    }
    for layer in range(config.num_hidden_layers):
        for name, (outputs, inputs) in shapes.items():
            yield f"blk.{layer}.{name}.weight", matrix(outputs, inputs)
            yield f"blk.{layer}.{name}.bias", np.zeros(outputs, np.float32)
        for name in ("attn_norm", "ffn_norm"):
            yield from norm(f"blk.{layer}.{name}")


class CTranslate2:
    """CTranslate2's Generator, converted from a `transformers` GPT-2."""

    def __init__(self, config: GPT2MLConfig, precision: str, folder: Path) -> None:
        import ctranslate2

        path = folder / f"ct2-{precision}"
        if not (path / "model.bin").exists():
            self._convert(config, precision, path)
        self.generator = ctranslate2.Generator(
            str(path), device="cpu", intra_threads=torch.get_num_threads(), inter_threads=1
        )
        self.vocab_size = config.vocab_size

    def _convert(self, config: GPT2MLConfig, precision: str, path: Path) -> None:
        from ctranslate2.specs import common_spec, transformer_spec

        spec = transformer_spec.TransformerDecoderModelSpec.from_config(
            config.num_hidden_layers,
            config.num_attention_heads,
            pre_norm=True,
            activation=common_spec.Activation.GELUTanh,
        )
        random = np.random.default_rng(0)
        width, mlp = config.hidden_size, config.intermediate_size

        def matrix(rows: int, columns: int) -> np.ndarray:
            return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)

        def linear(target: Any, outputs: int, inputs: int) -> None:
            target.weight, target.bias = matrix(outputs, inputs), np.zeros(outputs, np.float32)

        def norm(target: Any) -> None:
            target.gamma, target.beta = np.ones(width, np.float32), np.zeros(width, np.float32)

        decoder = spec.decoder
        decoder.scale_embeddings = False
        decoder.embeddings.weight = matrix(config.vocab_size, width)
        decoder.position_encodings.encodings = matrix(config.max_position_embeddings, width)
        decoder.projection.weight = decoder.embeddings.weight
        norm(decoder.layer_norm)
        for layer in decoder.layer:
            norm(layer.self_attention.layer_norm)
            linear(layer.self_attention.linear[0], 3 * width, width)
            linear(layer.self_attention.linear[1], width, width)
            norm(layer.ffn.layer_norm)
            linear(layer.ffn.linear_0, mlp, width)
            linear(layer.ffn.linear_1, width, mlp)
        spec.register_vocabulary([f"t{index}" for index in range(config.vocab_size)])
        spec.config.unk_token = "t0"
        spec.config.bos_token = spec.config.eos_token = "t1"
        spec.validate()
        spec.optimize(quantization=precision)
        path.mkdir(exist_ok=True)
        spec.save(str(path))

    def _generate(self, batch: int, tokens: int, new_tokens: int) -> float:
        ids = random_ids(batch, tokens, self.vocab_size)
        prompts = [[f"t{token}" for token in row] for row in ids]
        started = time.perf_counter()
        self.generator.generate_batch(
            prompts,
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=5,
            include_prompt_in_result=False,
            cache_static_prompt=False,
        )
        return time.perf_counter() - started

    def prefill(self, tokens: int) -> float:
        return self._generate(1, tokens, 1)

    def decode(self, batch: int, new_tokens: int) -> float:
        return self._generate(batch, PROMPT, new_tokens + 1) - self._generate(batch, PROMPT, 1)
