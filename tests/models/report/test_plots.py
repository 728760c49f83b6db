from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from models.report import plots


def test_principal_maps_of_three_patterns_recover_them():
    # Three patterns over the map, along orthogonal directions of very different variance.
    patterns = torch.stack([torch.rand(2, 4, 5) * scale for scale in (100, 10, 1)], dim=1)
    patterns -= patterns.mean((0, 2, 3), keepdim=True)
    directions = torch.linalg.qr(torch.randn(7, 7)).Q[:3]
    maps = plots.principal_maps(torch.einsum("bkhw,kd->bdhw", patterns, directions))
    assert maps.shape == (2, 3, 4, 5)
    assert maps.amin() == 0
    assert maps.amax() == 1
    for channel in range(3):
        correlation = np.corrcoef(maps[:, channel].flatten(1)[0], patterns[:, channel].flatten(1)[0])[0, 1]
        assert abs(correlation) > 0.95


def test_principal_maps_of_one_channel_or_constant_are_finite():
    assert plots.principal_maps(torch.randn(2, 1, 4, 4)).shape == (2, 3, 4, 4)
    assert torch.isfinite(plots.principal_maps(torch.ones(2, 5, 4, 4))).all()


def test_masks_have_one_zero_per_image():
    masks = plots.masks(20, 3, 5)
    assert masks.shape == (20, 1, 3, 5)
    assert (masks == 0).sum((1, 2, 3)).tolist() == [1] * 20
    assert masks[7, 0, 1, 2] == masks[16, 0, 0, 1] == 0


def test_explained_variance_of_a_plane_needs_two_components():
    plane = torch.einsum("bkhw,kd->bdhw", torch.randn(4, 2, 6, 6), torch.randn(2, 9))
    explained = plots.cumulative_variance(plane)
    assert len(explained) == 9
    assert plots.components_for(explained, 0.99) <= 2
    assert plots.components_for(torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64), 0.9) == 2
    assert plots.components_for(plots.cumulative_variance(torch.ones(2, 4, 3, 3)), 0.9) <= 4
    (axes,) = plots.explained_variance({"a": plane, "b": torch.randn(4, 9, 6, 6)}).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), explained)


def test_image_grid_contains_the_images():
    batch = torch.rand(5, 3, 8, 8)
    for figure in (plots.image_grid(batch, "title"), plots.side_by_side(batch, batch)):
        for axes in figure.axes:
            shown = axes.images[0].get_array()
            np.testing.assert_allclose(shown[1:9, 1:9], batch[0].permute(1, 2, 0))


def test_codebook_usage_draws_fractions_of_the_codes():
    metrics = {"update": [1, 2], "perplexity": [2, 4], "usage_perplexity": [4, 6], "utilisation": [0.5, 1]}
    metrics = {name: np.array(values, dtype=float) for name, values in (metrics | {"revived": [0, 3]}).items()}
    fractions, revived = plots.codebook_usage(metrics, 8).axes
    drawn = [line.get_ydata().tolist() for line in fractions.lines]
    assert drawn == [[0.25, 0.5], [0.5, 0.75], [0.5, 1]]
    assert revived.lines[0].get_ydata().tolist() == [0, 3]
    unavailable = {name: values * np.nan for name, values in metrics.items()}
    (axes,) = plots.codebook_usage(unavailable | {"perplexity": metrics["perplexity"]}, 8).axes
    assert len(axes.lines) == 1


@pytest.mark.parametrize("count", [1, 5, 200, 1000])
def test_training_error_of_any_length_is_drawn(count):
    nmse = np.exp(-np.linspace(0, 3, count)) + 0.01 * np.random.default_rng(0).random(count)
    (axes,) = plots.training_error(nmse, 0.05).axes
    each, *smooth, _ = axes.lines
    np.testing.assert_array_equal(each.get_ydata(), nmse)
    assert len(smooth) == (count > 9)
    for line in smooth:
        np.testing.assert_allclose(line.get_ydata(), nmse, atol=0.05)


def test_savitzky_golay_keeps_polynomials_and_equals_scipy_at_low_order():
    from scipy.signal import savgol_filter

    place = np.linspace(-1, 1, 700)
    polynomial = np.polynomial.Polynomial([1, -2, 3, 1, -4, 1, 2, 5])(place)
    np.testing.assert_allclose(plots.savitzky_golay(polynomial, 201, 7), polynomial, atol=1e-9)
    noise = np.random.default_rng(0).random(300)
    np.testing.assert_allclose(plots.savitzky_golay(noise, 51, 3), savgol_filter(noise, 51, 3), atol=1e-8)


def test_assignment_counts_are_in_descending_order():
    (axes,) = plots.assignment_counts(torch.tensor([5, 0, 100])).axes
    assert [bar.get_height() for bar in axes.patches] == [100, 5, 0]
    assert axes.get_title() == "Utilisation: 2 active and 1 dead codes"


def test_code_map_without_umap_is_pca_and_names_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    figure = plots.code_map(torch.randn(20, 6), torch.arange(20), 0)
    assert "umap-learn is not installed" in figure.axes[0].get_title()
    assert len(figure.axes[0].collections[0].get_offsets()) == 20


def test_code_map_of_few_codes_is_pca():
    pytest.importorskip("umap")
    for k, d in ((1, 1), (2, 1), (4, 3)):
        assert "too few codes" in plots.code_map(torch.randn(k, d), torch.arange(k), 0).axes[0].get_title()


@pytest.mark.slow
def test_code_map_with_one_seed_is_reproducible():
    pytest.importorskip("umap")
    codes = torch.randn(60, 6)
    offsets = [plots.code_map(codes, torch.arange(60), 3).axes[0].collections[0].get_offsets() for _ in range(2)]
    assert np.array_equal(*offsets)
    assert "UMAP" in plots.code_map(codes, torch.arange(60), 3).axes[0].get_title()
