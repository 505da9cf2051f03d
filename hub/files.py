"""Where a checkpoint's files are, and safetensors in and out: single or sharded, checked before a weight is read."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common import read_json


def resolve_path(name, weights: bool = True) -> Path:
    """A local directory as it is; a hub name (org/model) becomes the folder with its downloaded files."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise ValueError(
            f"{name}: no such directory, and not a hub name like meta-llama/Llama-3.1-8B"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(name), allow_patterns=["*.json", "*.safetensors"] if weights else ["*.json"]
            )
        )
    except (GatedRepoError, RepositoryNotFoundError) as error:  # 401, 403, 404
        raise ValueError(
            f"{name}: no such directory, and the hub refuses it ({type(error).__name__}). Check the spelling; for a gated model "
            "accept its licence on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (
            401,
            403,
        ):  # an expired token, say
            raise ValueError(
                f"{name}: the hub refuses access ({error}); log in with `hf auth login` or set HF_TOKEN"
            ) from None
        raise ValueError(
            f"{name}: no such directory, and not to be downloaded ({error}); give a local directory"
        ) from None


def weight_files(path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a checkpoint directory, single or sharded."""
    path = Path(path)
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.exists():
        return {name: path / file for name, file in read_json(index)["weight_map"].items()}
    if not single.exists():
        pickled = sorted(path.glob("*.bin")) + sorted(path.glob("*.pth"))
        hint = (
            f"; {pickled[0].name} is pickled, which can run code: convert it to safetensors"
            if pickled
            else ""
        )
        raise ValueError(
            f"{path}: neither model.safetensors nor model.safetensors.index.json found{hint}"
        )
    with open_safetensors(single) as f:
        return dict.fromkeys(f.keys(), single)


def open_safetensors(file: Path):
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: not a readable safetensors file ({error}); download or save it again"
        ) from None


def check_weights(
    path: Path, expected: dict[str, tuple[int, ...]], four_bit: bool = False
) -> dict[str, Path]:
    """Name -> file of every expected weight (name -> shape), without reading them.

    ValueError names what is wrong. `four_bit`: 4-bit weights of bitsandbytes may stand where 16-bit
    ones are expected (quantized.py reads them); their absmax and states are among the names then."""
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
        raise ValueError(f"{path}: {len(missing)} weights are missing, first {missing[:3]}")
    if unexpected := sorted(found - expected.keys()):
        raise ValueError(
            f"{path}: {len(unexpected)} weights do not belong to this architecture, "
            f"first {unexpected[:3]}"
        )
    check_shapes(files, expected)
    return {name: files[name] for name in (*expected, *sorted(beside))}


def check_shapes(files: dict[str, Path], expected: dict[str, tuple[int, ...]]) -> None:
    handles = {file: open_safetensors(file) for file in sorted(set(files.values()))}
    for name, shape in expected.items():
        if name not in handles[files[name]].keys():
            raise ValueError(f"{files[name]}: {name} is listed in the index but not in the file")
        stored = tuple(handles[files[name]].get_slice(name).get_shape())
        if stored != shape:
            raise ValueError(
                f"{files[name]}: {name} has shape {stored}, config.json asks for {shape}"
            )


# ------------------------------------------------------------------------------------------------ writing
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
    for old in (
        *path.glob("model-*-of-*.safetensors"),
        path / "model.safetensors",
        path / "model.safetensors.index.json",
    ):
        old.unlink(missing_ok=True)


def write_weights(
    path, files: list[list[str]], tensors: Iterable[tuple[str, Tensor]], write: bool = True
) -> None:
    """Write tensors, which come in the order of the files, one file in memory at a time, and their index.

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
            save_file(held, path / of_file[name], metadata={"format": "pt"})
            held = {}
    if write and len(files) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": of_file}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
