"""``torchrun … cl-compiler calibrate``: every node's own rates, and the links between ranks.

All ranks measure; what there is to say is said once, by the first of them.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cl_compiler.cli.output import Table, write, write_json, write_table
from cl_compiler.errors import CompilerError
from cl_compiler.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    import torch

    from cl_compiler.hardware.cluster_links import LinkFit, MeasuredLink

__all__ = ["calibrate_ranks", "is_one_of_several", "rough"]

_LIMIT_S = 120.0
_ATTEMPTS = 3
_GOOD_ERROR = 0.03
"""A fit that is this near needs no other attempt."""
_HOPS = {"device": "inside a node", "node": "between nodes"}


def is_one_of_several() -> bool:
    """Whether ``torchrun`` started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def calibrate_ranks(thorough: bool, json: bool) -> None:
    """Measure on every rank; the first rank of each node stores, the first of all prints.

    Raises:
        HardwareError: messages take no time that a bandwidth explains, or ranks are spread
            unevenly over nodes.
        CacheError: the results cannot be stored.
        typer.Exit: the same on the other ranks, where nothing is printed.
    """
    import torch
    import torch.distributed as dist

    is_gpu = torch.cuda.is_available()
    if is_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if is_gpu else "gloo", timeout=timedelta(seconds=_LIMIT_S))
    try:
        found = _measured(thorough, is_gpu)
        if dist.get_rank() == 0:
            _print(found, json)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class _Found:
    """Where links are kept, the links, and what to warn of."""

    path: Path
    links: tuple[MeasuredLink, ...]
    warnings: tuple[str, ...]


def _measured(thorough: bool, is_gpu: bool) -> _Found:
    import torch
    import torch.distributed as dist

    from cl_compiler.errors import HardwareError
    from cl_compiler.hardware.calibrate import calibrate
    from cl_compiler.hardware.cluster_links import links_path, store_links
    from cl_compiler.hardware.detect import detect_nominal, torch_version
    from cl_compiler.runtime.busy import CpuTimes

    world, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    keeps = int(os.environ["LOCAL_RANK"]) == 0
    before, began = CpuTimes.now(), time.perf_counter()

    def own_rates() -> Path:
        if world % local:
            raise HardwareError(
                f"{world} ranks do not fill nodes of {local}: start as many on every node"
            )
        if keeps:  # the others leave it the cores
            calibrate(quick=not thorough)
        return links_path(detect_nominal(), torch_version(), world // local, local)

    path, said = _on_all(own_rates)
    device = torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")
    links, more = _on_all(lambda: tuple(_links(world, local, device)))
    busy = () if is_gpu else _busy_nodes(before, time.perf_counter() - began)
    _on_all(lambda: store_links(path, links) if keeps else None)
    return _Found(path, links, (*said, *more, *busy, *filter(None, map(rough, links))))


def _on_all(work: Callable[[], Any]) -> tuple[Any, tuple[str, ...]]:
    """What ``work`` returns here, and what it warned of on any rank, with the ranks.

    Raises:
        CompilerError: on rank 0, where it failed on any; the message is that of every kind once.
        typer.Exit: on the others, then.
    """
    import torch.distributed as dist

    found, failed = None, ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            found = work()
        except CompilerError as error:
            failed = str(error)
    own = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (failed, own))
    errors = _once([[text] if text else [] for text, _ in told])
    if errors and dist.get_rank() == 0:
        raise CompilerError("\n".join(errors))
    if errors:
        raise typer.Exit(1)
    return found, tuple(_once([texts for _, texts in told]))


def _once(texts: list[list[str]]) -> list[str]:
    """Every text once, with the ranks that say it where not all do."""
    from cl_compiler.runtime.guard import ranks_in_words

    of: dict[str, list[int]] = {}
    for rank, said in enumerate(texts):
        for text in dict.fromkeys(said):
            of.setdefault(text, []).append(rank)
    everyone = list(range(len(texts)))
    return [
        text if ranks in ([0], everyone) else f"{ranks_in_words(ranks)}: {text}"
        for text, ranks in of.items()
    ]


