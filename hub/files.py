"""Where a checkpoint's files are, and safetensors in and out:
single or sharded, checked before a weight is read."""

import contextlib
import functools
import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common import print0, read_json


@functools.cache
def note_once(text: str) -> None:
    """Print a note, however often the same files are opened."""
    print0(f"note: {text}")


def resolve_path(name, weights: bool = True) -> Path:
    """A local directory as it is;
    a hub name (org/model) becomes the folder with its downloaded files."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise ValueError(
            f"{name}: no such directory, and not a hub name like meta-llama/Llama-3.1-8B"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    patterns = ["*.json", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (GatedRepoError, RepositoryNotFoundError) as error:  # 401, 403, 404
        raise ValueError(
            f"{name}: no such directory, and the hub refuses it ({type(error).__name__}). "
            "Check the spelling; for a gated model accept its licence on its page, "
            "then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):  # an expired token, say
            raise ValueError(
                f"{name}: the hub refuses access ({error}); "
                "log in with `hf auth login` or set HF_TOKEN"
            ) from None
        raise ValueError(
            f"{name}: no such directory, and not to be downloaded ({error}); give a local directory"
        ) from None


INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


def weight_files(path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a checkpoint directory, single or sharded.

    As in transformers, a whole file goes before an index."""
    path = Path(path)
    if (path / WHOLE).exists():
        with open_safetensors(path / WHOLE) as f:
            files = dict.fromkeys(f.keys(), path / WHOLE)
        if (path / INDEX).exists():
            note_once(
                f"{path}: {WHOLE} is read, as transformers does, and {INDEX} beside it is not: "
                "delete the one that is out of date"
            )
        return files
    if (path / INDEX).exists():
        return read_index(path / INDEX)
    raise ValueError(f"{path}: neither {WHOLE} nor {INDEX} found{_weights_hint(path)}")


def read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index}: no weight_map (tensor name -> file) in it; download or save it again"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file:
            raise ValueError(
                f"{index}: weight_map gives {file!r} for {name}; expected a file of this folder"
            )
    return {name: index.parent / file for name, file in weight_map.items()}


def _weights_hint(path: Path) -> str:
    """What lies in a folder instead of the weights, and the way out."""
    shards = sorted(f.name for f in path.glob("*.safetensors"))
    pickled = sorted(path.glob("*.bin")) + sorted(path.glob("*.pth"))
    if "adapter_model.safetensors" in shards:
        return "; an adapter lies there: give it as --adapter, and its base as --model"
    if shards:
        return (
            f", but {len(shards)} other safetensors files ({shards[0]}, ...): download the index "
            "too, or save the model again with save_pretrained"
        )
    if pickled:
        return f"; {pickled[0].name} is pickled, which can run code: convert it to safetensors"
    return ""


def open_safetensors(file: Path):
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{file}: not a readable safetensors file ({error}); download or save it again"
        ) from None


