"""What only a GPU can show. Each test holds the GPU's result against the CPU's."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast import checkpoint
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.step.compiled import compile_backbones
from dino_fast.step.hyper import Hyper
from dino_fast.step.loss import LossRecipe, compute_objective
from dino_fast.step.optimizers import OptimRecipe, build_optimizer
from dino_fast.step.precision import DTYPES, Precision
from dino_fast.step.recorded import WARM_UP, RecordedStep
from dino_fast.step.train_step import TrainStep
from dino_fast.step.update import LossScale
from dino_fast.train import main as train
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe, Loader
from pipelines.photometric import STD, PhotometricRecipe
from shards.__main__ import main as make_shards
from shards.index import ShardIndex

pytestmark = pytest.mark.gpu


CROPS = CropRecipe(global_size=96, local_size=48, locals=2)
DEBUG = Path(__file__).resolve().parents[1] / "configs" / "debug.yaml"
LEVEL = 1 / (255 * max(STD))  # one 8-bit level in a normalized batch, at the least


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 JPEG images of 100 to 300 pixels a side."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "images").mkdir()
    for number in range(64):
        rng = np.random.default_rng(number)
        height, width = rng.integers(100, 300, 2)
        y, x = np.mgrid[0:height, 0:width][..., None] / 50
        waves = 128 + 90 * np.sin(rng.uniform(0.5, 4, 3) * x + rng.uniform(0.5, 4, 3) * y)
        image = Image.fromarray((waves + rng.normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8))
        image.save(folder / "images" / f"{number:03d}.jpg", quality=92)
    assert make_shards(["pack", str(folder / "images"), str(folder / "shards"), "--workers", "1"]) == 0
    return folder / "shards"


def batches(shards: Path, device: str, count: int = 3, augment: PhotometricRecipe | None = None, **data) -> list:
    with ShardIndex(shards) as index:
        loader = Loader(
            index, DataRecipe(**data), CROPS, augment or PhotometricRecipe(), batch=16, seed=0,
            device=torch.device(device), dtype=torch.float32,
        )  # fmt: skip
        return list(loader.batches(0, count))


@pytest.mark.parametrize("decode", ["dali", "torch"])
def test_cpu_crops_augmented_on_the_gpu_are_the_cpus(shards: Path, decode: str):
    on_gpu = batches(shards, "cuda", decode=decode, decode_device="cpu")
    for ours, theirs in zip(on_gpu, batches(shards, "cpu", decode=decode), strict=True):
        assert np.array_equal(ours.ids, theirs.ids)
        assert ours.globals.is_cuda
        assert ours.globals.is_contiguous(memory_format=torch.channels_last)
        for name in ("globals", "locals"):
            apart = (getattr(ours, name).cpu() - getattr(theirs, name)).abs()
            assert (apart > 1.5 * LEVEL * max(STD) / min(STD)).float().mean() < 1e-3


@pytest.mark.parametrize("decode_device", ["gpu", "split"])
def test_crops_on_the_gpu_are_near_the_cpus(shards: Path, decode_device: str):
    plain = PhotometricRecipe(
        jitter=0, grayscale=0, blur_global_1=0, blur_global_2=0, blur_locals=0, solarize_global_2=0
    )
    on_gpu = batches(shards, "cuda", augment=plain, decode_device=decode_device)
    for ours, theirs in zip(on_gpu, batches(shards, "cpu", augment=plain), strict=True):
        apart = (ours.globals.cpu() - theirs.globals).abs().mean() / LEVEL
        print(f"{decode_device} against cpu: {float(apart):.3f} levels")
        assert apart < 0.4


def test_a_held_batch_is_not_overwritten(shards: Path):
    with ShardIndex(shards) as index:
        loader = Loader(
            index, DataRecipe(), CROPS, PhotometricRecipe(), batch=16, seed=0, device=torch.device("cuda"),
            dtype=torch.bfloat16,
        )  # fmt: skip
        held, copies = [], []
        for batch in loader.batches(0, 20):
            held.append(batch)
            copies.append((batch.globals.clone(), batch.locals.clone()))
    torch.cuda.synchronize()
    for batch, (globals_, locals_) in zip(held, copies, strict=True):
        assert torch.equal(batch.globals, globals_)
        assert torch.equal(batch.locals, locals_)


@pytest.mark.parametrize(
    ("decode", "decode_device"), [("dali", "gpu"), ("dali", "split"), ("dali", "cpu"), ("torch", "cpu")]
)
def test_batches_come_without_the_host_waiting_for_the_gpu(shards: Path, decode: str, decode_device: str):
    with ShardIndex(shards) as index:
        loader = Loader(
            index, DataRecipe(decode=decode, decode_device=decode_device), CROPS, PhotometricRecipe(), batch=16, seed=0,
            device=torch.device("cuda"), dtype=torch.bfloat16,
        )  # fmt: skip
        batches = loader.batches(0, 12)
        for _ in range(4):
            next(batches)  # kernels are compiled, memory is found
        try:
            torch.cuda.set_sync_debug_mode("error")
            rest = list(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert len(rest) == 8
        assert 0 < loader.read_figures().stall < 60


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [math.nan if row["loss"] is None else row["loss"] for row in rows]  # NaN: the step was skipped


def run(shards: Path, output: Path, *arguments: str) -> list[float]:
    common = ["--config", str(DEBUG), "--data.train", str(shards), "--output", str(output), "--log_every", "1"]
    assert train([*common, *arguments]) == 0
    return losses(output)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.01), ("bf16", 0.05), ("fp16", 0.05)])
def test_training_on_the_gpu_follows_the_cpus(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, tolerance: float
):
    options = ("--data.decode", "torch", "--max_steps", "4", "--epochs", "4", "--optim.lr", "1e-3")
    if precision == "fp16":  # its first scale of 65536 is too much for these gradients, and steps would be skipped
        monkeypatch.setattr(LossScale.__init__, "__defaults__", (256.0,))
    reference = run(shards, tmp_path / "cpu", *options, "--device", "cpu")
    ours = run(shards, tmp_path / "gpu", *options, "--device", "cuda", "--precision", precision)
    assert ours == pytest.approx(reference, rel=tolerance)


def test_a_run_on_the_gpu_resumes(shards: Path, tmp_path: Path):
    options = ("--device", "cuda", "--precision", "fp16", "--epochs", "8")
    whole = run(shards, tmp_path / "whole", *options, "--max_steps", "12")
    run(shards, tmp_path / "parts", *options, "--max_steps", "5")
    parts = run(shards, tmp_path / "parts", *options, "--max_steps", "12")
    assert len(parts) == 12
    assert parts == pytest.approx(whole, rel=0.02, nan_ok=True)
    assert checkpoint.load_newest(tmp_path / "parts")[0]["step"] == 12


def augment_case(side: int, views: int, batch: int = 64) -> tuple:
    """Return images uint8 [batch, views, side, side, 3] and their published parameters, on the CPU."""
    from pipelines.photometric import draw_augment_parameters

    rng = np.random.default_rng(side)
    y, x = np.mgrid[0:side, 0:side][..., None] / 20
    waves = 128 + 100 * np.sin(rng.uniform(0.2, 3, (batch, views, 1, 1, 3)) * x + rng.uniform(0.2, 3, 3) * y)
    images = (waves + rng.normal(0, 8, waves.shape)).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(images), draw_augment_parameters(PhotometricRecipe(), 0, 0, np.arange(batch), views)


def by_triton(images: torch.Tensor, parameters, dtype: torch.dtype) -> torch.Tensor:
    """The kernel's output on the GPU, which begins as NaN: what is not written shows."""
    from pipelines import photometric_triton

    batch, views, side = images.shape[:3]
    out = torch.full((batch * views, 3, side, side), torch.nan, dtype=dtype, device="cuda")
    out = out.contiguous(memory_format=torch.channels_last)
    photometric_triton.augment(images.cuda(), parameters, out)
    return out


