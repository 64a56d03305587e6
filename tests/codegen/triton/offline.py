"""Compile recorded launches for an architecture that need not be here; read the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cl_compiler.plan.types import Tile
from cl_compiler.runtime.loader import load_source
from tests.codegen.triton.emit import REAL, emit
from tests.codegen.triton.launches import Launch, Recorder, record
from tests.zoo_case import Case

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+|@!?UPT\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);"
)
ROWS = 16384


@dataclass(frozen=True)
class Binary:
    """What a kernel became.

    ``stack_bytes``: of spilled registers, per thread; ``shared_bytes``: per program;
    ``counts``: instructions by mnemonic without modifiers; ``variants``: with them; ``body``: of
    the loop over tiles, or of the whole kernel where there is one tile.
    """

    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    counts: Mapping[str, int]
    variants: Mapping[str, int]
    body: Mapping[str, int]
    tile: Tile
    threads: int
    matrix_instructions: int

    def per_logit(self, *names: str) -> float:
        """Instructions of these kinds for each logit of a tile."""
        count = sum(self.body.get(name, 0) for name in names)
        return count * self.threads / (self.tile.rows * self.tile.cols)


def binaries(
    case: Case, arch: str, width: int, dtype: str = "bfloat16", precision: str = "ieee"
) -> list[Binary]:
    """Every kernel of a case at its real tile sizes, each once."""
    source = emit(
        case, dtype=dtype, width=width, arch=arch, panel=REAL, core=None, precision=precision
    )
    module = load_source(source, f"offline_{case.name}_{arch}_{width}_{dtype}")
    launches = record(module, case, ROWS, ROWS, width, getattr(torch, dtype))
    first = {launch.kernel: launch for launch in reversed(launches)}
    return [build(module, first[k], arch) for k in sorted(first) if "row_products" not in k]


def build(module: ModuleType, launch: Launch, arch: str) -> Binary:
    """Compile one launch and take the binary apart."""
    recorder = getattr(module, launch.kernel)
    assert isinstance(recorder, Recorder)
    names = recorder.kernel.arg_names
    constants = dict(launch.constants)
    signature = {n: "constexpr" if n in constants else launch.signature[n] for n in names}
    attributes: dict[tuple[int], Any] = {}
    for position, name in enumerate(names):
        if signature[name].startswith("*") or launch.multiples_of_16.get(name):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=recorder.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    nvidia = arch.startswith("sm_")
    target = (
        GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        if nvidia
        else GPUTarget("hip", arch, 64)
    )
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    tile = Tile(constants["BLOCK_M"], constants["BLOCK_N"])
    threads = launch.options["num_warps"] * target.warp_size
    read = read_cubin if nvidia else read_amdgcn
    registers, stack, counts, variants, body = read(compiled)
    matrix = sum(n for name, n in counts.items() if re.match(r"[HQ]G?MMA|UTC\w*MMA|v_mfma", name))
    return Binary(
        launch.kernel,
        registers,
        stack,
        compiled.metadata.shared,
        counts,
        variants,
        body,
        tile,
        threads,
        matrix,
    )


Facts = tuple[int, int, Counter[str], Counter[str], Counter[str]]


def read_cubin(compiled: Any) -> Facts:
    """Registers, stack and instructions of an NVIDIA binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = disassemble("-sass", file.name)
        usage = disassemble("-res-usage", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    lines = [
        Line(int(m.group(1), 16), m.group(2), m.group(3))
        for m in map(INSTRUCTION.match, code.splitlines())
        if m
    ]
    variants = Counter(line.name for line in lines)
    return found["REG"], found["STACK"], mnemonics(lines), variants, tile_loop(lines)


@dataclass(frozen=True)
class Line:
    """One machine instruction."""

    address: int
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch leads."""
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found.group(1), 16) if self.name.startswith("BRA") and found else None


def mnemonics(lines: Iterable[Line]) -> Counter[str]:
    return Counter(line.name.split(".")[0] for line in lines)


def tile_loop(lines: list[Line]) -> Counter[str]:
    """The smallest loop with matrix instructions and all exponentials; without one, everything."""
    exponentials = mnemonics(lines)["MUFU"]
    bodies = []
    for line in lines:
        if line.target is not None and line.target < line.address:
            body = [x for x in lines if line.target <= x.address <= line.address]
            counts = mnemonics(body)
            matrix = sum(n for name, n in counts.items() if name.endswith("MMA"))
            if matrix and counts["MUFU"] == exponentials and not counts["EXIT"]:
                bodies.append(body)
    return mnemonics(min(bodies, key=len, default=lines))


def disassemble(option: str, path: str) -> str:
    run = subprocess.run(
        [str(DISASSEMBLER), option, path], capture_output=True, text=True, check=True
    )
    return run.stdout + run.stderr


def read_amdgcn(compiled: Any) -> Facts:
    """Registers, scratch and instructions of AMD's assembly text."""
    text = compiled.asm["amdgcn"]
    names = Counter(re.findall(r"^\s+([vs]_\w+|ds_\w+|buffer_\w+|global_\w+)", text, re.M))
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[-1])
    scratch = int(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)[-1])
    counts = Counter({("v_mfma" if "mfma" in n else n): c for n, c in names.items()})
    return registers, scratch, counts, names, counts


@lru_cache(maxsize=1)
def has_disassembler() -> bool:
    return DISASSEMBLER.exists()
