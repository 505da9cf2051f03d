"""The folder of a stage: what it started from, its checkpoints, what it leaves behind,
and who may read it."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from common import is_main, print0, read_json, reading
from hub.chat import add_end_of_turn
from hub.files import base_fingerprint, open_safetensors
from lora import read_adapter_config, save_adapter
from model import ModelConfig, Transformer, save_pretrained
from runtime.checkpoint import damage, load_checkpoint, newest_checkpoint
from runtime.runs import Run, line_step
from runtime.sharding import gathered


def weights_key(base: Path, adapter: Path | None) -> str:
    """Hash of the weights that a stage starts from: base, and the adapter it goes on with."""
    digest = hashlib.sha256(str(ModelConfig.from_pretrained(base)).encode())
    digest.update(base_fingerprint(base).encode())
    if adapter:
        config = read_adapter_config(adapter)
        names = ("r", "lora_alpha", "target_modules", "use_rslora")  # not the path of its base
        digest.update(json.dumps([config.get(name) for name in names]).encode())
        with open_safetensors(adapter / "adapter_model.safetensors") as f:
            for name in sorted(f.keys()):
                tensor = f.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_stage(folder: Path) -> tuple[Path, Path | None]:
    """(base, adapter) of a finished stage of a run:
    its own folder if it holds all weights, else base and adapter."""
    if not (folder / "base.json").exists():
        raise ValueError(f"{folder}: no finished stage of a run (base.json is missing)")
    if (folder / "config.json").exists():
        return folder, None
    with reading(folder / "base.json"):
        facts = read_json(folder / "base.json")
        base = folder / facts["base"]  # an absolute path stays as it is
        recorded = Path(facts["adapter"]) if "adapter" in facts else None
    if not base.is_dir():
        raise ValueError(f"{folder}: its base model {base} is gone")
    adapter = folder if (folder / "adapter_config.json").exists() else recorded
    return Path(os.path.normpath(base)), adapter


def check_data(stage: Path, data_hash: str, way_out: str) -> None:
    """ValueError if a finished stage was trained and tested on other data than there are now."""
    with reading(stage / "eval" / "metrics.json"):
        before = str(read_json(stage / "eval" / "metrics.json")["data_hash"])
    if before != data_hash:
        raise ValueError(
            f"{stage.name} was finished on data {before[:12]}, now it is {data_hash[:12]}: "
            f"one table of both would compare different users, and {stage.name} may have seen "
            f"some that are test users now. Put the old data back, or {way_out} ({stage})"
        )


def starting_weights(base: Path, adapter: Path | None) -> str:
    """weights_key, for which rank 0 alone reads the files."""
    shared = [weights_key(base, adapter) if is_main() else None]
    dist.broadcast_object_list(shared)
    return shared[0]


def check_start(folder: Path, base: Path, adapter: Path | None) -> None:
    """A finished stage stands in one table with those to come, so it must have begun as they do."""
    before = read_json(folder / "base.json").get("starting_weights")  # older runs have none
    now = starting_weights(base, adapter)
    if before and before != now:
        raise ValueError(
            f"{folder.name} was finished from weights {before[:12]}, now they are {now[:12]}: "
            f"{base}{f' or {adapter}' if adapter else ''} has changed. Put it back, or choose "
            f"another --output_dir; without {folder} the stage runs again"
        )


def resume_stage(run: Run, folder: Path, model, optimizer, objective, identity: dict) -> int | None:
    """Load the checkpoint to go on from;
    the number of steps it has seen, or None to start from the beginning."""
    config, checkpoint = run.config, None
    if config.resume == "auto":
        checkpoint = newest_checkpoint(folder)
    elif config.resume:
        checkpoint = Path(config.resume)
        if checkpoint.resolve().parent != folder.resolve():
            raise ValueError(
                f"--resume {checkpoint}: not a checkpoint of the stage that comes next, {folder}"
            )
        if problem := damage(checkpoint):
            raise ValueError(
                f"--resume {checkpoint}: damaged ({problem}); "
                "--resume auto takes the newest whole one"
            )
    metrics = folder / "metrics.jsonl"
    if checkpoint is None:
        if is_main():
            metrics.unlink(missing_ok=True)
        return None
    state = load_checkpoint(checkpoint, model, optimizer, identity)
    objective.load_state(state)
    if is_main():
        lines = metrics.read_text().splitlines()
        kept = [line for line in lines if line_step(line) <= state["step"]]
        beside = metrics.with_suffix(".part")
        beside.write_text("".join(f"{line}\n" for line in kept))
        beside.rename(metrics)
    print0(f"going on from {checkpoint}, after step {state['step']}")
    if state["world_size"] != run.world_size:
        digest = hashlib.sha256(f"{config.seed} {state['step']} {run.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:6], "big"))
        print0(
            f"note: it was made by {state['world_size']} processes; "
            "dropout is seeded anew from seed, step and rank"
        )
    return state["step"]


def save_stage(run: Run, model: Transformer, base: Path, folder: Path, weights: str) -> None:
    """Adapter in PEFT's format, or the whole model with its tokenizer,
    and which base it stands on."""
    if getattr(model, "lora_config", None):
        state = dict(gathered(model, only_adapter=True))
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


def write_base(
    run: Run, base: Path, folder: Path, weights: str, adapter: Path | None = None
) -> None:
    """base.json: the model that a stage's adapter stands on, and what the stage started from.

    `adapter` is another stage's or run's, if that is what was tested."""
    inside = base.resolve().is_relative_to(run.folder.resolve())  # then the run folder may be moved
    facts = {"base": str(base.resolve())}
    if inside:
        facts["base"] = os.path.relpath(base, folder)
    if adapter:
        facts["adapter"] = str(adapter.resolve())
    facts["starting_weights"] = weights
    (folder / "base.json").write_text(json.dumps(facts) + "\n")


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def save_predictions(path: Path, metrics: dict, records: list[dict]) -> None:
    """metrics.json, and a line of predictions.jsonl for each of eval.predict's records."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for record in records:
        kept = {k: v for k, v in record.items() if k not in ("ids", "one_pass")}
        lines.append(json.dumps(kept) + "\n")
    write_whole(path / "predictions.jsonl", "".join(lines))
    write_whole(path / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Under another name first: a process that is killed leaves the file as it was."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.rename(file)
