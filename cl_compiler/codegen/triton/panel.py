"""Which panel one launch makes: the fastest that fits, by the workload's bytes and seconds."""

from __future__ import annotations

from collections.abc import Iterator

from cl_compiler.codegen.triton.workload import BLOCK_COLS, BLOCK_ROWS, Timing, Workload
from cl_compiler.plan.machine import rates_in_words
from cl_compiler.plan.types import Candidate, LevelPlan, Plan, Tile
from cl_compiler.units import format_bytes

STEP = 256
"""Panels are whole multiples of it: of every kernel's rows and columns."""
MOST_WAVES = 16
"""Of the library's blocks over the multiprocessors, in one product."""
RESOLUTION = 0.01
"""Relative difference of predicted seconds below which a panel with fewer bytes is taken."""


def sides(workload: Workload, length: int) -> list[int]:
    """Lengths of a panel's side, ascending: powers of two, and whole waves of the library's blocks
    over the multiprocessors."""
    blocks = -(-workload.request.problem.D // BLOCK_COLS)
    wave = BLOCK_ROWS * workload.multiprocessors / blocks
    found = {_whole(length)}
    found.update(int(wave * k) // STEP * STEP for k in range(1, MOST_WAVES + 1))
    side = STEP
    while side < length:
        found.add(side)
        side *= 2
    return sorted(s for s in found if 0 < s <= _whole(length))


def panels(workload: Workload) -> Iterator[Tile]:
    """Every panel that is considered: square ones where half of them are visited, whole rows where
    they are multiplied out as soon as they are made."""
    problem = workload.request.problem
    if workload.has_whole_rows:
        longest = _whole(workload.longest_row)
        yield from (Tile(side, longest) for side in sides(workload, problem.M))
        return
    if workload.is_symmetric:
        yield from (Tile(side, side) for side in sides(workload, max(problem.M, problem.N)))
        return
    for rows in sides(workload, problem.M):
        for cols in sides(workload, problem.N):
            yield Tile(rows, cols)


def kernel_plan(workload: Workload) -> Plan | None:
    """The plan with the fastest panel within the budget; None where not even the smallest fits."""
    limit = workload.limit_bytes
    fitting = {
        tile: workload.timing(tile)
        for tile in panels(workload)
        if workload.peak_bytes(tile) <= limit
    }
    if not fitting:
        return None
    fastest = min(timing.seconds for timing in fitting.values())
    near = [t for t, timing in fitting.items() if timing.seconds <= fastest * (1 + RESOLUTION)]
    tile = min(near, key=lambda t: (workload.peak_bytes(t), -t.rows * t.cols, t.rows))
    return _planned(workload, tile, fitting[tile])


def nearby_panels(workload: Workload) -> list[Plan]:
    """The best plan, and those with its panel doubled or halved either way that fit."""
    best = kernel_plan(workload)
    if best is None:
        return []
    around = [c.tile for c in best.rejected if c.peak_bytes <= workload.limit_bytes]
    return [best, *(plan_with(workload, tile) for tile in around)]


def plan_with(workload: Workload, tile: Tile) -> Plan:
    """The plan with this panel, whether or not it fits."""
    return _planned(workload, tile, workload.timing(tile))


def smallest_bytes(workload: Workload) -> int:
    """Of the panel that takes least."""
    return min(workload.peak_bytes(tile) for tile in panels(workload))


def _planned(workload: Workload, tile: Tile, timing: Timing) -> Plan:
    request, footprint = workload.request, workload.footprint(tile)
    problem = request.problem
    notes = [f"Triton kernels for {workload.arch}"]
    if request.budget.device_bytes > workload.machine.device_memory_bytes:
        has = format_bytes(workload.machine.device_memory_bytes)
        notes.append(f"the device has {has}, less than the budget")
    return Plan(
        loss_name=request.loss.name,
        hardware_name=request.hardware.name,
        problem=problem,
        positives=request.positives,
        needs=request.needs,
        precision=request.precision,
        budget=request.budget,
        schedule=workload.program.schedule,
        tile=tile,
        kept_tiles=0,
        levels=_levels(workload, tile, timing, footprint.peak_bytes),
        memory=footprint.items,
        peak_bytes=footprint.peak_bytes,
        seconds=timing.seconds,
        units=timing.flops / (2.0 * problem.M * problem.N * problem.D),
        notes=tuple(notes),
        rejected=tuple(_neighbours(workload, tile, timing)),
        seconds_by_part=timing.parts,
        peak_phase=footprint.name,
        rates=rates_in_words(request.hardware, problem.dtype, request.precision),
        template="triton",
    )


def _levels(
    workload: Workload, tile: Tile, timing: Timing, peak_bytes: int
) -> tuple[LevelPlan, ...]:
    machine = workload.machine
    largest = max(timing.parts, key=lambda part: part[1])[0]
    moved = timing.traffic_bytes / machine.device_bytes_per_s
    device = LevelPlan(
        machine.device, "device", tile, peak_bytes, round(timing.traffic_bytes), moved, largest
    )
    core = next((x for x in reversed(machine.inner) if x.kind == "core"), None)
    if core is None or not workload.cores:
        return (device,)
    held = next(iter(workload.cores[-1].values()))
    block = Tile(held.rows, held.cols)
    bytes_ = 4 * held.rows * held.cols
    return (device, LevelPlan(core.name, "core", block, bytes_, 0, 0.0, "arithmetic"))


def _neighbours(workload: Workload, chosen: Tile, timing: Timing) -> Iterator[Candidate]:
    """The chosen panel doubled and halved each way, and why it was not that."""
    problem, limit = workload.request.problem, workload.limit_bytes
    rows, cols = chosen.rows, chosen.cols
    around = [(rows // 2, cols), (rows * 2, cols), (rows, cols // 2), (rows, cols * 2)]
    if workload.is_symmetric:
        around = [(rows // 2, cols // 2), (rows * 2, cols * 2)]
    most = Tile(_whole(problem.M), _whole(problem.N))
    if workload.has_whole_rows:
        around, most = around[:2], Tile(most.rows, cols)
    for sizes in around:
        tile = Tile(min(_whole(sizes[0]), most.rows), min(_whole(sizes[1]), most.cols))
        if tile == chosen or 0 in sizes:
            continue
        peak, other = workload.peak_bytes(tile), workload.timing(tile)
        ratio = other.seconds / timing.seconds - 1
        if peak > limit:
            reason = f"does not fit: {format_bytes(peak - limit)} above the budget"
        elif ratio > RESOLUTION:
            reason = f"{ratio:.1%} slower"
        else:
            reason = f"as fast, {format_bytes(peak - workload.peak_bytes(chosen))} more"
        yield Candidate(workload.program.schedule, tile, 0, peak, other.seconds, reason)


def _whole(length: int) -> int:
    return -(-length // STEP) * STEP


__all__ = ["STEP", "kernel_plan", "nearby_panels", "panels", "plan_with", "sides", "smallest_bytes"]
