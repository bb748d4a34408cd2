"""This process among those that torchrun started. A single process skips all of it.

    torchrun --nproc-per-node 2 -m diffgen train DATA -o RUN

Each rank computes its slice of the same global batch. "ddp" keeps a copy of the networks in each process, "fsdp" a part
of them (FSDP2), for networks that are larger than one device. Rank 0 writes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffgen.devices import choose_device
from diffgen.errors import DiffgenError, ExitCode, FailedElsewhere, UsageError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

# Longer than anything that rank 0 does alone: opening the data, writing a checkpoint.
TIMEOUT = datetime.timedelta(minutes=10)


class Lost(DiffgenError):  # noqa: N818
    """Another process of the run has ended, or does not answer."""


class Ranks:
    """The rank of this process, the number of processes, and the collectives that the loop needs."""

    def __init__(self, device: str = "auto") -> None:
        """Join the other processes, if torchrun started this one. Raises UsageError for a missing device."""
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = choose_device(device)
        if self.world == 1:
            return
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if self.device.index >= torch.cuda.device_count():
                raise UsageError(
                    f"process {self.rank} has no GPU: this machine has {torch.cuda.device_count()}",
                    "start as many processes as there are GPUs (--nproc-per-node)",
                )
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, count: int, part: int, parts: int) -> slice:
        """The positions in a global batch of `count` that this rank computes as its part number `part` of `parts`."""
        pieces, i = self.world * parts, self.rank * parts + part
        return slice(count * i // pieces, count * (i + 1) // pieces)

    def agree(self, value: int) -> int:
        """The largest value of all ranks; they wait for each other."""
        if self.world == 1:
            return value
        largest = torch.tensor([value])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def first(self, action: Callable[[], object]) -> None:
        """Let rank 0 act while the others wait. If it fails, rank 0 raises its error and the others FailedElsewhere."""
        failure: BaseException | None = None
        if self.main:
            try:
                action()
            except BaseException as error:
                failure = error
        code = self.agree(0 if failure is None else int(getattr(failure, "code", ExitCode.FAILED)))
        if failure is not None:
            raise failure
        if code:
            raise FailedElsewhere(code)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wrap(self, networks: dict[str, nn.Module], how: str) -> dict[str, nn.Module]:
        """Wrap networks that are on the device, so that their gradients are means over the ranks."""
        if self.world == 1:
            return networks
        if how == "fsdp":
            return {name: self._shard(network) for name, network in networks.items()}
        return {
            # with find_unused_parameters the buckets are never rebuilt, so that a resumed run adds in the same order
            name: nn.parallel.DistributedDataParallel(
                network, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
            )
            for name, network in networks.items()
        }

    def _shard(self, network: nn.Module) -> nn.Module:
        """Shard each block (FSDP2), the members of module lists, then the rest."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        containers = (nn.ModuleList, nn.ModuleDict)
        lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
        for module in reversed([child for blocks in lists for child in blocks if not isinstance(child, containers)]):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
        return network

    @contextlib.contextmanager
    def gradients(self, networks: dict[str, nn.Module], last: bool) -> Iterator[None]:
        """Inside, backward passes add up on each rank; only the `last` one of the step is averaged over the ranks."""
        with contextlib.ExitStack() as stack:
            for network in networks.values():
                if isinstance(network, nn.parallel.DistributedDataParallel) and not last:
                    stack.enter_context(network.no_sync())
                elif _is_fully_sharded(network):
                    network.set_requires_gradient_sync(last)
            yield

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raise Lost for the errors that collectives raise when another process has died."""
        try:
            yield
        except RuntimeError as error:
            words = ("gloo", "NCCL", "Connection", "ProcessGroup", "process group", "timeout", "Timed out")
            if self.world == 1 or not (isinstance(error, dist.DistError) or any(w in str(error) for w in words)):
                raise
            raise Lost(
                f"another process of this training has ended, or does not answer (says {self.rank} of {self.world})",
                "start the same command again with --resume; --debug shows the error of the network",
            ) from error

    def leave(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter; without FSDP, all of it."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def gathered(like: Tensor, part: Tensor) -> Tensor:
    """The complete tensor, given this rank's part, sharded as the parameter `like`; all ranks must call."""
    if not _is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    sharded = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


def part(like: Tensor, full: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have complete."""
    if not _is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    sharded = distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return sharded.to_local()


def _is_fully_sharded(network: nn.Module) -> TypeGuard[FSDPModule]:
    return hasattr(network, "set_requires_gradient_sync")


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "to_local")  # without importing torch.distributed.tensor where it is not in use
