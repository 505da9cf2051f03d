"""What runs on a GPU, run without one: every tensor of a step on its device, of its dtype.

Whole stages' parts as train.py and eval.py call them (loading, reference pass, step, one-pass
evaluation) on fake CUDA tensors: shapes, dtypes and devices, but no numbers. See fake_cuda.py.
"""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from fake_cuda import Card, WaitsForTheCard
from torch.testing._internal.distributed.fake_pg import FakeStore

from data import tree_widths
from demo.tiny import make_base_model
from eval import predict
from hub.tokenizer import Tokenizer
from kernels.logps import label_logps
from loaders.frozen import DataConfig, encode_split, prepare
from runtime.reference import reference_pass
from train import Objective, Schedule, TrainConfig, load_policy, train_step

CUDA = torch.device("cuda", 0)
DATA = {"planted_users": 150, "train_size": 16, "test_size": 4, "followers": 3}
KINDS = {
    "16 bits": {},
    "16 bits, checkpointing": {"gradient_checkpointing": True},
    "4 bits": {"load_in_4bit": True},
    "4 bits, checkpointing": {"load_in_4bit": True, "gradient_checkpointing": True},
}
FP32 = {"fp32": {"dtype": "float32"}, "all weights": {"dtype": "float32", "lora_r": 0}}
STEPS = [(stage, kind) for stage in ("sft", "recpo", "kto") for kind in KINDS]
STEPS += [("recpo", kind) for kind in FP32]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of a tiny base, its tokenizer, encoded training and test examples)."""
    folder = tmp_path_factory.mktemp("fake-cuda")
    prepared = prepare(DataConfig(**DATA, prepared_dir=str(folder / "prepared")))
    base = folder / "base"
    sizes = {"hidden_size": 64, "num_layers": 2, "vocab_size": 512}
    make_base_model(base, prepared.splits["train"], **sizes, seed=0)
    tokenizer = Tokenizer(base)
    encoded = [encode_split(prepared, split, tokenizer, 1024) for split in ("train", "test")]
    return base, tokenizer, *encoded


@pytest.fixture(autouse=True)
def two_ranks():
    """Rank 0 of two whose collectives do nothing: the branches of more than one process run."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def policy(world, card: Card, stage: str, **options):
    """A stage's options, its model read onto the card, and its objective."""
    stages = "sft" if stage == "sft" else f"sft,{stage}"
    defaults = {"stages": stages, "lora_dropout": 0.1, "shard": "none", "batch_size": 4}
    config = TrainConfig(**defaults | options)
    card.may_wait = True  # what is quantised is looked at, once
    model, replicas = load_policy(config, stage, world[0], None, CUDA)
    card.may_wait = False
    return config, model, Objective(config, stage, model, world[2], CUDA), replicas


def run_steps(config, model, objective, replicas, steps: int = 1):
    """Reference pass and steps, as run_stage calls them; optimizer and metrics of the last one."""
    schedule = Schedule(config, 1.0, tree_widths(objective.encoded, objective.slots), 2)
    if objective.has_reference:
        objective.reference_logps = reference_pass(objective, schedule, 0)
        objective.reference_logps.nan_to_num_()
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for step in range(steps):
        examples = schedule.examples(step)
        batches = [objective.prepare(b, examples) for b in schedule.micro_batches(step, 0)]
        result = train_step(model, optimizer, batches, objective, 1e-4, config, replicas)
        objective.after_step(result.on_device.__getitem__)
    return optimizer, result


