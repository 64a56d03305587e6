"""Lay a chosen point out over the levels of the machine, and say what a reader should know."""

from __future__ import annotations

from cl_compiler.plan.cost import PARTS
from cl_compiler.plan.space import Point, Space
from cl_compiler.plan.types import LevelPlan
from cl_compiler.units import format_bytes


def map_levels(space: Space, point: Point) -> tuple[LevelPlan, ...]:
    """What the device and each level inside it hold and serve inwards, outermost first."""
    machine, option = space.machine, space.option(point.schedule)
    values = space.values(option, point.tile, point.kept_tiles)
    traffic = option.cost.traffic_bytes(values)
    arithmetic = sum(point.parts[:3])
    largest = max(range(len(PARTS)), key=lambda i: point.parts[i])
    blocks = machine.sub_tiles(point.tile, space.request.problem.compute_bytes)
    levels = [
        LevelPlan(
            machine.device,
            "device",
            point.tile,
            point.peak_bytes,
            round(traffic[0]),
            traffic[0] / machine.device_bytes_per_s,
            PARTS[largest],
        )
    ]
    element = space.request.problem.compute_bytes
    for level, block, bytes_ in zip(machine.inner, blocks, traffic[1:], strict=True):
        seconds = bytes_ / level.bytes_per_s
        levels.append(
            LevelPlan(
                level.name,
                level.kind,
                block,
                min(level.memory_bytes, block.rows * block.cols * element),
                round(bytes_),
                seconds,
                "bandwidth" if seconds > arithmetic else "arithmetic",
            )
        )
    return tuple(levels)


def notes_of(space: Space, point: Point) -> tuple[str, ...]:
    """What the numbers do not say themselves."""
    request, machine, notes = space.request, space.machine, []
    if request.budget.device_bytes > machine.device_memory_bytes:
        notes.append(
            f"the device has {format_bytes(machine.device_memory_bytes)}, less than the budget"
        )
    if request.budget.host_bytes is not None:
        notes.append(
            f"the host budget ({format_bytes(request.budget.host_bytes)}) has no effect: only "
            "the schedule host of a group keeps anything there"
        )
    if request.problem.dtype in ("bfloat16", "float16"):
        notes.append("tiles, statistics and accumulators are fp32; operands are widened per tile")
    return tuple(notes)


__all__ = ["map_levels", "notes_of"]