@pytest.mark.parametrize(("side", "views"), [(224, 2), (96, 6)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 0), (torch.float16, 0.1), (torch.bfloat16, 0.7)])
def test_the_triton_kernel_is_the_reference(side: int, views: int, dtype: torch.dtype, rounding: float):
    from pipelines import photometric

    images, parameters = augment_case(side, views)
    theirs = torch.empty(64 * views, 3, side, side)
    photometric.augment(images, parameters, theirs)
    ours = by_triton(images, parameters, dtype)
    assert torch.equal(ours, by_triton(images, parameters, dtype))
    apart = (ours.cpu().float() - theirs).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
    print(f"triton against torch, {side}, {dtype}: {float((apart > 0.5 + rounding).float().mean()):.2e} differ")
    # A level can become a few, or by the threshold of solarize the whole range, in single pixels.
    assert (apart < 1.5 + rounding).float().mean() >= 0.999


def test_the_triton_kernel_takes_more_than_2_to_the_31_bytes():
    from pipelines.photometric import draw_augment_parameters

    batch, side = 350, 1024
    parameters = draw_augment_parameters(PhotometricRecipe(blur_global_2=1), 0, 0, np.arange(batch), 2)
    images = torch.randint(0, 256, (batch, 2, side, side, 3), dtype=torch.uint8, device="cuda")
    assert images.numel() > 2**31
    whole = by_triton(images, parameters, torch.bfloat16).view(2, batch, 3, side, side)
    for place in (0, batch - 1):
        assert torch.equal(by_triton(images[[place]], parameters[:, [place]], torch.bfloat16), whole[:, place])


