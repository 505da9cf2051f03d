"""Find a checkpoint's files; read and write safetensors, checked before a weight is read."""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common import print0, read_json, reading

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
NF4_STATE = ".quant_state.bitsandbytes__nf4"  # beside a weight that bitsandbytes has quantised
HASHES: dict[tuple, str] = {}  # of checkpoints, by their files' sizes and times


@functools.cache
def note_once(text: str) -> None:
    """Print a note once, however often the same files are opened."""
    print0(f"note: {text}")


def resolve_path(name, weights: bool = True) -> Path:
    """Return a local directory; a hub name (org/model) is downloaded into one."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise ValueError(f"{name}: no such directory, and no hub name like meta-llama/Llama-3.1-8B")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except OSError as error:  # the library says how to log in, or that the network is down
        raise ValueError(f"{name}: no such directory, and not from the hub: {error}") from None


def open_safetensors(file: Path):
    """Open a safetensors file; ValueError if it cannot be read."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: not readable ({error}); download or save it again") from None


class Weights:
    """A checkpoint's tensors, read on demand; a single file has priority over an index."""

    def __init__(self, path):
        whole, index = Path(path) / WHOLE, Path(path) / INDEX
        files = {whole}
        if not whole.exists() and not index.exists():
            raise ValueError(f"{path}: neither {WHOLE} nor {INDEX} in it; download it again")
        if not whole.exists():
            with reading(index):
                names = read_json(index)["weight_map"].values()
                files = {index.parent / Path(str(name)).name for name in names}
        self.handles = {file: open_safetensors(file) for file in sorted(files)}
        self.files = {name: file for file, held in self.handles.items() for name in held.keys()}

    def rows(self, name: str):
        """A lazy tensor: rows(name)[start:stop] reads only these rows."""
        return self.handles[self.files[name]].get_slice(name)

    def tensor(self, name: str) -> Tensor:
        return self.handles[self.files[name]].get_tensor(name)


def check_tensors(where, found: dict, needed: dict, way_out: str) -> None:
    """Raise unless the names and shapes that were found are those that are needed."""
    wrong = sorted(n for n in found.keys() | needed.keys() if found.get(n) != needed.get(n))
    shown = [f"{n} (found: {found.get(n)}, needed: {needed.get(n)})" for n in wrong[:2]]
    if wrong:
        raise ValueError(f"{where}: {len(wrong)} tensors do not fit, {', '.join(shown)}; {way_out}")


def open_weights(path: Path, needed: dict, four_bit: bool = False) -> Weights:
    """Open a checkpoint of exactly the needed weights (name -> shape), some perhaps in 4 bits."""
    weights, found = Weights(path), {}
    quantised = {name for name in needed if name + NF4_STATE in weights.files}
    if quantised and not four_bit:
        raise ValueError(f"{path}: its weights are quantised to 4 bits; add --load_in_4bit")
    needed = needed | {n: (math.prod(needed[n]) // 2, 1) for n in quantised}  # two codes a byte
    for name in weights.files:
        unused = name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")  # a tied head
        unused |= (name.partition(".weight.")[0] + ".weight") in quantised  # bitsandbytes' parts
        if name in needed or not unused:
            shape, dtype = tuple(weights.rows(name).get_shape()), weights.rows(name).get_dtype()
            found[name] = shape if dtype in FLOATS or name in quantised else f"stored as {dtype}"
    check_tensors(path, found, needed, "save the whole plain model (no torch.compile, DDP, PEFT)")
    return weights


def stored_head_differs(path) -> bool:
    """Whether a different output matrix is stored; transformers 5 uses it, tied or not."""
    weights, names = Weights(path), ("lm_head.weight", "model.embed_tokens.weight")
    if not all(name in weights.files for name in names):
        return False
    head, embedding = map(weights.tensor, names)
    return not torch.equal(head, embedding.to(head.dtype))


def base_fingerprint(path) -> str:
    """SHA-256 of name, type, shape and bytes of each tensor, however divided into files."""
    weights = Weights(path)
    version = tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in weights.handles)

    def digest(name: str) -> bytes:
        tensor = weights.tensor(name)
        content = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.flatten().view(torch.uint8).numpy())
        return content.digest()

    if version not in HASHES:
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            digests = b"".join(pool.map(digest, sorted(weights.files)))
        HASHES[version] = hashlib.sha256(digests).hexdigest()
    return HASHES[version]


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict | None = None) -> None:
    """Write a safetensors file with the permissions that any new file gets."""
    save_file(tensors, path, metadata=metadata)
    mask = os.umask(0)
    os.umask(mask)
    with contextlib.suppress(OSError):  # a file system without permissions
        path.chmod(0o666 & ~mask)


def write_weights(
    path,
    weights: dict[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    shard_bytes: int = 5 * 10**9,
    write: bool = True,
) -> None:
    """Write weights, and an index if they fill several files, in place of older ones.

    `tensors` yields the values if they are gathered or converted one by one, so that few are in
    memory at a time; all are consumed, even without `write`."""
    from huggingface_hub import split_torch_state_dict_into_shards

    path = Path(path)
    meta = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in weights.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=shard_bytes)
    held = {file: {} for file in split.filename_to_tensors}
    if write:
        path.mkdir(parents=True, exist_ok=True)
        for old in (*path.glob("model-*-of-*.safetensors"), path / WHOLE, path / INDEX):
            old.unlink(missing_ok=True)
    for name, tensor in weights.items() if tensors is None else tensors:
        file = split.tensor_to_filename.get(name)
        if write and file:
            held[file][name] = tensor.detach().cpu().contiguous()
            if len(held[file]) == len(split.filename_to_tensors[file]):
                save_tensors(held.pop(file), path / file, metadata={"format": "pt"})
    if write and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
