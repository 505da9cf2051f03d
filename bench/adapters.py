"""What LoRA adds to a forward pass: the projections of one block, plain, with naive adapters, and as one function per group.

    python bench/adapters.py

The seven linear layers of a block with inputs of T tokens; overhead is the time beyond the plain layers, in one run.
"""

import torch
from harness import dtype_of, header, interleaved, parser, table

from kernels.lora import adapted_projections, adapted_projections_reference

RANK, SCALING = 8, 4.0


def main() -> None:
    args = parser(
        __doc__, hidden_size=1024, intermediate_size=2816, tokens=2048, repeats=15
    ).parse_args()
    D, hidden, device, dtype = args.hidden_size, args.intermediate_size, args.device, dtype_of(args)
    groups = [
        (D, [D, D, D]),
        (D, [D]),
        (D, [hidden, hidden]),
        (hidden, [D]),
    ]  # q k v, o, gate up, down
    layers = []
    for width, outs in groups:
        x = torch.randn(args.tokens, width, device=device, dtype=dtype, requires_grad=True)
        weights = [
            torch.randn(out, width, device=device, dtype=dtype) * width**-0.5 for out in outs
        ]
        As = [torch.randn(RANK, width, device=device, requires_grad=True) for _ in outs]
        Bs = [torch.randn(out, RANK, device=device, requires_grad=True) for out in outs]
        layers.append((x, weights, [None] * len(outs), As, Bs))

    def plain(x, weights, biases, As, Bs, scaling):
        return tuple(torch.nn.functional.linear(x, W) for W in weights)

    @torch.no_grad()
    def forward(function):
        for arguments in layers:
            function(*arguments, SCALING)

    def both(function):
        for x, weights, biases, As, Bs in layers:
            outputs = function(x, weights, biases, As, Bs, SCALING)
            trained = [x] if function is plain else [x, *As, *Bs]
            torch.autograd.grad(outputs, trained, [torch.ones_like(y) for y in outputs])

    functions = {
        "plain": plain,
        "naive": adapted_projections_reference,
        "one function per group": adapted_projections,
    }
    header(
        "LoRA's overhead",
        args,
        f"d = {D}, {hidden} inside, r = {RANK}, T = {args.tokens} tokens, {dtype}.",
    )
    rows = {name: [name] for name in functions}
    for pass_ in (forward, both):
        seconds = interleaved(
            {name: lambda f=f, p=pass_: p(f) for name, f in functions.items()}, args.repeats
        )
        for name in functions:
            rows[name] += [
                f"{1000 * seconds[name]:.1f}",
                f"{100 * (seconds[name] / seconds['plain'] - 1):+.1f} %",
            ]
    table(
        [
            "projections",
            "forward, median ms",
            "overhead",
            "forward + backward, median ms",
            "overhead",
        ],
        list(rows.values()),
    )


if __name__ == "__main__":
    main()
