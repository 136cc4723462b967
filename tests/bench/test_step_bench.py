"""The benchmarks of the step: rooflines, classes of kernels, rounds, and the figures of each command."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import end_to_end, roofline, step, step_arms
from bench.baselines import Network
from bench.end_to_end import ALONE, FED, PUBLISHED, WARM_UP, Setup
from bench.kernel_classes import (
    CLASSES,
    classify_kernel,
    find_kernel_folders,
    find_launched,
    find_our_kernels,
    make_kernel_rows,
    make_profile_figures,
    print_kernels,
    profile_step,
    sum_by_class,
)
from bench.step import PROBES
from bench.step_arms import ARM_KINDS, Arm, ArmKind
from dino_fast.config import Recipe
from dino_fast.model.backbones import build_backbone
from dino_fast.model.flops import flops_an_image, head_flops
from dino_fast.model.head import HeadRecipe
from pipelines.crops import CropRecipe
from shards.__main__ import main as make_shards

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
RECIPE = Recipe(precision="bf16", crops=CropRecipe(locals=6))
TINY = ["--backbone", "resnet18", "--batch", "2", "--global_size", "32", "--local_size", "24", "--locals", "2"]
TINY += ["--prototypes", "64", "--rounds", "1", "--steps", "1"]
rates = st.floats(1e9, 1e16)


# Rooflines


def test_the_rooflines_of_an_h200_are_those_once_derived():
    found = roofline.compute_rooflines(4.3e12, 790e12, RECIPE)
    assert found == pytest.approx({"eager": 2110, "pointwise-fused": 2750, "conv-fused": 3970}, rel=0.03)
    assert found == pytest.approx({"eager": 2113, "pointwise-fused": 2756, "conv-fused": 4073}, rel=5e-4)


def test_an_image_is_93_gflop():
    assert flops_an_image(RECIPE) == pytest.approx(93.0e9, rel=0.002)
    assert head_flops(RECIPE) == pytest.approx(1.3e9, rel=0.03)


@pytest.mark.parametrize("locals_", [0, 3])
def test_flops_are_those_that_torch_counts(locals_: int):
    crops = CropRecipe(global_size=70, local_size=40, locals=locals_)
    recipe = Recipe(backbone="resnet18", crops=crops, head=HeadRecipe(out_dim=512))
    with torch.device("meta"):
        student, teacher = (Network(*build_backbone(recipe.backbone), recipe.head) for _ in range(2))
        teacher.requires_grad_(False)
        globals_, small = torch.empty(2, 3, 70, 70), torch.empty(locals_, 3, 40, 40)
        with FlopCounterMode(display=False) as counter:
            teacher([globals_])
            student([globals_, small] if locals_ else [globals_]).sum().backward()
    assert flops_an_image(recipe) == counter.get_total_flops()


@given(bandwidth=rates, rate=rates)
def test_less_traffic_is_faster_and_twice_the_machine_twice_as_fast(bandwidth: float, rate: float):
    found = roofline.compute_rooflines(bandwidth, rate, RECIPE)
    assert found["eager"] < found["pointwise-fused"] < found["conv-fused"]
    twice = roofline.compute_rooflines(2 * bandwidth, 2 * rate, RECIPE)
    assert twice == pytest.approx({name: 2 * images for name, images in found.items()})
    assert max(found.values()) <= rate / flops_an_image(RECIPE) * 1.000001


def test_the_limits_are_arithmetic_alone_and_traffic_alone():
    arithmetic = roofline.compute_rooflines(1e30, 1e12, RECIPE)
    assert arithmetic == pytest.approx(dict.fromkeys(roofline.TRAFFIC, 1e12 / flops_an_image(RECIPE)))
    student, teacher = 2 + 6 * (96 / 224) ** 2, 2
    half, full = (roofline.compute_rooflines(1e12, 1e30, replace(RECIPE, precision=p)) for p in ("bf16", "fp32"))
    for name, traffic in roofline.TRAFFIC.items():
        assert half[name] == pytest.approx(1e12 / (student * traffic.both + teacher * traffic.forward))
        assert full[name] == pytest.approx(half[name] / 2)


def test_larger_and_more_crops_are_slower():
    def images(**crops: int) -> float:
        return roofline.compute_rooflines(4e12, 8e14, replace(RECIPE, crops=CropRecipe(**crops)))["eager"]

    assert images(locals=0) > images(locals=1) > images(locals=8) > images(locals=8, local_size=128)
    assert images(locals=0, global_size=160) == pytest.approx(images(locals=0) * (224 / 160) ** 2, rel=0.02)


def test_a_backbone_whose_traffic_is_unknown_is_refused():
    with pytest.raises(ValueError, match="resnet18"):
        roofline.compute_rooflines(1e12, 1e12, replace(RECIPE, backbone="resnet18"))


@pytest.mark.slow
def test_the_probes_are_in_reach_of_a_processor():
    found = roofline.run_probes(CPU, torch.float32)
    assert 0.5 < found["bandwidth"] < 2000
    assert 0.001 < found["compute"] < 50


def test_time_call_gives_the_seconds_of_one_call(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: clock[0])

    def work() -> None:
        clock[0] += 0.125

    assert roofline.time_call(work, CPU) == 0.125
    assert clock[0] == 0.625  # one that is not counted, and half a second


def test_shares_are_of_the_same_rounds_probes():
    probed = [{"bandwidth": 4300.0, "compute": 790.0}, {"bandwidth": 2150.0, "compute": 395.0}]
    rounds = {"ours": [{"images": 1000.0, "compute": 79.0}, {"images": 1000.0, "compute": 79.0}], PROBES: probed}
    step.add_shares(rounds, RECIPE)
    for name in roofline.TRAFFIC:
        first, second = (figures[f"{name} roofline"] for figures in rounds["ours"])
        assert second == pytest.approx(2 * first)
        [line, _] = roofline.make_roofline_arms(probed, RECIPE)[f"{name} roofline"]
        assert first == pytest.approx(100 * 1000 / line["images"])
    assert [figures["GEMM share"] for figures in rounds["ours"]] == pytest.approx([10, 20])
    # By hand: 2 globals and 6 locals of (96 / 224)² through the student, 2 globals forward through the teacher.
    by_hand = 1000 * ((2 + 6 * (96 / 224) ** 2) * 364e6 + 2 * 117e6) / 1e9
    assert [figures["traffic"] for figures in rounds["ours"]] == pytest.approx([by_hand, by_hand])
    assert [figures["copy share"] for figures in rounds["ours"]] == pytest.approx([by_hand / 43, by_hand / 21.5])
    assert probed[0].keys() == {"bandwidth", "compute"}
    step.add_shares(alone := {"ours": [{"images": 1.0}]}, RECIPE)
    assert alone == {"ours": [{"images": 1.0}]}


# Kernels


@pytest.mark.parametrize(
    ("kind", "names"),
    {
        "conv": [
            "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn",
            "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128_32x4_nhwc>",
            "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>",
            "void wgrad2d_grouped_direct_kernel<__half, float>",
            "aten::mkldnn_convolution",
            "aten::convolution_backward",
        ],
        "batch norm": [
            "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>",
            "void cudnn::bn_bw_1C11_kernel_new<__half, float, float2, 512, true, 1>",
            "void at::native::batch_norm_collect_statistics_channels_last_kernel<Var, c10::BFloat16, float>",
            "triton_red_fused__native_batch_norm_legit_functional_relu_3",
            "triton_poi_fused_add_native_batch_norm_backward_threshold_backward_7",
            "triton_per_fused__native_batch_norm_legit_functional_convolution_copy__12",
            "triton_red_fused__to_copy_native_batch_norm_backward_4",
            "cudnn_infer_nhwc_bn_fwd_train",
            "aten::native_batch_norm",
            "aten::native_batch_norm_backward",
        ],
        "pointwise": [
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<threshold_kernel_impl<float>>>",
            "void at::native::vectorized_elementwise_kernel<8, GeluCUDAKernelImpl>",
            "triton_poi_fused_convolution_relu_1",
            "triton_poi_fused__to_copy_0",
            "triton_poi_fused_max_pool2d_with_indices_3",
            "triton_per_fused_linalg_vector_norm_2",
            "triton_for_fused_1",
            "void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::Half, int>",
            "aten::relu_",
            "aten::threshold_backward",
            "aten::add_",
            "aten::gelu",
            "aten::mul",
        ],
        "matmul": [
            "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT",
            "ampere_sgemm_128x64_tn",
            "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
            "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_256x128_16x3_tn_align4>",
            "aten::addmm",
            "aten::mm",
            "aten::bmm",
        ],
        "loss": [
            "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, LogSoftMaxForwardEpilogue>",
            "aten::_softmax",
            "aten::_log_softmax_backward_data",
        ],
        "update": [
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>, LpNormFunctor>",
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedSgdMathFunctor<float, 3>>",
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float>>>",
            "aten::_foreach_mul_",
            "aten::_fused_sgd_",
            "aten::linalg_vector_norm",
            "Optimizer.step#SGD.step",
        ],
        "copy": [
            "Memcpy DtoD (Device -> Device)",
            "Memset (Device)",
            "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(TensorIteratorBase&)>",
            "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true>",
            "void cudnn::engines_precompiled::nhwcAddPaddingKernel<__half, __half, float, true>",
            "void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<4u>, unsigned int, 4, 64, 64>",
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
            "aten::copy_",
            "aten::cat",
            "aten::zero_",
        ],
        "other": [
            "void at::native::reduce_kernel<512, MeanOps<float>>",
            "aten::empty",
            "ncclDevKernel_AllReduce_Sum_f32",
        ],
    }.items(),
)
def test_classes_of_kernels(kind: str, names: list[str]):
    assert {name: classify_kernel(name) for name in names} == dict.fromkeys(names, kind)


def test_our_kernels_have_the_class_of_their_file():
    found = find_our_kernels()
    assert {"loss", "update"} <= set(found.values()) <= set(CLASSES)
    assert all(classify_kernel(name) == kind for name, kind in found.items())


def test_no_two_files_launch_kernels_of_one_name():
    """A profile knows them by these alone."""
    files = [file for folder in find_kernel_folders() for file in folder.glob("*.py")]
    names = [name for file in files for name in find_launched(file.read_text())]
    assert sorted(names) == sorted(set(names))


def test_a_kernel_that_others_call_is_not_launched():
    source = """
