"""The fused batch norms against torch's own operations in float64: interpreted where there is no GPU, else compiled.

Run as a program, this file is one of two ranks: `test_kernel_batch_norm.py RANK FOLDER`.
"""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dino_fast.model.backbones import build_backbone
from tests.interpreted import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("relu", "add", "join", "pool")  # join: the residual has a norm of its own
# Relative to the reference's norm. Gradients of float16 pass a rounded sum where two come together.
OUTPUT = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}
GRADIENT = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

fused = kernels("dino_fast.model.kernels.batch_norm")


class Case(NamedTuple):
    """What a norm is given: values of some spread about a level, what is added, and what comes back."""

    kind: str
    x: Tensor
    residual: Tensor
    grads: list[Tensor]
    norms: nn.ModuleList


def draw(
    kind: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    level: float = 0.0,
    spread: float = 1.0,
    uses: int = 2,
    seed: int = 0,
) -> Case:
    """uses: how many of the two outputs have a gradient."""
    r = torch.Generator().manual_seed(seed)

    def made(*size: int) -> Tensor:
        return torch.randn(*size, generator=r).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)

    norms = nn.ModuleList(nn.BatchNorm2d(shape[1]) for _ in range(2 if kind == "join" else 1)).to(DEVICE)
    with torch.no_grad():
        for parameter in norms.parameters():
            parameter.copy_(torch.randn(shape[1], generator=r))
    x = (made(*shape) * spread + level).to(dtype)
    grads = made(*shape), made(*shape)
    if kind == "pool":
        grads = tuple(F.max_pool2d(grad, 3, 2, 1) for grad in grads)
    return Case(kind, x, made(*shape), list(grads[: 1 if kind == "relu" else uses]), norms)


def outputs(case: Case, x: Tensor, residual: Tensor, norms: nn.ModuleList) -> tuple[Tensor, ...]:
    if case.kind in ("add", "join"):
        return fused.norm_add_relu(x, norms[0], residual, *norms[1:])
    if case.kind == "pool":
        return fused.norm_relu_pool(x, norms[0])
    return (fused.norm_relu(x, norms[0]),)


def torchs(case: Case, x: Tensor, residual: Tensor, norms: nn.ModuleList) -> Tensor:
    y = norms[0](x)
    if case.kind in ("add", "join"):
        y = y + (residual if case.kind == "add" else norms[1](residual))
    return F.max_pool2d(F.relu(y), 3, 2, 1) if case.kind == "pool" else F.relu(y)


def apart(mine: Tensor, theirs: Tensor) -> float:
    """Distance in the Euclidean norm, relative to the second."""
    theirs = theirs.double()
    return float((mine.double() - theirs).norm() / theirs.norm().clamp(min=1e-12))


def check(case: Case, slack: float = 1.0) -> None:
    """Outputs, gradients and running statistics."""
    dtype = case.x.dtype
    norms, exact = copy.deepcopy(case.norms), copy.deepcopy(case.norms).double()
    x, residual = (tensor.clone().requires_grad_() for tensor in (case.x, case.residual))
    wide_x, wide_residual = (tensor.double().requires_grad_() for tensor in (case.x, case.residual))
    mine, theirs = outputs(case, x, residual, norms), torchs(case, wide_x, wide_residual, exact)
    for y in mine:
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert apart(y.detach(), theirs.detach()) < slack * OUTPUT[dtype]
    torch.autograd.backward(list(mine[: len(case.grads)]), case.grads)
    theirs.backward(sum(grad.double() for grad in case.grads))
    assert apart(x.grad, wide_x.grad) < slack * GRADIENT[dtype]
    for parameter, reference in zip(norms.parameters(), exact.parameters(), strict=True):
        assert apart(parameter.grad, reference.grad) < slack * GRADIENT[dtype]
    if case.kind in ("add", "join"):
        assert apart(residual.grad, wide_residual.grad) < slack * GRADIENT[dtype]
    for name, buffer in exact.named_buffers():
        torch.testing.assert_close(norms.get_buffer(name).to(buffer), buffer, rtol=1e-6, atol=slack * 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_torchs_batch_norm_and_what_follows(kind: str, dtype: torch.dtype) -> None:
    check(draw(kind, (3, 24, 7, 5), dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 9, 1), (2, 130, 1, 7), (5, 64, 3, 3), (1, 257, 4, 6)])
def test_odd_sizes(kind: str, shape: tuple[int, int, int, int]) -> None:
    check(draw(kind, shape), slack=4)


@settings(max_examples=8)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(6, 9)),
    uses=st.integers(1, 2),
    seed=st.integers(0, 999),
)
def test_any_shape_and_any_number_of_gradients(
    kind: str, shape: tuple[int, int, int, int], uses: int, seed: int
) -> None:
    check(draw(kind, shape, uses=uses, seed=seed), slack=20)  # of few values a channel little is left of a gradient


def test_a_level_far_from_zero_costs_no_digits() -> None:
    """Sums of plain squares would lose all of them: (10⁴)² in float32 has a step of 8."""
    check(draw("relu", (4, 8, 12, 12), level=1e4), slack=1e4 * 0.05)  # what x itself, rounded, leaves of the digits
    case = draw("relu", (4, 8, 12, 12), level=1e4)
    theirs = copy.deepcopy(case.norms[0])
    fused.norm_relu(case.x, case.norms[0])
    theirs.double()(case.x.double())
    assert apart(case.norms[0].running_var, theirs.running_var) < 1e-5


