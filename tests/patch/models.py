"""Small modules with the methods and the state of published quantizers; their searches are plain PyTorch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import embedding, mse_loss, normalize


class EuclideanCodebook(nn.Module):
    """The EnCodec family."""

    def __init__(self, num_codes: int = 32, num_features: int = 8) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(num_codes, num_features))

    def quantize(self, x):
        return torch.cdist(x.float(), self.embed.float()).argmin(-1)

    def encode(self, x):
        return self.quantize(x.reshape(-1, x.shape[-1])).view(x.shape[:-1])

    def decode(self, indices):
        return embedding(indices, self.embed)


class CachedCodebook(EuclideanCodebook):
    """Mimi: the codebook is a quotient that is computed once."""

    def __init__(self, num_codes: int = 32, num_features: int = 8) -> None:
        nn.Module.__init__(self)
        self.register_buffer("embed_sum", torch.randn(num_codes, num_features))
        self.register_buffer("cluster_usage", torch.rand(num_codes) + 0.5)
        self._embed = None

    @property
    def embed(self):
        if self._embed is None:
            self._embed = self.embed_sum / self.cluster_usage[:, None]
        return self._embed


class DotCodebook(EuclideanCodebook):
    """The names of the EnCodec family with another search."""

    def quantize(self, x):
        return (x @ self.embed.T).argmax(-1)


class MotionCodebook(nn.Module):
    """MoMask: a codebook of another name, and a temperature for samples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.randn(32, 8))

    def quantize(self, x, sample_codebook_temp=0.0):
        indices = torch.cdist(x, self.codebook).argmin(-1)
        return indices + 1 if sample_codebook_temp else indices


class Level(nn.Module):
    def __init__(self, codebook: nn.Module) -> None:
        super().__init__()
        self.codebook = codebook

    def encode(self, x):
        return self.codebook.encode(x.transpose(1, 2))

    def decode(self, indices):
        return self.codebook.decode(indices).transpose(1, 2)


class ResidualStack(nn.Module):
    """The EnCodec family, Mimi with `input_proj`."""

    def __init__(self, num_levels: int = 4, kind: type[nn.Module] = EuclideanCodebook, projection: bool = False):
        super().__init__()
        self.layers = nn.ModuleList([Level(kind()) for _ in range(num_levels)])
        self.input_proj = nn.Conv1d(6, 8, 1, bias=False) if projection else None

    def encode(self, x, num_quantizers=None):
        if self.input_proj is not None:
            x = self.input_proj(x)
        found = []
        for level in self.layers[:num_quantizers]:
            found.append(level.encode(x))
            x = x - level.decode(found[-1])
        return torch.stack(found)

    def forward(self, x):
        return self.encode(x)


class FactorizedQuantizer(nn.Module):
    """The DAC family."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Conv1d(16, 8, 1), nn.Conv1d(8, 16, 1)
        self.codebook = nn.Embedding(64, 8)

    def decode_latents(self, x):
        cosines = normalize(x, dim=1).transpose(1, 2) @ normalize(self.codebook.weight).T
        indices = cosines.argmax(-1)
        return self.codebook(indices).transpose(1, 2), indices

    def forward(self, x):
        latents = self.in_proj(x)
        codes, indices = self.decode_latents(latents)
        return self.out_proj(latents + (codes - latents).detach()), mse_loss(codes, latents.detach()), indices


class ImageQuantizer(nn.Module):
    """The results of Chameleon, GLM, taming-transformers, LlamaGen and Emu3."""

    def __init__(self, kind: str, normalised: bool = False, legacy: bool = True, beta: float = 0.25) -> None:
        super().__init__()
        self.kind, self.normalised, self.beta, self.sane_index_shape = kind, normalised, beta, kind == "sane"
        if not legacy:
            self.legacy = False
        self.embedding = nn.Embedding(64, 8)

    def forward(self, z):
        z = z.movedim(-3, -1)
        codes = self.embedding.weight
        if self.normalised:
            z, codes = normalize(z, dim=-1), normalize(codes, dim=-1)
        indices = torch.cdist(z.reshape(-1, 8), codes).argmin(-1)
        if self.kind == "grid":
            return indices.view(z.shape[:-1])
        found = codes[indices].view(z.shape)
        quantized = (z + (found - z).detach()).movedim(-1, -3).contiguous()
        commitment, fit = mse_loss(z, found.detach()), mse_loss(found, z.detach())
        weights = (1, self.beta) if getattr(self, "legacy", True) else (self.beta, 1)
        loss = weights[0] * commitment + weights[1] * fit
        if self.kind == "indices":
            return quantized, loss, indices
        if self.kind == "losses":
            losses = (fit, self.beta * commitment, fit, 1) if self.training else (None, None, None, 0)
            return quantized, losses, (None, None, indices)
        if self.kind == "one-hot":
            one_hot = nn.functional.one_hot(indices, 64)
            return quantized, loss, (None, one_hot, indices[:, None])
        return quantized, loss, (None, None, indices.view(z.shape[:-1]) if self.sane_index_shape else indices)


class DotQuantizer(nn.Module):
    """Apertus: the largest inner product with the rows of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 64, bias=False)

    def forward(self, z):
        return self.embedding(z.movedim(1, -1)).argmax(-1)


class GumbelQuantizer(nn.Module):
    """The quantizer of wav2vec 2.0: products with one-hot vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.num_groups, self.num_vars = 2, 16
        self.codevectors = nn.Parameter(torch.randn(1, 32, 4))
        self.weight_proj = nn.Linear(8, 32)

    @staticmethod
    def _compute_perplexity(shares, mask=None):
        valid = torch.ones(len(shares)) if mask is None else mask.flatten().float()
        mean = (shares * valid[:, None, None]).sum(0) / valid.sum()
        return (-(mean * (mean + 1e-9).log()).sum(-1)).exp().sum()

    def forward(self, x, mask=None):
        logits = self.weight_proj(x).view(-1, 2, 16)
        if self.training:
            return torch.rand(*x.shape[:2], 8), logits.sum()
        shares = nn.functional.one_hot(logits.argmax(-1), 16).to(x.dtype)
        codes = (shares.flatten(1)[..., None] * self.codevectors).view(-1, 2, 16, 4).sum(2)
        return codes.view(*x.shape[:2], 8), self._compute_perplexity(shares, mask)
