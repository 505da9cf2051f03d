"""A training step here against the same step written the usual way, on the same examples, weights.

    python bench/step.py                        Markdown tables; --help lists the sizes

usual   transformers + peft: one padded full sequence per completion (K + 1 per prompt), through the
        policy and, for preferences, through a second model as the reference; logits of every
        position in fp32, log_softmax, gather. Its micro-batch is the fastest of those tried; with
        and without gradient checkpointing (the authors use it).
here    one PromptTree per prompt, log-probs of the scored rows only, reference log-probs computed
        once and kept.

Both sides run forward, loss, backward, clipping and fused AdamW. Times are medians of interleaved
repetitions in one process; peak memory is what the first step adds to the loaded policy, in a
process of its own on a CPU.
"""

import sys

import torch
from harness import (
    LORA_ALPHA,
    LORA_RANK,
    dtype_of,
    examples,
    header,
    in_fresh_process,
    interleaved,
    make_model,
    one_process,
    parser,
    peak_mib,
    table,
    transformers_model,
    tree_of,
)

from lora import TARGET_MODULES
from losses import recpo_loss, sft_loss
from model import Transformer
from train import TrainConfig, train_step

NUM_NEGATIVES = 3
MARGIN = 6.0  # λ φ_w / φ_l of every pair


# ------------------------------------------------------------------------------------ the usual way
def peft_model(ours: Transformer):
    """The same weights in transformers, the same adapter in peft."""
    model = transformers_model(ours)
    import peft

    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        target_modules=list(TARGET_MODULES),
    )
    model = peft.get_peft_model(model, settings)
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if ".lora_" in name:
                theirs[f"base_model.model.{name}".replace(".weight", ".default.weight")].copy_(p)
    return model


def usual_logps(model, prompts, completions, device) -> torch.Tensor:
    """(B, N) from padded full sequences and the full logits in fp32."""
    rows = [p + c for p, group in zip(prompts, completions, strict=True) for c in group]
    starts = [len(p) for p, group in zip(prompts, completions, strict=True) for _ in group]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    positions = torch.arange(width, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]
    starts = torch.tensor(starts, device=device)[:, None]
    mask = (positions < lengths).long()
    output = model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    logits = output.logits[:, :-1].to(torch.float32)  # (B N, T - 1, V)
    token_logps = logits.log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    scored = ((positions >= starts) & (positions < lengths))[:, 1:]
    return (token_logps * scored).sum(1).view(len(prompts), -1)


class Usual:
    def __init__(self, ours: Transformer, kind: str, checkpointing: bool, reference=None):
        self.kind, self.device = kind, ours.inv_freq.device
        self.model = peft_model(ours)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.model.train()
        self.reference = reference or (peft_model(ours).eval() if kind == "recpo" else None)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

    def step(self, prompts, completions, micro_batch: int, update: bool = True) -> float:
        total = 0.0
        tokens = sum(len(group[0]) for group in completions)
        for i in range(0, len(prompts), micro_batch):
            batch = prompts[i : i + micro_batch], completions[i : i + micro_batch]
            logps = usual_logps(self.model, *batch, self.device)
            if self.kind == "sft":
                loss = -logps.sum() / tokens
            else:
                with torch.no_grad():
                    reference = usual_logps(self.reference, *batch, self.device)
                margins = torch.full((len(logps), NUM_NEGATIVES), MARGIN, device=self.device)
                loss = recpo_loss(logps, reference, margins, beta=1.0)[0].sum() / len(prompts)
            loss.backward()
            total += loss.item()
        if update:
            torch.nn.utils.clip_grad_norm_(self.parameters, 0.3)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return total


