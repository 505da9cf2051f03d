"""What is evaluated: the stages of a run as train.py left them, or a base with an adapter."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_type_hints

import torch

from common import arg, changed_options, check_types, read_json, reading
from hub.files import resolve_path
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig
from lora import base_of, load_adapter
from model import Transformer, load_pretrained
from runtime.policy import say_what_4_bits_cost, stored_dtype
from runtime.stages import check_data, load_stage


@dataclass(frozen=True)
class SourceConfig(DataConfig):
    """A run folder, or a Hugging Face directory or PEFT adapter, and how it is loaded."""

    run: str = arg(
        "",
        "run folder of train.py: model, adapter and data options are read from it",
        group="what is evaluated",
    )
    stage: str = arg("", "stage of the run; empty = all finished ones")
    model: str = arg("", "Hugging Face directory or hub name, instead of --run")
    adapter: str = arg("", "PEFT adapter; without --model on the base that it names")
    dtype: str = arg(
        "auto",
        "float32 or bfloat16; auto = bfloat16 on a GPU, float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    prompt_format: str = arg(
        "plain",
        "plain text, or chat: the model's own chat template; a run's own choice with --run",
        choices=("plain", "chat"),
    )
    load_in_4bit: bool = arg(False, "linear layers in 4 bits (NF4); a run's own choice with --run")
    max_length: int = arg(
        1024,
        "tokens of prompt and longest candidate; longer prompts lose their oldest history",
        at_least=1,
    )

    def __post_init__(self):
        super().__post_init__()
        if bool(self.run) == bool(self.model or self.adapter):
            raise ValueError("give either --run, or --model and/or --adapter")


def check_run_data(config: SourceConfig, stages: Iterable[str], data_hash: str) -> None:
    """check_data for every stage of the run that is evaluated."""
    way_out = "evaluate the stage on its own, by --model or --adapter"
    for stage in stages if config.run else ():
        check_data(Path(config.run) / stage, data_hash, way_out)


def sources_of(config: SourceConfig) -> dict[str, tuple[Path, Path | None]]:
    """Name -> (base, adapter) of everything to evaluate."""
    if not config.run:
        adapter = Path(config.adapter) if config.adapter else None
        base = config.model or base_of(adapter)
        return {(adapter or Path(base)).name: (resolve_path(base), adapter)}
    run = Path(config.run)
    with reading(run / "config.json"):
        listed = [s.strip() for s in read_json(run / "config.json")["stages"].split(",")]
    if any(not s or Path(s).name != s for s in listed):
        raise ValueError(f"{run / 'config.json'}: stages {listed} are no names of folders")
    stages = [config.stage] if config.stage else [s for s in listed if (run / s).is_dir()]
    if not stages:
        raise ValueError(f"{run}: no stage of this run is finished yet")
    return {stage: load_stage(run / stage) for stage in stages}


# what is evaluated and where its data lie; all else a run has fixed
OF_THIS_COMMAND = {"run", "stage", "model", "adapter", "prepared_dir", "download"}


def with_run_options(config: SourceConfig) -> SourceConfig:
    """Data options, dtype, max_length and prompt_format of the run: its examples are evaluated;
    ValueError if other values were given."""
    if not config.run:
        return config
    file = Path(config.run) / "config.json"
    saved = read_json(file)
    names = {f.name for f in fields(SourceConfig)} - OF_THIS_COMMAND
    known = {name: saved[name] for name in names if name in saved}  # older runs have fewer options
    check_types(file, known, get_type_hints(type(config)))
    for name in sorted(changed_options(config) & known.keys()):
        if getattr(config, name) != known[name]:
            raise ValueError(
                f"--{name} {getattr(config, name)} has no effect beside --run, whose value holds: "
                f"{known[name]!r} ({file}); leave it out"
            )
    try:
        return replace(config, **known)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load_source(
    config: SourceConfig, source: tuple[Path, Path | None], device: torch.device
) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a (base, adapter), ready to be evaluated."""
    base, adapter = source
    if config.load_in_4bit:
        say_what_4_bits_cost(device.type)
    model = load_pretrained(base, stored_dtype(config, device), device, config.load_in_4bit)
    if adapter:
        load_adapter(model, adapter)
    return model.eval(), Tokenizer(base, config.prompt_format)
