"""The estimator against what a real step holds, and the dry run as a user sees it."""

import dataclasses
import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from families import make_base_model
from launch import TRAIN, run_script

from data import build_tree
from hub.quantized import Linear4bit, to_4bit
from loaders.frozen import DataConfig, prepare
from lora import apply_lora
from losses import recpo_loss
from model import ModelConfig, Transformer
from runtime.estimate import LiveBytes, Workload, fake_step, memory_table
from train import TrainConfig, train_step

SMALL = ModelConfig("llama", 4000, 256, 704, 6, 4, 2, 64)


def test_live_bytes_are_those_of_living_tensors():
    """Storages are counted once, views not at all, and freed ones no more; the peak stays."""
    with LiveBytes() as alive:
        a = torch.zeros(1000)
        view = a.view(10, 100)[2]
        assert alive.live == 4000
        b = a + 1
        assert alive.live == 8000
        del b
        assert alive.live == 4000 and alive.peak == 8000
        del a
        assert alive.live == 4000  # the view holds it
        del view
        assert alive.live == 0


# config, LoRA rank (0: all weights), checkpointing, prompts, tokens of each
WIDE = dataclasses.replace(SMALL, vocab_size=64000, hidden_size=768, intermediate_size=2048)
FULL = dataclasses.replace(SMALL, vocab_size=30000, hidden_size=512, intermediate_size=1408)
STEPS = {
    "LoRA": (SMALL, 8, False, 10, 512),
    "LoRA, checkpointing": (WIDE, 8, True, 2, 256),
    "all weights": (FULL, 0, False, 2, 256),
}
COMPLETIONS = [12, 9, 14, 10]
WIDTH = 1000 + sum(n - 1 for n in COMPLETIONS)


def workload(config, dtype=torch.float32, r=8, prompt=256, completions=COMPLETIONS, **facts):
    return Workload(config, dtype, r, prompt, completions, **facts)


def measured(config, r, checkpointing, B, P, load_in_4bit) -> int:
    """The peak of live tensor bytes over two real steps, weights and moments included."""
    with LiveBytes() as alive:
        model = Transformer(config)
        if load_in_4bit:
            to_4bit(model)
            for layer in model.modules():
                if isinstance(layer, Linear4bit):
                    layer.weight.zero_()
                    layer.absmax.zero_()
            alive.peak = alive.live  # a real model is read into its codes
        if r:
            apply_lora(model, r, 2 * r)
        for block in model.model.layers:
            block.checkpointing = checkpointing
        tree = build_tree([[1] * P] * B, [[[2] * n for n in COMPLETIONS]] * B)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

        def compute(tree):
            logps = tree.sum_logps(model(tree)[0])
            loss = recpo_loss(logps, logps.detach(), torch.ones(B, 3), 1.0)[0].mean()
            return loss, {"loss": (loss.detach(), 1.0)}

        for _ in range(2):
            train_step(model, optimizer, [tree], compute, 1e-4, TrainConfig()).read()
    return alive.peak


@pytest.mark.parametrize(
    ("name", "in_4bit"),
    [*((name, False) for name in STEPS), pytest.param("LoRA", True, marks=pytest.mark.slow)],
)
def test_the_estimate_is_within_a_tenth_of_a_real_step(group, name, in_4bit):
    """On configurations of at least 500 MB."""
    config, r, checkpointing, B, P = STEPS[name]
    work = workload(config, r=r, prompt=P, load_in_4bit=in_4bit)
    step = fake_step(work, B, checkpointing, gpu=False)
    peak = measured(*STEPS[name], in_4bit)
    assert peak > 500e6
    assert step.weights + step.trained + step.passing == pytest.approx(peak, rel=0.1)


def test_memory_of_an_8b_model_is_that_of_its_formulas():
    """Llama-3.1-8B in bf16: 16.06 GB of weights, 0.34 GB of adapter,
    gradients and moments at r = 8, both ways of 16 FLOP."""
    config = ModelConfig("llama", 128256, 4096, 14336, 2, 32, 8, 128, 1e-5, 5e5)
    step = fake_step(workload(config, torch.bfloat16, prompt=512, completions=[12] * 4), B=1)
    # numbers in the projections of two layers
    linear = 2 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    assert step.weights == 2 * (2 * 128256 * 4096 + linear + 5 * 4096)
    assert step.trained == 16 * 20_971_520 * 2 // 32
    tokens = 512 + 4 * 11
    # forward and d x; attention, adapters, head besides
    assert step.flops == pytest.approx(2 * 2 * linear * tokens, rel=0.15)
    # two blocks and the root are the whole of it
    assert step.gathered == step.weights


