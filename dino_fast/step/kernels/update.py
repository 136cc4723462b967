"""The update of a step, clipping, optimizer and moving average, over all tensors at once in three launches.

First the sums that norms are made of, a chunk of a tensor a program; then what each tensor's update hangs on; then
the update, which reads and writes every value once: with SGD 28 bytes a parameter, and 4 more where both networks
keep it in half precision, too. The rules are those of `step/optimizers.py`. A table of addresses stands for lists of
tensors, and each tensor is walked in the order of its memory. Nothing waits for the device, and sums have a fixed
order.
"""
# In kernels Triton evaluates annotations, and takes constexpr alone:
# mypy: allow-incomplete-defs

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.optim import Optimizer

from dino_fast.step.hyper import Hyper
from dino_fast.step.optimizers import LARS
from dino_fast.step.update import UpdateOutput

BLOCK = tl.constexpr(1024)  # values that a program has in registers at a time, of each tensor it reads
CHUNK = tl.constexpr(8192)  # values a program

# Places in the tensor that brings the hyper-parameters of a step; see `pack`.
LR, WEIGHT_DECAY, EMA, EMA_REST, FREEZE = (tl.constexpr(place) for place in range(5))
# The table's columns: addresses in bytes, sizes in values, chunks by their number, and 0 or 1.
PARAM, TEACHER, STATE, SECOND_STATE, HALF, TEACHER_HALF, NUMEL, FIRST_CHUNK, END_CHUNK, DECAYS, ADAPTS, FROZEN = (
    tl.constexpr(column) for column in range(12)
)
COLUMNS = tl.constexpr(12)
# Rows of the sums over chunks; the last two for LARS alone.
SQUARES, BROKEN, PRODUCTS, SIZES = (tl.constexpr(row) for row in range(4))
# Columns of what the second launch tells the third about a tensor.
MOVES, SCALE, DECAY, RATE, FACTOR = (tl.constexpr(column) for column in range(5))
COEFFICIENTS = tl.constexpr(5)

_HALVES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
AS_WRITTEN = {"enable_fp_fusion": False}  # each operation rounds, as in torch


class _Rule(NamedTuple):
    """The names of an optimizer's states, and what the kernels are compiled for."""

    states: tuple[str, ...]
    beta1: float
    adamw: bool = False
    lars: bool = False
    beta2: float = 0.0
    eps: float = 0.0
    eta: float = 0.0


