"""Shards in host memory: what that memory holds, and how long copies to and from a device take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_compiler.errors import BudgetError
from cl_compiler.hardware.graph import hardware_graph
from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.lang.ring import HOST
from cl_compiler.plan.machine import machine_of
from cl_compiler.plan.memory import compile_memory
from cl_compiler.plan.space import at, sizes_of
from cl_compiler.plan.travel import host_link_bytes
from cl_compiler.plan.types import HostPlan, LinkBytes, Tile
from cl_compiler.units import format_bytes

if TYPE_CHECKING:
    from cl_compiler.plan.share import Share

_PCIE_BYTES_PER_S = 24e9
"""Of a device whose description has no host: as where nothing was calibrated."""


def streams(spec: HardwareSpec) -> bool:
    """Whether the device's memory is another than the host's."""
    return spec.kind != "cpu"


def link_rate(spec: HardwareSpec) -> float:
    """Bytes/s between host memory and one device, in one direction."""
    if not streams(spec):  # a copy reads and writes the same memory
        return spec.device_level.bandwidth_bytes_per_s / 2 or _PCIE_BYTES_PER_S
    return spec.host.link_bandwidth_bytes_per_s if spec.host else _PCIE_BYTES_PER_S


def host_plan(share: Share, tile: Tile) -> tuple[HostPlan, LinkBytes]:
    """What passes over the host link of one rank, and how long it takes.

    Shards are copied while others are computed; products wait for blocks that stay, and for their
    gradients to be gone.
    """
    request = share.request
    links = host_link_bytes(share.program, request.problem, share.resident)
    streamed = sum(link.streamed for link in links)
    rest = sum(link.stays + link.returned for link in links)
    forward, backward = (link.total for link in links)
    rate = link_rate(request.hardware)
    memory = _memory_bytes(share, tile) if share.streams else 0
    link = LinkBytes("host", "host_link", rate, forward, backward)
    return HostPlan(memory, streamed / rate, rest / rate), link


def host_obstacle(share: Share) -> str:
    """Why host memory does not hold what a rank keeps there; "" where it does.

    Inputs are the caller's, and yet they have to be there.
    """
    request = share.request
    most = request.budget.host_bytes
    if share.schedule != HOST or (most is None and not share.streams):
        return ""
    needed, host = _memory_bytes(share, Tile(1, 1)), request.hardware.host
    if most is not None and needed > most:
        return f"{format_bytes(needed)} of host memory; its budget is {format_bytes(most)}"
    if host is None or not share.streams:  # of CPUs, all of it counts as the device's
        return ""
    problem, devices = request.problem, request.hardware.world_size // request.hardware.nodes
    widths = [
        (problem.M if "rows" in op.axes else problem.N, problem.operands.get(op.name, problem.D))
        for op in request.loss.operands
    ]
    inputs = sum(rows * width for rows, width in widths) * problem.input_bytes
    has = host.memory_bytes // devices
    if needed + inputs > has:
        return (
            f"{format_bytes(needed + inputs)} of host memory, inputs included; each device's part "
            f"of it is {format_bytes(has)}"
        )
    return ""


def check_host_memory(share: Share) -> None:
    """Whether host memory holds what a rank keeps there.

    Raises:
        BudgetError: it does not.
    """
    obstacle = host_obstacle(share)
    if obstacle:
        p = share.request.problem
        raise BudgetError(
            f"{share.request.loss.name} on {share.request.group_size} ranks with shards of {p.M} "
            f"rows in host memory, D={p.D}, needs {obstacle}. Give ranks fewer rows, or more "
            "memory."
        )


def _memory_bytes(share: Share, tile: Tile) -> int:
    """In a rank's host memory at its peak: gradients, whole until they are returned."""
    problem = share.request.problem
    memory = compile_memory(
        share.ring.facts(problem.operands),
        casts=problem.input_bytes < problem.compute_bytes,
        in_host=True,
    )
    machine = machine_of(hardware_graph(share.alone.hardware))
    return memory.peak_bytes({**sizes_of(share.alone, problem, machine), **at(tile, 0)})


__all__ = ["check_host_memory", "host_obstacle", "host_plan", "link_rate", "streams"]
