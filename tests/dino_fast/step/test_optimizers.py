"""Optimizers, clipping and the moving average against the same written out one tensor at a time."""

import copy
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dino_fast.step.optimizers import (
    LARS,
    OptimRecipe,
    build_optimizer,
    clip_gradients,
    parameter_groups,
    set_hyper,
    update_ema,
)

Name = Literal["sgd", "adamw", "lars"]


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5)).double()
    nn.init.uniform_(model.get_parameter("1.weight"))
    return model


def _give_gradients(model: nn.Module, seed: int) -> None:
    r = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=r)


def _sgd(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: float, wd: float) -> Tensor:
    state["v"] = 0.9 * state.get("v", torch.zeros_like(p)) + g + wd * p
    return p - lr * state["v"]


def _adamw(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: float, wd: float) -> Tensor:
    t = state["t"] = state.get("t", torch.zeros(())) + 1
    state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * g
    state["v"] = 0.999 * state.get("v", torch.zeros_like(p)) + 0.001 * g * g
    m, v = state["m"] / (1 - 0.9 ** t.item()), state["v"] / (1 - 0.999 ** t.item())
    return p * (1 - lr * wd) - lr * m / (v.sqrt() + 1e-8)


def _lars(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: float, wd: float) -> Tensor:
    if p.ndim != 1:
        g = g + wd * p
        g = g * (0.001 * p.norm() / g.norm() if p.norm() > 0 and g.norm() > 0 else 1)
    state["v"] = 0.9 * state.get("v", torch.zeros_like(p)) + g
    return p - lr * state["v"]


@pytest.mark.parametrize(("name", "rule"), [("sgd", _sgd), ("adamw", _adamw), ("lars", _lars)])
def test_steps_equal_the_rule_written_out(name: Name, rule: object) -> None:
    assert callable(rule)
    model = _model()
    optimizer = build_optimizer(OptimRecipe(name=name), model)
    values = {k: p.detach().clone() for k, p in model.named_parameters()}
    states: dict[str, dict[str, Tensor]] = {k: {} for k in values}
    for step, (lr, wd) in enumerate([(0.1, 0.01), (0.2, 0.02), (0.05, 0.5)]):
        _give_gradients(model, step)
        set_hyper(optimizer, lr, wd)
        optimizer.step()
        for k, p in model.named_parameters():
            values[k] = rule(values[k], p.grad, states[k], lr, wd if p.ndim > 1 else 0.0)
            torch.testing.assert_close(p.detach(), values[k], rtol=1e-10, atol=1e-12)


def _after_one_step(name: Name) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = _model()
    optimizer = build_optimizer(OptimRecipe(name=name), model)
    _give_gradients(model, 0)
    set_hyper(optimizer, 0.1, 0.1)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_tensor_without_gradient_is_left_alone(name: Name) -> None:
    model, optimizer = _after_one_step(name)
    frozen = model.get_parameter("3.weight")
    before, state = frozen.detach().clone(), copy.deepcopy(optimizer.state[frozen])
    frozen.grad = None
    optimizer.step()
    torch.testing.assert_close(frozen.detach(), before, rtol=0, atol=0)
    assert state.keys() == optimizer.state[frozen].keys()
    assert all(torch.equal(optimizer.state[frozen][k], v) for k, v in state.items() if v is not None)


@pytest.mark.parametrize("zero", ["parameter", "update"])
def test_lars_does_not_rescale_where_a_norm_is_zero(zero: str) -> None:
    p = nn.Parameter(torch.zeros(2, 3) if zero == "parameter" else torch.ones(2, 3))
    p.grad = torch.ones(2, 3) if zero == "parameter" else torch.zeros(2, 3)
    before = p.detach().clone()
    LARS([p], lr=0.5).step()
    torch.testing.assert_close(p.detach(), before - 0.5 * p.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_restored_optimizer_goes_on_bit_for_bit(name: Name) -> None:
    model, optimizer = _after_one_step(name)
    twin = copy.deepcopy(model)
    restored = build_optimizer(OptimRecipe(name=name), twin)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network, rule in ((model, optimizer), (twin, restored)):
        _give_gradients(network, 1)
        set_hyper(rule, 0.05, 0.2)
        rule.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_decay_spares_biases_norms_and_what_is_not_trained() -> None:
    model = _model()
    model.get_parameter("3.bias").requires_grad_(False)
    decayed, spared = (len(group["params"]) for group in parameter_groups(model))
    assert (decayed, spared) == (2, 3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), max_norm=st.floats(0.01, 10), scale=st.floats(0, 5))
def test_clipping_is_per_tensor(seed: int, max_norm: float, scale: float) -> None:
    model = _model()
    _give_gradients(model, seed)
    params = list(model.parameters())
    params[0].grad = None
    grads = [p.grad * scale for p in params if p.grad is not None]
    for p, g in zip(params[1:], grads, strict=True):
        p.grad = g.clone()
    norms = clip_gradients(params, max_norm)
    total = torch.linalg.vector_norm(norms)
    torch.testing.assert_close(total, torch.cat([g.flatten() for g in grads]).norm())
    for p, g in zip(params[1:], grads, strict=True):
        factor = max_norm / (g.norm() + 1e-6)
        torch.testing.assert_close(p.grad, g * factor if factor < 1 else g, rtol=1e-12, atol=0)


def test_zero_does_not_clip() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.full((3,), 1e6)
    assert clip_gradients([p], 0.0).item() == pytest.approx(3**0.5 * 1e6)
    assert (p.grad == 1e6).all()


def test_the_moving_average_is_of_parameters_only() -> None:
    teacher, student = _model(), _model()
    for p in student.parameters():
        nn.init.normal_(p)
    student.get_buffer("1.running_mean").fill_(7)
    before = [p.detach().clone() for p in teacher.parameters()]
    update_ema(teacher, student, 0.99)
    for t, b, s in zip(teacher.parameters(), before, student.parameters(), strict=True):
        torch.testing.assert_close(t.detach(), b * 0.99 + (1 - 0.99) * s.detach(), rtol=1e-14, atol=1e-16)
    assert (teacher.get_buffer("1.running_mean") == 0).all()
