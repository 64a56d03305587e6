"""Machine code of the emitted kernels, compiled without a GPU, at their real tile sizes.

Thresholds are those of a kernel that keeps tensor cores busy: for each logit one exponential, one
FMA before it, and one or two additions for sums; nothing spilled; no test on interior tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest

from cl_compiler.plan.types import Tile
from tests import losses_zoo as zoo
from tests.codegen.triton.emit import served

pytest.importorskip("triton")

from tests.codegen.triton import offline
from tests.codegen.triton.offline import Binary

pytestmark = pytest.mark.skipif(
    not offline.has_disassembler(), reason="this build of Triton has no disassembler"
)

CASES = {case.name: case for case in zoo.cases() if case.name in served()}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Of one multiprocessor; two programs of four warps share it."""
SHARED_ELSEWHERE = {"sm_89": 99 << 10, "sm_120": 99 << 10, "gfx90a": 64 << 10}
"""Of GPUs for which a few losses are compiled, not the zoo."""
EVERYWHERE = SHARED_BYTES | SHARED_ELSEWHERE
QUICK = ["sm_90", *(pytest.param(a, marks=pytest.mark.full) for a in EVERYWHERE if a != "sm_90")]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Triton's cache would hide what this compiler makes of the code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@lru_cache(maxsize=32)
def compiled(name: str, arch: str, width: int, dtype: str = "bfloat16") -> dict[str, Binary]:
    return {b.kernel: b for b in offline.binaries(CASES[name], arch, width, dtype)}


def assert_sound(binary: Binary, arch: str) -> None:
    """No spills, matrix instructions, registers and shared memory within the machine."""
    programs = 2 if binary.threads == 128 else 1
    assert binary.stack_bytes == 0, f"{binary.kernel} spills {binary.stack_bytes} bytes"
    assert binary.matrix_instructions > 0, binary.kernel
    assert binary.registers * binary.threads * programs <= 65536 or arch.startswith("gfx")
    assert binary.shared_bytes * programs <= EVERYWHERE[arch], binary.kernel


@pytest.mark.parametrize("arch", QUICK)
@pytest.mark.parametrize(("name", "width"), [("clip", 512), ("siglip", 768), ("matryoshka", 512)])
def test_nothing_spills(name: str, width: int, arch: str):
    for binary in compiled(name, arch, width).values():
        assert_sound(binary, arch)


@pytest.mark.parametrize("arch", QUICK)
def test_maxima_are_nan_where_anything_is(arch: str):
    """The interpreter's are in any case; a processor's only by an instruction of its own."""
    if arch.startswith("gfx"):
        pytest.skip("instructions are counted for NVIDIA's processors")
    maxima = compiled("batch_hard", arch, 256)["_forward_sweep_kernel"].variants
    kinds = {name for name in maxima if name.startswith("FMNMX")}
    assert kinds and all(".NAN" in name for name in kinds), kinds


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_100", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "name", ["nt_xent", *(pytest.param(n, marks=pytest.mark.full) for n in ("clip", "matryoshka"))]
)
def test_nothing_spills_where_rows_begin_between_multiples_of_16_bytes(name: str, arch: str):
    """They come through addresses, on machines that have descriptors."""
    for binary in compiled(name, arch, 100).values():
        assert_sound(binary, arch)
        assert binary.counts.get("UTMALDG", 0) == 0


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16x3", "tf32"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_nothing_spills_of_fp32_operands_whose_rows_begin_anywhere(arch: str, precision: str):
    for binary in offline.binaries(CASES["nt_xent"], arch, 102, "float32", precision):
        assert_sound(binary, arch)


@pytest.mark.parametrize(
    ("arch", "precision"),
    [
        ("sm_80", "bf16x3"),
        ("sm_90", "bf16x3"),
        ("sm_90", "ieee"),
        *(
            pytest.param(arch, precision, marks=pytest.mark.full)
            for arch, precision in (("sm_100", "bf16x3"), ("gfx942", "bf16x3"), ("sm_80", "tf32"),
                                    ("sm_90", "tf32"), ("sm_100", "ieee"), ("gfx942", "tf32"))
        ),
    ],
)  # fmt: skip
def test_nothing_spills_with_fp32_operands(arch: str, precision: str):
    """In ieee there is no matrix instruction on NVIDIA's, and much less room for a tile."""
    for binary in offline.binaries(CASES["clip"], arch, 512, "float32", precision):
        assert binary.stack_bytes == 0, f"{binary.kernel} spills {binary.stack_bytes} bytes"
        assert binary.shared_bytes <= SHARED_BYTES[arch]
        exact = precision == "ieee" and arch != "gfx942"
        assert (binary.matrix_instructions == 0) == exact


@pytest.mark.full
@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("name", CASES)
def test_nothing_spills_in_the_zoo(name: str, arch: str):
    for binary in compiled(name, arch, 512).values():
        if binary.matrix_instructions:  # a count of ids has none
            assert_sound(binary, arch)


@pytest.mark.full
@pytest.mark.xfail(reason="Triton 3.7.1: 8 bytes in the safe forward", strict=False)
def test_nothing_spills_of_rows_of_odd_length_in_fp32():
    for binary in offline.binaries(CASES["clip"], "sm_89", 99, "float32", "bf16x3"):
        assert_sound(binary, "sm_89")


def test_forward_has_one_exponential_for_both_directions():
    binary = compiled("clip", "sm_90", 512)["_forward_sweep_bounded_kernel"]
    assert binary.tile == Tile(128, 128)
    assert binary.per_logit("MUFU") <= 1.03
    assert binary.per_logit("FFMA", "FMUL") <= 1.02
    assert binary.per_logit("FADD") <= 2.1  # one for the row's sum, one for the column's
    assert binary.per_logit("SHFL") <= 0.08
    assert binary.per_logit("FSETP", "SEL", "FSEL", "FMNMX") == 0


def test_gradient_tile_has_one_exponential():
    """Two of the additions belong to the branch that only tiles with positives take."""
    binary = compiled("clip", "sm_90", 512)["_backward_sweep_bounded_kernel"]
    assert binary.tile == Tile(128, 128)
    assert binary.per_logit("MUFU") <= 1.05
    assert binary.per_logit("FADD", "FMUL", "FFMA") <= 3.1 + 2
    assert binary.per_logit("SHFL") <= 0.07  # in that branch: a row's sum


def test_value_and_gradient_of_a_pairwise_loss_share_an_exponential():
    binary = compiled("siglip", "sm_90", 768)["_forward_sweep_kernel"]
    assert binary.per_logit("MUFU") <= 2.05  # the exponential, and the reciprocal of the sigmoid
    # 9 for log(1 + u), and Triton 3.6 takes the exponential's argument twice; one belongs to the
    # branch that only tiles with positives take
    assert binary.per_logit("FFMA", "FMUL", "FADD") <= 20 + 1
    assert binary.registers <= 255


def test_hopper_multiplies_by_warpgroup_and_copies_by_descriptor():
    for binary in compiled("clip", "sm_90", 512).values():
        assert binary.counts.get("HMMA", 0) == 0, binary.kernel
        assert any(name.startswith("HGMMA.64x") for name in binary.variants)
        assert binary.counts.get("UTMALDG", 0) >= 2
    backward = compiled("clip", "sm_90", 512)["_backward_sweep_bounded_kernel"]
    assert backward.counts.get("UTMASTG", 0) >= 1


@pytest.mark.full
def test_ampere_copies_asynchronously():
    for binary in compiled("clip", "sm_80", 512).values():
        assert binary.counts.get("LDGSTS", 0) > 0, binary.kernel