@triton.jit
def _sum(values):
    return tl.sum(values)

@triton.jit(do_not_specialize=["batch"])
def _loss(logits, batch):
    _sum(logits)

def loss(logits):
    _loss[(1,)](logits, len(logits))
"""
    assert find_launched(source) == ["_loss"]


def test_times_are_summed_by_class():
    found = sum_by_class([("aten::mm", 1.0), ("aten::bmm", 2.0), ("aten::relu", 4.0), ("who knows", 8.0)])
    assert found == {f"in {kind}": 0.0 for kind in CLASSES} | {"in matmul": 3.0, "in pointwise": 4.0, "in other": 8.0}


def test_a_profile_on_a_processor_is_of_operators():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    arm = Arm(lambda globals_, locals_: network(globals_).sum().backward(), (torch.randn(4, 3, 32, 32), torch.empty(0)))
    timed = profile_step(arm, CPU)
    found = make_profile_figures(timed, CPU, by_class=True)
    assert found.keys() == {f"in {kind}" for kind in CLASSES}
    assert min(found["in conv"], found["in batch norm"], found["in pointwise"]) > 0
    assert found["in loss"] == found["in update"] == 0
    assert not make_profile_figures(timed, CPU, by_class=False)


def test_a_row_of_each_kernel_the_most_expensive_first():
    found = [("aten::mm", 1.0), ("aten::relu", 4.0), ("aten::mm", 2.5), ("x" * 300, 0.5)]
    assert make_kernel_rows("ours", found) == [
        {"arm": "ours", "kernel": "aten::relu", "class": "pointwise", "launches": 1, "ms": 4.0},
        {"arm": "ours", "kernel": "aten::mm", "class": "matmul", "launches": 2, "ms": 3.5},
        {"arm": "ours", "kernel": "x" * 200, "class": "other", "launches": 1, "ms": 0.5},
    ]


def test_ten_kernels_are_shown_and_the_sum_of_the_others(capsys: pytest.CaptureFixture[str]):
    rows = make_kernel_rows("ours", [(f"aten::mm_{number:02d}", float(number)) for number in range(1, 13)])
    print_kernels("ours", rows)
    head, *shown, rest = capsys.readouterr().out.splitlines()
    assert head == "ours: 12 kernels, 78.00 ms a step"
    assert [line.split()[-1] for line in shown] == [f"aten::mm_{number:02d}" for number in range(12, 2, -1)]
    assert rest.split() == ["3.000", "ms", "2", "×", "all", "others"]


# Rounds


def test_a_round_counts_images_a_second(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("bench.step_arms.time.perf_counter", lambda: clock[0])

    def slow(globals_: torch.Tensor, locals_: torch.Tensor) -> None:
        clock[0] += 0.5

    arm = Arm(slow, (torch.empty(0), torch.empty(0)))
    found = step_arms.measure_round(arm, replace(RECIPE, batch_size=8), CPU, steps=3)
    assert found.pop("compute") == pytest.approx(16 * 93e-3, rel=0.002)
    assert found == {"step": 500.0, "images": 16.0}


def test_every_arm_sees_the_same_images():
    recipe = replace(RECIPE, batch_size=2, crops=CropRecipe(global_size=32, local_size=24, locals=3))
    plain, fast = (ARM_KINDS[name].views(recipe, CPU) for name in ("published", "ours"))
    for one, two, shape in zip(plain, fast, [(4, 3, 32, 32), (6, 3, 24, 24)], strict=True):
        assert one.shape == two.shape == shape
        assert one.dtype == torch.float32
        assert one.is_contiguous()
        assert two.dtype == torch.bfloat16
        assert two.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(one.bfloat16(), two, rtol=0, atol=0)


def test_an_arm_that_cannot_run_is_left_out_with_the_reason(capsys: pytest.CaptureFixture[str]):
    assert ARM_KINDS["ours-graphed"].find_problem(CPU) is not None
    kinds = {name: ARM_KINDS[name] for name in ("ours-graphed", "ours-fused")}
    assert not list(step_arms.build_arms(kinds, RECIPE, CPU, steps=1))
    assert capsys.readouterr().out.splitlines() == [
        "left out: ours-graphed (CUDA graphs need a GPU)",
        "left out: ours-fused (our kernels need a GPU)",
    ]


class FakeStep:
    """A step that ends at once, or raises when it runs for the nth time."""

    def __init__(self, raises: dict[int, BaseException]) -> None:
        self._calls, self._raises = 0, raises

    def __call__(self, globals_: torch.Tensor, locals_: torch.Tensor) -> None:
        self._calls += 1
        if self._calls in self._raises:
            raise self._raises[self._calls]


def run_step_command(
    monkeypatch: pytest.MonkeyPatch, folder: Path, arms: dict[str, dict[int, BaseException] | BaseException]
) -> dict[str, Any]:
    """Run the command in this process with such arms: what each raises in a step, or when it is built. Returns its
    records as (arm, metric): row."""

    def build(raises: dict[int, BaseException] | BaseException, *_: Any) -> FakeStep:
        if isinstance(raises, BaseException):
            raise raises
        return FakeStep(raises)

    kinds = {
        name: ArmKind(partial(build, raises), lambda *_: (torch.empty(0), torch.empty(0)))
        for name, raises in arms.items()
    }
    monkeypatch.setattr("bench.step.ARM_KINDS", kinds)
    words = [*TINY, "--rounds", "3", "--json", str(folder / "out.jsonl"), "--kernels", str(folder / "kernels.jsonl")]
    monkeypatch.setattr(sys, "argv", ["bench.step", *words])
    monkeypatch.setattr("bench.step.profile_step", lambda *_: [("aten::mm", 2.0)])
    step.main()
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    return {(row["arm"], row["metric"]): row for row in rows}


def test_an_arm_that_fails_costs_only_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    memory, broken = RuntimeError("out of memory"), RuntimeError("broken")
    found = run_step_command(monkeypatch, tmp_path, {"unbuilt": memory, "broken": {2: broken}, "good": {}})
    assert {arm for arm, _ in found} == {"good"}
    assert found["good", "step"]["n"] == 3
    printed = capsys.readouterr().out.splitlines()
    assert "left out: unbuilt (RuntimeError: out of memory)" in printed
    assert "left out: broken (RuntimeError: broken)" in printed
    kernel_rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["kernel"], row["ms"]) for row in kernel_rows] == [("good", "aten::mm", 2.0)]


@pytest.mark.parametrize(("call", "rounds"), [(2, 1), (3, 1), (4, 2)])
def test_sigint_leaves_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: int, rounds: int, capsys: pytest.CaptureFixture[str]
):
    """The first call is the round after building, and counts where no round is complete."""
    found = run_step_command(monkeypatch, tmp_path, {"first": {}, "second": {call: KeyboardInterrupt()}})
    assert {arm for arm, _ in found} == {"first", "second"}
    assert found["first", "step"]["n"] == found["second", "step"]["n"] == rounds
    assert ("only the first round" in capsys.readouterr().out) == (call == 2)


def test_sigint_while_an_arm_is_built_leaves_those_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    found = run_step_command(monkeypatch, tmp_path, {"first": {}, "slow": KeyboardInterrupt(), "never": {}})
    assert {arm for arm, _ in found} == {"first"}
    assert found["first", "step"]["n"] == 1


def test_without_an_arm_the_command_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(SystemExit, match="no arm was measured"):
        run_step_command(monkeypatch, tmp_path, {"unbuilt": ValueError()})


class FakeLoader:
    """Batches that each take half a second by the clock, of which the step waits for a fifth."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.stall, self.starts, self.closed = clock, 0.0, [], 0

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        self.starts.append(start)
        try:
            for _ in range(start, stop):
                self.clock[0] += 0.5
                self.stall += 0.1
                yield SimpleNamespace(globals="globals", locals="locals")
        finally:
            self.closed += 1

    def read_figures(self) -> Any:
        stall, self.stall = self.stall, 0.0
        return SimpleNamespace(stall=stall)


