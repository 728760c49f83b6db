from __future__ import annotations

import pytest
import torch

from dlvae_kernels import one_hot

from .cases import DTYPES

OPS = ("one_hot",)


@pytest.mark.small
@pytest.mark.every_isa
def test_one_hot_three_codes_by_hand(device):
    assert one_hot(torch.tensor([2, 0], device=device), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert one_hot(torch.tensor([[2, 0], [1, 1]], device=device), 3).tolist() == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
def test_one_hot_any_dtype_equals_torch(device, dtype):
    indices = torch.randint(0, 129, (507,), device=device)
    expected = torch.nn.functional.one_hot(indices, 129).to(dtype)
    assert torch.equal(one_hot(indices, 129, dtype=dtype), expected)
    assert torch.equal(one_hot(indices.repeat(2)[::2], 129, dtype=dtype), expected.repeat(2, 1)[::2])


def test_one_hot_empty_and_single_have_their_shapes(device):
    assert one_hot(torch.empty(0, dtype=torch.int64, device=device), 7).shape == (0, 7)
    assert one_hot(torch.empty(0, 3, dtype=torch.int64, device=device), 7).shape == (0, 7)
    assert one_hot(torch.zeros(4, dtype=torch.int64, device=device), 1).tolist() == [[1.0]] * 4


def test_one_hot_opcheck_and_compile_pass(device):
    indices = torch.tensor([[2, 0], [1, 1]], device=device)
    torch.library.opcheck(torch.ops.dlvae.one_hot, (indices, 3, torch.float32))
    compiled = torch.compile(one_hot, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(indices, 3), one_hot(indices, 3))


@pytest.mark.parametrize(
    ("indices", "num_codes", "message"),
    [
        (torch.tensor([0, 3]), 3, r"expected indices in \[-1, 3\) .*, got 3"),
        (torch.tensor([0, -2]), 3, r"expected indices in \[-1, 3\) .*, got -2"),
        (torch.tensor([0.0]), 3, r"expected indices of dtype .*, got torch.float32"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), 3, r"expected indices of shape .*, got \(2, 2, 2\)"),
        (torch.tensor([0]), 0, r"expected num_codes to be an integer of at least 1, got 0"),
    ],
)
def test_one_hot_bad_input_raises(indices, num_codes, message):
    with pytest.raises(ValueError, match=message):
        one_hot(indices, num_codes)
