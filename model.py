"""A LLaMA / Qwen decoder whose forward pass scores a tree: one prompt with several completions.

Families: Llama 2, 3, 3.1, 3.2; Qwen2, Qwen2.5; Qwen3. Module names equal the keys of their
safetensors files, so a checkpoint loads without a key table. hub/config.py refuses anything else.

`Transformer.forward(tree)` runs the prompt once and lets every completion branch off it:

    prompt  p0 p1 p2 p3           all completions see the prompt, none sees another;
              ├── a1 a2           each continues at position 4; the row of p3 predicts
              └── b1 b2 b3        the first token of both.

Left out: dropout outside LoRA, attention windows, mixture of experts, beam search, sampling.
References: RoPE arXiv:2104.09864, GQA 2305.13245, RMSNorm 1910.07467, SwiGLU 2002.05202.

Legend: B examples, P prompt width, C completion width, T = P + C (or any sequence),
D hidden_size, H / Hkv query and key-value heads, Dh head_dim, V vocab_size, M scored tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hub.config import read_config, write_config
from hub.files import note_once, open_weights, resolve_path, stored_head_differs, write_weights
from hub.quantized import read_codes, to_4bit
from kernels.logps import label_logps, mm_fp32

# cuDNN's attention gives NaN gradients with a mask at some lengths on Hopper (pytorch #196678).
torch.backends.cuda.enable_cudnn_sdp(False)


# ------------------------------------------------------------------------ configuration
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
        """Read `path/config.json`; ValueError names what is not supported."""
        return cls(**read_config(resolve_path(path)))


# ------------------------------------------------------------------------ building blocks
class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, then times the weight: the order of the published models."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)  # fp32, rounded once


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotary frequencies (Dh / 2,) in fp32; Llama-3.1's scaling changes early positions, too."""
    Dh, s = config.head_dim, config.rope_scaling
    exponents = torch.arange(0, Dh, 2, device="cpu", dtype=torch.float32) / Dh
    inv_freq = 1.0 / config.rope_theta**exponents
    if s is None:
        return inv_freq
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    periods = s["original_max_position_embeddings"] / (2 * torch.pi / inv_freq)
    # 1: many periods fit into the original context (kept); 0: less than one (slowed by `factor`)
    keep = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inv_freq / s["factor"] + keep * inv_freq


def rotary_tables(inv_freq: Tensor, position_ids: Tensor, dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, Dh), computed in fp32."""
    angles = position_ids[:, None, :, None].float() * inv_freq  # (B, 1, T, Dh / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + Dh/2) of x (B, H, T, Dh), the layout of Hugging Face's weights."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """Keys and values of every layer at fixed width; `write` fills the slots from `start` on."""

    def __init__(self, num_layers: int, width: int):
        self.width, self.start = width, 0
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.layers[layer] is None:
            shape = (*k.shape[:2], self.width, k.shape[3])  # (B, Hkv, width, Dh)
            self.layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        keys, values = self.layers[layer]
        keys[:, :, self.start : self.start + k.shape[2]] = k
        values[:, :, self.start : self.start + v.shape[2]] = v
        return keys, values


@dataclass
class AttentionPlan:
    """What all layers share: the first `prompt_width` queries are causal, the others masked."""

    prompt_width: int
    mask: Tensor | None  # (B, 1, T - prompt_width, keys) bool, True where a query sees a key
    cos: Tensor  # (B, 1, T, Dh)
    sin: Tensor  # (B, 1, T, Dh)
    cache: KVCache | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, **kwargs) -> Tensor:
    """Scaled dot-product attention of H query heads on Hkv key-value heads."""
    if torch.compiler.is_compiling():  # inductor asserts the strides of the first length (2.13)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    # On CUDA the flash path takes grouped heads; a mask or fp32 would fall back to the slow path.
    grouped = not q.is_cuda or ("attn_mask" not in kwargs and q.dtype != torch.float32)
    if not grouped:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **kwargs)


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
        projected = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in projected)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rotary(q, plan.cos, plan.sin)  # (B, H, T, Dh)
        k = apply_rotary(k, plan.cos, plan.sin)  # (B, Hkv, T, Dh)
        # Two exact calls, no T x T mask: ~95 % of the work takes the causal flash path.
        P, outputs = plan.prompt_width, []
        if P > 0:
            outputs.append(attend(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True))
        keys, values = plan.cache.write(self.layer, k, v) if plan.cache else (k, v)
        if T > P:
            outputs.append(attend(q[:, :, P:], keys, values, attn_mask=plan.mask))
        out = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a * b in a's memory, except in graphs: torch 2.11 would lose the output's gradient there."""
    return a * b if torch.compiler.is_compiling() else a.mul_(b)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up that saves only its two inputs, a third less than autograd would."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _times(F.silu(gate), up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = _times(torch.ops.aten.silu_backward(grad, gate), up)
        return grad_gate, _times(F.silu(gate), grad)


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
    checkpointing = False  # keep only the block's input, run it again in backward
    compiled: Callable | None = None  # `compute`, compiled; decoding never uses it

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        compute = self.compiled if self.compiled and plan.cache is None else self.compute
        if self.checkpointing and torch.is_grad_enabled():
            # inside forward, so that hooks on the block (sharding) run once
            return checkpoint(compute, x, plan, use_reentrant=False)
        return compute(x, plan)

    def use_compiler(self, backend: str = "inductor") -> None:
        """Use the compiled `compute` from now on; lengths are dynamic from the start."""
        # Inductor's tiling analysis asserts on such lengths on a GPU (pytorch#181563, #197077).
        options = {"triton.coalesce_tiling_analysis": False} if backend == "inductor" else None
        self.compiled = torch.compile(self.compute, dynamic=True, backend=backend, options=options)

    def compute(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), plan)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm; their keys start with `model.`"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, plan: AttentionPlan) -> Tensor:
        x = self.embed_tokens(input_ids)
        for block in self.layers:
            x = block(x, plan)
        return self.norm(x)


