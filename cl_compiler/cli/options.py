"""The options that ``plan``, ``compile`` and ``inspect`` share, as types that typer reads."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "DEFAULT_DTYPE",
    "DEFAULT_PROBLEM",
    "Bank",
    "Budget",
    "Cols",
    "DType",
    "Deterministic",
    "Features",
    "Gradients",
    "Hardware",
    "Json",
    "Loss",
    "Positives",
    "Precision",
    "ProblemText",
    "Rows",
    "Schedule",
    "Slots",
    "Widths",
]

DEFAULT_PROBLEM = "16384x16384x512"
DEFAULT_DTYPE = "float32"
"""That of ``Problem``: a command asks for what ``compile_loss`` does with the same sizes."""

Hardware = Annotated[
    str,
    typer.Option(
        "--hardware", "-w", help="auto (this machine), a preset's name, or the path of a .toml."
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        help="Memory that the loss may use: 512MiB, 2GiB, or device=2GiB,host=64GiB (the host's "
        "bounds schedule host). "
        "[default: a quarter of what is free here, or of what a preset's device has]",
        show_default=False,
    ),
]
Loss = Annotated[
    str,
    typer.Option(
        "--loss", "-l", help="A shipped loss, or your own: path/to/file.py:name or module:name."
    ),
]
ProblemText = Annotated[
    str,
    typer.Option("--problem", "-p", help="Largest sizes MxNxD, or MxD where N = M."),
]
Rows = Annotated[
    int | None, typer.Option("--M", help="Rows, instead of the problem's.", show_default=False)
]
Cols = Annotated[
    int | None, typer.Option("--N", help="Columns, instead of the problem's.", show_default=False)
]
Features = Annotated[
    int | None, typer.Option("--D", help="Features, instead of the problem's.", show_default=False)
]
DType = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Of the inputs: float64, float32, bfloat16 or float16. The default is compile_loss's "
        "own, on CPUs and GPUs alike.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        help="How similarities are multiplied: auto, ieee, bf16; on GPUs also fp16, tf32, "
        "bf16x3, fp8.",
    ),
]
Schedule = Annotated[
    str,
    typer.Option(
        "--schedule",
        "-s",
        help="auto, or one of recompute, spill, panel, retain, dense; on several devices, one of "
        "ring_owner, ring_travel, all_gather, two_level, half_ring, both_ways, host.",
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Bits that do not depend on what the process multiplied before: "
        "compile_loss(deterministic=True).",
    ),
]
Positives = Annotated[
    str,
    typer.Option(
        "--positives", help="auto (as without ids), or ids: pairs with equal ids are positive."
    ),
]
Gradients = Annotated[
    str,
    typer.Option(
        "--gradients", help="auto (of everything), none, or names: x,logit_scale for a locked y."
    ),
]
Slots = Annotated[int, typer.Option("--slots", help="Items per row, for losses with slots.")]
Bank = Annotated[int, typer.Option("--bank", help="Length of the queue, for losses with a bank.")]
Widths = Annotated[
    list[str] | None,
    typer.Option("--operand", help="Features of a further operand: guide_x=384. May be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
