"""The sections of `python -m bench.gpu` in one process: each a function of its options -> rows.

Right first, then fast: kernels against float64, a tree against sequences, first rewards, one pass
against free decoding; then a training step of an 8B model's shape, head, 4-bit weights, evaluation.

Legend: M scored rows, D hidden_size, V vocab_size, B prompts of a micro-batch."""

import gc
import importlib.util
from dataclasses import replace
from functools import partial

import torch
from harness import (
    SHAPES,
    dtype_of,
    examples,
    interleaved,
    make_model,
    matrix_rate,
    synchronize,
    tree_of,
)
from head import eager, exact_logps, gradient_call, peers
from scaling import Step
from verdict import Row, at_least, at_most, figure, holds, skipped

from data import build_tree
from hub.quantized import to_4bit
from kernels.logps import HAS_TRITON, label_logps
from kernels.lora import adapted_projections, adapted_projections_reference
from kernels.nf4 import dequantize_nf4, dequantize_nf4_reference, quantize_nf4
from lora import TARGET_MODULES, apply_lora
from model import ModelConfig, Transformer, generate, inverse_frequencies
from runtime.estimate import LiveBytes, Workload, fake_step
from runtime.sharding import GB, device_memory

NUM_NEGATIVES = 3
SHARE_GOAL = 50  # % of the card's own matrix rate that a step should reach
HEAD_GOAL_MS = 14.0  # Llama-3.1-8B, M = 4,096, H200; two GEMMs at 790 TFLOP/s take 10.9


def shape(args) -> ModelConfig:
    config = SHAPES[args.shape]
    return replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def goal(row: Row, args) -> Row:
    """A speed has a goal on a card alone; a toy's is a figure."""
    return figure(row.name, row.figure) if args.toy else row


# ------------------------------------------------------------------------ what is here
def environment(args) -> list[Row]:
    """Card, versions, and what the card reaches: its rates are the measure of all else."""
    rows = [figure("torch, CUDA", f"{torch.__version__}, {torch.version.cuda or 'none'}")]
    if HAS_TRITON:
        import triton

        rows.append(figure("Triton", triton.__version__))
    memory = device_memory(torch.device(args.device)) / GB
    rows.append(figure("memory", f"{memory:.0f} GB"))
    if args.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        what = f"{card.multi_processor_count} multiprocessors, sm_{card.major}{card.minor}"
        rows.append(figure("card", what))
    args.rate = matrix_rate(args, 64 if args.toy else 8192)
    args.bandwidth = copy_rate(args)
    rows.append(figure("matrix rate, one large GEMM", f"{args.rate / 1e12:.3g} TFLOP/s"))
    rows.append(figure("memory rate, one large copy", f"{args.bandwidth / 1e9:.3g} GB/s"))
    return rows


def copy_rate(args) -> float:
    """Bytes/s read and written by a copy too large for any cache."""
    source = torch.empty(2**22 if args.toy else 2**30, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, 5)["copy"]
    return 2 * source.numel() / seconds


# ------------------------------------------------------------------------ right
def kernels(args) -> list[Row]:
    """Each kernel against float64 or its plain reference, in all dtypes, ragged sizes too."""
    ways = ["triton", "fused"] if HAS_TRITON else []
    ways += ["slabs"]
    dtypes = (torch.float32,) if args.toy else (torch.float32, torch.bfloat16, torch.float16)
    sizes = [(37, 96, 1001)] if args.toy else [(37, 4090, 32003), (512, 4096, 128256)]
    rows = []
    for dtype in dtypes:
        for size in sizes:
            for impl in ways:
                rows.append(head_row(args, size, dtype, impl))
    rows += nf4_rows(args)
    rows.append(adapter_row(args))
    return rows


def head_row(args, size: tuple[int, int, int], dtype: torch.dtype, impl: str) -> Row:
    """Log-probs of random rows against float64, and the gradient against the plain form's."""
    M, D, V = size
    torch.manual_seed(0)
    hidden = (3.5 * torch.randn(M, D, device=args.device)).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=args.device) * D**-0.5).to(dtype)
    labels = torch.randint(V, (M,), device=args.device)
    logps, best = label_logps(hidden, weight, labels, impl)
    upstream = torch.randn(M, device=args.device)
    (grad,) = torch.autograd.grad(logps, hidden, upstream)
    with torch.no_grad():
        error = (logps.double() - exact_logps(hidden, weight, labels)).abs().max().item()

    wide = hidden.detach().double().requires_grad_()
    plain = (wide @ weight.double().T).log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    (exact,) = torch.autograd.grad(plain, wide, upstream.double())
    far = ((grad - exact).norm() / exact.norm()).item()
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    name = f"head {impl}, {str(dtype)[6:]}, M, D, V = {M}, {D}, {V}: log-prob, float64"
    if not far <= rounding:
        return at_most(f"{name}: gradient", far, rounding, " relative")
    return at_most(name, error, 1e-3, " nat", f"gradient {far:.0e} relative")


