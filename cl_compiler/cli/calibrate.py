"""``cl-compiler calibrate``: measure this machine, so that plans rest on its own rates."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import Table, working, write, write_json, write_table

__all__ = ["calibrate"]


def calibrate(
    thorough: Annotated[
        bool, typer.Option("--thorough", help="More samples: four times as long.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Measure this machine's rates, in a few seconds, and keep them for `auto`.

    Best done while nothing else runs; a machine that was busy is reported.
    """
    from cl_compiler.hardware.calibration import calibration_path

    start = time.perf_counter()
    with working("measuring", ("PyTorch", "products, passes and copies")) as step:
        step()
        from cl_compiler.hardware.calibrate import calibrate as measure

        step()
        spec, result = measure(quick=not thorough)
    path = calibration_path(result.fingerprint)
    if json:
        write_json({"path": str(path), "disturbed": result.disturbed, "hardware": spec.to_dict()})
        return
    rows = [row for row in spec.describe() if "measured on this machine" in row[2]]
    table = tuple((what, value) for what, value, _ in rows)
    write_table(Table(f"{spec.name}, measured", ("what", "rate"), table))
    write(f"kept in {path}; measured in {time.perf_counter() - start:.1f} s")
