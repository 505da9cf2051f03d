"""Where a checkpoint's files are; safetensors in and out, checked before a weight is read."""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common import print0, read_json

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
NF4_STATE = ".quant_state.bitsandbytes__nf4"  # beside a weight that bitsandbytes has quantised


@functools.cache
def note_once(text: str) -> None:
    """Print a note, once however often the same files are opened."""
    print0(f"note: {text}")


def resolve_path(name, weights: bool = True) -> Path:
    """Give a local directory back, and download a hub name (org/model) into one."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise ValueError(f"{name}: no such directory, and no hub name like meta-llama/Llama-3.1-8B")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except OSError as error:
        why = "the hub cannot be reached from here: give a local directory"
        if getattr(error, "response", None) is not None:  # it said 401, 403 or 404
            why = "the hub refuses it: check the spelling, accept a gated model's licence on its "
            why += "page, log in with `hf auth login` or set HF_TOKEN"
        raise ValueError(f"{name}: no such directory, and {why} ({type(error).__name__})") from None


# ------------------------------------------------------------------------ reading
def open_safetensors(file: Path):
    """Open a file of tensors; ValueError names one that cannot be read."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: not readable ({error}); download or save it again") from None


class Weights:
    """The tensors of a checkpoint directory, single or sharded: opened here, read when asked for.

    As in transformers, a whole file goes before an index."""

    def __init__(self, path):
        whole, index = Path(path) / WHOLE, Path(path) / INDEX
        if whole.exists():
            self.handles = {whole: open_safetensors(whole)}
            self.files = dict.fromkeys(self.handles[whole].keys(), whole)
            return
        if not index.exists():
            raise ValueError(f"{path}: neither {WHOLE} nor {INDEX} in it; download it again, whole")
        named = read_json(index).get("weight_map")
        files = named.values() if isinstance(named, dict) else [None]
        if not all(file and Path(str(file)).name == file for file in files):
            raise ValueError(
                f"{index}: no weight_map (tensor -> file beside it): {str(named)[:60]}"
            )
        self.files = {name: index.with_name(file) for name, file in named.items()}
        self.handles = {file: open_safetensors(file) for file in sorted(set(self.files.values()))}
        for name, file in self.files.items():
            if name not in self.handles[file].keys():
                raise ValueError(f"{file}: {name} is listed in the index but not in the file")

    def rows(self, name: str):
        """A tensor that is read where it is sliced: rows(name)[start:stop]."""
        return self.handles[self.files[name]].get_slice(name)

    def tensor(self, name: str) -> Tensor:
        return self.handles[self.files[name]].get_tensor(name)


def check_tensors(where, found: dict, needed: dict, way_out: str) -> None:
    """Raise unless the names and shapes that were found are those that are needed."""
    wrong = sorted(n for n in found.keys() | needed.keys() if found.get(n) != needed.get(n))
    shown = [f"{n} (there: {found.get(n)}, needed: {needed.get(n)})" for n in wrong[:2]]
    if wrong:
        raise ValueError(f"{where}: {len(wrong)} tensors do not fit, {', '.join(shown)}; {way_out}")


def open_weights(path: Path, needed: dict, four_bit: bool = False) -> Weights:
    """Open a checkpoint that holds the needed weights (name -> shape), and no other.

    With `four_bit`, weights that bitsandbytes has quantised may stand among them."""
    weights, found = Weights(path), {}
    quantised = {name for name in needed if name + NF4_STATE in weights.files}
    if quantised and not four_bit:
        raise ValueError(f"{path}: its weights are quantised to 4 bits; add --load_in_4bit")
    needed = needed | {n: (math.prod(needed[n]) // 2, 1) for n in quantised}  # two codes a byte
    for name, file in weights.files.items():
        unused = name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")  # a tied head
        unused |= name.partition(".weight.")[0] + ".weight" in quantised
        if unused and name not in needed:
            continue
        view = weights.rows(name)
        found[name] = tuple(view.get_shape())
        if view.get_dtype() not in FLOATS and name not in quantised:
            raise ValueError(f"{file}: {name} is stored as {view.get_dtype()}, not as floats")
    check_tensors(path, found, needed, "save the bare model (no torch.compile, DDP, PEFT), whole")
    return weights


def stored_head_differs(path) -> bool:
    """Whether a checkpoint holds an output matrix of its own, other than its embedding.

    transformers 5 then uses it, though config.json says that the two are tied."""
    weights, names = Weights(path), ("lm_head.weight", "model.embed_tokens.weight")
    if not all(name in weights.files for name in names):
        return False
    head, embedding = map(weights.tensor, names)
    return head.shape != embedding.shape or not torch.equal(head, embedding.to(head.dtype))


def base_fingerprint(path) -> str:
    """SHA-256 of a checkpoint: name, type, shape and every byte of each tensor.

    How they are divided into files does not matter. Hashed once a process while no file changes."""
    weights = Weights(path)
    stats = [(file, file.stat()) for file in weights.handles]
    return _hash_weights(Path(path), tuple((f, s.st_size, s.st_mtime_ns) for f, s in stats))


@functools.cache
def _hash_weights(path: Path, versions: tuple) -> str:
    weights = Weights(path)

    def digest(name: str) -> bytes:
        tensor = weights.tensor(name)
        content = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.flatten().view(torch.uint8).numpy())
        return content.digest()

    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        return hashlib.sha256(b"".join(pool.map(digest, sorted(weights.files)))).hexdigest()


# ------------------------------------------------------------------------ writing
def usual_mode(path: Path) -> None:
    """Give a file or folder ordinary permissions; safetensors and tempfile keep others out."""
    mask = os.umask(0)
    os.umask(mask)
    with contextlib.suppress(OSError):  # a file system without permissions
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict | None = None) -> None:
    """Write a safetensors file that others may read as any other file."""
    save_file(tensors, path, metadata=metadata)
    usual_mode(path)


def write_weights(
    path,
    weights: dict[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    shard_bytes: int = 5 * 10**9,
    write: bool = True,
) -> None:
    """Write weights, and an index if they fill several files, in place of older ones.

    `tensors` gives the values where they are gathered or converted one by one: then few are in
    memory at a time, and all are gone through even without `write`."""
    from huggingface_hub import split_torch_state_dict_into_shards

    path, held = Path(path), defaultdict(dict)
    meta = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in weights.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=shard_bytes)
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
