"""A LoRA adapter in PEFT's two files, `adapter_model.safetensors` and `adapter_config.json`.

Both ways are strict: a key that does not match is an error, never a warning.

Left out, and refused by name when a foreign adapter needs it: DoRA, rank or alpha patterns, trained biases, saved
modules, layer selection, adapters of embeddings.
"""

import hashlib
import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from common import read_json
from hub.files import open_safetensors, weight_files

PEFT_PREFIX = "base_model.model."


def base_fingerprint(path) -> str:
    """SHA-256 over config-independent facts of a checkpoint: each tensor's name, shape and first row. Cheap at any size."""
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
        "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layers_to_transform",
        "layers_pattern", "layer_replication", "fan_in_fan_out", "exclude_modules", "target_parameters",
        "trainable_token_indices", "use_qalora", "alora_invocation_tokens", "corda_config", "eva_config", "loftq_config",
        "lora_ga_config", "kasa_config", "velora_config", "monteclora_config", "arrow_config", "use_bdlora",
    ]  # fmt: skip
    needed = [key for key in unsupported if config.get(key)]
    if isinstance(init := config.get("init_lora_weights"), str) and init not in (
        "gaussian",
        "orthogonal",
        "eva",
    ):
        needed.append(
            f"init_lora_weights={init}"
        )  # PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA: they change the base too
    if config.get("bias", "none") != "none":
        needed.append(f"bias={config['bias']}")
    if needed:
        raise ValueError(
            f"{file}: {', '.join(needed)} not supported; only plain LoRA and rsLoRA adapters are"
        )
    return config


def read_adapter_tensors(path, config: dict, source, name_or_path: str) -> dict[str, Tensor]:
    """Tensors by PEFT's names; ValueError if the adapter was trained on another base than `source`."""
    file = Path(path) / "adapter_model.safetensors"
    if not file.exists():
        raise ValueError(f"{file}: no such file (pickled adapter_model.bin files are not read)")
    with open_safetensors(file) as f:
        fingerprint = (f.metadata() or {}).get("base_fingerprint")
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    if fingerprint and source and fingerprint != base_fingerprint(source):
        trained_on = config.get("base_model_name_or_path")
        raise ValueError(
            f"{path}: this adapter was trained on another base ({trained_on}), not on {name_or_path}"
        )
    return tensors


def check_adapter_tensors(path, tensors: dict[str, Tensor], expected: dict[str, tuple]) -> None:
    """ValueError unless the names and shapes are the expected ones."""
    file = Path(path) / "adapter_model.safetensors"
    if expected.keys() != tensors.keys():
        missing = sorted(expected.keys() - tensors.keys())
        unexpected = sorted(tensors.keys() - expected.keys())
        raise ValueError(
            f"{file}: adapter keys do not match the model: {len(missing)} missing (first {missing[:2]}), "
            f"{len(unexpected)} unexpected (first {unexpected[:2]})"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, the model needs {expected[name]}"
            )


def write_adapter(
    path, tensors: dict[str, Tensor], settings: dict, source, name_or_path: str
) -> None:
    """Write PEFT's two files; `tensors` by the model's names, `settings` as `apply_lora` leaves them."""
    named = {
        PEFT_PREFIX + name: tensor.detach().float().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    metadata = {"format": "pt"}
    if source:
        metadata["base_fingerprint"] = base_fingerprint(source)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(named, path / "adapter_model.safetensors", metadata=metadata)
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
