"""Stochastic rounding, the optimizers, and the step inside the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gpt2ml_torch import GPT2ML, GPT2MLConfig
from gpt2ml_torch.finetuning import adafactor, optimizers
from gpt2ml_torch.finetuning.data import Rows
from gpt2ml_torch.finetuning.objective import Objective
from gpt2ml_torch.finetuning.optimizers import (
    Adafactor,
    AdamW,
    SlicedOptimizer,
    StepInBackward,
    gradient_norm,
    parameter_groups,
)
from gpt2ml_torch.finetuning.rounding import round_stochastically_

CONFIG = GPT2MLConfig(
    vocab_size=41,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
)


def rows(seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 41, (2, 17), generator=generator)
    places = torch.arange(16).expand(2, 16)
    return Rows(ids[:, :-1], ids[:, 1:], places, torch.ones_like(places))


def model_of(dtype: torch.dtype = torch.float32) -> GPT2ML:
    torch.manual_seed(0)
    return GPT2ML(CONFIG).to(dtype).train()


def test_rounding_goes_to_the_two_neighbours_with_the_right_frequency() -> None:
    low, high = (torch.tensor(v, dtype=torch.bfloat16).float() for v in (1.0, 1.0078125))
    for share in (0.1, 0.5, 0.93):
        for sign in (1.0, -1.0):
            value = (low + share * (high - low)) * sign
            target = torch.empty(200_000, dtype=torch.bfloat16)
            generator = torch.Generator().manual_seed(1)
            round_stochastically_(target, value.expand(200_000), generator=generator)
            found = (target.float() * sign - low) / (high - low)
            assert set(found.tolist()) == {0.0, 1.0}
            assert abs(found.mean().item() - share) < 5 * (0.25 / 200_000) ** 0.5


def test_rounding_keeps_what_is_representable_and_what_is_not_finite() -> None:
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastically_(torch.empty_like(exact), exact.float()), exact)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    odd = torch.cat(
        [odd, torch.tensor([-1], dtype=torch.int32).view(torch.float32)]
    )  # NaN, all ones
    found = round_stochastically_(torch.empty(5, dtype=torch.bfloat16), odd)
    torch.testing.assert_close(found.float(), odd, rtol=0, atol=0, equal_nan=True)


def test_rounding_repeats_with_the_generator_and_errors_are_independent() -> None:
    source = torch.randn(4000)
    results = []
    for seed in (3, 3, 4):
        generator = torch.Generator().manual_seed(seed)
        target = torch.empty(4000, dtype=torch.bfloat16)
        results.append(round_stochastically_(target, source, generator=generator))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    up = torch.empty(40_000, dtype=torch.bfloat16)
    round_stochastically_(up, torch.full((40_000,), 1.0 + 0.00390625))
    bits = (up.float() > 1).float() * 2 - 1
    for lag in range(1, 9):  # four neighbours share one draw of 64 bits
        assert abs((bits[lag:] * bits[:-lag]).mean().item()) < 0.03


def test_rounding_refuses_other_dtypes_and_shapes() -> None:
    with pytest.raises(ValueError, match="float32 to bfloat16"):
        round_stochastically_(torch.empty(2), torch.empty(2))
    with pytest.raises(ValueError, match="differ"):
        round_stochastically_(torch.empty(2, dtype=torch.bfloat16), torch.empty(3))


@pytest.mark.parametrize("slice_size", [1 << 20, 40])
def test_adafactor_in_slices_follows_the_whole_matrix_rule(
    slice_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "SLICE", slice_size)
    expected, found = model_of(), model_of()
    reference = adafactor.Adafactor(adafactor.parameter_groups(expected), lr=1e-2)
    ours = Adafactor(parameter_groups(found), lr=1e-2)
    for step in range(4):
        for p, q in zip(expected.parameters(), found.parameters(), strict=True):
            p.grad = torch.randn_like(p) * 10.0 ** (step - 2)
            q.grad = p.grad.clone()
        reference.step()
        ours.step()
    for p, q in zip(expected.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slice_size", [1 << 20, 40])
def test_adamw_is_that_of_torch(slice_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "SLICE", slice_size)
    expected, found = nn.Linear(16, 20), nn.Linear(16, 20)
    found.load_state_dict(expected.state_dict())
    reference = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=0.1)
    ours = AdamW(found.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        for p, q in zip(expected.parameters(), found.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        reference.step()
        ours.step()
    for p, q in zip(expected.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(q, p)


def test_eight_bit_adamw_stays_near_the_full_one_in_a_quarter_of_the_memory() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    full = nn.Linear(256, 64, bias=False)
    small = copy.deepcopy(full)
    optimizers_ = (
        AdamW(full.parameters(), lr=1e-2),
        AdamW(small.parameters(), lr=1e-2, eight_bit=True),
    )
    before = full.weight.detach().clone()
    for _ in range(10):
        full.weight.grad = torch.randn_like(full.weight)
        small.weight.grad = full.weight.grad.clone()
        for optimizer in optimizers_:
            optimizer.step()
    moved = (full.weight - before).norm()
    assert (full.weight - small.weight).norm() < 0.1 * moved
    assert optimizers_[1].state[small.weight]["exp_avg"].codes.dtype == torch.uint8


def optimizer_of(model: nn.Module, kind: type[SlicedOptimizer]) -> Any:
    return kind(parameter_groups(model), lr=1e-2)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [Adafactor, AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_stepping_in_the_backward_pass_changes_nothing_but_memory(
    kind: type[SlicedOptimizer], dtype: torch.dtype, checkpointing: bool
) -> None:
    """Against a step after the backward pass; the tied embedding has two uses."""
    kept, freed = model_of(dtype), model_of(dtype)
    freed.gradient_checkpointing = checkpointing
    after, inside = optimizer_of(kept, kind), optimizer_of(freed, kind)
    after.stochastic_rounding = inside.stochastic_rounding = False
    hooks = StepInBackward(inside)
    for step in range(3):
        hooks.reset()
        Objective(kept)(rows(step)).backward()
        Objective(freed)(rows(step)).backward()
        norm = gradient_norm(p.grad for p in kept.parameters() if p.grad is not None)
        assert hooks.gradient_norm == pytest.approx(norm, rel=1e-3)
        after.step()
        after.zero_grad()
        assert all(p.grad is None for p in freed.parameters())
    for p, q in zip(kept.parameters(), freed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_tied_embedding_is_stepped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    optimizer = optimizer_of(model, AdamW)
    hooks = StepInBackward(optimizer)
    Objective(model, chunk=5)(rows()).backward()
    steps = {int(optimizer.state[p]["step"]) for p in model.parameters()}
    assert steps == {1}
    hooks.remove()
    Objective(model)(rows()).backward()
    assert model.token_embedding.weight.grad is not None


def test_a_broken_gradient_steps_nothing() -> None:
    model = model_of()
    hooks = StepInBackward(optimizer_of(model, Adafactor))
    before = copy.deepcopy(model.state_dict())
    (Objective(model)(rows()) * float("nan")).backward()
    assert hooks.broken
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_stochastic_rounding_keeps_small_updates_that_rounding_to_nearest_loses() -> None:
    moved = {}
    for stochastic in (True, False):
        weight = nn.Parameter(torch.full((64, 64), 0.5, dtype=torch.bfloat16))
        optimizer = AdamW(
            [weight], lr=1e-5, weight_decay=0.0, stochastic_rounding=stochastic, seed=1
        )
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[stochastic] = 0.5 - weight.float().mean().item()
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(50e-5, rel=0.3)


def test_chunked_loss_is_the_plain_one_and_so_are_its_gradients() -> None:
    plain, chunked = model_of().double(), model_of().double()
    batch = rows()
    batch.labels[0, 3:7] = 0
    logits = plain(batch.token_ids)
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=0, reduction="sum"
    )
    found = Objective(chunked, chunk=5)(batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    found.backward()
    for p, q in zip(plain.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)
