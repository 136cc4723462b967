"""The fused update against the functions of `step/optimizers.py`: interpreted where there is no GPU, else compiled."""

import copy
import io
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dino_fast.step.hyper import Hyper
from dino_fast.step.optimizers import OptimRecipe, build_optimizer, clip_gradients, set_hyper, update_ema
from tests.interpreted import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Name = Literal["sgd", "adamw", "lars"]
NAMES: tuple[Name, ...] = ("sgd", "adamw", "lars")
HYPERS = [
    Hyper(lr=0.5, weight_decay=0.25, momentum=0.996, teacher_temp=0.04, freeze_last_layer=False),
    Hyper(lr=0.1, weight_decay=0.04, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False),
    Hyper(lr=0.03, weight_decay=0.4, momentum=0.99995, teacher_temp=0.04, freeze_last_layer=False),
]
FROZEN = [replace(HYPERS[0], freeze_last_layer=True), HYPERS[1]]
# Interpreted, inf - inf and products that overflow are numpy's, which warns of what is expected here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

fused = kernels("dino_fast.step.kernels.update")


def odd_network() -> nn.ParameterDict:
    """Tails, a second block, a second chunk, other memory orders, no values; `gain` is not trained."""
    shapes: dict[str, tuple[int, ...]] = {
        "vector": (5,), "scale": (1027,), "matrix": (7, 13), "block": (32, 32), "large": (97, 100), "empty": (0, 3),
        "kernel": (4, 3, 3, 3), "pointwise": (8, 6, 1, 1), "idle": (3, 2), "last": (6, 4), "gain": (6, 1),
    }  # fmt: skip
    return network(shapes)


def small_network() -> nn.ParameterDict:
    """As few tensors as show what depends on one of them."""
    return network({"vector": (5,), "matrix": (7, 13), "kernel": (4, 3, 3, 3), "last": (6, 4), "gain": (6, 1)})


def network(shapes: dict[str, tuple[int, ...]]) -> nn.ParameterDict:
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    layouts = {name: torch.channels_last if t.ndim == 4 else torch.contiguous_format for name, t in tensors.items()}
    model = nn.ParameterDict({name: t.contiguous(memory_format=layouts[name]) for name, t in tensors.items()})
    for name, param in model.items():
        param.requires_grad_(name != "gain")
    return model.to(DEVICE)


def gradients(model: nn.ParameterDict, seed: int) -> dict[str, Tensor]:
    """Some longer and some shorter than 1, to which tests clip; none for what is idle or not trained."""
    r = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(p.shape, generator=r) * 10 ** (2 * torch.rand((), generator=r) - 3)).to(DEVICE)
        for name, p in model.items()
        if name not in ("idle", "gain")
    }


