"""Measured links of a cluster: the value, where it is stored, how it enters a spec.

``cl-compiler calibrate`` under ``torchrun`` measures them; groups of the same machines, spread over
nodes in the same way, find them again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cl_compiler.errors import HardwareError
from cl_compiler.hardware.calibration import calibration_path, fingerprint, write_json_file
from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.units import format_bytes, format_seconds

__all__ = [
    "ROUGH_ERROR",
    "LinkFit",
    "MeasuredLink",
    "fitted",
    "links_path",
    "load_links",
    "store_links",
    "with_links",
    "with_measured_links",
]

Array = NDArray[np.float64]

MOST_ERROR, ROUGH_ERROR = 0.25, 0.1
"""Of half of the sizes, how far from the line refuses it, and how far is worth a warning."""
_FORMAT = 2


@dataclass(frozen=True)
class LinkFit:
    """A line through messages: n bytes take ``latency_s + n / bytes_per_s``.

    ``error``: how far typical messages are from the line, relative to it, in the median of the
    sizes; ``worst``: of the size that is farthest, which is ``worst_bytes``.
    """

    bytes_per_s: float
    latency_s: float
    error: float
    worst: float
    worst_bytes: int


@dataclass(frozen=True)
class MeasuredLink:
    """One kind of hop, measured.

    ``level``: "device" inside a node, "node" between nodes.  ``full_duplex``: a rank that sends and
    receives is as fast as one that only sends.  The others are those of ``LinkFit``.
    """

    level: str
    bytes_per_s: float
    latency_s: float
    full_duplex: bool
    error: float
    worst: float
    worst_bytes: int


def fitted(sizes: Sequence[int], samples: Sequence[Sequence[float]]) -> LinkFit:
    """A robust line through repeated messages: nothing that disturbs a few of them moves it.

    Of each size the faster half counts, since what else runs only ever adds to a message's time.
    Repeated medians (Siegel, "Robust regression using repeated medians", 1982) find a line that up
    to half of these may miss; least squares of relative errors through those near it is returned.

    Args:
        sizes: bytes of the messages.
        samples: of each size, seconds of its repetitions.

    Raises:
        HardwareError: larger messages do not take longer, or half of the sizes are farther than
            25 % from any line.
    """
    halves = [sorted(of)[: (len(of) + 1) // 2] for of in samples]
    n = np.repeat(np.asarray(sizes, dtype=float), [len(of) for of in halves])
    t = np.concatenate([np.asarray(of, dtype=float) for of in halves])
    typical = np.array([np.median(of) for of in halves])
    slope, latency = _near(n, t, *_repeated_medians(n, t))
    if slope > 0:
        latency = max(0.0, latency)
        away = np.abs(typical / (latency + slope * np.asarray(sizes)) - 1.0)
        error, farthest = float(np.median(away)), int(away.argmax())
        if error <= MOST_ERROR:
            worst = float(away[farthest])
            return LinkFit(1.0 / slope, latency, error, worst, int(sizes[farthest]))
    took = ", ".join(
        f"{format_bytes(int(size))} in {format_seconds(float(s))}"
        for size, s in zip(sizes, typical, strict=True)
    )
    raise HardwareError(
        f"messages between ranks take no latency plus bytes over bandwidth ({took}, typically), so "
        "no rate follows from them; calibrate again while nothing else uses the network or the "
        "cores"
    )


def _repeated_medians(n: Array, t: Array) -> tuple[float, float]:
    """(slope, intercept): of each point the median slope to points of other sizes, of these the
    median."""
    apart = n[None, :] - n[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.where(apart == 0, np.nan, (t[None, :] - t[:, None]) / apart)
    slope = float(np.median(np.nanmedian(slopes, axis=1)))
    return slope, float(np.median(t - slope * n))


def _near(n: Array, t: Array, slope: float, intercept: float) -> tuple[float, float]:
    """The same line, by least squares through the points that are near it, where that is one."""
    relative = np.abs(t - intercept - slope * n) / t
    near = relative <= max(3 * 1.4826 * float(np.median(relative)), 0.02)
    if len(np.unique(n[near])) < 2:
        return slope, intercept
    finer, offset = np.polyfit(n[near], t[near], 1, w=1 / t[near])
    return (float(finer), float(offset)) if finer > 0 else (slope, intercept)


def links_path(nominal: HardwareSpec, torch_version: str, nodes: int, per_node: int) -> Path:
    """Where the links of such a cluster are or would be stored."""
    return calibration_path(f"{fingerprint(nominal, torch_version)}-{nodes}x{per_node}-links")


def store_links(path: Path, links: Sequence[MeasuredLink]) -> None:
    """Write them.

    Raises:
        CacheError: the directory cannot be written.
    """
    write_json_file(path, {"format": _FORMAT, "links": [asdict(link) for link in links]})


def load_links(path: Path) -> tuple[MeasuredLink, ...]:
    """What was stored; nothing where there is no such file, or one that cannot be understood."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return ()
        links = tuple(MeasuredLink(**link) for link in content["links"])
    except (OSError, ValueError, TypeError, KeyError):
        return ()
    usable = all(
        math.isfinite(k.bytes_per_s) and k.bytes_per_s > 0 and k.latency_s >= 0 for k in links
    )
    return links if usable else ()


def with_measured_links(spec: HardwareSpec) -> HardwareSpec:
    """The spec of ranks on this kind of machine, with the links that were measured for it."""
    from cl_compiler.hardware.detect import detect_nominal, torch_version

    per_node = spec.device_level.count
    nodes = spec.world_size // per_node
    path = links_path(detect_nominal(), torch_version(), nodes, per_node)
    return with_links(spec, load_links(path))


def with_links(spec: HardwareSpec, links: Sequence[MeasuredLink]) -> HardwareSpec:
    """A cluster's spec with measured links; kinds that were not measured stay as they are."""
    by_level = {link.level: link for link in links}
    result = []
    for link in spec.links:
        found = by_level.get(link.level)
        if found is not None:
            link = replace(
                link,
                bandwidth_bytes_per_s=found.bytes_per_s,
                latency_s=found.latency_s,
                full_duplex=found.full_duplex,
                source="measured between these ranks (cl-compiler calibrate)",
            )
        result.append(link)
    return replace(spec, links=tuple(result))
