"""The estimator of --dry_run against real steps: peak of live tensor bytes of two training steps.

Weights and moments included.

    python bench/memory.py          the configurations of tests/test_estimate.py, on a CPU in fp32
"""

import sys

from harness import ROOT, header, parser, table

sys.path.insert(0, str(ROOT / "tests"))

from test_estimate import FOUR_BIT, STEPS, estimated_and_measured  # noqa: E402


def main() -> None:
    args = parser(__doc__).parse_args()
    header("Estimated and measured memory of a step", args, "MB of tensors, fp32.")
    rows = []
    for name, (config, r, checkpointing, B, P) in STEPS.items():
        four_bit = name == FOUR_BIT
        step, peak = estimated_and_measured(config, r, checkpointing, B, P, four_bit)
        parts = [step.weights, step.trained, step.passing]
        what = f"{name}: d = {config.hidden_size}, V = {config.vocab_size:,}, {B} prompts of {P}"
        bytes_ = (*parts, sum(parts), peak)
        rows.append([what, *(f"{n / 1e6:.0f}" for n in bytes_), f"{sum(parts) / peak:.3f}"])
    columns = ["step", "weights", "trained, gradients, moments", "activations and scratch"]
    table([*columns, "estimate", "measured", "estimate / measured"], rows)


if __name__ == "__main__":
    main()
