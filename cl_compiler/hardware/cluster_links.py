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

from cl_compiler.errors import HardwareError
from cl_compiler.hardware.calibration import calibration_path, fingerprint, write_json_file
from cl_compiler.hardware.spec import HardwareSpec

__all__ = [
    "LEAST_R2",
    "MeasuredLink",
    "fitted",
    "links_path",
    "load_links",
    "store_links",
    "with_links",
    "with_measured_links",
]

LEAST_R2 = 0.98
_FORMAT = 1


@dataclass(frozen=True)
class MeasuredLink:
    """One kind of hop: a message of n bytes takes ``latency_s + n / bytes_per_s``.

    ``level``: "device" inside a node, "node" between nodes.  ``full_duplex``: a rank that sends and
    receives is as fast as one that only sends.  ``r2``: of the fit.
    """

    level: str
    bytes_per_s: float
    latency_s: float
    full_duplex: bool
    r2: float


def fitted(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float]:
    """(bytes/s, latency in seconds, R²) of messages; relative errors count.

    Raises:
        HardwareError: they do not grow with their size, or the line explains less than 98 % of
            their spread.
    """
    n, t = np.asarray(sizes, dtype=float), np.asarray(seconds, dtype=float)
    slope, latency = np.polyfit(n, t, 1, w=1 / t)
    rest = t - slope * n - latency
    r2 = 1.0 - float((rest**2).sum() / ((t - t.mean()) ** 2).sum())
    if slope <= 0 or r2 < LEAST_R2:
        raise HardwareError(
            f"messages of {', '.join(map(str, sizes))} bytes took "
            f"{', '.join(f'{1e3 * s:.2f}' for s in seconds)} ms, which is no latency plus bytes "
            f"over bandwidth (R² = {r2:.3f}, {LEAST_R2} is asked for); calibrate again while "
            "nothing else uses the network"
        )
    return 1.0 / float(slope), max(0.0, float(latency)), r2


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
