"""The codebook of the compatible quantizers: the engine of all layers under the names of vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...functional.autocast import without_autocast
from ...functional.checks import check_between, check_size
from ...functional.ema_update import ema_statistics
from ...functional.gather_codes import gather_codes
from ...functional.residual_quantize import ResidualQuantizeOutput
from ...functional.rotation_trick import rotation_trick
from ...functional.vector_quantize import Gradient, VectorQuantizeOutput
from ...layers.codebook import Codebook as Engine
from ...layers.codebook import is_recomputed
from ...layers.distributed import all_reduce_sum, sample_vectors
from ...layers.initialisation import codes_from
from ...layers.projection import to_unit_length, zeros_where_masked
from ...layers.state import StateNames

_NAMES = StateNames(codes="embed", cluster_size="cluster_size", embed_sum="embed_avg", initialised="initted")
# Sampling looks at this many distances at once.
_DISTANCES = 1 << 20
# Below this count a quotient of averages loses digits.
_LEAST_COUNT = 1e-30

EmaWeight = Tensor | Callable[[Tensor, Tensor], Tensor] | None


class Codebook(Engine):
    """H codebooks `embed` [H, K, D] with `embed_avg` [H, K, D], `cluster_size` [H, K] and the flag `initted` [].

    `embed` is a parameter if it is learnable, otherwise a buffer; writes into it are seen. On the CPU the flag may be
    set to False in place, which asks for another initialisation by k-means.

    Args:
        dim: D.
        codebook_size: K.
        num_codebooks: H.
        ema_update: the codes follow the moving averages.
        manual_ema_update: only when `update_ema` is called.
        learnable_codebook: `embed` is a parameter.
        sync: all-reduce statistics over the ranks, looked up in each forward.
        Others as in `VectorQuantize`.
    """

    _starts_from_clusters = True
    _collapse_remedy = "threshold_ema_dead_code=2 and kmeans_init=True"

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    initted: Tensor
    _used: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0,
        learnable_codebook: bool = False,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        use_cosine_sim: bool = False,
        sync: bool = True,
    ) -> None:
        self._kmeans_iterations = check_size("kmeans_iters", kmeans_iters, 0)
        super().__init__(
            check_size("codebook_size", codebook_size, 1),
            check_size("codebook_dim", dim, 1),
            num_codebooks,
            decay=decay,
            epsilon=eps,
            init="kmeans" if kmeans_init else "uniform",
            dead_code_threshold=threshold_ema_dead_code,
            sync=sync,
            unit_length=use_cosine_sim,
            trainable=learnable_codebook,
            names=_NAMES,
        )
        if not ema_update:
            # A codebook that learns by gradient alone has the dtype of its module.
            self._wide_parameters = ()
        self._sync_kmeans = sync_kmeans
        self.ema_update = ema_update
        self.manual_ema_update = manual_ema_update

    @property
    def codebook_size(self) -> int:
        """K, the number of codes."""
        return self._num_codes

    @property
    def decay(self) -> float:
        """The weight of the past in the moving averages; it may be set between steps."""
        return self._decay  # type: ignore[return-value]

    @decay.setter
    def decay(self, decay: float) -> None:
        check_between("decay", decay, 0, 1)
        self._decay = decay

    @property
    def num_codebooks(self) -> int:
        """H, the number of codebooks."""
        return len(self.embed)

    @property
    def use_cosine_sim(self) -> bool:
        """Whether vectors and codes have length 1."""
        return self._unit_length

    @property
    def is_uninitialised(self) -> bool:
        """Whether the next training batch initialises the codebook."""
        self._read_initialised()
        return self._is_uninitialised

    @property
    def is_synchronised(self) -> bool:
        """Whether statistics are all-reduced if there are several ranks."""
        return self._sync

    @property
    def revives(self) -> bool:
        """Whether dead codes are replaced."""
        return self._dead_code_threshold != 0

    @property
    def is_tracked(self) -> bool:
        """Whether training steps change the moving averages."""
        return self.ema_update or self.revives

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # The codes that have got vectors since they last followed their averages.
        self.register_buffer("_used", torch.zeros_like(self.cluster_size, dtype=torch.bool), persistent=False)

    def _draw(self, codes: Tensor) -> Tensor:
        return nn.init.kaiming_uniform_(codes)

    def initial_codes(self, vectors: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sync = self._sync and self._sync_kmeans
        sampled = all_reduce_sum(sample_vectors(vectors, self._jitter(self._num_codes), sync, mask), sync)
        return codes_from(sampled, vectors, self._kmeans_iterations, self._unit_length, sync, mask)

    def similarities(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """Cosines, or distances below 0, of vectors [..., H, D] and codes [H, K, D]: [..., H, K], with a gradient."""
        with without_autocast(vectors):
            vectors, codes = vectors.float(), codes.float()
            products = torch.einsum("...hd,hkd->...hk", vectors, codes)
            if self._unit_length:
                return products
            squares = vectors.square().sum(-1, keepdim=True) + codes.square().sum(-1)
            return -(squares - 2 * products).clamp(min=1e-8).sqrt()

    @torch.no_grad()
    def sample(self, vectors: Tensor, temperature: float) -> Tensor:
        """Codes drawn by the softmax of the similarities over the temperature: indices [..., H] of [..., H, D]."""
        num_codebooks = self.num_codebooks
        flat = vectors.detach().reshape(-1, num_codebooks, vectors.shape[-1])
        indices = []
        for chunk in flat.split(max(1, _DISTANCES // (num_codebooks * self._num_codes))):
            logits = self.similarities(chunk, self.embed) / temperature
            # The largest of logits plus Gumbel noise is a draw from their softmax.
            indices.append((logits - torch.empty_like(logits).exponential_().log()).argmax(-1))
        return torch.cat(indices).view(vectors.shape[:-1])

    def learn(
        self,
        vectors: Tensor,
        indices: Tensor,
        mask: Tensor | None,
        *,
        weight: EmaWeight = None,
        accumulate: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """Update the state by the vectors [..., H, D] of a step and their indices [..., H], -1 for no code.

        Args:
            mask: [...] bool: True for the vectors that may replace dead codes.
            weight: of the batch, [K] or [H, K], or a function of sums and counts that returns it.
            accumulate: add the statistics to the `grad` of the averages, for the next step that does not.
            ema_update: None for the attribute.
        """
        ema_update = self.ema_update if ema_update is None else ema_update
        if not ema_update and not self.revives:
            return
        statistics = ema_statistics(vectors, indices, self._num_codes, num_heads=self.num_codebooks)
        self.learn_from(
            statistics,
            lambda jitter: sample_vectors(vectors, jitter, self._sync, mask),
            weight=weight,
            accumulate=accumulate,
            ema_update=ema_update,
        )

    @torch.no_grad()
    def learn_from(
        self,
        statistics: Tensor,
        candidates: Callable[[Tensor], Tensor],
        *,
        ran: Tensor | None = None,
        weight: EmaWeight = None,
        accumulate: bool = False,
        ema_update: bool = True,
    ) -> None:
        """`learn` from statistics [H, K, D + 1] of this rank; candidates and ran as in `update` of the base class."""
        if accumulate:
            self._accumulate(all_reduce_sum(statistics, self._sync))
            return
        is_applied = ema_update and not self.manual_ema_update
        # The averages replace codes that a gradient has moved.
        is_plain = is_applied and weight is None and self.embed_avg.grad is None and not self.embed.requires_grad
        average = None if is_plain else partial(self.add_to_averages, weight=weight, is_applied=is_applied)
        self.update(statistics, candidates, ran, average)

    def _accumulate(self, statistics: Tensor) -> None:
        statistics = statistics.to(self.embed_avg.dtype)
        for state, new in ((self.embed_avg, statistics[..., :-1]), (self.cluster_size, statistics[..., -1])):
            state.grad = new.clone() if state.grad is None else state.grad + new

    @torch.no_grad()
    def add_to_averages(self, statistics: Tensor, weight: EmaWeight = None, is_applied: bool = False) -> None:
        """Add statistics [H, K, D + 1] of all ranks, and accumulated ones, to the averages.

        Args:
            weight: as in `learn`.
            is_applied: the codes follow.
        """
        if self.embed_avg.grad is not None:
            self._accumulate(statistics)
            statistics = torch.cat([self.embed_avg.grad, self.cluster_size.grad[..., None]], -1)  # type: ignore[index]
            self.embed_avg.grad = self.cluster_size.grad = None
        statistics = statistics.to(self.cluster_size.dtype)
        sums, counts = statistics[..., :-1], statistics[..., -1]
        if callable(weight):
            weight = weight(sums, counts)
        # One weight for each code of all heads.
        share = torch.as_tensor(1.0 if weight is None else weight, device=counts.device) * (1 - self.decay)
        self.cluster_size.lerp_(counts, share.to(counts.dtype).expand_as(counts))
        self.embed_avg.lerp_(sums, share.to(sums.dtype).expand_as(counts)[..., None])
        self._used |= counts > 0
        if is_applied:
            self.update_ema()

    @torch.no_grad()
    def update_ema(self) -> None:
        """Set the codes that got vectors since the last call to the quotients of their averages, smoothed."""
        counts = self.cluster_size
        total = counts.sum(-1, keepdim=True)
        sizes = (counts + self._epsilon) / (total + self._num_codes * self._epsilon) * total
        # Smoothing would pull a code without vectors to zero. It stays, or returns from where a gradient has moved it.
        codes = self.embed_avg / torch.where(self._used, sizes, counts)[..., None]
        codes = to_unit_length(codes) if self._unit_length else codes
        is_moved = (self._used | self.embed.requires_grad) & (counts > _LEAST_COUNT)
        self.embed.copy_(torch.where(is_moved[..., None], codes, self.embed))
        self._used.zero_()

    @torch.no_grad()
    def expire_codes_(self, batch_samples: Tensor, seq_mask: Tensor | None = None) -> None:
        """Replace dead codes by random ones of the vectors [..., H, D] of all ranks, in train mode.

        Args:
            seq_mask: [...] bool: True for the vectors to draw from.
        """
        if self.training and self.revives:
            jitter = self._jitter(self._num_codes)
            if not is_recomputed():
                sampled = sample_vectors(batch_samples, jitter, self._sync, seq_mask)
                self.replace_dead(all_reduce_sum(sampled, self._sync))

    @torch.no_grad()
    def replace_dead(self, sampled: Tensor) -> None:
        """Replace dead codes by vectors in the form of `sample_vectors`, summed over the ranks: [H, M, D + 1]."""
        found, is_valid = sampled.split([self._num_features, 1], dim=-1)
        self._revive(found, is_valid, None)


def codes_like(codes: Tensor, vectors: Tensor) -> Tensor:
    """Codes in the dtype of vectors, or as they are for vectors in half precision."""
    return codes if vectors.dtype.itemsize < 4 else codes.to(vectors.dtype)


def loss_of_both(out: VectorQuantizeOutput | ResidualQuantizeOutput) -> Tensor:
    """The commitment loss, with the gradients of both losses."""
    return out.commitment_loss + (out.codebook_loss - out.codebook_loss.detach())


def quantize_at(
    indices: Tensor, vectors: Tensor, codes: Tensor, valid: Tensor | None, gradient: Gradient
) -> VectorQuantizeOutput:
    """The output of `vector_quantize` for given indices [..., H] of vectors [..., H, D], but for the counts."""
    is_valid = None if valid is None else valid[..., None].expand(indices.shape)
    if is_valid is not None:
        indices = torch.where(is_valid, indices, -1)
    quantized = gather_codes(codes, indices)
    x = zeros_where_masked(vectors, is_valid)
    count = max(indices.numel(), 1) if is_valid is None else is_valid.sum().clamp(min=1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    codebook_loss, commitment_loss = (
        (a - b).to(dtype).square().sum() / (count * x.shape[-1])
        for a, b in ((x.detach(), quantized), (x, quantized.detach()))
    )
    routed = quantized.detach().to(x.dtype)
    # The value stays the code; the gradient becomes that of x.
    routed = rotation_trick(x, routed) if gradient == "rotation" else routed + (x - x.detach())
    return VectorQuantizeOutput(routed, indices, codebook_loss, commitment_loss, indices.new_zeros(()))
