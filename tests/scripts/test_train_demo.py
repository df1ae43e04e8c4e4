"""The training of the demo, from poems to TensorFlow checkpoint and card, on made-up verse."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2ml_torch import GPT2ML, GPT2MLConfig
from gpt2ml_torch.finetuning import Trainer
from scripts import train_demo
from scripts.demo_model import corpus as demo_corpus
from scripts.demo_model import export as demo_export
from scripts.demo_model.ngram import KneserNey

CHARACTERS = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少白日依山尽黄河入海流欲穷千里目更上一层楼"


def made_up_poems(form: int, count: int) -> list[str]:
    draw = random.Random(form)
    return [
        "".join(
            "".join(draw.choices(CHARACTERS, k=form)) + mark for _ in range(2) for mark in "，。"
        )
        for _ in range(count)
    ]


def made_up_corpus() -> demo_corpus.Corpus:
    train = {form: made_up_poems(form, 60) for form in (5, 7)}
    text = "".join(train[5] + train[7])
    held_out = {form: made_up_poems(form, 66)[60:] for form in train}
    return demo_corpus.Corpus(train, held_out, Counter(text))


RECIPE = dataclasses.replace(
    train_demo.DEMO,
    model=GPT2MLConfig(
        vocab_size=630,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=256,
        hidden_dropout_prob=0.0,
    ),
    stages=(
        train_demo.Stage(steps=12, rows=4, length=32),
        train_demo.Stage(steps=4, rows=1, length=96),
    ),
    training=dataclasses.replace(
        train_demo.DEMO.training, steps=16, warmup=3, cooldown=4, eval_every=8
    ),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, train_demo.Data]:
    data = train_demo.Data(made_up_corpus(), RECIPE)
    trainer = train_demo.make_trainer(RECIPE, data, tmp_path_factory.mktemp("work"))
    assert trainer.run().reason == "done"
    return trainer, data


def test_training_learns(finished: tuple[Trainer, train_demo.Data]) -> None:
    trainer, data = finished
    articles = data.articles(data.corpus.train)[5]
    fresh = GPT2ML(RECIPE.model)
    before = train_demo.mean_loss(fresh, articles)
    assert train_demo.mean_loss(trainer.objective.model, articles) < before - 0.1


def test_stages_follow_each_other_and_reach_all_positions(
    finished: tuple[Trainer, train_demo.Data],
) -> None:
    _, data = finished
    shapes = [tuple(data.batch(index).token_ids.shape) for index in range(16)]
    assert shapes == [(4, 32)] * 12 + [(1, 96)] * 4
    first = torch.stack([data.batch(index).positions[:, 0] for index in range(12)])
    assert (first[:, ::2] == 0).all()
    assert len(set(first[:, 1].tolist())) > 8
    assert max(int(data.batch(index).positions.max()) for index in range(12)) > 150
    once, again = data.batch(7), train_demo.Data(data.corpus, RECIPE).batch(7)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_a_stopped_run_goes_on_as_if_never_stopped(
    finished: tuple[Trainer, train_demo.Data], tmp_path: Path
) -> None:
    whole, data = finished
    first = train_demo.make_trainer(RECIPE, data, tmp_path)
    asked = iter([False] * 6 + [True])
    first.should_stop = lambda: next(asked)
    assert first.run().step == 7
    second = train_demo.make_trainer(RECIPE, data, tmp_path)
    assert train_demo.restored_step(second) == 7
    third = train_demo.make_trainer(RECIPE, data, tmp_path)
    assert third.run(resume=True).step == 16
    pairs = zip(whole.objective.parameters(), third.objective.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_state_of_another_recipe_is_refused(
    finished: tuple[Trainer, train_demo.Data],
) -> None:
    trainer, data = finished
    assert trainer.folder is not None
    stages = (train_demo.Stage(steps=16, rows=4, length=32),)
    other = dataclasses.replace(RECIPE, stages=stages)
    with pytest.raises(ValueError, match="another model, other data"):
        train_demo.make_trainer(other, data, trainer.folder).run(resume=True)


def test_the_checkpoint_is_the_originals_with_slots_and_step(
    finished: tuple[Trainer, train_demo.Data], tmp_path: Path
) -> None:
    tf = pytest.importorskip("tensorflow")
    trainer, data = finished
    model = trainer.objective.model
    train_demo.export(trainer, data, 16, tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    parts = {f"model.ckpt-16.{part}" for part in ("index", "data-00000-of-00001", "meta")}
    assert names == parts | {"checkpoint", "config.json", "vocab.txt", "README.md"}

    reader = tf.train.load_checkpoint(str(tmp_path))
    assert reader.get_tensor("global_step") == 16
    assert reader.get_tensor("global_step").dtype == np.int64
    key_rows = model.get_parameter("blocks.1.attention.qkv.weight")[16:32].detach().numpy()
    np.testing.assert_array_equal(reader.get_tensor("newslm/layer01/key_layer/kernel"), key_rows.T)
    up = trainer.optimizer.state[model.get_parameter("blocks.1.mlp.up.weight")]
    scope = "newslm/layer01/intermediate/kernel"
    inputs, outputs = (reader.get_tensor(f"{scope}/adafactor_{slot}") for slot in ("vr", "vc"))
    assert (inputs.shape, outputs.shape) == ((16,), (24,))
    np.testing.assert_array_equal(inputs, up["vc"].flatten().numpy())
    np.testing.assert_array_equal(outputs, up["vr"].flatten().numpy())

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        prefix = str(tmp_path / "model.ckpt-16")
        tf.compat.v1.train.import_meta_graph(f"{prefix}.meta").restore(session, prefix)
        assert session.run("global_step:0") == 16


def test_irregular_and_damaged_entries_are_dropped() -> None:
    assert demo_corpus.form_of("白日依山尽，黄河入海流。") == 5
    assert demo_corpus.form_of("朝辞白帝彩云间，千里江陵一日还。") == 7
    good = "白日依山尽，黄河入海流。"
    for damaged in (
        good[1:],
        good[:-1],
        good.replace("白", "□"),
        good + "（一作）",
        good * 2 + "x",
    ):
        assert demo_corpus.form_of(damaged) is None


def test_variants_of_a_poem_are_dropped() -> None:
    poem, other = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。", "春眠不觉晓，处处闻啼鸟。"
    variant = poem.replace("更上", "再上")
    assert demo_corpus.deduplicate([poem, other, variant]) == [poem, other]


def test_the_vocabulary_has_berts_layout() -> None:
    vocabulary = demo_corpus.build_vocabulary(Counter(CHARACTERS), 630)
    assert [vocabulary[id_] for id_ in (0, 100, 101, 102, 103)] == [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
    ]
    assert len(set(vocabulary)) == len(vocabulary)
    assert set("今天天气不错双十一科学空间，。") <= set(vocabulary)


def test_kneser_ney_is_a_distribution_and_prefers_what_it_saw() -> None:
    model = KneserNey([[0, 1, 2, 1, 2, 3, 0, 1], [1, 2, 2, 1]], order=3, vocabulary_size=5)
    for context in ([1, 2], [3, 3], [4, 0]):
        p = [np.exp(model.log_probabilities([*context, id_])[2]) for id_ in range(5)]
        assert sum(p) == pytest.approx(1)
    assert np.argmax([model.log_probabilities([3, 0, id_])[2] for id_ in range(5)]) == 1


def test_metre_counts_wrong_lengths_and_marks() -> None:
    right = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。春"
    wrong = "白日依山尽，黄河入海。欲穷千里目。更上一层楼。"
    assert demo_export.measure_metre([(5, right)]) == (1.0, 1.0, 3)
    assert demo_export.measure_metre([(5, wrong)]) == (1 / 3, 0.0, 3)
