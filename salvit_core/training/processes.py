"""Several processes that train one network together, under torchrun; alone, one process of one."""

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist


def process() -> tuple[int, int]:
    """This process's rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def under_torchrun(device: str, function: Callable[[str], None]) -> None:
    """Call a function with the device that is this process's own; a process that torchrun started ends with it.

    Args:
        device: "cuda", of which each process takes one, or another.
        function: what all processes do together.
    """
    if distributed := "LOCAL_RANK" in os.environ:  # started by torchrun
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        function(device)
    finally:
        if distributed:
            dist.destroy_process_group()
    if distributed:
        # torch may still hold a group that was destroyed, and its threads now and then abort an interpreter that ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
