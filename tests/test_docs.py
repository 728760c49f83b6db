"""README.md and docs/: links resolve, examples run, the table of environment variables is complete."""

from __future__ import annotations

import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = ("dlvae_kernels", "csrc", "models", "benchmarks", "examples", "tools", "tests", "setup.py", "Makefile")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh", "Makefile")
NO_RUN = re.compile(r"<!-- no-run: \S.* -->\n\n?$")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    """Relative links of a page whose file or anchor does not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def examples(text: str) -> Iterator[str]:
    """The Python blocks of a page that are not preceded by a no-run comment."""
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if not NO_RUN.search(text[: block.start()]):
            yield block[1]


def variables_in_sources() -> set[str]:
    """DLVAE_ names that the sources use and no source defines as a macro: environment variables and -D definitions."""
    files = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True).stdout.split()
    paths = [ROOT / name for name in files] or [path for name in SOURCES for path in _files(ROOT / name)]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.name.endswith(SUFFIXES) and path.exists()]
    used = {name for text in texts for name in re.findall(r"\bDLVAE_[A-Z0-9_]*[A-Z0-9]\b", text)}
    used |= {name for text in texts for name in re.findall(r"-D(DLVAE_[A-Z0-9_]+)", text)}
    return used - {name for text in texts for name in re.findall(r"#define (DLVAE_[A-Z0-9_]+)", text)}


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_of_a_page_resolve(path):
    assert broken_links(path) == []


def test_broken_links_missing_file_or_anchor_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# One heading\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#one-heading) [b](gone.md) [c](other.md#two) [d](https://example.org) `[e](code)`\n")
    assert broken_links(page) == ["gone.md", "other.md#two"]


@pytest.mark.usefixtures("without_vector_quantize_pytorch")
@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "CONTRIBUTING.md"], ids=page_id)
def test_examples_of_a_page_run(path):
    names: dict[str, object] = {}
    for example in examples(path.read_text(encoding="utf-8")):
        exec(compile(example, str(path), "exec"), names)


def test_examples_with_no_run_comment_are_left_out():
    text = "```python\na\n```\n\n<!-- no-run: it needs a GPU -->\n\n```python\nb\n```\n\n```sh\nc\n```\n"
    assert list(examples(text)) == ["a\n"]


def test_readme_example_is_short_and_shows_the_documented_shapes():
    (example,) = examples((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(example.strip().splitlines()) <= 10
    names: dict = {}
    exec(example, names)
    assert names["quantized"].shape == names["codes"].shape == (8, 64, 16, 16)
    assert names["indices"].shape == (8, 16, 16)
    assert names["z"].grad is not None


def test_environment_variables_of_the_sources_equal_those_of_the_page():
    text = (ROOT / "docs/backends.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(DLVAE_[A-Z0-9_]+)` \|", text, re.MULTILINE))
    assert documented == variables_in_sources()


def test_figure_caption_equals_the_committed_numbers():
    script = runpy.run_path(str(ROOT / "docs/make_figures.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script["updated"](readme, script["read_numbers"]()) == readme, "run `python docs/make_figures.py RUN`"
    assert (ROOT / "docs/images/reconstructions.png").stat().st_size <= 400_000
