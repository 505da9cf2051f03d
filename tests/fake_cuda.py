"""A CUDA card that has shapes, dtypes and devices but no numbers, for tests without one.

    with Card() as card:
        x = torch.ones(3).to("cuda")     fake: a shape on "cuda"
        x + torch.ones(3)                FakeTensorDeviceMismatchError, as on a card
        x.sum().item()                   WaitsForTheCard, unless card.may_wait
        x.cpu()                          a real tensor of zeros: what the host then does really runs

CPU tensors stay real. What PyTorch's fake tensors let pass and a card refuses is checked here:
factors of a product of different dtypes, CPU tensors handed to a Triton kernel; and CPU indices
of a card's tensors, for which the host would wait. Stubs stand only
where the library needs the card itself: pinned memory, events, the current device, launches of
Triton kernels; and `prefetch` stays in this thread, because modes are a thread's own.

What it cannot show: numbers, speed, which fused kernel a card chooses for an operation, and
sharding, which needs the streams of a real card (tests/test_sharding.py runs it on CPUs).
"""

import inspect
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kernels import logps_triton, nf4_triton

aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_}
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_}
# Autograd asks a CUDA tensor's card for its streams; of this device, which nobody uses, it does not
STAND_IN = torch.device("lazy", 0)
HALF = (torch.bfloat16, torch.float16)


class WaitsForTheCard(RuntimeError):
    """The host asked for a number, so a card would have to finish all of its work first."""


def seen_from_cpp(cls, function, types, args=(), kwargs=None):
    """FakeTensor.__torch_dispatch__, but that C++ is told STAND_IN, not "cuda"."""
    if function is torch.ops.prim.device.default and not args[0].fake_mode.in_kernel_invocation:
        return STAND_IN if args[0].fake_device.type == "cuda" else args[0].fake_device
    return ORIGINAL(function, types, args, kwargs or {})


ORIGINAL = FakeTensor.__torch_dispatch__


class Launched:
    """Stands for a Triton kernel: checks the call as a launcher on a card would."""

    def __init__(self, kernel, launches: list[str]):
        self.name, self.launches = kernel.fn.__name__, launches
        self.signature = inspect.signature(kernel.fn)

    def __getitem__(self, grid) -> Callable:
        return self.launch

    def launch(self, *args, num_warps: int = 4, **kwargs) -> None:
        bound = self.signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if isinstance(value, Tensor) and not value.is_cuda:
                raise ValueError(f"{self.name}: pointer {name} is a CPU tensor")
        self.launches.append(self.name)


class Event:
    """Stands for torch.cuda.Event."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Card(TorchDispatchMode):
    """See the docstring of this file. `launches`: names of the Triton kernels called."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.may_wait = False  # True: a number that the host asks for is 1
        self.launches: list[str] = []

    def __enter__(self) -> "Card":
        self.stack = ExitStack()
        on_card = property(lambda tensor: tensor.fake_device.type == "cuda")
        self.stack.enter_context(patch.object(FakeTensor, "is_cuda", on_card))
        read = lambda tensor: tensor.cpu().tolist()  # noqa: E731
        self.stack.enter_context(patch.object(FakeTensor, "tolist", read))
        answer = classmethod(seen_from_cpp)
        self.stack.enter_context(patch.object(FakeTensor, "__torch_dispatch__", answer))
        for module in (logps_triton, nf4_triton):
            self.stack.enter_context(patch.object(module, "INTERPRETED", False))
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                kernel = Launched(getattr(module, name), self.launches)
                self.stack.enter_context(patch.object(module, name, kernel))
        # a copy that is kept between calls must not be of another card
        nf4_triton._table.cache_clear()
        self.stack.callback(nf4_triton._table.cache_clear)
        for target, stub in (
            ("torch.Tensor.pin_memory", lambda tensor: tensor),
            ("torch.cuda.Event", Event),
            ("torch.cuda.device_of", lambda tensor: nullcontext()),
            ("eval.prefetch", map),
            ("runtime.reference.prefetch", map),
        ):
            self.stack.enter_context(patch(target, stub))
        self.stack.enter_context(self.fake)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.stack.close()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:
            return seen_from_cpp(FakeTensor, function, types, args)
        if kwargs.get("device") == STAND_IN:  # C++ took it from a tensor's options
            kwargs = kwargs | {"device": torch.device("cuda", 0)}
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        device = torch.device(kwargs.get("device") or "cpu")
        if not fakes and device.type != "cuda":
            with unset_fake_temporarily():  # the host's own work
                return function(*args, **kwargs)
        if function.overloadpacket in PRODUCTS:
            check_product(function, args, kwargs)
        if function.overloadpacket in INDEXING and any(is_host_index(x) for x in leaves[1:]):
            raise WaitsForTheCard(f"{function}: an index on the CPU is copied while the host waits")
        if function is aten._local_scalar_dense.default and self.may_wait:
            return 1
        try:
            out = function(*args, **kwargs)
        except DataDependentOutputException as error:
            raise WaitsForTheCard(f"{function} of a tensor on the card") from error
        return tree_map(arrived, out)


def arrived(tensor):
    """What a copy to the host brings: zeros, which are real."""
    if not isinstance(tensor, FakeTensor) or tensor.device.type != "cpu":
        return tensor
    with unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


def is_host_index(value) -> bool:
    """A CPU tensor that names places; values to be written are floats."""
    is_host = isinstance(value, Tensor) and not value.is_cuda
    return is_host and value.ndim > 0 and value.dtype in (torch.int64, torch.bool)


def check_product(function, args, kwargs) -> None:
    """RuntimeError unless a card has a kernel for a product of these dtypes."""
    out_dtype = kwargs.get("out_dtype", args[-1] if isinstance(args[-1], torch.dtype) else None)
    dtypes = {x.dtype for x in args if isinstance(x, Tensor)}
    if len(dtypes) > 1:
        raise RuntimeError(f"{function}: expected one dtype, got {sorted(map(str, dtypes))}")
    if out_dtype and not (out_dtype == torch.float32 and dtypes <= set(HALF)):
        raise RuntimeError(f"{function}: no kernel for {dtypes} with out_dtype {out_dtype}")
