"""Print what every stage of the compiler makes of one loss.

    python docs/walkthrough.py            # print it
    python docs/walkthrough.py --write    # paste it into docs/architecture.md

A test compares the two, so what the document shows is what the compiler does.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from cl_compiler import lang as cl
from cl_compiler.codegen.render import render
from cl_compiler.hardware import load_hardware
from cl_compiler.lang.ir import Let, LossIR, Reduction
from cl_compiler.lang.program import Program, Stage
from cl_compiler.lang.resolve import fold_scales, resolve
from cl_compiler.lang.schedules import build_program
from cl_compiler.lang.sweeps import SweepPlan, plan_sweeps
from cl_compiler.lang.text import describe
from cl_compiler.lang.tile_ir import Accumulate, Barrier, Compute, Diagonal, Gemm, TileProgram
from cl_compiler.plan.report import explain
from cl_compiler.plan.search import choose_plan
from cl_compiler.plan.types import MemoryBudget, Problem, Request

DOCUMENT = Path(__file__).with_name("architecture.md")
BEGIN, END = "<!-- walkthrough: begin -->", "<!-- walkthrough: end -->"


@cl.define_loss
def infonce(sim, logit_scale):
    """InfoNCE: each row against all columns."""
    s = logit_scale * sim
    return cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)


def walkthrough() -> str:
    """Every stage's value as markdown."""
    needs = frozenset({"x", "y", "logit_scale"})
    request = Request(
        infonce,
        load_hardware("xeon-amx-2c"),
        MemoryBudget.parse("96MiB"),
        Problem(M=16384, N=16384, D=512),
        "diagonal",
        needs,
    )
    resolved = fold_scales(resolve(infonce, "diagonal"), needs).ir
    sweeps = plan_sweeps(infonce, "diagonal", needs)
    plan = choose_plan(request, sweeps)
    program = build_program(sweeps, plan.schedule)
    source = render(plan, program, "infonce-walkthrough")
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    start = lines.index("@cl.define_loss")
    stages = [
        ("What the user writes", "python", lines[start : lines.index("", start)]),
        ("`lang/trace.py`: the function, run once on symbols", "", loss_lines(infonce)),
        ("`lang/resolve.py`: row i's positive is column i; the scale folded into the product", "",
         loss_lines(resolved)),
        ("`lang/gradient.py`: derivatives of the value", "", gradient_lines(sweeps)),
        ("`lang/sweeps.py`: how often which tiles are made", "", sweep_lines(sweeps)),
        ("`plan/`: schedule and tiles for one machine and budget", "", explain(plan).splitlines()),
        ("`lang/schedules.py`: the schedule applied, tile by tile", "", program_lines(program)),
        ("`codegen/`: the file that runs", "python", source_lines(source)),
    ]  # fmt: skip
    parts = [
        f"### {number}. {title}\n\n```{language}\n" + "\n".join(body).rstrip() + "\n```\n"
        for number, (title, language, body) in enumerate(stages, 1)
    ]
    return "\n".join(parts)


def loss_lines(ir: LossIR) -> Iterator[str]:
    """A loss as its leaves, its reductions in order, and its value."""
    for leaf in ir.leaves.values():
        if leaf.kind in ("similarity", "similarity_at_positive"):
            scale = f"{leaf.scale} * " if leaf.scale else ""
            where = "[positive of row]" if leaf.kind == "similarity_at_positive" else ""
            text = f"{leaf.name} = {scale}<{leaf.left}, {leaf.right}{where}>"
            yield f"{text:<62} over {', '.join(leaf.axes)}"
    for reduction in ir.reductions:
        axes = ", ".join(ir.leaves[reduction.name].axes)
        yield f"{describe(reduction):<62} {f'over {axes}' if axes else 'a scalar'}"
    yield f"value = {describe(ir.value)}"


def gradient_lines(sweeps: SweepPlan) -> Iterator[str]:
    """Gradient tiles, their extra terms at the positives, and scalars' gradients."""
    gradient = sweeps.gradient
    assert gradient is not None
    for step in gradient.steps:
        yield describe(step)
    for name, expr in gradient.similarities.items():
        yield f"G = dL/d{name}[i, j] = {describe(expr)}"
    for expr in gradient.positives.values():
        yield f"G += {describe(expr)}   at each row's positive"
    for name, expr in gradient.parameters.items():
        yield f"dL/d{name} += {describe(expr)}"
    for name, dots in gradient.dots.items():
        terms = " + ".join(f"{weight} * <{operand}, d {operand}>" for operand, weight in dots)
        yield f"dL/d{name} += ({terms}) / {name}"


