"""The machine: presets, detection and calibration, all of which end in a ``HardwareSpec``."""

from __future__ import annotations

from pathlib import Path

from cl_compiler.errors import HardwareError
from cl_compiler.hardware.spec import HardwareSpec, Host, Level, Link
from cl_compiler.hardware.toml import preset_names, read_preset, read_toml

__all__ = ["HardwareSpec", "Host", "Level", "Link", "load_hardware", "preset_names"]


def load_hardware(spec: str | Path | HardwareSpec) -> HardwareSpec:
    """Turn whatever a user may call hardware into a value.

    Args:
        spec: "auto" (this machine, with its calibration if there is one), a preset's name, the
            path of a ``.toml`` file, or a spec, which is returned as it is.

    Raises:
        HardwareError: no such preset or file, or the file describes no machine.
    """
    if isinstance(spec, HardwareSpec):
        return spec
    if isinstance(spec, Path):
        return read_toml(spec)
    if not isinstance(spec, str):
        raise HardwareError(
            f'hardware_spec is of type {type(spec).__name__}; give "auto", a preset\'s name, '
            "the path of a .toml file or a HardwareSpec"
        )
    if spec == "auto":
        from cl_compiler.hardware.detect import detect

        return detect()
    # Preset names have neither a suffix nor a folder, so a path can never be mistaken for one.
    if spec.endswith(".toml") or "/" in spec or "\\" in spec:
        return read_toml(Path(spec).expanduser())
    return read_preset(spec)
