"""One detected device, seen as the group of ranks that a job runs on.

``detect`` describes the device of one process.  A process group has more of them, and their links
decide between the cluster schedules; what nobody measured gets a stated default.
"""

from __future__ import annotations

from dataclasses import replace

from cl_compiler.errors import HardwareError
from cl_compiler.hardware.spec import HardwareSpec, Level, Link

__all__ = ["one_device", "with_ranks"]

_TORCH = "default: PyTorch 2.13 torch/_inductor/comm_analysis.py"
# (bandwidth inside a node, between nodes), bytes/s per device and direction.
_BY_ARCH = {"sm_80": (240e9, 25e9), "sm_90": (370e9, 50e9), "sm_100": (720e9, 50e9)}
_PCIE = (24e9, 25e9)


def with_ranks(spec: HardwareSpec, world_size: int, ranks_per_node: int) -> HardwareSpec:
    """Put ``spec``'s device into nodes of ``ranks_per_node`` ranks, ``world_size`` in all.

    Args:
        spec: of one device, as ``load_hardware("auto")`` gives it; a spec that already has
            ``world_size`` devices is returned as it is.
        world_size: ranks in all.
        ranks_per_node: ranks on each machine.  Where it does not divide ``world_size``, every
            rank counts as a node of its own, which overstates communication rather than hiding it.

    Raises:
        HardwareError: the spec describes another number of devices, or a count is below 1.
    """
    if spec.world_size == world_size:
        return spec
    if world_size < 1 or ranks_per_node < 1:
        raise HardwareError(
            f"cannot spread {world_size} ranks over nodes of {ranks_per_node}; give counts >= 1"
        )
    if spec.world_size != 1:
        raise HardwareError(
            f"hardware {spec.name!r} has {spec.world_size} devices and the group {world_size} "
            'ranks; use a spec of that size, or hardware_spec="auto"'
        )
    per_node = min(ranks_per_node, world_size)
    if world_size % per_node:
        per_node = 1
    nodes = world_size // per_node
    device = replace(spec.device_level, count=per_node)
    inner = spec.levels[spec.levels.index(spec.device_level) + 1 :]
    levels = [Level("node", "node", nodes, 0, 0.0, "ranks of the process group"), device, *inner]
    links = []
    if per_node > 1:
        links.append(_inside(spec))
    if nodes > 1:
        levels.insert(0, Level("cluster", "cluster", 1, 0, 0.0, "the process group"))
        links.append(_between(spec))
    return replace(
        spec, name=f"{spec.name}-{nodes}x{per_node}", levels=tuple(levels), links=tuple(links)
    )


def one_device(spec: HardwareSpec) -> HardwareSpec:
    """A cluster's device by itself, as one rank's own work sees it."""
    if spec.world_size == 1:
        return spec
    inner = spec.levels[spec.levels.index(spec.device_level) + 1 :]
    levels = (replace(spec.device_level, count=1), *inner)
    return replace(spec, levels=levels, links=())


def _inside(spec: HardwareSpec) -> Link:
    if spec.kind == "cpu":
        return Link("device", "tcp", 2e9, 50e-6, True, "default: Gloo over a loopback socket")
    if spec.kind == "hip":
        return Link("device", "xgmi", 48e9, 3.4e-6, True, "default: one link of an MI300X")
    if spec.arch in _BY_ARCH:
        return Link("device", "nvlink", _BY_ARCH[spec.arch][0], 3.4e-6, True, _TORCH)
    return Link("device", "pcie", _PCIE[0], 5.7e-6, False, _TORCH)


def _between(spec: HardwareSpec) -> Link:
    if spec.kind == "cpu":
        return Link("node", "tcp", 1e9, 100e-6, True, "default: Gloo over 10 Gb/s Ethernet")
    rate = _BY_ARCH.get(spec.arch, _PCIE)[1]
    return Link("node", "infiniband", rate, 14e-6, True, _TORCH)