class Reference:
    """The functions of `dino_fast.step.optimizers`, in whatever type the networks are of."""

    def __init__(self, name: Name, student: nn.ParameterDict, teacher: nn.ParameterDict, clip: float) -> None:
        self.student, self.teacher, self.clip = student, teacher, clip
        self.optimizer = build_optimizer(OptimRecipe(name=name), student)

    def __call__(self, grads: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """The gradients' norms."""
        for name, p in self.student.items():
            p.grad = grads[name].to(p.dtype, copy=True) if name in grads else None
        finite = all(grad.isfinite().all() for grad in grads.values())
        norms = clip_gradients(self.student.parameters(), self.clip)
        if hyper.freeze_last_layer:
            self.student["last"].grad = None
        set_hyper(self.optimizer, hyper.lr, hyper.weight_decay)
        if finite:
            self.optimizer.step()
        update_ema(self.teacher, self.student, hyper.momentum)
        return norms


class Fused:
    """The same by the kernels. `scale` is the loss scale that the gradients come with."""

    def __init__(
        self, name: Name, student: nn.ParameterDict, teacher: nn.ParameterDict, clip: float, scale: float = 1.0
    ) -> None:
        self.student, self.teacher, self.scale = student, teacher, scale
        self.optimizer = build_optimizer(OptimRecipe(name=name), student)
        frozen = [student["last"]] if "last" in student else []
        self.update = fused.FusedUpdate(self.optimizer, student, teacher, clip, frozen)
        self.hyper = torch.zeros(5, device=DEVICE)

    def __call__(self, grads: dict[str, Tensor], hyper: Hyper) -> Any:
        for name, p in self.student.items():
            p.grad = grads[name] * self.scale if name in grads else None
        self.hyper.copy_(torch.tensor(fused.pack(hyper)))
        inverse = None if self.scale == 1 else torch.tensor([1 / self.scale], device=DEVICE)
        return self.update(self.hyper, inverse)


def pair(name: Name, student: nn.ParameterDict, clip: float = 0.0, scale: float = 1.0) -> tuple[Fused, Reference]:
    """The kernels and the reference in float64, from the same start, teacher and student apart."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    for p in teacher.parameters():
        p.mul_(0.5)
    exact = Reference(name, copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), clip)
    return Fused(name, student, teacher, clip, scale), exact


def tensors(run: Fused | Reference) -> dict[str, Tensor]:
    """Networks and optimizer states, by name. A state that is not there yet is zero."""
    found = {f"student.{name}": p.detach() for name, p in run.student.items()}
    found |= {f"teacher.{name}": p.detach() for name, p in run.teacher.items()}
    names = ["exp_avg", "exp_avg_sq"] if isinstance(run.optimizer, torch.optim.AdamW) else ["momentum_buffer"]
    for name, p in run.student.items():
        state = run.optimizer.state.get(p, {})
        found |= {f"{key}.{name}": state.get(key, torch.zeros_like(p)) for key in names}
        if p.numel():  # or nobody can tell how many steps there were
            found[f"step.{name}"] = torch.as_tensor(state.get("step", 0.0))
    return found


def assert_alike(ours: Fused | Reference, theirs: Fused | Reference, ulps: float = 8) -> None:
    """Within some float32 roundings of each tensor's largest value."""
    expected = tensors(theirs)
    for name, found in tensors(ours).items():
        want = expected[name].to(DEVICE, torch.float64)
        atol = ulps * 2**-24 * want.abs().max().item() if want.numel() else 0
        torch.testing.assert_close(
            found.to(DEVICE, torch.float64), want, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("hypers", [HYPERS[:2], FROZEN], ids=["free", "frozen"])
def test_it_is_the_reference(name: Name, clip: float, scale: float, hypers: list[Hyper]) -> None:
    ours, exact = pair(name, odd_network(), clip, scale)
    for seed, hyper in enumerate(hypers):
        grads = gradients(ours.student, seed)
        updated, norms = ours(grads, hyper), exact(grads, hyper)
        assert_alike(ours, exact)
        torch.testing.assert_close(updated.grad_norms.double(), norms, rtol=1e-6, atol=0)
        torch.testing.assert_close(updated.grad_norm.double(), norms.norm(), rtol=1e-6, atol=0)
        assert updated.skipped.item() == 0


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_reference_where_memory_is_aligned(name: Name) -> None:
    shapes = {"matrix": (12, 12), "kernel": (4, 4, 3, 3), "large": (96, 100), "bias": (8,)}
    ours, exact = pair(name, network(shapes), 1.0)
    for seed, hyper in enumerate(HYPERS):
        grads = gradients(ours.student, seed)
        ours(grads, hyper), exact(grads, hyper)
    assert_alike(ours, exact)


@settings(max_examples=12, derandomize=True)
@given(
    name=st.sampled_from(NAMES), clip=st.sampled_from([0.0, 1e-3, 1.0]), seed=st.integers(0, 1000),
    shapes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4),
)  # fmt: skip
def test_any_shapes(name: Name, clip: float, seed: int, shapes: list[tuple[int, ...]]) -> None:
    ours, exact = pair(name, network({str(number): shape for number, shape in enumerate(shapes)}), clip)
    for hyper in HYPERS[:2]:
        grads = gradients(ours.student, seed)
        ours(grads, hyper), exact(grads, hyper)
    assert_alike(ours, exact)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("value", "where"), [(torch.inf, "kernel"), (-torch.inf, "last"), (torch.nan, "vector")])
