"""``cl-compiler calibrate``: measure this machine, so that plans rest on its own rates."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import Table, working, write, write_json, write_table

if TYPE_CHECKING:
    from cl_compiler.hardware.spec import HardwareSpec

__all__ = ["calibrate"]


def calibrate(
    thorough: Annotated[
        bool, typer.Option("--thorough", help="More samples: four times as long.")
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results",
            help="Measure nothing: take the rates of a results file of the GPU benchmark.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            "-w",
            help="With --results: the preset or .toml that gets the rates. "
            "[default: this machine, for auto]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="With --hardware: the .toml to write, to be named as hardware.",
            show_default=False,
        ),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Measure this machine's rates, in a few seconds, and keep them for `auto`.

    Started on every rank, as `torchrun --nproc-per-node 8 --no-python cl-compiler calibrate`, it
    also measures the links between them, for groups of as many ranks on as many nodes. Best done
    while nothing else runs; a machine that was busy is reported.
    """
    if results is not None:
        if thorough:
            raise typer.BadParameter("--results measures nothing: leave out --thorough")
        _take_over(results, preset, out, json)
        return
    if preset or out:
        raise typer.BadParameter("--hardware and --out belong to --results FILE")
    from cl_compiler.cli.calibrate_ranks import calibrate_ranks, is_one_of_several

    if is_one_of_several():
        calibrate_ranks(thorough, json)
        return
    from cl_compiler.hardware.calibration import calibration_path

    with working("measuring", ("PyTorch", "products, passes and copies")) as step:
        step()
        from cl_compiler.hardware.calibrate import calibrate as measure
        from cl_compiler.runtime.busy import CpuTimes, foreign_cores, in_the_way

        step()
        before, start = CpuTimes.now(), time.perf_counter()
        spec, result = measure(quick=not thorough)
        seconds = time.perf_counter() - start
        foreign = foreign_cores(before, CpuTimes.now(), seconds)
    counted = spec.kind == "cpu" and seconds > 0.5  # ticks of 10 ms say nothing of less
    others = in_the_way(foreign, result.threads) if counted else ""
    if others and not result.disturbed:  # which has been said
        warnings.warn(others, stacklevel=2)
    path = calibration_path(result.fingerprint)
    if json:
        disturbed = result.disturbed or bool(others)
        write_json({"path": str(path), "disturbed": disturbed, "hardware": spec.to_dict()})
        return
    _print(spec)
    write(f"kept in {path}; measured in {seconds:.1f} s")


def _print(spec: HardwareSpec) -> None:
    rows = [row for row in spec.describe() if "measured on" in row[2]]
    table = tuple((what, value) for what, value, _ in rows)
    write_table(Table(f"{spec.name}, measured", ("what", "rate"), table))


def _take_over(results: Path, preset: str | None, out: Path | None, json: bool) -> None:
    """Put the rates of a results file into a preset, or keep them for this machine."""
    from cl_compiler.errors import ArgumentError
    from cl_compiler.hardware import load_hardware
    from cl_compiler.hardware.benchmarked import read_benchmark, with_measured_rates

    if preset is None:
        spec, path = _keep(results)
    else:
        if out is None:
            raise typer.BadParameter(
                f"--hardware {preset}: say where to write it, as --out {preset}-measured.toml"
            )
        spec = with_measured_rates(load_hardware(preset), read_benchmark(results))
        try:
            out.write_text(spec.to_toml(), encoding="utf-8")
        except OSError as error:
            raise ArgumentError(
                f"cannot write {out}: {error.strerror}; name another file with --out"
            ) from error
        path = out
    if json:
        write_json({"path": str(path), "hardware": spec.to_dict()})
        return
    _print(spec)
    write(f"written to {path}" if preset else f"kept in {path}")


def _keep(results: Path) -> tuple[HardwareSpec, Path]:
    """Store the rates as this machine's calibration, which "auto" finds."""
    from cl_compiler.errors import HardwareError
    from cl_compiler.hardware.benchmarked import read_benchmark, with_measured_rates
    from cl_compiler.hardware.calibration import fingerprint, store
    from cl_compiler.hardware.detect import detect_nominal, slug, torch_version

    nominal = detect_nominal()
    found = read_benchmark(results, fingerprint(nominal, torch_version()))
    if slug(found.device) != nominal.name:
        raise HardwareError(
            f"{results} was measured on {found.device}, this machine is {nominal.name}; name the "
            "preset that gets the rates: --hardware h100x1 --out h100x1-measured.toml"
        )
    return with_measured_rates(nominal, found), store(found.result)
