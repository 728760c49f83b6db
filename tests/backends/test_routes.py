from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import timeit
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import dlvae_kernels
from dlvae_kernels import BackendUnavailable, backend_info, backends, nearest_code, use_backend
from dlvae_kernels.backends import BACKENDS, choose, native, reference, unavailable_reason

ROOT = Path(__file__).parents[2]
X, CODEBOOK = torch.zeros(2, 3), torch.zeros(4, 3)


def module(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.fixture
def not_built(monkeypatch):
    """Make the C++ library unavailable, whether or not it is built."""
    monkeypatch.setattr(native, "library_unavailable_reason", lambda: "the C++ library was not built: no C++ compiler")


def test_reference_is_available_for_everything():
    assert set(backend_info()) == set(reference.__all__)
    assert all(reasons["reference"] is None for reasons in backend_info().values())


@pytest.mark.parametrize("name", ["triton", "native"])
def test_use_backend_unavailable_raises_its_reason(name, not_built):
    reason = unavailable_reason(name, "nearest_code", X)
    assert reason
    with use_backend(name), pytest.raises(BackendUnavailable) as caught:
        nearest_code(X, CODEBOOK)
    message = f"nearest_code: backend '{name}' is forced, but {reason}; use_backend(\"reference\")"
    assert str(caught.value) == message
    assert nearest_code(X, CODEBOOK).tolist() == [0, 0]


def test_use_backend_backward_and_compiled_code_are_bound():
    x = torch.randn(3, 3, requires_grad=True)
    out = dlvae_kernels.vector_quantize(x, CODEBOOK)
    compiled = torch.compile(nearest_code, fullgraph=True, backend="aot_eager")
    compiled(X, CODEBOOK)
    with use_backend("triton"):
        with pytest.raises(BackendUnavailable):
            out.commitment_loss.backward()
        with pytest.raises(BackendUnavailable):
            compiled(X, CODEBOOK)


def test_use_backend_nested_block_ends_after_an_error():
    with use_backend("reference"):
        with pytest.raises(RuntimeError), use_backend("triton"):
            raise RuntimeError
        assert backends.forced_backend() == "reference"
    assert backends.forced_backend() is None


def test_backend_unknown_name_raises():
    with (
        pytest.raises(ValueError, match="expected name to be one of triton, native, reference, got 'cuda'"),
        use_backend("cuda"),
    ):
        pass
    with pytest.raises(ValueError, match=r"expected backend to be one of .*, got 'cuda'"):
        unavailable_reason("cuda", "nearest_code")


def test_dlvae_backend_set_is_followed(monkeypatch):
    monkeypatch.setenv("DLVAE_BACKEND", "triton")
    with pytest.raises(BackendUnavailable, match="triton"):
        nearest_code(X, CODEBOOK)
    with use_backend("reference"):
        nearest_code(X, CODEBOOK)
    monkeypatch.setenv("DLVAE_BACKEND", "tritn")
    with pytest.raises(ValueError, match=r"expected DLVAE_BACKEND to be one of .*, got 'tritn'"):
        nearest_code(X, CODEBOOK)


def test_route_unavailable_backends_are_logged_once(monkeypatch, caplog, not_built):
    calls = []
    able = SimpleNamespace(unavailable_reason=lambda op, *args: None, nearest_code=lambda *args: calls.append(args))
    monkeypatch.setattr(backends, "_logged", set())
    caplog.set_level(logging.INFO, logger="dlvae_kernels")
    for _ in range(2):
        assert choose("nearest_code", X) is reference.nearest_code
    assert len(caplog.records) == 1
    assert "not native: the C++ library was not built: no C++ compiler" in caplog.text
    monkeypatch.setitem(BACKENDS, "native", able)
    backends._routes.clear()
    assert choose("nearest_code", X) is able.nearest_code


def test_route_fallback_on_a_gpu_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_logged", set())
    backends._log_route("nearest_code", "cuda", "reference", ["not triton: no"])
    assert caplog.records[0].levelno == logging.WARNING


def test_route_error_in_a_kernel_is_not_caught(monkeypatch):
    def fails(*args):
        raise FloatingPointError("kernel")

    monkeypatch.setattr(reference, "nearest_code", fails)
    with use_backend("reference"), pytest.raises(FloatingPointError, match="kernel"):
        nearest_code(X, CODEBOOK)


def test_main_prints_every_operation_backend_and_reason():
    result = module({}, "-m", "dlvae_kernels")
    assert result.returncode == 0, result.stderr
    info = backend_info()
    assert all(f"\n{op} " in result.stdout for op in info)
    cuda = native.cuda_unavailable_reason()
    expected = "available" if cuda is None else f"unavailable: {cuda}"
    assert f"CUDA kernels of the native backend: {expected}\n" in result.stdout
    for backend in BACKENDS:
        lines = [line for line in result.stdout.splitlines() if line.startswith(f"{backend}, ")]
        for op, reasons in info.items():
            mine = [line for line in lines if line.startswith(f"{backend}, all: ") or op in line.split(":")[0]]
            assert len(mine) == (reasons[backend] is not None)
            assert all(line.endswith(f": {reasons[backend]}".splitlines()[0]) for line in mine)


def test_dlvae_backend_from_a_shell_is_followed():
    code = "import torch, dlvae_kernels as d; d.nearest_code(torch.zeros(2, 3), torch.zeros(4, 3))"
    result = module({"DLVAE_BACKEND": "triton"}, "-c", code)
    assert "BackendUnavailable: nearest_code: backend 'triton' is forced, but" in result.stderr
    assert module({"DLVAE_BACKEND": "reference"}, "-c", code).returncode == 0


def test_indices_on_a_device_are_checked_under_dlvae_check(monkeypatch):
    # The check would synchronise a GPU, so it runs on request only; "meta" stands for a GPU.
    seen = []
    monkeypatch.setattr(torch, "_assert_async", seen.append)
    indices = torch.zeros(3, dtype=torch.int64, device="meta")
    dlvae_kernels.ops._check_range(indices, 2)
    assert not seen
    monkeypatch.setenv("DLVAE_CHECK", "1")
    dlvae_kernels.ops._check_range(indices, 2)
    assert len(seen) == 1


def test_use_backend_overlapping_threads_are_bound_by_their_own_blocks():
    entered, left = threading.Event(), threading.Event()
    seen = {}

    def first():
        with use_backend("reference"):
            entered.set()
            left.wait(10)
            seen["first"] = backends.forced_backend()

    def second():
        entered.wait(10)
        seen["second, outside"] = backends.forced_backend()
        with use_backend("native"):
            seen["second"] = backends.forced_backend()
            left.set()
            threads[0].join(10)
        seen["second, after"] = backends.forced_backend()

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == {"first": "reference", "second, outside": None, "second": "native", "second, after": None}
    assert backends.forced_backend() is None


def test_use_backend_thread_of_autograd_is_bound():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(backends.forced_backend())
            return grad

    out = Probe.apply(torch.zeros(2, requires_grad=True)).sum()
    # A thread that enters no block itself stands for those that run the backward of CUDA tensors.
    with use_backend("reference"):
        thread = threading.Thread(target=out.backward)
        thread.start()
        thread.join(10)
    assert seen == ["reference"]


def absent_instruction_set() -> str:
    """One that this library has kernels for and this processor cannot run."""
    if native.library_unavailable_reason() is not None:
        pytest.skip(native.library_unavailable_reason())
    absent = set(native.instruction_sets(everywhere=True)) - set(native.instruction_sets())
    if not absent:
        pytest.skip("this processor has every instruction set that there are kernels for")
    return absent.pop()


def test_dlvae_cpu_absent_instruction_set_raises(monkeypatch):
    name = absent_instruction_set()
    monkeypatch.setenv("DLVAE_CPU", name)
    with pytest.raises(
        BackendUnavailable, match=f"DLVAE_CPU is '{name}', which this processor lacks; it has .*portable"
    ):
        nearest_code(X, CODEBOOK)
    with use_backend("reference"):
        nearest_code(X, CODEBOOK)
    # The table of what can run where still prints.
    assert name in unavailable_reason("native", "nearest_code", X)


def test_route_missing_library_warns_once_with_the_remedy(monkeypatch, not_built, recwarn):
    monkeypatch.setattr(backends, "_logged", set())
    nearest_code(X, CODEBOOK)
    nearest_code(X, CODEBOOK)
    dlvae_kernels.topk_codes(X, CODEBOOK, 2)
    (warning,) = recwarn.list
    assert warning.category is UserWarning
    assert "the C++ library was not built: no C++ compiler" in str(warning.message)
    assert "Install a C++ compiler and then the package again" in str(warning.message)


def test_use_backend_reference_does_not_warn(monkeypatch, not_built, recwarn):
    monkeypatch.setattr(backends, "_logged", set())
    with use_backend("reference"):
        nearest_code(X, CODEBOOK)
    assert not recwarn.list


@pytest.mark.skipif(native.library_unavailable_reason() is not None, reason=str(native.library_unavailable_reason()))
def test_route_float64_does_not_warn(monkeypatch, recwarn):
    monkeypatch.setattr(backends, "_logged", set())
    nearest_code(X.double(), CODEBOOK.double())
    assert not recwarn.list


def test_route_repeated_call_asks_no_backend_again(monkeypatch):
    asked = []
    reasons_of = native.unavailable_reason
    monkeypatch.setattr(native, "unavailable_reason", lambda op, *args: asked.append(op) or reasons_of(op, *args))
    for _ in range(3):
        nearest_code(X, CODEBOOK)
    assert asked == ["nearest_code"]
    nearest_code(X.double(), CODEBOOK.double())
    dlvae_kernels.topk_codes(X, CODEBOOK, 1)
    dlvae_kernels.topk_codes(X, CODEBOOK, 2)
    assert asked == ["nearest_code", "nearest_code", "topk_codes", "topk_codes"]


def test_route_variable_set_after_a_call_is_read_at_the_next(monkeypatch):
    before = choose("nearest_code", X)
    monkeypatch.setenv("DLVAE_BACKEND", "reference")
    assert choose("nearest_code", X) is reference.nearest_code
    monkeypatch.delenv("DLVAE_BACKEND")
    assert choose("nearest_code", X) is before
    name = absent_instruction_set()
    monkeypatch.setenv("DLVAE_CPU", name)
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=name):
            choose("nearest_code", X)


