"""The README and docs/: small enough, and no link, name or option in them that is not there."""

import argparse
import ast
import os
import re
import runpy
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

import train
from common import parse_config
from eval import EvalConfig
from studies import tables
from train import read_options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "NOTES.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = {folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").exists()}


class Parsing(BaseException):
    """A program is about to read its command line."""


def program_of(word: str) -> Path | None:
    """The file that a word of a command starts: eval.py, bench/head.py, studies.report."""
    if word.endswith(".py"):
        return ROOT / word
    if re.fullmatch(r"[a-z_]+(\.\w+)+", word) and word.split(".")[0] in ROOMS:
        return ROOT / f"{word.replace('.', '/')}.py"
    return None


@cache
def parser_of(program: Path) -> argparse.ArgumentParser:
    """What a program reads its command line with: it is started, and stopped there."""
    found = []

    def parse_known_args(self, *_):
        found.append(self)
        raise Parsing

    where = [str(program.parent), *sys.path]  # as Python starts a file
    with (
        patch.object(argparse.ArgumentParser, "parse_known_args", parse_known_args),
        patch.object(sys, "path", where),
        patch.dict(os.environ),
        pytest.raises(Parsing),
    ):
        runpy.run_path(str(program), run_name="__main__")
    return found[0]


def options_of(program: Path) -> set[str]:
    return {option for action in parser_of(program)._actions for option in action.option_strings}


def name(page: Path) -> str:
    return page.name


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def commands(text: str) -> list[str]:
    """Lines of bash blocks, and inline code that starts a program."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
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
    """The program, its options, and the configuration of every command."""
    for command in commands(page.read_text()):
        words = command.split("#")[0].split()
        programs = [(n, file) for n, word in enumerate(words) if (file := program_of(word))]
        for word in words:
            if word.startswith("configs/"):
                assert (ROOT / word).exists(), command
        if not programs:
            continue
        place, program = programs[0]
        assert program.exists(), command
        given = [w.split("=")[0] for w in words[place + 1 :] if w.startswith("--")]
        assert not given or set(given) <= options_of(program), command


def arguments(program: str) -> list[list[str]]:
    """What the pages' commands give a program; those with an ellipsis, or for help, are none."""
    found = []
    for page in PAGES:
        for command in commands(page.read_text()):
            words = command.split("#")[0].replace("'", "").split()
            if program in words and not {"...", "…", "--help"} & set(words):
                found.append(words[words.index(program) + 1 :])
    return found


@pytest.mark.parametrize("argv", arguments("train.py"), ids=" ".join)
def test_every_command_of_training_is_accepted(argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "defaults", lambda given: {})  # the models are not there
    read_options(argv)


@pytest.mark.parametrize("argv", arguments("eval.py"), ids=" ".join)
def test_every_command_of_evaluation_is_accepted(argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse_config(EvalConfig, argv)


@pytest.mark.parametrize("argv", [a for a in arguments("studies.tables") if a], ids=" ".join)
def test_every_command_of_a_table_names_data_and_model(argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["studies.tables", *argv])
    tables.read_table(tables.parse_args())


# of torchrun, Slurm, llama.cpp's converter and vLLM
OPTIONS_OF_OTHERS = {
    *("--nproc_per_node", "--max-restarts", "--shutdown_timeout"),
    *("--nodes", "--signal", "--requeue"),
    *("--outtype", "--outfile"),
    *("--enable-lora", "--lora-modules", "--max-lora-rank"),
}


def test_every_option_in_prose_is_one_of_some_program():
    files = [file for room in (".", *ROOMS) for file in (ROOT / room).glob("*.py")]
    programs = {file for file in files if '__name__ == "__main__"' in file.read_text()}
    programs |= {ROOT / "loaders" / "__main__.py"}
    known = OPTIONS_OF_OTHERS.union(*map(options_of, programs))
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        assert set(re.findall(r"--[a-z][\w-]+", prose)) <= known, page


def test_every_option_of_training_is_documented():
    text = "".join(page.read_text() for page in PAGES)
    named = {f"--{name.removeprefix('no_')}" for name in re.findall(r"--(\w+)", text)}
    options = {o for o in options_of(ROOT / "train.py") if not o.startswith("--no_")}
    assert options - named == {"-h", "--shared"}  # the latter is a table's


def test_names_in_the_reading_order_are_in_the_file_of_their_row():
    rows = re.findall(
        r"^\| \d\. \[(\w+\.py)\]\S* \| (.*) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(rows) == 6
    for file, text in rows:
        names = re.findall(r"`(\w+)`", text)
        assert names and set(names) <= defined(ROOT / file), file
