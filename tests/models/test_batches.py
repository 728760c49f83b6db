from __future__ import annotations

import pytest
import torch

from models import batches
from models.batches import Order, ResidentBatches, StreamedBatches, make_batches
from models.data import DataError
from models.ranks import Ranks


def _batches(seed=0, size=7, images=20, channels_last=False, ranks=None, loading="resident"):
    pixels = torch.arange(images, dtype=torch.uint8)[:, None, None, None].expand(images, 3, 4, 4)
    return make_batches(pixels, Order(images, size, seed, ranks), torch.device("cpu"), channels_last, loading)


def _numbers(batch):
    return (batch[:, 0, 0, 0] * 255).round().int().tolist()


def test_batches_pass_over_each_image_once_an_epoch():
    batches = _batches()
    epochs = [_numbers(batches[2 * epoch]) + _numbers(batches[2 * epoch + 1]) for epoch in range(5)]
    assert all(len(set(epoch)) == 14 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_batches_follow_from_seed_and_update_alone():
    expected = [_numbers(_batches()[update]) for update in range(6)]
    batches = _batches()
    assert [_numbers(batches[update]) for update in reversed(range(6))] == expected[::-1]
    other = [_numbers(_batches(seed=1)[update]) for update in range(6)]
    assert not {tuple(batch) for batch in other} & {tuple(batch) for batch in expected}


def test_batches_are_floats_in_the_layout_asked_for():
    for channels_last, layout in ((False, torch.contiguous_format), (True, torch.channels_last)):
        batch = _batches(channels_last=channels_last)[0]
        assert batch.dtype == torch.float32
        assert batch.is_contiguous(memory_format=layout)
        assert batch.min() >= 0
        assert batch.max() <= 1


@pytest.mark.parametrize("size", [0, 21])
def test_a_batch_size_that_does_not_fit(size):
    with pytest.raises(DataError, match=rf"batch_size is {size}; it needs to lie in \[1, 20\]"):
        _batches(size=size)


def test_ranks_together_see_the_batch_of_one():
    whole = _batches(size=6)
    parts = [_batches(size=6, ranks=Ranks(rank, 3)) for rank in range(3)]
    for update in (0, 4, 1):
        assert _numbers(torch.cat([part[update] for part in parts])) == _numbers(whole[update])


def test_a_batch_size_that_ranks_cannot_share():
    with pytest.raises(DataError, match="batch_size is 7; it needs to be a multiple of 2, the ranks"):
        _batches(ranks=Ranks(0, 2))


@pytest.mark.parametrize("ranks", [None, Ranks(1, 2)])
def test_streamed_batches_are_those_that_lie_on_the_device(ranks):
    resident, streamed = (_batches(size=6, ranks=ranks, loading=loading) for loading in ("resident", "streamed"))
    assert (type(resident), type(streamed)) == (ResidentBatches, StreamedBatches)
    # On over the end of an epoch, then elsewhere, as after a checkpoint.
    for update in (1, 2, 3, 4, 10, 11):
        assert torch.equal(streamed[update], resident[update])


def test_images_are_streamed_where_the_device_has_no_room(monkeypatch):
    assert type(_batches(loading="auto")) is ResidentBatches
    images = torch.zeros(20, 3, 4, 4, dtype=torch.uint8)
    for free, fits in ((2 * images.nbytes, True), (2 * images.nbytes - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert batches._fits(images, torch.device("cuda")) == fits
