"""Synchronised batch norm on two real gloo processes against nn.BatchNorm on both batches together.

Run as a program, this file is one rank: `test_sync_batchnorm.py RANK FOLDER`.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dino_fast.model.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm

# name: (shape after N, rows of the two ranks, dtype, keyword arguments of the norm)
CASES: dict[str, tuple[tuple[int, ...], tuple[int, int], torch.dtype, dict[str, Any]]] = {
    "images": ((6, 5, 4), (4, 4), torch.float64, {}),
    "uneven": ((6, 5, 4), (1, 7), torch.float64, {}),
    "features": ((9,), (3, 5), torch.float64, {}),
    "sequences": ((4, 3), (2, 2), torch.float64, {}),
    "float32": ((6, 5, 4), (4, 3), torch.float32, {}),
    "far from zero": ((6, 5, 4), (4, 4), torch.float32, {"eps": 1e-3}),
    "cumulative": ((6, 2, 2), (2, 3), torch.float64, {"momentum": None}),
    "without affine": ((6, 2, 2), (2, 3), torch.float64, {"affine": False}),
    "with an activation": ((6, 5, 4), (1, 7), torch.float64, {"act_layer": nn.SiLU}),  # timm's
    "with a learned activation": ((6, 5, 4), (4, 3), torch.float64, {"act_layer": nn.PReLU, "inplace": False}),
}


def _case(name: str) -> tuple[nn.BatchNorm1d | nn.BatchNorm2d, list[Tensor], Tensor]:
    """A norm with its own weights, two batches after each other, and the weights of a scalar loss."""
    shape, rows, dtype, options = CASES[name]
    r = torch.Generator().manual_seed(len(name))
    plain = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
    norm = (BatchNormAct2d if "act_layer" in options else plain)(shape[0], **options).to(dtype)
    for p in norm.parameters():
        nn.init.normal_(p, generator=r)
    batches = [torch.randn(sum(rows), *shape, dtype=dtype, generator=r) for _ in range(2)]
    if name == "far from zero":
        batches = [x + 300 for x in batches]
    if len(shape) == 3:
        batches = [x.to(memory_format=torch.channels_last) for x in batches]
    return norm, batches, torch.randn(sum(rows), *shape, dtype=dtype, generator=r)


def _run(norm: nn.Module, batches: list[Tensor], loss: Tensor) -> dict[str, Any]:
    """Outputs, input gradients and layouts of each batch; the gradients and the state after the last."""
    result: dict[str, Any] = {"out": [], "grad": [], "strides": []}
    for x in batches:
        x = x.requires_grad_()
        seen: list[Tensor] = []
        x.register_hook(seen.append)  # .grad itself is laid out like x whatever arrives
        out = norm(x)
        (out * loss).sum().backward()  # so the gradient arrives in the layout of `loss`, not of x
        assert x.grad is not None
        result["out"].append(out.detach())
        result["grad"].append(x.grad)
        result["strides"].append([x.stride(), out.stride(), seen[0].stride()])
    result["weights"] = [p.grad for p in norm.parameters()]
    result["state"] = norm.state_dict()
    norm.eval()
    result["eval"] = norm(batches[0].detach()).detach()
    return result


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name, (_, rows, _, _) in CASES.items():
        norm, batches, loss = _case(name)
        model = nn.Sequential(norm)
        convert_sync_batchnorm(model)
        mine = slice(0, rows[0]) if rank == 0 else slice(rows[0], None)
        results[name] = _run(model[0], [x[mine] for x in batches], loss[mine])
    autocast = nn.Sequential(SyncBatchNorm(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank)).bfloat16() + 3
        results["autocast"] = {"x": x, "out": autocast(x).detach()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    root = str(Path(__file__).parents[3])
    command = [sys.executable, "-W", "error", __file__]
    environment = {**os.environ, "PYTHONPATH": root}
    running = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_batch_norm_on_both_batches(name: str, ranks: list[dict[str, Any]]) -> None:
    expected = _run(*_case(name))
    # float32 statistics far from zero lose digits to the mean in any implementation.
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[CASES[name][2]] * (100 if name == "far from zero" else 1)
    both = [results[name] for results in ranks]

    def close(mine: object, theirs: object) -> None:
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)

    for i in range(2):
        close(torch.cat([r["out"][i] for r in both]), expected["out"][i])
        close(torch.cat([r["grad"][i] for r in both]), expected["grad"][i])
    # Each rank has the gradient of its own samples: their sum is the whole.
    close([a + b for a, b in zip(both[0]["weights"], both[1]["weights"], strict=True)], expected["weights"])
    close(torch.cat([r["eval"] for r in both]), expected["eval"])
    for r in both:
        assert list(r["state"]) == list(expected["state"])
        close(r["state"], expected["state"])


@pytest.mark.parametrize("name", ["images", "float32"])
def test_channels_last_stays(name: str, ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        for x, out, grad in results[name]["strides"]:
            assert x == out == grad


def test_under_autocast_statistics_are_float32(ranks: list[dict[str, Any]]) -> None:
    x, out = (torch.cat([r["autocast"][key] for r in ranks]) for key in ("x", "out"))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, nn.BatchNorm1d(4)(x.float()).bfloat16(), rtol=1e-2, atol=1e-2)


def test_one_process_is_plain_batch_norm_bit_for_bit() -> None:
    norm, batches, loss = _case("images")
    other, others, _ = _case("images")
    model = nn.Sequential(other)
    convert_sync_batchnorm(model)
    mine, theirs = _run(model[0], others, loss), _run(norm, batches, loss)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_conversion_reaches_every_level_and_keeps_tensors_and_modes() -> None:
    inner = nn.BatchNorm1d(3, eps=0.1, momentum=0.2)
    model = nn.Sequential(nn.BatchNorm2d(4).eval(), nn.ModuleDict({"a": nn.Sequential(inner, nn.ReLU())}))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    convert_sync_batchnorm(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    new = model[1]["a"][0]  # type: ignore[index]
    assert isinstance(new, SyncBatchNorm)
    assert (new.eps, new.momentum, new.training, model[0].training) == (0.1, 0.2, True, False)


def test_one_process_is_timms_batch_norm_with_its_activation_bit_for_bit() -> None:
    norm, batches, loss = _case("with an activation")
    other, others, _ = _case("with an activation")
    model = nn.Sequential(other)
    convert_sync_batchnorm(model)
    assert isinstance(model[0], SyncBatchNorm)
    torch.testing.assert_close(_run(model[0], others, loss), _run(norm, batches, loss), rtol=0, atol=0)


def test_a_norm_of_another_class_is_refused() -> None:
    class Other(nn.BatchNorm2d):
        pass

    with pytest.raises(TypeError, match="Other is a batch norm that cannot be synchronized"):
        convert_sync_batchnorm(nn.Sequential(Other(3)))


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="batch norm needs"):
        SyncBatchNorm(3)(torch.zeros(3))


if __name__ == "__main__":
    _rank(int(sys.argv[1]), Path(sys.argv[2]))
