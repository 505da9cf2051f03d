"""The sections of `torchrun --nproc_per_node N -m bench.gpu`: ranks against one another.

Every rank goes through every section, and an error on one ends all of them."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from harness import dtype_of, examples, make_model, synchronize, tree_of
from scaling import Step
from verdict import Row, at_least, at_most, figure

from runtime.policy import free_memory
from runtime.sharding import shard
from train import TrainConfig, train_step

NUM_NEGATIVES = 3


class RankStep(Step):
    """A RecPO step of one global batch, of which each rank has `prompts`; weights are the same."""

    def __init__(self, args, mode: str, prompts: int):
        self.world_size = dist.get_world_size()
        self.model = make_model(args).train()
        self.replicas = shard(self.model, mode, max(1, self.world_size // 2), args.device)
        self.prompts = prompts * self.world_size
        start = dist.get_rank() * prompts
        drawn = examples(args, self.prompts, 1 + NUM_NEGATIVES)
        self.trees = [tree_of(args, *(part[start : start + prompts] for part in drawn))]
        self.tokens = self.world_size * self.trees[0].input_ids.numel()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.config = TrainConfig()

    def metrics(self) -> dict[str, float]:
        arguments = (self.model, self.optimizer, self.trees, self.compute, 1e-4, self.config)
        return train_step(*arguments, self.replicas).read()

    def __call__(self) -> None:
        self.metrics()

    def without_communication(self) -> None:
        """Forward and backward where nothing is sharded; the gradients are thrown away."""
        self.compute(self.trees[0])[0].backward()
        self.optimizer.zero_grad(set_to_none=True)


def modes() -> list[str]:
    """hybrid needs two groups of two."""
    even = dist.get_world_size() >= 4 and dist.get_world_size() % 2 == 0
    return ["none", "full"] + ["hybrid"] * even


def median_seconds(way: Callable, repeats: int) -> float:
    """Of the slowest rank, which all wait for."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        way()
        synchronize()
        times.append(time.perf_counter() - started)
    slowest = torch.tensor(statistics.median(times[1:]), dtype=torch.double)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def environment(args) -> list[Row]:
    """Ranks and what carries their messages."""
    backend = "NCCL" if args.device == "cuda" else "gloo"
    return [figure("ranks", f"{dist.get_world_size()} over {backend}")]


def same_step(args) -> list[Row]:
    """Loss and gradient norm of three steps in each shard mode beside those of replicas."""
    found, rows = {}, []
    for mode in modes():
        step = RankStep(args, mode, 2)
        found[mode] = [step.metrics() for _ in range(3)]
        del step
        free_memory()
    limit = 1e-4 if dtype_of(args) == torch.float32 else 3e-2
    for mode in modes()[1:]:
        for name in ("loss", "grad_norm"):
            pairs = [(a[name], b[name]) for a, b in zip(found[mode], found["none"], strict=True)]
            far = max(abs(a - b) / abs(b) for a, b in pairs)
            rows.append(at_most(f"{name} of 3 steps, {mode} / none", far, limit, " relative"))
    return rows


def scaling(args) -> list[Row]:
    """A step of each mode beside forward and backward of one rank, which send nothing."""
    prompts, rows, alone = 2 if args.toy else 4, [], 0.0
    for mode in modes():
        step = RankStep(args, mode, prompts)
        seconds = median_seconds(step, args.repeats)
        if mode == "none":
            alone = median_seconds(step.without_communication, args.repeats)
            what = f"{1000 * alone:.0f} ms, {prompts} prompts a rank"
            rows.append(figure("forward and backward without messages", what))
        what = f"{1000 * seconds:.0f} ms, {step.tokens / seconds:,.0f} tokens/s"
        rows.append(figure(f"step, {mode}", what))
        share = at_least(f"of the speed without messages, {mode}", 100 * alone / seconds, 80, " %")
        rows.append(figure(share.name, share.figure) if args.toy else share)
        del step
        free_memory()
    return rows


SECTIONS = {"Environment": environment, "Shard modes": same_step, "Scaling": scaling}
