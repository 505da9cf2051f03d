"""Every Triton kernel compiled for A100, L40, H100 and B200, which takes no GPU.

Launches are not listed here: the functions that launch run on fake CUDA tensors, and each call is
recorded with its arguments, block sizes and warps. Compiling needs a process of its own, because
this one's kernels belong to Triton's interpreter: this file, run as a script."""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack, nullcontext
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
class Recorder:
    """Stands where a kernel stood, and notes what it is launched with."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid) -> "Recorder":
        return self

    def __call__(self, *args, num_warps: int = 4, **constants) -> None:
        names = [p.name for p in self.kernel.params]
        values = dict(zip(names, args, strict=False)) | constants
        self.launches.append((self.kernel, values, num_warps))


def launch_all(dtype: torch.dtype, aligned: bool) -> None:
    """Heads and a projection of an 8B model; or sizes that are multiples of nothing, and rows that
    begin 2 or 4 bytes behind a boundary."""
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
    from kernels import logps_triton, nf4_triton

    launches: list[tuple] = []
    with ExitStack() as stack, FakeTensorMode():
        # without CUDA there is no current device to change
        stack.enter_context(patch("torch.cuda.device_of", lambda tensor: nullcontext()))
        table = patch.object(nf4_triton, "_table", lambda *_: torch.empty(16, device="cuda"))
        stack.enter_context(table)
        for module in (logps_triton, nf4_triton):
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                kernel = Recorder(getattr(module, name), launches)
                stack.enter_context(patch.object(module, name, kernel))
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
