"""`python -m benchmarks compat`: rows, counts and judge."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import __main__, compat, results

pytest.importorskip("vector_quantize_pytorch")

_SIZES = {"dim": 8, "codebook_size": 16}
SMALL = {
    "VectorQuantize": compat.Case("VectorQuantize", (2, 10, 8), _SIZES, {"threshold_ema_dead_code": 2}),
    "image": compat.Case("VectorQuantize", (2, 8, 4, 5), _SIZES, {"accept_image_fmap": True}),
    "ResidualVQ": compat.Case("ResidualVQ", (2, 10, 8), {**_SIZES, "num_quantizers": 3}, {"use_cosine_sim": True}),
    "GroupedResidualVQ": compat.Case("GroupedResidualVQ", (2, 10, 8), {**_SIZES, "num_quantizers": 3, "groups": 2}),
    "FSQ": compat.Case("FSQ", (2, 10, 8), {"levels": [5, 3], "dim": 8}),
    "LFQ": compat.Case("LFQ", (2, 10, 4), {"codebook_size": 16}),
    "SimVQ": compat.Case("SimVQ", (2, 10, 8), _SIZES),
    "RandomProjectionQuantizer": compat.Case(
        "RandomProjectionQuantizer", (2, 10, 8), {**_SIZES, "codebook_dim": 4, "num_codebooks": 2}, passes=("eval",)
    ),
}


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_rows_of_equal_quantizers_are_ok(case, monkeypatch):
    monkeypatch.setattr(compat.memory, "in_child", lambda function, arguments, name: function(*arguments))
    rows = compat.measured(case, 0)
    assert [(row["pass"], row["implementation"]) for row in rows] == [
        (name, library) for name in case.passes for library in (compat.LIBRARY, compat.VQP)
    ]
    for own, stock in zip(rows[::2], rows[1::2], strict=True):
        assert own["status"] == stock["status"] == "ok"
        assert float(own["differing"]) == 0
        assert own["ratio"] == "1.000"
        assert float(stock["ratio"]) == pytest.approx(float(stock["ms"]) / float(own["ms"]), rel=1)
        assert int(own["operations"]) > 0
        assert own["host_reads"] == "0"
        assert set(own) <= {*compat.COLUMNS}
    assert "vector-quantize-pytorch 1." in rows[1]["versions"]
    assert "vector" not in rows[0]["versions"]


class _Counted(nn.Module):
    """Three operations, a view, and a host read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("initted", torch.ones(()))

    def forward(self, x):
        if self.initted:
            x = x.view(-1) * 2
        return torch.ops.dlvae.gather_codes_fwd(torch.eye(4), x.long()), x


@pytest.mark.parametrize(("library", "reads"), [(compat.LIBRARY, 0), (compat.VQP, 1)])
def test_operations_are_counted_without_views_and_reads(library, reads):
    quantizer = compat.Quantizer(SMALL["FSQ"], library)
    quantizer.module, quantizer.x = _Counted(), torch.tensor([[0.0, 1.0]])
    found = compat.operations(quantizer, library, "eval")
    # mul, eye, _to_copy and one operation of this library
    assert (found.count, found.reads) == (4, reads)


def _other_index(output):
    return output[0], (output[1] + 1) % 2, *output[2:]


def _other_value(output):
    return output[0] * 1.001, *output[1:]


def _last_vector_is_wrong(output):
    indices = output[1].clone()
    indices[-1, -1] = (indices[-1, -1] + 1) % 16
    return output[0], indices, *output[2:]


@pytest.mark.parametrize("name", ["train", "eval"])
@pytest.mark.parametrize("change", [_other_index, _other_value, _last_vector_is_wrong])
@pytest.mark.parametrize("key", ["VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "SimVQ"])
def test_wrong_result_is_judged_wrong(key, change, name, monkeypatch):
    monkeypatch.setattr(compat, "_MOST_DIFFERING", 1.0)
    pair = compat.quantizers(SMALL[key])
    assert not compat.judge(SMALL[key], pair, name).wrong
    pair[compat.LIBRARY].module.register_forward_hook(lambda module, args, output: change(output))
    assert compat.judge(SMALL[key], pair, name).wrong


@pytest.mark.parametrize("key", ["FSQ", "LFQ"])
def test_wrong_values_without_a_codebook_are_judged_wrong(key):
    pair = compat.quantizers(SMALL[key])
    pair[compat.LIBRARY].module.register_forward_hook(
        lambda module, args, output: _other_value(output) if key == "FSQ" else (-output[0], *output[1:])
    )
    assert compat.judge(SMALL[key], pair, "eval").wrong


def test_wrong_gradient_is_judged_wrong():
    case = SMALL["VectorQuantize"]
    pair = compat.quantizers(case)
    pair[compat.LIBRARY].module.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 1.01,))
    assert compat.judge(case, pair, "train").wrong
    assert not compat.judge(case, pair, "eval").wrong


def test_wrong_labels_are_judged_wrong():
    case = SMALL["RandomProjectionQuantizer"]
    pair = compat.quantizers(case)
    pair[compat.LIBRARY].module.register_forward_hook(lambda module, args, output: output.roll(1, 0))
    assert compat.judge(case, pair, "eval").wrong


def test_near_tie_is_judged_ok(monkeypatch):
    monkeypatch.setattr(compat, "_MOST_DIFFERING", 1.0)
    case = SMALL["VectorQuantize"]
    pair = compat.quantizers(case)
    for each in pair.values():
        # All codes are equal.
        for value in each.module.state_dict().values():
            value.fill_(1)
    pair[compat.LIBRARY].module.register_forward_hook(lambda module, args, output: _last_vector_is_wrong(output))
    verdict = compat.judge(case, pair, "eval")
    assert verdict.differing == 1 / 20
    assert not verdict.wrong


def test_write_selects_by_name_and_returns_1_if_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(compat.memory, "in_child", lambda function, arguments, name: function(*arguments))
    path = tmp_path / "rows.csv"
    assert compat.write(path, "COSINE", 0, list(SMALL.values())) == 0
    assert {row["quantizer"] for row in results.read(path)} == {"ResidualVQ"}
    monkeypatch.setattr(compat, "_RELATIVE", -1.0)
    assert compat.write(path, "FSQ", 0, list(SMALL.values())) == 1
    assert {row["status"] for row in results.read(path)} == {"wrong"}


def test_unknown_name_raises(capsys):
    assert __main__.main(["compat", "--only", "nobody's"]) == 1
    assert "expected only to be part of one of VectorQuantize" in capsys.readouterr().err


def test_committed_rows_are_ok_and_those_of_the_cases():
    rows = results.read(compat.PATH)
    expected = [
        (case.quantizer, case.text, case.size, name, library)
        for case in compat.CASES
        for name in case.passes
        for library in (compat.LIBRARY, compat.VQP)
    ]
    keys = ("quantizer", "options", "size", "pass", "implementation")
    found = [tuple(row[key] for key in keys) for row in rows]
    assert found == expected
    assert {row["status"] for row in rows} == {"ok"}
