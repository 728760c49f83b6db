"""The examples in the docstrings of all public names run, on the reference and on the native backend."""

from __future__ import annotations

import doctest

import pytest
import torch

import dlvae_kernels
from dlvae_kernels import compat, functional, use_backend
from dlvae_kernels.backends import unavailable_reason
from dlvae_kernels.compat import vector_quantize_pytorch

NAMESPACE = {**vars(functional), **vars(dlvae_kernels)}
# Each public name with the names that its example uses.
DOCUMENTED = {name: (NAMESPACE[name], NAMESPACE) for name in (*dlvae_kernels.__all__, *functional.__all__)}
for module in (compat, vector_quantize_pytorch):
    DOCUMENTED |= {f"{module.__name__}.{name}": (getattr(module, name), vars(module)) for name in module.__all__}

pytestmark = pytest.mark.small


@pytest.mark.usefixtures("without_vector_quantize_pytorch")
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_docstring_example_runs_as_written(name, backend):
    if (reason := unavailable_reason(backend, "nearest_code")) is not None:
        pytest.skip(reason)
    documented, namespace = DOCUMENTED[name]
    globs = {"torch": torch, **namespace}
    example = doctest.DocTestParser().get_doctest(documented.__doc__, globs, name, None, None)
    assert example.examples, f"expected an example (>>>) in the docstring of {name}, got none"
    report = []
    with use_backend(backend):
        result = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert result.failed == 0, "".join(report)