def test_a_base_in_4_bits_is_counted_as_codes_and_absmax():
    """0.5625 bytes for each number of the projections; embedding, head and norms stay 16-bit."""
    config = dataclasses.replace(SMALL, vocab_size=1000)
    whole, four = (
        fake_step(workload(config, torch.bfloat16, prompt=64, load_in_4bit=bits), B=1)
        for bits in (False, True)
    )
    D, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    of_layer = 2 * D * D + 2 * D * kv + 3 * D * config.intermediate_size
    saved = config.num_hidden_layers * of_layer * (2 - 0.5625)
    assert whole.weights - four.weights == saved
    assert whole.trained == four.trained and whole.flops == four.flops


def test_dry_run_shows_what_to_look_at_and_reads_no_weights(tmp_path):
    """Example, truncation, first losses, memory table, hours of the whole run:
    from config.json and tokenizer.json alone."""
    data = {"planted_users": 150, "train_size": 20, "test_size": 8, "followers": 3}
    data["prepared_dir"], bare = str(tmp_path / "p"), tmp_path / "bare"
    examples = prepare(DataConfig(**data)).splits["train"]
    make_base_model(bare, examples, hidden_size=64, num_layers=2, vocab_size=512, seed=0)
    (bare / "model.safetensors").unlink()
    flags = [f"--{name}={value}" for name, value in data.items()]
    flags += ["--stages=raw,sft,sdpo", "--sft_epochs=5", "--epochs=3", "--dry_run"]
    flags += [f"--model={bare}", f"--output_dir={tmp_path / 'run'}"]
    done = run_script(TRAIN, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    for text in (
        "first training prompt:", "shortened",
        "the first loss must be 1.3863", "| 8 | full |", "tokens in 141 GB",
        "25 GFLOP/s a thread", "of training on 1 rank(s)",
    ):  # fmt: skip
        assert text in done.stdout, text
    assert "raw: memory" not in done.stdout  # nothing of it is trained
    steps = re.findall(r"([\d.e-]+) s on 1 rank.s. at .* times (\d+) steps", done.stdout)
    total = re.search(r"the whole run: ([\d.e-]+) h", done.stdout)[1]
    assert [n for _, n in steps] == ["5", "3"]
    assert float(total) * 3600 == pytest.approx(sum(float(s) * int(n) for s, n in steps), rel=0.01)
    assert not (tmp_path / "run").exists()


def test_targets_in_the_prompt_take_memory_and_time():
    """With a history of 100 tokens scored, the head works for 100 more rows of each prompt."""
    config = dataclasses.replace(SMALL, vocab_size=30000)
    plain, scored = (
        fake_step(workload(config, completions=[8], history=n), B=2, gpu=False) for n in (0, 100)
    )
    rows = 2 * 100
    head = 2 * rows * config.hidden_size * config.vocab_size  # of one pass over them
    assert 2 * head <= scored.flops - plain.flops <= 3 * head
    assert scored.passing - plain.passing >= rows * config.hidden_size * 4


def table_of(step, r: int, batch_size: int) -> dict[tuple[str, str], list[str]]:
    """Cells of memory_table by ranks and --shard; two prompts take twice what `step` passes."""
    run = SimpleNamespace(world_size=1, config=SimpleNamespace(batch_size=batch_size))
    double = SimpleNamespace(passing=2 * step.passing)
    with patch("runtime.estimate.fake_step", return_value=double):
        text = memory_table(workload(SMALL, r=r, prompt=1000), WIDTH, 2, [step, step], run)
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return {(row[0], row[1]): row[2:] for row in cells}


def test_the_table_adds_up():
    """A rank of 8 keeps an eighth, and whole: what is gathered, and between several micro-batches
    its adapters' gradients; what is left of a GPU holds so many prompts."""
    GB = 10**9
    step = SimpleNamespace(weights=16 * GB, trained=8 * GB, gathered=4 * GB, passing=5 * GB)
    table = table_of(step, r=8, batch_size=1000)
    assert table["1", "none"][:5] == ["16.00", "8.00", "0.00", "10.00", "34.00"]
    assert table["8", "full"][:5] == ["2.00", "2.75", "4.00", "10.00", "18.75"]
    # 24 GB are full without any prompt; 48 GB leave 24 GB, 4 prompts of 5
    assert table["1", "none"][7:9] == ["0 / 0", f"{4 * WIDTH:,} / {4 * WIDTH:,}"]
    assert table_of(step, r=8, batch_size=16)["8", "full"][1] == "1.00"  # one micro-batch a rank
    assert table_of(step, r=0, batch_size=1000)["8", "full"][1] == "1.00"  # each reduces its own
