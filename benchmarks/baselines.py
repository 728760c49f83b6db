"""What users would pick instead of ours: plain expressions, and other libraries at their fastest honest settings."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from dlvae_kernels.backends import native, use_backend

from .entry import Call, Inputs, MissingError


def library(name: str, extra: str = "bench") -> ModuleType:
    """Import a module of another library.

    Raises:
        MissingError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(f"{error}; the extra {extra!r} brings it") from error


def needs(device: str, inputs: Inputs) -> None:
    if inputs.x.device.type != device:
        raise MissingError("it needs a CUDA device" if device == "cuda" else "it runs on the CPU alone")


def in_cuda_cpp(prepare: Callable[[Inputs], Call], inputs: Inputs) -> Call:
    """Ours on the compiled kernels of a GPU."""
    needs("cuda", inputs)
    if (reason := native.cuda_unavailable_reason()) is not None:
        raise MissingError(reason)

    def forced(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with use_backend("native"):
                return function(*args)

        return run

    call = prepare(inputs)
    return Call(forced(call.forward), forced(call.backward) if call.backward else None, call.answer)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for these shapes alone, which is the fastest; past the limit of recompilations it would run eagerly."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


# --- distance and search ---


def distances(x: Tensor, codes: Tensor) -> Tensor:
    """The squared distances that users write by hand, [N, K]."""
    return x.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * x @ codes.T


def argmin(x: Tensor, codes: Tensor) -> Tensor:
    return distances(x, codes).argmin(1)


def argmin_tf32(inputs: Inputs) -> Call:
    needs("cuda", inputs)

    def forward() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return argmin(inputs.x, inputs.codes)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return Call(forward)


def topk(x: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = distances(x, codes).topk(k, dim=1, largest=False)
    return indices, values


def topk_by_cdist(x: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.cdist(x, codes).topk(k, dim=1, largest=False)
    return indices, values.square()


def topk_products(x: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = (x @ codes.T).topk(k, dim=1)
    return indices, values


def faiss_cpu(inputs: Inputs) -> Call:
    """`IndexFlatL2.search`; the codebook is added before, untimed."""
    needs("cpu", inputs)
    faiss = library("faiss")
    index = faiss.IndexFlatL2(inputs.size.d)
    index.add(inputs.codes.numpy())
    x, kept = inputs.x.numpy(), inputs.size.kept
    return Call(
        lambda: index.search(x, kept), answer=lambda out: _found(torch.from_numpy(out[1]), torch.from_numpy(out[0]))
    )


def faiss_gpu(inputs: Inputs) -> Call:
    needs("cuda", inputs)
    faiss = library("faiss", "bench-gpu")
    if not hasattr(faiss, "StandardGpuResources"):
        raise MissingError("the faiss that is installed is built for the CPU alone")
    library("faiss.contrib.torch_utils")
    resources = faiss.StandardGpuResources()
    x, codes = inputs.x, inputs.codes
    return Call(
        lambda: faiss.knn_gpu(resources, x, codes, inputs.size.kept), answer=lambda out: _found(out[1].long(), out[0])
    )


def cuvs(inputs: Inputs) -> Call:
    needs("cuda", inputs)
    brute_force = library("cuvs.neighbors.brute_force", "bench-gpu")
    index = brute_force.build(inputs.codes, metric="sqeuclidean")

    def answer(out: Any) -> tuple[Tensor, ...]:
        found, indices = (torch.as_tensor(each, device=inputs.x.device) for each in out)
        return _found(indices.long(), found)

    return Call(lambda: brute_force.search(index, inputs.x, inputs.size.kept), answer=answer)


def _found(indices: Tensor, squared: Tensor) -> tuple[Tensor, ...]:
    """What a library's search of k neighbours found, as `nearest_code` (k = 1) or `topk_codes` gives it."""
    return (indices[:, 0],) if indices.shape[1] == 1 else (indices, squared)


def scikit_learn(inputs: Inputs) -> Call:
    needs("cpu", inputs)
    pairwise = library("sklearn.metrics").pairwise_distances_argmin_min
    x, codes = inputs.x.numpy(), inputs.codes.numpy()
    return Call(lambda: pairwise(x, codes, metric="sqeuclidean"), answer=lambda out: (torch.from_numpy(out[0]),))


def flash_kmeans_assign(inputs: Inputs) -> Call:
    needs("cuda", inputs)
    assign = library("flash_kmeans.assign_euclid_triton", "bench-gpu").euclid_assign_triton
    x, codes = inputs.x[None], inputs.codes[None]
    lengths = x.float().square().sum(-1)
    return Call(lambda: assign(x, codes, lengths), answer=lambda out: (out[0].long(),))


# --- codebook update ---


def ema_by_one_hot(x: Tensor, indices: Tensor, sizes: Tensor, sums: Tensor, codes: Tensor) -> None:
    encodings = torch.nn.functional.one_hot(indices, len(codes)).to(x.dtype)
    _average(encodings.sum(0).float(), (encodings.T @ x).float(), sizes, sums, codes)


def ema_by_index_add(x: Tensor, indices: Tensor, sizes: Tensor, sums: Tensor, codes: Tensor) -> None:
    counts = torch.bincount(indices, minlength=len(codes)).float()
    _average(counts, torch.zeros_like(sums).index_add_(0, indices, x.float()), sizes, sums, codes)


def _average(counts: Tensor, total: Tensor, sizes: Tensor, sums: Tensor, codes: Tensor) -> None:
    # Not `add_(total, alpha=0.01)`: torch.compile 2.14 drops the alpha where it fuses that with a matrix product.
    sizes.mul_(0.99).add_(0.01 * counts)
    sums.mul_(0.99).add_(0.01 * total)
    n = sizes.sum()
    smoothed = (sizes + 1e-5) / (n + len(sizes) * 1e-5) * n
    codes.copy_(sums / smoothed[:, None])


def flash_kmeans_update(inputs: Inputs) -> Call:
    """Means of the rows of each code, without averaging over time."""
    needs("cuda", inputs)
    update = library("flash_kmeans.centroid_update_triton", "bench-gpu").triton_centroid_update_sorted_euclid
    x, indices, codes = inputs.x[None], inputs.indices[:, 0][None], inputs.codes[None]

    def answer(means: Tensor) -> tuple[Tensor, ...]:
        counts = torch.bincount(indices[0], minlength=inputs.size.k).double()
        return 0.99 + 0.01 * counts, 0.99 * codes[0].double() + 0.01 * counts[:, None] * means[0].double()

    return Call(lambda: update(x, indices, codes), answer=answer)


# --- quantization ---


def quantize(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized rows, straight through; indices; the sum of codebook and commitment loss."""
    indices = argmin(x, codes)
    return _straight_through(x, codes[indices], indices)


def quantize_by_one_hot(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    indices = argmin(x, codes)
    return _straight_through(x, torch.nn.functional.one_hot(indices, len(codes)).to(x.dtype) @ codes, indices)


def _straight_through(x: Tensor, q: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x + (q - x).detach(), indices, mse_loss(q, x.detach()) + mse_loss(q.detach(), x)


# --- kept softmax ---


def softmax_at(x: Tensor, weight: Tensor, bias: Tensor, indices: Tensor) -> Tensor:
    return torch.softmax(torch.nn.functional.linear(x, weight, bias), dim=1).gather(1, indices)


# --- sparse decoding ---


def decode_densely(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    coefficients = values.new_zeros(len(values), len(dictionary)).scatter_add(1, indices, values)
    return coefficients @ dictionary


def decode_by_embedding_bag(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(indices, dictionary, per_sample_weights=values, mode="sum")


def sparsify_decoder(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The Triton decoder of eai-sparsify."""
    module = _sparsify("xformers", inputs)
    return lambda values, indices, dictionary: module.xformers_embedding_bag(indices, dictionary, values)


def sparsify_encoder(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor]]:
    """The encoder of eai-sparsify: values and indices of the most active latents, in any order."""
    module = _sparsify("fused_encoder", inputs)
    return lambda x, weight, bias, k: module.fused_encoder(x, weight, bias, k, "topk")[:2]


def _sparsify(name: str, inputs: Inputs) -> ModuleType:
    """A module of eai-sparsify, loaded by its file: the package imports a whole training stack."""
    needs("cuda", inputs)
    package = importlib.util.find_spec("sparsify")
    if package is None or not package.submodule_search_locations:
        raise MissingError("eai-sparsify is not installed; the extra 'bench-gpu' brings it")
    path = Path(package.submodule_search_locations[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"sparsify_{name}", path)
    if spec is None or spec.loader is None:
        raise MissingError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
