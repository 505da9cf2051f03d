"""The estimator against what a real step holds, and the dry run as a user sees it."""

import dataclasses
import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from families import small_world
from launch import TINY, TRAIN, places, run_script

from data import build_tree
from lora import apply_lora
from losses import recpo_loss
from model import ModelConfig, Transformer
from runtime.estimate import LiveBytes, Workload, fake_step, memory_table
from train import TrainConfig, train_step

SMALL = ModelConfig("llama", 4000, 256, 704, 6, 4, 2, 64)


def test_live_bytes_are_those_of_living_tensors():
    with LiveBytes() as alive:
        a = torch.zeros(1000)
        view, b = a.view(10, 100)[2], a + 1
        assert alive.live == 8000
        del a, b
        assert alive.live == 4000 and alive.peak == 8000  # the view holds it
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


def workload(config, dtype=torch.float32, r=8, prompt=256, completions=COMPLETIONS, **facts):
    return Workload(config, dtype, r, prompt, completions, **facts)


def measured(config, r, checkpointing, B, P) -> int:
    """The peak of live tensor bytes over two real steps, weights and moments included."""
    with LiveBytes() as alive:
        model = Transformer(config)
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


@pytest.mark.parametrize("name", STEPS)
def test_the_estimate_is_within_a_tenth_of_a_real_step(group, name):
    """On configurations of at least 500 MB."""
    config, r, checkpointing, B, P = STEPS[name]
    step = fake_step(workload(config, r=r, prompt=P), B, checkpointing, gpu=False)
    peak = measured(*STEPS[name])
    assert peak > 500e6
    assert step.weights + step.trained + step.passing == pytest.approx(peak, rel=0.1)


def test_memory_of_an_8b_model_is_that_of_its_formulas():
    """Two layers of Llama-3.1-8B in bf16, and an adapter at r = 8 with gradients and moments; in
    4 bits a number of the projections takes 0.5625 bytes, all else stays 16-bit."""
    config = ModelConfig("llama", 128256, 4096, 14336, 2, 32, 8, 128, 1e-5, 5e5)
    facts = {"dtype": torch.bfloat16, "prompt": 512, "completions": [12] * 4}
    step = fake_step(workload(config, **facts), B=1)
    # numbers in the projections of two layers
    linear = 2 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    assert step.weights == 2 * (2 * 128256 * 4096 + linear + 5 * 4096)
    assert step.trained == 16 * 20_971_520 * 2 // 32
    assert step.gathered == step.weights  # two blocks and the root are the whole of it
    # forward and d x; attention, adapters, head besides
    assert step.flops == pytest.approx(2 * 2 * linear * (512 + 4 * 11), rel=0.15)
    four = fake_step(workload(config, load_in_4bit=True, **facts), B=1)
    assert step.weights - four.weights == linear * (2 - 0.5625)
    assert step.trained == four.trained and step.flops == four.flops


def test_the_table_adds_up():
    """A rank of 8 keeps an eighth, and whole: what is gathered, and between several micro-batches
    its adapters' gradients; what is left of a GPU holds so many prompts."""
    GB, W = 10**9, 1041
    step = SimpleNamespace(weights=16 * GB, trained=8 * GB, gathered=4 * GB, passing=5 * GB)

    def cells(r: int, batch_size: int) -> dict[tuple[str, str], list[str]]:
        """By ranks and --shard; two prompts take twice what `step` passes."""
        run = SimpleNamespace(world_size=1, config=SimpleNamespace(batch_size=batch_size))
        with patch("runtime.estimate.fake_step", lambda *_: SimpleNamespace(passing=10 * GB)):
            text = memory_table(workload(SMALL, r=r), W, 2, [step, step], run)
        rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
        return {(row[0], row[1]): row[2:] for row in rows}

    table = cells(r=8, batch_size=1000)
    assert table["1", "none"][:5] == ["16.00", "8.00", "0.00", "10.00", "34.00"]
    assert table["8", "full"][:5] == ["2.00", "2.75", "4.00", "10.00", "18.75"]
    # 24 GB are full without any prompt; 48 GB leave 24 GB, 4 prompts of 5
    assert table["1", "none"][7:9] == ["0 / 0", f"{4 * W:,} / {4 * W:,}"]
    assert cells(r=8, batch_size=16)["8", "full"][1] == "1.00"  # one micro-batch a rank
    assert cells(r=0, batch_size=1000)["8", "full"][1] == "1.00"  # each reduces its own


def test_dry_run_shows_what_to_look_at_and_reads_no_weights(tmp_path):
    """Example, truncation, first losses, memory table, hours of the whole run."""
    _, _, base = small_world(tmp_path)
    (base / "model.safetensors").unlink()
    flags = [*TINY, *places(tmp_path, "run"), f"--model={base}", "--dry_run"]
    flags += ["--stages=raw,sft,sdpo", "--sft_epochs=5", "--epochs=3", "--batch_size=64"]
    done = run_script(TRAIN, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    texts = ("first training prompt:", "shortened", "first preference loss: 1.3863", "| 8 | full |")
    assert all(text in done.stdout for text in texts), done.stdout
    assert "raw: memory" not in done.stdout  # nothing of it is trained
    steps = re.findall(r"([\d.e-]+) s on 1 rank.s. at .* times (\d+) steps", done.stdout)
    total = re.search(r"the whole run: ([\d.e-]+) h", done.stdout)[1]
    assert [n for _, n in steps] == ["5", "3"]
    assert float(total) * 3600 == pytest.approx(sum(float(s) * int(n) for s, n in steps), rel=0.01)
    assert not (tmp_path / "run").exists()
