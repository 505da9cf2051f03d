"""What every script shares: options from a dataclass, errors, printing."""

import argparse
import contextlib
import difflib
import json
import math
import operator
import os
import signal
import sys
import time
from dataclasses import field, fields
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

BOUNDS = {"at_least": (">=", operator.ge), "above": (">", operator.gt)}
BOUNDS |= {"at_most": ("<=", operator.le), "below": ("<", operator.lt)}
clock = tqdm.format_interval  # 1:02:03, or 02:03


def arg(default, help="", group="", choices=(), read_by=(), free=False, **bounds):
    """A dataclass field that is an option; `group` starts a new heading in --help.

    `read_by`: stages or options, one of which the run must have; `free`: may change on --resume."""
    rules = [f"{BOUNDS[name][0]} {bound}" for name, bound in bounds.items()]
    rules = [f"one of {', '.join(filter(None, choices))}"] if choices else rules
    facts = ([f"default: {default}"] if default != "" else []) + rules
    help = (f"{help} ({', '.join(facts)})" if facts else help).replace("%", "%%")
    known = {"group": group, "choices": choices, "bounds": bounds, "allowed": ", ".join(rules)}
    return field(default=default, metadata=known | {"help": help, "read_by": read_by, "free": free})


def check_options(config) -> None:
    """Raise for the first option that is not one of its choices, out of bounds or not finite."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        kept = [BOUNDS[name][1](value, bound) for name, bound in f.metadata["bounds"].items()]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{f.name} must be a finite number, got {value}")
        if (choices and value not in choices) or not all(kept):
            raise ValueError(f"--{f.name} must be {f.metadata['allowed']}, got {value!r}")


def changed_options(config) -> set[str]:
    """Names of the options that do not have their default."""
    return {f.name for f in fields(config) if getattr(config, f.name) != f.default}


def parse_config(cls, argv=None, beneath=None):
    """Read one --flag per dataclass field, on top of those in --config file.json.

    Without --config, `beneath(given)` may replace the dataclass's defaults. A typed option must
    have an effect in this run; the options of a file, or of a command with --shared, need not."""
    given = parse(cls, argv)
    file, shared, typed = given.pop("config", ""), given.pop("shared", False), set(given)
    if file:
        flags = []
        for name, value in read_json(file).items():
            switch = f"--{name}" if value else f"--no_{name}"
            flags.append(switch if isinstance(value, bool | None) else f"--{name}={value}")
        given = parse(cls, flags, file) | given
    elif beneath:
        given = beneath(given) | given
    config = cls(**given)
    for f in fields(cls):
        readers = f.metadata["read_by"]
        if f.name in typed and readers and not (shared or set(readers) & config.present):
            raise ValueError(f"--{f.name} is read by {', '.join(readers)} only: leave it out")
    return config


def parse(cls, words: list[str] | None = None, file: str = "") -> dict:
    """Parse words, typed or from a file, into options: --x, and --no_x for switches."""
    parser = argparse.ArgumentParser(description=cls.__doc__, argument_default=argparse.SUPPRESS)
    parser.usage, parser.allow_abbrev = "%(prog)s [--option value ...]", False

    def refuse(message: str):
        raise ValueError(f"{file}: {message}" if file else message)

    parser.error = refuse
    if not file:
        parser.add_argument("--config", help="JSON file with any of these; flags override it")
        parser.add_argument("--shared", action="store_true", help=argparse.SUPPRESS)
    section = parser
    for f in fields(cls):
        help = f.metadata["help"]
        if f.metadata["group"]:
            section = parser.add_argument_group(f.metadata["group"])
        if f.type is bool:
            section.add_argument(f"--{f.name}", action="store_true", help=help)
            section.add_argument(f"--no_{f.name}", action="store_false", dest=f.name, help="off")
        else:
            metavar = {int: "N", float: "X"}.get(f.type, "TEXT")
            section.add_argument(f"--{f.name}", type=f.type, metavar=metavar, help=help)
    given, unknown = parser.parse_known_args(words)
    for name in (word.split("=")[0] for word in unknown):
        near = difflib.get_close_matches(name, parser._option_string_actions, n=1)
        refuse(f"unknown option {name}; {f'did you mean {near[0]}?' if near else 'see --help'}")
    return vars(given)


def read_json(file) -> dict:
    """The JSON object in a file, with or without a byte-order mark; ValueError names the file."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, huge numbers, deep nesting
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


@contextlib.contextmanager
def reading(file):
    """Turn errors about the content of a JSON file into one message that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{file}: its content is not as expected ({error!r})") from None


@contextlib.contextmanager
def writing(path):
    """Turn a full disk or a missing or read-only folder into one message that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be written ({error}); other files are untouched") from None


class Stopped(Exception):
    """Raised as (message, exit code) by a run that was asked to stop and has saved its state."""


def run_cli(main) -> None:
    """Run main(); errors that a user can cause end as one message with exit code 2."""
    code = 0
    try:
        main()
    except Stopped as stop:
        message, code = stop.args
        print0(message)
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError, RuntimeError) as error:
        # what gloo, NCCL and the store report when another rank has ended
        gone = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
        code, ended = 2, any(text in str(error) for text in gone)
        if isinstance(error, RuntimeError) and not ended:
            raise
        # Only the rank with an error of its own prints it, rank 0 first. torchrun ends the others,
        # which must exit with 0, or its report lists them.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        time.sleep(10 if ended else (0 if is_main() else 5))
        rank = f" (rank {os.getenv('RANK')})" if os.getenv("WORLD_SIZE", "1") != "1" else ""
        text, report = f"error{rank}: {error}", os.getenv("TORCHELASTIC_ERROR_FILE")
        restarts, most = (os.getenv(f"TORCHELASTIC_{n}") for n in ("RESTART_COUNT", "MAX_RESTARTS"))
        if report and restarts == most:  # then torchrun prints it, in its own format
            facts = {"py_callstack": text, "timestamp": int(time.time())}
            Path(report).write_text(json.dumps({"message": {"message": text, "extraInfo": facts}}))
        else:
            print(text, file=sys.stderr, flush=True)
    if code or dist.is_initialized():
        # Skip the interpreter's shutdown: after an error other ranks may wait in a collective;
        # after success threads of gloo and FSDP still run, and the shutdown sometimes aborts.
        if not code and torch.cuda.is_available():
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def print0(*args, **kwargs) -> None:
    if is_main():
        print(*args, **kwargs, flush=True)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))
