"""The README and docs/: small enough, and no link, name or option in them that is not there."""

import argparse
import ast
import json
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
TEXTS = {page: page.read_text() for page in PAGES}


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
def options_of(program: Path) -> set[str]:
    """The options of a program: it is started, and stopped where it reads its command line."""
    found = []

    def parse_known_args(self, *_):
        found.append(self)
        raise Parsing

    with (
        patch.object(argparse.ArgumentParser, "parse_known_args", parse_known_args),
        patch.object(sys, "path", [str(program.parent), *sys.path]),  # as Python starts a file
        patch.dict(os.environ),
        pytest.raises(Parsing),
    ):
        runpy.run_path(str(program), run_name="__main__")
    return {option for action in found[0]._actions for option in action.option_strings}


def commands(text: str) -> list[list[str]]:
    """Words of the lines of bash blocks, and of inline code that starts a program."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|torchrun) [^`\n]+)`", text)
    return [line.split("#")[0].replace("'", "").split() for line in lines]


def test_the_pages_are_short():
    sizes = {page.name: len(text.encode()) for page, text in TEXTS.items()}
    assert sizes.pop("README.md") <= 9000 and sizes.pop("NOTES.md") <= 10_000
    assert sum(sizes.values()) <= 45_000 and sizes["method.md"] <= 8000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    """To a file, and to a heading's anchor as GitHub makes it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE) if anchor else ()
            names = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert not anchor or anchor in names, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_names_what_exists(page):
    """The program, its options, and the configuration of every command."""
    for words in commands(TEXTS[page]):
        assert all((ROOT / word).exists() for word in words if word.startswith("configs/")), words
        programs = [(n, file) for n, word in enumerate(words) if (file := program_of(word))]
        for place, program in programs[:1]:
            assert program.exists(), words
            given = {w.split("=")[0] for w in words[place + 1 :] if w.startswith("--")}
            assert not given or given <= options_of(program), words


def read_train(argv: list[str]) -> None:
    with patch.object(train, "defaults", lambda given: {}):  # the models are not there
        read_options(argv)


def read_tables(argv: list[str]) -> None:
    with patch.object(sys, "argv", ["studies.tables", *argv]):
        tables.read_table(tables.parse_args())


READERS = {"train.py": read_train, "studies.tables": read_tables}
READERS |= {"eval.py": lambda argv: parse_config(EvalConfig, argv)}
GIVEN = [
    (program, words[words.index(program) + 1 :])
    for text in TEXTS.values()
    for words in commands(text)
    for program in READERS
    if program in words and words[-1] != program and not {"...", "…", "--help"} & set(words)
]


@pytest.mark.parametrize(("program", "argv"), GIVEN, ids=str)
def test_every_command_is_accepted(program, argv, monkeypatch):
    """Whole commands of training, evaluation and tables, not option by option."""
    monkeypatch.chdir(ROOT)
    READERS[program](argv)


# of torchrun, Slurm, llama.cpp's converter and vLLM
OPTIONS_OF_OTHERS = {
    *("--nproc_per_node", "--max-restarts", "--shutdown_timeout", "--nodes", "--signal"),
    *("--requeue", "--outtype", "--outfile", "--enable-lora", "--lora-modules", "--max-lora-rank"),
}


def test_every_option_in_prose_is_one_of_some_program():
    files = [file for room in (".", *ROOMS) for file in (ROOT / room).glob("*.py")]
    programs = {file for file in files if '__name__ == "__main__"' in file.read_text()}
    known = OPTIONS_OF_OTHERS.union(*map(options_of, programs | {ROOT / "loaders/__main__.py"}))
    for page, text in TEXTS.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        assert set(re.findall(r"--[a-z][\w-]+", prose)) <= known, page


def test_every_option_of_training_is_documented():
    named = {f"--{n.removeprefix('no_')}" for n in re.findall(r"--(\w+)", "".join(TEXTS.values()))}
    options = {o for o in options_of(ROOT / "train.py") if not o.startswith("--no_")}
    assert options - named == {"-h", "--shared"}  # the latter is a table's


def test_names_in_the_reading_order_are_in_the_file_of_their_row():
    rows = re.findall(r"^\| \d\. \[(\w+\.py)\]\S* \| (.*) \|$", TEXTS[PAGES[0]], re.MULTILINE)
    assert len(rows) == 6
    for file, text in rows:
        defined = set()  # functions, classes and constants at the top of the file
        for node in ast.parse((ROOT / file).read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Assign):
                defined |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        names = re.findall(r"`(\w+)`", text)
        assert names and set(names) <= defined, file


def test_the_papers_five_data_sets_have_a_configuration():
    """They differ in the data alone, and a training example needs fewer interactions than a user
    of the paper's Table 3 has on average."""
    average = {"movielens": 166, "amazon": 13, "steam": 27, "beeradvocate": 20, "lastfm": 314}
    own = {"dataset", "core", "min_history", "followers", "test_size", "output_dir"}
    paper = json.loads((ROOT / "configs/paper.json").read_text())
    for file in (ROOT / "configs").glob("paper*.json"):
        config = parse_config(train.TrainConfig, ["--config", str(file)])
        assert config.min_history + config.followers + 2 < average.pop(config.dataset)
        options = json.loads(file.read_text())
        assert {k for k in options if options[k] != paper.get(k)} <= own
    assert not average