def test_a_gradient_that_is_not_finite_moves_the_teacher_only(name: Name, value: float, where: str) -> None:
    ours, exact = pair(name, small_network(), 1.0, 1024.0)
    grads = gradients(ours.student, 0)
    ours(grads, HYPERS[0]), exact(grads, HYPERS[0])
    before = {name: tensor.clone() for name, tensor in tensors(ours).items()}
    grads[where].view(-1)[-1] = value
    updated = ours(grads, FROZEN[0])
    exact(grads, FROZEN[0])
    assert updated.skipped.item() == 1
    assert not updated.grad_norm.isfinite()
    for key, found in tensors(ours).items():
        if not key.startswith("teacher."):
            assert torch.equal(found, before[key]), key
    assert_alike(ours, exact)  # the teacher
    grads = gradients(ours.student, 1)
    assert ours(grads, HYPERS[1]).skipped.item() == 0
    exact(grads, HYPERS[1])
    assert_alike(ours, exact)


def test_a_norm_that_overflows_is_clipped_to_nothing_as_in_float32() -> None:
    student = network({"matrix": (7, 13)})
    ours = Fused("sgd", student, copy.deepcopy(student), 1.0)
    plain = Reference("sgd", copy.deepcopy(student), copy.deepcopy(student), 1.0)
    grads = {"matrix": torch.full((7, 13), 1e25, device=DEVICE)}
    updated, norms = ours(grads, HYPERS[0]), plain(grads, HYPERS[0])
    assert updated.grad_norm.item() == norms.norm().item() == torch.inf
    assert updated.skipped.item() == 0
    assert_alike(ours, plain)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gradient_only_the_teacher_moves(name: Name) -> None:
    ours, exact = pair(name, small_network(), 1.0)
    for seed, missing in enumerate([{"vector"}, {"matrix", "kernel"}, set()]):
        before = {name: tensor.clone() for name, tensor in tensors(ours).items()}
        grads = {k: g for k, g in gradients(ours.student, seed).items() if k not in missing}
        ours(grads, HYPERS[seed]), exact(grads, HYPERS[seed])
        after = tensors(ours)
        for key in (f"{kind}.{tensor}" for tensor in missing for kind in ("student", "momentum_buffer", "step")):
            assert key not in after or torch.equal(after[key], before[key])
        assert_alike(ours, exact)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_may_have_another_memory_order(name: Name) -> None:
    (ours, exact), grads = pair(name, odd_network()), gradients(odd_network(), 0)
    grads["matrix"] = grads["matrix"].t().contiguous().t()
    grads["block"] = torch.tensor(0.25, device=DEVICE).expand(32, 32)
    assert not grads["kernel"].is_contiguous(memory_format=torch.channels_last)
    for p in (p for name, p in ours.student.items() if name in grads):
        assert p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)
    for name, p in ours.student.items():
        p.grad = grads.get(name)
    ours.hyper.copy_(torch.tensor(fused.pack(HYPERS[0])))
    ours.update(ours.hyper)
    exact(grads, HYPERS[0])
    assert_alike(ours, exact)
    assert all(p.grad is grads.get(name) for name, p in ours.student.items())


@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_may_be_views_of_a_bucket(offset: int) -> None:
    ours, exact = pair("sgd", network({"matrix": (12, 12), "kernel": (4, 4, 3, 3), "bias": (8,)}), 1.0)
    grads = gradients(ours.student, 0)
    bucket = torch.empty(1000, device=DEVICE)
    for name, p in ours.student.items():
        p.grad = bucket.as_strided(p.shape, p.stride(), offset).copy_(grads[name])
        offset += p.numel()
    ours.hyper.copy_(torch.tensor(fused.pack(HYPERS[0])))
    ours.update(ours.hyper)
    exact(grads, HYPERS[0])
    assert_alike(ours, exact)
    assert ours.update._aligned == (offset % 4 == 0)  # else addresses are not known to be multiples of 16