# ------------------------------------------------------------------------ the model
class Transformer(nn.Module):
    """The language model. Always call `model(tree)`: a sharded head is whole only in forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source: Path | None = None  # folder the weights were read from
        self.name_or_path = ""  # the name or path that the user gave
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def forward(self, tree) -> tuple[Tensor, Tensor]:
        """Score a `data.PromptTree`: (log-probs of the M labels in fp32, argmax ids (M,))."""
        P, mask = tree.prompt_width, branch_mask(tree.branch_ids, tree.prompt_width)
        hidden = self.hidden_states(tree.input_ids, tree.position_ids, P, mask)  # (B, T, D)
        rows = hidden.flatten(0, 1).index_select(0, tree.rows)  # (M, D)
        return label_logps(rows, self.lm_head.weight, tree.labels)

    def logits(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Plain causal logits (B, T, V) in fp32 of whole sequences (B, T): not for training."""
        T = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(T, device=input_ids.device).expand_as(input_ids)
        hidden = self.hidden_states(input_ids, position_ids, T, None)
        return mm_fp32(hidden.flatten(0, 1), self.lm_head.weight.T).view(*input_ids.shape, -1)

    def hidden_states(self, input_ids, position_ids, prompt_width, mask, cache=None) -> Tensor:
        cos, sin = rotary_tables(self.inv_freq, position_ids, self.model.norm.weight.dtype)
        return self.model(input_ids, AttentionPlan(prompt_width, mask, cos, sin, cache))

    def decode_step(self, input_ids, position_ids, prompt_width, mask, cache, last) -> Tensor:
        """Greedy next ids (B,) after row `last` (B,) of each sequence; the cache grows."""
        hidden = self.hidden_states(input_ids, position_ids, prompt_width, mask, cache)
        rows = hidden[torch.arange(len(last), device=last.device), last]  # (B, D)
        return label_logps(rows, self.lm_head.weight, torch.zeros_like(last))[1]


def branch_mask(branch_ids: Tensor, prompt_width: int) -> Tensor | None:
    """(B, 1, C, P + C) bool: a completion token sees the prompt and its own branch before it."""
    T = branch_ids.shape[1]
    if prompt_width == T:
        return None
    queries = branch_ids[:, prompt_width:, None]  # (B, C, 1)
    keys = branch_ids[:, None, :]  # (B, 1, T)
    order = torch.arange(T, device=branch_ids.device)
    earlier = order <= order[prompt_width:, None]  # (C, T)
    # Padding queries see the prompt (branch 0), too: no row of the mask is empty.
    return ((keys == 0) | ((keys == queries) & earlier))[:, None]


# ------------------------------------------------------------------------ weights
def load_pretrained(
    path, dtype: torch.dtype = torch.float32, device="cpu", load_in_4bit: bool = False
) -> Transformer:
    """Load a Hugging Face directory or hub name; ValueError names the file and what is wrong."""
    model = empty_model(path, dtype)
    model = to_4bit(model) if load_in_4bit else model
    materialize(model, device)
    parameters = model.named_parameters(remove_duplicate=False)
    read_weights(model, {name: (p, 0, len(p)) for name, p in parameters})
    return model


