"""docs/vector-quantize-pytorch.md lists every argument of vector-quantize-pytorch with the status that the code has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from dlvae_kernels.compat import vector_quantize_pytorch as own
from dlvae_kernels.compat.vector_quantize_pytorch.arguments import NOT_IMPLEMENTED, REFUSED, check_arguments

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
    if not hasattr(own, owner.partition(".")[0]):
        pytest.skip("not implemented yet")
    found = {name: status for (each, name), status in statuses().items() if each == owner}
    assert {name for name, status in found.items() if status == "refused"} == set(REFUSED.get(owner, ()))
    accepted = [name for name, status in found.items() if status != "refused"]
    assert set(accepted) <= set(arguments(own, owner))
    # Positional arguments of the same order.
    order = [name for name in arguments(stock, owner) if name in accepted]
    assert [name for name in arguments(own, owner) if name in accepted] == order


@pytest.mark.parametrize("owner", REFUSED)
def test_refused_argument_has_the_default_of_vector_quantize_pytorch(owner):
    name, _, method = owner.partition(".")
    parameters = inspect.signature(getattr(getattr(stock, name), method or "__init__")).parameters
    for argument, default in REFUSED[owner].items():
        assert parameters[argument].default == default, argument
        check_arguments(owner, {argument: default})
        with pytest.raises(TypeError, match=f"{owner} does not implement the argument '{argument}'.*leave it out"):
            check_arguments(owner, {argument: "other"})
    with pytest.raises(TypeError, match=f"{owner} got an unknown argument 'colour'"):
        check_arguments(owner, {"colour": 1})