class FusedUpdate:
    """Clips each gradient, moves the student by the optimizer's rule, then the teacher towards it.

    The rules are those of `clip_gradients`, `Optimizer.step` and `update_ema` in turn, gradients being unscaled first.
    The gradients themselves stay as they are. Where any of them is not finite, the optimizer does nothing at all, as
    under torch's GradScaler, and the teacher moves all the same.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        student: nn.Module,
        teacher: nn.Module,
        clip_grad: float,
        frozen: Iterable[Tensor] = (),
        halves: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """optimizer: from `build_optimizer`, still the owner of the momenta; clip_grad: 0 does not clip.

        frozen: parameters that the optimizer leaves alone while the hyper-parameters say freeze. halves: copies of
        either network's parameters in one half precision, to be kept up with them (`keep_half_weights`). Raises
        ValueError, as `bind` does, for what only the functions of `optimizers.py` can update: another optimizer,
        parameters that are not float32, not dense, or not laid out alike in student, teacher and copies.
        """
        self.optimizer, self.student, self.teacher, self.clip_grad = optimizer, student, teacher, clip_grad
        self.frozen, self.halves = set(frozen), dict(halves or {})
        self.bind()

    def bind(self) -> None:
        """Look up where all tensors lie, and copy to the halves. To be called again once the optimizer has been given
        other tensors, as its `load_state_dict` does, or a network other values.
        """
        named, averages = list(self.student.named_parameters()), list[Tensor](self.teacher.parameters())
        for (name, param), average in zip(named, averages, strict=True):
            _check(name, param, average)
        self._renew_halves()
        self._rule = _rule(self.optimizer)
        self._params = [param for _, param in named]
        self._groups = {param: group for group in self.optimizer.param_groups for param in group["params"]}
        numels = [param.numel() for param in self._params]
        rows = self._rows(averages, numels)
        self._table_aligned = _aligned([address for row in rows for address in row[: NUMEL.value]], numels)
        self._allocate(rows, _chunks(numels))

    @torch.no_grad()
    def __call__(self, hyper: Tensor, inverse_scale: Tensor | None = None) -> UpdateOutput:
        """Make one update. hyper: float32 [5] on the device, as `pack` orders it.

        inverse_scale: float32, one element on the device, what gradients are multiplied by first; None: 1.
        """
        gradients = [_gradient(param) if param in self._groups else None for param in self._params]
        self._point_at(gradients)  # copies among them must outlive the launches
        inverse = self._one if inverse_scale is None else inverse_scale
        outcome, chunks, rule = hyper.new_empty(2 + len(self._params)), len(self._chunks), self._rule
        where = self._table, self._gradients
        with torch.cuda.device_of(hyper):
            _measure[(chunks,)](
                *where, self._chunks, self._sums, inverse,
                rule.lars, self._aligned, **AS_WRITTEN,
            )  # fmt: skip
            _settle[(len(self._params),)](
                *where, self._sums, chunks, hyper, inverse, self._steps, self._coefficients, outcome,
                rule.adamw, rule.lars, rule.beta1, rule.beta2, rule.eta, self.clip_grad, **AS_WRITTEN,
            )  # fmt: skip
            _move[(chunks,)](
                *where, self._chunks, hyper, self._coefficients,
                rule.adamw, rule.beta1, rule.beta2, rule.eps, self._half, self._aligned, **AS_WRITTEN,
            )  # fmt: skip
        return UpdateOutput(outcome[0], outcome[1], outcome[2:])

    @torch.no_grad()
    def _renew_halves(self) -> None:
        for param, half in self.halves.items():
            if _layout(param) != _layout(half):
                raise ValueError(
                    f"a copy of strides {half.stride()} is not laid out as its parameter, {param.stride()}"
                )
            half.copy_(param)
        kinds = {half.dtype for half in self.halves.values()}
        if len(kinds) > 1 or kinds - _HALVES.keys():
            raise ValueError(f"copies of parameters must be all float16 or all bfloat16, not {kinds}")
        self._half = _HALVES[kinds.pop()] if kinds else None

    def _rows(self, averages: list[Tensor], numels: list[int]) -> list[list[int]]:
        """Return the table. Creates the states that the optimizer does not have yet."""
        ends = list(accumulate(triton.cdiv(numel, CHUNK.value) for numel in numels))
        rows = []
        for param, average, numel, first, end in zip(self._params, averages, numels, [0, *ends], ends, strict=False):
            states = self._states(param) if param in self._groups else []
            addresses = [tensor.data_ptr() for tensor in (param, average, *states)]
            addresses += [0] * (HALF.value - len(addresses))
            halves = [self.halves[tensor].data_ptr() if tensor in self.halves else 0 for tensor in (param, average)]
            rows.append([*addresses, *halves, numel, first, end, *self._flags(param)])
        return rows

    def _states(self, param: Tensor) -> list[Tensor]:
        state = self.optimizer.state[param]
        for name in self._rule.states:
            known = state.get(name)
            state[name] = torch.zeros_like(param) if known is None else _like(param, known)
        return [state[name] for name in self._rule.states]

    def _flags(self, param: Tensor) -> list[bool]:
        """Return DECAYS, ADAPTS and FROZEN.

        The groups of `build_optimizer` spare 1-D tensors, LARS does not adapt them.
        """
        decays = param in self._groups and self._groups[param]["decays"]
        return [decays, self._rule.lars and param.ndim != 1, param in self.frozen]

    def _allocate(self, rows: list[list[int]], chunks: list[tuple[int, int]]) -> None:
        """Allocate what the kernels read and write besides the tensors of networks and optimizer, on their device."""
        device, tensors = self._params[0].device, len(rows)
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)  # [tensors, COLUMNS]
        self._chunks = torch.tensor(chunks, dtype=torch.int64, device=device)  # [chunks, 2]: tensor, first value
        self._addresses: list[int] = []
        self._gradients = torch.zeros(tensors, dtype=torch.int64, device=device)
        # The norm of LARS's update is that of a sum of two vectors that may all but cancel; see `_trust_ratio`.
        shape, dtype = (4, torch.float64) if self._rule.lars else (2, torch.float32)
        self._sums = torch.empty(shape, len(chunks), dtype=dtype, device=device)
        self._coefficients = torch.empty(tensors, COEFFICIENTS.value, device=device)
        self._one = torch.ones(1, device=device)
        self._steps = self._shared_steps(device)

    def _shared_steps(self, device: torch.device) -> Tensor:
        """Return AdamW's step counts, [tensors], of which the optimizer's states become views."""
        states = [self.optimizer.state[param] if param in self._groups else {} for param in self._params]
        steps = torch.tensor([float(state.get("step", 0)) for state in states], device=device)
        if self._rule.adamw:
            for state, param, step in zip(states, self._params, steps.unbind(), strict=True):
                if param in self._groups:
                    state["step"] = step
        return steps

    def _point_at(self, gradients: list[Tensor | None]) -> None:
        """Tell the device where the gradients lie, if they do not lie where they did in the last step."""
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        if addresses == self._addresses:
            return
        self._addresses = addresses
        self._aligned = self._table_aligned and _aligned(addresses, [])
        if not (self._gradients.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.write_addresses()

    def write_addresses(self) -> None:
        """Write to the device where the gradients lie. To be called after a step has been recorded as a CUDA graph: a
        replay would copy from memory of the host that has long been someone else's."""
        addresses = torch.tensor(self._addresses, dtype=torch.int64, pin_memory=self._gradients.is_cuda)
        self._gradients.copy_(addresses, non_blocking=True)