def test_route_memoised_by_one_thread_does_not_bind_another():
    with use_backend("reference"):
        assert choose("nearest_code", X) is reference.nearest_code
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose("nearest_code", X)))
        thread.start()
        thread.join(10)
    assert seen == [choose("nearest_code", X)]


@pytest.mark.parametrize(
    ("op", "lowest"),
    [(op.schema.partition("(")[0], op.lowest) for op in dlvae_kernels.ops.OPERATIONS if op.indices],
)
def test_indices_out_of_range_raise_one_error_on_every_backend(op, lowest):
    indices, table, values = torch.tensor([[0, 4]]), torch.ones(4, 2), torch.ones(1, 2)
    calls = {
        "one_hot": lambda: dlvae_kernels.one_hot(indices, 4),
        "gather_codes_fwd": lambda: dlvae_kernels.gather_codes(table, indices),
        "ema_statistics": lambda: dlvae_kernels.functional.ema_statistics(torch.ones(1, 2, 3), indices, 4),
        "residual_statistics": lambda: dlvae_kernels.functional.residual_statistics(
            torch.ones(1, 2), indices, torch.ones(2, 4, 2)
        ),
        "sparse_decode_fwd": lambda: dlvae_kernels.sparse_decode(values, indices, table),
        "kept_softmax_fwd": lambda: dlvae_kernels.kept_softmax(values, table, None, indices),
    }
    for backend in ("reference", "native"):
        if why := unavailable_reason(backend, op):
            pytest.skip(why)
        meaning = r" \(-1 stands for no code\)" if lowest < 0 else ""
        message = rf"expected indices in \[{lowest}, 4\){meaning}, got 4"
        with use_backend(backend), pytest.raises(ValueError, match=message):
            calls[op]()


