from __future__ import annotations

import pytest
import torch

from models.training import batches
from models.training.batches import Order, ResidentBatches, StreamedBatches, make_batches
from models.training.data import SetupError
from models.training.ranks import Ranks


def _batches(seed=0, size=7, images=20, channels_last=False, ranks=None, loading="resident"):
    pixels = torch.arange(images, dtype=torch.uint8)[:, None, None, None].expand(images, 3, 4, 4)
    return make_batches(pixels, Order(images, size, seed, ranks), torch.device("cpu"), channels_last, loading)


def _numbers(batch):
    return (batch[:, 0, 0, 0] * 255).round().int().tolist()


def test_batches_of_an_epoch_contain_no_image_twice():
    batches = _batches()
    epochs = [_numbers(batches[2 * epoch]) + _numbers(batches[2 * epoch + 1]) for epoch in range(5)]
    assert all(len(set(epoch)) == 14 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_batches_in_any_order_depend_on_seed_and_update_only():
    expected = [_numbers(_batches()[update]) for update in range(6)]
    batches = _batches()
    assert [_numbers(batches[update]) for update in reversed(range(6))] == expected[::-1]
    other = [_numbers(_batches(seed=1)[update]) for update in range(6)]
    assert not {tuple(batch) for batch in other} & {tuple(batch) for batch in expected}


def test_batches_with_channels_last_are_floats_in_this_layout():
    for channels_last, layout in ((False, torch.contiguous_format), (True, torch.channels_last)):
        batch = _batches(channels_last=channels_last)[0]
        assert batch.dtype == torch.float32
        assert batch.is_contiguous(memory_format=layout)
        assert batch.min() >= 0
        assert batch.max() <= 1


@pytest.mark.parametrize("size", [0, 21])
def test_batch_size_out_of_range_raises(size):
    with pytest.raises(
        SetupError, match=rf"expected batch_size to lie in \[1, 20\], the number of training images, got {size}"
    ):
        _batches(size=size)


def test_batches_of_all_ranks_equal_batch_of_one_process():
    whole = _batches(size=6)
    parts = [_batches(size=6, ranks=Ranks(rank, 3)) for rank in range(3)]
    for update in (0, 4, 1):
        assert _numbers(torch.cat([part[update] for part in parts])) == _numbers(whole[update])


def test_batch_size_not_divisible_by_ranks_raises():
    with pytest.raises(SetupError, match="expected batch_size to be a multiple of 2, the number of ranks, got 7"):
        _batches(ranks=Ranks(0, 2))


@pytest.mark.parametrize("ranks", [None, Ranks(1, 2)])
def test_streamed_batches_equal_resident_batches(ranks):
    resident, streamed = (_batches(size=6, ranks=ranks, loading=loading) for loading in ("resident", "streamed"))
    assert (type(resident), type(streamed)) == (ResidentBatches, StreamedBatches)
    # Across the end of an epoch, then at another update, as after a checkpoint.
    for update in (1, 2, 3, 4, 10, 11):
        assert torch.equal(streamed[update], resident[update])


def test_loading_auto_without_free_memory_is_streamed(monkeypatch):
    assert type(_batches(loading="auto")) is ResidentBatches
    images = torch.zeros(20, 3, 4, 4, dtype=torch.uint8)
    for free, fits in ((2 * images.nbytes, True), (2 * images.nbytes - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert batches._fits(images, torch.device("cuda")) == fits