def pack(hyper: Hyper) -> list[float]:
    """Return the five values, in order, of the tensor that an update takes.

    1 - momentum would lose digits in float32.
    """
    return [hyper.lr, hyper.weight_decay, hyper.momentum, 1 - hyper.momentum, float(hyper.freeze_last_layer)]


def _rule(optimizer: Optimizer) -> _Rule:
    """Return how the optimizer updates. Raises ValueError for one that `build_optimizer` does not build."""
    group: dict[str, Any] = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.AdamW):
        beta1, beta2 = group["betas"]
        return _Rule(("exp_avg", "exp_avg_sq"), beta1, adamw=True, beta2=beta2, eps=group["eps"])
    if isinstance(optimizer, LARS):
        return _Rule(("momentum_buffer",), group["momentum"], lars=True, eta=group["eta"])
    if isinstance(optimizer, torch.optim.SGD):
        return _Rule(("momentum_buffer",), group["momentum"])
    raise ValueError(f"there is no fused update for {type(optimizer).__name__}, only for SGD, AdamW and LARS")


def _check(name: str, param: Tensor, average: Tensor) -> None:
    if param.dtype != torch.float32 or average.dtype != torch.float32:
        raise ValueError(
            f"{name} is {param.dtype} in the student, {average.dtype} in the teacher; both must be float32"
        )
    if not _is_dense(param):
        raise ValueError(f"{name} is not dense in memory: shape {tuple(param.shape)}, strides {param.stride()}")
    if _layout(param) != _layout(average):
        raise ValueError(
            f"{name} is laid out with strides {param.stride()} in the student, {average.stride()} in the teacher"
        )


def _is_dense(tensor: Tensor) -> bool:
    """Return whether its values fill one piece of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in _layout(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    """Return size and stride of each dimension that is longer than 1: the stride of the others means nothing."""
    return [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def _like(param: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy of it where its type, device or memory order is not that of `param`."""
    alike = tensor.stride() == param.stride() or _layout(tensor) == _layout(param)
    if alike and tensor.dtype == param.dtype and tensor.device == param.device:
        return tensor
    return torch.empty_like(param).copy_(tensor)


def _gradient(param: Tensor) -> Tensor | None:
    return None if param.grad is None else _like(param, param.grad)


def _chunks(numels: list[int]) -> list[tuple[int, int]]:
    """Return the tensor number and the first value of each chunk."""
    return [(tensor, first) for tensor, numel in enumerate(numels) for first in range(0, numel, CHUNK.value)]


def _aligned(addresses: list[int], numels: list[int]) -> bool:
    """Return whether four values at a time can be read everywhere, and the kernels may be compiled to do so."""
    return all(address % 16 == 0 for address in addresses) and all(numel % 4 == 0 for numel in numels)