def check_weights(
    path: Path, expected: dict[str, tuple[int, ...]], four_bit: bool = False
) -> dict[str, Path]:
    """Name -> file of every expected weight (name -> shape), without reading them.

    ValueError names what is wrong. `four_bit`: 4-bit weights of bitsandbytes may stand where 16-bit
    ones are expected (hub/quantized.py reads them); their absmax and states are among the names
    then.
    """
    files = weight_files(path)
    quantised = {name for name in expected if f"{name}.quant_state.bitsandbytes__nf4" in files}
    if quantised and not four_bit:
        raise ValueError(f"{path}: its weights are quantised to 4 bits; add --load_in_4bit")
    beside = {name for name in files if name.partition(".weight.")[0] + ".weight" in quantised}
    beside -= quantised

    expected = dict(expected)
    for name in quantised:
        out, inputs = expected[name]
        expected[name] = (out * inputs // 2, 1)  # two codes a byte

    ignored = {"lm_head.weight"} - expected.keys()  # a tied head
    ignored |= {name for name in files if name.endswith("rotary_emb.inv_freq")}
    found = files.keys() - ignored - beside
    if missing := sorted(expected.keys() - found):
        raise ValueError(
            f"{path}: {len(missing)} weights are missing, first {missing[:3]}"
            + _prefix_hint(missing, found)
        )
    if unexpected := sorted(found - expected.keys()):
        raise ValueError(
            f"{path}: {len(unexpected)} weights do not belong to this architecture, "
            f"first {unexpected[:3]}"
        )
    check_shapes(files, expected, quantised)
    return {name: files[name] for name in (*expected, *sorted(beside))}


PREFIXES = {  # what stands before every key -> what put it there
    "_orig_mod.": "saved from inside torch.compile",
    "module.": "saved from inside DistributedDataParallel",
    "base_model.model.": "saved from inside a PEFT model: merge_and_unload first",
}


def _prefix_hint(missing: list[str], found: Collection[str]) -> str:
    """The cause, when the missing weights are there under names that are longer or shorter."""
    for prefix, cause in PREFIXES.items():
        if any(prefix + name in found for name in missing):
            return f"; its keys begin with {prefix!r}, {cause}: save the inner model"
    inner = [name for name in missing if name != "lm_head.weight"]
    if inner and all(name.removeprefix("model.") in found for name in inner):
        return "; its keys lack the prefix 'model.': save it with its language-model head"
    return ""


FLOATS = ("F64", "F32", "F16", "BF16")


def check_shapes(
    files: dict[str, Path], expected: dict[str, tuple[int, ...]], quantised: Collection[str] = ()
) -> None:
    """ValueError unless every expected tensor is in its file, with its shape, as floating point."""
    handles = {file: open_safetensors(file) for file in sorted(set(files.values()))}
    for name, shape in expected.items():
        if name not in handles[files[name]].keys():
            raise ValueError(f"{files[name]}: {name} is listed in the index but not in the file")
        view = handles[files[name]].get_slice(name)
        stored = tuple(view.get_shape())
        if stored != shape:
            raise ValueError(
                f"{files[name]}: {name} has shape {stored}, config.json asks for {shape}"
            )
        if view.get_dtype() not in FLOATS and name not in quantised:
            raise ValueError(
                f"{files[name]}: {name} is stored as {view.get_dtype()}; expected one of "
                f"{', '.join(FLOATS)} (other quantised weights are not supported)"
            )


def stored_head_differs(path) -> bool:
    """Whether a checkpoint holds an output matrix of its own, other than its embedding.

    transformers 5 then uses it, though config.json says that the two are tied."""
    files = weight_files(path)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if not all(name in files and files[name].exists() for name in names):
        return False
    handles = [open_safetensors(files[name]) for name in names]
    if any(name not in handle.keys() for name, handle in zip(names, handles, strict=True)):
        return False
    head, embedding = (h.get_slice(name) for h, name in zip(handles, names, strict=True))
    if head.get_shape() != embedding.get_shape():
        return True
    rows = head.get_shape()[0]
    pieces = ((start, min(start + 4096, rows)) for start in range(0, rows, 4096))
    return any(not torch.equal(head[a:b].float(), embedding[a:b].float()) for a, b in pieces)


# ------------------------------------------------------------------------ writing
def divide_weights(weights: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file: files above `shard_bytes` are split."""
    files, size = [[]], 0
    for name, tensor in weights.items():
        nbytes = tensor.numel() * tensor.element_size()
        if size + nbytes > shard_bytes and files[-1]:
            files.append([])
            size = 0
        files[-1].append(name)
        size += nbytes
    return files


def remove_weights(path) -> None:
    """Take away a folder's safetensors: a reader might prefer them to what is written now."""
    path = Path(path)
    for old in (*path.glob("model-*-of-*.safetensors"), path / WHOLE, path / INDEX):
        old.unlink(missing_ok=True)


def usual_mode(path: Path) -> None:
    """Permissions as of any other file or folder of this user: what safetensors 0.8 and tempfile
    make is the owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    with contextlib.suppress(OSError):  # a file system without permissions
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict | None = None) -> None:
    """safetensors' save_file, for others to read as any other file."""
    save_file(tensors, path, metadata=metadata)
    usual_mode(path)


def write_weights(
    path, files: list[list[str]], tensors: Iterable[tuple[str, Tensor]], write: bool = True
) -> None:
    """Write tensors, which come in the order of the files,
    one file in memory at a time, and their index.

    All tensors are gone through even without `write`: their source may be collective."""
    path = Path(path)
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    of_file = {name: file for file, group in zip(names, files, strict=True) for name in group}
    held: dict[str, Tensor] = {}
    total_size = 0
    for name, tensor in tensors:
        if name not in of_file or not write:
            continue
        held[name] = tensor.detach().cpu().contiguous()
        total_size += tensor.numel() * tensor.element_size()
        if len(held) == len(files[names.index(of_file[name])]):
            save_tensors(held, path / of_file[name], metadata={"format": "pt"})
            held = {}
    if write and len(files) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": of_file}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
