"""What holds of the whole repository: lint, one way of imports, documentation that is true."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAIRS = [
    (ROOT / "README.md", ROOT / "README.zh-CN.md"),
    *((page, DOCS / "zh-CN" / page.name) for page in sorted(DOCS.glob("*.md"))),
]
PAGES = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *(page for pair in PAIRS for page in pair if page.exists()),
]

# Who may import whom, lowest first: a module imports only from rows above its own.
LAYERS = (
    {"options", "cache", "precision", "valid_json", "textfiles", "foreign", "openmp"},
    {"config", "devices", "disk"},
    {"kernels"},
    {"kv_cache"},
    {"input_checks"},
    {"modelfile"},
    {"model"},
    {"tokenizer", "sampling"},
    {"generation"},
    {"export", "hf"},
    {"finetuning", "checking", "serving"},
    {"commands"},
    {"__main__"},
)


CSRC = ROOT / "gpt2ml_torch" / "kernels" / "csrc"
LINTERS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "clang-format": [
        *("clang-format", "--dry-run", "--Werror"),
        *(str(file) for file in sorted(CSRC.iterdir()) if file.suffix in (".cpp", ".h")),
    ],
}


@pytest.mark.parametrize("command", LINTERS.values(), ids=LINTERS)
def test_linters_find_nothing(command: list[str]) -> None:
    tool, *words = command
    program = shutil.which(tool, path=Path(sys.executable).parent)
    if program is None:
        pytest.skip(f"{tool} is not installed")
    result = subprocess.run([program, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_go_one_way() -> None:
    rank = {name: index for index, names in enumerate(LAYERS) for name in names}
    for file in (ROOT / "gpt2ml_torch").rglob("*.py"):
        unit = file.relative_to(ROOT / "gpt2ml_torch").parts[0].removesuffix(".py")
        if unit == "__init__":
            continue
        for imported in _imports_at_the_top(file):
            assert imported[0] != "convert", f"{file.name} imports convert"
            if imported[0] == "gpt2ml_torch" and len(imported) > 1 and imported[1] != unit:
                # A public name stands for the highest row that the package itself imports.
                below = rank.get(imported[1], rank["generation"])
                assert below < rank[unit], f"{unit} imports {imported[1]}"


def test_what_is_installed_or_run_imports_no_tests() -> None:
    for folder in ("gpt2ml_torch", "convert", "scripts", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(name.split(".")[0] == "tests" for name in names), file


def _imports_at_the_top(file: Path) -> list[tuple[str, ...]]:
    """The absolute imports that run when the module is imported."""
    found: list[tuple[str, ...]] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            base = tuple(node.module.split("."))
            found += [(*base, alias.name) for alias in node.names]
    return found


def test_importing_the_package_needs_neither_tensorflow_nor_transformers() -> None:
    code = (
        "import sys, gpt2ml_torch; from gpt2ml_torch import *; "
        "bad = {'tensorflow', 'transformers', 'convert', 'peft', 'matplotlib'} & set(sys.modules); "
        "sys.exit(repr(bad) if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", [DOCS / "design.md", DOCS / "zh-CN" / "design.md"], ids=str)
def test_the_tree_in_the_design_is_the_tree(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tree = next(
        block for block in re.findall(r"```text\n(.*?)```", text, re.S) if "convert/" in block
    )
    named = _paths_of(tree)
    for path in named:
        assert (ROOT / path).exists(), f"{page} names {path}, which does not exist"
    shown = {str(path) for path in named}
    for file in (ROOT / "gpt2ml_torch").iterdir():
        if file.name.startswith(("__pycache__", "__init__", "py.typed", ".")):
            continue
        assert str(file.relative_to(ROOT)) in shown, f"{page} does not show {file.name}"


def _paths_of(tree: str) -> list[Path]:
    """Names at the start of each line, nested by their indentation."""
    paths: list[Path] = []
    stack: list[tuple[int, Path]] = []
    for line in tree.splitlines():
        match = re.match(r"( *)([\w.\-]+/?)", line)
        if not match:
            continue
        depth = len(match[1])
        while stack and stack[-1][0] >= depth:
            stack.pop()
        path = (stack[-1][1] if stack else Path()) / match[2]
        paths.append(path)
        if match[2].endswith("/"):
            stack.append((depth, path))
    return paths


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            assert heading in map(_anchor, headings), f"{page} links to {target}"


def _anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_no_line_is_wider_than_120_columns(page: Path) -> None:
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        columns = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)
        assert columns <= 120, f"{page}:{number} takes {columns} columns"


def test_readmes_are_short() -> None:
    for page in (ROOT / "README.md", ROOT / "README.zh-CN.md"):
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_stands_in_both_languages() -> None:
    english = {page.name for page in DOCS.glob("*.md")}
    assert english == {page.name for page in (DOCS / "zh-CN").glob("*.md")}


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=str)
def test_both_languages_hold_the_same_commands_and_figures(english: Path, chinese: Path) -> None:
    texts = [page.read_text("utf-8") for page in (english, chinese)]
    code, sums = r"```(?:bash|python|json)\n(.*?)```", r"\b[0-9a-f]{64}\b"
    figures = r"\d+(?:[.,]\d+)*"
    tables = ["\n".join(re.findall(r"^\|.*$", text, re.M)) for text in texts]
    for pattern, (first, second) in ((code, texts), (sums, texts), (figures, tables)):
        found = [
            sorted(_without_comments(match) for match in re.findall(pattern, text, re.S))
            for text in (first, second)
        ]
        assert found[0] == found[1]


def test_the_checksums_of_the_published_files_are_documented() -> None:
    text = (DOCS / "converting.md").read_text("utf-8")
    assert len(set(re.findall(r"\b[0-9a-f]{64}\b", text))) == 6


def _without_comments(code: str) -> str:
    return re.sub(r"[ \t]*#.*", "", code)
