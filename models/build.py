"""The networks by the name of their bottleneck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from dlvae_kernels.layers.codebook_state import Init, Threshold
from dlvae_kernels.layers.dictionary_learning import Gradient

from .autoencoder import Autoencoder
from .dlvae import DictionaryLearningVAE
from .vqvae import VQVAE


@dataclass(frozen=True)
class NetworkConfig:
    """The part of a configuration that defines the network; each annotation is the help of a flag."""

    model: Annotated[
        Literal["vqvae", "vqvae-ema", "dlvae"],
        "bottleneck: codebook learned by gradient (vqvae) or by moving averages (vqvae-ema), or dictionary (dlvae)",
    ] = "vqvae-ema"
    hiddens: Annotated[int, "channels of encoder and decoder"] = 128
    residual_layers: Annotated[int, "number of residual layers"] = 2
    residual_hiddens: Annotated[int, "channels inside a residual layer"] = 32
    num_embeddings: Annotated[int, "K: number of codes or atoms"] = 512
    embedding_dim: Annotated[int, "D: channels of the latents"] = 64
    commitment_cost: Annotated[float, "weight of the commitment loss of vqvae and vqvae-ema"] = 0.25
    decay: Annotated[float, "decay of the moving averages of vqvae-ema, in (0, 1]"] = 0.95
    init: Annotated[Init, "initial codebook"] = "normal"
    dead_code_threshold: Annotated[
        Threshold,
        "reinitialise a code if on average fewer vectors of a batch are assigned to it; 0: never; auto: if its use is"
        " below a tenth of the mean use, at most 5 % of the codes in one update",
    ] = "auto"
    sparsity: Annotated[float, "weight of the L1 norm of the coefficients of dlvae"] = 0.0
    sparsity_level: Annotated[int, "k: atoms that dlvae selects for each position"] = 100
    gradient: Annotated[Gradient, "gradient of the decoder through the bottleneck of dlvae"] = "direct"


def build_model(config: NetworkConfig, in_channels: int) -> Autoencoder:
    layers = config.hiddens, config.residual_layers, config.residual_hiddens
    codebook = config.num_embeddings, config.embedding_dim
    if config.model == "dlvae":
        return DictionaryLearningVAE(
            *layers,
            *codebook,
            config.sparsity,
            config.sparsity_level,
            in_channels=in_channels,
            gradient=config.gradient,
        )
    return VQVAE(
        *layers,
        *codebook,
        config.commitment_cost,
        config.decay if config.model == "vqvae-ema" else 0,
        in_channels=in_channels,
        init=config.init,
        dead_code_threshold=config.dead_code_threshold,
    )
