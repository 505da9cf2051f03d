"""A LoRA adapter in PEFT's two files, `adapter_model.safetensors` and `adapter_config.json`.

Both ways are strict: a key that does not match is an error, never a warning.

Left out, and refused by name when a foreign adapter needs it: DoRA, rank or alpha patterns,
trained biases, saved modules, layer selection, adapters of embeddings.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from common import read_json
from hub.files import note_once, open_safetensors, save_tensors, weight_files

PEFT_PREFIX = "base_model.model."


def base_fingerprint(path) -> str:
    """SHA-256 over config-independent facts of a checkpoint:
    each tensor's name, shape and first row.

    Cheap at any size."""
    digest = hashlib.sha256()
    for name, file in sorted(weight_files(path).items()):
        with open_safetensors(file) as f:
            view = f.get_slice(name)
            row = view[:1].float().contiguous().numpy().tobytes()
            digest.update(f"{name} {view.get_shape()}".encode() + row)
    return digest.hexdigest()


def read_adapter_config(path) -> dict:
    """adapter_config.json, checked for everything this project does not support."""
    file = Path(path) / "adapter_config.json"
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{file}: peft_type {config.get('peft_type')!r} is not supported, only LORA"
        )
    unsupported = [
        "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias",
        "layers_to_transform", "layers_pattern", "layer_replication", "fan_in_fan_out",
        "exclude_modules", "target_parameters", "trainable_token_indices", "use_qalora",
        "alora_invocation_tokens", "corda_config", "eva_config", "loftq_config", "lora_ga_config",
        "kasa_config", "velora_config", "monteclora_config", "arrow_config", "use_bdlora",
    ]  # fmt: skip
    needed = [key for key in unsupported if config.get(key)]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in ("gaussian", "orthogonal", "eva"):
        # PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA: they change the base too
        needed.append(f"init_lora_weights={init}")
    if (config.get("bias") or "none") != "none":
        needed.append(f"bias={config['bias']}")
    if needed:
        raise ValueError(
            f"{file}: {', '.join(needed)} not supported; only plain LoRA and rsLoRA adapters are"
        )
    adapter_settings(file, config)  # refused here, before any weight is read
    return config


def adapter_settings(file: Path, config: dict) -> dict:
    """Arguments of `lora.apply_lora`, with PEFT's defaults;
    ValueError names a field of the wrong kind."""
    defaults = {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": False,
    }
    settings = {
        key: default if config.get(key) is None else config[key]
        for key, default in defaults.items()
    }
    r, targets = settings["r"], settings["target_modules"]
    names = [targets] if isinstance(targets, str) else targets
    listed = isinstance(names, list) and names and all(isinstance(t, str) and t for t in names)
    sound = {
        "r (a whole number from 1 to 65536)": type(r) is int and 1 <= r <= 65536,
        "lora_alpha (a number above 0)": _is_number(settings["lora_alpha"], above=0),
        "lora_dropout (a number from 0 to below 1)": _is_number(settings["lora_dropout"], below=1),
        "target_modules (a list of names, or one expression)": bool(listed),
        "use_rslora (true or false)": isinstance(settings["use_rslora"], bool),
    }
    if wrong := next((what for what, right in sound.items() if not right), None):
        value = config.get(wrong.split()[0])
        raise ValueError(f"{file}: expected {wrong}, got {str(value)[:60]!r}")
    return settings


def _is_number(value, above: float = -1e-30, below: float = math.inf) -> bool:
    return type(value) in (int, float) and above < value < below


def base_of(path) -> str:
    """The base model that an adapter names; ValueError where it names none."""
    name = read_adapter_config(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{Path(path) / 'adapter_config.json'}: base_model_name_or_path is {name!r}, so the "
            "adapter does not say what it was trained on: give the base as --model"
        )
    return name


CAUSES = (  # (expression over a key, what made it and the way out)
    (r"(^|\.)_orig_mod\.", "saved from inside torch.compile: save the inner model"),
    (r"^module\.", "saved from inside DistributedDataParallel: save the inner model"),
    (
        r"^base_model\.model\.base_model\.model\.",
        "PEFT on PEFT: the base already was a PEFT model; "
        "merge the first adapter, then train again",
    ),
    (r"lora_magnitude_vector", "DoRA, which is not supported"),
    (r"lora_embedding_[AB]", "an adapter of embeddings, which is not supported"),
    (r"\blm_head\.lora_[AB]\.", "an adapter of lm_head, which is not supported"),
    (r"\.lora_[AB]\.bias$", "an adapter with a bias of its own, which is not supported"),
    (
        r"\.lora_[AB]\.[^.]+\.weight$",
        "an adapter's name inside the keys: save it with PEFT's save_pretrained",
    ),
)


def read_adapter_tensors(
    path, config: dict, source, name_or_path: str, held: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Tensors by PEFT's names, finite, without embeddings that equal the base's.

    `source` is the base's folder; a base that was never in one has its weights in `held`.
    ValueError if the adapter was trained on another base, or if its keys show that it cannot be
    read."""
    file = Path(path) / "adapter_model.safetensors"
    if not file.exists():
        raise ValueError(f"{file}: no such file (pickled adapter_model.bin files are not read)")
    with open_safetensors(file) as f:
        fingerprint = (f.metadata() or {}).get("base_fingerprint")
        tensors = {_plain(name): f.get_tensor(name) for name in f.keys()}
        if len(tensors) < len(f.keys()):
            raise ValueError(f"{file}: the same key stands with and without '.default.' in it")
    _refuse_by_cause(file, tensors)
    if fingerprint and source and fingerprint != base_fingerprint(source):
        trained_on = config.get("base_model_name_or_path")
        raise ValueError(
            f"{path}: this adapter was trained on another base ({trained_on}), "
            f"not on {name_or_path}"
        )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        saved = tensors.pop(PEFT_PREFIX + name, None)
        if saved is not None:
            _check_saved_embedding(file, name, saved, _base_tensor(name, source, held or {}))
    _check_values(file, tensors)
    return tensors


