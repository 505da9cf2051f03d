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
import traceback
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import get_type_hints

import torch
import torch.distributed as dist
from safetensors import SafetensorError

BOUNDS = {"at_least": (">=", operator.ge), "above": (">", operator.gt)}
BOUNDS |= {"at_most": ("<=", operator.le), "below": ("<", operator.lt)}


def arg(default=MISSING, help="", group="", choices=(), read_by=(), free=False, **bounds):
    """A dataclass field that is an option; `group` starts a new heading in --help.

    check_options holds it to its choices and bounds (BOUNDS). `read_by`: stages or options of which
    a run must have one for it to have an effect; `free`: it may change when a run goes on."""
    allowed = ", ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in bounds.items())
    if choices:
        allowed = f"one of {', '.join(filter(None, choices))}"
    facts = [] if default in (MISSING, "") else [f"default: {default}"]
    if allowed and not (choices and all(choice in help for choice in choices)):
        facts.append(allowed)
    help = (f"{help} ({', '.join(facts)})" if facts else help).replace("%", "%%")
    known = {"group": group, "choices": choices, "bounds": bounds, "allowed": allowed}
    return field(default=default, metadata=known | {"help": help, "read_by": read_by, "free": free})


def check_options(config) -> None:
    """Raise for the first option that is none of its choices, out of bounds or not finite."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        kept = [BOUNDS[name][1](value, bound) for name, bound in f.metadata["bounds"].items()]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{f.name} must be a finite number, got {value}")
        if choices and value not in choices or not all(kept):
            raise ValueError(f"--{f.name} must be {f.metadata['allowed']}, got {value!r}")


def refuse_unread(config, typed: set[str]) -> None:
    """Raise for the first typed option that nothing in this run reads."""
    for f in fields(config):
        readers = f.metadata["read_by"]
        if f.name in typed and readers and not set(readers) & config.present:
            raise ValueError(
                f"--{f.name} is read by {', '.join(readers)} alone, which this run has not: "
                "leave it out"
            )


def changed_options(config) -> set[str]:
    """Names of the options that do not have their default."""
    return {f.name for f in fields(config) if getattr(config, f.name) != f.default}


def read_json(file) -> dict:
    """The JSON object in a file, with or without a byte-order mark; ValueError names the file."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        content = json.loads(text or "{}")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers without end
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not text or not isinstance(content, dict):
        found = type(content).__name__ if text else "an empty file"
        raise ValueError(f"{file}: expected a JSON object, got {found}")
    return content


def parse_config(cls, argv=None, beneath=None):
    """One --flag per dataclass field, on top of those in --config file.json.

    Without --config, `beneath(given)` may name other defaults than the dataclass's. What is typed
    must have an effect; the file, and flags behind --shared, may serve several runs."""
    usage = "%(prog)s [--option value ...]"
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False, usage=usage)
    parser.error = refuse
    parser.add_argument("--config", help="JSON file with any of these options; flags override it")
    parser.add_argument("--shared", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(config="")
    section, types = parser, get_type_hints(cls)
    for f in fields(cls):
        if f.metadata["group"]:
            section = parser.add_argument_group(f.metadata["group"])
        kind, value = types[f.name], {"default": argparse.SUPPRESS, "help": f.metadata["help"]}
        if kind is not bool:
            value |= {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}
            section.add_argument(f"--{f.name}", **value)
        else:
            section.add_argument(f"--{f.name}", action="store_true", **value)
            value |= {"dest": f.name, "help": f"the opposite of --{f.name}"}
            section.add_argument(f"--no_{f.name}", action="store_false", **value)

    def parse(words: list[str] | None) -> tuple[dict, str, bool]:
        given, unknown = parser.parse_known_args(words)
        for name in (word.split("=")[0] for word in unknown):
            near = difflib.get_close_matches(name, [f"--{option}" for option in types], n=1)
            refuse(f"unknown option {name}; {f'did you mean {near[0]}?' if near else 'see --help'}")
        given = vars(given)
        return given, given.pop("config"), given.pop("shared")

    given, file, shared = parse(argv)
    typed = set() if shared else set(given)
    if file:
        flags = []
        for name, value in read_json(file).items():
            switch = f"--{name}" if value else f"--no_{name}"
            flags.append(switch if isinstance(value, bool) else f"--{name}={value}")
        try:
            from_file, another, _ = parse(flags)
            if another:
                refuse("a configuration names no other")
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        given = from_file | given
    elif beneath:
        given = beneath(given) | given
    if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]:
        refuse(f"missing --{', --'.join(missing)}")
    config = cls(**given)
    refuse_unread(config, typed)
    return config


def refuse(message: str):
    raise ValueError(message)


@contextlib.contextmanager
def reading(file):
    """JSON of the right syntax and the wrong content: one message that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: its content is not what belongs there ({problem})") from None


@contextlib.contextmanager
def writing(path):
    """A full disk, a folder that is gone or read-only: one message that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        kept = "what was written before is untouched"
        raise ValueError(f"{path} cannot be written ({error}); {kept}") from None


class Stopped(Exception):
    """A run that was asked to stop, and has saved its state: the message, the exit code."""


# what a rank reads when another one has ended: from gloo, NCCL and the store
ENDED = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")


def run_cli(main) -> None:
    """Run main(): what a user can cause is one message and exit code 2, the rest a traceback."""
    code = 0
    try:
        main()
    except Stopped as stop:
        message, code = stop.args
        print0(message)
    except (ValueError, OSError, RuntimeError) as error:
        ended = any(text in str(error) for text in ENDED)
        if isinstance(error, RuntimeError) and not ended:
            raise
        if os.environ.get("RECPO_TRACEBACK"):
            traceback.print_exc()
        code = 2
        # The rank whose own error it is speaks, rank 0 first; meanwhile torchrun ends the others.
        say_error(error, patience=10 if ended else 0 if is_main() else 5)
    except KeyboardInterrupt:
        code = 130
    if code or dist.is_initialized():
        # Leave without the interpreter's teardown: after an error others may wait in a collective,
        # after a good end gloo's and FSDP's threads are still about, and it aborts now and then.
        if not code and torch.cuda.is_available():
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def say_error(error: Exception, patience: float) -> None:
    """One line, unless this process is ended before; under torchrun the last of its report."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # with 0 the report does not list it
    time.sleep(patience)
    environ = os.environ.get
    rank = f" (rank {environ('RANK')})" if environ("WORLD_SIZE", "1") != "1" else ""
    message, report = f"error{rank}: {error}", environ("TORCHELASTIC_ERROR_FILE")
    if report and environ("TORCHELASTIC_RESTART_COUNT") == environ("TORCHELASTIC_MAX_RESTARTS"):
        facts = {"py_callstack": message, "timestamp": int(time.time())}  # torchrun's form
        Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": facts}}))
    else:
        print(message, file=sys.stderr, flush=True)


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def print0(*args, **kwargs) -> None:
    if is_main():
        print(*args, **kwargs, flush=True)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hours(seconds: float) -> str:
    """h:mm:ss"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
