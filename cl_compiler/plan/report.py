"""explain(plan): why this plan, where bytes and seconds go, what was rejected.

Plain text, aligned in columns: a terminal, a log and a pull request show it alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from cl_compiler.plan.record import plan_from_json, plan_to_json
from cl_compiler.plan.types import Candidate, HostPlan, Plan
from cl_compiler.units import format_bytes, format_rate, format_seconds


def explain(plan: Plan, step: str = "") -> str:
    """The plan in words and tables; lines end without spaces, the text with a newline.

    ``step``: what a step of the ranks takes, where it was simulated, beside the plan's own time.
    """
    sections = [
        _summary(plan, step),
        _section("group of ranks", _cluster(plan)),
        _section("bytes per link: the busiest of each kind, one way", _links(plan)),
        _section("levels", _levels(plan)),
        _section(f"memory at the peak ({plan.peak_phase})", _memory(plan)),
        _section("time", _time(plan)),
        _section("rejected", _rejected(plan)),
        _section("notes", [f"- {note}" for note in plan.notes]),
    ]
    lines = [line.rstrip() for section in sections if section for line in (*section, "")]
    return "\n".join(lines[:-1]) + "\n"


def _summary(plan: Plan, step: str) -> list[str]:
    p = plan.problem
    kept = f", {plan.kept_tiles} kept for the backward" if plan.kept_tiles else ""
    needs = ", ".join(sorted(plan.needs)) or "none"
    share = plan.peak_bytes / plan.budget.device_bytes
    by = plan.precision + (" by oneDNN" if plan.library == "onednn" else "")
    by += ", exponentials to base 2" if plan.exponential == "exp2" else ""
    strips = f", worked on in strips of {plan.strip} columns" if plan.strip else ""
    share_of_ranks, between = "", ""
    if plan.cluster is not None:
        share_of_ranks, between = " on each rank", f"{plan.cluster.schedule}; on a rank "
    rows = [
        (
            "problem",
            f"M={p.M} N={p.N} D={p.D} {p.dtype}{share_of_ranks}, positives: {plan.positives}",
        ),
        ("gradients", needs),
        (
            "schedule",
            f"{between}{plan.schedule}: tiles of {plan.tile}{kept}{strips}; products in {by}",
        ),
        (
            "time",
            f"{format_seconds(plan.seconds)} predicted for {plan.units:.2f} units of 2*M*N*D FLOP",
        ),
        *([("step", step)] if step else []),
        ("rates", plan.rates),
        (
            "memory",
            f"{format_bytes(plan.peak_bytes)} predicted, {share:.0%} of "
            f"{format_bytes(plan.budget.device_bytes)}",
        ),
    ]
    return [f"{plan.loss_name} on {plan.hardware_name}", *table(rows, indent=2)]


def _cluster(plan: Plan) -> list[str]:
    c = plan.cluster
    if c is None:
        return []
    rows = max(plan.problem.M, plan.problem.N)
    hides = ", ".join(f"{phase} from {n}" for phase, n in c.hiding_rows_by_phase if n)
    hides = f"{hides} rows per rank on; the largest shard has {rows}" if hides else "-"
    schedule, resident, host = c.schedule, "", c.host
    if host is not None:
        resident = f", blocks of {c.resident} stay"
        schedule = f"{schedule} (inputs and gradients in host memory)"
    told = [
        ("schedule", f"{schedule}: chunks of {c.chunk} rows among {c.group_size} ranks{resident}"),
        (
            "sent",
            f"{format_bytes(c.forward_bytes)} forward, {format_bytes(c.backward_bytes)} backward",
        ),
        ("exchange", f"{format_seconds(c.exchange_s)}, {format_seconds(c.exposed_s)} not hidden"),
        ("hidden", hides),
        *_host(host),
        *((f"not {name}", why) for name, why in c.rejected),
    ]
    return table(told, indent=2)


def _links(plan: Plan) -> list[str]:
    if plan.cluster is None or not plan.cluster.links:
        return []
    rows = [("between", "link", "rate", "forward", "backward", "busy for")]
    for link in plan.cluster.links:
        sent = link.forward_bytes + link.backward_bytes
        rows.append(
            (
                f"{link.level}s",
                link.kind,
                format_rate(link.bytes_per_s),
                format_bytes(link.forward_bytes),
                format_bytes(link.backward_bytes),
                format_seconds(sent / link.bytes_per_s),
            )
        )
    return table(rows, indent=2, right=(2, 3, 4, 5))


def _host(host: HostPlan | None) -> list[tuple[str, str]]:
    """What passes between host memory and a device."""
    if host is None:
        return []
    copied = f"{format_seconds(host.copy_s)} beside products"
    told = [("host copies", f"{copied}, {format_seconds(host.wait_s)} that they wait for")]
    if host.memory_bytes:
        told.append(("host memory", f"{format_bytes(host.memory_bytes)}, inputs not counted"))
    return told


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *lines] if lines else []


def _levels(plan: Plan) -> list[str]:
    rows = [("level", "kind", "tile", "holds", "moves", "taking", "bound by")]
    for level in plan.levels:
        rows.append(
            (
                level.level,
                level.kind,
                str(level.tile),
                format_bytes(level.resident_bytes),
                format_bytes(level.traffic_bytes) if level.traffic_bytes else "-",
                format_seconds(level.seconds) if level.seconds else "-",
                level.bound_by,
            )
        )
    return table(rows, indent=2, right=(2, 3, 4, 5))


def _memory(plan: Plan) -> list[str]:
    items = sorted(plan.memory, key=lambda item: -item[1])
    rows = [(what, format_bytes(count), f"{count / plan.peak_bytes:.0%}") for what, count in items]
    return table(rows, indent=2, right=(1, 2))


def _time(plan: Plan) -> list[str]:
    parts = sorted(plan.seconds_by_part, key=lambda part: -part[1])
    rows = [(what, format_seconds(s), f"{s / plan.seconds:.0%}") for what, s in parts]
    return table(rows, indent=2, right=(1, 2))


def _rejected(plan: Plan) -> list[str]:
    if not plan.rejected:
        return []
    rows = [("schedule", "tile", "kept", "memory", "time", "reason")]
    return table([*rows, *map(_candidate, plan.rejected)], indent=2, right=(1, 2, 3, 4))


def _candidate(c: Candidate) -> tuple[str, ...]:
    if not c.peak_bytes:  # never evaluated
        return (c.schedule, "-", "-", "-", "-", c.reason)
    kept = str(c.kept_tiles) if c.kept_tiles else "-"
    return (
        c.schedule,
        str(c.tile),
        kept,
        format_bytes(c.peak_bytes),
        format_seconds(c.seconds),
        c.reason,
    )


def table(
    rows: Sequence[Sequence[str]], *, indent: int = 0, right: Sequence[int] = ()
) -> list[str]:
    """Rows with aligned columns, two spaces apart; columns in ``right`` align to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return lines


__all__ = ["explain", "plan_from_json", "plan_to_json", "table"]