def _plain(name: str) -> str:
    """A key without the name that PEFT gives an adapter in memory."""
    return re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", name)


def _refuse_by_cause(file: Path, tensors: dict[str, Tensor]) -> None:
    for pattern, cause in CAUSES:
        keys = [name for name in tensors if re.search(pattern, name)]
        if keys:
            raise ValueError(f"{file}: {len(keys)} keys like {keys[0]!r}: {cause}")
    if empty := [name for name, tensor in tensors.items() if tensor.numel() == 0]:
        raise ValueError(
            f"{file}: {len(empty)} tensors are empty (first {empty[0]}): saved under DeepSpeed "
            "ZeRO-3 without gathering the weights; save it again"
        )


def _base_tensor(name: str, source, held: dict[str, Tensor]) -> Tensor | None:
    """The base's embedding or head; a tied head is the embedding."""
    tied = "model.embed_tokens.weight"
    if not source:
        tensor = held.get(name, held.get(tied))
        return None if tensor is None or tensor.is_meta else tensor
    files = weight_files(source)
    name = name if name in files else tied
    return open_safetensors(files[name]).get_tensor(name) if name in files else None


def _check_saved_embedding(file: Path, name: str, saved: Tensor, base: Tensor | None) -> None:
    same_shape = base is not None and saved.shape == base.shape
    if same_shape and torch.equal(saved.cpu(), base.cpu().to(saved.dtype)):
        return
    raise ValueError(
        f"{file}: it holds {name}, other than the base's: the embeddings were trained or resized, "
        "which is not supported; train with the embeddings frozen, or merge it with PEFT first"
    )


def _check_values(file: Path, tensors: dict[str, Tensor]) -> None:
    """NaN and infinity are refused; an adapter that adds nothing is said."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{file}: {name} is stored as {tensor.dtype}; expected floating point")
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise ValueError(
                f"{file}: the adapter holds NaN or infinity: {bad} of {tensor.numel()} values of "
                f"{name}; it was broken when it was saved, take an earlier one"
            )
    Bs = [tensor for name, tensor in tensors.items() if name.endswith(".lora_B.weight")]
    if Bs and not any(bool(B.any()) for B in Bs):
        note_once(
            f"{file}: every lora_B is zero, so the adapter adds nothing: the base alone answers "
            "(never trained, or saved before its first step)"
        )


def check_adapter_tensors(
    path,
    tensors: dict[str, Tensor],
    expected: dict[str, tuple],
    ignored: list[str],  # target modules that match no linear layer of the model
) -> None:
    """ValueError unless the names and shapes are the expected ones."""
    file = Path(path) / "adapter_model.safetensors"
    if expected.keys() != tensors.keys():
        missing = sorted(expected.keys() - tensors.keys())
        unexpected = sorted(tensors.keys() - expected.keys())
        foreign = unexpected and not unexpected[0].startswith(PEFT_PREFIX)
        hint = f"; PEFT's keys begin with {PEFT_PREFIX!r}" if foreign else ""
        if ignored:
            hint += f"; target_modules {', '.join(ignored)} match no linear layer of this model"
        raise ValueError(
            f"{file}: adapter keys do not match the model: "
            f"{len(missing)} missing (first {missing[:2]}), "
            f"{len(unexpected)} unexpected (first {unexpected[:2]}){hint}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, the model needs {expected[name]}"
            )


def write_adapter(
    path, tensors: dict[str, Tensor], settings: dict, source, name_or_path: str
) -> None:
    """Write PEFT's two files; `tensors` by the model's names,
    `settings` as `apply_lora` leaves them."""
    named = {
        PEFT_PREFIX + name: tensor.detach().float().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    if settings["use_rslora"]:
        note_once(
            f"{path}: use_rslora scales by alpha / sqrt(r); llama.cpp ignores it and scales by "
            "alpha / r: merge the adapter before it is converted"
        )
    metadata = {"format": "pt"}
    if source:
        metadata["base_fingerprint"] = base_fingerprint(source)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(named, path / "adapter_model.safetensors", metadata=metadata)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name_or_path,
        **settings,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
