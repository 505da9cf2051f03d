"""A LLaMA / Qwen decoder whose forward pass scores a tree: one prompt with several completions.

Families: Llama 2, 3, 3.1, 3.2; Qwen2, Qwen2.5; Qwen3. Module names equal the keys of their safetensors files, so a
checkpoint loads without a key table. Anything else is refused by name before a weight is read: other architectures,
other rope types, sliding windows, quantised or pickled weights.

`Transformer.forward(tree)` runs the prompt once and lets every completion branch off it:

    prompt  p0 p1 p2 p3           all completions see the prompt, none sees another;
              ├── a1 a2           each goes on at position 4; the row of p3 predicts
              └── b1 b2 b3        the first token of both.

Left out: training-time dropout outside LoRA, attention windows, mixture of experts, beam search, sampling.
References: RoPE arXiv:2104.09864, GQA arXiv:2305.13245, RMSNorm arXiv:1910.07467, SwiGLU arXiv:2002.05202,
Llama-3.1's rope scaling: the `llama3` rope type of its config.json.

Legend: B examples, P prompt width, C completion width, T = P + C (or any sequence), D hidden_size, H / Hkv query and
key-value heads, Dh head_dim, V vocab_size, M scored tokens.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import read_json
from kernels.logps import label_logps, mm_fp32

# cuDNN's attention gives NaN gradients with a mask at some lengths on Hopper (pytorch #196678).
torch.backends.cuda.enable_cudnn_sdp(False)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


# ------------------------------------------------------------------------------------------------ configuration
@dataclass
class ModelConfig:
    """The fields of a Hugging Face `config.json` that change what is computed."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or the parameters of rope_type llama3
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # biases on q, k, v (and o, except in Qwen2)
    max_position_embeddings: int = 4096
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def from_pretrained(cls, path) -> "ModelConfig":
        """Read `path/config.json` in the layout of transformers 4 or 5; ValueError names what is not supported."""
        file = resolve_path(path) / "config.json"
        raw = read_json(file)

        def refuse(what: str):
            raise ValueError(
                f"{file}: {what} is not supported; this project runs Llama 2/3, Qwen2/2.5 and Qwen3"
            )

        kind = raw.get("model_type")
        architectures = raw.get("architectures") or [ARCHITECTURES.get(kind)]
        if kind not in ARCHITECTURES or architectures != [ARCHITECTURES[kind]]:
            refuse(f"model_type {kind!r}, architectures {architectures}")
        if (quantised := raw.get("quantization_config")) and not is_nf4(quantised):
            refuse("quantization_config (quantised weights, other than bitsandbytes' nf4)")
        if raw.get("hidden_act", "silu") != "silu":
            refuse(f"hidden_act {raw['hidden_act']!r}")
        if raw.get("mlp_bias"):
            refuse("mlp_bias")
        if raw.get("use_sliding_window") or set(raw.get("layer_types") or []) - {"full_attention"}:
            refuse("a sliding window (use_sliding_window, layer_types)")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            refuse(f"rope_type {rope_type!r}")
        if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
            refuse("partial_rotary_factor")
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        missing = [key for key in required if raw.get(key) is None]
        if missing:
            raise ValueError(f"{file}: missing {', '.join(missing)}")
        llama3 = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        if rope_type == "llama3" and any(key not in rope for key in llama3):
            raise ValueError(
                f"{file}: rope_type llama3 needs {', '.join(llama3)}; found {sorted(rope)}"
            )

        heads = raw["num_attention_heads"]
        default_head_dim = 128 if kind == "qwen3" else raw["hidden_size"] // heads
        return cls(
            model_type=kind,
            **{key: raw[key] for key in required},
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or default_head_dim,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            rope_scaling={"rope_type": "llama3"} | {key: rope[key] for key in llama3}
            if rope_type == "llama3"
            else None,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            attention_bias=kind == "qwen2" or bool(raw.get("attention_bias")),
            max_position_embeddings=raw.get("max_position_embeddings", 4096),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=raw.get("eos_token_id"),
        )

    def to_dict(self) -> dict:
        """A `config.json` that transformers 4 and 5 both read: rope parameters stand in both layouts."""
        same = {
            key: value
            for key, value in vars(self).items()
            if key not in ("rope_scaling", "attention_bias")
        }
        rope = {"rope_theta": self.rope_theta} | (self.rope_scaling or {"rope_type": "default"})
        out = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "hidden_act": "silu",
            "initializer_range": 0.02,
        }
        out |= same | {"rope_scaling": self.rope_scaling, "rope_parameters": rope}
        if self.model_type != "qwen2":
            out["attention_bias"] = self.attention_bias
        if self.model_type != "llama":
            out |= {"use_sliding_window": False, "sliding_window": None}
        return out