def test_a_round_of_loader_and_step_counts_after_its_warm_up(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: clock[0])
    seen: list[Any] = []
    loader: Any = FakeLoader(clock)
    monkeypatch.setattr(end_to_end.time, "process_time", lambda: 3 * clock[0])
    setup = Setup(lambda *views: seen.append(views), batch=8, steps=5, device=CPU)
    found = [end_to_end.measure_fed(setup, loader) for _ in range(2)]
    assert found == [pytest.approx({"images": 16, "step": 500, "stall": 20, "busy cores": 3})] * 2
    assert seen == [("globals", "locals")] * 2 * (WARM_UP + 5)
    assert loader.starts == [0, WARM_UP + 5]
    assert loader.closed == 2


def test_the_ratio_is_of_the_same_round():
    other = f"{FED}, prefetch 4"
    rounds = {ALONE: [{"images": 10.0}, {"images": 20.0}], FED: [{"images": 9.0}, {"images": 10.0}]}
    rounds[other] = [{"images": 5.0}, {"images": 5.0}]
    end_to_end.add_ratio({ALONE: [{"images": 10.0}]})  # without the other nothing
    end_to_end.add_ratio(rounds)
    assert [figures["of the step alone"] for figures in rounds[FED]] == [90, 50]
    assert [figures["of the step alone"] for figures in rounds[other]] == [50, 25]
    assert all(figures.keys() == {"images"} for figures in rounds[ALONE])


