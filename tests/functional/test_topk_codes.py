from __future__ import annotations

import pytest
import torch

from dlvae_kernels import nearest_code, topk_codes
from dlvae_kernels.backends.reference import topk_codes as reference_topk_codes
from dlvae_kernels.backends.reference.scores import Scores
from dlvae_kernels.testing import assert_same_topk

from .cases import DTYPES, SIZES, layouts, rows

OPS = ("topk_codes",)


def test_by_hand(device):
    dictionary = torch.tensor([[5.0], [1.0], [3.0], [1.0]], device=device)
    indices, distances = topk_codes(torch.tensor([[0.0], [4.0]], device=device), dictionary, 3)
    assert indices.tolist() == [[1, 3, 2], [0, 2, 1]]
    assert distances.tolist() == [[1.0, 1.0, 9.0], [1.0, 1.0, 9.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_float64(device, size, dtype):
    n, num_atoms, d = size
    x, dictionary = rows(n, d, device, dtype), rows(num_atoms, d, device, dtype)
    for k in {1, min(7, num_atoms), num_atoms}:
        indices, distances = topk_codes(x, dictionary, k)
        assert indices.shape == distances.shape == (n, k)
        assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_same_topk(indices, distances, x, dictionary)


@pytest.mark.parametrize("layout", layouts(2, 2, torch.device("cpu")))
def test_any_strides(device, layout):
    x, dictionary = layouts(50, 12, device)[layout], rows(24, 12, device)
    indices, distances = topk_codes(x, dictionary, 5)
    assert_same_topk(indices, distances, x, dictionary)


def test_first_is_the_nearest(device):
    x, dictionary = rows(3000, 20, device), rows(900, 20, device)
    assert torch.equal(topk_codes(x, dictionary, 4)[0][:, 0], nearest_code(x, dictionary))


def test_ties_go_by_index(device):
    dictionary = rows(40, 33, device)
    dictionary = torch.cat([dictionary, dictionary, dictionary])
    x = torch.cat([rows(100, 33, device), dictionary])
    # 4 cuts through the second group of three equal atoms.
    indices, distances = topk_codes(x, dictionary, 4)
    assert_same_topk(indices, distances, x, dictionary)
    assert (indices[:, 1] == indices[:, 0] + 40).all()
    assert (indices[:, 2] == indices[:, 0] + 80).all()
    assert (indices[:, 3] < 40).all()
    assert (distances[100:, :3] == 0).all()


def test_only_rows_with_ties_are_looked_at_again(monkeypatch):
    sorted_rows = []
    original = Scores.exact

    def spy(scores, is_row, threshold):
        sorted_rows.append(int(is_row.sum()))
        return original(scores, is_row, threshold)

    monkeypatch.setattr(Scores, "exact", spy)
    dictionary = torch.tensor([[0.0], [1.0], [1.0], [5.0]])
    reference_topk_codes(torch.tensor([[0.9], [5.0], [0.1]]), dictionary, 1)
    assert sorted_rows == [1]


def test_nan(device):
    nan = float("nan")
    dictionary = torch.tensor([[nan], [3.0], [nan], [1.0]], device=device)
    indices, _ = topk_codes(torch.tensor([[0.0], [nan]], device=device), dictionary, 4)
    assert indices[0].tolist() == [3, 1, 0, 2]
    assert sorted(indices[1].tolist()) == [0, 1, 2, 3]
    assert indices[1, 0] == 0


def test_repeats_to_the_bit(device):
    torch.use_deterministic_algorithms(False)
    x, dictionary = rows(1000, 32, device), rows(300, 32, device)
    first, second = (topk_codes(x, dictionary, 20) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_opcheck(device):
    x = layouts(20, 6, device)["channel_first"]
    torch.library.opcheck(torch.ops.dlvae.topk_codes, (x, rows(5, 6, device), 3))


def test_compiles_whole(device):
    x, dictionary = rows(40, 6, device), rows(9, 6, device)
    compiled = torch.compile(topk_codes, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, dictionary, 4)[0], topk_codes(x, dictionary, 4)[0])


@pytest.mark.parametrize("k", [0, -1, 6, 2.0])
def test_bad_k(k):
    with pytest.raises(ValueError, match=rf"k is {k}; it needs to be a whole number in \[1, 5\]"):
        topk_codes(torch.zeros(2, 3), torch.zeros(5, 3), k)


def test_bad_input():
    with pytest.raises(ValueError, match=r"dictionary has shape \(0, 3\)"):
        topk_codes(torch.zeros(2, 3), torch.zeros(0, 3), 1)
