"""tools/check_language.py finds what it looks for, and nothing is found in this repository."""

from __future__ import annotations

import pytest

from tools.check_language import faults, main


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.py", "x = 1  # Of all codes the nearest\n", "a.py:1: begins with 'Of'"),
        ("a.py", '"""Fine.\n\nAnd so on."""\n', "a.py:1: begins with 'And'"),
        ("a.py", "raise ValueError(f'{x} takes a code')\n", "a.py:1: 'takes a code': say is assigned to a code"),
        ("a.h", "// The nearest\n// code: theirs\n", "a.h:1: 'theirs'"),
        ("a.py", "# Both give the same bits.\n", "a.py:1: 'same bits': say bitwise reproducible"),
        ("a.cu", "// A reach that is NaN\n", "a.cu:1: 'A reach': say error bound"),
        ("a.h", "// The codes that reach the threshold\n", None),
        ("a.md", "one\nCodes in use\n", "a.md:2: 'Codes in use': say active codes"),
        ("a.py", "# The first line\n# of a sentence.\nofs = 'ours'\n", None),
    ],
)
def test_language_fault_is_listed_with_its_line(tmp_path, monkeypatch, name, text, expected):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_text(text)
    found = [fault.removeprefix(f"{tmp_path}/") for fault in faults(path)]
    assert [fault[: len(expected)] for fault in found] == [expected] if expected else found == []


def test_language_of_this_repository_has_no_fault(capsys):
    assert main() == 0, capsys.readouterr().out