@triton.jit
def _measure(table, gradients, chunks, sums, inverse_scale, LARS: tl.constexpr, ALIGNED: tl.constexpr):
    """Store into `sums` [rows, chunks], for a chunk, Σ g², how many g are not finite, and for LARS Σ g·p and Σ p².

    g is the gradient, unscaled. All are 0 for a tensor without one.
    """
    tensor, row, first, end = _place(chunks, table, ALIGNED)
    end = tl.where(tl.load(gradients + tensor) != 0, end, first)
    param, gradient = _memory(row + PARAM, ALIGNED), _memory(gradients + tensor, ALIGNED)
    inverse = tl.load(inverse_scale)
    kind: tl.constexpr = sums.dtype.element_ty
    squares, broken = tl.full((BLOCK,), 0.0, kind), tl.full((BLOCK,), 0.0, kind)
    products, sizes = tl.full((BLOCK,), 0.0, kind), tl.full((BLOCK,), 0.0, kind)
    for start in range(first, end, BLOCK):
        here, inside = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK) < end - start
        g = tl.load(gradient + here, mask=inside, other=0.0)
        broken += tl.where(tl.abs(g) < float("inf"), 0.0, 1.0)
        g = (g * inverse).to(kind)
        squares += g * g
        if LARS:
            p = tl.load(param + here, mask=inside, other=0.0).to(kind)
            products += g * p
            sizes += p * p
    total = sums + tl.program_id(0)
    tl.store(total + SQUARES * tl.num_programs(0), _total(squares))
    tl.store(total + BROKEN * tl.num_programs(0), _total(broken))
    if LARS:
        tl.store(total + PRODUCTS * tl.num_programs(0), _total(products))
        tl.store(total + SIZES * tl.num_programs(0), _total(sizes))


@triton.jit
def _settle(
    table, gradients, sums, chunks, hyper, inverse_scale, steps, coefficients, outcome,
    ADAMW: tl.constexpr, LARS: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, ETA: tl.constexpr,
    MAX_NORM: tl.constexpr,
):  # fmt: skip
    """Into `coefficients` [tensors, 5], a program a tensor: what `_move` has to know; into `outcome` what is to log.

    Every program adds up what is not finite anywhere, for a launch would cost more. All in float64: these are few
    numbers, and 1 - β^step keeps its digits.
    """
    tensor = tl.program_id(0)
    row = table + tensor * COLUMNS
    broken = _sum(sums + BROKEN * chunks, 0, chunks)
    if tensor == 0:
        tl.store(outcome, tl.sqrt(_sum(sums + SQUARES * chunks, 0, chunks)))
        tl.store(outcome + 1, (broken > 0).to(tl.float32))
    held = (tl.load(row + FROZEN) != 0) & (tl.load(hyper + FREEZE) != 0)
    moves = (tl.load(gradients + tensor) != 0) & (broken == 0) & (held == 0)

    first, end = tl.load(row + FIRST_CHUNK), tl.load(row + END_CHUNK)
    squares = _sum(sums + SQUARES * chunks, first, end)
    tl.store(outcome + 2 + tensor, tl.sqrt(squares))
    clip = tl.full((), 1.0, tl.float64)
    if MAX_NORM > 0:
        clip = tl.minimum(MAX_NORM / (tl.sqrt(squares) + 1e-6), 1.0)
    scale = clip * tl.load(inverse_scale)
    rate = tl.load(hyper + LR).to(tl.float64)
    decay = tl.load(hyper + WEIGHT_DECAY).to(tl.float64) * tl.load(row + DECAYS)
    factor = tl.full((), 1.0, tl.float64)
    if ADAMW:
        step = tl.load(steps + tensor) + 1
        tl.store(steps + tensor, step, mask=moves)
        decay = 1 - rate * decay
        rate = rate / _bias_correction(BETA1, step)
        factor = 1 / tl.sqrt(_bias_correction(BETA2, step))
    if LARS:
        products = _sum(sums + PRODUCTS * chunks, first, end)
        sizes = _sum(sums + SIZES * chunks, first, end)
        ratio = _trust_ratio(squares, products, sizes, clip, decay, ETA)
        factor = tl.where(tl.load(row + ADAPTS) != 0, ratio, 1.0)
    mine = coefficients + tensor * COEFFICIENTS
    tl.store(mine + MOVES, moves.to(tl.float32))
    tl.store(mine + SCALE, scale)
    tl.store(mine + DECAY, decay)
    tl.store(mine + RATE, rate)
    tl.store(mine + FACTOR, factor)


@triton.jit
def _trust_ratio(squares, products, sizes, clip, decay, ETA: tl.constexpr):
    """Return η·‖p‖/‖c·g + d·p‖ of LARS (You et al. 2017), or 1 where a norm is 0.

    The update's norm comes from Σ g², Σ g·p and Σ p², in float64. Where c·g and d·p nearly cancel, to 1/κ of their
    length, it is κ² float64 roundings off. The norm of float32 sums would be κ float32 roundings off, which is more up
    to κ = 5·10⁸, and from there on float32 has no digit left.
    """
    change = tl.sqrt(tl.maximum(clip * clip * squares + 2 * clip * decay * products + decay * decay * sizes, 0.0))
    known = (sizes > 0) & (change > 0)
    return tl.where(known, ETA * tl.sqrt(sizes) / tl.where(known, change, 1.0), 1.0)


