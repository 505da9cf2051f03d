"""Few files at the top, small rooms, imports one way, process groups where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms in the order of imports, and how many lines each may have. A file or room may import what
# stands before it, and other files of its own room; imports inside functions count, too.
ROOMS = {
    "losses": 200,
    "kernels": 760,
    "common": 190,
    "hub": 850,
    "model": 440,
    "data": 520,
    "lora": 300,
    "loaders": 1800,
    "runtime": 1100,
    "eval": 320,
    "demo": 420,
    "train": 640,
    "studies": 1700,
    "recommend": 260,
    "bench": 800,
    "tests": 9000,
}
ORDER = tuple(ROOMS)[:-1]
WITH_PROCESS_GROUPS = ("common", "runtime", "train", "recommend", "bench")


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def room(module: str) -> str:
    return module.split(".")[0]


FILES = {module_of(f): f for f in ROOT.glob("*.py")}
FILES |= {module_of(f): f for r in ORDER for f in (ROOT / r).glob("*.py") if f.stem != "__init__"}


def imported(module: str) -> set[str]:
    """What a file's import statements name, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_top_level_is_the_method():
    """Six files that are the method, what every script shares, and recommendations."""
    method = {"model", "lora", "data", "losses", "train", "eval"}
    assert {f.stem for f in ROOT.glob("*.py")} == method | {"common", "recommend"}


@pytest.mark.parametrize("name", ROOMS)
def test_no_room_outgrows_its_bound(name):
    """Lines of a file at the top, or of all Python files of a folder."""
    files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else (ROOT / name).rglob("*.py")
    assert 0 < sum(len(f.read_text().splitlines()) for f in files) <= ROOMS[name]


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_down_and_the_maths_knows_no_process_group(module):
    """A room imports only rooms before it; few of them import torch.distributed."""
    for name in imported(module):
        if room(name) in ORDER and (name in FILES or name in ORDER):
            assert ORDER.index(room(name)) <= ORDER.index(room(module)), f"{module} imports {name}"
        if room(module) not in WITH_PROCESS_GROUPS:
            assert not name.startswith("torch.distributed"), f"{module} imports {name}"


def test_no_file_imports_itself_by_a_circle():
    """Files are sorted by what they import until none is left."""
    left = {module: imported(module) & FILES.keys() for module in FILES}
    while left:
        free = {module for module, names in left.items() if not names & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {module: names for module, names in left.items() if module not in free}
