"""Training in several processes: torchrun's environment, the process group, and values that all ranks share.

Started by torchrun, each process trains on its shard of every batch (pipelines/read/order.py); DistributedDataParallel
averages the gradients, NCCL between GPUs, gloo between CPUs. The hosts exchange values through a separate gloo
group, which neither waits for the device nor interleaves with its collectives.

A process that hangs or dies: every collective has the time limit `run.timeout`, after which the others end with
`PeerLost` (or NCCL's watchdog ends them), and torchrun then ends the process that hung.

Shapes: B rows of this rank, W ranks.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.errors import UserError
from pipelines.loaders.base import process_count
from pipelines.read.order import Shard

T = TypeVar("T")
log = logging.getLogger("std_fast")
# gloo's messages about a peer that has ended or does not respond
_LOST = re.compile(r"timed? ?out|connection (was )?(closed|reset|refused)|broken pipe|by peer", re.IGNORECASE)


class PeerLost(Exception):
    """Another process of the run has died or has not responded within the time limit."""


def is_peer_lost(error: RuntimeError) -> bool:
    """Whether a collective's error means that another process has ended or does not respond."""
    return _LOST.search(str(error)) is not None


@dataclass(frozen=True)
class World:
    """This process among those that train together; with a single process nothing is sent."""

    rank: int = 0
    size: int = 1
    host: Any = None
    """process group between the hosts"""

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        return Shard(self.rank, self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place; on a GPU the host does not wait."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def average(self, tensors: list[Tensor]) -> None:
        """The mean of each tensor over all ranks, in place."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor.div_(self.size))

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set; the hosts wait for each other, not for the device."""
        if self.size == 1:
            return flag
        flags = torch.tensor(flag, dtype=torch.int32)
        dist.all_reduce(flags, group=self.host)
        return bool(flags)

    def gather(self, rows: Tensor) -> Tensor:
        """Rows `[B, ...]` of every rank, in the order of the ranks: `[W B, ...]`, without gradients."""
        if self.size == 1:
            return rows
        flat = rows.detach().contiguous().view(torch.uint8)  # gloo has no 16-bit integers
        everyone = flat.new_empty((self.size * len(flat), *flat.shape[1:]))
        dist.all_gather_into_tensor(everyone, flat)
        return everyone.view(rows.dtype)

    def first(self, value: T | None) -> T | None:
        """On every rank the `value` (small, picklable) of the first that has one; the hosts wait for each other."""
        every = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(every, value, group=self.host)
        return next((found for found in every if found is not None), None)

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` (small, picklable) on every rank; the hosts wait for each other."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def share_buffers(self, module: nn.Module) -> None:
        """Rank 0's buffers (running statistics of batch norms, computed from its shard) on every rank."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def wait_for_all(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.host)


SINGLE_PROCESS = World()


def rank() -> int:
    """This process's rank from torchrun's environment; 0 without torchrun."""
    number, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return int(number) if number.isdecimal() and size != "1" else 0  # `init_distributed` refuses what is no number


@contextmanager
def init_distributed(on_gpu: bool, timeout: float) -> Iterator[World]:
    """The world that torchrun started this process in; `SINGLE_PROCESS` without torchrun.

    A process group that is there already is used and left as it is.

    Args:
        on_gpu: NCCL, and this process's GPU is the one of its local rank.
        timeout: seconds after which a collective that another rank does not join is an error.

    Raises:
        UserError: the environment is incomplete, or there are fewer GPUs than processes on this machine.
        PeerLost: another process has died or hangs.
    """
    there, size = dist.is_initialized(), process_count("WORLD_SIZE")
    if not there and size == 1:
        yield SINGLE_PROCESS
        return
    limit = timedelta(seconds=timeout)
    if not there:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"WORLD_SIZE: is {size} in the environment, without {', '.join(missing)}; start many processes with "
                "torchrun, and for one unset it"
            )
        for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
            if not os.environ[name].isdecimal():
                raise UserError(f"{name}: {os.environ[name]!r} in the environment is no number; torchrun sets it")
        device = None
        if on_gpu:
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= gpus:
                raise UserError(
                    f"run.device: process {local} of this machine has no GPU; torchrun --nproc-per-node {gpus}"
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
    ended, host = False, None
    try:
        if not there:
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=limit, device_id=device)
        host = dist.new_group(backend="gloo", timeout=limit)
        world = World(dist.get_rank(), dist.get_world_size(), host)
        if not world.main:
            log.setLevel(max(log.level, logging.WARNING))  # only rank 0 logs
        yield world
        ended = True
    except RuntimeError as error:
        if is_peer_lost(error):
            raise PeerLost(
                f"rank {rank()}: another process has died, or has not answered for {timeout:g} seconds "
                f"(run.timeout); continue with --resume"
            ) from error
        raise
    finally:
        if not there and dist.is_initialized():
            # after an error NCCL would wait for the others; gloo's threads must end before the interpreter
            dist.destroy_process_group(None if ended or not on_gpu else host)


class RankSync:
    """Values that are the same on all ranks at each step: whether any received a request to stop, and rank 0's numbers.

    The hosts exchange them while a step runs and use them in the next, so that no host waits: all ranks stop after the
    same step, one later than the first request.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._sent: tuple[Any, Tensor] | None = None

    def __call__(self, stop: bool, *numbers: float) -> tuple:
        """This rank's own stop flag and numbers -> whether any is to stop, and rank 0's numbers; as of the call before.

        With one process, of this call.
        """
        if self.world.size == 1:
            return stop, *numbers
        values = torch.tensor([stop, *(numbers if self.world.main else [0.0] * len(numbers))], dtype=torch.float64)
        before, self._sent = self._sent, (dist.all_reduce(values, group=self.world.host, async_op=True), values)
        work, agreed = before or self._sent
        work.wait()
        return bool(agreed[0] > 0), *agreed[1:].tolist()


def replicate(module: Callable, world: World, device: torch.device, accumulates: bool) -> Callable:
    """`module` (compiled already, if at all) in DistributedDataParallel.

    Every parameter must get a gradient in every step; step.py gives psi zeros in steps without MINE. Gradients are
    views into DDP's buckets. Running statistics of batch norms stay each rank's own until `World.share_buffers`.

    Args:
        accumulates: gradients of several backward passes are sent with the last. A static graph does not go with it:
            in its first iteration DDP counts the passes that are not sent too.
    """
    if world.size == 1:
        return module
    assert isinstance(module, nn.Module)
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=not accumulates,
    )