def test_gradients_and_rates_are_looked_up_at_every_call() -> None:
    ours, exact = pair("sgd", small_network())
    grads = gradients(ours.student, 0)
    ours(grads, HYPERS[0]), exact(grads, HYPERS[0])
    held = [p.grad for p in ours.student.parameters()]  # their memory is not given out again
    ours(grads, HYPERS[0]), exact(grads, HYPERS[0])
    assert all(a is None or a is not p.grad for a, p in zip(held, ours.student.parameters(), strict=True))
    for p in ours.student.parameters():
        if p.grad is not None:
            p.grad.mul_(-3)
    ours.hyper.copy_(torch.tensor(fused.pack(HYPERS[1])))
    ours.update(ours.hyper)
    exact({name: -3 * grad for name, grad in grads.items()}, HYPERS[1])
    assert_alike(ours, exact)


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4])
def test_lars_knows_the_norm_of_what_all_but_cancels(noise: float) -> None:
    ours, exact = pair("lars", network({"matrix": (97, 100)}))
    student = ours.student["matrix"].detach()
    grads = {"matrix": -0.25 * student * (1 + noise * torch.rand(97, 100, device=DEVICE))}
    ours(grads, HYPERS[0]), exact(grads, HYPERS[0])
    assert_alike(ours, exact)
    assert ours.optimizer.state[ours.student["matrix"]]["momentum_buffer"].abs().max() > 0


