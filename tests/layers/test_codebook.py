"""The module that holds a codebook: sampling, revival of dead codes, usage, and the warning of a collapse."""

from __future__ import annotations

import warnings

import pytest
import torch

from dlvae_kernels import VectorQuantizerEMA
from dlvae_kernels.layers.codebook import Codebook
from dlvae_kernels.layers.distributed import random_places, sample_vectors
from dlvae_kernels.layers.usage import perplexity_of

K, D = 64, 4


def statistics(counts: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The statistics of a batch whose vectors all lie at their codes."""
    return torch.cat([codes * counts[..., None], counts[..., None]], dim=-1)


@pytest.mark.parametrize(("num_vectors", "count"), [(100, 100), (100, 7), (1000, 333), (5, 5)])
def test_random_places_are_distinct_and_cover_the_batch(num_vectors, count):
    places, is_valid = random_places(torch.rand(count), num_vectors)
    assert is_valid.all()
    assert len(places.unique()) == count
    assert 0 <= int(places.min()) <= int(places.max()) < num_vectors
    assert int(places.max() - places.min()) >= num_vectors - 2 * num_vectors / count


def test_random_places_every_vector_is_as_likely():
    hits = torch.zeros(21)
    for _ in range(2000):
        hits[random_places(torch.rand(7), 21)[0]] += 1
    # The standard deviation of a count of 667 is 21.
    assert float((hits - 2000 / 3).abs().max()) < 100


def test_random_places_more_than_vectors_mark_repeats():
    places, is_valid = random_places(torch.rand(50), 8)
    assert sorted(places[is_valid].tolist()) == list(range(8))


@pytest.mark.parametrize("valid", [0, 3, 50])
def test_random_places_of_a_mask_are_valid_vectors(valid):
    mask = torch.zeros(100, dtype=torch.bool)
    mask[torch.randperm(100)[:valid]] = True
    places, is_valid = random_places(torch.rand(12), 100, mask)
    assert int(is_valid.sum()) == min(valid, 12)
    assert mask[places[is_valid]].all()


def test_sample_vectors_leaves_out_vectors_that_are_not_finite():
    x = torch.randn(2, 10, 3, D)
    x[0, 4, 1] = torch.nan
    sampled = sample_vectors(x, torch.rand(3, 20), sync=False)
    assert sampled.shape == (3, 20, D + 1)
    assert sampled[..., -1].sum(1).tolist() == [20, 19, 20]
    rows = x.reshape(20, 3, D)
    assert torch.equal(sampled[0, :, :-1], rows[:, 0])
    assert not sampled[1, 4].any()


@pytest.mark.parametrize("heads", [None, 3])
def test_revival_auto_replaces_few_codes_a_step_and_gives_them_time(heads):
    codebook = Codebook(K, D, heads, decay=0.9, dead_code_threshold="auto")
    shape = (K,) if heads is None else (heads, K)
    counts = torch.zeros(shape)
    counts[..., : K // 2] = 16
    vectors = 50 + torch.rand(500, *shape[:-1], D)
    sample = lambda jitter: sample_vectors(vectors, jitter, False)  # noqa: E731
    revived_at = {}
    for step in range(60):
        before = codebook.codebook.clone()
        codebook.update(statistics(counts, before), sample)
        changed = (codebook.codebook - before).abs().amax(-1) > 10
        assert int(changed.sum(-1).max()) <= max(1, int(0.05 * K))
        assert not changed[..., : K // 2].any()
        for code in changed.nonzero().tolist():
            # At first the mean use grows fast; later a code without vectors lasts more than ten steps.
            assert step - revived_at.get(tuple(code), -100) > (10 if step > 30 else 2)
            revived_at[tuple(code)] = step
    assert len(revived_at) == (1 if heads is None else heads) * K // 2
    assert int(codebook.usage.revived) >= len(revived_at)


def test_revival_a_revived_code_has_a_tenth_of_the_mean_count_and_its_own_sum():
    codebook = Codebook(K, D, decay=0.9, dead_code_threshold="auto")
    counts, vectors = torch.full((K,), 8.0), torch.full((9, D), 7.0)
    counts[5] = 0
    for _ in range(2):
        assert int(codebook.usage.revived) == 0
        sizes = codebook.cluster_size.lerp(counts, 0.1)
        codebook.update(statistics(counts, codebook.codes), lambda jitter: sample_vectors(vectors, jitter, False))
    assert torch.equal(codebook.codes[5], vectors[0])
    torch.testing.assert_close(codebook.cluster_size[5], 0.1 * sizes.mean())
    torch.testing.assert_close(codebook.embed_sum[5], vectors[0] * codebook.cluster_size[5])


def test_revival_auto_begins_soon_where_a_step_brings_many_vectors_and_waits_where_it_brings_few():
    first, vectors = {}, torch.full((9, D), 7.0)
    for count in (8.0, 0.25):
        codebook, counts = Codebook(K, D, decay=0.99, dead_code_threshold="auto"), torch.full((K,), count)
        counts[5] = 0
        while int(codebook.usage.revived) == 0:
            codebook.update(statistics(counts, codebook.codes), lambda jitter: sample_vectors(vectors, jitter, False))
            first[count] = first.get(count, 0) + 1
    assert first[8.0] < 5 < first[0.25] < 30


def test_revival_without_enough_vectors_makes_no_twins():
    codebook = Codebook(K, D, decay=0.5, dead_code_threshold=4.0)
    vectors = 50 + torch.rand(3, D)
    codebook.update(torch.zeros(K, D + 1), lambda jitter: sample_vectors(vectors, jitter, False))
    assert int((codebook.codes > 40).all(-1).sum()) == 3
    assert len(codebook.codes.unique(dim=0)) == K


def test_usage_is_that_of_the_counts():
    codebook = Codebook(4, D, decay=0.5)
    codebook.cluster_size.copy_(torch.tensor([10.0, 10.0, 0.0, 0.0]))
    usage = codebook.usage
    torch.testing.assert_close(usage.perplexity, torch.tensor(2.0))
    assert float(usage.utilisation) == 0.5
    assert int(usage.revived) == 0
    assert float(perplexity_of(torch.zeros(3))) == 1


def collapsing(layer: VectorQuantizerEMA, steps: int) -> list[str]:
    """The warnings of training steps on vectors that all lie at one place."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            layer(100 + torch.randn(2, D, 32))
    return [str(warning.message) for warning in caught]


def test_collapse_warns_once():
    layer = VectorQuantizerEMA(256, D, 0.25, 0.9, dead_code_threshold=0)
    (message,) = collapsing(layer, 350)
    assert "a codebook of 256 codes has collapsed: the perplexity of its use is 1.0" in message


def test_collapse_revival_prevents_it():
    layer = VectorQuantizerEMA(256, D, 0.25, 0.9)
    assert collapsing(layer, 250) == []
    assert float(layer.usage.perplexity) > 50


def test_unit_length_codes_stay_so():
    codebook = Codebook(K, D, decay=0.5, unit_length=True)
    vectors = torch.nn.functional.normalize(torch.randn(100, D), dim=-1)
    for _ in range(5):
        counts = torch.zeros(K)
        counts[:9] = 3
        codebook.update(statistics(counts, codebook.codes), lambda jitter: sample_vectors(vectors, jitter, False))
        torch.testing.assert_close(codebook.codes.norm(dim=-1), torch.ones(K))
