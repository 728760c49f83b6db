"""The autotuner of block sizes, tested with invented times."""

from __future__ import annotations

import dataclasses

import pytest
import torch

autotune = pytest.importorskip("dlvae_kernels.backends.triton.search.autotune")
from triton.runtime.errors import OutOfResources  # noqa: E402

from dlvae_kernels.backends.triton.search.config import SearchConfig  # noqa: E402

DEFAULT = SearchConfig(128, 128, 64, 4, 16, False, 8, 3, 255)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "_path", lambda: tmp_path / "deeper" / "dlvae_search.json")
    monkeypatch.setattr(autotune, "capability", lambda: 90)
    monkeypatch.setattr(autotune, "_chosen", {})


def choose(seconds, n=1000, k=500, kind="float32"):
    """The choice where a configuration takes `seconds(config)`."""
    tried = []
    return autotune.tuned(DEFAULT, n, k, kind, tried.append, lambda call: (call(), seconds(tried[-1]))[1]), tried


def test_tuned_new_sizes_measures_once_and_chooses_the_fastest():
    fastest = dataclasses.replace(DEFAULT, group=8, compare_d=8, num_stages=4)
    chosen, tried = choose(lambda config: 1.0 if config == fastest else 2.0)
    assert chosen == fastest
    assert tried[0] == DEFAULT
    assert len(tried) == len(set(tried)) > 10
    # The same power of two bounds this number of rows.
    again, tried = choose(lambda config: 1.0, n=1020)
    assert (again, tried) == (fastest, [])
    for other in ({"n": 1030}, {"k": 513}, {"kind": "float16"}):
        assert choose(lambda config: 1.0, **other)[0] == DEFAULT


def test_tuned_after_a_restart_reads_the_file(monkeypatch):
    chosen, _ = choose(lambda config: config.num_stages)
    assert chosen.num_stages == 2
    monkeypatch.setattr(autotune, "_chosen", {})
    assert choose(lambda config: 1.0) == (chosen, [])


@pytest.mark.parametrize("text", ["", "[1]", '{"a": {"no": 1}}', '{"a": 3}'])
def test_tuned_unreadable_file_measures_again(text):
    autotune._path().parent.mkdir(parents=True)
    autotune._path().write_text(text)
    assert choose(lambda config: 1.0)[0] == DEFAULT
    assert autotune._path().read_text() != text


def test_tuned_config_out_of_resources_is_not_chosen():
    def seconds(config):
        if config.num_stages > 2:
            raise OutOfResources(2, 1, "shared memory")
        return 1.0

    assert choose(seconds)[0].num_stages == 2


def test_is_wanted_without_variable_or_in_capture_is_false(monkeypatch):
    monkeypatch.delenv("DLVAE_AUTOTUNE", raising=False)
    assert not autotune.is_wanted()
    monkeypatch.setenv("DLVAE_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not autotune.is_wanted()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert autotune.is_wanted() == (not autotune.INTERPRETED)
