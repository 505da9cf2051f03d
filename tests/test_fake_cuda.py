"""A step as a GPU runs it, without one: on `meta`, which has shapes and no numbers.

Its tensors say here that they are CUDA's, so that the branches for a GPU are taken. A tensor that
was left on the CPU, and a number that the host would wait for, are errors. Triton is left out."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from families import small_world
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import encode_examples, tree_widths
from hub.tokenizer import Tokenizer
from runtime.processes import Schedule
from train import Objective, TrainConfig, load_policy, train_step

META = torch.device("meta")
KINDS = {"16 bits": {}, "checkpointing": {"gradient_checkpointing": True}}
KINDS["4 bits"] = {"load_in_4bit": True}


class OneDevice(TorchDispatchMode):
    """Refuses what meta tensors take and a GPU does not: products and gathers with a CPU tensor,
    products of two dtypes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
        if len({x.device.type for x in tensors}) > 1 and "copy" not in str(function):
            raise RuntimeError(f"{function}: tensors on more than one device")
        if "mm" in str(function) and len({x.dtype for x in tensors}) > 1:
            raise RuntimeError(f"{function}: products of two dtypes")
        if kwargs and kwargs.get("non_blocking") and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=args[0].dtype)  # nobody waits for this copy
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of a tiny base, encoded training examples)."""
    _, prepared, base = small_world(tmp_path_factory.mktemp("fake"))
    return base, encode_examples(prepared.splits["train"], Tokenizer(base), 1024)


@pytest.fixture(autouse=True)
def two_ranks():
    """Rank 0 of two whose collectives do nothing: the branches of more than one process run."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    with patch("torch.distributed.all_reduce"):
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["sft", "recpo", "kto"])
def test_a_step_runs_on_one_device_and_reads_no_number(world, stage, kind):
    """Forward, loss, backward, clipping and metrics, none of which wait for the device."""
    base, encoded = world
    stages = "sft" if stage == "sft" else f"sft,{stage}"
    defaults = {"stages": stages, "lora_dropout": 0.1, "shard": "none", "batch_size": 4}
    defaults["dtype"] = "bfloat16"
    config = TrainConfig(**defaults | KINDS[kind])
    model, replicas = load_policy(config, stage, base, None, torch.device("cpu"))
    model = model.to(META)
    on_card = property(lambda tensor: tensor.device == META)
    with (
        patch.object(Tensor, "is_cuda", on_card),
        patch("kernels.logps.HAS_TRITON", False),
        patch("kernels.nf4.HAS_TRITON", False),
        patch("torch.cuda.Event"),
        OneDevice(),
    ):
        objective = Objective(config, stage, model, encoded, META)
        schedule = Schedule(config, 1.0, tree_widths(encoded, objective.slots), 2)
        if stage != "sft":
            objective.reference_logps = torch.zeros(objective.slots.shape)
        optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad])
        optimizer.step = lambda: None  # fused AdamW has no kernel for meta
        examples = schedule.examples(0)
        batches = [objective.prepare(b, examples) for b in schedule.micro_batches(0, 0)]
        result = train_step(model, optimizer, batches, objective, 1e-4, config, replicas)
    assert {m.device for m in result.on_device.values()} == {META}
