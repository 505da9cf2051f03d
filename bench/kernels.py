"""Every Triton kernel compiled for real GPUs, without one: registers, shared memory, occupancy,
spills.

    python -m bench.kernels                  the table of docs/kernel.md
    python -m bench.kernels --json FILE      the same as JSON, for tests/test_compiled.py

The launches are not listed here: the functions that launch run on fake CUDA tensors (shapes
without memory) and each kernel call is recorded with its arguments, block sizes and warps. What
Triton would specialise on, alignment and dtype, is derived from those arguments. So what is
compiled here is what a GPU would run.

aligned      sizes and strides that are multiples of 16, as in every published model
unaligned    a vocabulary of 32,003 ids and rows of 4,090 elements that start 2 or 4 bytes behind a
             boundary

Occupancy is computed, as CUDA's own calculator does: warps that fit a multiprocessor beside one
another, of those that it can hold. It is no speed: few warps with much work each can be the
fastest."""

import os

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing

import argparse  # noqa: E402
import inspect  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import ExitStack, nullcontext  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from unittest.mock import patch  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import logps_triton, nf4_triton  # noqa: E402
from kernels.nf4 import CODE  # noqa: E402


@dataclass(frozen=True)
class Card:
    """Limits of one multiprocessor: CUDA's programming guide, "Compute Capabilities"."""

    name: str
    shared_per_block: int  # bytes, opted in
    shared: int  # bytes
    warps: int
    blocks: int
    registers: int = 65536


