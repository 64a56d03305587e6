"""The limits in a results file of ``python -m benchmarks.gpu``, as a calibration.

A benchmark run measures on a GPU that this machine need not have: its copies, products and launches
become a preset's measured rates.  Exponentials and elementwise passes stay nominal: they are those
of a tile in registers, which no PyTorch operator shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_compiler.errors import HardwareError
from cl_compiler.hardware.calibration import Calibration, apply
from cl_compiler.hardware.checks import DTYPES
from cl_compiler.hardware.spec import HardwareSpec

__all__ = ["Benchmarked", "read_benchmark", "with_measured_rates"]


@dataclass(frozen=True)
class Benchmarked:
    """What a results file says about a device.

    Attributes:
        device: as its driver calls it.
        said: the source of the numbers: device, software, file.
        result: its rates.
        kind: "cuda", "hip" or "cpu".
    """

    device: str
    said: str
    result: Calibration
    kind: str


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
        runs = list(content["runs"].values())
        run = runs[-1]
        rows = [_row(c) for c in content["cases"] if c["case"]["group"] == "ceilings"]
        device, kind = run["device"]["name"], run["device"]["kind"]
        is_dry = any(r["is_quick"] for r in runs)
        said = f"measured on {device}, PyTorch {run['versions']['torch']} ({path.name})"
        found = _calibration([row for row in rows if row], fingerprint or path.stem)
    except OSError as error:
        raise HardwareError(f"cannot read {path}: {error.strerror}; name a results file") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise HardwareError(
            f"{path} is no results file of python -m benchmarks.gpu "
            f"({type(error).__name__}: {error}); name one"
        ) from error
    if is_dry:
        raise HardwareError(f"{path} is of a dry run (--quick): its sizes are too small for rates")
    if not found.gemm:
        raise HardwareError(
            f"{path} has no rates of square products; measure them with "
            f"python -m benchmarks.gpu --only ceilings --resume {path}"
        )
    return Benchmarked(device, said, found, kind)


def with_measured_rates(spec: HardwareSpec, found: Benchmarked) -> HardwareSpec:
    """A spec with the rates of a benchmark; its memory sizes, links and counts stay.

    Raises:
        HardwareError: the spec is of another kind of device.
    """
    if spec.kind != found.kind:
        raise HardwareError(
            f"{spec.name} is of kind {spec.kind}, the results are of {found.device} ({found.kind});"
            " name the preset of the machine that was measured"
        )
    return apply(spec, found.result, found.said)


def _row(entry: Mapping[str, Any]) -> tuple[Mapping[str, Any], float] | None:
    """(what was measured, its rate); None where it failed."""
    row = entry["rows"].get("library", {})
    return None if row.get("error", "no row") else (entry["case"], float(row["rate"]))


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
