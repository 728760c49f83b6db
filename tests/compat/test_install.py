"""install() of dlvae_kernels.compat, and what importing the package loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dlvae_kernels.compat.vector_quantize_pytorch as own
from dlvae_kernels.compat import install
from dlvae_kernels.compat.vector_quantize_pytorch.arguments import NOT_IMPLEMENTED

ROOT = Path(__file__).parents[2]
NAME = "vector_quantize_pytorch"
# Hides the real package and what it depends on.
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vector_quantize_pytorch", "einops", "einx", "loguru"):
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hidden())
"""
SCRIPT = """
import torch
from vector_quantize_pytorch import ResidualVQ, SimVQ
import vector_quantize_pytorch as vq
from vector_quantize_pytorch.residual_sim_vq import ResidualSimVQ
import vector_quantize_pytorch.sim_vq
quantizer = ResidualSimVQ(dim=8, num_quantizers=2, codebook_size=16)
quantized, indices, loss = quantizer(torch.randn(2, 5, 8))
assert isinstance(quantizer.layers[0], SimVQ) and vq.SimVQ is SimVQ is vector_quantize_pytorch.sim_vq.SimVQ
ResidualVQ(dim=8, num_quantizers=2, codebook_size=16)(quantized)
print(SimVQ.__module__, *indices.shape)
"""

pytestmark = pytest.mark.small


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def output_of(code: str) -> str:
    result = run(code)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


@pytest.mark.parametrize("hide", ["", HIDE], ids=["installed", "hidden"])
def test_install_script_imports_this_package(hide):
    if not hide:
        pytest.importorskip(NAME, reason="the extra 'bench' is not installed")
    code = f"{hide}\nfrom dlvae_kernels.compat import install\ninstall()\n{SCRIPT}"
    assert output_of(code) == "dlvae_kernels.compat.vector_quantize_pytorch.sim_vq 2 5 2"
    # The script alone gives the real package or no package.
    result = run(f"{hide}\n{SCRIPT}")
    assert (result.stdout.strip() or result.stderr.splitlines()[-1]) == (
        "ModuleNotFoundError: vector_quantize_pytorch is hidden" if hide else "vector_quantize_pytorch.sim_vq 2 5 2"
    )


@pytest.mark.usefixtures("without_vector_quantize_pytorch")
def test_install_undo_restores_what_was_there():
    with install() as outer:
        assert sys.modules[NAME] is own
        with install():
            assert sys.modules[NAME] is own
        assert sys.modules[NAME] is own
        assert sys.modules[f"{NAME}.sim_vq"] is own.sim_vq
    assert not [name for name in sys.modules if name.split(".")[0] == NAME]
    outer.undo()
    assert NAME not in sys.modules


@pytest.mark.usefixtures("without_vector_quantize_pytorch")
def test_install_after_the_real_package_asks_for_replace():
    real = pytest.importorskip(NAME, reason="the extra 'bench' is not installed")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == NAME}
    with pytest.raises(RuntimeError, match=r"before the first import .*__init__\.py; .* replace=True"):
        install()
    assert sys.modules[NAME] is real
    with install(replace=True):
        assert sys.modules[NAME] is own
        assert f"{NAME}.latent_quantization" not in sys.modules
    assert {name: module for name, module in sys.modules.items() if name.split(".")[0] == NAME} == before


@pytest.mark.usefixtures("without_vector_quantize_pytorch")
def test_install_gives_every_module_of_the_package():
    folder = Path(own.__file__).parent
    with install():
        found = {name.removeprefix(f"{NAME}.") for name in sys.modules if name.startswith(f"{NAME}.")}
    assert found == {file.stem for file in folder.glob("*.py")} - {"__init__"}


@pytest.mark.usefixtures("without_vector_quantize_pytorch")
@pytest.mark.parametrize("name", sorted(NOT_IMPLEMENTED))
def test_missing_name_is_named_with_the_remedy(name):
    message = f"does not implement {name} of vector-quantize-pytorch; import it from the real package"
    with pytest.raises(ImportError, match=message):
        getattr(own, name)
    with install(), pytest.raises(ImportError, match=message):
        exec(f"from {NAME} import {name}")


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(own, "Quantizer")
    with pytest.raises(AttributeError, match="has no attribute 'Quantizer'"):
        _ = own.Quantizer


def test_names_of_vector_quantize_pytorch_are_there_or_named_as_missing():
    real = pytest.importorskip(NAME, reason="the extra 'bench' is not installed")
    names = {name for name, value in vars(real).items() if isinstance(value, type) or name == "Sequential"}
    assert names - NOT_IMPLEMENTED == set(own.__all__)


def test_import_loads_neither_compat_nor_its_source():
    loaded = "print(*(n for n in ('dlvae_kernels.compat', 'einops', 'einx', 'loguru', '{}') if n in sys.modules))"
    imports = "import sys, dlvae_kernels", f"import dlvae_kernels.compat.{NAME}"
    result = run("\n".join(f"{each}\n{loaded.format(NAME)}" for each in imports))
    assert result.stdout.splitlines() == ["", "dlvae_kernels.compat"], result.stderr[-2000:]
    assert output_of(f"{HIDE}\nimport dlvae_kernels.compat.{NAME} as vq\nprint(vq.SimVQ(4, 4).codebook_size)") == "4"