# The commands


def run(module: str, arguments: list[str], folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records that a benchmark wrote, and the lines that it printed."""
    file = folder / "out.jsonl"
    call = [sys.executable, "-m", module, *arguments, "--json", str(file)]
    # On a CPU anywhere, by one thread: tiny tensors lose more to waking threads than they gain.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in file.read_text().splitlines()], done.stdout.splitlines()


def assert_records(rows: list[dict[str, Any]], bench: str) -> None:
    for row in rows:
        assert row["bench"] == bench
        assert row.keys() >= {"median", "q25", "q75", "n", "machine", "versions", "commit", "time"}
        assert row["n"] == 1
        assert math.isfinite(row["median"])


@pytest.mark.slow
def test_the_command_measures_the_step(tmp_path: Path):
    names = ["published", "stock", "ours"]
    table = tmp_path / "kernels.jsonl"
    words = [*TINY, "--profile", "--kernels", str(table), "--only", *names, "ours-graphed"]
    rows, printed = run("bench.step", words, tmp_path)
    assert_records(rows, "step")
    figures = {(row["arm"], row["metric"]): row["median"] for row in rows}
    metrics = {"images", "step", "compute", *(f"in {kind}" for kind in CLASSES)}
    assert figures.keys() == {(name, metric) for name in names for metric in metrics}
    for name in names:
        assert figures[name, "images"] == pytest.approx(2000 / figures[name, "step"])
        assert figures[name, "in conv"] > 0
        assert figures[name, "in loss"] > 0
        of_arm = [row for row in map(json.loads, table.read_text().splitlines()) if row["arm"] == name]
        assert sum(row["ms"] for row in of_arm) == pytest.approx(sum(figures[name, f"in {kind}"] for kind in CLASSES))
        assert any(line.startswith(f"{name}: {len(of_arm)} kernels") for line in printed)
    assert sum(line.startswith("left out") for line in printed) == 2  # ours-graphed and the rooflines
    assert any("resnet18, 2×32 + 2×24, K = 64, batches of 2, bf16" in line for line in printed)


@pytest.mark.slow
def test_the_command_measures_loader_and_step(make_class_folders, tmp_path: Path):
    source = make_class_folders(classes=2, per_class=6)
    assert make_shards(["pack", str(source), str(tmp_path / "shards"), "--workers", "1"]) == 0
    rows, printed = run("bench.end_to_end", [str(tmp_path / "shards"), *TINY, "--published"], tmp_path)
    assert_records(rows, "end to end")
    figures = {(row["arm"], row["metric"]): row["median"] for row in rows}
    assert figures.keys() == {(arm, metric) for arm in (ALONE, FED, PUBLISHED) for metric in ("images", "step")} | {
        (FED, "stall"),
        (FED, "busy cores"),
        (FED, "of the step alone"),
    }
    assert 0 <= figures[FED, "stall"] <= 100
    assert figures[FED, "of the step alone"] == pytest.approx(100 * figures[FED, "images"] / figures[ALONE, "images"])
    assert len(printed) >= 1 + len(rows)


@pytest.mark.slow
def test_the_command_measures_the_rooflines(tmp_path: Path):
    rows, _ = run("bench.roofline", ["--precision", "fp32", "--rounds", "1"], tmp_path)
    assert_records(rows, "roofline")
    figures = {(row["arm"], row["metric"]): row["median"] for row in rows}
    bounds = [figures[f"{name} roofline", "images"] for name in roofline.TRAFFIC]
    assert figures.keys() - {(f"{name} roofline", "images") for name in roofline.TRAFFIC} == {
        (PROBES, "bandwidth"),
        (PROBES, "compute"),
    }
    assert 0 < bounds[0] < bounds[1] < bounds[2]
