"""What every script shares: options from a dataclass, errors, printing, the process group."""

import argparse
import contextlib
import json
import math
import os
import sys
import traceback
from dataclasses import MISSING, field, fields
from datetime import timedelta
from pathlib import Path
from typing import get_type_hints

import torch
import torch.distributed as dist
from safetensors import SafetensorError

BOUNDS = {  # name of a bound -> how it reads, whether a value keeps it
    "at_least": (">=", lambda value, bound: value >= bound),
    "above": (">", lambda value, bound: value > bound),
    "at_most": ("<=", lambda value, bound: value <= bound),
    "below": ("<", lambda value, bound: value < bound),
}


def arg(default=MISSING, help="", group="", choices=(), **bounds):
    """A dataclass field that is an option; `group` starts a new heading in --help.

    check_options holds it to its choices, and to bounds: at_least, above, at_most, below."""
    assert bounds.keys() <= BOUNDS.keys(), bounds
    metadata = {"help": help, "group": group, "choices": choices, "bounds": bounds}
    return field(default=default, metadata=metadata)


def check_options(config) -> None:
    """ValueError names the first option that is none of its choices, out of bounds or infinite."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        if choices and value not in choices:
            allowed = ", ".join(filter(None, choices))
            raise ValueError(f"--{f.name} must be one of {allowed}, got {value!r}")
        for name, bound in f.metadata["bounds"].items():
            sign, keeps = BOUNDS[name]
            if not keeps(value, bound):  # NaN keeps none
                raise ValueError(f"--{f.name} must be {sign} {bound}, got {value}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{f.name} must be a finite number, got {value}")


def changed_options(config) -> set[str]:
    """Names of the options that do not have their default."""
    return {f.name for f in fields(config) if getattr(config, f.name) != f.default}


def describe_option(f) -> str:
    """Help text: what it is, what it may be, what it is by default."""
    parts = [f.metadata["help"]]
    if choices := [choice for choice in f.metadata["choices"] if choice and choice not in parts[0]]:
        parts.append(f"[{', '.join(choices)}]")
    bounds = [f"{BOUNDS[name][0]} {bound}" for name, bound in f.metadata["bounds"].items()]
    if f.default not in (MISSING, ""):
        bounds.insert(0, f"default: {f.default}")
    if bounds:
        parts.append(f"({', '.join(bounds)})")
    return " ".join(parts).replace("%", "%%")


class Switch(argparse.Action):
    """--x and --no_x."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__([*option_strings, f"--no_{dest}"], dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def read_json(file) -> dict:
    """The JSON object in a file, with or without a byte-order mark; ValueError names the file."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers without end
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def parse_config(cls, argv=None):
    """One --flag per dataclass field, over those of --config file.json; unknown ones are errors."""
    types = get_type_hints(cls)
    usage = "%(prog)s [--option value ...]"
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False, usage=usage)
    what = "JSON file with any of the options below; flags override it"
    parser.add_argument("--config", help=what)
    section = parser
    for f in fields(cls):
        if f.metadata["group"]:
            section = parser.add_argument_group(f.metadata["group"])
        kind = types[f.name]
        value = {"action": Switch}
        if kind is not bool:
            value = {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}
        value |= {"default": argparse.SUPPRESS, "help": describe_option(f)}
        section.add_argument(f"--{f.name}", **value)

    given = vars(parser.parse_args(argv))
    if file := given.pop("config", None):
        from_file = read_json(file)
        if unknown := sorted(from_file.keys() - types.keys()):
            raise ValueError(f"{file}: unknown options {unknown}; --help lists the known ones")
        check_types(file, from_file, types)
        given = from_file | given
    if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]:
        parser.error(f"missing --{', --'.join(missing)}")
    return cls(**given)


def check_types(file, content: dict, types: dict[str, type]) -> None:
    """ValueError unless every option of a file has the type of its field."""
    for name, value in content.items():
        number = types[name] is float and type(value) is int
        if type(value) is not types[name] and not number:
            raise ValueError(f"{file}: {name} must be {types[name].__name__}, got {value!r}")


@contextlib.contextmanager
def reading(file):
    """JSON of the right syntax and the wrong content: one message that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{file}: its content is not what belongs there ({type(error).__name__}: {error})"
        ) from None


@contextlib.contextmanager
def writing(path):
    """A full disk, a folder that is gone or read-only: one message that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be written ({error}); what was written before is untouched"
        ) from None


class Stopped(Exception):
    """A run that was asked to stop, has saved its state, and ends well."""


def run_cli(main) -> None:
    """Run main(): what a user can cause is one message and exit code 2, the rest a traceback."""
    code = 0
    try:
        main()
    except Stopped as stop:
        print0(stop)
    except (ValueError, OSError) as error:
        code = 2
        if os.environ.get("RECPO_TRACEBACK"):
            traceback.print_exc()
        elif dist.is_initialized() and dist.get_world_size() > 1:
            print(f"error (rank {dist.get_rank()}): {error}", file=sys.stderr, flush=True)
        elif is_main():  # before ranks have met, all of them find the same
            print(f"error: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = 130
    if code or dist.is_initialized():
        # Leave without the interpreter's teardown. After an error others may wait in a collective:
        # torchrun ends them. After a good end gloo's and FSDP's threads are still about, and it
        # aborts now and then ("terminate called without an active exception").
        if not code and torch.cuda.is_available():
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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


def setup_distributed() -> tuple[int, int, torch.device]:
    """Join torchrun's group, or make one of this process alone; (rank, world_size, device)."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.device_count() >= local_world  # NCCL wants a GPU per process
    if torch.cuda.is_available() and not cuda:
        print0(
            f"note: {local_world} processes but {torch.cuda.device_count()} GPU(s) "
            "on this machine: running on the CPU"
        )
    device, backend = torch.device("cpu"), "gloo"
    if cuda:
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)

    if not dist.is_initialized():
        group = {"timeout": timedelta(hours=2)}
        if "RANK" not in os.environ:
            group |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, **group)
    # torchrun's default; use all cores instead
    if local_world > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    return dist.get_rank(), dist.get_world_size(), device


@contextlib.contextmanager
def first(rank_variable: str = "RANK"):
    """Rank 0 (with "LOCAL_RANK": of every machine) goes through the block, then the others, who
    find its work done. An error ends the first one's process, and torchrun then the others."""
    leads = int(os.environ.get(rank_variable, 0)) == 0
    if leads:
        yield
    dist.barrier()
    if not leads:
        yield
