"""A stage and its folder: its inputs, its reference, its validation and its output.

The reference is the policy before its first step: a file of log-probs, named by a hash of their
inputs, however the work was divided. If the file is missing or damaged, it is computed again."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from common import is_main, print0, read_json, writing
from data import TEMPLATES, Encoded, Examples, encode_examples, to_device
from hub.chat import add_end_of_turn
from hub.files import base_fingerprint, resolve_path, save_tensors
from hub.tokenizer import Tokenizer
from lora import base_of, read_adapter_config, save_adapter
from model import ModelConfig, Transformer, save_pretrained
from runtime import sharding
from runtime.processes import Logger, Run, from_rank_0, prefetch, progress
from runtime.sharding import gathered, hash_of, is_whole, reshard, trained

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES += ("chat_template.jinja", "generation_config.json")
# options that shape a prompt; they are kept in prompt.json, with words and template
PROMPT_OPTIONS = ("prompt_format", "max_length", "history", "history_items", "min_rating")
PROMPT_OPTIONS += ("ratings", "list_in_prompt", "scale", "dataset")
SHOWN = {"hit_ratio@1": "written", "valid_ratio": "valid"}  # metric -> what the screen calls it
SHOWN |= {"ranking/hit_ratio@1": "ranked first", "ranking/mrr": "mrr"}


def weights_key(base: Path, adapter: Path | None) -> str:
    """Hash of the weights that a stage starts from: the base, and an adapter if it has one."""
    digest = hashlib.sha256(f"{ModelConfig.from_pretrained(base)}{base_fingerprint(base)}".encode())
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
        digest.update(f"{len(prompt)} {encoded.title_ids(e, slots[e])}".encode() + prompt.tobytes())
    return digest.hexdigest()


def check_finished(stage: Path, what: str, now: str, way_out="choose another --output_dir") -> None:
    """Raise if a finished stage was made from other data or weights than the current ones."""
    facts = read_json(stage / "base.json") | read_json(stage / "eval" / "metrics.json")
    before = str(facts.get({"data": "data_hash", "weights": "starting_weights"}[what]))
    if before != now:
        found = f"{stage} was finished on {what} {before[:12]}, now it is {now[:12]}"
        raise ValueError(f"{found}: put the old {what} back, or {way_out}")


def load_stage(folder: Path, model: str = "") -> tuple[Path, Path | None]:
    """The base and the adapter of a finished stage; `model`: the new place of a moved base."""
    if (folder / "config.json").exists():  # all weights: it is its own base
        return folder, None
    facts = read_json(folder / "base.json")
    base, fingerprint = facts["base"], facts.get("base_fingerprint")
    adapter = folder if (folder / "adapter_config.json").exists() else facts.get("adapter")
    if base.startswith(".."):  # another stage of this run, which moves with it
        return Path(os.path.normpath(folder / base)), adapter and Path(adapter)
    try:
        path = resolve_path(model or base)
    except ValueError as error:
        way_out = "if it was moved, give its new place as --model"
        raise ValueError(f"{folder}: its base {base} is missing; {way_out} ({error})") from None
    if model and fingerprint and fingerprint != base_fingerprint(path):
        raise ValueError(f"--model {model} holds other weights than {base}, the base of {folder}")
    return path, adapter and Path(adapter)


def resume_stage(folder: Path, model, optimizer, objective, made_from: dict) -> tuple[int, dict]:
    """Load the newest whole checkpoint, or start from zero: (steps done, best weights so far)."""
    checkpoint = from_rank_0(lambda: sharding.newest_checkpoint(folder))
    if checkpoint is None:
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        return 0, {}
    state, best = sharding.load_checkpoint(checkpoint, model, optimizer, made_from)
    objective.load_state(state)
    if is_main():  # cut off what was logged after it
        with open(folder / "metrics.jsonl", "a") as log:
            log.truncate(min(log.tell(), state["logged"]))
    print0(f"resuming from {checkpoint}, after step {state['step']}")
    return state["step"], best


def prepare_reference(run: Run, made_from: dict, dtype, objective, schedule) -> str:
    """Fill in the log-probs of the starting weights, which the model still has; returns a key."""
    facts = f"{made_from['weights']} {made_from['token ids']} {dtype} {run.config.load_in_4bit}"
    key = hashlib.sha256(facts.encode()).hexdigest()
    file = run.folder / f"reference-{key[:12]}.safetensors"
    logps = from_rank_0(lambda: load_file(file)["logps"].clone() if is_whole(file) else None)
    if logps is None:
        logps = reference_pass(objective, schedule, run.rank)
        if is_main():
            with writing(file):
                save_tensors({"logps": logps}, file)
                Path(f"{file}.sha256").write_text(hash_of(file))
        dist.barrier()
    objective.reference_logps = logps
    return key


@torch.no_grad()
def reference_pass(objective, schedule, rank: int) -> Tensor:
    """Log-probs (E, N) in the first epoch's micro-batches, so first rewards are 0; unseen: NaN."""
    steps = range(min(schedule.num_steps, schedule.steps_per_epoch))
    planned = [(b, schedule.examples(s)) for s in steps for b in schedule.micro_batches(s, rank)]
    prepared = prefetch(lambda plan: objective.prepare(*plan), planned)
    logps = torch.zeros(objective.slots.shape, device=objective.device)
    unseen = torch.ones(len(logps), 1, dtype=torch.bool)
    objective.model.eval()
    for batch, examples in progress(planned, "reference", len(planned)):
        tree = next(prepared).tree
        sums = tree.sum_logps(objective.model(tree)[0])
        unseen[examples] = False
        if batch:
            logps[to_device(torch.tensor(batch), objective.device)] = sums
    reshard(objective.model)
    dist.all_reduce(logps)  # each example was scored on one rank
    return logps.cpu().masked_fill(unseen, torch.nan)