# ------------------------------------------------------------------------------------------------ building blocks
class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, then times the weight: the order of the published models."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(
            x, x.shape[-1:], eps=self.eps
        )  # computes in fp32 and rounds once


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotary frequencies (Dh / 2,) in fp32, with Llama-3.1's scaling, which changes every position, not only late ones."""
    exponents = (
        torch.arange(0, config.head_dim, 2, device="cpu", dtype=torch.float32) / config.head_dim
    )
    inv_freq = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return inv_freq
    s = config.rope_scaling
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    wavelengths = 2 * torch.pi / inv_freq
    # 1 where many periods fit into the original context (kept), 0 where less than one does (slowed down by `factor`)
    keep = ((s["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inv_freq / s["factor"] + keep * inv_freq


def rotary_tables(
    inv_freq: Tensor, position_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, Dh), computed in fp32."""
    angles = position_ids[:, None, :, None].float() * inv_freq  # (B, 1, T, Dh / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + Dh/2), the half-split layout of the Hugging Face weights; x (B, H, T, Dh)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """Keys and values of every layer at fixed width; `write(layer, ...)` fills the next slots and returns all of them."""

    def __init__(self, num_layers: int, width: int):
        self.width, self.start = width, 0
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.layers[layer] is None:
            B, Hkv, _, Dh = k.shape
            self.layers[layer] = (
                k.new_zeros(B, Hkv, self.width, Dh),
                v.new_zeros(B, Hkv, self.width, Dh),
            )
        keys, values = self.layers[layer]
        keys[:, :, self.start : self.start + k.shape[2]] = k
        values[:, :, self.start : self.start + v.shape[2]] = v
        return keys, values


@dataclass
class AttentionPlan:
    """What all layers share. The first `prompt_width` queries are causal among themselves; the others use the mask."""

    prompt_width: int
    mask: Tensor | None  # (B, 1, T - prompt_width, keys) bool, True where a query may look
    cos: Tensor
    sin: Tensor
    cache: KVCache | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, **kwargs) -> Tensor:
    """Scaled dot-product attention of H query heads on Hkv key-value heads."""
    if (
        torch.compiler.is_compiling()
    ):  # else inductor asserts the strides of the first length it saw (torch 2.13)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if q.is_cuda:  # with a mask or in fp32, enable_gqa falls back to the slow path there
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=not q.is_cuda, **kwargs)


def project(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Projections of one input; those with adapters know how to share the work (lora.py)."""
    adapted = next((layer for layer in layers if hasattr(layer, "project")), None)
    return adapted.project(x, layers) if adapted else tuple(layer(x) for layer in layers)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, Dh = config.hidden_size, config.head_dim
        H, Hkv = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.layer, self.head_dim = layer, Dh
        self.q_proj = nn.Linear(D, H * Dh, bias=bias)
        self.k_proj = nn.Linear(D, Hkv * Dh, bias=bias)
        self.v_proj = nn.Linear(D, Hkv * Dh, bias=bias)
        self.o_proj = nn.Linear(H * Dh, D, bias=bias and config.model_type != "qwen2")
        if config.model_type == "qwen3":  # one RMSNorm per head, before the rotation
            self.q_norm = RMSNorm(Dh, config.rms_norm_eps)
            self.k_norm = RMSNorm(Dh, config.rms_norm_eps)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        B, T, _ = x.shape
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k = q.view(B, T, -1, self.head_dim), k.view(B, T, -1, self.head_dim)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rotary(q.transpose(1, 2), plan.cos, plan.sin)  # (B, H, T, Dh)
        k = apply_rotary(k.transpose(1, 2), plan.cos, plan.sin)  # (B, Hkv, T, Dh)

        # Two exact calls instead of one with a T x T mask: ~95 % of the work takes the causal flash path.
        P, outputs = plan.prompt_width, []
        if P > 0:
            outputs.append(attend(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True))
        keys, values = plan.cache.write(self.layer, k, v) if plan.cache else (k, v)
        if T > P:
            outputs.append(attend(q[:, :, P:], keys, values, attn_mask=plan.mask))
        out = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up that keeps its two inputs and nothing else: a third less memory than autograd would hold."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, gate).mul_(up), F.silu(gate).mul_(grad)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, hidden, bias=False)
        self.up_proj = nn.Linear(D, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(SwiGLU.apply(gate, up))


class Block(nn.Module):
    checkpointing = (
        False  # activation checkpointing: keep the block's input, run it again in backward
    )
    compiled: Callable | None = (
        None  # `compute` by torch.compile; decoding, one token at a time, never takes it
    )

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        compute = self.compiled if self.compiled and plan.cache is None else self.compute
        if self.checkpointing and torch.is_grad_enabled():
            # Inside forward, not around the block: hooks on the block (sharding) then run once, not twice.
            return checkpoint(compute, x, plan, use_reentrant=False)
        return compute(x, plan)

    def compute(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), plan)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: everything under the key prefix `model.`"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, plan: AttentionPlan) -> Tensor:
        x = self.embed_tokens(input_ids)
        for block in self.layers:
            x = block(x, plan)
        return self.norm(x)


# ------------------------------------------------------------------------------------------------ the model
class Transformer(nn.Module):
    """The language model. Always call `model(tree)`: log-probs are computed inside, where a sharded head is whole."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source: Path | None = None  # folder the weights were read from
        self.name_or_path = ""  # how its user calls it
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def forward(self, tree) -> tuple[Tensor, Tensor]:
        """Score a `data.PromptTree`: (token_logps (M,) fp32, greedy_ids (M,)), one entry per scored token."""
        mask = branch_mask(tree.branch_ids, tree.prompt_width)
        hidden = self.hidden_states(
            tree.input_ids, tree.position_ids, tree.prompt_width, mask
        )  # (B, T, D)
        rows = hidden.flatten(0, 1).index_select(0, tree.rows)  # (M, D)
        return label_logps(rows, self.lm_head.weight, tree.labels)

    def logits(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Plain causal logits (B, T, V) in fp32 of whole sequences (B, T): for tests and for reading, not for training."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(
                input_ids
            )
        hidden = self.hidden_states(input_ids, position_ids, input_ids.shape[1], None)
        return mm_fp32(hidden.flatten(0, 1), self.lm_head.weight.T).view(*input_ids.shape, -1)

    def hidden_states(self, input_ids, position_ids, prompt_width, mask, cache=None) -> Tensor:
        dtype = self.model.norm.weight.dtype
        cos, sin = rotary_tables(self.inv_freq, position_ids, dtype)
        return self.model(input_ids, AttentionPlan(prompt_width, mask, cos, sin, cache))

    def decode_step(self, input_ids, position_ids, prompt_width, mask, cache, last) -> Tensor:
        """Greedy next ids (B,) after row `last` (B,) of each sequence; the cache takes up the new keys and values."""
        hidden = self.hidden_states(input_ids, position_ids, prompt_width, mask, cache)
        rows = hidden[torch.arange(len(last), device=last.device), last]  # (B, D)
        return label_logps(rows, self.lm_head.weight, torch.zeros_like(last))[1]


def branch_mask(branch_ids: Tensor, prompt_width: int) -> Tensor | None:
    """(B, 1, C, P + C) bool: a completion token sees the real prompt and what came before it in its own branch."""
    T = branch_ids.shape[1]
    if prompt_width == T:
        return None
    queries = branch_ids[:, prompt_width:, None]  # (B, C, 1)
    keys = branch_ids[:, None, :]  # (B, 1, T)
    order = torch.arange(T, device=branch_ids.device)
    earlier = order <= order[prompt_width:, None]  # (C, T)
    # The prompt has branch id 0, so padding queries see it too, and no row of the mask is empty.
    return ((keys == 0) | ((keys == queries) & earlier))[:, None]


# ------------------------------------------------------------------------------------------------ weights
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


def is_nf4(quantization: dict) -> bool:
    """Whether a config.json's quantization_config says bitsandbytes' 4-bit NormalFloat."""
    kind = (quantization.get("quant_method"), quantization.get("bnb_4bit_quant_type"))
    return kind == ("bitsandbytes", "nf4")


def check_weights(path: Path, config: ModelConfig, four_bit: bool = False) -> dict[str, Path]:
    """Name -> file of every weight that the architecture needs, without reading them.

    ValueError names what is wrong. `four_bit`: 4-bit weights of bitsandbytes may stand where 16-bit
    ones are expected (quantized.py reads them); their absmax and states are among the names then."""
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in Transformer(config).state_dict().items()}
    ignored = {name for name in expected if config.tie_word_embeddings and name == "lm_head.weight"}
    for name in ignored:
        del expected[name]
    files = weight_files(path)
    quantised = {name for name in expected if f"{name}.quant_state.bitsandbytes__nf4" in files}
    if quantised and not four_bit:
        raise ValueError(f"{path}: its weights are quantised to 4 bits; add --load_in_4bit")
    beside = {name for name in files if name.partition(".weight.")[0] + ".weight" in quantised}
    beside -= quantised
    for name in quantised:
        out, inputs = expected[name]
        expected[name] = (out * inputs // 2, 1)
    found = {
        name for name in files if name not in ignored and not name.endswith("rotary_emb.inv_freq")
    } - beside
    if missing := sorted(expected.keys() - found):
        raise ValueError(f"{path}: {len(missing)} weights are missing, first {missing[:3]}")
    if unexpected := sorted(found - expected.keys()):
        raise ValueError(
            f"{path}: {len(unexpected)} weights do not belong to this architecture, first {unexpected[:3]}"
        )
    handles = {file: open_safetensors(file) for file in sorted(set(files.values()))}
    for name, shape in expected.items():
        if name not in handles[files[name]].keys():
            raise ValueError(f"{files[name]}: {name} is listed in the index but not in the file")
        stored = tuple(handles[files[name]].get_slice(name).get_shape())
        if stored != shape:
            raise ValueError(
                f"{files[name]}: {name} has shape {stored}, config.json asks for {shape}"
            )
    return {name: files[name] for name in (*expected, *sorted(beside))}


def load_pretrained(path, dtype: torch.dtype = torch.float32, device="cpu") -> Transformer:
    """Load a Hugging Face directory or hub name; ValueError names the file and the missing, unexpected or misshapen keys."""
    model = empty_model(path)
    files = check_weights(model.source, model.config)
    handles = {file: open_safetensors(file) for file in sorted(set(files.values()))}
    state = {name: handles[file].get_tensor(name).to(device, dtype) for name, file in files.items()}
    model.load_state_dict(state, strict=not model.config.tie_word_embeddings, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.inv_freq = inverse_frequencies(model.config).to(device)
    return model


def empty_model(path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The architecture of a checkpoint on the `meta` device: shapes without memory."""
    given, path = str(path), resolve_path(path)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_pretrained(path)).to(dtype)
    model.source, model.name_or_path = path, given
    return model


def init_weights(config: ModelConfig, seed: int) -> Transformer:
    """A random model: normal with std hidden_size^-0.5, projections back into the residual scaled down with depth."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = config.hidden_size**-0.5 / (
                (2 * config.num_hidden_layers) ** 0.5 if residual else 1
            )
            nn.init.normal_(p, std=std, generator=generator)
        elif name.endswith(".bias"):
            nn.init.zeros_(p)
    return model


def save_pretrained(
    model: Transformer,
    path,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    shard_bytes: int = 5 * 10**9,
    write: bool = True,
) -> None:
    """Write config.json and safetensors that transformers 4 and 5 read. Tokenizer files are the caller's to copy.

    `tensors` overrides the weights, one after the other (whole ones gathered from a sharded model, where every rank calls
    this and only the one with `write` writes). Files above `shard_bytes` are split; one file's tensors are in memory."""
    path = Path(path)
    shapes = dict(model.state_dict())
    if any(".lora_" in name for name in shapes):
        raise ValueError(
            "the model carries LoRA adapters: save_adapter writes them, merge_lora folds them in first"
        )
    if any(name.endswith(".absmax") for name in shapes):
        raise ValueError(
            "the model's linear layers are in 4 bits: quantized.unquantized(model) gives them back "
            "their 16 bits first"
        )
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    files, sizes = [[]], [0]  # which tensors go into which file
    for name, tensor in shapes.items():
        nbytes = tensor.numel() * tensor.element_size()
        if sizes[-1] + nbytes > shard_bytes and files[-1]:
            files.append([])
            sizes.append(0)
        files[-1].append(name)
        sizes[-1] += nbytes
    dtype = str(next(iter(shapes.values())).dtype).removeprefix("torch.")
    if write:
        path.mkdir(parents=True, exist_ok=True)
        config = model.config.to_dict() | {"torch_dtype": dtype, "dtype": dtype}
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for old in (
            *path.glob("model-*-of-*.safetensors"),
            path / "model.safetensors",
            path / "model.safetensors.index.json",
        ):
            old.unlink(missing_ok=True)  # a reader might prefer them to what is written now

    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    of_file = {name: file for file, group in zip(names, files, strict=True) for name in group}
    held: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items() if tensors is None else tensors:
        if name not in of_file or not write:
            continue
        held[name] = tensor.detach().cpu().contiguous()
        if len(held) == len(
            files[names.index(of_file[name])]
        ):  # tensors come in the order of the files
            save_file(held, path / of_file[name], metadata={"format": "pt"})
            held = {}
    if write and len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": of_file}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------ generation
@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids,  # ids that end an answer
    any_rank: Callable[
        [bool], bool
    ] = bool,  # sharded models: true while any rank still needs the forward pass
) -> list[list[int]]:
    """Greedy decoding of a batch with a KV cache: per prompt its new ids, the stop id included when one was reached."""
    if not prompts or any(not ids for ids in prompts):
        raise ValueError("generate needs at least one prompt, and no empty one")
    device = model.inv_freq.device
    stop_ids = set(stop_ids)
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    B, P = len(prompts), max(map(len, prompts))
    input_ids = torch.tensor(
        [ids + [0] * (P - len(ids)) for ids in prompts], device=device
    )  # right-padded
    cache = KVCache(model.config.num_hidden_layers, P + max_new_tokens)
    slots = torch.arange(cache.width, device=device)
    visible = slots < lengths[:, None]  # (B, width): the real prompt, then every generated slot

    outputs: list[list[int]] = [[] for _ in prompts]
    done = [False] * B
    positions = torch.arange(P, device=device).expand(B, P)
    prompt_width, mask, last = P, None, lengths - 1
    for step in range(max_new_tokens):
        next_ids = model.decode_step(input_ids, positions, prompt_width, mask, cache, last)
        cache.start = P + step
        for b, token in enumerate(next_ids.tolist()):
            if not done[b]:
                outputs[b].append(token)
                done[b] = token in stop_ids
        if not any_rank(not all(done)):
            break
        input_ids, positions = next_ids[:, None], (lengths + step)[:, None]
        visible = visible | (slots == cache.start)
        prompt_width, mask, last = 0, visible[:, None, None], torch.zeros_like(lengths)
    return outputs