@pytest.mark.skipif(native.library_unavailable_reason() is not None, reason=str(native.library_unavailable_reason()))
def test_nearest_code_one_vector_costs_at_most_12_us_more_than_native():
    x, codebook = torch.randn(1, 64), torch.randn(16, 64)
    calls = {
        "public": lambda: nearest_code(x, codebook),
        "native": lambda: torch.ops.dlvae_native.nearest_code(x, codebook, False, "float32"),
    }
    best = dict.fromkeys(calls, float("inf"))
    # The best of many short runs, interleaved, is that of an undisturbed processor.
    for _ in range(300):
        for name, call in calls.items():
            best[name] = min(best[name], timeit.timeit(call, number=20) / 20)
    assert best["public"] - best["native"] <= 12e-6, best


class _Recorder(TorchDispatchMode):
    """Records the names of the operations that reach torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_call_dispatch_mode_sees_the_operation():
    with _Recorder() as recorder:
        nearest_code(X, CODEBOOK)
    assert "dlvae.nearest_code.default" in recorder.names


def test_call_fake_and_meta_tensors_run_the_fake():
    assert nearest_code(X.to("meta"), CODEBOOK.to("meta")).is_meta
    with FakeTensorMode() as mode:
        inputs = mode.from_tensor(X), mode.from_tensor(CODEBOOK)
    assert isinstance(nearest_code(*inputs), FakeTensor)


def test_call_traced_graphs_hold_the_operation():
    graph = make_fx(lambda x, codebook: nearest_code(x, codebook))(X, CODEBOOK)
    assert "dlvae.nearest_code" in graph.code
    batched = torch.func.vmap(lambda x: dlvae_kernels.gather_codes(CODEBOOK, x))(torch.zeros(2, 3).long())
    assert batched.shape == (2, 3, 3)


def test_call_tensor_subclass_stays_one():
    class Named(torch.Tensor):
        pass

    assert type(nearest_code(X.as_subclass(Named), CODEBOOK)) is Named