def nf4_rows(args) -> list[Row]:
    """Values of 4-bit codes: the kernel's bits are the reference's."""
    if not HAS_TRITON:
        return [skipped("NF4 by Triton", "Triton is not installed")]
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in ((192, 64), (37, 190)):  # the second ends within a block
            weight = torch.randn(*size, device=args.device, dtype=dtype)
            codes, absmax = quantize_nf4(weight)
            arguments = (codes, absmax, size, dtype)
            same = torch.equal(
                dequantize_nf4(*arguments, impl="triton"), dequantize_nf4_reference(*arguments)
            )
            rows.append(holds(f"NF4 {size}, {str(dtype)[6:]}: same bits", same, str(same).lower()))
    return rows


def adapter_row(args) -> Row:
    """Gradients of adapted projections against autograd's of the formula."""
    torch.manual_seed(0)
    T, D, r, outs = 50, 128, 8, (128, 64, 64)
    dtype = dtype_of(args)
    x = torch.randn(T, D, device=args.device, dtype=dtype, requires_grad=True)
    weights = [torch.randn(n, D, device=args.device, dtype=dtype) * D**-0.5 for n in outs]
    As = [torch.randn(r, D, device=args.device, requires_grad=True) for _ in outs]
    Bs = [torch.randn(n, r, device=args.device, requires_grad=True) for n in outs]

    def gradients(way):
        outputs = way(x, weights, [None] * 3, As, Bs, 2.0)
        return torch.autograd.grad(outputs, [x, *As, *Bs], [torch.ones_like(y) for y in outputs])

    pairs = zip(
        gradients(adapted_projections), gradients(adapted_projections_reference), strict=True
    )
    far = max(((a - b).float().norm() / b.float().norm()).item() for a, b in pairs)
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    return at_most("adapted projections: gradients, plain form", far, limit, " relative")


def trees(args) -> list[Row]:
    """A tree against one sequence per completion; the policy against itself as reference."""
    small = argparse_like(args, layers=min(2, args.layers or 2))
    rows = []
    for dtype in ("float32",) if args.toy else ("float32", "bfloat16"):
        small.dtype = dtype
        model = make_model(small).eval()
        prompts, completions = examples(small, 2, 1 + NUM_NEGATIVES)
        tree = tree_of(small, prompts, completions)
        with torch.no_grad():
            together = tree.sum_logps(model(tree)[0])
            apart = [
                alone(small, model, prompt, ids)
                for prompt, group in zip(prompts, completions, strict=True)
                for ids in group
            ]
        gap = (together.flatten() - torch.stack(apart)).abs().max().item()
        tokens = len(completions[0][0])
        limit = 1e-3 if dtype == "float32" else 0.15 * tokens
        what = f"tree, sequences: log-prob of {tokens} tokens, {dtype}"
        rows.append(at_most(what, gap, limit, " nat"))

        rewards = tree.sum_logps(model.train()(tree)[0]).detach() - together
        rms = rewards.square().mean().sqrt().item()
        limit = 1e-3 if dtype == "float32" else 0.5
        rows.append(at_most(f"first rewards, rms, {dtype}", rms, limit, " nat"))
    return rows


