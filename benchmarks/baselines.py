"""The baselines: plain PyTorch expressions, and other libraries with the fastest settings that give the same result."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize, one_hot

from .calls import Call, MissingError, Tensors, needs
from .entry import Implementation
from .inputs import Inputs


def library(name: str, extra: str = "bench") -> ModuleType:
    """Import a module of another library.

    Raises:
        MissingError: the library is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(f"{error}; install the extra {extra!r}") from error


# --- distances and search ---


def distances(x: Tensor, codes: Tensor) -> Tensor:
    """Squared distances [N, K] as users write them."""
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


def _neighbours(search: Callable[[], Any], read: Callable[[Any], tuple[Tensor, Tensor]]) -> Call:
    """A search for k neighbours; `read` gives indices and squared distances. For k = 1 the answer is the indices."""

    def answer(out: Any) -> Tensors:
        indices, squared = read(out)
        return (indices[:, 0],) if indices.shape[1] == 1 else (indices, squared)

    return Call(search, answer=answer)


def _faiss_cpu(inputs: Inputs) -> Call:
    """`IndexFlatL2.search`. The codebook is added to the index beforehand, which is not timed."""
    needs("cpu", inputs)
    index = library("faiss").IndexFlatL2(inputs.size.d)
    index.add(inputs.codes.numpy())
    x, k = inputs.x.numpy(), inputs.size.selected
    return _neighbours(lambda: index.search(x, k), lambda out: (torch.from_numpy(out[1]), torch.from_numpy(out[0])))


def _faiss_gpu(inputs: Inputs) -> Call:
    needs("cuda", inputs)
    faiss = library("faiss", "bench-gpu")
    if not hasattr(faiss, "StandardGpuResources"):
        raise MissingError("the installed faiss is built for the CPU only")
    library("faiss.contrib.torch_utils")
    arguments = faiss.StandardGpuResources(), inputs.x, inputs.codes, inputs.size.selected
    return _neighbours(lambda: faiss.knn_gpu(*arguments), lambda out: (out[1].long(), out[0]))


def _cuvs(inputs: Inputs) -> Call:
    needs("cuda", inputs)
    brute_force = library("cuvs.neighbors.brute_force", "bench-gpu")
    index = brute_force.build(inputs.codes, metric="sqeuclidean")

    def read(out: Any) -> tuple[Tensor, Tensor]:
        squared, indices = (torch.as_tensor(each, device=inputs.x.device) for each in out)
        return indices.long(), squared

    return _neighbours(lambda: brute_force.search(index, inputs.x, inputs.size.selected), read)


NEIGHBOURS = (
    Implementation("faiss-cpu", _faiss_cpu, package="faiss-cpu"),
    Implementation("faiss-gpu", _faiss_gpu, package="faiss-gpu"),
    Implementation("cuVS", _cuvs, package="cuvs-cu13"),
)


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


