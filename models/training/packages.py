"""The optional packages of training and report, checked before the work begins."""

from __future__ import annotations

import importlib
import importlib.util
import sys

# The packages whose modules have another name.
_PACKAGES = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}
_REPORT = ("safetensors", "matplotlib", "PIL", "torchvision")
_DATA = {"patches": ("skimage", "sklearn")}
_INSTALL = "pip install 'dlvae-kernels[viz]'"


def require(data: str, trains: bool) -> None:
    """Check that the packages of the image set `data`, of the report and, with `trains`, of training can be imported.

    Raises:
        ValueError: packages cannot be imported; the message names all of them and how to install them.
    """
    errors = {}
    for name in (*(["tqdm"] * trains), *_REPORT, *_DATA.get(data, ())):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # torchvision for another torch raises a RuntimeError
            errors[_PACKAGES.get(name, name)] = " ".join(str(error).split())
    if errors:
        reasons = "; ".join(f"{package} ({reason})" for package, reason in errors.items())
        raise ValueError(f"packages are missing or cannot be imported: {reasons}; install them with: {_INSTALL}")


def note_missing() -> None:
    """Print a note on stderr if the report will lack a plot."""
    # Only found, not imported: the import of umap takes seconds.
    if importlib.util.find_spec("umap") is None:
        print(f"umap-learn is not installed: the report will show the codes by PCA; {_INSTALL}", file=sys.stderr)
