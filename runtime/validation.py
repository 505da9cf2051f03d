"""Validation users while a stage trains: a curve, and the weights of the best step.

Every --eval_steps steps, and at the end of a stage, --val_size users of the validation split (the
last interaction but one of each) are answered in one pass; an answer that no candidate verifies
counts as invalid, so this costs a prefill. The test split is not touched. Curves are lines of
phase "val" in metrics.jsonl.

With --keep best the trained weights of the step with the highest hit_ratio@1 (the earlier of equal
ones) are kept in <stage>.unfinished/best/ as a checkpoint, and are what is saved and tested.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from common import is_main, print0, read_json, writing
from runtime.checkpoint import checkpoints, damage, load_checkpoint, save_checkpoint
from runtime.runs import Run

SHOWN = ("hit_ratio@1", "valid_ratio", "ranking/hit_ratio@1", "ranking/mrr")
BEST_BY = "val/hit_ratio@1"


class Validation:
    """The validation of one stage."""

    def __init__(
        self,
        run: Run,
        stage: str,
        folder: Path,
        model,
        optimizer,
        identity: dict,
        evaluate: Callable,  # () -> metrics of the validation users on rank 0, else None
    ):
        self.evaluate = evaluate
        self.run, self.stage, self.model = run, stage, model
        self.stage_folder, self.folder = folder, folder / "best"
        self.metrics = folder / "metrics.jsonl"
        # what a kept step consists of: weights alone, no moments
        self.weights = SimpleNamespace(state={}, param_groups=optimizer.param_groups)
        self.identity = identity
        self.best: tuple[float, int] | None = None  # value, step

    def due(self, step: int, num_steps: int) -> bool:
        """Whether this many steps are to be validated."""
        every = self.run.config.eval_steps
        return self.run.val is not None and (step == num_steps or (every and step % every == 0))

    def __call__(self, step: int, replicas: int) -> None:
        """Evaluate after `step` steps, on all ranks; with --keep best the weights, if they are."""
        summary = self.evaluate()
        shared = [None]
        if is_main():
            shared = [{f"val/{name}": summary[name] for name in ("n", *SHOWN)}]
            self.log(step, shared[0])
        dist.broadcast_object_list(shared)
        value = shared[0][BEST_BY]
        if self.run.config.keep == "best" and (self.best is None or value > self.best[0]):
            self.best = (value, step)
            if is_main():
                with writing(self.folder):
                    self.folder.mkdir(exist_ok=True)
            dist.barrier()
            facts = self.identity | {"optimizer_steps": 0, "value": value}
            held = (self.model, self.weights)
            save_checkpoint(self.folder, step, *held, facts, replicas, keep=10**9)
            if not self.run.config.save_steps:  # no checkpoint comes by at which to prune
                self.forget_worse()

    def state(self) -> dict:
        """What a checkpoint must keep of it: which step's weights were the best until then."""
        return {"best_step": self.best[1]} if self.best else {}

    def log(self, step: int, metrics: dict) -> None:
        with writing(self.metrics), open(self.metrics, "a") as f:
            f.write(json.dumps({"phase": "val", "step": step, **metrics}) + "\n")
        shown = " | ".join(f"{name} {metrics[f'val/{name}']:.4f}" for name in SHOWN)
        print0(f"{self.stage:5} {step:5} | val n {metrics['val/n']} | {shown}")

    def forget_worse(self) -> None:
        """Keep the best step's files, and those that a checkpoint of the stage names as its best:
        a run may yet fall back to that one."""
        if not is_main() or self.best is None:
            return
        states = [read_json(folder / "state.json") for folder in checkpoints(self.stage_folder)]
        named = {self.best[1]} | {state.get("best_step") for state in states}
        for kept in checkpoints(self.folder):
            if int(kept.name.removeprefix("checkpoint-")) not in named:
                shutil.rmtree(kept)

    def resume(self, start: int) -> None:
        """Find the best step among those that a resumed run has behind it, and drop the others.

        Damaged ones are named and passed over. Every rank must call it."""
        shared = [checkpoints(self.folder) if is_main() else None]
        dist.broadcast_object_list(shared)
        for kept in reversed(shared[0]):  # the earliest first
            problem = damage(kept)
            if problem:
                print0(f"note: {kept} is damaged ({problem}); --keep best goes on without it")
            step = int(kept.name.removeprefix("checkpoint-"))
            if problem or step > start:
                if is_main():
                    shutil.rmtree(kept)
                continue
            value = read_json(kept / "state.json")["value"]
            if self.best is None or value > self.best[0]:
                self.best = (value, step)
        dist.barrier()

    def load_best(self, last: int) -> None:
        """With --keep best put the best step's weights into the model."""
        if self.best is None:
            return
        value, step = self.best
        print0(f"{self.stage}: keeping step {step} of {last}, {BEST_BY} {value:.4f}")
        if step != last:
            folder = self.folder / f"checkpoint-{step}"
            load_checkpoint(folder, self.model, self.weights, self.identity)
