"""Every Triton kernel compiled for A100, L40, H100 and B200, which takes no GPU.

Launches are those of bench/kernels.py: recorded from the code that launches, so no block size is
repeated here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
WRITERS = ("_exponentials_kernel", "_dequantize_kernel")  # of whole tiles, in either dtype
SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # KB of shared memory that a block may have


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    """Compiled in a process of its own: this one's kernels belong to Triton's interpreter."""
    file = tmp_path_factory.mktemp("compiled") / "kernels.json"
    command = [sys.executable, "-m", "bench.kernels", "--json", file]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(file.read_text())


def defined_kernels() -> set[str]:
    """Names of all Triton kernels that kernels/ defines; inlined helpers end otherwise."""
    text = "".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    return {
        line.removeprefix("def ").partition("(")[0]
        for line in text.splitlines()
        if line.startswith("def _") and line.partition("(")[0].endswith("_kernel")
    }


def what(records: list[dict], bad) -> list[str]:
    """Those records that are bad, by kernel, case and capability."""
    return [f"{r['kernel']} ({r['case']}) on sm_{r['capability']}: {r}" for r in records if bad(r)]


def test_every_kernel_is_compiled_for_every_card_aligned_and_not(records):
    """No kernel, card or alignment is left out."""
    compiled = {(r["kernel"], r["capability"]) for r in records}
    assert compiled == {(kernel, card) for kernel in defined_kernels() for card in SHARED}
    for kernel in defined_kernels():
        cases = {r["case"].split(", ")[1] for r in records if r["kernel"] == kernel}
        assert cases == {"aligned", "unaligned"}


def test_no_kernel_spills_registers(records):
    """What does not fit into registers goes to local memory, which is device memory: none does."""
    assert not what(records, lambda r: r["spilled"])


def test_shared_memory_fits_each_card(records):
    """A launch that asks for more than a block may have fails at run time."""
    assert not what(records, lambda r: r["shared"] > 1024 * SHARED[r["capability"]])
    assert not what(records, lambda r: r["occupancy"] <= 0)


def test_half_precision_products_run_on_matrix_units(records):
    """The fused kernel multiplies bf16 by wgmma on Hopper, by the others' own instruction there."""
    expected = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    fused = [r for r in records if r["kernel"] == "_fused_kernel" and "bfloat16" in r["case"]]
    assert not what(fused, lambda r: r["matrix_units"] != expected[r["capability"]])
    fp32 = [r for r in records if r["kernel"] == "_fused_kernel" and "float32" in r["case"]]
    assert not what(fp32, lambda r: r["matrix_units"])  # TF32 would round


def test_aligned_rows_move_16_bytes_at_a_time(records):
    """Where sizes are multiples of 16, loads and the stores of whole tiles are vectors."""
    aligned = [r for r in records if r["case"].endswith(" aligned")]
    assert aligned and not what(aligned, lambda r: not r["vector_loads"])
    writers = [r for r in aligned if r["kernel"] in WRITERS]
    assert writers and not what(writers, lambda r: not r["vector_stores"])


def test_values_are_rounded_to_bf16_not_cut_off(records):
    """The interpreter cuts off, so only compiled code shows that kernels round to bf16."""
    writers = [r for r in records if r["kernel"] in WRITERS and "bfloat16" in r["case"]]
    assert writers and not what(writers, lambda r: not r["rounds_to_nearest"])