@triton.jit
def _bias_correction(BETA: tl.constexpr, step):
    """Return 1 - β^step in float64, of AdamW (Loshchilov and Hutter 2019)."""
    return 1 - tl.exp(step.to(tl.float64) * tl.log(tl.full((), BETA, tl.float64)))


@triton.jit
def _move(
    table, gradients, chunks, hyper, coefficients,
    ADAMW: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, HALF_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Move the student's chunk by the optimizer's rule, unless it stays, and the teacher's towards it.

    HALF_TYPE: of the copies that some tensors have, None where none has.
    """
    tensor, row, first, end = _place(chunks, table, ALIGNED)
    param, teacher = _memory(row + PARAM, ALIGNED), _memory(row + TEACHER, ALIGNED)
    gradient = _memory(gradients + tensor, ALIGNED)
    state, second = _memory(row + STATE, ALIGNED), _memory(row + SECOND_STATE, ALIGNED)
    if HALF_TYPE is not None:
        half, teacher_half = _memory(row + HALF, ALIGNED, HALF_TYPE), _memory(row + TEACHER_HALF, ALIGNED, HALF_TYPE)
        half_end = tl.where(tl.load(row + HALF) != 0, end, first)
        teacher_half_end = tl.where(tl.load(row + TEACHER_HALF) != 0, end, first)
    mine = coefficients + tensor * COEFFICIENTS
    live_end = tl.where(tl.load(mine + MOVES) != 0, end, first)
    scale, decay = tl.load(mine + SCALE), tl.load(mine + DECAY)
    rate, factor = tl.load(mine + RATE), tl.load(mine + FACTOR)
    momentum, rest = tl.load(hyper + EMA), tl.load(hyper + EMA_REST)
    for start in range(first, end, BLOCK):
        here, inside = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK) < end - start
        live = tl.arange(0, BLOCK) < live_end - start
        p, t = tl.load(param + here, mask=inside), tl.load(teacher + here, mask=inside)
        g = tl.load(gradient + here, mask=live) * scale
        m = tl.load(state + here, mask=live)
        if ADAMW:
            v = tl.load(second + here, mask=live)
            m += (g - m) * (1 - BETA1)
            v = v * BETA2 + g * g * (1 - BETA2)
            tl.store(second + here, v, mask=live)
            moved = p * decay - rate * tl.div_rn(m, tl.sqrt_rn(v) * factor + EPS)
        else:
            m = m * BETA1 + (g + p * decay) * factor
            moved = p - m * rate
        tl.store(state + here, m, mask=live)
        tl.store(param + here, moved, mask=live)
        p = tl.where(live, moved, p)
        t = t * momentum + p * rest
        tl.store(teacher + here, t, mask=inside)
        if HALF_TYPE is not None:
            kept, teacher_kept = tl.arange(0, BLOCK) < half_end - start, tl.arange(0, BLOCK) < teacher_half_end - start
            tl.store(half + here, p.to(HALF_TYPE), mask=kept)
            tl.store(teacher_half + here, t.to(HALF_TYPE), mask=teacher_kept)


@triton.jit
def _place(chunks, table, ALIGNED: tl.constexpr):
    """Return a program's chunk: the tensor's number, its row of the table, and the chunk's first value and its end."""
    mine = chunks + tl.program_id(0) * 2
    tensor, first = tl.load(mine), tl.multiple_of(tl.load(mine + 1), CHUNK)
    row = table + tensor * COLUMNS
    numel = tl.load(row + NUMEL)
    if ALIGNED:
        numel = tl.multiple_of(numel, 4)
    return tensor, row, first, tl.minimum(first + CHUNK, numel)


@triton.jit
def _memory(address, ALIGNED: tl.constexpr, TYPE: tl.constexpr = tl.float32):
    """Return the memory whose address lies at `address`."""
    pointer = tl.load(address).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # bytes; a bare number says nothing about it
    return pointer


@triton.jit
def _sum(values, first, end):
    """Return Σ values[first:end] in float64."""
    total = tl.full((BLOCK,), 0.0, tl.float64)
    for start in range(first, end, BLOCK):
        inside = tl.arange(0, BLOCK) < end - start
        total += tl.load(values + start + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float64)
    return _total(total)


@triton.jit
def _total(values):
    # What tl.sum is; interpreted, tl.sum itself fails where triton was imported (by torchvision, say) to be compiled.
    return tl.reduce(values, 0, tl.standard._sum_combine)
