"""A stage and its folder: what it was made from, where it goes on, what it leaves behind.

Validation: every --eval_steps steps, and at the end of a stage, --val_size users of the validation
split (the last interaction but one of each) are answered in one pass; an answer that no candidate
verifies counts as invalid, so this costs a prefill. With --keep best the weights of the step with
the highest hit_ratio@1 (the earlier of equal ones) are what is saved and tested.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from common import is_main, print0, read_json, reading
from data import TEMPLATES, Encoded, Examples, encode_examples
from hub.chat import add_end_of_turn
from hub.files import Weights, base_fingerprint, resolve_path
from hub.tokenizer import Tokenizer
from lora import base_of, read_adapter_config, save_adapter
from model import ModelConfig, Transformer, save_pretrained
from runtime.checkpoint import (
    damaged_files,
    load_checkpoint,
    newest,
    newest_checkpoint,
    write_tensors,
)
from runtime.processes import from_rank_0
from runtime.runs import Logger, Run
from runtime.sharding import fill, gathered, trained

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("chat_template.jinja", "generation_config.json")
# options that shape a prompt; with words and template they are kept beside adapter or model
PROMPT_OPTIONS = ("prompt_format", "max_length", "history", "history_items", "min_rating")
PROMPT_OPTIONS += ("ratings", "list_in_prompt", "scale", "dataset")


# ------------------------------------------------------------------------ what it was made from
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


def starting_weights(base: Path, adapter: Path | None) -> str:
    """weights_key, for which rank 0 alone reads the files."""
    return from_rank_0(lambda: weights_key(base, adapter))


def tokens_key(encoded: Encoded, slots: np.ndarray) -> str:
    """Hash of all token ids that a stage trains on: prompts, and the titles at `slots` (E, N)."""
    digest = hashlib.sha256()
    for e, prompt in enumerate(encoded.prompts):
        completions = encoded.slots(e, slots[e])  # ids of N titles
        digest.update(f"{len(prompt)} {completions}".encode() + prompt.tobytes())
    return digest.hexdigest()


def check_finished(
    stage: Path, what: str, now: str, way_out: str = "choose another --output_dir"
) -> None:
    """Raise if a finished stage was made from other data or weights than there are now."""
    kept = {
        "data": ("eval/metrics.json", "data_hash"),
        "weights": ("base.json", "starting_weights"),
    }
    file, key = kept[what]
    before = str(read_json(stage / file).get(key))
    if before != now:
        raise ValueError(
            f"{stage.name} was finished on {what} {before[:12]}, now it is {now[:12]}, so they "
            f"cannot stand in one table: put the old {what} back, or {way_out} ({stage})"
        )


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


# ------------------------------------------------------------------------ where it goes on
def resume_stage(run: Run, folder: Path, model, optimizer, objective, made_from: dict) -> int:
    """Load the newest whole checkpoint; returns the steps that are done, 0 in a fresh folder."""
    checkpoint = from_rank_0(lambda: newest_checkpoint(folder))
    if checkpoint is None:
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        return 0
    state = load_checkpoint(checkpoint, model, optimizer, made_from)
    objective.load_state(state)
    if is_main():  # cut off what was logged after it
        log = folder / "metrics.jsonl"
        os.truncate(log, min(log.stat().st_size, state["logged"]))
    print0(f"going on from {checkpoint}, after step {state['step']}")
    if state["world_size"] != run.world_size:
        rng = np.random.default_rng([run.config.seed, state["step"], run.rank])
        torch.manual_seed(int(rng.integers(2**62)))
        print0(f"note: it was made by {state['world_size']} processes; dropout is seeded anew")
    return state["step"]


# ------------------------------------------------------------------------ validation
SHOWN = {  # metric -> what the screen calls it
    "hit_ratio@1": "written",
    "valid_ratio": "valid",
    "ranking/hit_ratio@1": "ranked first",
    "ranking/mrr": "mrr",
}


def encode_sample(val: Examples, tokenizer, config) -> Encoded | None:
    """The validation users of a run: --val_size of the split, drawn by the seed of the data."""
    size = min(config.val_size, len(val))
    if size == 0:
        return None
    rows = np.random.default_rng([config.data_seed, 1]).permutation(len(val))[:size]
    return encode_examples(val.select(np.sort(rows)), tokenizer, config.max_length)


def validate(log: Logger, step: int, summary: dict | None, model: Transformer) -> None:
    """Log what the model has reached after `step` steps, and keep its weights if none were better.

    `summary` is there on rank 0; all ranks must call."""

    def report() -> bool:
        metrics = {f"val/{name}": summary[name] for name in ("n", *SHOWN)}
        log.write({"phase": "val", "step": step, **metrics})
        shown = " | ".join(f"{word} {summary[name]:.4f}" for name, word in SHOWN.items())
        print0(f"{log.stage:5} {step:5} | val n {summary['n']} | {shown}")
        before = [read_json(best / "state.json") for best in newest(log.folder, "best")]
        return all(summary["hit_ratio@1"] > best["val/hit_ratio@1"] for best in before)

    if from_rank_0(report) and log.run.config.keep == "best":
        value = summary["hit_ratio@1"] if is_main() else None
        weights = trained(model)
        write_tensors(log.folder / f"best-{step}", weights, {"val/hit_ratio@1": value}, keep=1)


def load_best(log: Logger, model: Transformer) -> None:
    """Put the best step's weights into the model."""
    best = from_rank_0(lambda: newest(log.folder, "best")[0])
    if damaged := from_rank_0(lambda: damaged_files(best)):
        raise ValueError(f"{best} is damaged ({damaged}): delete {log.folder} to train it again")
    value = read_json(best / "state.json")["val/hit_ratio@1"]
    steps = f"step {best.name.removeprefix('best-')} of {log.schedule.num_steps}"
    print0(f"{log.stage}: keeping {steps}, val/hit_ratio@1 {value:.4f}")
    fill(trained(model), Weights(best).rows)


# ------------------------------------------------------------------------ what it leaves behind
def save_stage(run: Run, model: Transformer, base: Path, folder: Path, weights: str) -> None:
    """Write the adapter in PEFT's format, or the whole model with its tokenizer."""
    state = model.state_dict()
    if getattr(model, "lora_config", None):
        whole = dict(gathered({name: t for name, t in state.items() if ".lora_" in name}))
        model.name_or_path = base_name(run, base)  # what adapter_config.json calls it
        if is_main():
            save_adapter(model, folder, whole)
    else:
        save_pretrained(model, folder, gathered(state), write=is_main())
        if is_main():
            copy_tokenizer(base, folder, run.config.prompt_format)
    if is_main():
        write_base(run, base, folder, weights)


def copy_tokenizer(base: Path, folder: Path, prompt_format: str | None) -> None:
    """Put the base's tokenizer beside a model, which may end an answer as its chat format does."""
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copy(base / name, folder / name)
    if prompt_format == "chat":
        add_end_of_turn(folder, Tokenizer(base, "chat").eos_id)


def write_base(
    run: Run, base: Path, folder: Path, weights: str, adapter: Path | None = None
) -> None:
    """Write base.json and prompt.json for those who ask a stage without its run.

    The one names the model that its adapter stands on, and what it started from; the other has what
    shapes its prompts. `adapter` is another stage's or run's, if that is what was tested."""
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
