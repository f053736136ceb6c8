"""All-reduce bandwidth of every node by itself and of all together, before hours are spent; started like a stage.

Prints ``ok NODE GB/s`` or ``bad NODE: why`` for each node, then the whole job's, on rank 0. A node is bad if it is
below ``PRISM_NEMO_MIN_BUS_GB``, or below half of the nodes' median: a link that fell back to a slower one, a sick card.
"""

from __future__ import annotations

import os
import statistics
import time

import torch
import torch.distributed as dist

_MEGABYTES = 256 if torch.cuda.is_available() else 4
_ROUNDS = 5


def bus_bandwidth(buffer: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    """Bytes per second that each rank's link carries: 2 (n - 1) / n times the buffer per all-reduce (NCCL-tests)."""
    size = dist.get_world_size(group)
    if size == 1:
        return float("inf")
    dist.all_reduce(buffer, group=group)  # connections are made here
    if buffer.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(_ROUNDS):
        dist.all_reduce(buffer, group=group)
    if buffer.is_cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / _ROUNDS
    return 2 * (size - 1) / size * buffer.numel() * buffer.element_size() / seconds


def judge(speeds: dict[str, float], least: float) -> list[str]:
    """One line for each node.

    Args:
        speeds: GB/s by node.
        least: GB/s that each must reach.
    """
    usual = statistics.median(speeds.values())
    lines = []
    for node, speed in speeds.items():
        if speed < least:
            lines.append(f"bad {node}: all-reduce within the node {speed:.3g} GB/s, {least:.3g} are asked for")
        elif speed < 0.5 * usual:
            lines.append(f"bad {node}: all-reduce within the node {speed:.3g} GB/s, the nodes' median is {usual:.3g}")
        else:
            lines.append(f"ok {node} {speed:.3g} GB/s")
    return lines


def main() -> None:
    """Measure and print."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    node, rank = os.environ.get("SLURMD_NODENAME", "this"), dist.get_rank()
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, node)
    mine = None
    for name in dict.fromkeys(names):  # every rank makes every group, in one order
        group = dist.new_group([i for i, other in enumerate(names) if other == name])
        mine = group if name == node else mine
    buffer = torch.ones(_MEGABYTES * 2**18, device="cuda" if cuda else "cpu")
    speed = bus_bandwidth(buffer, mine) / 1e9
    speeds: list[tuple[str, float]] = [("", 0.0)] * len(names)
    dist.all_gather_object(speeds, (node, speed))
    together = bus_bandwidth(buffer, None) / 1e9
    if rank == 0:
        slowest = {name: min(s for n, s in speeds if n == name) for name in dict.fromkeys(names)}
        for line in judge(slowest, float(os.environ.get("PRISM_NEMO_MIN_BUS_GB", "0"))):
            print(line)
        print(f"all {len(names)} ranks together: {together:.3g} GB/s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
