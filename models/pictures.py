"""The pictures of a report: each function draws one matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

# matplotlib is optional, and a module that imports this one may not need it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the Savitzky-Golay filter that smooths the error, as in the notebook.
_WINDOW, _ORDER = 201, 7
_SHARES = (0.90, 0.95, 0.99)


def smoothed_error(nmse: np.ndarray, held_out: float) -> Figure:
    """Training error of each update, smoothed, on a log scale."""
    figure, axes = _figure("Smoothed NMSE", "update", "NMSE")
    window = min(_WINDOW, len(nmse) - 1 + len(nmse) % 2)  # the longest odd one that fits
    updates = np.arange(1, len(nmse) + 1)
    axes.plot(updates, nmse, color="tab:blue", alpha=0.2, linewidth=0.5, label="each update")
    if window > _ORDER:
        smooth = np.maximum(savitzky_golay(nmse, window, _ORDER), nmse.min())
        axes.plot(updates, smooth, color="tab:blue", label=f"Savitzky-Golay {window}/{_ORDER}")
    axes.axhline(held_out, color="tab:orange", linestyle="--", label=f"held out: {held_out:.4f}")
    axes.set_yscale("log")
    axes.legend()
    return figure


def savitzky_golay(values: np.ndarray, window: int, order: int) -> np.ndarray:
    """Each value replaced by that of the polynomial fitted to the window (odd) around it, or to the first or last one.

    scipy's savgol_filter fits powers of the position up to 100^7, and its solver drops most of them: at 201/7 its
    weights sum to 1e-6 and not to 1 (scipy 1.17). Legendre polynomials keep them all.
    """
    basis = np.polynomial.legendre.legvander(np.linspace(-1, 1, window), order)
    fit = basis @ np.linalg.pinv(basis)  # [window, window], from values to fitted ones
    half = window // 2
    middle = np.convolve(values, fit[half][::-1], mode="valid")
    return np.concatenate([fit[:half] @ values[:window], middle, fit[half + 1 :] @ values[-window:]])


def images(batch: Tensor, title: str) -> Figure:
    """A grid of images [B, C, H, W] in [0, 1]."""
    return _grids({title: batch})


def side_by_side(originals: Tensor, reconstructions: Tensor) -> Figure:
    return _grids({"originals": originals, "reconstructions": reconstructions})


def rows_of(latents: Tensor) -> Tensor:
    """A map [B, D, h, w] as rows [B h w, D]."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def pca_maps(latents: Tensor) -> Tensor:
    """A map [B, D, h, w] on its three main directions, each channel of each image in [0, 1]: [B, 3, h, w]."""
    rows = rows_of(latents).double()
    centred = rows - rows.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3]  # [<= 3, D]
    maps = (centred @ directions.T).unflatten(0, (len(latents), *latents.shape[2:])).permute(0, 3, 1, 2)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=1e-12)
    return torch.nn.functional.pad(maps, (0, 0, 0, 0, 0, 3 - maps.shape[1])).float()


def masks(count: int, height: int, width: int) -> Tensor:
    """Ones [count, 1, height, width], but for one position of each: the first in image 0, the next in image 1, ..."""
    mask = torch.ones(count, 1, height * width)
    image = torch.arange(count)
    mask[image, 0, image % (height * width)] = 0
    return mask.unflatten(2, (height, width))


def embedding(codes: Tensor, use: Tensor, seed: int) -> Figure:
    """The codes [K, D] in the plane, by UMAP, coloured by how often they were taken [K]."""
    points, title = _plane(codes.double().numpy(), seed)
    figure, axes = _figure(title, "", "")
    taken = np.log10(use.numpy() + 1)
    dots = axes.scatter(points[:, 0], points[:, 1], c=taken, cmap="viridis", s=18, alpha=0.8)
    figure.colorbar(dots, ax=axes, label="log10(1 + times taken, held out)")
    return figure


def use_histogram(use: Tensor) -> Figure:
    """How often each code was taken [K], most taken first."""
    from matplotlib import colormaps

    figure, axes = _figure("Use of the codes", "code, most taken first", "times taken, held out")
    ordered = np.sort(use.numpy())[::-1]
    axes.bar(np.arange(len(ordered)), ordered, width=1.0, color=colormaps["viridis"](0.4))
    axes.set_yscale("symlog")
    return figure


def pca_spectrum(latents: dict[str, Tensor]) -> Figure:
    """Variance held by the first directions of each map [B, D, h, w], and how many hold 90, 95 and 99 % of it."""
    figure, axes = _figure("PCA spectrum of the latents", "directions", "share of the variance held")
    for name, latent in latents.items():
        held = variance_held(latent)
        counts = ", ".join(f"{share:.0%}: {directions_for(held, share)}" for share in _SHARES)
        axes.plot(np.arange(1, len(held) + 1), held.numpy(), marker=".", label=f"{name} ({counts})")
    for share in _SHARES:
        axes.axhline(share, color="grey", linewidth=0.5, linestyle=":")
    axes.legend(loc="lower right")
    return figure


def variance_held(latents: Tensor) -> Tensor:
    """Share of the variance of a map [B, D, h, w] held by its first 1, 2, ... main directions."""
    rows = rows_of(latents).double()
    variances = torch.linalg.svdvals(rows - rows.mean(0)).square()
    return variances.cumsum(0) / variances.sum().clamp(min=1e-300)


def directions_for(held: Tensor, share: float) -> int:
    """How many directions hold that share of the variance."""
    return min(int((held < share).sum()) + 1, len(held))


def _plane(codes: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    try:
        import umap
    except ImportError:
        umap = None
    if umap is None or len(codes) < 5:
        why = "umap-learn is not installed" if umap is None else "too few codes for UMAP"
        centred = codes - codes.mean(0)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        points = np.pad(u[:, :2] * s[:2], ((0, 0), (0, max(0, 2 - len(s)))))
        return points, f"The codes by PCA ({why})"
    reducer = umap.UMAP(n_neighbors=3, min_dist=0.1, metric="cosine", random_state=seed, n_jobs=1)
    return reducer.fit_transform(codes), "The codes by UMAP (cosine, 3 neighbours)"


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
