"""The examples in the docstrings of all public names run, on the reference and on the native backend."""

from __future__ import annotations

import doctest

import pytest
import torch

import dlvae_kernels
from dlvae_kernels import functional, use_backend
from dlvae_kernels.backends import unavailable_reason

NAMES = sorted({*dlvae_kernels.__all__, *functional.__all__})
NAMESPACE = {"torch": torch, **vars(functional), **vars(dlvae_kernels)}

pytestmark = pytest.mark.small


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_docstring_example_runs_as_written(name, backend):
    if (reason := unavailable_reason(backend, "nearest_code")) is not None:
        pytest.skip(reason)
    documented = getattr(dlvae_kernels, name, None) or getattr(functional, name)
    example = doctest.DocTestParser().get_doctest(documented.__doc__, dict(NAMESPACE), name, None, None)
    assert example.examples, f"expected an example (>>>) in the docstring of {name}, got none"
    report = []
    with use_backend(backend):
        result = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert result.failed == 0, "".join(report)
