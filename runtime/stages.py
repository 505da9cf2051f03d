"""A stage and its folder: what it started from, where it goes on, what it leaves behind."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from common import is_main, print0, read_json, reading
from data import TEMPLATES, Encoded
from hub.chat import add_end_of_turn
from hub.files import base_fingerprint, resolve_path
from lora import base_of, read_adapter_config, save_adapter
from model import ModelConfig, Transformer, save_pretrained
from runtime.checkpoint import (
    Best,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from runtime.runs import Logger, NotFinite, Run, StepMetrics, line_step, where_not_finite
from runtime.sharding import gathered

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("chat_template.jinja", "generation_config.json")


@dataclass
class Stage:
    """A stage while it is trained: what a step, a line of the log and a checkpoint need."""

    run: Run
    name: str
    folder: Path  # <stage>.unfinished, until all is done
    model: Transformer
    replicas: int  # ranks that hold the same rows
    objective: Any  # train.Objective
    schedule: Any  # runtime.passes.Schedule
    peak: float  # learning rate
    optimizer: torch.optim.Optimizer
    identity: dict  # what a checkpoint must have been made from
    logger: Logger | None = None
    best: Best | None = None  # with --keep best
    pending: tuple[int, StepMetrics] | None = None  # the last step, not logged yet

    def micro_batches(self, step: int) -> list:
        """This rank's part of a step, on its device."""
        examples = self.schedule.examples(step)
        batches = self.schedule.micro_batches(step, self.run.rank)
        return [self.objective.prepare(batch, examples) for batch in batches]

    def log(self, step: int, result: StepMetrics) -> None:
        """Write the step before: this one's metrics are read while the GPU works on the next."""
        self.flush()
        self.pending = step, result

    def flush(self) -> None:
        """Wait for the last step's metrics and write them; what is not finite is an error."""
        if self.pending is None:
            return
        (step, result), self.pending = self.pending, None
        try:
            metrics = result.read()
        except NotFinite as error:
            where = where_not_finite(self.run, self.schedule, step, error.ranks)
            last = next(iter(checkpoints(self.folder)), "none")
            problem = f"{self.name}, step {step + 1}, {where}: {error}"
            raise ValueError(f"{problem}. Last checkpoint: {last}") from None
        metrics["epoch"] = (step + 1) / self.schedule.steps_per_epoch
        self.logger(step, self.schedule.num_steps, metrics, self.name, result.ended)

    def due(self, every: int, step: int) -> bool:
        """Whether what happens every so many steps, and at the end, is due after this many."""
        return step == self.schedule.num_steps or bool(every) and step % every == 0

    def save(self, step: int) -> None:
        save_checkpoint(
            self.folder,
            step,
            self.model,
            self.optimizer,
            state=self.identity | self.objective.state(),
            replicas=self.replicas,
            keep=self.run.config.save_total_limit,
            best=self.best,
        )


def weights_key(base: Path, adapter: Path | None) -> str:
    """Hash of the weights that a stage starts from: base, and the adapter it goes on with."""
    digest = hashlib.sha256(str(ModelConfig.from_pretrained(base)).encode())
    digest.update(base_fingerprint(base).encode())
    if adapter:
        config = read_adapter_config(adapter)
        names = ("r", "lora_alpha", "target_modules", "use_rslora")  # not the path of its base
        digest.update(json.dumps([config.get(name) for name in names]).encode())
        for name, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def tokens_key(encoded: Encoded, slots: np.ndarray) -> str:
    """Hash of all token ids that a stage trains on: prompts, and the titles at `slots` (E, N)."""
    digest = hashlib.sha256()
    for e, prompt in enumerate(encoded.prompts):
        completions = encoded.slots(e, slots[e])  # ids of N titles
        digest.update(f"{len(prompt)} {completions}".encode() + prompt.tobytes())
    return digest.hexdigest()


def load_stage(folder: Path, model: str = "") -> tuple[Path, Path | None]:
    """The base and the adapter of a finished stage; a folder with all weights is its own base.

    `model` is where a base outside the run lies now; it must be the one that was trained on."""
    if not (folder / "base.json").exists():
        raise ValueError(f"{folder}: no finished stage of a run (base.json is missing)")
    if (folder / "config.json").exists():
        return folder, None
    with reading(folder / "base.json"):
        facts = read_json(folder / "base.json")
        named, recorded = str(facts["base"]), facts.get("base_fingerprint")
        adapter = Path(facts["adapter"]) if "adapter" in facts else None
    if (folder / "adapter_config.json").exists():
        adapter = folder
    if named.startswith(".."):  # another stage of this run, which moves with it
        named, model = os.path.normpath(folder / named), ""
    try:
        base = resolve_path(model or named)
    except ValueError as error:
        raise ValueError(
            f"{folder}: its base model {model or named} is not there; if it was moved, give its "
            f"new place by --model ({error})"
        ) from None
    if model and recorded and recorded != base_fingerprint(base):
        raise ValueError(
            f"--model {model} holds other weights than {named}, on which {folder} was trained"
        )
    return base, adapter