# Stretches of many tiles, and more of them than the small launch adds up at a time. The interpreter is slow.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "programs"), list(itertools.product(KINDS, (3, 300))))
def test_several_programs_share_the_rows(kind: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "TILE_BYTES", 1024)
    monkeypatch.setattr(fused, "QUAD_BYTES", 1024)
    monkeypatch.setattr(fused, "VALUE_PROGRAMS", programs)
    monkeypatch.setattr(fused, "GRADIENT_PROGRAMS", programs)
    check(draw(kind, (8, 20, 21, 10)))


def test_the_first_of_equal_values_in_a_window_gets_the_gradient() -> None:
    x = torch.full((1, 1, 4, 4), 3.0, device=DEVICE)
    x[..., 0, 0] = -10.0
    norms = nn.ModuleList([nn.BatchNorm2d(1)]).to(DEVICE)
    check(Case("pool", x, x, [torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]], device=DEVICE)], norms), slack=4)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_no_numbers_show(kind: str) -> None:
    case = draw(kind, (2, 4, 6, 6))
    case.x[0, 1, 2, 2] = torch.nan
    for y in outputs(case, case.x, case.residual, case.norms):
        assert y[:, 1].isnan().any()
        assert y[:, [0, 2, 3]].isfinite().all()


def test_a_single_value_a_channel_has_no_spread() -> None:
    with pytest.raises(ValueError, match="more than one value a channel"):
        fused.norm_relu(torch.ones(1, 3, 1, 1, device=DEVICE), nn.BatchNorm2d(3).to(DEVICE))


def test_without_gradients_nothing_is_kept() -> None:
    case = draw("add", (2, 8, 4, 4))
    with torch.no_grad():
        y, again = outputs(case, case.x, case.residual, case.norms)
    assert not y.requires_grad
    assert y.data_ptr() == again.data_ptr()


# Networks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnet_is_torchvisions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = build_backbone(name)[0].to(DEVICE, memory_format=torch.channels_last)
    exact = copy.deepcopy(network).double()
    from dino_fast.model.fused_resnet import fuse_norms

    assert fuse_norms(network)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x = torch.randn(4, 3, 40, 40, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y, theirs = network(x), exact(x.double())
    # The last stage has 4·2·2 values a channel, where each norm multiplies errors; cuDNN's float32 makes more of them.
    slack = (1 if name == "resnet18" else 100) * (10 if DEVICE == "cuda" else 1)
    assert apart(y.detach(), theirs.detach()) < slack * 2e-5
    grad = torch.randn_like(y)
    y.backward(grad)
    theirs.backward(grad.double())
    for mine, reference in zip(network.parameters(), exact.parameters(), strict=True):
        assert apart(mine.grad, reference.grad) < slack * 5e-4
    assert list(network.state_dict()) == list(exact.state_dict())
    for mine, reference in zip(network.buffers(), exact.buffers(), strict=True):
        assert apart(mine, reference) < slack * 2e-5
    assert apart(network.eval()(x).detach(), exact.eval()(x.double()).detach()) < slack * 2e-5


def test_what_is_no_resnet_stays_as_it_is() -> None:
    from dino_fast.model.fused_resnet import fuse_norms

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert not fuse_norms(network)


# Two ranks


@pytest.mark.slow
def test_two_ranks_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    here, others = str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, others])}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind in KINDS:
        case = draw(kind, (4, 12, 6, 6))
        exact = copy.deepcopy(case.norms).double()
        x, residual = (tensor.double().requires_grad_() for tensor in (case.x, case.residual))
        y = torchs(case, x, residual, exact)
        y.backward(sum(grad.double() for grad in case.grads))
        mine = [rank[kind] for rank in found]
        expected = {"y": y.detach(), "x": x.grad}
        if residual.grad is not None:
            expected["residual"] = residual.grad
        for name, value in expected.items():
            assert apart(torch.cat([one[name] for one in mine]).cpu(), value.cpu()) < 5e-6
        for name, parameter in exact.named_parameters():  # each rank's own; whoever averages them divides
            assert apart(mine[0]["grads"][name] + mine[1]["grads"][name], parameter.grad.cpu()) < 5e-6
        for one in mine:
            for name, buffer in exact.named_buffers():
                torch.testing.assert_close(one["buffers"][name].to(buffer.dtype), buffer.cpu(), rtol=1e-6, atol=1e-6)


def one_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for kind in KINDS:
        case = draw(kind, (4, 12, 6, 6))
        mine = slice(2 * rank, 2 * rank + 2)
        x, residual = (tensor[mine].clone().requires_grad_() for tensor in (case.x, case.residual))
        made = outputs(case, x, residual, case.norms)
        torch.autograd.backward(list(made), [grad[mine] for grad in case.grads])
        found[kind] = {
            "y": made[0].detach().cpu(), "x": x.grad.cpu(), "residual": residual.grad,
            "grads": {name: parameter.grad.cpu() for name, parameter in case.norms.named_parameters()},
            "buffers": {name: buffer.cpu() for name, buffer in case.norms.named_buffers()},
        }  # fmt: skip
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), Path(sys.argv[2]))