def empty_model(path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The architecture of a checkpoint on the `meta` device: shapes without memory."""
    given, path = str(path), resolve_path(path)
    config = ModelConfig.from_pretrained(path)
    if config.tie_word_embeddings and stored_head_differs(path):
        note_once(f"{path}: tie_word_embeddings, but another lm_head.weight is stored and used")
        config.tie_word_embeddings = False
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.source, model.name_or_path = path, given
    return model


def materialize(model: Transformer, device) -> None:
    """Allocate a `meta` model on the device; its weights are not filled in yet."""
    model.to_empty(device=device)
    model.inv_freq = inverse_frequencies(model.config).to(device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


@torch.no_grad()
def read_weights(
    model: Transformer,
    parts: dict[str, tuple[Tensor, int, int]],  # where rows [start, stop) of a parameter go
    products: dict[str, tuple[Tensor, Tensor]] | None = None,  # of an adapter to merge
) -> None:
    """Fill in a model's weights, whole or the rows of a rank, as floats or as 4-bit codes."""
    with torch.device("meta"):
        bare = Transformer(model.config)
    needed = {name: tuple(p.shape) for name, p in bare.named_parameters()}  # no tied head
    four_bit = any(part.dtype == torch.uint8 for part, _, _ in parts.values())
    weights, dtype = open_weights(model.source, needed, four_bit), model.model.norm.weight.dtype
    for name in needed:
        part, start, stop = parts[name]
        if part.dtype == torch.uint8 and stop > start:
            absmax, _, _ = parts[name.removesuffix("weight") + "absmax"]
            read_codes(weights, name, start, stop, part, absmax, dtype)
        elif stop > start:
            rows = weights.rows(name)[start:stop]
            if products and name in products:
                B, A = products[name]
                rows = rows.float() + B[start:stop] @ A
            part.copy_(rows)


def init_weights(config: ModelConfig, seed: int) -> Transformer:
    """Make a random model: std hidden_size^-0.5, smaller with depth for residual projections."""
    model, generator = Transformer(config), torch.Generator().manual_seed(seed)
    depth = 2 * config.num_hidden_layers
    for name, p in model.named_parameters():
        if p.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = config.hidden_size**-0.5 / (depth**0.5 if residual else 1)
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
    """Write config.json and safetensors that transformers 4 and 5 read; no tokenizer files.

    `tensors`: whole ones, gathered from a sharded model; only the rank with `write` writes."""
    weights = dict(model.named_parameters())  # a tied head is not among them
    if any(name.endswith((".absmax", ".lora_A.weight")) for name in weights):
        raise ValueError("merge_lora the adapters and call hub.quantized.unquantized first")
    write_weights(path, weights, tensors, shard_bytes, write)
    if write:
        write_config(path, vars(model.config), next(iter(weights.values())).dtype)


# ------------------------------------------------------------------------ generation
@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids,  # ids that end an answer
    any_rank: Callable[[bool], bool] = bool,  # sharded: does any rank still need the pass?
) -> list[list[int]]:
    """Decode a batch greedily; returns each prompt's new ids, including the stop id."""
    if not prompts or any(not ids for ids in prompts):
        raise ValueError("generate needs at least one prompt, and no empty one")
    device, stop_ids = model.inv_freq.device, set(stop_ids)
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    B, P = len(prompts), max(map(len, prompts))  # P: padded on the right
    input_ids = torch.tensor([ids + [0] * (P - len(ids)) for ids in prompts], device=device)
    cache = KVCache(model.config.num_hidden_layers, P + max_new_tokens)
    slots = torch.arange(cache.width, device=device)
    visible = slots < lengths[:, None]  # (B, width): the real prompt, then every generated slot
    outputs: list[list[int]] = [[] for _ in prompts]
    positions = torch.arange(P, device=device).expand(B, P)
    prompt_width, mask, last = P, None, lengths - 1
    for step in range(max_new_tokens):
        next_ids = model.decode_step(input_ids, positions, prompt_width, mask, cache, last)
        cache.start = P + step
        for ids, token in zip(outputs, next_ids.tolist(), strict=True):
            if not (ids and ids[-1] in stop_ids):
                ids.append(token)
        if not any_rank(any(ids[-1] not in stop_ids for ids in outputs)):
            break
        input_ids, positions = next_ids[:, None], (lengths + step)[:, None]
        visible = visible | (slots == cache.start)
        prompt_width, mask, last = 0, visible[:, None, None], torch.zeros_like(lengths)
    return outputs
