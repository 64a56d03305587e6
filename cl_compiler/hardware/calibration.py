"""What a calibration found: the value, where it is stored, how it enters a spec.

``calibrate`` measures, ``detect`` loads.  Results are one JSON file per fingerprint (CPU or GPU,
caches, cores, PyTorch), and a file that cannot be understood counts as none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cl_compiler.errors import CacheError
from cl_compiler.hardware.checks import DTYPES
from cl_compiler.hardware.spec import HardwareSpec, Level

__all__ = [
    "Calibration",
    "apply",
    "calibration_path",
    "fingerprint",
    "load",
    "positive_rate",
    "store",
    "write_json_file",
]

_FORMAT = 2
_REFERENCE_D = 512
_RATES = {"exp_per_s", "exp2_per_s", "pass_per_s", "op_overhead_s"}


@dataclass(frozen=True)
class Calibration:
    """Measured rates of one machine.

    Attributes:
        fingerprint: of the machine and its software.
        gemm: (dtype, inner dimension D, FLOP/s) of 512 x 1024 x D products.
        rates: (field of ``HardwareSpec``, value): exp_per_s, exp2_per_s, pass_per_s,
            op_overhead_s, as far as they were measured.
        bandwidths: (level, bytes/s of one instance), reads plus writes of a copy; "host_link" is
            host to device.
        thread_gain: rate of all threads over the rate of one, float32 GEMM; 1 for a GPU.
        threads: threads that were used; 1 for a GPU.
    """

    fingerprint: str
    gemm: tuple[tuple[str, int, float], ...]
    rates: tuple[tuple[str, float], ...]
    bandwidths: tuple[tuple[str, float], ...]
    thread_gain: float
    threads: int

    @property
    def disturbed(self) -> bool:
        """Whether other processes had the cores, so that the rates are too low."""
        return self.thread_gain < 0.6 * self.threads


def fingerprint(nominal: HardwareSpec, torch_version: str) -> str:
    """Name of a machine and its software: what changes its rates, nothing that does not.

    The device's memory is left out where it is a CPU's: a container's limit changes no rate.
    """
    levels = [
        [level.name, level.count, 0 if level.kind == "device" else level.memory_bytes]
        for level in nominal.levels
    ]
    content = [_FORMAT, nominal.name, nominal.kind, nominal.arch, levels, torch_version]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    return f"{nominal.name}-{digest}"


def calibration_path(name: str) -> Path:
    """Where the calibration with this fingerprint is or would be stored."""
    root = os.environ.get("CL_COMPILER_CACHE_DIR")
    if not root:
        import platformdirs

        root = platformdirs.user_cache_dir("cl_compiler")
    return Path(root) / "calibration" / f"{name}.json"


def load(nominal: HardwareSpec, torch_version: str) -> Calibration | None:
    """The stored calibration of this machine, or None; a damaged file is none, with a warning."""
    name = fingerprint(nominal, torch_version)
    path = calibration_path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        _warn_ignored(path, str(error))
        return None
    try:
        result = _from_json(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _warn_ignored(path, f"{type(error).__name__}: {error}")
        return None
    if result.fingerprint != name:
        _warn_ignored(path, f"it belongs to {result.fingerprint}")
        return None
    return result


def store(result: Calibration) -> Path:
    """Write a calibration so that a reader sees the old file or the new one, never a part.

    Raises:
        CacheError: the directory cannot be written.
    """
    path = calibration_path(result.fingerprint)
    write_json_file(path, {"format": _FORMAT, **asdict(result)})
    return path


def write_json_file(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part.

    Raises:
        CacheError: the directory cannot be written.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise CacheError(
            f"cannot store the calibration at {path}: {error.strerror}; make the directory "
            "writable or point $CL_COMPILER_CACHE_DIR to one that is"
        ) from error


def apply(spec: HardwareSpec, result: Calibration, said: str = "") -> HardwareSpec:
    """Put measured rates into a spec; ``measured`` names the fields, the rest stays as it is.

    GEMM rates are those at D = 512 (at the nearest D that was measured), and the efficiency at
    other D is relative to that; a dtype that was not measured keeps its ratio to float32.

    Args:
        spec: whose rates are replaced.
        result: what was measured.
        said: the source of every measured number; "" names this machine's calibration.
    """
    said = said or f"measured on this machine (calibration {result.fingerprint})"
    scalars = dict(result.rates)
    measured = set(scalars)
    sources = dict(spec.sources)
    rates, efficiency = _gemm_tables(spec, result)
    timed = {dtype for dtype, _, _ in result.gemm}
    for dtype in rates:
        field = f"gemm_flops_per_s.{dtype}"
        if dtype in timed:
            measured.add(field)
            sources[field] = said
        else:
            was = spec.source_of(field) or "nominal"
            sources[field] = f"{was}; scaled like the measured rates"
    if efficiency:
        measured.add("gemm_efficiency")
        sources["gemm_efficiency"] = said
    sources |= dict.fromkeys(scalars, said)
    bandwidths = dict(result.bandwidths)
    levels = tuple(_with_bandwidth(level, bandwidths, said) for level in spec.levels)
    measured |= {
        f"levels.{level.name}.bandwidth_bytes_per_s" for level in levels if level.name in bandwidths
    }
    host = spec.host
    if host is not None and "host_link" in bandwidths:
        host = replace(
            host,
            link_bandwidth_bytes_per_s=bandwidths["host_link"],
            source=f"{host.source}; link {said}",
        )
        measured.add("host.link_bandwidth_bytes_per_s")
    # A guess goes where what it would be compared with was measured.
    exp2 = 0.0 if "exp_per_s" in scalars else spec.exp2_per_s
    return replace(
        spec,
        levels=levels,
        host=host,
        gemm_flops_per_s=tuple(rates.items()),
        gemm_efficiency=tuple(efficiency.items()) or spec.gemm_efficiency,
        exp_per_s=scalars.get("exp_per_s", spec.exp_per_s),
        exp2_per_s=scalars.get("exp2_per_s", exp2),
        pass_per_s=scalars.get("pass_per_s", spec.pass_per_s),
        op_overhead_s=scalars.get("op_overhead_s", spec.op_overhead_s),
        sources=tuple(sources.items()),
        measured=tuple(sorted(measured | set(spec.measured))),
    )


def _gemm_tables(
    spec: HardwareSpec, result: Calibration
) -> tuple[dict[str, float], dict[int, float]]:
    """Rates by dtype and efficiency by D whose product gives back what was measured."""
    found: dict[str, dict[int, float]] = {}
    for dtype, inner, rate in result.gemm:
        found.setdefault(dtype, {})[inner] = rate
    # The dtype with the most shapes gives the curve, on a CPU float32.
    curve = max(found.values(), key=len, default={})
    if len(found.get("float32", {})) == len(curve):
        curve = found.get("float32", {})
    best = max(curve.values(), default=1.0)
    efficiency = {inner: rate / best for inner, rate in sorted(curve.items())}
    rates: dict[str, float] = {}
    for dtype, by_inner in found.items():
        inner = min(by_inner, key=lambda d: abs(math.log(d / _REFERENCE_D)))
        rates[dtype] = by_inner[inner] / efficiency.get(inner, 1.0)
    nominal = dict(spec.gemm_flops_per_s)
    if "onednn" not in found and "float32" in found:
        nominal.pop("onednn", None)  # a guess, where the other library was measured
    base = next((dtype for dtype in ("float32", *rates) if dtype in rates and dtype in nominal), "")
    gain = rates[base] / nominal[base] if base else 1.0
    return {
        dtype: rates.get(dtype, rate * gain) for dtype, rate in {**nominal, **rates}.items()
    }, efficiency


def _with_bandwidth(level: Level, bandwidths: dict[str, float], said: str) -> Level:
    if level.name not in bandwidths:
        return level
    source = f"{level.source.partition('; bandwidth')[0]}; bandwidth {said}"
    return replace(level, bandwidth_bytes_per_s=bandwidths[level.name], source=source)


def _warn_ignored(path: Path, why: str) -> None:
    warnings.warn(
        f"ignoring the calibration in {path}: {why}; run 'cl-compiler calibrate' to replace it",
        stacklevel=4,
    )


def _from_json(content: Any) -> Calibration:
    """Read what ``store`` wrote.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is something else.
    """
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']!r}, expected {_FORMAT}")
    result = Calibration(
        fingerprint=str(content["fingerprint"]),
        gemm=tuple(
            (str(dtype), int(inner), positive_rate(r)) for dtype, inner, r in content["gemm"]
        ),
        rates=tuple((str(field), positive_rate(r)) for field, r in content["rates"]),
        bandwidths=tuple((str(name), positive_rate(r)) for name, r in content["bandwidths"]),
        thread_gain=positive_rate(content["thread_gain"]),
        threads=int(content["threads"]),
    )
    if not result.gemm or any(d not in DTYPES or inner < 1 for d, inner, _ in result.gemm):
        raise ValueError("no usable GEMM rates")
    if not {field for field, _ in result.rates} <= _RATES:
        raise ValueError("rates of unknown fields")
    return result


def positive_rate(value: Any) -> float:
    """A number of something per second.

    Raises:
        ValueError: it is not finite and positive.
    """
    rate = float(value)
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"a rate of {value!r}")
    return rate