# ------------------------------------------------------------------------------------- this project
class Here:
    def __init__(self, model: Transformer, kind: str, prompts, completions, args):
        self.model, self.kind, self.args = model.train(), kind, args
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.num_prompts, self.tokens = len(prompts), sum(len(group[0]) for group in completions)
        size = args.tree_batch or len(prompts)
        starts = range(0, len(prompts), size)
        self.trees = [
            tree_of(args, prompts[i : i + size], completions[i : i + size]) for i in starts
        ]
        self.reference_logps = [
            torch.zeros(len(t.input_ids), t.num_completions, device=args.device) for t in self.trees
        ]
        self.config = TrainConfig(max_grad_norm=0.3)

    @torch.no_grad()
    def reference_pass(self) -> None:
        self.reference_logps = [tree.sum_logps(self.model(tree)[0]) for tree in self.trees]

    def compute(self, number: int):
        tree = self.trees[number]
        token_logps, _ = self.model(tree)
        if self.kind == "sft":
            loss = sft_loss(token_logps, self.tokens)
        else:
            logps = tree.sum_logps(token_logps)
            margins = torch.full((len(logps), NUM_NEGATIVES), MARGIN, device=logps.device)
            losses, _ = recpo_loss(logps, self.reference_logps[number], margins, beta=1.0)
            loss = losses.sum() / self.num_prompts
        return loss, {"loss": (loss.detach(), 1.0 / len(self.trees))}

    def step(self) -> float:
        numbers = range(len(self.trees))
        done = train_step(self.model, self.optimizer, numbers, self.compute, 1e-5, self.config)
        return done.read()["loss"]


