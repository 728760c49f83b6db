"""The optional packages that training and the report need, looked for before the work begins."""

from __future__ import annotations

import importlib
import importlib.util
import sys

# Names of the packages whose modules have another name.
_PACKAGES = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}
_REPORT = ("safetensors", "matplotlib", "PIL", "torchvision")
_DATA = {"patches": ("skimage", "sklearn")}
_INSTALL = "pip install 'dlvae-kernels[viz]'"


def require(data: str, trains: bool) -> None:
    """Check that the modules for the image set `data`, for the report and (`trains`) for training can be imported.

    Raises:
        ValueError: some cannot; the message names their packages and how to install them.
    """
    errors = {}
    for name in (*(["tqdm"] * trains), *_REPORT, *_DATA.get(data, ())):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # torchvision of another torch raises a RuntimeError
            errors[_PACKAGES.get(name, name)] = " ".join(str(error).split())
    if errors:
        reasons = "; ".join(f"{package} ({reason})" for package, reason in errors.items())
        raise ValueError(f"packages are missing or cannot be imported: {reasons}; install them with: {_INSTALL}")


def note_missing() -> None:
    """Say on stderr what the report will lack."""
    # umap takes long to import.
    if importlib.util.find_spec("umap") is None:
        print(f"umap-learn is not installed: the report will draw the codes by PCA; {_INSTALL}", file=sys.stderr)
