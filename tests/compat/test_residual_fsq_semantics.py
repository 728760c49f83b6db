"""`semantics=` of ResidualFSQ and GroupedResidualFSQ against numbers that releases of vector-quantize-pytorch gave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlvae_kernels.compat import vector_quantize_pytorch as own

CASES = {
    "one_level": ("ResidualFSQ", {"dim": 24, "levels": [4] * 8, "num_quantizers": 1}),
    "four_levels": ("ResidualFSQ", {"dim": 3, "levels": [8, 5, 3], "num_quantizers": 4}),
    "two_groups": ("GroupedResidualFSQ", {"dim": 24, "levels": [5] * 4, "num_quantizers": 2, "groups": 2}),
    "soft_clamp": (
        "ResidualFSQ",
        {"dim": 6, "levels": [8, 5, 3], "num_quantizers": 3, "soft_clamp_input_value": 2.5},
    ),
    "symmetry": ("ResidualFSQ", {"dim": 6, "levels": [8, 2, 3], "num_quantizers": 3, "preserve_symmetry": True}),
    "tanh": ("ResidualFSQ", {"dim": 6, "levels": [8, 2, 3], "num_quantizers": 3, "bound_hard_clamp": False}),
}
# The result of `numbers` with the classes of each release; those of 1.14.41, 1.17.8 and 1.18.1 are the same, and so are
# those of 1.26.0 and 1.32.0. Arguments that a release lacks have no entry.
RECORDED = {
    # 1.18.1
    ("1.18", "one_level"): (1722931, 36195780, 29.1552, 2211.177, 236.3782),
    ("1.18", "four_levels"): (9361, 397376, -1.6116, -283.556, 135.5443),
    ("1.18", "two_groups"): (46487, 1900734, -0.1860, -183.058, 883.9699),
    # 1.25.2
    ("1.25", "one_level"): (1742932, 36353122, 29.1552, 2211.177, 218.4948),
    ("1.25", "four_levels"): (9399, 390208, -1.6116, -283.556, 160.3349),
    ("1.25", "two_groups"): (45609, 1857669, -0.1860, -183.058, 840.0574),
    ("1.25", "soft_clamp"): (5831, 237390, 19.8584, 603.832, 192.5591),
    ("1.25", "symmetry"): (2282, 91810, 16.9227, 331.572, 230.8764),
    # 1.26.0
    ("1.26", "one_level"): (1635186, 33571170, 28.9892, 2563.456, 314.9679),
    ("1.26", "four_levels"): (9607, 400730, 3.8987, -106.262, 166.2261),
    ("1.26", "two_groups"): (46027, 1886380, 0.2187, -172.254, 862.9386),
    ("1.26", "tanh"): (2296, 92843, 11.9983, 443.868, 191.2064),
}
STATES = {
    "FSQ": ({"levels": [5, 4, 3]}, {}),
    "FSQ with projections": (
        {"levels": [5, 4, 3], "dim": 8, "num_codebooks": 2},
        {"project_in.weight": (6, 8), "project_in.bias": (6,), "project_out.weight": (8, 6), "project_out.bias": (8,)},
    ),
    "FSQ without biases": (
        {"levels": [5, 4, 3], "dim": 8, "projection_has_bias": False},
        {"project_in.weight": (3, 8), "project_out.weight": (8, 3)},
    ),
    "ResidualFSQ": ({"levels": [5, 4, 3], "dim": 3, "num_quantizers": 2}, {}),
    "ResidualFSQ with projections": (
        {"levels": [5, 4, 3], "dim": 8, "num_quantizers": 2},
        {"project_in.weight": (3, 8), "project_in.bias": (3,), "project_out.weight": (8, 3), "project_out.bias": (8,)},
    ),
    "GroupedResidualFSQ": (
        {"levels": [5, 4, 3], "dim": 8, "num_quantizers": 2, "groups": 2},
        {
            "rvqs.0.project_in.weight": (3, 4),
            "rvqs.0.project_in.bias": (3,),
            "rvqs.0.project_out.weight": (4, 3),
            "rvqs.0.project_out.bias": (4,),
            "rvqs.1.project_in.weight": (3, 4),
            "rvqs.1.project_in.bias": (3,),
            "rvqs.1.project_out.weight": (4, 3),
            "rvqs.1.project_out.bias": (4,),
        },
    ),
}


def weighted_sum(values: Tensor) -> float:
    """A sum that depends on the order."""
    return float((values.double() * (torch.arange(values.numel()).reshape(values.shape) % 97 + 1)).sum())


def numbers(module: torch.nn.Module, dim: int) -> tuple[float, ...]:
    """Sums of the tokens of an input, of its gradient, and of what random tokens decode to.

    The seed is one with which no feature of the cases lies near the middle between two levels.
    """
    generator = torch.Generator().manual_seed(4)
    module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    x = (2 * torch.randn(2, 20, dim, generator=generator)).requires_grad_()
    quantized, indices = module(x)
    tokens = torch.randint(0, module.codebook_size, indices.shape, generator=generator)
    decoded = module.get_output_from_indices(tokens).detach()
    (gradient,) = torch.autograd.grad(quantized.sum(), x)
    return (
        int(indices.sum()),
        int(weighted_sum(indices)),
        float(decoded.sum()),
        weighted_sum(decoded),
        float(gradient.abs().sum()),
    )


@pytest.mark.parametrize(("semantics", "case"), RECORDED)
def test_residual_fsq_semantics_gives_the_numbers_of_its_releases(semantics, case):
    name, options = CASES[case]
    found = numbers(getattr(own, name)(**options, semantics=semantics), options["dim"])
    expected = RECORDED[semantics, case]
    assert found[:2] == expected[:2]
    assert found[2:] == pytest.approx(expected[2:], rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("case", ["one_level", "four_levels", "two_groups"])
def test_residual_fsq_default_semantics_is_the_newest(case):
    name, options = CASES[case]
    assert numbers(getattr(own, name)(**options), options["dim"])[0] == RECORDED["1.26", case][0]
    assert len({RECORDED[semantics, case][0] for semantics in ("1.18", "1.25", "1.26")}) == 3


@pytest.mark.parametrize("semantics", ["1.18", "1.25", "1.26"])
@pytest.mark.parametrize("is_channel_first", [False, True])
def test_residual_fsq_of_every_semantics_decodes_its_indices(semantics, is_channel_first):
    module = own.ResidualFSQ(
        levels=[8, 5, 3], num_quantizers=3, dim=6, is_channel_first=is_channel_first, semantics=semantics
    )
    quantized, indices = module(torch.randn(2, 6, 9) if is_channel_first else torch.randn(2, 9, 6))
    torch.testing.assert_close(module.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("name", STATES)
def test_fsq_loads_the_state_of_every_release(name):
    # The names and shapes of the state in 1.14.41, 1.17.8, 1.18.1, 1.25.2, 1.26.0 and 1.32.0, which are equal.
    options, shapes = STATES[name]
    module = getattr(own, name.split()[0])(**options)
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == shapes
    module.load_state_dict({key: torch.randn(shape) for key, shape in shapes.items()}, strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"semantics": "1.32"}, "semantics to be one of '1.18', '1.25', '1.26', got '1.32'"),
        ({"semantics": "1.18", "bound_hard_clamp": True}, 'no bound_hard_clamp in semantics "1.18"'),
        ({"semantics": "1.25", "bound_hard_clamp": True}, 'no bound_hard_clamp in semantics "1.25"'),
        ({"semantics": "1.18", "soft_clamp_input_value": 2.0}, 'no soft_clamp_input_value in semantics "1.18"'),
        ({"semantics": "1.18", "preserve_symmetry": True}, 'no preserve_symmetry in semantics "1.18"'),
        ({"semantics": "1.26", "preserve_symmetry": False}, 'preserve_symmetry=True in semantics "1.26"'),
    ],
)
def test_residual_fsq_semantics_refuses_arguments_that_its_releases_lack(options, message):
    with pytest.raises(ValueError, match=message):
        own.ResidualFSQ(levels=[8, 5, 3], num_quantizers=2, **options)