def check_first_rewards(objective, exact: bool) -> None:
    """Raise unless policy and reference agree before the first update (in bf16: nearly)."""
    rewards = torch.cat([r.flatten() for r in objective.first_rewards]).double()
    rewards, objective.first_rewards = rewards / objective.config.beta, None
    worst = torch.stack([rewards.abs().max(), rewards.square().mean().sqrt()])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)  # so that all ranks stop, or none
    largest, rms = worst.tolist()
    found = f"log-ratios before the first step: at most {largest:.1e} nats per title, rms {rms:.1e}"
    if not (largest < 1e-3 if exact else rms <= 0.5):
        raise ValueError(f"policy and reference differ before training: {found}")
    print0(f"{found} (0: policy and reference are equal)")


def encode_sample(val: Examples, tokenizer, config) -> Encoded | None:
    """The validation users of a run: --val_size of the split, drawn with --data_seed."""
    rows = np.random.default_rng([config.data_seed, 1]).permutation(len(val))[: config.val_size]
    sample = val.select(np.sort(rows))
    return encode_examples(sample, tokenizer, config.max_length) if len(rows) else None


def validate(log: Logger, step: int, summary: dict | None, model, best: dict) -> dict:
    """Log rank 0's metrics after `step` steps; returns the best weights, these or `best`."""

    def report() -> bool:
        lines = [json.loads(line) for line in Path(log.file.name).read_text().splitlines()]
        before = [line["val/hit_ratio@1"] for line in lines if line["phase"] == "val"]
        log.write({"phase": "val", "step": step, **{f"val/{n}": summary[n] for n in ("n", *SHOWN)}})
        is_best = summary["hit_ratio@1"] > max(before, default=-1)
        shown = [f"{word} {summary[name]:.4f}" for name, word in SHOWN.items()] + ["best"] * is_best
        print0(f"{log.stage:5} {step:5} | val n {summary['n']} | {' | '.join(shown)}")
        return is_best

    if from_rank_0(report) and log.run.config.keep == "best":
        return {name: p.detach().clone() for name, p in trained(model).items()}
    return best


def save_stage(run: Run, model: Transformer, base: Path, folder: Path, weights: str) -> None:
    """Write the adapter in PEFT's format, or the whole model with its tokenizer; and base.json."""
    state, is_adapter = model.state_dict(), bool(getattr(model, "lora_config", None))
    if is_adapter:
        whole = dict(gathered({name: t for name, t in state.items() if ".lora_" in name}))
    else:
        save_pretrained(model, folder, gathered(state), write=is_main())
    if is_main():
        model.name_or_path = write_base(run, base, folder, weights)
        if is_adapter:
            save_adapter(model, folder, whole)
        else:
            copy_tokenizer(base, folder, run.config.prompt_format)


def copy_tokenizer(base: Path, folder: Path, prompt_format: str | None) -> None:
    """Copy the base's tokenizer to a model; with chat prompts, the end of a turn ends an answer."""
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copy(base / name, folder / name)
    if prompt_format == "chat":
        add_end_of_turn(folder, Tokenizer(base, "chat").eos_id)


def write_base(run: Run, base: Path, folder: Path, weights: str, adapter=None) -> str:
    """Write base.json and prompt.json, to load a stage without its run; returns the base's name."""
    given = run.config.model or (base_of(run.config.adapter) if run.config.adapter else "")
    is_hub_name = "/" in given and base == run.base and not Path(given).is_dir()
    name = given if is_hub_name else str(base.resolve())
    inside = base.resolve().is_relative_to(run.folder.resolve())  # then the run folder may be moved
    facts = {"base": os.path.relpath(base, folder) if inside else name}
    facts |= {"adapter": str(adapter.resolve())} if adapter else {}
    facts |= {"starting_weights": weights, "base_fingerprint": base_fingerprint(base)}
    (folder / "base.json").write_text(json.dumps(facts) + "\n")
    prompt = {option: getattr(run.config, option) for option in PROMPT_OPTIONS}
    prompt |= {"words": run.train.examples.interactions.words, "template": TEMPLATES[0]}
    (folder / "prompt.json").write_text(json.dumps(prompt, indent=1) + "\n")
    return name


def save_predictions(path: Path, metrics: dict, records: list[dict]) -> None:
    """Write metrics.json, and a line of predictions.jsonl for each of eval.predict's records."""
    path.mkdir(parents=True, exist_ok=True)
    kept = [{k: v for k, v in r.items() if k not in ("ids", "one_pass")} for r in records]
    write_whole(path / "predictions.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
    write_whole(path / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a file under another name, then rename it: after a kill the old file is intact."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(file)
