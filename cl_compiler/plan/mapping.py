"""Lay a chosen point out over the levels of the machine, and say what a reader should know."""

from __future__ import annotations

from cl_compiler.plan.cost import PARTS
from cl_compiler.plan.memory import GATHERED
from cl_compiler.plan.space import Point, Space
from cl_compiler.plan.types import LevelPlan, Tile
from cl_compiler.units import format_bytes


def map_levels(space: Space, point: Point) -> tuple[LevelPlan, ...]:
    """What each level holds and does, outermost first."""
    return (*_outer(space, point), *_inner(space, point))


def _outer(space: Space, point: Point) -> list[LevelPlan]:
    """Levels around the device hold shares of the problem and move shards."""
    machine, sizes = space.machine, space.sizes
    option = space.option(point.schedule)
    values = space.values(option, point.tile, point.kept_tiles)
    exchange = point.parts[PARTS.index("exchange between ranks")]
    per_byte = machine.exchange_seconds_per_byte()
    hops = machine.exchange_latency_s()
    latency = hops * _messages(space, point)
    moved = (exchange - latency) / per_byte if per_byte else 0.0
    compute = point.seconds - exchange
    result, rows = [], int(values["M_all"])
    for level in machine.outer:
        count = machine.ranks // (level.instances * level.ranks_inside)
        share = level.share(machine.ranks) if machine.ranks > 1 else 0.0
        bytes_ = round(moved * share) if level.is_linked else 0
        seconds = 0.0
        if level.is_linked:
            seconds = bytes_ / level.link_bytes_per_s
            seconds += (level.instances - 1) * level.link_latency_s * _messages(space, point)
        bound = level.link_kind if seconds > compute else "arithmetic"
        result.append(
            LevelPlan(
                level.name,
                level.kind,
                Tile(-(-rows // count), int(sizes["N"])),
                point.peak_bytes * level.instances * level.ranks_inside,
                bytes_,
                seconds,
                bound if level.is_linked else "-",
            )
        )
    return result


def _messages(space: Space, point: Point) -> int:
    facts = space.option(point.schedule).facts
    if not facts.gathered:
        return 0
    return len(facts.gathered) + len([o for o in facts.outputs if o.own != o.length])


def _inner(space: Space, point: Point) -> list[LevelPlan]:
    """The device and the levels inside it hold blocks and serve them inwards."""
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
    return levels


def notes_of(space: Space, point: Point) -> tuple[str, ...]:
    """What the numbers do not say themselves."""
    request, machine, notes = space.request, space.machine, []
    ranks = machine.ranks
    if ranks > 1:
        option = space.option(point.schedule)
        values = space.values(option, point.tile, point.kept_tiles)
        _, memory = option.memory.breakdown(values)
        gathered = dict(memory).get(GATHERED, 0)
        notes.append(
            f"one rank's share of {ranks}: {int(values['M'])} rows x {int(values['N'])} columns, "
            f"with the other ranks' shards at hand ({format_bytes(gathered)} of them counted)"
        )
        notes.append("the PyTorch template is emitted, for one rank")
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
