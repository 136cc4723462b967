"""Ranks: one process for each GPU under torchrun (NCCL), or CPU processes (gloo), or just one process."""

import contextlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shards.errors import UserError
from shards.progress import Progress, show_progress

Item = TypeVar("Item")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    """number of this process, from 0"""
    world: int
    """number of processes"""
    device: torch.device
    """device of this process"""

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


@contextlib.contextmanager
def join_ranks(device: str, timeout: float = 600) -> Iterator[Ranks]:
    """Join the other ranks that torchrun started, if any.

    device: "auto", "cpu" or "cuda"; timeout: seconds that ranks wait for each other at most. Raises UserError where
    "cuda" is asked for and there is no GPU, and for processes that were started together but do not know each other.
    """
    refuse_unknown_ranks()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" not in os.environ:
        yield Ranks(0, 1, chosen)
        return
    on_gpu = chosen.type == "cuda"
    backend, limit = "nccl" if on_gpu else "gloo", timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
    store.set_timeout(limit)
    store = dist.PrefixStore(_attempt(), store)  # type: ignore[attr-defined]
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=limit, device_id=chosen if on_gpu else None
    )
    yield Ranks(rank, world, chosen)
    # Not after an error: there it would wait for ranks that wait for this one, before a line is printed.
    dist.destroy_process_group()


_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells its processes
_COUNTS = {"SLURM_NTASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}  # of others' processes
_TORCHRUN = "torchrun --nproc_per_node GPUS -m dino_fast.train ..."


def refuse_unknown_ranks() -> None:
    """Raise UserError where other processes were started with this one that do not know of it.

    Each of them would train alone, and all would write into one output folder.
    """
    missing = [name for name in _RENDEZVOUS if not os.environ.get(name)]
    if not missing:
        return
    if "RANK" not in missing or int(os.environ.get("WORLD_SIZE") or 1) > 1:
        given = " and ".join(name for name in _RENDEZVOUS if name not in missing)
        raise UserError(
            f"the environment has {given}, but not {' and '.join(missing)}, so the ranks cannot find each other. "
            f"Start them with {_TORCHRUN}"
        )
    for name, launcher in _COUNTS.items():
        if int(os.environ.get(name) or 1) > 1:
            raise UserError(
                f"{name} is {os.environ[name]}: {launcher} without torchrun would start that many runs, each alone. "
                f"Start one torchrun on each machine: {launcher} with one task a machine, and in it {_TORCHRUN} "
                f"(configs/slurm/train.sbatch does this). For one process only: env -u {name} dino-fast train ..."
            )


def drop_local_rank(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without --local_rank, which torch.distributed.launch adds. The first rank says so.

    The number is in the environment, too.
    """
    kept = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            kept.append(argument)
        elif not equals:
            next(rest, None)  # its value
    if len(kept) < len(arguments) and os.environ.get("RANK", "0") == "0":
        print(f"--local_rank is ignored. torch.distributed.launch is outdated: use {_TORCHRUN}", file=sys.stderr)
    return kept


def _attempt() -> str:
    """Return a prefix that keeps this start of the ranks apart from those before it, in a store that outlives them.

    torchrun's store does, and would give restarted ranks the addresses of dead ones. Over several machines, whose
    torchruns count for themselves, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has to do it.
    """
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if alone else '0'}"


_GLOO = ("gloo", "caused pair closure", "Connection closed by peer")


def is_lost_rank(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank was silent or gone.

    gloo has no error class for that, and names itself only where it gives the line of its source.
    """
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _GLOO)


def choose_device(device: str, local_rank: int) -> torch.device:
    """Return the device of a rank. Raises UserError where there is none."""
    count = torch.cuda.device_count()
    if device == "cuda" and count == 0:
        raise UserError("--device cuda: torch sees no NVIDIA GPU. Check `nvidia-smi`, or pass --device cpu.")
    if device == "cpu" or count == 0:
        return torch.device("cpu")
    if local_rank >= count:
        raise UserError(f"rank {local_rank} of this machine has no GPU: it has {count}. Lower --nproc_per_node.")
    return torch.device("cuda", local_rank)


def wait_for_all(ranks: Ranks) -> None:
    """Return when every rank has come here."""
    if ranks.world > 1:
        dist.barrier()


def gather_objects(mine: Item, ranks: Ranks) -> list[Item]:
    """Return what each rank has, in the order of the ranks: on every rank, any object that can be pickled."""
    gathered = [mine] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(gathered, mine)
    return gathered


@contextlib.contextmanager
def show_progress_once(task: str, ranks: Ranks) -> Iterator[Progress]:
    """Give the block a function to report (images done, images in total) to. Only the first rank shows anything."""
    with show_progress(task) if ranks.first else contextlib.nullcontext(_report_nothing) as report:
        yield report


def _report_nothing(done: int, total: int) -> None:
    """Do what the ranks do that show nothing."""


def wrap_in_ddp(module: Model, ranks: Ranks) -> Model | DistributedDataParallel:
    """Return the module with its gradients averaged over the ranks, or as it is where there is only one."""
    if ranks.world == 1:
        return module
    # Buffers are equal on all ranks already (synchronized batch norm), and broadcasting them would break the second
    # forward before a backward. torch 2.15 renames the setting.
    known = inspect.signature(DistributedDataParallel).parameters
    keep_buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    device_ids = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True, **keep_buffers)