CARDS = {
    80: Card("A100", 163 * 1024, 164 * 1024, 64, 32),
    89: Card("L40, RTX 4090", 99 * 1024, 100 * 1024, 48, 24),
    90: Card("H100, H200", 227 * 1024, 228 * 1024, 64, 32),
    100: Card("B200", 227 * 1024, 228 * 1024, 64, 32),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


# ---------------------------------------------------------------------------------------- launches
@dataclass
class Launch:
    """One call of a kernel: what Triton compiles it for."""

    kernel: str
    module: str
    case: str
    signature: dict[str, str]  # argument -> type
    constants: dict[str, object]
    aligned: list[str]  # arguments that are known to be multiples of 16
    options: dict[str, int]


class Recorder:
    """Stands where a kernel stood and notes each launch."""

    def __init__(self, kernel, module: str, case: str, launches: list[Launch]):
        self.kernel, self.module, self.case, self.launches = kernel, module, case, launches

    def __getitem__(self, grid) -> Callable:
        return self.note

    def note(self, *args, **kwargs) -> None:
        names = [p.name for p in self.kernel.params]
        options = {k: v for k, v in kwargs.items() if k not in names}
        values = dict(zip(names, args, strict=False))
        values |= {k: v for k, v in kwargs.items() if k in names}
        launch = Launch(self.kernel.fn.__name__, self.module, self.case, {}, {}, [], options)
        for param in self.kernel.params:
            self.add(launch, param, values[param.name])
        self.launches.append(launch)

    def add(self, launch: Launch, param, value) -> None:
        """One argument, specialised as Triton's launcher would do it."""
        if param.is_constexpr:
            launch.signature[param.name] = "constexpr"
            launch.constants[param.name] = value
        elif isinstance(value, torch.Tensor):
            launch.signature[param.name] = POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                launch.aligned.append(param.name)
        else:
            launch.signature[param.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                launch.aligned.append(param.name)


def rows_of(M: int, width: int, dtype: torch.dtype, aligned: bool) -> torch.Tensor:
    """A fake CUDA matrix, unaligned: cut out of a wider one, one element behind its start."""
    if aligned:
        return torch.empty(M, width, dtype=dtype, device="cuda")
    return torch.empty(M, width + 1, dtype=dtype, device="cuda").narrow(1, 1, width)


def head_launches(dtype: torch.dtype, aligned: bool) -> None:
    """The head of an 8B model, or of one whose sizes are no multiples of anything."""
    M, D, V = (4096, 4096, 128256) if aligned else (37, 4090, 32003)
    labels = torch.empty(M, dtype=torch.int64, device="cuda")
    label_logits = torch.empty(M, device="cuda")
    logits = torch.empty(M, V if not aligned else 21504, device="cuda")
    logps_triton.slab_statistics(
        logits, labels, label_logits, 0, torch.empty(M, device="cuda"), dtype
    )
    hidden, weight = (rows_of(n, D, dtype, aligned) for n in (M, V))
    logps_triton.fused_statistics(hidden, weight, labels, label_logits)


def nf4_launches(dtype: torch.dtype, aligned: bool) -> None:
    """A projection of an 8B model, or one that starts amid a buffer."""
    shape = (4096, 14336) if aligned else (37, 192)
    n = shape[0] * shape[1]
    codes = rows_of(1, n // 2, torch.uint8, aligned).view(-1)
    absmax = torch.empty(n // 64, device="cuda")
    with patch.object(nf4_triton, "_table", lambda code, device: torch.empty(16, device=device)):
        nf4_triton.dequantize(codes, absmax, shape, dtype, 64, CODE)


MODULES = {logps_triton: head_launches, nf4_triton: nf4_launches}


def recorded_launches() -> list[Launch]:
    """Every launch of every module, dtype and alignment, each once."""
    launches: list[Launch] = []
    for module, run in MODULES.items():
        kernels = [k for k, v in vars(module).items() if k.endswith("_kernel") and hasattr(v, "fn")]
        for dtype in (torch.bfloat16, torch.float32):
            for aligned in (True, False):
                case = (
                    f"{str(dtype).removeprefix('torch.')}, {'aligned' if aligned else 'unaligned'}"
                )
                with ExitStack() as stack:
                    # without CUDA there is no current device to change
                    stack.enter_context(patch("torch.cuda.device_of", lambda t: nullcontext()))
                    stack.enter_context(FakeTensorMode())
                    for name in kernels:
                        recorder = Recorder(getattr(module, name), module.__name__, case, launches)
                        stack.enter_context(patch.object(module, name, recorder))
                    run(dtype, aligned)
    unique = {repr((x.kernel, x.signature, x.constants, x.aligned)): x for x in reversed(launches)}
    return sorted(unique.values(), key=lambda x: (x.module, x.kernel, x.case))


# ---------------------------------------------------------------------------------------- compiling
def compiled(job: tuple[Launch, int]) -> dict:
    """One launch compiled for one compute capability, as a flat record."""
    launch, capability = job
    module = __import__(launch.module, fromlist=[launch.kernel])
    kernel = getattr(module, launch.kernel)
    position = {p.name: i for i, p in enumerate(kernel.params)}
    source = ASTSource(
        fn=kernel,
        signature=launch.signature,
        constexprs={(position[name],): value for name, value in launch.constants.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=launch.options)
    registers, stack = register_usage(built.asm["cubin"])
    warps, shared = built.metadata.num_warps, built.metadata.shared
    ptx = built.asm["ptx"]
    return {
        "kernel": launch.kernel,
        "case": launch.case,
        "capability": capability,
        "block": {k: v for k, v in launch.constants.items() if k.isupper() and k != "UPCAST"},
        "warps": warps,
        "registers": registers,
        "spilled": stack,
        "shared": shared,
        "occupancy": occupancy(CARDS[capability], registers, shared, warps),
        "matrix_units": matrix_units(ptx),
        # the widest access of global memory: 16 bytes a thread
        "vector_loads": bool(re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\S* .*0x10", ptx)),
        "rounds_to_nearest": "cvt.rn.bf16" in ptx,
        "vector_stores": bool(re.search(r"st\.global\S*\.v4\.b32", ptx)),
    }


def register_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of the stack, where spilled ones go) of a thread, by `cuobjdump`."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        command = [tool, "-res-usage", f.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def matrix_units(ptx: str) -> str:
    """Which instruction multiplies matrices; empty if none does."""
    for word in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if word in ptx:
            return word
    return ""


def occupancy(card: Card, registers: int, shared: int, warps: int) -> float:
    """Share of the warps a multiprocessor can hold that blocks of this kernel fill."""
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out by 256 a warp
    by_registers = card.registers // per_warp // warps
    by_shared = card.shared // (shared + 1024)  # the system takes 1 KB a block
    blocks = min(by_registers, by_shared, card.warps // warps, card.blocks)
    return blocks * warps / card.warps


def compile_all(capabilities: list[int]) -> list[dict]:
    """All launches for all capabilities, by two processes that share this one's imports."""
    jobs = [(launch, c) for launch in recorded_launches() for c in capabilities]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(compiled, jobs, chunksize=1)


# ---------------------------------------------------------------------------------------- the table
def table(records: list[dict]) -> str:
    columns = ["kernel", "case", "block", "warps", "sm", "registers", "spilled bytes"]
    columns += ["shared KB", "occupancy", "matrix instruction", "16-byte loads"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in records:
        block = " × ".join(str(v) for v in r["block"].values())
        cells = [r["kernel"], r["case"], block, r["warps"], r["capability"], r["registers"]]
        cells += [r["spilled"], f"{r['shared'] / 1024:.1f}", f"{100 * r['occupancy']:.0f} %"]
        cells += [r["matrix_units"], "yes" if r["vector_loads"] else "no"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default="", help="write the records to this file instead")
    args = parser.parse_args()
    records = compile_all(list(CARDS))
    if args.json:
        Path(args.json).write_text(json.dumps(records))
    else:
        print(f"triton {triton.__version__}, torch {torch.__version__}\n\n{table(records)}")


if __name__ == "__main__":
    main()
