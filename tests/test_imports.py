"""Imports between folders go as docs/design.md says, and no file shadows a standard module."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "common": (),
    "data_prep": ("common",),
    "kernels": ("common",),
    "model": ("common", "kernels"),
    "train": ("common", "model", "kernels", "data_prep.shards", "data_prep.packing"),
    "evaluation": ("common", "model", "data_prep.shards", "train.masking"),
}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imported_modules(path):
            owner = name.split(".")[0]
            if owner in ALLOWED and owner != folder:
                assert any(f"{name}.".startswith(f"{allowed}.") for allowed in ALLOWED[folder]), (
                    f"{path.relative_to(ROOT)} may not import {name}"
                )


def test_no_file_of_train_shadows_a_standard_module() -> None:
    names = {path.stem for path in (ROOT / "train").glob("*.py")} - {"__init__"}
    assert names & set(sys.stdlib_module_names) == set()
