"""The CUDA kernels without a GPU: an emulator computes their values, nvcc compiles their code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from torch._subclasses import FakeTensorMode

from dlvae_kernels.backends import BACKENDS, choose, native, reference, unavailable_reason, use_backend
from models.training.config import Config
from models.training.run import Run
from tests.emulated_cuda import HAS_COMPILER, LIBRARY, ROOT, EmulatedCuda, make
from tests.models.runs import write_images

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One compute capability of each generation; `make cuda DLVAE_CUDA_ARCHS=all` compiles the others, by the same rules.
ARCHITECTURES = ("80", "90", "100")

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no make or no g++")
needs_nvcc = pytest.mark.skipif(shutil.which("make") is None or shutil.which("nvcc") is None, reason="no nvcc")


def cuobjdump(*words: object) -> str:
    """NVIDIA's tool that reads compiled kernels, which comes with Triton."""
    program = shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, *words], check=True, capture_output=True, text=True).stdout


def make_cuda() -> Path:
    """Compile the CUDA kernels; the folder of their objects."""
    make("cuda", f"DLVAE_CUDA_ARCHS={' '.join(ARCHITECTURES)}")
    return ROOT / "build" / "cuda" / "-".join(ARCHITECTURES)


@needs_compiler
def test_emulator_own_tests_pass():
    assert "emulator: ok" in make("test-cuda-emulator").stdout


@pytest.mark.slow
@needs_compiler
def test_operations_in_emulator_pass_functional_tests():
    make("cuda-emulated")
    words = ["-m", "pytest", "tests/functional", "tests/backends/test_native_fuzz.py", "-q", "-m", "emulator"]
    environment = {**os.environ, "DLVAE_EMULATED_CUDA": str(LIBRARY)}
    result = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_features", [1, 2, 3, 4, 6, 8, 24, 300])
def test_gather_codes_any_strides_equals_indexing(emulated, dtype, num_features):
    wide = torch.randn(9, num_features + 5).to(dtype)
    indices = torch.randint(0, 9, (2, 25)).T
    for codebook in (wide[:, :num_features], wide[:, 1 : num_features + 1], wide[:, :num_features].T.clone().T):
        assert torch.equal(emulated.gather_codes_fwd(codebook, indices), codebook[indices])
    outside = torch.tensor([0, -1, 8, 9, 2**62])
    expected = torch.where((outside[:, None] >= 0) & (outside[:, None] < 9), codebook[outside.clamp(0, 8)], 0)
    assert torch.equal(emulated.gather_codes_fwd(codebook, outside), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.complex128])
@pytest.mark.parametrize("num_codes", [1, 7, 16, 5000])
def test_one_hot_index_out_of_range_writes_no_one(emulated, dtype, num_codes):
    indices = torch.randint(-2, num_codes + 2, (100, 3))
    columns = torch.arange(num_codes)
    expected = (indices[:, :, None] == columns).any(1).to(dtype)
    assert torch.equal(emulated.one_hot(indices, num_codes, dtype), expected)