def test_the_triton_kernel_does_not_wait_for_the_gpu():
    from pipelines import photometric_triton

    images, parameters = augment_case(96, 6)
    out = by_triton(images, parameters, torch.bfloat16)
    images = images.cuda()
    done = torch.cuda.Event()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        torch.cuda._sleep(10**9)  # cycles: half a second
        photometric_triton.augment(images, parameters, out)
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


HEAD = HeadRecipe(out_dim=4096, hidden_dim=256, bottleneck_dim=64)


def train_step(precision: Precision, name: str = "sgd", **options) -> TrainStep:
    torch.manual_seed(0)
    student, teacher = (network.cuda() for network in build_student_teacher("resnet18", HEAD))
    optimizer = build_optimizer(OptimRecipe(name=name), student)
    step = TrainStep(student, teacher, optimizer, LossRecipe(), 3.0, precision, **options)
    if precision == "fp16":
        step.loss_scale = LossScale(torch.device("cuda"), 1024.0)  # the first of 65536 would overflow
    return step


@pytest.fixture
def tf32():
    """As train.py sets it; torch.compile warns without it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def step_batch(number: int, precision: Precision = "fp32", batch: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(number)
    views = torch.randn(2 * batch, 3, 96, 96), torch.randn(4 * batch, 3, 48, 48)
    return tuple(x.to("cuda", DTYPES[precision], memory_format=torch.channels_last) for x in views)


def step_hyper(number: int, name: str = "sgd") -> Hyper:
    # AdamW moves every weight by the whole rate, by the sign of the gradient: with more, roundings soon decide.
    lr = 0.001 if name == "adamw" else 0.02
    return Hyper(lr / (1 + number), 1e-4, 0.99, 0.04 + 0.01 * number, freeze_last_layer=number == 1)


@pytest.mark.parametrize(("name", "fused"), [("sgd", False), ("sgd", True), ("adamw", True), ("lars", True)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_with_kernels_is_one_with_torchs_operations(precision: Precision, name: str, fused: bool):
    ours, reference = train_step(precision, name, kernels=True, fused_norms=fused), train_step(precision, name)
    first = 1e-2 if precision == "bf16" and fused else 1e-3  # to round once instead of twice moves norms by 3e-3
    for number in range(4):
        batch, hyper = step_batch(number, precision), step_hyper(number, name)
        mine, theirs = ours(*batch, hyper), reference(*batch, hyper)
        for figure, expected in zip(mine[:-1], theirs[:-1], strict=True):  # scalars
            assert float(figure) == pytest.approx(float(expected), rel=0.02 if number else first)
        assert (mine.grad_norms - theirs.grad_norms).norm() < 0.05 * theirs.grad_norms.norm()
    again = train_step(precision, name)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    mine, theirs = (step(*step_batch(4, precision), step_hyper(4, name)) for step in (ours, again))
    assert float(mine.loss) == pytest.approx(float(theirs.loss), rel=first)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("norms", ["torchs", "compiled", "fused"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_does_not_wait_for_the_gpu(precision: Precision, norms: str):
    step = train_step(precision, kernels=True, fused_norms=norms == "fused")
    if norms == "compiled":
        compile_backbones(step)
    batch = step_batch(0, precision)
    for number in range(3):
        step(*batch, step_hyper(number))
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for number in range(3):
            out = step(*batch, step_hyper(number))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.loss.isfinite()


@pytest.mark.parametrize(("fused", "aside"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_recorded_step_is_the_step(precision: Precision, fused: bool, aside: bool):
    plain = train_step(precision, kernels=True, fused_norms=fused)
    graphed = RecordedStep(train_step(precision, kernels=True, fused_norms=fused, teacher_aside=aside))
    for number in range(WARM_UP + 4):
        batch, hyper = step_batch(number, precision), step_hyper(number)
        mine, theirs = graphed(*batch, hyper), plain(*batch, hyper)
        assert float(mine.loss) == pytest.approx(float(theirs.loss), rel=0.03)
        assert float(mine.grad_norm) == pytest.approx(float(theirs.grad_norm), rel=0.2)


def test_a_teacher_aside_gives_the_same_step():
    plain, aside = train_step("bf16", kernels=True), train_step("bf16", kernels=True, teacher_aside=True)
    for number in range(4):
        batch, hyper = step_batch(number, "bf16"), step_hyper(number)
        mine, theirs = aside(*batch, hyper), plain(*batch, hyper)
        assert float(mine.loss) == pytest.approx(float(theirs.loss), rel=0.01)
        assert float(mine.teacher_entropy) == pytest.approx(float(theirs.teacher_entropy), rel=0.01)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_in_half_precision_are_the_casts_of_the_weights(precision: Precision):
    step = train_step(precision, kernels=True)
    for number in range(3):
        step(*step_batch(number, precision), step_hyper(number))
    layers = [m for n in (step.student, step.teacher) for m in n.modules() if hasattr(m, "half_weight")]
    assert len(layers) == 2 * (20 + 3)
    assert all(torch.equal(layer.half_weight, layer.weight.to(DTYPES[precision])) for layer in layers)


@pytest.mark.parametrize(
    "options", [("--graph", "never", "--compile", "always"), ("--graph", "always"), ("--compile", "always")]
)
def test_recorded_and_compiled_runs_from_shards_learn_the_same(shards: Path, tmp_path: Path, options: tuple[str, ...]):
    common = ("--device", "cuda", "--precision", "fp16", "--max_steps", "10", "--epochs", "8")
    plain = run(shards, tmp_path / "plain", *common, "--compile", "never", "--graph", "never")
    assert run(shards, tmp_path / "other", *common, *options) == pytest.approx(plain, rel=0.05, nan_ok=True)


@pytest.mark.parametrize("shape", [(256, 64, 112, 112), (256, 256, 56, 56), (512, 2048, 7, 7), (768, 512, 3, 3)])
def test_fused_norms_are_torchs_at_full_size(shape: tuple[int, ...]):
    from dino_fast.model.kernels.batch_norm import norm_add_relu

    torch.manual_seed(0)
    x, residual, grad = (torch.randn(shape, device="cuda", dtype=torch.float16) * 2 + 1 for _ in range(3))
    x, residual, grad = (made.contiguous(memory_format=torch.channels_last) for made in (x, residual, grad))
    ours, theirs = torch.nn.BatchNorm2d(shape[1]).cuda(), torch.nn.BatchNorm2d(shape[1]).cuda()
    mine, wide = x.clone().requires_grad_(), x.float().requires_grad_()
    one, _ = norm_add_relu(mine, ours, residual)
    other = torch.relu(theirs(wide) + residual.float())
    one.backward(grad)
    other.backward(grad.float())
    pairs = [(one, other), (mine.grad, wide.grad), (ours.weight.grad, theirs.weight.grad)]
    pairs += [(ours.bias.grad, theirs.bias.grad), (ours.running_var, theirs.running_var)]
    for found, expected in pairs:
        assert (found.float() - expected).norm() < 2e-3 * expected.norm()


def test_fused_norms_take_more_than_2_to_the_31_values():
    from dino_fast.model.kernels.batch_norm import norm_relu

    norm = torch.nn.BatchNorm2d(64).cuda()
    x = torch.empty(2800, 64, 112, 112, device="cuda", dtype=torch.float16, memory_format=torch.channels_last)
    x.normal_()
    assert x.numel() > 2**31
    y = norm_relu(x.requires_grad_(), norm)
    y.backward(torch.ones_like(y))
    for image in (0, -1):  # means are 0 and deviations 1 but for 0.0002
        torch.testing.assert_close(y[image], x[image].relu(), rtol=1e-3, atol=2e-3)
    last, first = (float(x.grad[image].float().abs().mean()) for image in (-1, 0))
    assert last == pytest.approx(first, rel=0.05)


def test_the_fused_loss_is_the_reference_at_full_width():
    from dino_fast.step.kernels.dino_loss import fused_dino_loss

    views, batch, width = 8, 16, 65536
    torch.manual_seed(0)
    # Gradients as small as these lose digits in float16: to round them is 1.98e-3.
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 1e-2)):
        student = (torch.rand(views * batch, width, device="cuda") * 2 - 1).to(dtype)
        teacher = (torch.rand(2 * batch, width, device="cuda") * 2 - 1).to(dtype)
        center = torch.rand(1, width, device="cuda") * 0.1
        wide = student.double().requires_grad_()
        expected = compute_objective(wide, teacher.double(), center.double(), 0.1, 0.04, views)
        expected.loss.backward()
        given = student.clone().requires_grad_()
        found = fused_dino_loss(given * 1, teacher, center, 0.1, torch.tensor([0.04], device="cuda"), views)
        found.loss.backward()
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        assert float(found.teacher_entropy) == pytest.approx(float(expected.teacher_entropy), rel=1e-4)
        torch.testing.assert_close(found.teacher_mean.double(), expected.teacher_mean, rtol=1e-4, atol=1e-6)
        assert (given.grad.double() - wide.grad).norm() < tolerance * wide.grad.norm()
