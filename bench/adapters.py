"""What LoRA adds to a forward pass, on the projections of one block.

Plain, with naive adapters, and as one function per group.

    python bench/adapters.py

The seven linear layers of a block with inputs of T tokens; overhead is the time beyond the plain
layers, in one run.
"""

import torch
from harness import LORA_ALPHA, LORA_RANK, dtype_of, header, interleaved, parser, table

from kernels.lora import adapted_projections, adapted_projections_reference
from lora import lora_scaling

SCALING = lora_scaling(LORA_RANK, LORA_ALPHA, use_rslora=False)


def make_group(width: int, outs: list[int], args) -> tuple:
    """(input, weights, biases, As, Bs) of projections that share their input."""
    device, dtype = args.device, dtype_of(args)
    x = torch.randn(args.tokens, width, device=device, dtype=dtype, requires_grad=True)
    weights = [torch.randn(out, width, device=device, dtype=dtype) * width**-0.5 for out in outs]
    As = [torch.randn(LORA_RANK, width, device=device, requires_grad=True) for _ in outs]
    Bs = [torch.randn(out, LORA_RANK, device=device, requires_grad=True) for out in outs]
    return x, weights, [None] * len(outs), As, Bs


def plain(x, weights, biases, As, Bs, scaling):
    return tuple(torch.nn.functional.linear(x, W) for W in weights)


@torch.no_grad()
def forward(function, groups: list[tuple]) -> None:
    for group in groups:
        function(*group, SCALING)


def forward_and_backward(function, groups: list[tuple]) -> None:
    for x, weights, biases, As, Bs in groups:
        outputs = function(x, weights, biases, As, Bs, SCALING)
        trained = [x] if function is plain else [x, *As, *Bs]
        torch.autograd.grad(outputs, trained, [torch.ones_like(y) for y in outputs])


FUNCTIONS = {
    "plain": plain,
    "naive": adapted_projections_reference,
    "one function per group": adapted_projections,
}


def main() -> None:
    options = parser(__doc__, hidden_size=1024, intermediate_size=2816, tokens=2048, repeats=15)
    args = options.parse_args()
    D, hidden = args.hidden_size, args.intermediate_size
    projections = [(D, [D, D, D]), (D, [D]), (D, [hidden, hidden]), (hidden, [D])]
    groups = [make_group(width, outs, args) for width, outs in projections]
    note = f"d = {D}, {hidden} inside, r = {LORA_RANK}, T = {args.tokens} tokens, {dtype_of(args)}."
    header("LoRA's overhead", args, note)
    rows = {name: [name] for name in FUNCTIONS}
    for pass_ in (forward, forward_and_backward):
        ways = {n: lambda f=f, p=pass_: p(f, groups) for n, f in FUNCTIONS.items()}
        seconds = interleaved(ways, args.repeats)
        for name in FUNCTIONS:
            overhead = seconds[name] / seconds["plain"] - 1
            rows[name] += [f"{1000 * seconds[name]:.1f}", f"{100 * overhead:+.1f} %"]
    columns = ["projections", "forward, median ms", "overhead"]
    columns += ["forward + backward, median ms", "overhead"]
    table(columns, list(rows.values()))


if __name__ == "__main__":
    main()
