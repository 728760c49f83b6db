"""The arguments of vector-quantize-pytorch that are refused, and the error that names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The names of vector-quantize-pytorch 1.32 that this package lacks.
NOT_IMPLEMENTED = frozenset({"BinaryMapper", "EvoLFQ", "FSP", "HierarchicalVQ", "LatentQuantize", "Sequential"})

# The refused arguments of each class with the defaults of vector-quantize-pytorch 1.32, which are accepted.
REFUSED: dict[str, dict[str, Any]] = {
    "VectorQuantize": {
        "commitment_use_cross_entropy_loss": False,
        "straight_through": False,
        "directional_reparam": False,
        "directional_reparam_variance": 5e-3,
        "sync_affine_param": False,
        "vq_bridge": None,
        "in_place_codebook_optimizer": None,
        "manual_in_place_optimizer_update": False,
        "affine_param": False,
        "affine_param_batch_decay": 0.99,
        "affine_param_codebook_decay": 0.9,
        "sync_update_v": 0.0,
    },
    "VectorQuantize.forward": {"topk": None, "codebook_transform_fn": None},
    "ResidualVQ": {
        "diveq": False,
        "implicit_neural_codebook": False,
        "mlp_kwargs": {},
        "beam_size": None,
        "eval_beam_size": None,
        "beam_score_quantizer_weights": None,
    },
    "ResidualVQ.forward": {"beam_size": None},
}


def check_arguments(owner: str, arguments: Mapping[str, Any]) -> None:
    """Refuse the arguments that a class or method does not take by name.

    Args:
        owner: "Class" or "Class.method", a key of `REFUSED` if it has refused arguments.
        arguments: what the caller passed beyond the named arguments.
    Raises:
        TypeError: an argument is unknown, or refused and not the default; the message names it.
    """
    refused = REFUSED.get(owner, {})
    for name, value in arguments.items():
        if name not in refused:
            raise TypeError(f"{owner} got an unknown argument {name!r}, which vector-quantize-pytorch lacks too")
        if value is not refused[name] and value != refused[name]:
            raise TypeError(
                f"{owner} does not implement the argument {name!r} of vector-quantize-pytorch: expected its default"
                f" {refused[name]!r}, got {value!r}; leave it out, or import {owner.split('.')[0]} from"
                " vector_quantize_pytorch"
            )
