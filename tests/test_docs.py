"""The README and docs/: small enough, and no link, name or option in them that is not there."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from eval import EvalConfig
from studies.inspection import InspectConfig
from studies.lists import ListsConfig
from studies.probes import ProbeConfig
from studies.sequential import BaselineConfig
from studies.two_stage import TwoStageConfig
from train import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "NOTES.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = {
    "train.py": TrainConfig,
    "eval.py": EvalConfig,
    "data.py": InspectConfig,
    "studies.lists": ListsConfig,
    "studies.probes": ProbeConfig,
    "studies.sequential": BaselineConfig,
    "studies.two_stage": TwoStageConfig,
}


def name(page: Path) -> str:
    return page.name


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def commands(text: str) -> list[str]:
    """Lines of bash blocks, and inline code that starts a program."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"`((?:python|torchrun) [^`\n]+)`", text)


def defined(file: Path) -> set[str]:
    """Functions, classes and constants at the top of a file."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9000


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_names_what_exists(page):
    """The script, its options, and the configuration of every command."""
    for command in commands(page.read_text()):
        words = command.split("#")[0].replace("python -m ", "python ").split()
        scripts = [w for w in words if w.endswith(".py") or re.fullmatch(r"[a-z_]+\.\w+", w)]
        scripts = [w for w in scripts if w in OPTIONS or (ROOT / w.split(".")[0]).exists()]
        for word in words:
            if word.startswith("configs/"):
                assert (ROOT / word).exists(), command
        if not scripts or scripts[0] not in OPTIONS:
            continue
        known = {f.name for f in fields(OPTIONS[scripts[0]])} | {"config", "help"}
        given = words[words.index(scripts[0]) + 1 :]
        flags = [w.removeprefix("--").split("=")[0] for w in given if w.startswith("--")]
        assert {f.removeprefix("no_") for f in flags} <= known | {"decode_rest"}, command


def test_names_in_the_reading_order_are_in_the_file_of_their_row():
    rows = re.findall(
        r"^\| \d\. \[(\w+\.py)\]\S* \| (.*) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(rows) == 6
    for file, text in rows:
        names = re.findall(r"`(\w+)`", text)
        assert names and set(names) <= defined(ROOT / file), file
