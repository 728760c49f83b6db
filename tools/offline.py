"""Compile every Triton kernel for each architecture on a machine without a GPU, and inspect the machine code.

`python -m tools.offline` calls the operations unchanged, with a driver that compiles kernels and does not run them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dlvae_kernels.backends.triton import operations as kernels
from dlvae_kernels.backends.triton.architectures import TABLE
from dlvae_kernels.backends.triton.search.config import search_config

from .machine_code import Kernel, read

ARCHITECTURES = tuple(TABLE)

# The bfloat16 kernels differ from the float16 kernels in the type of their instructions only: one case covers them.
_PRECISIONS = (
    (torch.float32, "float32"),
    (torch.float32, "exact"),
    (torch.float16, "float32"),
    (torch.float32, "tf32"),
    (torch.float16, "exact"),
)


def _searches() -> Iterator[tuple[int, torch.dtype, str, int]]:
    for d in (8, 16, 64, 100, 128, 256):
        for dtype, precision in _PRECISIONS:
            # Few codes and many codes lead to groups of different sizes.
            for num_codes in (512, 16_384) if (dtype, precision) in _PRECISIONS[:3] else (16_384,):
                yield d, dtype, precision, num_codes


def _name(d: int, dtype: torch.dtype, precision: str, num_codes: int) -> str:
    return f"D={d} K={num_codes} {str(dtype)[6:]} {precision}"


def _distinct(arch: int) -> list[str]:
    """All cases, without searches whose kernel differs from that of another case in numbers of tiles or blocks only."""
    last: dict[tuple[Any, ...], str] = {}
    with driver_of(arch):
        for search in _searches():
            d, dtype, precision, num_codes = search
            splits = dtype == torch.float32 and precision != "tf32"
            config = search_config(d, num_codes, torch.float16 if splits else dtype, splits, precision == "exact")
            last[config, dtype, precision, d % 16 == 0, config.block_d == config.padded(d)] = _name(*search)
    repeated = {_name(*search) for search in _searches()} - set(last.values())
    return [case for case in cases() if case not in repeated]


def cases() -> dict[str, Callable[[], Any]]:
    """Calls that together launch every kernel in every configuration, by name.

    No kernel runs, so that large inputs are left uninitialised: zeros would take a second for each case.
    """
    found: dict[str, Callable[[], Any]] = {}
    for d, dtype, precision, num_codes in _searches():
        x, codebook = torch.empty(65_536, d, dtype=dtype), torch.empty(num_codes, d, dtype=dtype)
        found[_name(d, dtype, precision, num_codes)] = partial(_search, x, codebook, precision)
    x, codebook = torch.empty(65_536, 64, dtype=torch.bfloat16), torch.empty(16_384, 64, dtype=torch.bfloat16)
    found["D=64 K=16384 bfloat16 float32"] = partial(_search, x, codebook, "float32")
    x, codebook = torch.empty(1_024, 64), torch.empty(16_384, 64)
    found["few rows"] = lambda: kernels.nearest_code(x, codebook, False, "float32")
    map = torch.empty(64, 64, 256).transpose(1, 2)
    found["map"] = lambda: kernels.nearest_code(map, codebook[:512], False, "float32")
    indices, one = torch.zeros(1_024, dtype=torch.int64), torch.ones(())
    many, few = torch.empty(65_536, 64), codebook[:512]
    found["quantize, fused"] = lambda: kernels.vector_quantize_fwd(many, few, True, "float32", None)
    found["quantize, fused, bfloat16"] = lambda: kernels.vector_quantize_fwd(
        many.bfloat16(), few.bfloat16(), True, "float32", None
    )
    found["quantize, fused, D=8"] = lambda: kernels.vector_quantize_fwd(
        many[:, :8], codebook[:, :8], False, "float32", None
    )
    found["quantize"] = lambda: kernels.vector_quantize_fwd(x, codebook, True, "float32", None)
    found["quantize, no error"] = lambda: kernels.vector_quantize_fwd(x, codebook, False, "float32", None)
    found["quantize, backward"] = lambda: kernels.vector_quantize_bwd(x, one, one, x, indices, 16_384, 1, True, True)
    found["rotation trick"] = lambda: kernels.rotation_trick_bwd(many, many, many)
    found["rotation trick, map"] = lambda: kernels.rotation_trick_bwd(map, map, map.bfloat16())
    found["gather"] = lambda: kernels.gather_codes_fwd(codebook, indices)
    found["gather, backward"] = lambda: kernels.gather_codes_bwd(x, indices, 16_384, 1)
    found["one_hot"] = lambda: kernels.one_hot(indices, 512, torch.float32)
    found["ema"] = lambda: kernels.ema_step(
        codebook, torch.ones(16_384), codebook.clone(), kernels.ema_statistics(x, indices, 16_384, 1), 0.99, 1e-5
    )
    found["ema, few codes"] = lambda: kernels.ema_statistics(x, indices, 512, 1)
    found["ema, few codes, many vectors"] = lambda: kernels.ema_statistics(many, torch.zeros(65_536).long(), 512, 1)
    found["ema, few codes, bfloat16"] = lambda: kernels.ema_statistics(x.bfloat16(), indices, 512, 1)
    # Four heads, and a mask.
    of_heads, codebooks = torch.empty(16_384, 4, 64), torch.empty(4, 512, 64)
    codes_of_heads, mask = torch.zeros(16_384, 4, dtype=torch.int64), torch.ones(16_384, 4, dtype=torch.bool)
    map_of_heads = torch.empty(64, 4, 64, 256).permute(0, 3, 1, 2)
    for d, dtype, precision in (
        (8, torch.float32, "exact"),
        (64, torch.float16, "float32"),
        (64, torch.float32, "tf32"),
    ):
        name = f"heads D={d} {str(dtype)[6:]} {precision}"
        found[name] = partial(_search, of_heads[..., :d].to(dtype), codebooks[..., :d].to(dtype), precision)
    wide = torch.empty(16_384, 4, 256), torch.empty(4, 512, 256)
    found["heads D=256 float32 exact"] = lambda: _search(*wide, "exact")
    found["heads, map"] = lambda: kernels.vector_quantize_fwd(map_of_heads, codebooks, True, "float32", None)
    found["heads, mask"] = lambda: kernels.vector_quantize_fwd(of_heads, codebooks, True, "float32", mask)
    found["mask"] = lambda: kernels.vector_quantize_fwd(many, few, True, "float32", mask.view(-1))
    found["heads, backward"] = lambda: kernels.vector_quantize_bwd(
        map_of_heads, one, one, map_of_heads, codes_of_heads.view(64, 256, 4), 512, 4, True, True
    )
    found["heads, gather"] = lambda: kernels.gather_codes_fwd(codebooks, codes_of_heads)
    # 512 codes of all heads.
    found["heads, ema"] = lambda: kernels.ema_step(
        codebooks[:, :128],
        torch.ones(4, 128),
        codebooks[:, :128].clone(),
        kernels.ema_statistics(map_of_heads, codes_of_heads, 128, 4).view(4, 128, 65),
        0.99,
        1e-5,
    )
    found |= _residual_cases()
    # Triton compiles an argument that is 1 into a constant.
    single, first = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    for name, call in _ALL.items():
        found[f"{name}, all sizes 1"] = partial(call, single, first)
    # Large dictionaries use the gather design, small dictionaries the dense design.
    for name, n, num_atoms, d, k, dtype in (
        ("many atoms", 1_024, 16_384, 256, 32, torch.float32),
        ("many atoms, D=64", 1_024, 16_384, 64, 32, torch.float32),
        ("many atoms, k=1000", 1_024, 16_384, 256, 1_000, torch.float32),
        ("few atoms", 16_384, 512, 256, 100, torch.float32),
        ("few atoms, float16", 16_384, 256, 256, 100, torch.float16),
    ):
        values, atoms = torch.ones(n, k, dtype=dtype), torch.zeros(n, k, dtype=torch.int64)
        inputs = values, atoms, torch.empty(num_atoms, d, dtype=dtype)
        found[f"sparse decode, {name}"] = partial(kernels.sparse_decode_fwd, *inputs)
        found[f"sparse decode, {name}, backward"] = partial(
            kernels.sparse_decode_bwd, torch.empty(n, d, dtype=dtype), *inputs, True, True
        )
    for d, num_codes, dtype in ((256, 512, torch.float32), (256, 512, torch.bfloat16), (64, 8_192, torch.float32)):
        name = f"kept softmax D={d} K={num_codes} {str(dtype)[6:]}"
        found[name] = partial(_softmax, torch.empty(16_384, d, dtype=dtype), torch.empty(num_codes, d, dtype=dtype))
    # The features of a vector of a channel-first map are not contiguous.
    found["kept softmax, map"] = lambda: _softmax(torch.empty(64, 256, 256).transpose(1, 2), torch.empty(512, 256))
    for d, num_codes, dtype in ((32, 4_096, torch.float32), (256, 16_384, torch.float32), (64, 4_096, torch.bfloat16)):
        name = f"code entropy D={d} K={num_codes} {str(dtype)[6:]}"
        found[name] = partial(_entropy, torch.empty(16_384, d, dtype=dtype), torch.empty(num_codes, d, dtype=dtype))
    found["code entropy, map"] = lambda: _entropy(torch.empty(64, 256, 256).transpose(1, 2), torch.empty(512, 256))
    # Small codebooks keep all scores on the chip; large codebooks stream tiles of scores.
    for n, num_codes, d, k, metric, dtype in (
        (16_384, 512, 256, 100, "l2", torch.float32),
        (16_384, 512, 256, 100, "l2", torch.bfloat16),
        (16_384, 128, 64, 8, "dot", torch.float32),
        (16_384, 32_768, 768, 32, "dot", torch.float32),
        (16_384, 32_768, 768, 192, "dot", torch.bfloat16),
        (2_048, 2_048, 64, 2, "l2", torch.float32),
        (2_048, 4_096, 64, 256, "l2", torch.float32),
    ):
        bias = torch.empty(num_codes, dtype=dtype) if metric == "dot" else None
        found[f"topk K={num_codes} D={d} k={k} {metric} {str(dtype)[6:]}"] = partial(
            kernels.topk_codes, torch.empty(n, d, dtype=dtype), torch.empty(num_codes, d, dtype=dtype), k, metric, bias
        )
    return found


def _residual_cases() -> dict[str, Callable[[], Any]]:
    """Calls of residual quantization with eight levels."""
    found: dict[str, Callable[[], Any]] = {}
    for n, d, dtype, precision in (
        # Few vectors are searched in small blocks.
        (4_800, 128, torch.float32, "float32"),
        (4_800, 128, torch.float32, "exact"),
        (4_800, 128, torch.float32, "tf32"),
        (4_800, 64, torch.float32, "exact"),
        (4_800, 8, torch.float32, "float32"),
        (65_536, 128, torch.float32, "float32"),
        (65_536, 256, torch.float32, "exact"),
        (65_536, 128, torch.float16, "float32"),
        (65_536, 8, torch.float32, "exact"),
    ):
        x, codebooks = torch.empty(n, d, dtype=dtype), torch.empty(8, 1_024, d, dtype=dtype)
        flags = (torch.ones(8, dtype=torch.bool), torch.ones(n, dtype=torch.bool)) if n > 4_800 else (None, None)
        found[f"residual N={n} D={d} {str(dtype)[6:]} {precision}"] = partial(
            kernels.residual_quantize_fwd, x, codebooks, *flags, precision, "once"
        )
    indices, losses = torch.zeros(4_800, 8, dtype=torch.int64), torch.ones(8)
    for d, gradient in ((128, "once"), (128, "each"), (128, "rotation"), (128, "rotation_each"), (1_000, "rotation")):
        x, codebooks = torch.empty(4_800, d), torch.empty(8, 1_024, d)
        found[f"residual D={d} {gradient}, backward"] = partial(
            kernels.residual_quantize_bwd, x, losses, losses, x, indices, codebooks, gradient, True, True
        )
    x = torch.empty(4_800, 128)
    for num_codes in (1_024, 2_048):
        codebooks = torch.empty(8, num_codes, 128)
        found[f"residual statistics K={num_codes}"] = partial(kernels.residual_statistics, x, indices, codebooks)
    return found


# Calls of every operation on x [1, 1] and indices [1, 1].
_ALL: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "nearest_code": lambda x, i: kernels.nearest_code(x, x, True, "exact"),
    "topk_codes": lambda x, i: kernels.topk_codes(x, x, 1, "l2", None),
    "topk_codes, many": lambda x, i: kernels.topk_codes(x, x.expand(600, 1), 1, "dot", None),
    "vector_quantize": lambda x, i: kernels.vector_quantize_fwd(x, x, True, "float32", None),
    "vector_quantize, backward": lambda x, i: kernels.vector_quantize_bwd(x, x, x, x, i[0], 1, 1, True, True),
    "vector_quantize, heads": lambda x, i: kernels.vector_quantize_fwd(
        x.expand(1, 2, 1), x.expand(2, 1, 1), True, "exact", i.expand(1, 2) == 0
    ),
    "rotation_trick": lambda x, i: kernels.rotation_trick_bwd(x, x, x),
    "gather_codes": lambda x, i: kernels.gather_codes_fwd(x, i),
    "gather_codes, heads": lambda x, i: kernels.gather_codes_fwd(x.expand(2, 1, 1), i.expand(1, 2)),
    "one_hot": lambda x, i: kernels.one_hot(i, 1, torch.float32),
    "ema_update": lambda x, i: kernels.ema_step(x, x[0], x, kernels.ema_statistics(x, i[0], 1, 1), 0.9, 1e-5),
    "residual_quantize": lambda x, i: kernels.residual_quantize_fwd(x, x[None], None, None, "exact", "once"),
    "residual_quantize, backward": lambda x, i: kernels.residual_quantize_bwd(
        *(x, x[0], x[0], x, i, x[None], "rotation_each", True, True)
    ),
    "residual_statistics": lambda x, i: kernels.residual_statistics(x, i, x[None]),
    "sparse_decode": lambda x, i: kernels.sparse_decode_fwd(x, i, x),
    "sparse_decode, backward": lambda x, i: kernels.sparse_decode_bwd(x, x, i, x, True, True),
    "kept_softmax": lambda x, i: _softmax(x, x),
    "code_entropy": lambda x, i: _entropy(x, x),
}


def _search(x: torch.Tensor, codebook: torch.Tensor, precision: str) -> None:
    kernels.nearest_code(x, codebook, True, precision)


def _softmax(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Call the forward and the backward pass with one selected code for each vector."""
    indices = torch.zeros(*x.shape[:-1], 1, dtype=torch.int64)
    values, sums = kernels.kept_softmax_fwd(x, weight, None, indices)
    kernels.kept_softmax_bwd(values, values, sums, x, weight, None, indices, True, True, True)


