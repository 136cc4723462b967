"""Compiled backbones: static graphs, one a resolution, whole, and the same numbers.

Run as a program, this file is one of two ranks: `test_compiled.py RANK FOLDER`.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

from dino_fast.model.backbones import GlobalAveragePool
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.model.sync_batchnorm import convert_sync_batchnorm
from dino_fast.step import compiled
from dino_fast.step.compiled import compile_backbones, find_compile_problem, report_recompile_limit
from dino_fast.step.hyper import Hyper
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe, build_optimizer
from dino_fast.step.precision import Precision
from dino_fast.step.train_step import TrainStep
from tests.chain import Chain

HYPER = Hyper(lr=0.01, weight_decay=1e-2, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)
LOG = "torch._dynamo.convert_frame"


def _step(precision: Precision = "fp32") -> TrainStep:
    torch.manual_seed(0)
    student, teacher = build_student_teacher("resnet18", HeadRecipe(out_dim=64, hidden_dim=32, bottleneck_dim=16))
    return TrainStep(student, teacher, build_optimizer(OptimRecipe(), student), LossRecipe(), 3.0, precision)


def _crops(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    r = torch.Generator().manual_seed(seed)
    sizes = (8, 48), (12, 32)
    views = (torch.randn(n, 3, side, side, generator=r) for n, side in sizes)
    globals_, locals_ = (x.contiguous(memory_format=torch.channels_last) for x in views)
    return globals_, locals_


def test_each_resolution_is_one_whole_graph() -> None:
    plain, step = _step(), _step()
    compile_backbones(step, backend="aot_eager")
    for number in range(3):
        expected, out = plain(*_crops(number), HYPER), step(*_crops(number), HYPER)
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
        if number == 0:
            first = counters["stats"]["unique_graphs"]
    assert sum(counters["graph_break"].values()) == 0
    assert first == counters["stats"]["unique_graphs"] == 3  # the student's two resolutions, the teacher's one
    assert step.state_dict()["student"].keys() == plain.state_dict()["student"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_compiler_makes_of_it_is_the_same(precision: Precision) -> None:
    if problem := find_compile_problem(torch.device("cpu")):
        pytest.skip(problem)
    plain, step = _step(precision), _step(precision)
    compile_backbones(step)
    for number in range(3):
        expected, out = plain(*_crops(number), HYPER), step(*_crops(number), HYPER)
        # Updates let bf16's roundings grow. Then torch 2.11's compiled loss is nearer to fp32's than the eager one.
        rel = 1e-3 if precision == "fp32" else 0.02 if number == 0 else 0.2
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=rel)


def test_without_a_compiler_it_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(compiled.torch, "compile", fail)
    assert find_compile_problem(torch.device("cpu")) == "no C++ compiler"


def test_the_limit_of_compiling_is_said_once() -> None:
    said: list[str] = []
    model = Chain(nn.Conv2d(1, 1, 3), nn.ReLU())
    with torch._dynamo.config.patch(recompile_limit=2), report_recompile_limit(said.append):
        model.compile(dynamic=False, backend="aot_eager")
        for side in range(4, 6):
            model(torch.zeros(1, 1, side, side))
        assert not said
        for side in range(6, 9):
            model(torch.zeros(1, 1, side, side))
    assert len(said) == 1
    assert "compiles no more in this process" in said[0]
    assert "\n" not in said[0]
    model(torch.zeros(1, 1, 9, 9))  # torch's own log is as it was
    assert not any(isinstance(h, compiled._LimitWatcher) for h in logging.getLogger(LOG).handlers)


@pytest.mark.parametrize(("limit", "times"), [(1, 1), pytest.param(8, 0, marks=pytest.mark.slow)])
def test_a_run_that_passes_the_limit_says_so(
    train_here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: int,
    times: int,
) -> None:
    monkeypatch.setattr("dino_fast.run.build.find_compile_problem", lambda device: None)
    monkeypatch.setattr("dino_fast.run.build.compile_backbones", partial(compile_backbones, backend="aot_eager"))
    with torch._dynamo.config.patch(recompile_limit=limit):
        assert train_here(tmp_path / "run", "--max_steps", "2", "--compile", "always", "--crops.locals", "1") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("torch compiles no more in this process") == times


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for compiling in (False, True):
        torch.manual_seed(0)
        model = Chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
        convert_sync_batchnorm(model)
        model.to(memory_format=torch.channels_last)
        if compiling:
            model.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        r = torch.Generator().manual_seed(rank)
        x = torch.randn(4, 3, 12, 12, generator=r).contiguous(memory_format=torch.channels_last)
        out = model(x)
        (out * torch.randn(out.shape, generator=r)).sum().backward()
        results.append(
            {"out": out.detach(), "grads": [p.grad for p in model.parameters()], "state": model.state_dict()}
        )
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # two processes that start a compiler
def test_synchronized_batch_norm_compiles_whole(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, __file__]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=240) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    for rank in range(2):
        eager, whole = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(whole, eager, rtol=1e-4, atol=1e-5)


@pytest.fixture
def two_ranks_alike() -> Iterator[None]:
    """A process group of two ranks without the second: what would be sent counts as what came."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_pass_through_what_is_compiled(two_ranks_alike: None, dtype: torch.dtype) -> None:
    """In each type, because a cast that changes nothing has lost them: torch 2.11 in float32, without a word."""
    gradients = []
    for compiling in (False, True):
        torch.manual_seed(0)
        model = Chain(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), GlobalAveragePool()
        )  # fmt: skip
        convert_sync_batchnorm(model)
        model.to(dtype).to(memory_format=torch.channels_last)
        if compiling:
            model.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 3, 12, 12, dtype=dtype).contiguous(memory_format=torch.channels_last)
        out = model(x)
        (out * torch.randn(out.shape, dtype=dtype)).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient.norm() > 0 for gradient in gradients[0][:-1])
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=tolerance, atol=tolerance)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), Path(sys.argv[2]))