def moved(model: Transformer) -> None:
    """A policy that has left its reference: the losses then compare more than zeros."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(1.5)


def compare(kind: str, args) -> None:
    """The tables of one loss, "recpo" or "sft"."""
    prompts, completions = examples(args, args.batch, 1 + NUM_NEGATIVES if kind == "recpo" else 1)
    model = make_model(args)
    plain = Usual(model, kind, checkpointing=False)
    checkpointed = Usual(model, kind, checkpointing=True, reference=plain.reference)
    usual = {"plain": plain, "checkpointed": checkpointed}
    here = Here(model, kind, prompts, completions, args)
    if kind == "recpo":
        here.reference_pass()
        for u in usual.values():
            moved(u.model)
        moved(model)
    agreement = same_before_update(here, plain, prompts, completions, args)

    sizes = [size for size in (1, 2, 4, 8, 16) if size <= args.batch]
    best = {name: fastest(u, prompts, completions, sizes) for name, u in usual.items()}
    ways = {}
    for name, u in usual.items():
        ways[name] = lambda u=u, size=best[name]: u.step(prompts, completions, size)
    ways["here"] = here.step
    if kind == "recpo":
        ways["reference pass"] = here.reference_pass
    seconds = interleaved(ways, args.repeats)
    peak = peaks(kind, ways, best, args)
    name = "RecPO, K = 3" if kind == "recpo" else "SFT"
    print(f"{name}: {agreement}\n")
    print_steps(f"{name} step", kind, seconds, peak, best)


def same_before_update(here: Here, usual: Usual, prompts, completions, args) -> str:
    """How far the two sides agree on loss and gradients, before any update."""
    usual_loss = usual.step(prompts, completions, args.batch, update=False)
    if len(here.trees) > 1:
        return (
            f"loss {usual_loss:.6f} (usual) and nan (here); "
            "largest relative gradient difference not compared"
        )
    loss = here.compute(0)[0]
    loss.backward()
    ours, gap = dict(here.model.named_parameters()), 0.0
    for name, p in usual.model.named_parameters():
        if p.requires_grad:
            own = ours[name.removeprefix("base_model.model.").replace(".default", "")]
            difference = (own.grad - p.grad).abs().max() / p.grad.abs().max()
            gap = max(gap, difference.item())
    for p in (*here.parameters, *usual.parameters):
        p.grad = None
    if dtype_of(args) == torch.float32:
        assert abs(loss.item() - usual_loss) < 1e-4, (loss.item(), usual_loss)
    return (
        f"loss {usual_loss:.6f} (usual) and {loss.item():.6f} (here); "
        f"largest relative gradient difference {gap:.1e}"
    )


def fastest(usual: Usual, prompts, completions, sizes: list[int]) -> int:
    """The micro-batch of these sizes with the quickest step."""
    tried = {}
    for size in sizes:
        way = {size: lambda size=size: usual.step(prompts, completions, size)}
        try:
            tried |= interleaved(way, 1)
        except torch.OutOfMemoryError:  # larger ones will not fit either
            usual.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            break
    return min(tried, key=tried.get)


def peaks(kind: str, ways: dict, best: dict[str, int], args) -> dict[str, float]:
    """MiB that a step of each side adds."""
    names = ("plain", "checkpointed", "here")
    if args.device == "cuda":  # the models fill the GPU, a second process would not fit beside them
        return {name: peak_mib(ways[name]) for name in names}
    argv, peak = [*sys.argv, "--kind", kind], {}
    for name in names:
        own = ["--peak_of", name, "--micro_batch", str(best.get(name, 0))]
        peak[name] = in_fresh_process([*argv, *own])
    return peak


def print_steps(title: str, kind: str, seconds: dict, peak: dict, best: dict[str, int]) -> None:
    what, kept = "transformers + peft", ""
    if kind == "recpo":
        what, kept = "transformers + peft, policy and reference", ", reference kept"
    plain, checkpointed, here = seconds["plain"], seconds["checkpointed"], seconds["here"]
    same = f"the same, checkpointing, micro-batch {best['checkpointed']}"
    steps = [
        (f"{what}, micro-batch {best['plain']}", plain, peak["plain"]),
        (same, checkpointed, peak["checkpointed"]),
        (f"here{kept}", here, peak["here"]),
    ]
    if kind == "recpo":
        spread = here + seconds["reference pass"] / 3
        steps.append(("here, reference pass spread over 3 epochs", spread, peak["here"]))
    rows = []
    for name, s, mib in steps:
        ratios = [f"{plain / s:.1f}", f"{checkpointed / s:.1f}"]
        rows.append([name, f"{1000 * s:.0f}", *ratios, f"{mib:.0f}"])
    columns = [title, "median ms", "plain / this", "checkpointed / this"]
    table([*columns, "peak memory added, MiB"], rows)


def main() -> None:
    options = parser(__doc__, batch=4, repeats=5, tree_batch=0, micro_batch=0)
    options.add_argument("--kind", choices=("both", "recpo", "sft"), default="both")
    options.add_argument(
        "--peak_of",
        choices=("plain", "checkpointed", "here"),
        help="print the peak of one side and stop",
    )
    args = options.parse_args()
    one_process()
    kinds = ["recpo", "sft"] if args.kind == "both" else [args.kind]
    if args.peak_of:
        print_peak(kinds[0], args)
        return
    prompts, completions = examples(args, args.batch, 1 + NUM_NEGATIVES)
    lengths = [len(p) for p in prompts]
    answers = [len(c) for group in completions for c in group]
    source = "MovieLens-1M" if args.data_dir else "random ids"
    header(
        "One training step against the usual way",
        args,
        f"Shape {args.shape}, {args.batch} prompts a step, {source}: prompts of {min(lengths)} to "
        f"{max(lengths)} tokens, completions of {sum(answers) / len(answers):.1f} on average.",
    )
    for kind in kinds:
        compare(kind, args)


def print_peak(kind: str, args) -> None:
    """MiB that a step of --peak_of adds."""
    prompts, completions = examples(args, args.batch, 1 + NUM_NEGATIVES if kind == "recpo" else 1)
    model = make_model(args)
    if args.peak_of == "here":
        print(peak_mib(Here(model, kind, prompts, completions, args).step))
        return
    usual = Usual(model, kind, args.peak_of == "checkpointed")
    print(peak_mib(lambda: usual.step(prompts, completions, args.micro_batch)))


if __name__ == "__main__":
    main()
