"""List comments, docstrings and pages that break the language rules of CONTRIBUTING.md; `make lint` runs it.

A comment or docstring is a full sentence or a noun phrase: none begins with a word of `OPENINGS`. Where the field has a
term, pages, docstrings, comments and messages use it, and not a phrase of `PHRASES`.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

OPENINGS = re.compile(r"(Of|And|What|Such|As|So many)\b")
PHRASES = {
    r"takes? (a|its|the|their|the nearest) codes?\b": "is assigned to a code",
    r"codes? (in|out of) use\b": "active codes, dead codes, utilisation",
    r"re-?draws?\b|re-?drawn\b": "reinitialise, revive",
    r"go(es)? on with\b": "resume",
    r"join(s|ed)? the statistics\b": "all-reduce",
    r"without a matrix of rows by codes\b": "the N x K distance matrix is never materialised",
    r"float64 would find\b": "matches a float64 reference",
    r"to the bit\b|same bits\b": "bitwise reproducible, bitwise equal",
    r"(a|the|this|its|their) reach\b": "error bound, tolerance",
    r"tell(s|ing)? apart\b|told apart\b": "tie, runner-up",
    r"contenders?\b": "implementation, baseline",
    r"(?<!\w)(ours|theirs)\b": "this implementation, the baseline",
    r"why_not\b": "unavailable_reason",
}
_C_COMMENT = re.compile(r"//+\s*(.*)|/\*+\s*(.*?)\s*\*/")

Passage = tuple[int, str]


def python_passages(text: str) -> Iterator[Passage]:
    """Line and text of each docstring paragraph, message and block of comments."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            line = node.body[0].lineno if node.body else 1
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                yield line, paragraph.strip()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, f"message: {node.value}"
    comments = [
        (token.start[0], token.string.lstrip("#! "))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    yield from joined(comments)


def c_passages(text: str) -> Iterator[Passage]:
    """Line and text of each block of C++ comments."""
    found = [(line, _C_COMMENT.search(code)) for line, code in enumerate(text.splitlines(), 1)]
    yield from joined([(line, match[1] or match[2] or "") for line, match in found if match])


def joined(lines: list[Passage]) -> Iterator[Passage]:
    """Comments on successive lines as one passage."""
    block: list[Passage] = []
    for line, text in lines:
        if block and line != block[-1][0] + 1:
            yield block[0][0], " ".join(part for _, part in block)
            block = []
        block.append((line, text))
    if block:
        yield block[0][0], " ".join(part for _, part in block)


def faults(path: Path) -> Iterator[str]:
    """A line for each passage of a file that breaks a rule."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        passages: Iterator[Passage] = iter(enumerate(text.splitlines(), 1))
    else:
        passages = python_passages(text) if path.suffix == ".py" else c_passages(text)
    for line, passage in passages:
        if path.suffix != ".md" and OPENINGS.match(passage):
            yield f"{path}:{line}: begins with '{passage.split()[0]}': {passage[:60]}"
        for phrase, term in PHRASES.items():
            if match := re.search(rf"\b(?:{phrase})", passage, re.IGNORECASE):
                yield f"{path}:{line}: '{match[0]}': say {term}"


def main() -> int:
    names = subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True).stdout.split()
    # These two list the faults themselves.
    own = {"tools/check_language.py", "tests/test_language.py"}
    paths = [Path(name) for name in names if Path(name).suffix in (".py", ".h", ".cpp", ".cu", ".md")]
    found = [fault for path in paths if path.exists() and str(path) not in own for fault in faults(path)]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
