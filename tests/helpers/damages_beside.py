"""What lies beside a checkpoint, or was typed, and does not belong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.helpers import checkpoint_factory as factory
from tests.helpers.damages import case, configure


@case("config.json is not JSON")
def config_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{hidden_size: 64}")


@case("config.json is not JSON")
def config_is_nested_without_end(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


@case("config.json is not JSON")
def config_is_binary(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00" * 50)


@case("not a JSON object")
def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


@case("too large for a configuration")
def config_is_huge(folder: Path) -> None:
    (folder / "config.json").write_text(" " * (2 << 20) + "{}")


@case("not a configuration of this model")
def config_is_of_something_else(folder: Path) -> None:
    (folder / "config.json").write_text('{"name": "x"}')


@case("contradicts the checkpoint: hidden_size 65 against 64")
def config_contradicts_the_width(folder: Path) -> None:
    configure(folder, hidden_size=65)


@case("num_hidden_layers 48 against 3 in the tensors, intermediate_size 7 against 288")
def config_contradicts_two_sizes(folder: Path) -> None:
    configure(folder, num_hidden_layers=48, intermediate_size=7)


@case("hidden_size 64 is not divisible by num_attention_heads 5")
def config_heads_do_not_divide(folder: Path) -> None:
    configure(folder, num_attention_heads=5)


@case("num_attention_heads is '4'; expected a whole number")
def config_has_a_string(folder: Path) -> None:
    configure(folder, num_attention_heads="4")


@case("hidden_dropout_prob is")
def config_has_an_impossible_probability(folder: Path) -> None:
    configure(folder, hidden_dropout_prob=float("nan"))


@case("contradicts itself: hidden_size 64, n_embd 128")
def config_dialects_disagree(folder: Path) -> None:
    configure(folder, n_embd=128)


@case("several configurations in")
def several_configs(folder: Path) -> None:
    (folder / "config.json").rename(folder / "a.json")
    shutil.copy(folder / "a.json", folder / "b.json")


@case("config.json is not a regular file")
def given_config_is_a_pipe(folder: Path) -> list[str]:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return [str(folder), "--config", str(folder / "config.json")]


@case("nowhere.json")
def given_config_does_not_exist(folder: Path) -> list[str]:
    return [str(folder), "--config", str(folder / "nowhere.json")]


# The vocabulary.


@case("no vocabulary .* needs one of 45 lines")
def vocabulary_is_missing(folder: Path) -> None:
    (folder / "vocab.txt").unlink()


@case("has 44 lines; the checkpoint needs one of 45 lines")
def vocabulary_is_short(folder: Path) -> None:
    (folder / "vocab.txt").write_text("".join(f"{i}\n" for i in range(44)))


@case("has 46 lines; the checkpoint needs one of 45 lines")
def vocabulary_is_long(folder: Path) -> None:
    (folder / "vocab.txt").write_text(factory.VOCAB + "x")


@case("has 0 lines")
def vocabulary_is_empty(folder: Path) -> None:
    (folder / "vocab.txt").write_text("")


@case("vocab.txt, line 2: not UTF-8")
def vocabulary_is_in_another_encoding(folder: Path) -> None:
    (folder / "vocab.txt").write_bytes("[PAD]\n今天\n".encode("gb18030") * 20)


@case("several vocabularies fit: a-vocab.txt, b-vocab.txt")
def several_vocabularies(folder: Path) -> None:
    (folder / "vocab.txt").rename(folder / "a-vocab.txt")
    (folder / "b-vocab.txt").write_text(factory.VOCAB.replace("7", "八"))


@case("can't read the vocabulary")
def given_vocabulary_does_not_exist(folder: Path) -> list[str]:
    return [str(folder), "--vocab", str(folder / "nowhere.txt")]


@case("can't read the vocabulary")
def given_vocabulary_is_a_folder(folder: Path) -> list[str]:
    return [str(folder), "--vocab", str(folder)]


@case("can't read the vocabulary .*: it is not a regular file")
def given_vocabulary_is_a_pipe(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe")
    return [str(folder), "--vocab", str(folder / "pipe")]


@case("--no-vocab excludes --vocab; leave one of them out")
def a_vocabulary_and_none(folder: Path) -> list[str]:
    return [str(folder), "--vocab", str(folder / "vocab.txt"), "--no-vocab"]


@case("invalid choice: 'int3'")
def an_unknown_dtype(folder: Path) -> list[str]:
    return [str(folder), "--dtype", "int3"]
