"""The layout that DESIGN promises:
eight files at the top, imports one way, process groups where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# a file or room may import what stands before it, and other files of its own room
ORDER = (
    *("losses", "kernels", "common", "hub", "model", "data", "lora", "demo", "loaders"),
    *("runtime", "eval", "objectives", "train", "studies", "bench"),
)
# imported inside a function or under __main__, because they build on the importer
LATER = {
    ("train", "bench.estimate"),
    ("data", "studies.inspection"),
    ("eval", "studies.recommend"),
}
# lines of the method's files
GUIDE = {"losses": 180, "kernels": 650, "common": 200, "model": 430, "data": 620}
GUIDE |= {"lora": 180, "eval": 350, "train": 650}
WITH_PROCESS_GROUPS = ("common", "runtime", "train", "bench")


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def room(module: str) -> str:
    return module.split(".")[0]


FILES = {module_of(f): f for f in ROOT.glob("*.py")}
FILES |= {module_of(f): f for r in ORDER for f in (ROOT / r).glob("*.py") if f.stem != "__init__"}


def imported(file: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top of the file) of every import statement."""
    tree = ast.parse(file.read_text())
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(name, node in tree.body) for name in names]
    return found


def edges() -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports as it is loaded."""
    return {
        module: {name for name, top in imported(file) if name in FILES and top}
        for module, file in FILES.items()
    }


def test_the_top_level_is_the_method():
    """Six files that are the method, what every script shares,
    and what a micro-batch contributes."""
    assert sorted(f.stem for f in ROOT.glob("*.py")) == sorted(
        ("model", "lora", "data", "losses", "objectives", "train", "eval", "common")
    )


@pytest.mark.parametrize("name", GUIDE)
def test_the_method_is_short_enough_to_be_read(name):
    """Lines of a file, or of all files of kernels/: the guide, and a fifth more at most."""
    files = [f for module, f in FILES.items() if room(module) == name]
    lines = sum(len(f.read_text().splitlines()) for f in files)
    assert 0 < lines <= 1.2 * GUIDE[name]


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_down_the_order_of_rooms(module):
    """A room imports only rooms before it; what is imported later is named in LATER."""
    for name, top in imported(FILES[module]):
        if room(name) not in ORDER or (name not in FILES and name not in ORDER):
            continue
        if not top and ((module, name) in LATER or name in ORDER):
            continue
        assert ORDER.index(room(name)) <= ORDER.index(room(module)), f"{module} imports {name}"


def test_no_file_imports_itself_by_a_circle():
    """Files are sorted by what they import until none is left."""
    left = edges()
    while left:
        free = {module for module, names in left.items() if not names & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {module: names for module, names in left.items() if module not in free}


@pytest.mark.parametrize("module", sorted(FILES))
def test_the_maths_knows_no_process_group(module):
    """torch.distributed stands only in common, runtime, train and bench."""
    if room(module) not in WITH_PROCESS_GROUPS:
        names = [name for name, _ in imported(FILES[module])]
        assert not [n for n in names if n.startswith("torch.distributed")], names
