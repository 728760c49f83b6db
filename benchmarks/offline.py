"""Compile every Triton kernel for each architecture on a machine without a GPU, and read what the compiler made.

`python -m benchmarks offline` launches the operations as they are, with a driver that compiles and does not run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dlvae_kernels.backends import triton as kernels

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory that a program may take.
_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_MATRIX = re.compile(r"^(HGMMA|HMMA|IMMA|QGMMA|UTC\w*MMA)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Kernel:
    """What one kernel became on one architecture."""

    label: str
    arch: int
    registers: int
    spilled: int  # bytes of local memory
    shared: int  # bytes
    matrix: dict[str, int]  # matrix instructions by name
    bulk_copies: int  # TMA
    per_distance: float | None  # non-matrix instructions of the search loop; None: no loop of that kind

    def faults(self) -> list[str]:
        found = [f"spills {self.spilled} bytes"] if self.spilled else []
        if self.shared > _SHARED[self.arch]:
            found.append(f"takes {self.shared} bytes of shared memory, of which there are {_SHARED[self.arch]}")
        if self.label.startswith("_search_kernel") and self.per_distance is None:
            found.append("its search loop has no matrix instructions")
        return found

    def line(self) -> str:
        matrix = " ".join(f"{name} x{count}" for name, count in self.matrix.items()) or "-"
        loop = f"{self.per_distance:.2f} other instructions a distance" if self.per_distance is not None else ""
        return (
            f"sm_{self.arch:<4} {self.registers:>3} registers {self.spilled:>4} B spilled {self.shared:>6} B shared"
            f"  {matrix:<34} TMA {self.bulk_copies}  {self.label}  {loop}"
        )


def cases() -> dict[str, Callable[[], Any]]:
    """Calls that together launch every kernel in every configuration."""
    found: dict[str, Callable[[], Any]] = {}
    for d in (8, 64, 100, 128, 256):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for precision in ("float32", "exact", "tf32"):
                if dtype != torch.float32 and precision == "tf32":
                    continue
                x, codebook = torch.zeros(65_536, d, dtype=dtype), torch.zeros(1_024, d, dtype=dtype)
                name = f"D={d} {str(dtype)[6:]} {precision}"
                found[name] = partial(_search, x, codebook, precision)
    x, codebook = torch.zeros(1_024, 64), torch.zeros(16_384, 64)
    found["few rows"] = lambda: kernels.nearest_code(x, codebook, False, "float32")
    map = torch.zeros(64, 64, 256).transpose(1, 2)
    found["map"] = lambda: kernels.nearest_code(map, codebook[:512], False, "float32")
    indices, one = torch.zeros(1_024, dtype=torch.int64), torch.ones(())
    found["quantize"] = lambda: kernels.vector_quantize_fwd(x, codebook, True, "float32")
    found["quantize, no error"] = lambda: kernels.vector_quantize_fwd(x, codebook, False, "float32")
    found["quantize, backward"] = lambda: kernels.vector_quantize_bwd(x, one, one, x, indices, 16_384, True, True)
    found["gather"] = lambda: kernels.gather_codes_fwd(codebook, indices)
    found["gather, backward"] = lambda: kernels.gather_codes_bwd(x, indices, 16_384)
    found["one_hot"] = lambda: kernels.one_hot(indices, 512, torch.float32)
    found["ema"] = lambda: kernels.ema_step(
        codebook, torch.ones(16_384), codebook.clone(), kernels.ema_statistics(x, indices, 16_384), 0.99, 1e-5
    )
    return found


def _search(x: torch.Tensor, codebook: torch.Tensor, precision: str) -> None:
    kernels.nearest_code(x, codebook, True, precision)


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[Kernel]:
    """Every kernel of `cases`, once for each configuration.

    Raises:
        Whatever the compiler raises.
    """
    for arch in architectures:
        seen = set()
        for case, call in cases().items():
            for compiled, constants in _compiled_by(call, arch):
                if compiled.hash in seen:
                    continue
                seen.add(compiled.hash)
                yield _read(compiled, f"{compiled.metadata.name} {case}", arch, constants)


def _compiled_by(call: Callable[[], Any], arch: int) -> list[tuple[Any, dict[str, Any]]]:
    """What a call launches, compiled for an architecture and not run."""
    found: list[tuple[Any, dict[str, Any]]] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = original(self, *args, grid=grid, warmup=True, **options)
        found.append((compiled, options))
        return compiled

    with _driver(arch):
        JITFunction.run = run
        try:
            call()
        finally:
            JITFunction.run = original
    return found


@contextmanager
def _driver(arch: int) -> Iterator[None]:
    """A driver of a GPU that is not there; the device differs by architecture, as kernels are kept by device."""
    fake = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(fake)
    try:
        yield
    finally:
        triton.runtime.driver._active = before


def _read(compiled: Any, label: str, arch: int, constants: dict[str, Any]) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([str(_TOOL), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    code = [(int(m[1], 16), m[2], m[3]) for m in map(_INSTRUCTION.match, sass.splitlines()) if m]
    names = [name for _, name, _ in code]
    matrix: dict[str, int] = {}
    for name in names:
        if _MATRIX.match(name):
            short = name.split(".")[0]
            matrix[short] = matrix.get(short, 0) + 1
    per_distance = None
    if compiled.metadata.name == "_search_kernel":
        distances = constants["BLOCK_N"] * constants["BLOCK_K"] / (32 * compiled.metadata.num_warps)
        per_distance = _per_distance(code, distances)
    return Kernel(
        label,
        arch,
        int(fields["REG"]),
        int(fields["LOCAL"]) + int(fields["STACK"]),
        compiled.metadata.shared,
        matrix,
        sum(name.startswith(("UTMALDG", "UBLKCP")) for name in names),
        per_distance,
    )


def _per_distance(code: list[tuple[int, str, str]], distances: float) -> float | None:
    """Instructions beside the matrix ones of the innermost loop that has some, by the distances of one turn."""
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


def main() -> int:
    """Print every kernel; returns 1 where one has a fault."""
    faults, architectures = [], set()
    for kernel in compile_all():
        print(kernel.line(), flush=True)
        architectures.add(kernel.arch)
        faults += [f"sm_{kernel.arch} {kernel.label}: {fault}" for fault in kernel.faults()]
    faults += [f"sm_{arch} is missing" for arch in set(ARCHITECTURES) - architectures]
    print(*faults, sep="\n")
    return int(bool(faults))