def check_data(stage: Path, data_hash: str, way_out: str) -> None:
    """ValueError if a finished stage was trained and tested on other data than there are now."""
    with reading(stage / "eval" / "metrics.json"):
        before = str(read_json(stage / "eval" / "metrics.json")["data_hash"])
    if before != data_hash:
        raise ValueError(
            f"{stage.name} was finished on data {before[:12]}, now it is {data_hash[:12]}, so they "
            f"cannot stand in one table: put the old data back, or {way_out} ({stage})"
        )


def starting_weights(base: Path, adapter: Path | None) -> str:
    """weights_key, for which rank 0 alone reads the files."""
    shared = [weights_key(base, adapter) if is_main() else None]
    dist.broadcast_object_list(shared)
    return shared[0]


def check_start(folder: Path, base: Path, adapter: Path | None) -> None:
    """A finished stage stands in one table with those to come, so it must have begun as they do."""
    before = read_json(folder / "base.json").get("starting_weights")
    if before is None:
        raise ValueError(
            f"{folder / 'base.json'}: an older version wrote it, without starting_weights, so it "
            "is not known what the stage began with: choose another --output_dir"
        )
    now = starting_weights(base, adapter)
    if before != now:
        raise ValueError(
            f"{folder.name} was finished from weights {before[:12]}, now they are {now[:12]}: put "
            f"{base}{f' or {adapter}' if adapter else ''} back, or choose another --output_dir"
        )


def resume_stage(stage: Stage) -> int:
    """Load the newest whole checkpoint, if there is one; returns the steps that are done."""
    metrics, checkpoint = stage.folder / "metrics.jsonl", newest_checkpoint(stage.folder)
    if checkpoint is None:
        if is_main():
            metrics.unlink(missing_ok=True)
        return 0
    state = load_checkpoint(checkpoint, stage.model, stage.optimizer, stage.identity)
    stage.best = state["best"]
    stage.objective.load_state(state)
    step, rank, seed = state["step"], stage.run.rank, stage.run.config.seed
    if is_main():
        lines = metrics.read_text().splitlines(keepends=True)
        write_whole(metrics, "".join(line for line in lines if line_step(line) <= step))
    print0(f"going on from {checkpoint}, after step {step}")
    if state["world_size"] != stage.run.world_size:
        torch.manual_seed(int(np.random.default_rng([seed, step, rank]).integers(2**62)))
        print0(f"note: it was made by {state['world_size']} processes; dropout is seeded anew")
    return step


def save_stage(run: Run, model: Transformer, base: Path, folder: Path, weights: str) -> None:
    """Write the adapter in PEFT's format, or the whole model with its tokenizer."""
    if getattr(model, "lora_config", None):
        state = dict(gathered(model, only_adapter=True))
        model.name_or_path = base_name(run, base)  # what adapter_config.json calls it
        if is_main():
            save_adapter(model, folder, state)
    else:
        save_pretrained(model, folder, gathered(model), write=is_main())
        if is_main():
            copy_tokenizer(base, folder)
            if run.config.prompt_format == "chat":
                add_end_of_turn(folder, run.tokenizer.eos_id)
    if is_main():
        write_base(run, base, folder, weights)


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def write_base(
    run: Run, base: Path, folder: Path, weights: str, adapter: Path | None = None
) -> None:
    """base.json: the model that a stage's adapter stands on, and what the stage started from.
    prompt.json: what shapes its prompts, for those who ask it without its run.

    `adapter` is another stage's or run's, if that is what was tested."""
    facts = {"base": base_name(run, base)}
    if base.resolve().is_relative_to(run.folder.resolve()):  # then the run folder may be moved
        facts["base"] = os.path.relpath(base, folder)
    if adapter:
        facts["adapter"] = str(adapter.resolve())
    facts |= {"starting_weights": weights, "base_fingerprint": base_fingerprint(base)}
    (folder / "base.json").write_text(json.dumps(facts) + "\n")
    prompt = {name: getattr(run.config, name) for name in PROMPT_OPTIONS}
    prompt["words"] = run.train.examples.interactions.words
    prompt["template"] = TEMPLATES[0]  # by which users are asked for
    (folder / "prompt.json").write_text(json.dumps(prompt, indent=1) + "\n")


# options that shape a prompt; with words and template they are kept beside adapter or model
PROMPT_OPTIONS = (
    "prompt_format", "max_length", "history", "history_items", "min_rating", "ratings", "scale",
    "dataset",
)  # fmt: skip


def base_name(run: Run, base: Path) -> str:
    """A base as anyone finds it: its hub name, if it was given so, else its absolute path."""
    given = run.config.model
    if not given and run.config.adapter:
        given = base_of(run.config.adapter)
    is_hub_name = "/" in given and base == run.base and not Path(given).is_dir()
    return given if is_hub_name else str(base.resolve())


def save_predictions(path: Path, metrics: dict, records: list[dict]) -> None:
    """Write metrics.json, and a line of predictions.jsonl for each of eval.predict's records."""
    path.mkdir(parents=True, exist_ok=True)
    kept = [{k: v for k, v in r.items() if k not in ("ids", "one_pass")} for r in records]
    write_whole(path / "predictions.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
    write_whole(path / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a file under another name first: a process that is killed leaves it as it was."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(file)
