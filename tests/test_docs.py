"""The README and docs/: no link, command or option in them that is not there."""

import argparse
import os
import re
import runpy
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
from launch import ROOT

import train
from common import parse_config, read_json
from eval import EvalConfig
from studies import tables

PAGES = [ROOT / "README.md", ROOT / "NOTES.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = {folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").exists()}
TEXTS = {page: page.read_text() for page in PAGES}
WHOLE = "\n".join(TEXTS.values())
COMMANDS = [  # words of the lines of bash blocks, and of inline code that starts a program
    line.split("#")[0].replace("'", "").split()
    for block in re.findall(r"```bash\n(.*?)```|`((?:python|torchrun) [^`\n]+)`", WHOLE, re.DOTALL)
    for line in "".join(block).replace("\\\n", " ").splitlines()
]


@cache
def options_of(program: Path) -> set[str]:
    """The program is started, and stopped where it reads its command line."""
    read = Mock(side_effect=GeneratorExit)
    with (
        patch.object(argparse.ArgumentParser, "parse_known_args", lambda self, *_: read(self)),
        patch.object(sys, "path", [str(program.parent), *sys.path]),  # as Python starts a file
        patch.dict(os.environ),
        pytest.raises(GeneratorExit),
    ):
        runpy.run_path(str(program), run_name="__main__")
    actions = read.call_args.args[0]._actions
    return {option for action in actions for option in action.option_strings}


def test_the_pages_are_short():
    sizes = {page.name: len(text.encode()) for page, text in TEXTS.items()}
    assert sizes.pop("README.md") <= 9000 and sizes.pop("NOTES.md") <= 10_000
    assert sum(sizes.values()) <= 45_000 and sizes["method.md"] <= 8000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!\w+://)([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE) if anchor else ()
        names = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
        assert not anchor or anchor in names, target


def read_train(argv: list[str]) -> None:
    with patch.object(train, "defaults", lambda given: {}):  # the models are not there
        train.read_options(argv)


def read_tables(argv: list[str]) -> None:
    with patch.object(sys, "argv", ["studies.tables", *argv]):
        tables.read_table()


READERS = {ROOT / "train.py": read_train, ROOT / "studies/tables.py": read_tables}
READERS |= {ROOT / "eval.py": lambda argv: parse_config(EvalConfig, argv)}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_accepted(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert all(Path(word).exists() for word in words if word.startswith("configs/"))
    for place, word in enumerate(words):
        if word.endswith(".py") or re.fullmatch(rf"({'|'.join(ROOMS)})(\.\w+)+", word):
            program = ROOT / f"{word.removesuffix('.py').replace('.', '/')}.py"
            argv = words[place + 1 :]
            given = {w.split("=")[0] for w in argv if w.startswith("--")}
            assert program.exists() and (not given or given <= options_of(program))
            if program in READERS and argv and not {"...", "…", "--help"} & set(argv):
                READERS[program](argv)
            break


def test_every_option_of_training_is_documented():
    named = {name.removeprefix("no_") for name in re.findall(r"--(\w+)", WHOLE)}
    assert {field.name for field in fields(train.TrainConfig)} <= named


def test_the_papers_five_data_sets_have_a_configuration():
    """A training example needs fewer interactions than a user of Table 3 has on average."""
    average = {"movielens": 166, "amazon": 13, "steam": 27, "beeradvocate": 20, "lastfm": 314}
    own = {"dataset", "core", "min_history", "followers", "test_size", "output_dir"}
    paper = read_json(ROOT / "configs/paper.json")
    for file in (ROOT / "configs").glob("paper*.json"):
        config, options = parse_config(train.TrainConfig, ["--config", str(file)]), read_json(file)
        assert config.min_history + config.followers + 2 < average.pop(config.dataset)
        assert {k for k in options if options[k] != paper.get(k)} <= own
    assert not average
