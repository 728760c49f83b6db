"""The plots of a report: each function draws one matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

# matplotlib is optional: modules that import this one need not have it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Window and order of the Savitzky-Golay filter for the training error, as in the notebook.
_WINDOW, _ORDER = 201, 7
_FRACTIONS = (0.90, 0.95, 0.99)


def training_error(nmse: np.ndarray, held_out: float) -> Figure:
    """Training error of each update and smoothed, on a log scale, and the held-out error."""
    figure, axes = _figure("Training error", "update", "NMSE")
    window = min(_WINDOW, len(nmse) - 1 + len(nmse) % 2)  # the largest odd window that fits
    updates = np.arange(1, len(nmse) + 1)
    axes.plot(updates, nmse, color="tab:blue", alpha=0.2, linewidth=0.5, label="each update")
    if window > _ORDER:
        smooth = np.maximum(savitzky_golay(nmse, window, _ORDER), nmse.min())
        axes.plot(updates, smooth, color="tab:blue", label=f"Savitzky-Golay filter {window}/{_ORDER}")
    axes.axhline(held_out, color="tab:orange", linestyle="--", label=f"held-out: {held_out:.4f}")
    axes.set_yscale("log")
    axes.legend()
    return figure


def codebook_usage(metrics: dict[str, np.ndarray], num_codes: int) -> Figure:
    """Perplexities and utilisation of each update as fractions of the K codes, and the number of revived codes.

    `metrics` holds the columns of metrics.csv; those of the usage are NaN for a dictionary and are not drawn then.
    """
    figure, axes = _figure("Use of the codes in training", "update", "fraction of the codes")
    updates = metrics["update"]
    axes.plot(updates, metrics["perplexity"] / num_codes, alpha=0.3, linewidth=0.5, label="perplexity of each batch")
    if not np.isnan(metrics["utilisation"]).all():
        axes.plot(updates, metrics["usage_perplexity"] / num_codes, label="perplexity of the moving averages")
        axes.plot(updates, metrics["utilisation"], label="utilisation")
        revived = axes.twinx()
        revived.plot(updates, metrics["revived"], color="grey", linestyle="--")
        revived.set_ylabel("revived codes, dashed")
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower right")
    return figure


def savitzky_golay(values: np.ndarray, window: int, order: int) -> np.ndarray:
    """Savitzky-Golay filter: each value becomes that of a polynomial fitted to the window around it.

    Near the ends it is fitted to the first or the last whole window. `window` is odd.

    scipy's savgol_filter fits powers of the position up to 100^7, and its solver drops most of them: at 201/7 its
    weights sum to 1e-6 and not to 1 (scipy 1.17). Legendre polynomials keep them all.
    """
    basis = np.polynomial.legendre.legvander(np.linspace(-1, 1, window), order)
    fit = basis @ np.linalg.pinv(basis)  # [window, window], from values to fitted values
    half = window // 2
    middle = np.convolve(values, fit[half][::-1], mode="valid")
    return np.concatenate([fit[:half] @ values[:window], middle, fit[half + 1 :] @ values[-window:]])


def image_grid(batch: Tensor, title: str) -> Figure:
    """A grid of images [B, C, H, W] in [0, 1]."""
    return _grids({title: batch})


def side_by_side(originals: Tensor, reconstructions: Tensor) -> Figure:
    return _grids({"Originals": originals, "Reconstructions": reconstructions})


def principal_maps(latents: Tensor) -> Tensor:
    """The first three principal components of a map [B, D, h, w]: [B, 3, h, w], each image and channel in [0, 1]."""
    centred = _centred_vectors(latents)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:3]  # [<= 3, D]
    maps = (centred @ components.T).unflatten(0, (len(latents), *latents.shape[2:])).permute(0, 3, 1, 2)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=1e-12)
    return torch.nn.functional.pad(maps, (0, 0, 0, 0, 0, 3 - maps.shape[1])).float()


def masks(count: int, height: int, width: int) -> Tensor:
    """Ones [count, 1, height, width] with one zero in each image: the first position in image 0, and so on."""
    mask = torch.ones(count, 1, height * width)
    image = torch.arange(count)
    mask[image, 0, image % (height * width)] = 0
    return mask.unflatten(2, (height, width))


def code_map(codes: Tensor, counts: Tensor, seed: int) -> Figure:
    """The codes [K, D] in two dimensions, by UMAP, coloured by their numbers of assignments [K]."""
    points, title = _in_two_dimensions(codes.double().numpy(), seed)
    figure, axes = _figure(title, "", "")
    colours = np.log10(counts.numpy() + 1)
    dots = axes.scatter(points[:, 0], points[:, 1], c=colours, cmap="viridis", s=18, alpha=0.8)
    figure.colorbar(dots, ax=axes, label="log10(1 + assignments), held-out images")
    return figure


def assignment_counts(counts: Tensor) -> Figure:
    """The number of assignments of each code [K], in descending order."""
    from matplotlib import colormaps

    active = int((counts > 0).sum())
    title = f"Utilisation: {active} active and {len(counts) - active} dead codes"
    figure, axes = _figure(title, "code, sorted by assignments", "assignments, held-out images")
    ordered = np.sort(counts.numpy())[::-1]
    axes.bar(np.arange(len(ordered)), ordered, width=1.0, color=colormaps["viridis"](0.4))
    axes.set_yscale("symlog")
    return figure


def explained_variance(latents: dict[str, Tensor]) -> Figure:
    """Cumulative explained variance of the principal components of maps [B, D, h, w].

    The legend has the number of components that explain 90, 95 and 99 %.
    """
    figure, axes = _figure("Explained variance of the latents", "principal components", "fraction of the variance")
    for name, latent in latents.items():
        explained = cumulative_variance(latent)
        numbers = ", ".join(f"{each:.0%}: {components_for(explained, each)}" for each in _FRACTIONS)
        axes.plot(np.arange(1, len(explained) + 1), explained.numpy(), marker=".", label=f"{name} ({numbers})")
    for fraction in _FRACTIONS:
        axes.axhline(fraction, color="grey", linewidth=0.5, linestyle=":")
    axes.legend(loc="lower right")
    return figure


def cumulative_variance(latents: Tensor) -> Tensor:
    """Fraction of the variance of a map [B, D, h, w] that its first 1, 2, ... principal components explain."""
    variances = torch.linalg.svdvals(_centred_vectors(latents)).square()
    return variances.cumsum(0) / variances.sum().clamp(min=1e-300)


def components_for(explained: Tensor, fraction: float) -> int:
    """The number of principal components that explain a fraction of the variance."""
    return min(int((explained < fraction).sum()) + 1, len(explained))


def _centred_vectors(latents: Tensor) -> Tensor:
    """A map [B, D, h, w] as vectors [B h w, D] of mean zero, float64."""
    vectors = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    return vectors - vectors.mean(0)


def _in_two_dimensions(codes: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """Points [K, 2] for codes [K, D], and a title that names the method."""
    try:
        import umap
    except ImportError:
        umap = None
    if umap is None or len(codes) < 5:
        reason = "umap-learn is not installed" if umap is None else "too few codes for UMAP"
        u, s, _ = np.linalg.svd(codes - codes.mean(0), full_matrices=False)
        points = np.pad(u[:, :2] * s[:2], ((0, 0), (0, max(0, 2 - len(s)))))
        return points, f"Codes by PCA ({reason})"
    reducer = umap.UMAP(n_neighbors=3, min_dist=0.1, metric="cosine", random_state=seed, n_jobs=1)
    return reducer.fit_transform(codes), "Codes by UMAP (cosine, 3 neighbours)"


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def _grids(batches: dict[str, Tensor]) -> Figure:
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    figure = Figure(figsize=(9 * len(batches), 5), layout="constrained")
    for axes, (title, batch) in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches.items(), strict=True):
        grid = make_grid(batch.clamp(0, 1).float().cpu(), nrow=8, padding=max(1, batch.shape[-1] // 16))
        axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    return figure