def alone(args, model: Transformer, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """Log-prob of one completion behind its own copy of the prompt, by full logits."""
    sequence = torch.tensor([prompt + ids[:-1]], device=args.device)
    logits = model.logits(sequence)[0, len(prompt) - 1 :].float()
    labels = torch.tensor(ids, device=args.device)
    return logits.log_softmax(1).gather(1, labels[:, None]).sum()


def argparse_like(args, **changes):
    """A copy of the options with some changed."""
    return type(args)(**vars(args) | changes)


def decoding(args) -> list[Row]:
    """What `generate` writes is what the one pass calls its greedy answer; and their times."""
    free()
    fitting = argparse_like(args, layers=args.layers or 8)  # room for caches beside the weights
    model = make_model(fitting, lora=False).eval()
    count, steps = (2, 4) if args.toy else (16, 12)
    prompts, groups = examples(fitting, count, 4 if args.toy else 20)
    written = generate(model, prompts, steps, [])
    tree = build_tree(prompts, [[ids] for ids in written]).to(args.device)
    with torch.no_grad():
        greedy = model(tree)[1]
    agreeing = (greedy == tree.labels).float().mean().item()
    rows = [at_least("greedy tokens of the one pass, as generate wrote them", agreeing, 0.98)]

    candidates = build_tree(prompts, groups).to(args.device)

    @torch.no_grad()
    def one_pass():
        candidates.sum_logps(model(candidates)[0])

    ways = {"one pass": one_pass, "generate": lambda: generate(model, prompts, steps, [])}
    seconds = interleaved(ways, args.repeats)
    for name, what in (("one pass", f"{len(groups[0])} titles ranked"), ("generate", "1 title")):
        each = 1000 * seconds[name] / count
        rows.append(figure(f"{name}, {fitting.layers} layers", f"{each:.1f} ms a prompt, {what}"))
    return rows


# ------------------------------------------------------------------------ a step
def random_4bit(args) -> Transformer:
    """As harness.make_model, with random codes."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(shape(args)).to(dtype_of(args))
    model = to_4bit(model).to_empty(device=args.device)
    model.inv_freq = inverse_frequencies(model.config).to(args.device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dtype == torch.uint8:
                p.random_(0, 256)
            elif name.endswith("absmax"):
                p.fill_(0.05)
            elif p.ndim == 1:
                p.fill_(1.0)
            else:
                p.normal_(std=0.02)
    apply_lora(model, r=8, lora_alpha=32, target_modules=TARGET_MODULES)
    return model


def estimated(args, B: int, four_bit: bool, checkpointing: bool):
    """estimate.fake_step of the step that is measured."""
    completions = [args.completion] * (1 + NUM_NEGATIVES)
    work = Workload(shape(args), dtype_of(args), 8, list(TARGET_MODULES), args.prompt, completions)
    work = replace(work, load_in_4bit=four_bit)
    return fake_step(work, B, checkpointing, gpu=not args.toy)


def fitting_prompts(args) -> int:
    """The most of 8, 4, 2, 1 whose step in 16 bits takes at most 85 % of the card."""
    if args.toy:
        return 2
    room = 0.85 * device_memory(torch.device(args.device))
    for B in (8, 4, 2, 1):
        step = estimated(args, B, False, False)
        if step.weights + step.trained + step.passing <= room:
            return B
    raise ValueError(f"a step of one prompt does not fit {room / GB:.0f} GB: use --layers")


VARIANTS = {  # name -> 4 bits, checkpointing, compile
    "16 bits": (False, False, False),
    "16 bits, checkpointing": (False, True, False),
    "4 bits": (True, False, False),
    "4 bits, checkpointing": (True, True, False),
    "16 bits, compile": (False, False, True),
}


def steps(args) -> list[Row]:
    """A RecPO step with LoRA: time, share of the matrix rate, memory beside its estimate."""
    B, seconds, rows = fitting_prompts(args), {}, []
    for name, (four_bit, checkpointing, compiled) in VARIANTS.items():
        expected = estimated(args, B, four_bit, checkpointing)
        time, peak, tokens = measured(args, B, four_bit, checkpointing, compiled)
        seconds[name] = time
        rows.append(figure(f"step, {name}", f"{1000 * time:.0f} ms, {tokens / time:,.0f} tokens/s"))
        flops = estimated(args, B, four_bit, False).flops if checkpointing else expected.flops
        share = 100 * flops / time / args.rate
        row = at_least(f"share of the matrix rate, {name}", share, SHARE_GOAL, " %")
        rows.append(row if name == "16 bits" and not args.toy else figure(row.name, row.figure))
        if compiled:  # the estimate is of eager blocks
            continue
        total = expected.weights + expected.trained + expected.passing
        ratio = peak / total
        what = f"peak memory off its estimate, {name}"
        rows.append(at_most(what, 100 * abs(ratio - 1), 10, " %", f"{peak / GB:.3g} GB"))
    ratio = seconds["4 bits"] / seconds["16 bits"]
    rows.append(goal(at_most("step in 4 bits / in 16 bits", ratio, 1.25, " times"), args))
    return rows


def measured(args, B: int, four_bit: bool, checkpointing: bool, compiled: bool):
    """Seconds of a step, bytes at its peak with weights and moments, tokens."""
    free()
    alive = LiveBytes()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with alive if args.device == "cpu" and not compiled else torch.enable_grad():
        model = (random_4bit(args) if four_bit else make_model(args)).train()
        for block in model.model.layers:
            block.checkpointing = checkpointing
            if compiled:
                # a toy only traces: the C++ compiler would take minutes
                backend = "aot_eager" if args.toy else "inductor"
                block.use_compiler(backend)
        alive.peak = alive.live
        step = Step(args, model, args.prompt, NUM_NEGATIVES, B)
        for _ in range(2):
            step()
    synchronize()
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else alive.peak
    seconds = interleaved({"step": step}, args.repeats)["step"]
    torch.compiler.reset()
    return seconds, peak, step.tokens


def usual(args) -> list[Row]:
    """The step against transformers + peft: policy, reference, full sequences and logits."""
    if missing := [n for n in ("transformers", "peft") if not importlib.util.find_spec(n)]:
        return [skipped("the usual way", f"{', '.join(missing)} not installed")]
    from step import Here, Usual

    free()
    # two models of the usual way beside ours: fewer layers, which leaves the ratio about the same
    small = argparse_like(args, layers=args.layers or 4, tree_batch=0)
    batch = examples(small, 2 if args.toy else 4, 1 + NUM_NEGATIVES)
    model = make_model(small)
    here, theirs = Here(model, "recpo", *batch, small), Usual(model, "recpo", False)
    here.reference_pass()
    ways = {"here": here.step, "usual": lambda: theirs.step(*batch, len(batch[0]))}
    seconds = interleaved(ways, args.repeats)
    ratio = seconds["usual"] / seconds["here"]
    what = f"the usual way / here, {small.layers} layers"
    return [goal(at_least(what, ratio, 6, " times", "reference kept"), args)]


# ------------------------------------------------------------------------ fast
def head(args) -> list[Row]:
    """Log-probs and gradient of a frozen head at M = 4,096, here and elsewhere."""
    free()
    config, M = SHAPES[args.shape], 64 if args.toy else 4096
    D, V = config.hidden_size, config.vocab_size
    weight = (torch.randn(V, D, device=args.device) * D**-0.5).to(dtype_of(args))
    hidden = (3.5 * torch.randn(M, D, device=args.device)).to(dtype_of(args))
    labels = torch.randint(V, (M,), device=args.device)
    upstream = torch.randn(M, device=args.device)
    ways = {"here": lambda h, w, y: label_logps(h, w, y)[0], "eager": eager} | peers()
    if args.device == "cuda":
        ways["here, fused"] = lambda h, w, y: label_logps(h, w, y, impl="fused")[0]
    calls, rows = {}, []
    for name, way in ways.items():
        call = gradient_call(way, hidden, weight, labels, upstream)
        try:
            call()
        except Exception as error:  # a peer that cannot do this shape is told of
            rows.append(skipped(f"head, {name}", type(error).__name__))
            continue
        calls[name] = call
    seconds = interleaved(calls, args.repeats)
    floor = 4 * M * D * V / args.rate
    for name, s in seconds.items():
        what = f"{1000 * s:.2f} ms, {100 * floor / s:.0f} % of the matrix rate"
        rows.append(figure(f"head, M = {M}, {name}", what))
    rows += [skipped(f"head, {n}", "not installed") for n in ("Liger", "CCE") if n not in ways]
    if args.device == "cuda" and "H200" in torch.cuda.get_device_name():
        rows.append(at_most("head on an H200", 1000 * seconds["here"], HEAD_GOAL_MS, " ms"))
    return rows


def repeatedly(way, calls: int) -> None:
    for _ in range(calls):
        way()


def nf4(args) -> list[Row]:
    """Dequantisation of a large projection: share of the card's memory rate; bitsandbytes'."""
    if not HAS_TRITON:
        return [skipped("NF4 by Triton", "Triton is not installed")]
    out, width = (256, 256) if args.toy else (14336, 4096)
    dtype = dtype_of(args)
    weight = torch.randn(out, width, device=args.device, dtype=dtype)
    codes, absmax = quantize_nf4(weight)
    arguments = (codes, absmax, (out, width), dtype)
    ways = {"here": lambda: dequantize_nf4(*arguments, impl="triton")}
    if importlib.util.find_spec("bitsandbytes") and args.device == "cuda":
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        ways["bitsandbytes"] = lambda: dequantize_4bit(packed, state)
    calls = 50  # between two synchronisations: one alone takes less than its launch by Python
    many = {name: partial(repeatedly, way, calls) for name, way in ways.items()}
    seconds = {name: s / calls for name, s in interleaved(many, args.repeats).items()}
    moved = codes.numel() + 4 * absmax.numel() + weight.numel() * weight.element_size()
    share = {name: 100 * moved / s / args.bandwidth for name, s in seconds.items()}
    rows = [goal(at_least("NF4: share of the memory rate", share["here"], 85, " %"), args)]
    if "bitsandbytes" in share:
        rows.append(figure("NF4 by bitsandbytes", f"{share['bitsandbytes']:.0f} %"))
    else:
        rows.append(skipped("NF4 by bitsandbytes", "not installed, or no GPU"))
    return rows


SECTIONS = {
    "Environment": environment,
    "Kernels": kernels,
    "Trees and first rewards": trees,
    "One pass and free decoding": decoding,
    "Head": head,
    "4-bit weights": nf4,
    "Training step": steps,
    "The usual way": usual,
}
