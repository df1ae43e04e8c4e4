"""TensorFlow checkpoints that are missing, damaged or of something else."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import checkpoint_factory as factory
from tests.helpers.damages import DATA, INDEX, PREFIX, case, flip, rewrite, truncate


@case("does not exist")
def source_does_not_exist(folder: Path) -> list[str]:
    return [str(folder / "nowhere")]


@case("no checkpoint")
def folder_is_empty(folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    return [str(folder / "empty")]


@case(r"vocab.txt is text \(.*\), not a checkpoint: give the folder")
def source_is_a_text_file(folder: Path) -> list[str]:
    return [str(folder / "vocab.txt")]


@case("neither a file nor a folder")
def source_is_a_pipe(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe")
    return [str(folder / "pipe")]


@case("a converted safetensors file already: `gpt2ml generate` takes it")
def source_is_converted_already(folder: Path) -> list[str]:
    header = b'{"__metadata__":{"gpt2ml_format":"1"}}'
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return [str(folder / "x.safetensors")]


@case(f"{INDEX} is missing")
def index_is_missing(folder: Path) -> None:
    (folder / INDEX).unlink()


@case(f"{INDEX} is missing")
def index_is_missing_beside_the_data_file(folder: Path) -> list[str]:
    (folder / INDEX).unlink()
    return [str(folder / DATA)]


@case(f"{PREFIX}.index is missing")
def index_is_missing_for_the_prefix(folder: Path) -> list[str]:
    (folder / INDEX).unlink()
    return [str(folder / PREFIX)]


@case(rf"{DATA} is missing; the index expects [\d,]+ bytes of data, \d+ entries")
def data_is_missing(folder: Path) -> None:
    (folder / DATA).unlink()


@case(r"truncated: found [\d,]+ bytes, the index expects [\d,]+")
def data_is_truncated(folder: Path) -> None:
    truncate(folder / DATA, 1000)


@case("truncated: found 0 bytes")
def data_is_empty(folder: Path) -> None:
    truncate(folder / DATA, 0)


@case("'newslm/embeddings/LayerNorm_embed_norm/beta' .* is damaged")
def data_has_a_flipped_bit(folder: Path) -> None:
    flip(folder / DATA, 8 + 5)


@case("is damaged")
def data_is_of_another_checkpoint(folder: Path) -> None:
    size = (folder / DATA).stat().st_size
    (folder / DATA).write_bytes(np.random.default_rng(1).bytes(size))


@case("is empty, not a checkpoint: fetch it again")
def index_is_empty(folder: Path) -> None:
    truncate(folder / INDEX, 0)


@case("damaged or no TensorFlow checkpoint")
def index_is_truncated(folder: Path) -> None:
    truncate(folder / INDEX, 500)


@case("damaged or no TensorFlow checkpoint")
def index_is_garbage(folder: Path) -> None:
    (folder / INDEX).write_bytes(np.random.default_rng(1).bytes(5000))


@case("damaged or no TensorFlow checkpoint")
def index_has_a_flipped_bit(folder: Path) -> None:
    flip(folder / INDEX, 100)


@case(f"{INDEX} is a web page, not a checkpoint: .*; fetch it again")
def index_is_a_web_page(folder: Path) -> None:
    (folder / INDEX).write_text("<html>404 Not Found</html>\n" * 100)


@case(f"{DATA} is missing; found {PREFIX}.data-00000-of-00002, of another number of shards")
def data_file_is_of_another_count(folder: Path) -> None:
    (folder / DATA).rename(folder / f"{PREFIX}.data-00000-of-00002")


@case(f"{PREFIX}.data-00001-of-00002 is missing; the index expects")
def a_shard_is_missing(folder: Path) -> None:
    factory.write_shards(folder, factory.with_slots(factory.tf_weights()))
    (folder / f"{PREFIX}.data-00001-of-00002").unlink()


def second_checkpoint(folder: Path) -> None:
    for name in (DATA, INDEX):
        shutil.copy(folder / name, folder / name.replace("-70.", "-80."))


@case("several checkpoints in .*: model.ckpt-70, model.ckpt-80, and no file")
def several_checkpoints(folder: Path) -> None:
    second_checkpoint(folder)


@case("several checkpoints in .*names model.ckpt-90, which is not there")
def several_checkpoints_and_the_state_file_names_another(folder: Path) -> None:
    second_checkpoint(folder)
    (folder / "checkpoint").write_text('model_checkpoint_path: "/home/x/model.ckpt-90"\n')


# The tensors.


@case("unknown tensor 'newslm/layer00/query_layer/kernle'")
def an_unknown_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/layer00/query_layer/kernle": np.zeros(3)}))


@case("unknown tensor 'newslm/other/adafactor_v'")
def a_slot_of_an_unknown_weight(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/other/adafactor_v": np.zeros(3)}))


@case("unknown tensor 'newslm/layer1/output/bias'")
def a_layer_number_of_one_digit(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/layer1/output/bias": np.zeros(3)}))


@case("missing tensor 'newslm/layer01/key_layer/bias'")
def a_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("newslm/layer01/key_layer/bias"))


@case("layer 1 is missing altogether")
def a_missing_layer(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "layer01" in name]:
            del tensors[name]

    rewrite(folder, change)


@case("layer 42 is missing altogether|num_hidden_layers 3 against 9000")
def a_layer_far_out(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/layer8999/output/bias": np.zeros(3)}))


@case(r"'newslm/layer02/output/kernel' has shape \(64, 288\), expected \(288, 64\)")
def a_transposed_kernel(folder: Path) -> None:
    name = "newslm/layer02/output/kernel"
    rewrite(folder, lambda t: t.update({name: t[name].T}))


@case(r"'newslm/layer00/query_layer/bias' has shape \(65,\), expected \(64,\)")
def a_wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/layer00/query_layer/bias": np.zeros(65, "f4")}))


@case("'newslm/layer00/query_layer/bias' holds int64, expected floating point")
def a_weight_of_integers(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/layer00/query_layer/bias": np.zeros(64, "i8")}))


@case("'newslm/layer00/query_layer/bias' holds no numbers")
def a_weight_of_strings(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/layer00/query_layer/bias": np.array([b"x"] * 64)}))


@case("'.*word_embed' is missing")
def no_embedding(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("newslm/embeddings/word_embed"))


@case("'.*word_embed' has shape")
def an_embedding_of_one_dimension(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/embeddings/word_embed": np.zeros(5, "f4")}))


@case(
    "unknown tensor 'x'; 'newslm/layer00/output/bias' holds int64, expected floating point; "
    r"'newslm/layer02/output/kernel' has shape \(288, 65\), expected \(288, 64\); "
    "layer 1 is missing altogether .*; missing tensor 'newslm/layer00/key_layer/bias'"
)
def faults_of_every_kind(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["x"] = np.zeros(3)
        tensors["newslm/layer00/output/bias"] = np.zeros(64, "i8")
        tensors["newslm/layer02/output/kernel"] = np.zeros((288, 65), "f4")
        del tensors["newslm/layer00/key_layer/bias"]
        for name in [name for name in tensors if "layer01" in name]:
            del tensors[name]

    rewrite(folder, change)


@case("no layers")
def no_layers(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "newslm/layer" in name]:
            del tensors[name]

    rewrite(folder, change)


@case("'.*word_embed' is missing; unknown tensor 'bert/")
def another_model(folder: Path) -> None:
    factory.write_tf(folder, {"bert/embeddings/word_embeddings": np.zeros((5, 4), "f4")})


@case("'blocks.1.mlp.up.bias' has values like 70000, beyond the largest of float16, 65504")
def float16_overflows(folder: Path) -> list[str]:
    def change(tensors: dict[str, Any]) -> None:
        tensors["newslm/layer01/intermediate/bias"][3] = 70000

    rewrite(folder, change)
    return [str(folder), "--dtype", "float16"]
