"""The packages form layers: what stands below imports nothing of what stands above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "parablock_rt"

# What each may import beside itself, and beside the plain modules at the top that know no package.
ALLOWED = {
    "blocks": set(),
    "wire": {"blocks"},
    "observe": {"blocks", "wire"},
    "staging": {"blocks", "wire"},
    "server": {"blocks", "wire", "staging", "observe"},
    "client": {"blocks", "wire", "staging", "observe"},
    "finetune": {"blocks", "wire", "staging", "observe", "client"},
    "integrations": {"client"},
}
PLAIN = {"_C", "codec", "config", "errors", "exits", "limits", "schedule", "stages", "units", "version"}


def imported_parts(file: Path) -> set[str]:
    """The parts of parablock_rt that a module imports, at its top or within a function."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "parablock_rt":
            parts |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("parablock_rt."):
            parts.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            parts |= {name.name.split(".")[1] for name in node.names if name.name.startswith("parablock_rt.")}
    return parts


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_stands_below_it(package: str) -> None:
    files = sorted((PACKAGE / package).glob("*.py"))
    assert files
    for file in files:
        assert imported_parts(file) - {package} - PLAIN <= ALLOWED[package], file.name


def test_plain_modules_import_no_package() -> None:
    for name in PLAIN - {"_C"}:
        assert imported_parts(PACKAGE / f"{name}.py") <= PLAIN | {"kernels"}, name


def test_kernels_import_nothing_of_the_runtime() -> None:
    for file in (PACKAGE.parent / "kernels").glob("*.py"):
        assert imported_parts(file) <= {"kernels"}, file.name