@pytest.mark.parametrize("zero", ["parameter", "gradient"])
def test_lars_does_not_rescale_where_a_norm_is_zero(zero: str) -> None:
    ours, exact = pair("lars", network({"matrix": (3, 4)}))
    grads = gradients(ours.student, 0)
    with torch.no_grad():
        for tensor in (ours.student["matrix"], exact.student["matrix"]) if zero == "parameter" else (grads["matrix"],):
            tensor.zero_()
    hyper = replace(HYPERS[0], weight_decay=0.0)
    ours(grads, hyper), exact(grads, hyper)
    assert_alike(ours, exact)
    assert torch.equal(ours.optimizer.state[ours.student["matrix"]]["momentum_buffer"], grads["matrix"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fused_first", [False, True])
def test_a_checkpoint_goes_on_the_other_way(name: Name, fused_first: bool) -> None:
    kinds = (Fused, Reference) if fused_first else (Reference, Fused)
    student = small_network()
    first = kinds[0](name, student, copy.deepcopy(student), 1.0)
    for seed, hyper in enumerate([FROZEN[0], FROZEN[0]]):  # the reference has no state of a tensor never trained
        first(gradients(first.student, seed), hyper)
    other = kinds[1](name, copy.deepcopy(first.student), copy.deepcopy(first.teacher), 1.0)
    other(gradients(student, 5), HYPERS[0])  # states of its own, to be forgotten
    other.student.load_state_dict(first.student.state_dict())
    other.teacher.load_state_dict(first.teacher.state_dict())
    other.optimizer.load_state_dict(through_a_file(first.optimizer.state_dict()))
    if isinstance(other, Fused):
        other.update.bind()
    assert_alike(other, first, ulps=0)
    for seed, hyper in enumerate(HYPERS[1:]):
        grads = gradients(student, 10 + seed)
        first(grads, hyper), other(grads, hyper)
        assert_alike(other, first)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_a_state_in_another_memory_order_is_taken_over() -> None:
    ours, exact = pair("sgd", small_network())
    for run in (ours, exact):
        kernel = run.student["kernel"]
        values = torch.arange(108.0).view(4, 3, 3, 3).to(kernel)
        run.optimizer.state[kernel]["momentum_buffer"] = values.contiguous()
    ours.update.bind()
    grads = gradients(ours.student, 0)
    ours(grads, HYPERS[0]), exact(grads, HYPERS[0])
    assert_alike(ours, exact)


def test_twice_the_same_bits() -> None:
    runs = [pair("lars", odd_network(), 1.0)[0] for _ in range(2)]
    for run in runs:
        run(gradients(run.student, 0), HYPERS[0])
    first, second = (tensors(run) for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("aligned", [False, True])
def test_copies_in_half_precision_are_what_a_cast_would_give(dtype: torch.dtype, aligned: bool) -> None:
    shapes = {"matrix": (12, 12), "kernel": (4, 4, 3, 3), "large": (96, 100), "last": (4, 4), "bias": (8,)}
    student = network(shapes) if aligned else odd_network()
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = build_optimizer(OptimRecipe(), student)
    wholes = [p for name in ("matrix", "kernel", "large", "last") for p in (student[name], teacher[name])][:-1]
    halves = {whole: torch.zeros_like(whole, dtype=dtype, requires_grad=False) for whole in wholes}
    update = fused.FusedUpdate(optimizer, student, teacher, 1.0, [student["last"]], halves)
    for seed, hyper in enumerate([*FROZEN, HYPERS[2], HYPERS[2]]):
        grads = gradients(student, seed)
        if seed == 2:
            grads["kernel"].view(-1)[0] = torch.nan
        for name, p in student.items():
            p.grad = grads.get(name)
        update(torch.tensor(fused.pack(hyper), device=DEVICE))
        for whole, half in halves.items():
            torch.testing.assert_close(half, whole.to(dtype), rtol=last_bit(dtype), atol=0)
    with torch.no_grad():
        student["matrix"].add_(1)
    update.bind()
    assert torch.equal(halves[student["matrix"]], student["matrix"].to(dtype))


def last_bit(dtype: torch.dtype) -> float:
    """The tolerance of a cast in a kernel: none, but for triton's interpreter, which drops bfloat16's digits."""
    return 2**-7 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    ours = pair("adamw", small_network(), 1.0)[0]
    ours(gradients(ours.student, 0), HYPERS[0])
    for p in ours.student.parameters():
        p.grad = None if p.grad is None else p.grad.clone()  # elsewhere
    try:
        torch.cuda.set_sync_debug_mode("error")
        updated = ours.update(ours.hyper)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert updated.skipped.item() == 0


def test_what_it_cannot_update_is_refused() -> None:
    def build(student: nn.Module, teacher: nn.Module) -> None:
        fused.FusedUpdate(build_optimizer(OptimRecipe(), student), student, teacher, 0.0)

    good = network({"kernel": (4, 3, 3, 3)})
    with pytest.raises(ValueError, match=r"^kernel is torch.float64 in the student, torch.float32 in the teacher"):
        build(copy.deepcopy(good).double(), good)
    with pytest.raises(ValueError, match=r"^kernel is laid out with strides"):
        build(good, nn.ParameterDict({"kernel": good["kernel"].detach().contiguous()}))
    gaps = nn.ParameterDict({"matrix": torch.zeros(4, 6, device=DEVICE)[:, ::2]})
    with pytest.raises(ValueError, match=r"^matrix is not dense in memory"):
        build(gaps, gaps)
    for half, complaint in (
        (torch.zeros(4, 3, 3, 3, dtype=torch.float16, device=DEVICE), "not laid out as its parameter"),
        (torch.zeros_like(good["kernel"], dtype=torch.float64), "must be all float16 or all bfloat16"),
    ):
        with pytest.raises(ValueError, match=complaint):
            fused.FusedUpdate(
                build_optimizer(OptimRecipe(), good), good, copy.deepcopy(good), 0.0, halves={good["kernel"]: half}
            )
    with pytest.raises(ValueError, match="Adagrad"):
        fused.FusedUpdate(torch.optim.Adagrad(good.parameters()), good, copy.deepcopy(good), 0.0)


@given(sizes=st.lists(st.integers(1, 4), max_size=4), data=st.data())
def test_dense_is_any_order_of_dimensions_without_gaps(sizes: list[int], data: st.DataObject) -> None:
    tensor = torch.zeros(sizes).permute(data.draw(st.permutations(range(len(sizes)))))
    assert fused._is_dense(tensor)
    assert fused._is_dense(torch.zeros(*sizes, 2)[..., 0]) == all(size == 1 for size in sizes)


def test_the_complement_of_the_momentum_is_exact() -> None:
    assert fused.pack(FROZEN[0]) == [0.5, 0.25, 0.996, 1 - 0.996, 1.0]
    assert fused.pack(HYPERS[0])[fused.FREEZE.value] == 0
