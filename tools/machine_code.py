"""The resources and instructions of a compiled Triton kernel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton

from dlvae_kernels.backends.triton.architectures import TABLE

# The shared memory that one program can use, in bytes.
_SHARED = {arch: row.shared_memory for arch, row in TABLE.items()}
_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Kernels that use the matrix units. A kernel that the compiler replaced by a trap has no matrix instructions.
_PRODUCTS = (
    *("_search_kernel", "_select_kernel", "_filter_kernel", "_one_hot_sum_kernel", "_chunk_sum_kernel"),
    *("_dense_decode", "_log_sum_exp_kernel", "_softmax_sum_kernel", "_residual_search_kernel"),
    *("_entropy_sums_kernel", "_entropy_sum_kernel"),
)
_MATRIX = re.compile(r"^(HGMMA|HMMA|IMMA|QGMMA|UTC\w*MMA)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Kernel:
    """The resources and instructions of one kernel, compiled for one architecture."""

    label: str
    hash: str
    arch: int
    registers: int
    spilled: int  # bytes of local memory, if any instruction accesses it
    shared: int  # bytes
    matrix: dict[str, int]  # number of matrix instructions by name
    bulk_copies: int  # number of TMA instructions
    per_distance: float | None  # non-matrix instructions a distance in the search loop; None: no search loop

    def faults(self) -> list[str]:
        found = [f"spills {self.spilled} bytes"] if self.spilled else []
        if self.shared > _SHARED[self.arch]:
            found.append(f"uses {self.shared} bytes of shared memory; the limit is {_SHARED[self.arch]}")
        if self.label.startswith(_PRODUCTS) and not self.matrix:
            found.append("has no matrix instructions for its products")
        return found

    def line(self) -> str:
        matrix = " ".join(f"{name} x{count}" for name, count in self.matrix.items()) or "-"
        loop = f"{self.per_distance:.2f} other instructions a distance" if self.per_distance is not None else ""
        return (
            f"sm_{self.arch:<4} {self.registers:>3} registers {self.spilled:>4} B spilled {self.shared:>6} B shared"
            f"  {matrix:<34} TMA {self.bulk_copies}  {self.label}  {loop}"
        )


@cache
def _read_code(hash: str, cubin: bytes, is_disassembled: bool) -> tuple[dict[str, str], list[tuple[int, str, str]]]:
    """The resource usage of a cubin, and its instructions.

    Disassembly is slow. The instructions are empty unless `is_disassembled` is set or the kernel uses local memory.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([str(_TOOL), option, file.name], capture_output=True, text=True, check=True).stdout

        fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage")))
        if not is_disassembled and fields["STACK"] == fields["LOCAL"] == "0":
            return fields, []
        return fields, [
            (int(m[1], 16), m[2], m[3]) for m in map(_INSTRUCTION.match, dump("--dump-sass").splitlines()) if m
        ]


def read(compiled: Any, constants: dict[str, Any], case: str, arch: int) -> Kernel:
    name = compiled.metadata.name
    fields, code = _read_code(compiled.hash, compiled.asm["cubin"], name.startswith(_PRODUCTS))
    names = [each for _, each, _ in code]
    matrix: dict[str, int] = {}
    for each in names:
        if _MATRIX.match(each):
            short = each.split(".")[0]
            matrix[short] = matrix.get(short, 0) + 1
    per_distance = None
    if name.endswith("_search_kernel"):
        distances = constants["BLOCK_N"] * constants["BLOCK_K"] / (32 * compiled.metadata.num_warps)
        per_distance = _per_distance(code, distances)
    return Kernel(
        f"{name} {case}",
        compiled.hash,
        arch,
        int(fields["REG"]),
        int(fields["LOCAL"]) + int(fields["STACK"]) if any(n.startswith(("STL", "LDL")) for n in names) else 0,
        compiled.metadata.shared,
        matrix,
        sum(each.startswith(("UTMALDG", "UBLKCP")) for each in names),
        per_distance,
    )


def _per_distance(code: list[tuple[int, str, str]], distances: float) -> float | None:
    """Non-matrix instructions of the innermost loop with matrix instructions, divided by the distances an iteration."""
    loops = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            body = [each for at, each, _ in code if int(target[1], 16) <= at <= address]
            if any(map(_MATRIX.match, body)):
                loops.append(body)
    if not loops:
        return None
    body = min(loops, key=len)
    return sum(not _MATRIX.match(name) for name in body) / distances
