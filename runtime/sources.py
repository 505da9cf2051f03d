"""What is asked or evaluated: a run's stages, or a model of any origin."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from common import arg, changed_options, print0, read_json
from data import TEMPLATES, Interactions, Words
from hub.files import resolve_path
from hub.tokenizer import Tokenizer
from loaders.frozen import data_defaults, words_of
from lora import base_of, load_adapter, merge_lora
from model import Transformer, load_pretrained, save_pretrained
from runtime.policy import ModelOptions, say_what_4_bits_cost, stored_dtype
from runtime.stages import check_finished, copy_tokenizer, load_stage

Source = tuple[Path, Path | None]  # base, and the adapter on it
# what is evaluated and where its data lie; all else a run has fixed
NOT_FROM_RUN = {"run", "stage", "model", "adapter", "prepared_dir"}


@dataclass(frozen=True)
class SourceConfig(ModelOptions):
    """A run folder, or a Hugging Face directory or PEFT adapter, and how it is loaded."""

    run: str = arg(
        "",
        "run folder of train.py: model, adapter and data options are read from it",
        group="what is evaluated",
    )
    stage: str = arg("", "stage of the run; empty = all finished ones")

    # options that are read from prompt.json without --run
    KEPT = ("prompt_format", "max_length", "list_in_prompt")

    def __post_init__(self):
        super().__post_init__()
        if bool(self.run) == bool(self.adapter or (self.model and not self.run)):
            raise ValueError(
                "give either --run (with --model, if its base was moved), or --model, --adapter"
            )


def data_of_a_model(given: dict) -> dict:
    """Defaults of the data options beside --model and --adapter; a run has its own."""
    return {} if given.get("run") else data_defaults(given)


def folder_of(config: SourceConfig, name: str) -> Path:
    """Where a source keeps its prompt.json and its eval/."""
    return Path(config.run) / name if config.run else Path(config.adapter or config.model)


def kept_prompt(folder: Path) -> dict:
    file = folder / "prompt.json"
    return read_json(file) if file.exists() else {}


def with_run_options(config: SourceConfig) -> SourceConfig:
    """Take the options with which a run was made, or those of a model's prompt.json.

    ValueError if other values were given."""
    if config.run:
        file = Path(config.run) / "config.json"
        if not file.exists():
            raise ValueError(f"--run {config.run}: no folder of a run, config.json is missing")
        saved, names = read_json(file), {f.name for f in fields(SourceConfig)} - NOT_FROM_RUN
    else:
        file = folder_of(config, "") / "prompt.json"
        saved, names = kept_prompt(file.parent), set(config.KEPT)
        if config.data_dir:  # a log of its own
            names.discard("dataset")
    known = {name: saved[name] for name in names if name in saved}  # older runs have fewer options
    for name in sorted(changed_options(config) & known.keys()):
        if getattr(config, name) != known[name]:
            raise ValueError(
                f"--{name} {getattr(config, name)} has no effect beside --run, or a model that "
                f"keeps its own: {known[name]!r} ({file}); leave it out"
            )
    return replace(config, **known)


def sources_of(config: SourceConfig) -> dict[str, Source]:
    """Name -> (base, adapter) of everything to evaluate."""
    adapter = Path(config.adapter)
    if config.run:
        run = Path(config.run)
        listed = [s.strip() for s in read_json(run / "config.json")["stages"].split(",")]
        stages = [config.stage] if config.stage else [s for s in listed if (run / s).is_dir()]
        if not stages:
            raise ValueError(f"{run}: no stage of this run is finished yet")
        return {stage: load_stage(run / stage, config.model) for stage in stages}
    if not config.adapter:
        return {Path(config.model).name: (resolve_path(config.model), None)}
    if (adapter / "base.json").exists():  # a stage of a run, wherever the run lies now
        return {adapter.name: load_stage(adapter, config.model)}
    return {adapter.name: (resolve_path(config.model or base_of(adapter)), adapter)}


def check_run_data(config: SourceConfig, stages: Iterable[str], data_hash: str) -> None:
    """Raise if a stage of the run that is evaluated was trained on other data."""
    for stage in stages if config.run else ():
        way_out = "evaluate the stage on its own, by --model or --adapter"
        check_finished(Path(config.run) / stage, "data", data_hash, way_out)


def prompt_words(config: SourceConfig, folder: Path, log: Interactions | None) -> Words:
    """The words of the prompts that a model in this folder was trained on, else those of the data.

    A note, where most of its own test answers were no listed titles."""
    file, kept = folder / "eval" / "metrics.json", kept_prompt(folder)
    valid = read_json(file).get("valid_ratio", 1.0) if file.exists() else 1.0
    if valid < 0.5:
        print0(
            f"note: only {valid:.0%} of this model's test answers were listed titles ({file}), so "
            "its probabilities mean little"
        )
    if kept.get("template") not in (None, TEMPLATES[0]):
        raise ValueError(f"{folder}: trained with another template than this version asks by")
    words = log.words if log else words_of(config.dataset)
    return tuple(kept.get("words", words))


def load_source(
    config: SourceConfig, source: Source, device: torch.device
) -> tuple[Transformer, Tokenizer]:
    """Load model and tokenizer of a (base, adapter), ready to be evaluated."""
    base, adapter = source
    if config.load_in_4bit:
        say_what_4_bits_cost(device.type)
    model = load_pretrained(base, stored_dtype(config, device), device, config.load_in_4bit)
    if adapter:
        load_adapter(model, adapter)
    return model.eval(), Tokenizer(base, config.prompt_format)


def export_merged(stage: Path | str, output: Path | str, dtype=torch.float32) -> None:
    """Write a finished stage as one Hugging Face directory: its adapter folded into the base, the
    tokenizer with its template and ends, and how it is asked."""
    base, adapter = load_stage(Path(stage))
    model, output, kept = load_pretrained(base, dtype), Path(output), kept_prompt(Path(stage))
    if adapter:
        merge_lora(load_adapter(model, adapter))
    save_pretrained(model, output)
    copy_tokenizer(base, output, kept.get("prompt_format"))
    if kept:
        (output / "prompt.json").write_text(json.dumps(kept, indent=1) + "\n")