def _busy_nodes(before: Any, wall_s: float) -> tuple[str, ...]:
    """What to say of nodes on which other processes ran since ``before``."""
    import torch.distributed as dist

    from cl_compiler.runtime.busy import CpuTimes, foreign_cores, in_the_way

    after, local = CpuTimes.now(), int(os.environ["LOCAL_WORLD_SIZE"])
    world = dist.get_world_size()
    own: list[Any] = [0.0] * world
    dist.all_gather_object(own, after.own_s - before.own_s)
    text = ""
    if int(os.environ["LOCAL_RANK"]) == 0:
        rank = dist.get_rank()
        of_node = sum(own[rank : rank + local])
        text = in_the_way(foreign_cores(before, after, wall_s, of_node), local)
    told: list[Any] = [""] * world
    dist.all_gather_object(told, text)
    return tuple(_once([[text] if text else [] for text in told]))


def rough(link: MeasuredLink) -> str:
    """What to warn of a line that typical messages are far from; "" where they are near."""
    from cl_compiler.hardware.cluster_links import ROUGH_ERROR

    if link.error <= ROUGH_ERROR:
        return ""
    return (
        f"{_HOPS[link.level]}, messages take times that are {link.error:.0%} off latency plus "
        "bytes over bandwidth, so predictions of links are as rough; calibrate again while nothing "
        "else uses the network or the cores"
    )


def _links(world: int, local: int, device: torch.device) -> list[MeasuredLink]:
    import torch.distributed as dist

    from cl_compiler.hardware.cluster_links import MeasuredLink

    node, place = divmod(dist.get_rank(), local)
    circles = {}
    if local > 1:
        circles["device"] = range(node * local, (node + 1) * local)
    if world > local:
        circles["node"] = range(place, world, local)
    found = []
    for level, circle in circles.items():
        one, two = (_fit(circle, device, both) for both in (False, True))
        fits = asdict(two) | {"full_duplex": two.bytes_per_s >= 0.9 * one.bytes_per_s}
        found.append(MeasuredLink(level, **fits))
    return found


def _fit(circle: range, device: torch.device, both: bool) -> LinkFit:
    """The nearest of a few fits, or the first that is near enough; the same on every rank.

    Raises:
        HardwareError: none is near.
    """
    import torch.distributed as dist

    from cl_compiler.errors import HardwareError
    from cl_compiler.hardware.cluster_links import fitted
    from cl_compiler.runtime.links import SIZES, message_seconds

    group = dist.group.WORLD
    assert group is not None
    fits: list[LinkFit] = []
    refused: HardwareError | None = None
    for _ in range(_ATTEMPTS):
        seconds = message_seconds(group, circle, device, two_directions=both)
        try:
            fits.append(fitted(SIZES, seconds))
        except HardwareError as error:
            refused = error
            continue
        if fits[-1].error <= _GOOD_ERROR:
            break
    if not fits:
        assert refused is not None
        raise refused
    return min(fits, key=lambda fit: fit.error)


def _print(found: _Found, json: bool) -> None:
    for text in found.warnings:
        warnings.warn(text, stacklevel=2)
    if json:
        links = [asdict(link) for link in found.links]
        write_json({"path": str(found.path), "links": links, "disturbed": bool(found.warnings)})
        return
    rows = tuple(
        (
            _HOPS[link.level],
            format_rate(link.bytes_per_s),
            format_seconds(link.latency_s),
            "yes" if link.full_duplex else "no",
            f"{link.error:.1%}",
            f"{link.worst:.1%} at {format_bytes(link.worst_bytes)}",
        )
        for link in found.links
    )
    columns = ("hop", "bandwidth", "latency", "both ways at once", "off the line", "at most")
    write_table(Table("links between ranks, measured", columns, rows, frozenset({1, 2, 4, 5})))
    write(f"kept in {found.path}, on every node")
