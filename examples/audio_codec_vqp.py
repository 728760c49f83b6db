"""Train the codec of `audio_codec.py` with the `ResidualVQ` of vector-quantize-pytorch, or with the same class of
dlvae_kernels: `python -m examples.audio_codec_vqp --library dlvae_kernels.compat.vector_quantize_pytorch`.

The two libraries differ by the import alone.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module

from torch import Tensor, nn

from . import audio_codec as codec

LIBRARIES = ("vector_quantize_pytorch", "dlvae_kernels.compat.vector_quantize_pytorch")
# A tenth of the mean use: an update assigns about one vector to a code, so that the usual 2 would revive most codes.
DEAD_CODE_THRESHOLD = 0.1


class ResidualVQAdapter(nn.Module):
    """A `ResidualVQ` with the interface that the codec expects of its quantizer."""

    def __init__(self, library: str = LIBRARIES[0], rotation_trick: bool = True) -> None:
        super().__init__()
        self.layer = import_module(library).ResidualVQ(
            dim=codec.NUM_FEATURES,
            num_quantizers=codec.NUM_LEVELS,
            codebook_size=codec.NUM_CODES,
            decay=codec.DECAY,
            commitment_weight=codec.COMMITMENT_COST,
            kmeans_init=True,
            threshold_ema_dead_code=DEAD_CODE_THRESHOLD,
            quantize_dropout=True,
            rotation_trick=rotation_trick,
        )

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, losses = self.layer(latents.mT)
        return losses.sum(), quantized.mT, indices

    def encode(self, latents: Tensor) -> Tensor:
        return self.layer(latents.mT)[1]

    def decode(self, indices: Tensor) -> Tensor:
        return self.layer.get_output_from_indices(indices).mT


def main() -> int:
    options = codec.parser(__doc__)
    options.add_argument("--library", choices=LIBRARIES, default=LIBRARIES[0], help="module that ResidualVQ is from")
    options.add_argument("--no-rotation-trick", action="store_true", help="straight-through gradient")
    given = options.parse_args()
    return codec.command(given, partial(ResidualVQAdapter, given.library, not given.no_rotation_trick))


if __name__ == "__main__":
    sys.exit(main())
