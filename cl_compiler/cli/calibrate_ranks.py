"""``torchrun … cl-compiler calibrate``: every node's own rates, and the links between ranks."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cl_compiler.cli.output import Table, write, write_json, write_table
from cl_compiler.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import torch

    from cl_compiler.hardware.cluster_links import MeasuredLink

__all__ = ["calibrate_ranks", "is_one_of_several"]

_LIMIT_S = 120.0
_ATTEMPTS = 4


def is_one_of_several() -> bool:
    """Whether ``torchrun`` started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def calibrate_ranks(thorough: bool, json: bool) -> None:
    """Measure on every rank; the first rank of each node stores, the first of all prints.

    Raises:
        HardwareError: messages take no time that a bandwidth explains, or ranks are spread
            unevenly over nodes.
        CacheError: the results cannot be stored.
    """
    import torch
    import torch.distributed as dist

    is_gpu = torch.cuda.is_available()
    if is_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if is_gpu else "gloo", timeout=timedelta(seconds=_LIMIT_S))
    try:
        path, links = _measured(thorough, is_gpu)
        if dist.get_rank() == 0:
            _print(path, links, json)
    finally:
        dist.destroy_process_group()


def _measured(thorough: bool, is_gpu: bool) -> tuple[Path, tuple[MeasuredLink, ...]]:
    import torch
    import torch.distributed as dist

    from cl_compiler.errors import HardwareError
    from cl_compiler.hardware.calibrate import calibrate
    from cl_compiler.hardware.cluster_links import links_path, store_links
    from cl_compiler.hardware.detect import detect_nominal, torch_version

    world, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    if world % local:
        raise HardwareError(
            f"{world} ranks do not fill nodes of {local}: start as many on every node"
        )
    nominal = detect_nominal()
    path = links_path(nominal, torch_version(), world // local, local)
    keeps = int(os.environ["LOCAL_RANK"]) == 0
    if keeps:  # the others leave it the cores
        calibrate(quick=not thorough)
    device = torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")
    dist.barrier()
    links = tuple(_links(world, local, device))
    if keeps:
        store_links(path, links)
    return path, links


def _links(world: int, local: int, device: torch.device) -> list[MeasuredLink]:
    import torch.distributed as dist

    from cl_compiler.errors import HardwareError
    from cl_compiler.hardware.cluster_links import MeasuredLink, fitted
    from cl_compiler.runtime.links import SIZES, message_seconds

    node, place = divmod(dist.get_rank(), local)
    circles = {}
    if local > 1:
        circles["device"] = range(node * local, (node + 1) * local)
    if world > local:
        circles["node"] = range(place, world, local)
    group = dist.group.WORLD
    assert group is not None
    found = []
    for level, circle in circles.items():

        def fit(both: bool, circle: range = circle) -> tuple[float, float, float]:
            for attempt in range(_ATTEMPTS):
                seconds = message_seconds(group, circle, device, two_directions=both)
                try:
                    return fitted(SIZES, seconds)
                except HardwareError:
                    if attempt + 1 == _ATTEMPTS:
                        raise
            raise AssertionError

        one, two = fit(False), fit(True)
        found.append(MeasuredLink(level, two[0], two[1], two[0] >= 0.9 * one[0], two[2]))
    return found


def _print(path: Path, links: tuple[MeasuredLink, ...], json: bool) -> None:
    from dataclasses import asdict

    if json:
        write_json({"path": str(path), "links": [asdict(link) for link in links]})
        return
    rows = tuple(
        (
            {"device": "inside a node", "node": "between nodes"}[link.level],
            f"{format_bytes(int(link.bytes_per_s))}/s",
            format_seconds(link.latency_s),
            "yes" if link.full_duplex else "no",
            f"{link.r2:.3f}",
        )
        for link in links
    )
    columns = ("hop", "bandwidth", "latency", "both ways at once", "R²")
    write_table(Table("links between ranks, measured", columns, rows, frozenset({1, 2, 4})))
    write(f"kept in {path}, on every node")
