"""docs/vector-quantize-pytorch.md lists every argument of vector-quantize-pytorch with the status that the code has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from dlvae_kernels.compat import vector_quantize_pytorch as own
from dlvae_kernels.compat.vector_quantize_pytorch.arguments import NOT_IMPLEMENTED, REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "vector-quantize-pytorch.md"
ROW = re.compile(r"^\| `([\w.]+)` \| (`\w+`(?:, `\w+`)*) \| (supported|mended|refused) \| ([^|]*) ?\|$", re.MULTILINE)

stock = pytest.importorskip("vector_quantize_pytorch", reason="the extra 'bench' is not installed")

pytestmark = pytest.mark.small


def statuses() -> dict[tuple[str, str], str]:
    """The status of each pair of "Class" or "Class.forward" and argument."""
    found: dict[tuple[str, str], str] = {}
    for owner, names, status, _ in ROW.findall(PAGE.read_text(encoding="utf-8")):
        for name in re.findall(r"`(\w+)`", names):
            assert (owner, name) not in found, f"{owner} has two rows with {name}"
            found[owner, name] = status
    return found


def arguments(package, owner: str) -> list[str]:
    """The names of the arguments of "Class" or "Class.forward", without self, *args and **kwargs."""
    name, _, method = owner.partition(".")
    function = getattr(getattr(package, name), method or "__init__")
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [each.name for each in parameters if each.kind not in kinds]


CLASSES = sorted(name for name, value in vars(stock).items() if isinstance(value, type) and name not in NOT_IMPLEMENTED)
OWNERS = [owner for name in CLASSES for owner in (name, f"{name}.forward")]


def test_page_lists_exactly_the_arguments_of_vector_quantize_pytorch():
    expected = {(owner, name) for owner in OWNERS for name in arguments(stock, owner)}
    assert set(statuses()) == expected
    assert len(CLASSES) == 12


@pytest.mark.parametrize("owner", OWNERS)
def test_status_on_the_page_is_that_of_the_code(owner):
    found = {name: status for (each, name), status in statuses().items() if each == owner}
    assert {name for name, status in found.items() if status == "refused"} == set(REFUSED.get(owner, ()))
    accepted = [name for name, status in found.items() if status != "refused"]
    assert set(accepted) <= set(arguments(own, owner))
    # Positional arguments of the same order.
    order = [name for name in arguments(stock, owner) if name in accepted]
    assert [name for name in arguments(own, owner) if name in accepted] == order


REQUIRED = {
    "VectorQuantize": {"dim": 4, "codebook_size": 8},
    "ResidualVQ": {"dim": 4, "codebook_size": 8, "num_quantizers": 2},
}


@pytest.mark.parametrize(("owner", "argument"), [(owner, name) for owner in REFUSED for name in REFUSED[owner]])
def test_refused_argument_takes_the_default_of_vector_quantize_pytorch_alone(owner, argument):
    name, _, method = owner.partition(".")
    default = inspect.signature(getattr(getattr(stock, name), method or "__init__")).parameters[argument].default
    assert REFUSED[owner][argument] == default

    def use(value):
        made = getattr(own, name)(**REQUIRED[name], **({} if method else {argument: value}))
        return made(torch.randn(2, 5, 4), **({argument: value} if method else {}))

    use(default)
    with pytest.raises(TypeError, match=f"{owner} does not implement the argument '{argument}'.*leave it out"):
        use("other")


@pytest.mark.parametrize("name", REQUIRED)
def test_unknown_argument_is_named(name):
    with pytest.raises(TypeError, match="VectorQuantize got an unknown argument 'colour'"):
        getattr(own, name)(**REQUIRED[name], colour=1)


def test_refused_argument_of_a_group_is_named():
    with pytest.raises(TypeError, match="ResidualVQ does not implement the argument 'beam_size'"):
        own.GroupedResidualVQ(groups=2, **REQUIRED["ResidualVQ"], beam_size=2)