def ema_by_one_hot(x: Tensor, indices: Tensor, sizes: Tensor, sums: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    encodings = one_hot(indices, len(codes)).to(x.dtype)
    return _average(encodings.sum(0), encodings.T @ x, sizes, sums, codes)


def ema_by_index_add(x: Tensor, indices: Tensor, sizes: Tensor, sums: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.zeros_like(sums).index_add_(0, indices, x.to(sums.dtype))
    return _average(torch.bincount(indices, minlength=len(codes)), total, sizes, sums, codes)


def _average(counts: Tensor, total: Tensor, sizes: Tensor, sums: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    # `add_(total, alpha=0.01)` is avoided: torch.compile 2.14 drops alpha when it fuses it with a matrix product.
    sizes.mul_(0.99).add_(0.01 * counts.to(sizes.dtype))
    sums.mul_(0.99).add_(0.01 * total.to(sums.dtype))
    n = sizes.sum()
    smoothed = (sizes + 1e-5) / (n + len(sizes) * 1e-5) * n
    codes.copy_(sums / smoothed[:, None])
    return sizes, sums


def flash_kmeans_update(inputs: Inputs) -> Call:
    """The means of the vectors that are assigned to each code, without an average over time."""
    needs("cuda", inputs)
    update = library("flash_kmeans.centroid_update_triton", "bench-gpu").triton_centroid_update_sorted_euclid
    x, indices, codes = inputs.x[None], inputs.indices[:, 0][None], inputs.codes[None]

    def answer(means: Tensor) -> Tensors:
        counts = torch.bincount(indices[0], minlength=inputs.size.k).double()
        return 0.99 + 0.01 * counts, 0.99 * codes[0].double() + 0.01 * counts[:, None] * means[0].double()

    return Call(lambda: update(x, indices, codes), answer=answer)


# --- quantization: quantized vectors (straight-through), indices, and the sum of codebook and commitment loss ---


def quantize(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    indices = argmin(x, codes)
    return _straight_through(x, codes[indices], indices)


def quantize_by_one_hot(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    indices = argmin(x, codes)
    return _straight_through(x, one_hot(indices, len(codes)).to(x.dtype) @ codes, indices)


def quantize_residuals(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A loop over levels, each straight-through: the gradient of x counts once for each level."""
    residual, quantized, loss, indices = x, torch.zeros_like(x), x.new_zeros(()), []
    for codes in codebooks:
        level, found, level_loss = quantize(residual, codes)
        residual, quantized, loss = residual - level.detach(), quantized + level, loss + level_loss
        indices.append(found)
    return quantized, torch.stack(indices, 1), loss


def lucidrains_residual(inputs: Inputs, training: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """ResidualVQ of vector-quantize-pytorch with codebooks that are learned by gradient, straight-through."""
    levels, (num_levels, num_codes, num_features) = inputs.codebooks.cpu(), inputs.codebooks.shape
    layer = library("vector_quantize_pytorch").ResidualVQ(
        dim=num_features,
        num_quantizers=num_levels,
        codebook_size=num_codes,
        learnable_codebook=True,
        ema_update=False,
        rotation_trick=False,
    )
    with torch.no_grad():
        for level, codes in zip(layer.layers, levels, strict=True):
            level.codebook = codes.float()
    layer.to(inputs.x.device).train(training)

    def run(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The codes are parameters [1, K, D] of the layers; those that are differentiated take their places.
        for level, codes in zip(layer.layers, codebooks, strict=True):
            level._codebook._parameters.pop("embed", None)
            level._codebook.embed = codes[None]
        quantized, indices, losses = layer(x[None])
        return quantized[0], indices[0], losses.sum()

    return run


def residual_statistics(x: Tensor, indices: Tensor, codebooks: Tensor) -> Tensor:
    """Sums and counts [k, K, D + 1] by a loop over levels."""
    statistics, residual, ones = [], x, x.new_ones(len(x), 1)
    for codes, index in zip(codebooks, indices.T, strict=True):
        sums = codes.new_zeros(len(codes), codes.shape[1] + 1)
        statistics.append(sums.index_add_(0, index, torch.cat([residual, ones], 1)))
        residual = residual - codes[index]
    return torch.stack(statistics)


def _straight_through(x: Tensor, q: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x + (q - x).detach(), indices, mse_loss(q, x.detach()) + mse_loss(q.detach(), x)


def rotate(x: Tensor, q: Tensor) -> Tensor:
    """q, with the gradient of the rotation trick by detached tensors, as vector-quantize-pytorch computes it."""
    fixed = x.detach()
    x_norm, q_norm = (each.norm(dim=1, keepdim=True).clamp(min=1e-6) for each in (fixed, q))
    source, target = fixed / x_norm, q / q_norm
    between = normalize(source + target, dim=1)
    rotated = x - 2 * (x * between).sum(1, keepdim=True) * between + 2 * (x * source).sum(1, keepdim=True) * target
    return rotated * (q_norm / x_norm)


# --- sparse coding ---


def softmax_at(x: Tensor, weight: Tensor, bias: Tensor, indices: Tensor) -> Tensor:
    return torch.softmax(torch.nn.functional.linear(x, weight, bias), dim=1).gather(1, indices)


def entropies(x: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The mean entropy of the soft assignments, and the entropy of their mean, by N x K matrices."""
    logits = -torch.cdist(x, codes).square() / temperature
    p = logits.softmax(1)
    mean = p.mean(0)
    return -(p * logits.log_softmax(1)).sum(1).mean(), -(mean * mean.clamp(min=1e-30).log()).sum()


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
    """A module of eai-sparsify, loaded from its file: the package itself imports a whole training stack."""
    needs("cuda", inputs)
    package = importlib.util.find_spec("sparsify")
    if package is None or not package.submodule_search_locations:
        raise MissingError("eai-sparsify is not installed; install the extra 'bench-gpu'")
    path = Path(package.submodule_search_locations[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"sparsify_{name}", path)
    if spec is None or spec.loader is None:
        raise MissingError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