def _entropy(x: torch.Tensor, codebook: torch.Tensor) -> None:
    """Call the forward and the backward pass."""
    entropies, sums, means = kernels.code_entropy_fwd(x, codebook, 1.0, None)
    kernels.code_entropy_bwd(entropies, means, x, codebook, sums, entropies, 1.0, None, True, True)


def compile_case(arch: int, case: str) -> list[Kernel]:
    """The kernels that a case launches. Kernels shared with earlier cases are compiled once.

    Raises:
        Exception: any exception of the compiler.
    """
    return [read(*each, case, arch) for each in _compiled_by(cases()[case], arch)]


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES, names: tuple[str, ...] = ()) -> Iterator[Kernel]:
    """Every kernel of the named cases (no names: all cases), once for each configuration; uses all CPU cores."""
    seen = set()
    # Every process has its own cache in memory; the cache on disk is shared.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(compile_case, arch, case) for arch in architectures for case in names or _distinct(arch)]
        for task in tasks:
            for kernel in task.result():
                if (kernel.arch, kernel.hash) not in seen:
                    seen.add((kernel.arch, kernel.hash))
                    yield kernel


def _compiled_by(call: Callable[[], Any], arch: int) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that a call launches, compiled for an architecture and not run, with their options."""
    found: list[tuple[Any, dict[str, Any]]] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = original(self, *args, grid=grid, warmup=True, **options)
        found.append((compiled, options))
        return compiled

    with driver_of(arch):
        JITFunction.run = run
        try:
            call()
        finally:
            JITFunction.run = original
    return found


@contextmanager
def driver_of(arch: int) -> Iterator[None]:
    """Install a driver for a GPU that does not exist. Triton caches by device, so each architecture is a device."""
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


def main() -> int:
    """Print every kernel. The exit status is 1 if any kernel has a fault."""
    faults, architectures = [], set()
    for kernel in compile_all():
        print(kernel.line(), flush=True)
        architectures.add(kernel.arch)
        faults += [f"sm_{kernel.arch} {kernel.label}: {fault}" for fault in kernel.faults()]
    faults += [f"sm_{arch} is missing" for arch in set(ARCHITECTURES) - architectures]
    print(*faults, sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
