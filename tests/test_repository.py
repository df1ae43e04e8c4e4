"""What holds of the whole repository: lint, one way of imports, READMEs that are true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")

# Who may import whom, lowest first: a module imports only from rows above its own.
LAYERS = (
    {"config"},
    {"kernels", "kv_cache"},
    {"modelfile"},
    {"model"},
    {"tokenizer", "sampling"},
    {"generation"},
    {"finetuning"},
    {"commands"},
    {"__main__"},
)


def test_ruff_and_mypy_find_nothing() -> None:
    for command in (
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        ["-m", "mypy"],
    ):
        result = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
        )
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


@pytest.mark.parametrize("readme", READMES)
def test_the_tree_in_the_readme_is_the_tree(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    tree = next(
        block for block in re.findall(r"```text\n(.*?)```", text, re.S) if "convert/" in block
    )
    named = _paths_of(tree)
    for path in named:
        assert (ROOT / path).exists(), f"{readme} names {path}, which does not exist"
    shown = {str(path) for path in named}
    for folder in ("gpt2ml_torch", "convert", "scripts"):
        for file in (ROOT / folder).iterdir():
            if file.name.startswith(("__pycache__", "__init__", "py.typed", ".")):
                continue
            assert str(file.relative_to(ROOT)) in shown, f"{readme} does not show {file.name}"


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


@pytest.mark.parametrize("readme", READMES)
def test_links_in_the_readme_lead_somewhere(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith(("http:", "https:")):
            assert (ROOT / target).exists(), f"{readme} links to {target}"


def test_both_readmes_hold_the_same_commands_and_numbers() -> None:
    blocks = [
        [
            _without_comments(block)
            for block in re.findall(
                r"```(?:bash|python)\n(.*?)```", (ROOT / name).read_text("utf-8"), re.S
            )
        ]
        for name in READMES
    ]
    assert blocks[0] == blocks[1]
    sums = [
        set(re.findall(r"\b[0-9a-f]{64}\b", (ROOT / name).read_text("utf-8"))) for name in READMES
    ]
    assert sums[0] == sums[1]
    assert len(sums[0]) == 6


def _without_comments(code: str) -> str:
    return re.sub(r"[ \t]*#.*", "", code)