@pytest.mark.parametrize("stage, kind", STEPS)
def test_a_step_runs_on_the_card_alone(world, stage, kind):
    """Loading, reference pass, forward, loss, backward, clipping, fused AdamW, metrics."""
    with Card() as card:
        config, model, objective, replicas = policy(world, card, stage, **(KINDS | FP32)[kind])
        steps = 2 if stage == "kto" else 1  # whose second one knows of the first
        optimizer, result = run_steps(config, model, objective, replicas, steps)
        assert {p.device for p in model.parameters()} == {CUDA}
        for state in optimizer.state.values():
            assert {(t.device, t.dtype) for t in state.values()} == {(CUDA, torch.float32)}
        assert {m.device for m in result.on_device.values()} == {CUDA}
        metrics = result.read()
    assert metrics["learning_rate"] == 1e-4 and {"loss", "grad_norm"} <= metrics.keys()
    assert ("_dequantize_kernel" in card.launches) == ("4 bits" in kind)
    assert "_statistics_kernel" in card.launches


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("decode", ["greedy", "trie"])
def test_an_evaluation_batch_runs_on_the_card_alone(world, decode, load_in_4bit):
    """eval.predict's one pass; records are made from what arrives on the host."""
    _, tokenizer, _, test = world
    with Card() as card, torch.no_grad():
        _, model, _, _ = policy(world, card, "sft", load_in_4bit=load_in_4bit)
        arguments = (range(len(test.prompts)), decode, False)
        records = predict(model.eval(), tokenizer, test, *arguments)
    assert len(records) == len(test.prompts) and len(records[0]["logps"]) == 20


def test_free_decoding_runs_on_the_card(world):
    """model.generate: cache, positions and masks; it reads each new id, which is its work."""
    _, tokenizer, _, test = world
    with Card() as card, torch.no_grad():
        _, model, _, _ = policy(world, card, "sft")
        records = predict(model.eval(), tokenizer, test, range(2), "generate")
    assert [r["how"] for r in records] == ["generated", "generated"]


# ------------------------------------------------------------------------ that it catches
def planted(world, stage: str, plant, **options):
    """A step after plant(objective, model) has spoilt something."""
    with Card() as card:
        config, model, objective, replicas = policy(world, card, stage, **options)
        plant(objective, model)
        run_steps(config, model, objective, replicas)


def leaves_behind(name: str):
    """An objective whose micro-batches keep one of their tensors on the CPU."""

    def plant(objective, model) -> None:
        prepare = objective.prepare

        def spoilt(batch, examples):
            prepared = prepare(batch, examples)
            shape, dtype = getattr(prepared, name).shape, getattr(prepared, name).dtype
            setattr(prepared, name, torch.zeros(shape, dtype=dtype))
            return prepared

        objective.prepare = spoilt

    return plant


def kl_on_the_host(objective, model) -> None:
    objective.kl = torch.zeros(1)


def loss_is_read(objective, model) -> None:
    after = objective.after_step
    objective.after_step = lambda metrics: (after(metrics), metrics("loss").item())


@pytest.mark.parametrize("name", ["phi", "reference_logps", "lengths", "chosen"])
def test_a_tensor_left_on_the_cpu_is_found(world, name):
    """Each tensor of a micro-batch that the loss uses."""
    stage = {"lengths": "simpo", "chosen": "cpo"}.get(name, "recpo")
    with pytest.raises(RuntimeError, match="(?i)device|on the CPU"):
        planted(world, stage, leaves_behind(name))


def test_kto_baseline_left_on_the_cpu_is_found(world):
    """Of one dimension: a number without any may come from the host, on a card too."""
    with pytest.raises(RuntimeError, match="(?i)device"):
        planted(world, "kto", kl_on_the_host)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_wrong_dtype_is_found(world, load_in_4bit):
    """Products of two dtypes, which fake tensors alone let pass."""
    spoilt = patch("kernels.lora.mm_fp32", lambda a, b: torch.mm(a.float(), b))
    with spoilt, pytest.raises(RuntimeError, match="expected one dtype"):
        planted(world, "sft", lambda *_: None, load_in_4bit=load_in_4bit)


def test_a_number_read_during_a_step_is_found(world):
    """The host must not wait for the card between two steps."""
    with pytest.raises(WaitsForTheCard):
        planted(world, "recpo", loss_is_read)


def test_a_cpu_tensor_given_to_a_kernel_is_found():
    """Triton refuses it when it launches."""
    with Card() as card:
        hidden, weight = (torch.ones(n, 64).to(CUDA) for n in (3, 100))
        labels = torch.zeros(3, dtype=torch.int64)
        with pytest.raises(ValueError, match="pointer labels is a CPU tensor"):
            label_logps(hidden, weight, labels)
        label_logps(hidden, weight, labels.to(CUDA))
    assert card.launches == ["_statistics_kernel"]