@pytest.mark.slow
@needs_nvcc
def test_kernels_each_generation_compile_without_spills():
    folder = make_cuda()
    found = "".join(path.read_text() for path in folder.glob("*.ptxas.txt"))
    assert set(re.findall(r"Compiling entry function '\S*' for 'sm_(\d+)'", found)) == set(ARCHITECTURES)
    assert set(re.findall(r"(\d+) bytes spill", found)) == {"0"}
    library = ROOT / "dlvae_kernels" / "native_cuda.abi3.so"
    assert set(re.findall(r"sm_(\d+)", cuobjdump("--list-elf", library))) == set(ARCHITECTURES)
    assert set(re.findall(r"sm_(\d+)", cuobjdump("--list-ptx", library))) == {ARCHITECTURES[-1]}


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("file", ["search_cuda", "products"])
def test_kernels_sm_90_use_tensor_cores_and_asynchronous_copies(file):
    code = cuobjdump("-sass", "-arch", "sm_90", make_cuda() / f"{file}.cu.o")
    for instruction in ("HMMA.16816.F32 ", "HMMA.16816.F32.BF16 ", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4"):
        assert instruction in code


@pytest.fixture
def on_cuda(monkeypatch):
    """Tensors of a GPU that isn't there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for cached in (native._load_cuda, native._cuda_operation_unavailable_reason):
        monkeypatch.setattr(native, cached.__name__, cached.__wrapped__)
    with FakeTensorMode():
        return torch.empty(2, 3, device="cuda"), torch.empty(4, 3, device="cuda")


@pytest.mark.skipif(
    native.library_unavailable_reason() is not None, reason=f"native: {native.library_unavailable_reason()}"
)
def test_unavailable_reason_cuda_library_unusable_states_reason(on_cuda, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in unavailable_reason("native", "nearest_code", *on_cuda)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_CUDA_LIBRARY", tmp_path / "native_cuda.abi3.so")
    monkeypatch.setattr(native, "_CUDA_REASON", tmp_path / "native_cuda.reason.txt")
    never = "the CUDA C++ library was not built: setup.py has not run here"
    assert unavailable_reason("native", "nearest_code", *on_cuda) == never
    native._CUDA_REASON.write_text("no nvcc\n")
    assert unavailable_reason("native", "nearest_code", *on_cuda) == "the CUDA C++ library was not built: no nvcc"
    native._CUDA_LIBRARY.write_text("no library")
    assert unavailable_reason("native", "nearest_code", *on_cuda).startswith("the CUDA C++ library does not load: ")
    monkeypatch.setattr(native, "_load_cuda", lambda: None)
    registered = {"dlvae_native::one_hot"}
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: name in registered)
    assert (
        unavailable_reason("native", "nearest_code", *on_cuda) == "the CUDA C++ library has no kernel for nearest_code"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    old = "compute capability 8.0 or newer is required, cuda:0 has 7.5"
    assert unavailable_reason("native", "one_hot", *on_cuda) == old
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert unavailable_reason("native", "one_hot", *on_cuda) is None
    large_k = "topk_codes on CUDA supports k <= 1024, got 1025"
    assert unavailable_reason("native", "topk_codes", *on_cuda, 1025, "l2", None) == large_k
    assert "no kernel for torch.float64" in unavailable_reason("native", "one_hot", *(x.double() for x in on_cuda))


@pytest.mark.skipif(
    native.library_unavailable_reason() is not None, reason=f"native: {native.library_unavailable_reason()}"
)
def test_route_gpu_without_triton_takes_compiled_kernels(on_cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert unavailable_reason("triton", "nearest_code", *on_cuda) == "the package triton is not installed"
    monkeypatch.setattr(native, "_load_cuda", lambda: None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for op in reference.__all__:
        assert choose(op, *on_cuda, 1) is getattr(torch.ops.dlvae_native, op).default._op
    # Inputs beyond the kernels' limits run on the reference.
    assert choose("topk_codes", *on_cuda, 1025) is reference.topk_codes


@needs_compiler
@pytest.mark.parametrize("model", ["vqvae", "vqvae-ema", "dlvae"])
def test_models_without_triton_train(model, monkeypatch, tmp_path):
    """Their kernels run in the emulator, on tensors of the CPU."""
    make("cuda-emulated")
    write_images(tmp_path, 20)
    config = Config(
        model=model,
        data=f"folder:{tmp_path}",
        **{"hiddens": 8, "residual_hiddens": 4, "num_embeddings": 40, "embedding_dim": 8, "sparsity_level": 4},
        **{"batch_size": 2, "lr": 1e-2, "schedule": "constant", "device": "cpu", "precision": "float32"},
    )
    losses = {}
    for name, module in (("reference", reference), ("native", EmulatedCuda(str(LIBRARY)))):
        monkeypatch.setitem(BACKENDS, name, module)
        monkeypatch.setitem(sys.modules, "triton", None)
        with use_backend(name):
            run = Run(config, tmp_path / name)
            for _ in range(12):
                run.step()
            losses[name] = torch.tensor([loss for _, loss, *_ in run._step.read(run.ranks).rows(0, 12)])
    torch.testing.assert_close(losses["native"][:4], losses["reference"][:4], rtol=1e-3, atol=1e-4)
    assert losses["native"][-3:].mean() < losses["native"][:3].mean()
