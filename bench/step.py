"""Compare a training step here with the usual way to write it, on the same weights and batch.

    python -m bench.step                      --help lists the sizes

Here: one PromptTree per prompt, log-probs of the scored rows, reference log-probs kept. The usual
way: one full sequence per completion (1 + K of a prompt) through policy and reference; logits of
every position, log_softmax in fp32, gather; adapters as peft has them. Its blocks are transformers'
where it is installed, else ours; its micro-batch is the fastest of those that fit. Both run
forward, loss, backward, clipping and fused AdamW.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import (
    MARGIN,
    Sizes,
    Step,
    make_batch,
    make_model,
    matrix_rate,
    medians,
    peak_gb,
    run,
)
from common import parse_config
from hub.config import hf_config
from losses import recpo_loss
from model import Transformer, inverse_frequencies

PEER = importlib.util.find_spec("transformers") is not None


# ------------------------------------------------------------------------ the usual way
class NaiveLoRA(nn.Module):
    """W x + scaling · B A x, one after the other, with the weight of the layer it copies."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias, self.scaling = layer.weight, layer.bias, layer.scaling
        self.lora_A = nn.Parameter(layer.lora_A.weight.detach().clone())
        self.lora_B = nn.Parameter(layer.lora_B.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + self.scaling * low


def naive_model(ours: Transformer, peer: bool = False) -> nn.Module:
    """The same blocks, ours or transformers', with copies of the adapters written naively.

    Base weights are shared, not copied."""
    if peer:
        model = transformers_model(ours)
    else:
        with torch.device("meta"):
            model = Transformer(ours.config)
        missing, _ = model.load_state_dict(ours.state_dict(), strict=False, assign=True)
        assert not missing, missing
        model.inv_freq = inverse_frequencies(ours.config).to(ours.inv_freq.device)
    model.requires_grad_(False)
    for name, layer in ours.named_modules():
        if hasattr(layer, "lora_A"):
            parent, _, short = name.rpartition(".")
            setattr(model.get_submodule(parent), short, NaiveLoRA(layer))
    return model


def transformers_model(ours: Transformer) -> nn.Module:
    """transformers' model of the same weights, not copied; ImportError if it is missing."""
    import transformers

    raw = {k: v for k, v in hf_config(vars(ours.config)).items() if k != "architectures"}
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device(ours.inv_freq.device):
        dtype = ours.lm_head.weight.dtype
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, _ = theirs.load_state_dict(ours.state_dict(), strict=False, assign=True)
    assert not missing, missing
    return theirs


def usual_logps(model: nn.Module, prompts: list, completions: list) -> Tensor:
    """(B, N) by full sequences, whose prompts are equally long: logits of all positions in fp32."""
    rows = [p + c for p, group in zip(prompts, completions, strict=True) for c in group]
    input_ids = torch.tensor(rows, device=next(model.parameters()).device)  # (B N, T)
    if isinstance(model, Transformer):
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = positions.expand_as(input_ids)
        hidden = model.hidden_states(input_ids, positions, input_ids.shape[1], None)
        logits = model.lm_head(hidden)
    else:
        logits = model(input_ids=input_ids, use_cache=False).logits
    token_logps = logits[:, :-1].float().log_softmax(-1).gather(2, input_ids[:, 1:, None])
    return token_logps[:, len(prompts[0]) - 1 :].sum((1, 2)).view(len(prompts), -1)


class Usual:
    """A RecPO step written the usual way; a copy of the model is its reference."""

    def __init__(self, ours: Transformer, batch, checkpointing=False, peer=PEER, micro_batch=0):
        self.batch = batch
        self.model, self.reference = naive_model(ours, peer), naive_model(ours, peer)
        if checkpointing and peer:
            self.model.train().gradient_checkpointing_enable()
        for block in self.model.model.layers:
            block.checkpointing = checkpointing  # of ours
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.micro_batch = micro_batch or self.fastest()

    def backward(self) -> float:
        """The loss; gradients are left in the parameters."""
        total, num_prompts = 0.0, len(self.batch[0])
        for i in range(0, num_prompts, self.micro_batch):
            prompts, completions = (rows[i : i + self.micro_batch] for rows in self.batch)
            with torch.no_grad():
                reference = usual_logps(self.reference, prompts, completions)
            logps = usual_logps(self.model, prompts, completions)
            margins = torch.full_like(logps[:, 1:], MARGIN)
            loss = recpo_loss(logps, reference, margins, beta=1.0)[0].sum() / num_prompts
            loss.backward()
            total += loss.item()
        return total

    def __call__(self) -> float:
        loss = self.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.3)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def fastest(self) -> int:
        """The fastest micro-batch of 1, 2, 4, ... prompts, up to the first that does not fit."""
        tried, size = {}, 1
        while size <= len(self.batch[0]):
            self.micro_batch = size
            try:
                tried[size] = medians({"step": self}, 0, rounds=1)["step"]
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
                break
            size *= 2
        return min(tried, key=tried.get)


# ------------------------------------------------------------------------ figures
def alone(step: Step, sizes: Sizes) -> str:
    """Time, speed, share of the matrix rate, and memory on top of what is held."""
    s = medians({"step": step}, sizes.seconds)["step"]
    share = f"{step.flops() / s / matrix_rate(sizes):.0%} of the matrix rate"
    return f"{1000 * s:.0f} ms, {step.tokens / s:,.0f} tokens/s, {share}, {peak_gb(step)}"


def figures(sizes: Sizes) -> dict[str, Callable[[], str]]:
    """The figures, the most important first."""
    batch = make_batch(sizes)

    def here(four_bit=False, naive=False, **switches) -> Step:
        model = make_model(sizes, four_bit)
        return Step(naive_model(model) if naive else model, batch, **switches)

    def usual(checkpointing: bool) -> str:
        way = Usual(make_model(sizes), batch, checkpointing)
        s = medians({"usual": way, "here": here()}, sizes.seconds)
        how = f"{'transformers' if PEER else 'our own'} blocks, {way.micro_batch} prompts at a time"
        ratio = f"{s['usual'] / s['here']:.1f} times as long"
        return f"{1000 * s['usual']:.0f} ms, {ratio}, {how}, {peak_gb(way)}"

    return {
        "RecPO step": lambda: alone(here(), sizes),
        "the usual way": partial(usual, False),
        "the usual way, checkpointing": partial(usual, True),
        "RecPO step, 4 bits": lambda: alone(here(four_bit=True), sizes),
        "RecPO step, checkpointing": lambda: alone(here(checkpointing=True), sizes),
        "RecPO step, adapters written naively": lambda: alone(here(naive=True), sizes),
        "RecPO step, compiled": lambda: alone(here(compiled=True), sizes),
    }


if __name__ == "__main__":
    run(figures, "A training step here and the usual way", parse_config(Sizes))
