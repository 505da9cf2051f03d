"""Load what is evaluated: the stages of a run, or any other model."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from common import arg, changed_options, parse, parse_config, print0, read_json
from data import ITEMS, Interactions, Words
from hub.files import resolve_path
from hub.tokenizer import Tokenizer
from loaders.frozen import PROMPT_WORDS, data_defaults
from lora import base_of, load_adapter, merge_lora
from model import Transformer, load_pretrained, save_pretrained
from runtime.policy import ModelOptions, stored_dtype
from runtime.stages import check_finished, copy_tokenizer, load_stage

NOT_FROM_RUN = {"run", "stage", "model", "adapter", "prepared_dir"}  # the run fixes the others


@dataclass(frozen=True)
class SourceConfig(ModelOptions):
    """A run folder, or a Hugging Face directory or PEFT adapter, and how it is loaded."""

    run: str = arg("", "run folder of train.py, with its options", group="source")
    stage: str = arg("", "stage of the run; empty = the finished ones of its last --stages")
    KEPT = ("prompt_format", "max_length", "list_in_prompt")  # from prompt.json, without --run

    def __post_init__(self):
        super().__post_init__()
        if (self.run and self.adapter) or not (self.run or self.adapter or self.model):
            raise ValueError("give --run (with --model if its base moved), or --model, --adapter")


def parse_source(cls) -> SourceConfig:
    """Read a program's options: the typed ones, upon those of its run or the data's defaults."""
    config = parse_config(cls, beneath=lambda o: {} if o.get("run") else data_defaults(o))
    return with_run_options(config, parse(cls).keys())


def folder_of(config: SourceConfig, name: str) -> Path:
    """The folder that holds a source's prompt.json and eval/."""
    return Path(config.run) / name if config.run else Path(config.adapter or config.model)


def kept_prompt(folder: Path) -> dict:
    file = folder / "prompt.json"
    return read_json(file) if file.exists() else {}


def with_run_options(config: SourceConfig, typed: Iterable[str] = ()) -> SourceConfig:
    """Take the options of a run, or of a model's prompt.json; ValueError if others were given."""
    if config.run:
        file, names = Path(config.run) / "config.json", {f.name for f in fields(SourceConfig)}
        saved = read_json(file)
    else:
        file, names = folder_of(config, "") / "prompt.json", set(config.KEPT)
        saved = kept_prompt(file.parent)
        names -= {"dataset"} if config.data_dir else set()  # a log of its own
    known = {name: saved[name] for name in names & saved.keys() - NOT_FROM_RUN}
    for name in sorted(changed_options(config).union(typed) & known.keys()):
        if (given := getattr(config, name)) != known[name]:
            raise ValueError(f"leave out --{name} {given}: it is {known[name]!r} in {file}")
    return replace(config, **known)


def sources_of(config: SourceConfig) -> dict[str, tuple[Path, Path | None]]:
    """Name -> (base, adapter) of everything to evaluate."""
    run, adapter = Path(config.run), Path(config.adapter)
    if config.run:
        listed = (config.stage or read_json(run / "config.json").get("stages", "")).replace(" ", "")
        stages = [s for s in listed.split(",") if config.stage or (run / s).is_dir()]
        if not stages:
            raise ValueError(f"{run}: no stage of this run is finished yet")
        return {stage: load_stage(run / stage, config.model) for stage in stages}
    if not config.adapter:
        return {Path(config.model).name: (resolve_path(config.model), None)}
    if (adapter / "base.json").exists():  # a stage of a run, wherever the run is now
        return {adapter.name: load_stage(adapter, config.model)}
    return {adapter.name: (resolve_path(config.model or base_of(adapter)), adapter)}


def check_run_data(config: SourceConfig, stages: Iterable[str], data_hash: str) -> None:
    """Raise if a stage of the run that is evaluated was trained on other data."""
    for stage in stages if config.run else ():
        check_finished(Path(config.run) / stage, "data", data_hash, "give --model or --adapter")


def prompt_words(config: SourceConfig, folder: Path, log: Interactions | None) -> Words:
    """The words of a model's prompts, else the data's; notes if its test answers were invalid."""
    file, kept = folder / "eval" / "metrics.json", kept_prompt(folder)
    if file.exists() and (valid := read_json(file)["valid_ratio"]) < 0.5:
        note = f"only {valid:.0%} of this model's test answers were listed titles ({file})"
        print0(f"note: {note}, so its probabilities mean little")
    words = log.words if log else PROMPT_WORDS.get(config.dataset, ITEMS)
    return tuple(kept.get("words", words))


def load_source(config: SourceConfig, source: tuple, device) -> tuple[Transformer, Tokenizer]:
    """Load model and tokenizer of a (base, adapter), ready to be evaluated."""
    base, adapter = source
    model = load_pretrained(base, stored_dtype(config, device), device, config.load_in_4bit)
    if adapter:
        load_adapter(model, adapter)
    return model.eval(), Tokenizer(base, config.prompt_format)


def export_merged(stage: Path | str, output: Path | str, dtype=torch.float32) -> None:
    """Write a finished stage, its adapter merged, as one Hugging Face directory."""
    base, adapter = load_stage(Path(stage))
    model, output, kept = load_pretrained(base, dtype), Path(output), kept_prompt(Path(stage))
    if adapter:
        merge_lora(load_adapter(model, adapter))
    save_pretrained(model, output)
    copy_tokenizer(base, output, kept.get("prompt_format"))
    (output / "prompt.json").write_text(json.dumps(kept, indent=1) + "\n")
