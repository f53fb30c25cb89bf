"""The processes that train together, each on a device of its own: who this one is, and what they do in common."""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")
# The others wait for the main process while it writes a checkpoint, measures and draws.
WAIT = datetime.timedelta(hours=4)


class Team:
    """One process (also without a launcher), or those of `torchrun` or `accelerate launch`.

    Accelerate reads the launcher's environment, joins the processes and wraps the model for DDP. Sharding is
    torch's own fully_shard: Accelerate would allow it on GPUs only.
    """

    def __init__(self, device: torch.device) -> None:
        cpu = device.type == "cpu"
        known = PartialState._shared_state.get("_cpu")
        if known is not None and known != cpu:  # an earlier run of this process was on the other kind
            AcceleratorState._reset_state(reset_partial_state=True)
        # Autocast, compilation and accumulation are the loop's; what a launcher says of them is compared before.
        # Buffers are constants here, the same everywhere; gradients as views spare a copy of all of them.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no", dynamo_backend="no", kwargs_handlers=[ddp])
        self.device, self.rank, self.world_size = device, self.accelerator.process_index, self.accelerator.num_processes
        # Its own group: NCCL would wait with the GPU, and its operations time out after 10 minutes.
        self._group = dist.new_group(backend="gloo", timeout=WAIT) if self.world_size > 1 else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def leave(self) -> None:
        """Part from the others, once all are done; NCCL complains about processes that just end."""
        if self._group is not None:
            dist.barrier(self._group)
            self.accelerator.end_training()
            AcceleratorState._reset_state(reset_partial_state=True)

    def wrap(
        self, module: nn.Module, blocks: tuple[type[nn.Module], ...], *, shard: bool, half: torch.dtype | None = None
    ) -> nn.Module:
        """The module that averages gradients over the processes; with `shard` each holds a part of every weight.

        `half`: what autocast computes in. Sharded weights are then gathered in it: autocast alone would keep a copy of
        every layer's from the forward to the backward pass.
        """
        if self.world_size == 1:
            return module
        if not shard:
            with warnings.catch_warnings():
                # torch 2.13 calls `broadcast_buffers` deprecated; what replaces it is not in 2.11.
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                return self.accelerator.prepare_model(module)
        if not blocks:
            raise ValueError("--fsdp: this model is trained whole on every device (DDP); leave out --fsdp")
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        # Inputs stay what they are: latents and noise are more exact than the weights.
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False)
        for layer in module.modules():
            if isinstance(layer, blocks):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        if self.device.type == "cpu":  # gloo has sums, but no averages
            for layer in module.modules():
                if isinstance(layer, FSDPModule):
                    layer.set_force_sum_reduction_for_comms(True)
        return module

    @contextlib.contextmanager
    def accumulating(self, wrapped: nn.Module, *, last: bool) -> Iterator[None]:
        """Gradients of this pass stay in the process, except after the last pass of a step."""
        if last or self.world_size == 1:
            yield
        elif isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(False)
            yield
            wrapped.set_requires_gradient_sync(True)
        else:
            with wrapped.no_sync():  # type: ignore[operator]  # DistributedDataParallel's
                yield

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        return self.accelerator.reduce(values, reduction="mean") if self.world_size > 1 else values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in one of the processes; all must ask."""
        if self._group is None:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, self._group)
        return bool(flags)

    def gather(self, mine: dict[str, str]) -> dict[str, str]:
        """The entries of all processes together, in the main one; elsewhere nothing. All must take part."""
        if self._group is None:
            return mine
        found: list[dict[str, str]] | None = [{}] * self.world_size if self.is_main else None
        dist.gather_object(mine, found, dst=0, group=self._group)
        return {key: value for part in found or () for key, value in part.items()}

    def on_main(self, action: Callable[[], T]) -> T | None:
        """What `action` returns in the main process, where alone it runs; None in the others, which wait. What it
        raises, all raise."""
        if self._group is None:
            return action()
        result: T | None = None
        error: list[BaseException | None] = [None]
        if self.is_main:
            try:
                result = action()
            except BaseException as caught:
                error = [caught]
        reason = [repr(error[0]) if error[0] else None, str(error[0])]
        dist.broadcast_object_list(reason, src=0, group=self._group)
        if error[0] is not None:
            raise error[0]
        if reason[0] is not None:
            raise ValueError(f"the main process stopped: {reason[1] or reason[0]}")
        return result


def whole(tensor: Tensor) -> Tensor:
    """A tensor of its own shape where each process holds a part of it; all must ask, for the same ones in order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Fill `target`, or this process's part of it, from a whole tensor."""
    target.copy_(like(target, source.to(target.device, target.dtype)))


def like(target: Tensor, source: Tensor) -> Tensor:
    """`source` divided among the processes as `target` is."""
    if isinstance(target, DTensor):
        return distribute_tensor(source, target.device_mesh, target.placements)
    return source


def check_launcher(mixed_precision: str, *, fsdp: bool) -> None:
    """ValueError where `accelerate launch` was told what our own flags decide."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", mixed_precision):
        raise ValueError(
            f"accelerate launch says --mixed_precision {asked}, the settings say {mixed_precision}: "
            f"add --mixed-precision {asked} to the command"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not fsdp:
        raise ValueError("accelerate launch says --use_fsdp: add --fsdp to the command (it is FSDP2)")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError("accelerate launch says --use_deepspeed, which is not supported: use --fsdp instead")
