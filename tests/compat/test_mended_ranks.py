"""Two processes over gloo hold the state of one process on the full batch, and equal states with random numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from dlvae_kernels.compat import vector_quantize_pytorch as own

stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")

STEPS = 4
SEPARATE = {"heads": 2, "separate_codebook_per_head": True}
RESIDUAL = {"name": "ResidualVQ", "num_quantizers": 3}
KMEANS, REVIVAL = {"kmeans_init": True}, {"threshold_ema_dead_code": 2}
EVEN, UNEVEN, EMPTY = (4, 4), (1, 7), (4, 0)

# Each case: arguments of the constructor, options of forward for each step, and the size of the batch of each rank.
EQUAL_TO_ONE_PROCESS = {
    "plain": ({}, {}, EVEN),
    "uneven": ({}, {}, UNEVEN),
    "empty": ({}, {}, EMPTY),
    "separate": (SEPARATE, {}, UNEVEN),
    "shared_heads": ({"heads": 2, "codebook_dim": 2}, {}, EVEN),
    "cosine": ({"use_cosine_sim": True}, {}, UNEVEN),
    "orthogonal": ({"orthogonal_reg_weight": 1.0}, {}, EVEN),
    "accumulated": ({}, {"accum_ema_update": lambda step: step % 2 == 0}, EVEN),
    "weighted": ({}, {"ema_update_weight": lambda step: lambda sums, counts: counts / 10}, EVEN),
    "residual": (RESIDUAL, {}, UNEVEN),
    "residual_shared": ({**RESIDUAL, "shared_codebook": True}, {}, UNEVEN),
    "residual_shared_by_level": ({**RESIDUAL, "shared_codebook": True, "quant_grad_frac": 0.1}, {}, UNEVEN),
    "residual_cosine": ({**RESIDUAL, "use_cosine_sim": True}, {}, UNEVEN),
    "residual_dropout": (
        {**RESIDUAL, "quantize_dropout": True},
        {"rand_quantize_dropout_fixed_seed": lambda step: step},
        EVEN,
    ),
    "grouped": ({**RESIDUAL, "name": "GroupedResidualVQ", "groups": 2}, {}, EVEN),
}
RANDOM = {
    "kmeans": (KMEANS, {}, UNEVEN),
    "kmeans_separate": ({**SEPARATE, **KMEANS}, {}, EVEN),
    "kmeans_empty": (KMEANS, {}, EMPTY),
    "revival": (REVIVAL, {}, UNEVEN),
    "revival_separate": ({**SEPARATE, **REVIVAL}, {}, EVEN),
    "revival_cosine": ({**REVIVAL, "use_cosine_sim": True}, {}, EMPTY),
    "revival_learnable": ({**REVIVAL, "learnable_codebook": True, "ema_update": False}, {}, EVEN),
    "residual_kmeans_revival": ({**RESIDUAL, **KMEANS, **REVIVAL}, {}, UNEVEN),
    "residual_shared_kmeans_revival": ({**RESIDUAL, **KMEANS, **REVIVAL, "shared_codebook": True}, {}, UNEVEN),
    "residual_cosine_revival": ({**RESIDUAL, **REVIVAL, "use_cosine_sim": True}, {}, EVEN),
    "residual_dropout": ({**RESIDUAL, "quantize_dropout": True}, {}, UNEVEN),
    "residual_dropout_revival": ({**RESIDUAL, **REVIVAL, "quantize_dropout": True}, {}, EVEN),
    "grouped_dropout": ({**RESIDUAL, "name": "GroupedResidualVQ", "groups": 2, "quantize_dropout": True}, {}, EVEN),
}
CASES = {
    **{("equal", name): case for name, case in EQUAL_TO_ONE_PROCESS.items()},
    **{("random", name): case for name, case in RANDOM.items()},
}


def make(package, name="VectorQuantize", **arguments):
    torch.manual_seed(5)
    return getattr(package, name)(**{"dim": 8, "codebook_size": 16, "rotation_trick": False, **arguments})


def batches(sizes):
    """For each step the batch of each rank: sizes[rank] sequences of 6 vectors."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(size, 6, 8, generator=generator) for size in sizes] for _ in range(STEPS)]


def train(layer, steps, options):
    """The state after the steps, and the levels that ran in each."""
    ran = []
    for step, x in enumerate(steps):
        _, indices, _ = layer(x, **{name: value(step) for name, value in options.items()})
        ran.append((indices >= 0).flatten(0, -2).any(0))
    return {name: value.clone() for name, value in layer.state_dict().items()}, ran


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # The layers are constructed before torch.distributed is initialised, which each forward has to check anew.
    layers = [make(own, **arguments) for arguments, _, _ in CASES.values()]
    unsynchronised = make(stock)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for layer, (_, options, sizes) in zip(layers, CASES.values(), strict=True):
        torch.manual_seed(100 + rank)
        results.append(train(layer, [step[rank] for step in batches(sizes)], options))
    results.append(train(unsynchronised, [step[rank] for step in batches(EVEN)], {}))
    try:
        make(stock, **SEPARATE, **KMEANS, sync_codebook=True)
        results.append("")
    except AssertionError as error:
        results.append(str(error))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    """For each case the states of the ranks and the levels that ran; those of the source at the end."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(_work, args=(str(folder),), nprocs=2)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return dict(zip([*CASES, "unsynchronised", "refused"], zip(*results, strict=True), strict=True))


@pytest.mark.parametrize("name", EQUAL_TO_ONE_PROCESS)
def test_two_ranks_equal_one_process_on_the_full_batch(ranks, name):
    arguments, options, sizes = EQUAL_TO_ONE_PROCESS[name]
    single, _ = train(make(own, **arguments), [torch.cat(step) for step in batches(sizes)], options)
    for state, _ in ranks["equal", name]:
        for key, expected in single.items():
            assert_close(state[key], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_two_ranks_hold_bitwise_equal_states_and_run_the_same_levels(ranks, kind, name):
    (first, ran), (second, others) = ranks[kind, name]
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert all(value.isfinite().all() for value in first.values())
    if CASES[kind, name][2] != EMPTY:
        assert all(torch.equal(levels, other) for levels, other in zip(ran, others, strict=True))
    if "dropout" in name:
        assert len({int(levels.sum()) for levels in ran}) > 1


def test_two_ranks_constructed_early_do_not_all_reduce_in_the_source(ranks):
    (first, _), (second, _) = ranks["unsynchronised"]
    assert not torch.allclose(first["_codebook.embed"], second["_codebook.embed"], atol=1e-3)


def test_kmeans_of_separate_codebooks_over_ranks_is_refused_by_the_source(ranks):
    assert all("multiple codebooks" in message for message in ranks["refused"])
