"""AdamW in full and in 8 bits, parameter groups, and the step inside the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gpt2ml_torch import GPT2ML, GPT2MLConfig
from gpt2ml_torch.finetuning import Objective, Rows, next_token_rows
from gpt2ml_torch.finetuning.optimizers import (
    Adafactor,
    AdamW,
    SlicedOptimizer,
    StepInBackward,
    gradient_norm,
    parameter_groups,
    sliced,
)

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
    return next_token_rows(torch.randint(1, 41, (2, 17), generator=generator))


def model_of(dtype: torch.dtype = torch.float32) -> GPT2ML:
    torch.manual_seed(0)
    return GPT2ML(CONFIG).to(dtype).train()


@pytest.mark.parametrize("slice_size", [1 << 20, 40])
def test_adamw_is_that_of_torch(slice_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced, "SLICE", slice_size)
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


def test_the_tied_embedding_is_stepped_once() -> None:
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


def test_nothing_is_stepped_below_a_broken_gradient() -> None:
    model = model_of()
    hooks = StepInBackward(optimizer_of(model, Adafactor))
    model.get_parameter("blocks.1.mlp.up.weight").register_hook(
        lambda gradient: gradient * float("inf")
    )
    before = copy.deepcopy(model.state_dict())
    Objective(model)(rows()).backward()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(before[n], value)}
    assert hooks.broken
    assert any(name.startswith("blocks.2") for name in moved)
    assert not any(name.startswith(("blocks.0", "blocks.1.attention", "token")) for name in moved)


def test_groups_know_what_decays_and_what_is_joined() -> None:
    groups = parameter_groups(model_of(), weight_decay=0.1, scale=lambda n: 0.5 if "0" in n else 1)
    kinds = {(g["weight_decay"], g["stacked"], g["scale"]) for g in groups}
    assert kinds == {(d, s, f) for d in (0.0, 0.1) for s in (1, 3) for f in (0.5, 1)}
    assert all(p.ndim == 1 for g in groups for p in g["params"] if not g["weight_decay"])
    model = model_of()
    model.get_submodule("blocks.0").requires_grad_(False)
    kept = sum(len(g["params"]) for g in parameter_groups(model))
    assert kept == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": 0.0}])
def test_impossible_settings_of_adamw_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        AdamW([nn.Parameter(torch.ones(4, 2))], **settings)