def sweep_lines(sweeps: SweepPlan) -> Iterator[str]:
    """Sweeps in order, and what is saved between forward and backward."""
    for sweep in sweeps.sweeps:
        phase = "forward" if sweep.level <= sweeps.forward_levels else "backward"
        yield f"sweep {sweep.level} ({phase}) over {' x '.join(sweep.grid)}:"
        yield f"  tiles of {', '.join(sweep.similarities)}"
        yield from (f"  reduce {describe(reduction)}" for reduction in sweep.reductions)
        yield from (f"  form G of {name} and multiply it out" for name in sweep.gradients)
    yield f"saved for the backward: {', '.join(sweeps.saved) or 'nothing'}"


def program_lines(program: Program) -> Iterator[str]:
    """Stages, their passes, and the instructions for one tile."""
    for phase, stages in (("forward", program.forward), ("backward", program.backward)):
        for stage in stages:
            yield f"{phase}, level {stage.level}"
            yield from stage_lines(program, stage)


def stage_lines(program: Program, stage: Stage) -> Iterator[str]:
    """Passes over tiles in the program's first mode, then the vectors that follow."""
    for work in stage.passes:
        mode = program.modes[0]
        rows = "panels of whole rows" if work.whole_rows else "tiles"
        others = "".join(f"; {other} likewise" for other in program.modes[1:])
        yield f"  for {rows} of {' x '.join(work.grid)} ({mode}{others}):"
        yield from (f"    {line}" for line in tile_lines(work.programs[mode]))
        sides = {"left": "the left operand", "right": "the right operand"}
        for tile in work.programs[mode].gradients:
            into = " and ".join(sides[side] for side in work.sides)
            factors = [f for f in (describe(tile.scale), tile.row_scale) if f not in ("1", "")]
            scaled = f", times {' * '.join(factors)}," if factors else ""
            buffer = work.programs[mode].buffers[tile.value]
            yield f"    multiply {buffer}{scaled} into the gradient of {into}"
    for name in stage.vectors:
        node: Let | Reduction = program.plan.by_name[name]
        yield f"  {describe(node)}"


def tile_lines(program: TileProgram) -> Iterator[str]:
    """The straight-line program of one tile."""
    for name, (expr, _) in program.hoisted.items():
        yield f"{name} = {describe(expr)}   # a vector or a scalar"
    for step in program.instructions:
        match step:
            case Gemm():
                beta = "" if step.beta == 0 else f" + {describe(step.beta)}"
                factor = "" if step.alpha == 1 else f"{describe(step.alpha)} * "
                value = f"{factor}{step.similarity}{beta}"
                yield f"{name_of(program, step.value)} = {value}   # a matrix product"
            case Compute():
                arguments = ", ".join(reference(program, ref) for ref in step.args)
                yield f"{name_of(program, step.value)} = {step.op}({arguments})"
            case Diagonal():
                target, value = name_of(program, step.value), describe(step.expr)
                yield f"{target}: {step.how} {value} where a column is {step.where}"
            case Accumulate():
                tiles = ", ".join(name_of(program, value) for value in step.args)
                yield f"{', '.join(step.targets)} += {step.kind} of {tiles} along {step.dim}"
            case Barrier():
                yield "the panel's row statistics are complete"


def name_of(program: TileProgram, value: int) -> str:
    """The buffer that holds a tile value."""
    return program.buffers[value]


def reference(program: TileProgram, ref: object) -> str:
    """An argument: a buffer, a slice of a vector, or a number."""
    value = getattr(ref, "value", None)
    if value is not None:
        return name_of(program, value)
    name = getattr(ref, "name", None)
    return str(name) if name is not None else describe(ref.expr)  # type: ignore[attr-defined]


def source_lines(source: str) -> Iterator[str]:
    """The header, and the functions that plan and program shaped; the rest is counted."""
    lines = source.splitlines()
    header = lines.index('"""', 9) + 1
    yield from lines[:header]
    shown = header
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith(
            ("_forward_sweep_bounded", "_backward_sweep_bounded", "forward", "backward")
        ):
            yield from ("", "", *lines[node.lineno - 1 : node.end_lineno])
            shown += (node.end_lineno or 0) - node.lineno + 1
    yield from ("", "", f"# … and {len(lines) - shown} lines: helpers, running maxima, autograd")


def document_with(text: str) -> str:
    """The document with its walkthrough replaced."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(document_with(walkthrough()), encoding="utf-8")
    else:
        print(walkthrough())
