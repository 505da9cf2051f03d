"""Every Triton kernel compiled for A100, L40, H100 and B200, which takes no GPU.

The functions that launch run on fake CUDA tensors, in a process of its own (this file as a script),
because this one's kernels belong to Triton's interpreter; each launch is recorded and compiled."""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.logps import HAS_TRITON
from kernels.nf4 import CODE

ROOT = Path(__file__).parents[1]
SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # sm -> KB of shared memory that a block may have
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
POINTERS[torch.uint8] = "*u8"


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_no_kernel_spills_or_asks_for_more_shared_memory_than_a_card_has():
    """What spills goes to device memory; a launch that asks for too much fails at run time."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command, env["PYTHONPATH"] = [sys.executable, __file__], str(ROOT)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    built = json.loads(done.stdout)
    text = "".join(f.read_text() for f in (ROOT / "kernels").glob("*.py"))
    kernels = re.findall(r"^def (_\w+_kernel)\(", text, re.MULTILINE)
    compiled = {(b["kernel"], b["sm"], b["aligned"]) for b in built}
    assert compiled == {(k, sm, a) for k in kernels for sm in SHARED for a in (True, False)}
    assert not [b for b in built if b["spilled"] or b["shared"] > 1024 * SHARED[b["sm"]]]


# ------------------------------------------------------------------------ in the other process
def launch_all(dtype: torch.dtype, aligned: bool) -> None:
    """Heads and a projection of an 8B model, or of sizes and addresses that are odd."""
    from kernels import logps_triton, nf4_triton

    def rows(M: int, width: int, dtype: torch.dtype) -> Tensor:
        extra = 0 if aligned else 1
        return torch.empty(M, width + extra, dtype=dtype, device="cuda").narrow(1, extra, width)

    M, D, V = (4096, 4096, 128256) if aligned else (37, 4090, 32003)
    labels = torch.empty(M, dtype=torch.int64, device="cuda")
    label_logits, running_max = (torch.empty(M, device="cuda") for _ in range(2))
    slab = torch.empty(M, 21504 if aligned else V, device="cuda")
    logps_triton.slab_statistics(slab, labels, label_logits, 0, running_max, dtype)
    logps_triton.fused_statistics(rows(M, D, dtype), rows(V, D, dtype), labels, label_logits)
    shape = (4096, 14336) if aligned else (37, 192)
    n = shape[0] * shape[1]
    codes = rows(1, n // 2, torch.uint8).view(-1)
    nf4_triton.dequantize(codes, torch.empty(n // 64, device="cuda"), shape, dtype, CODE)


def recorded(dtype: torch.dtype, aligned: bool) -> list[tuple]:
    """(kernel, values of its arguments, warps) of every launch."""
    from triton.runtime import JITFunction

    launches: list[tuple] = []

    def run(kernel, *args, grid, warmup, num_warps: int = 4, **constants) -> None:
        names = [p.name for p in kernel.params]
        launches.append((kernel, dict(zip(names, args)) | constants, num_warps))

    table = torch.empty(16, dtype=torch.float32, device="meta")
    with (
        patch("torch.cuda.device_of", lambda tensor: nullcontext()),  # there is no current device
        patch("kernels.nf4_triton._table", lambda *_: table),
        patch.object(JITFunction, "run", run),
        FakeTensorMode(),
    ):
        launch_all(dtype, aligned)
    return launches


def compiled(kernel, values: dict, num_warps: int, sm: int) -> dict:
    """One launch, specialised as Triton's launcher would do it, compiled for one card."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attrs = {}, {}, {}
    for n, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr:
            signature[param.name], constants[(n,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[param.name] = POINTERS[value.dtype]
            multiple = value.storage_offset() * value.element_size()
        else:
            signature[param.name] = "i32" if value < 2**31 else "i64"
            multiple = 1 if param.do_not_specialize else value
        if multiple % 16 == 0:
            attrs[(n,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    target = GPUTarget("cuda", sm, 32)
    built = triton.compile(source, target=target, options={"num_warps": num_warps})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.asm["cubin"])
        f.flush()
        command = [tool, "-res-usage", f.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spilled = int(re.search(r"STACK:(\d+)", usage)[1])
    name = kernel.fn.__name__
    return {"kernel": name, "sm": sm, "spilled": spilled, "shared": built.metadata.shared}


if __name__ == "__main__":
    records = [
        compiled(*launch, sm) | {"aligned": aligned, "dtype": str(dtype)}
        for dtype in (torch.bfloat16, torch.float32)
        for aligned in (True, False)
        for launch in recorded(dtype, aligned)
        for sm in SHARED
    ]
    print(json.dumps(records))
