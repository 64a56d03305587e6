"""Reading specs: presets, files, extension, and every way in which a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_compiler.errors import HardwareError
from cl_compiler.hardware import HardwareSpec, load_hardware, preset_names

MACHINE = """
name = "toy"
kind = "cpu"
arch = "x86-avx2"
exp_per_s = 1e9
pass_per_s = 4e9
op_overhead_s = 0

[[levels]]
name = "device"
kind = "device"
count = 1
memory_bytes = "16GiB"
bandwidth_bytes_per_s = 20e9
source = "base"

[[levels]]
name = "core"
kind = "core"
count = 4
memory_bytes = 32768
bandwidth_bytes_per_s = 1e11
source = "base"

[gemm_flops_per_s]
float32 = 1e11

[sources]
exp_per_s = "base"
pass_per_s = "base"
"""


def write(folder: Path, text: str, name: str = "machine.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_with_sizes_as_text_or_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, MACHINE)
    spec = load_hardware(str(path))
    assert spec.device_memory_bytes == 16 << 30 and spec.level("core").memory_bytes == 32768
    assert spec.host is None and spec.links == ()
    assert load_hardware(path) == spec == HardwareSpec.from_toml(str(path))


def test_load_hardware_returns_a_spec_as_it_is() -> None:
    spec = load_hardware("h100x1")
    assert load_hardware(spec) is spec


def test_an_extension_overrides_numbers_and_adds_sources(tmp_path: Path) -> None:
    write(tmp_path, MACHINE, "base.toml")
    path = write(
        tmp_path,
        """
        extends = "base.toml"
        name = "bigger"
        exp_per_s = 2e9
        [[levels]]
        name = "core"
        count = 8
        source = "eight cores"
        [[levels]]
        name = "l2"
        kind = "cache"
        count = 1
        memory_bytes = "1MiB"
        bandwidth_bytes_per_s = 5e10
        source = "added"
        [gemm_flops_per_s]
        float64 = 5e10
        [sources]
        exp_per_s = "extension"
        """,
    )
    spec = load_hardware(path)
    assert [level.name for level in spec.levels] == ["device", "l2", "core"]
    assert spec.level("core").count == 8 and spec.level("core").memory_bytes == 32768
    assert spec.level("core").source == "base; eight cores"
    assert dict(spec.gemm_flops_per_s) == {"float32": 1e11, "float64": 5e10}
    assert dict(spec.sources) == {"exp_per_s": "extension", "pass_per_s": "base"}
    assert (spec.name, spec.exp_per_s, spec.pass_per_s) == ("bigger", 2e9, 4e9)


def test_a_file_may_extend_a_preset(tmp_path: Path) -> None:
    path = write(tmp_path, 'extends = "h100x8"\nname = "ours"\n[host]\nmemory_bytes = "1TiB"\n')
    ours, preset = load_hardware(path), load_hardware("h100x8")
    assert ours.host is not None and preset.host is not None
    assert ours.host.memory_bytes == 1 << 40
    assert ours.host.link_bandwidth_bytes_per_s == preset.host.link_bandwidth_bytes_per_s
    assert ours.levels == preset.levels and ours.links == preset.links


def test_extending_in_a_circle_is_refused_and_shows_the_circle(tmp_path: Path) -> None:
    path = write(tmp_path, 'extends = "b.toml"', "a.toml")
    write(tmp_path, 'extends = "c.toml"', "b.toml")
    write(tmp_path, 'extends = "a.toml"', "c.toml")
    with pytest.raises(HardwareError) as caught:
        load_hardware(path)
    message = str(caught.value)
    steps = message.split(" extends ")
    assert [Path(step.split(";")[0].split(": ")[-1]).name for step in steps] == [
        "a.toml",
        "b.toml",
        "c.toml",
        "a.toml",
    ]
    assert message.endswith("remove one of these 'extends'")


def test_an_unknown_preset_suggests_close_names_and_lists_all() -> None:
    with pytest.raises(HardwareError) as caught:
        load_hardware("h100-8")
    message = str(caught.value)
    assert "no hardware preset is called 'h100-8'; did you mean" in message
    assert "h100x8" in message.partition("known:")[0]
    assert all(name in message.partition("known:")[2] for name in preset_names())
    with pytest.raises(HardwareError) as caught:
        load_hardware("zzz")
    assert "did you mean" not in str(caught.value) and "h200-128x8" in str(caught.value)


@pytest.mark.parametrize("value", [None, 8, ["h100x8"]])
def test_what_is_no_hardware_spec_at_all_is_refused(value: object) -> None:
    with pytest.raises(
        HardwareError, match=f"hardware_spec is of type {type(value).__name__}; give"
    ):
        load_hardware(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "name = \n", "as TOML: .*correct it"),
        ('arch = "x86-avx2"', "", "'toy' lacks arch; add"),
        ("count = 1\n", "", "level 'device' lacks count; add"),
        ("exp_per_s = 1e9\npass_per_s = 4e9", "exp_per_s = 1e9", "lacks pass_per_s"),
        ("[gemm_flops_per_s]\nfloat32 = 1e11", "", "lacks gemm_flops_per_s"),
        ("exp_per_s = 1e9", "exp_per_s = -1e9", "exp_per_s is -1000000000.0"),
        ("exp_per_s = 1e9", 'exp_per_s = "1e9"', "exp_per_s is '1e9'; give a number"),
        ("exp_per_s = 1e9", "exp_per_s = inf", "exp_per_s is inf; give a finite number"),
        ("exp_per_s = 1e9", "exp_per_s = true", "exp_per_s is True; give a number"),
        ("exp_per_s = 1e9", "exp_per_s = 1e9\nexps_per_s = 1", "'exps_per_s'; did you mean"),
        ("count = 4", "count = 4\nthreads = 8", "level 'core' has an unknown field 'threads'"),
        ("count = 4", "count = -4", "'core': count is -4"),
        ("count = 4", "count = 4.0", "count is 4.0; give an integer"),
        ('"16GiB"', '"16G"', "level 'device': cannot read '16G'.*GiB or GB"),
        ('"16GiB"', '"16KiB"', "'core' .* is larger than 'device' around it"),
        ('kind = "core"', 'kind = "node"', "outermost first"),
        ("[gemm_flops_per_s]\nfloat32", "[gemm_efficiency]\nwide", "lacks gemm_flops_per_s"),
        ("[sources]", "[gemm_efficiency]\nwide = 0.5\n[sources]", "the key 'wide'; use an inner"),
        ("exp_per_s = 1e9", "exp_per_s = 1e9\nmeasured = 3", "measured is 3; give a list"),
        ("exp_per_s = 1e9", 'exp_per_s = 1e9\nlinks = "pcie"', r"write each as \[\[links\]\]"),
        ("exp_per_s = 1e9", "exp_per_s = 1e9\nhost = 3", "a host is 3; write it as a table"),
        ('name = "toy"', 'name = "toy"\nextends = 3', "extends is 3; name one preset or .toml"),
        ('name = "toy"', 'name = "toy"\nextends = "h100x9"', "called 'h100x9'; did you mean"),
        ('name = "toy"', 'name = "toy"\nextends = "none.toml"', "none.toml: there is no such file"),
    ],
)
def test_a_wrong_file_is_refused_with_its_path_and_the_fix(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in MACHINE
    path = write(tmp_path, MACHINE.replace(old, new, 1) if old else new)
    with pytest.raises(HardwareError, match=message) as caught:
        load_hardware(path)
    if "h100x9" not in new:
        assert str(tmp_path) in str(caught.value)


def test_tables_that_do_not_fit_their_base_are_refused(tmp_path: Path) -> None:
    for wrong in ('levels = "many"', "levels = [3]", "host = 5", "gemm_flops_per_s = 5"):
        path = write(tmp_path, f'extends = "h100x1"\n{wrong}\n')
        with pytest.raises(HardwareError, match=r"machine\.toml"):
            load_hardware(path)


def test_a_file_that_is_missing_a_folder_or_binary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match=r"no such file; .*a preset: a100-4x8"):
        load_hardware(tmp_path / "absent.toml")
    with pytest.raises(HardwareError, match="cannot read"):
        load_hardware(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HardwareError, match="not UTF-8"):
        load_hardware(tmp_path / "binary.toml")
