"""The limits in a results file of ``python -m benchmarks.gpu``, as a calibration.

A benchmark run measures on a GPU that this machine need not have: its copies, products and launches
become a preset's measured rates.  Exponentials and elementwise passes stay nominal: they are those
of a tile in registers, which no PyTorch operator shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_compiler.errors import HardwareError
from cl_compiler.hardware.calibration import Calibration, apply, positive_rate
from cl_compiler.hardware.checks import DTYPES
from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.units import format_bytes

__all__ = ["Benchmarked", "read_benchmark", "with_measured_rates"]


MEMORY_TOLERANCE = 0.1
"""Drivers keep some of what a datasheet says; the next smaller model has a sixth less."""


@dataclass(frozen=True)
class Benchmarked:
    """What a results file says about a device.

    Attributes:
        device: as its driver calls it.
        said: the source of the numbers: device, software, file.
        result: its rates.
        kind: "cuda", "hip" or "cpu".
        units: multiprocessors (compute units).
        memory_bytes: of the device.
    """

    device: str
    said: str
    result: Calibration
    kind: str
    units: int
    memory_bytes: int


def read_benchmark(path: Path, fingerprint: str = "") -> Benchmarked:
    """Read the limits of a results file.

    Args:
        path: of the file.
        fingerprint: of the machine whose calibration this is to be; "" for none in particular.

    Raises:
        HardwareError: the file cannot be read, has no limits, or only those of a dry run.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        runs = content["runs"]
        limits = [c for c in content["cases"] if c["case"]["group"] == "ceilings"]
        rows = [(c["run"], row) for c in limits if (row := _row(c))]
        real = [(run, row) for run, row in rows if not runs[run]["is_quick"]]
        run = runs[real[-1][0]] if real else list(runs.values())[-1]
        device = run["device"]
        name, versions = str(device["name"]), run["versions"]
        found = Benchmarked(
            name, f"measured on {name}, PyTorch {versions['torch']} ({path.name})",
            _calibration([row for _, row in real], fingerprint or path.stem), device["kind"],
            int(device.get("multi_processor_count") or 0), int(device.get("total_memory") or 0),
        )  # fmt: skip
    except OSError as error:
        raise HardwareError(f"cannot read {path}: {error.strerror}; name a results file") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise HardwareError(
            f"{path} is no results file of python -m benchmarks.gpu "
            f"({type(error).__name__}: {error}); name one"
        ) from error
    if rows and not real:
        raise HardwareError(f"{path} is of a dry run (--quick): its sizes are too small for rates")
    if not found.result.gemm:
        raise HardwareError(
            f"{path} has no rates of square products; measure them with "
            f"python -m benchmarks.gpu --only ceilings --resume {path}"
        )
    return found


def with_measured_rates(spec: HardwareSpec, found: Benchmarked) -> HardwareSpec:
    """A spec with the rates of a benchmark; its memory sizes, links and counts stay.

    Raises:
        HardwareError: the spec is of another device, told by its kind, units and memory.
    """
    if spec.kind != found.kind:
        raise HardwareError(
            f"{spec.name} is of kind {spec.kind}, the results are of {found.device} ({found.kind});"
            " name the preset of the machine that was measured"
        )
    inner = spec.levels[spec.levels.index(spec.device_level) + 1 :]
    units, memory = math.prod(level.count for level in inner), spec.device_memory_bytes
    if units != found.units or abs(memory - found.memory_bytes) > MEMORY_TOLERANCE * memory:
        raise HardwareError(
            f"{spec.name} has {units} units and {format_bytes(memory)}, the results are of "
            f"{found.device} ({found.units} units, {format_bytes(found.memory_bytes)}); name its "
            "preset, or a .toml that extends one and has these sizes"
        )
    return apply(spec, found.result, found.said)


def _row(entry: Mapping[str, Any]) -> tuple[Mapping[str, Any], float] | None:
    """(what was measured, its rate); None where it failed.

    Raises:
        ValueError: the rate is none.
    """
    row = entry["rows"].get("library", {})
    return None if row.get("error", "no row") else (entry["case"], positive_rate(row["rate"]))


def _calibration(rows: list[tuple[Mapping[str, Any], float]], name: str) -> Calibration:
    gemm = [
        (case["dtype"], int(case["K"]), rate)
        for case, rate in rows
        if case["kind"] == "gemm" and case["shape"] == "square" and case["dtype"] in DTYPES
    ]
    of = {case["kind"]: rate for case, rate in rows if case["kind"] in ("copy", "link", "launch")}
    bandwidths = [(level, of[kind]) for kind, level in (("copy", "device"), ("link", "host_link"))
                  if kind in of]  # fmt: skip
    return Calibration(
        fingerprint=name,
        gemm=tuple(gemm),
        rates=(("op_overhead_s", 1 / of["launch"]),) if "launch" in of else (),
        bandwidths=tuple(bandwidths),
        thread_gain=1.0,
        threads=1,
    )
