"""The decoder-only transformer in plain PyTorch: Qwen2/Qwen2.5, Qwen3 and Llama from one class.

The three families differ in three places only: Qwen2 has biases on q, k and v; Qwen3 normalises every
query and key head; Llama has neither (unless its config says so). Parameter names are those of Hugging
Face, so that saving is a dump and `AutoModelForCausalLM` loads what we write unchanged.

    model = load_model("path/to/huggingface/directory", device="cpu", dtype=torch.float32)
    hidden = model(ids)                  # (B, T) long -> (B, T, D), after the final norm
    logits = hidden.float() @ model.head.float().T       # (B, T, V): never needed whole, see logprob.py

Attention is a function handed to the forward pass: causal over padded rows (the default), causal over
rows packed one behind the other (training), or over a KV cache (the sampler). The layers don't know which.

Shapes: B rows, T tokens a row, D hidden size, H query heads, K key/value heads, E head size, V vocabulary.
"""

import contextlib
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kernels.logprob import token_logprobs

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}
# Sizes that a config.json has to give, and the largest of each that is possible.
SIZES = {
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_hidden_layers": 1000,
    "num_attention_heads": 10**4,
}
# type of rope scaling -> what its dict must say
ROPE_TYPES = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}
# The numbers of that dict, and the least and the most of each.
ROPE_NUMBERS = {
    "factor": (1e-3, 1e6),
    "low_freq_factor": (0, 1e6),
    "high_freq_factor": (0, 1e6),
    "beta_fast": (0, 1e6),
    "beta_slow": (0, 1e6),
    "attention_factor": (0, 1e6),
    "mscale": (0, 1e6),
    "mscale_all_dim": (0, 1e6),
}
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"]
TOKENIZER_FILES += ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json"]
# attend(layer index, q (B, T, H, E), k (B, T, K, E), v (B, T, K, E)) -> (B, T, H, E)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """What the forward pass needs of a Hugging Face `config.json`; `raw` is the file itself, kept for saving."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope: dict  # the scaling as in the file, with rope_type and original_max_position_embeddings always there
    max_positions: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    raw: dict

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """Read a config dict in either spelling (`rope_theta` + `rope_scaling`, or `rope_parameters`).

        Raises ValueError naming a field that is missing or impossible, and whatever this decoder doesn't compute:
        another architecture, rope scaling or activation, a quantisation, sliding windows. What may be missing has the
        default of `transformers`.
        """
        family = read_family(raw)
        sizes = {name: read_whole(raw, name, most) for name, most in SIZES.items()}
        hidden_size = sizes["hidden_size"]
        heads = sizes["num_attention_heads"]
        kv_heads = read_whole(raw, "num_key_value_heads", heads, default=heads)
        head_dim = read_whole(raw, "head_dim", 10**5, default=hidden_size // heads)
        if heads % kv_heads != 0:
            raise ValueError(f"config.json: num_key_value_heads {kv_heads} doesn't divide num_attention_heads {heads}")
        if head_dim % 2 != 0:
            raise ValueError(f"config.json: head_dim {head_dim} is odd; rotary embeddings pair its numbers")
        rope, positions, theta = read_rope(raw, family)
        attention_bias = read_flag(raw, "attention_bias")
        return cls(
            family=family,
            vocab_size=sizes["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=sizes["intermediate_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=read_number(raw, "rms_norm_eps", 0, 1, default=1e-6),
            rope_theta=theta,
            rope=rope,
            max_positions=positions,
            tied=read_flag(raw, "tie_word_embeddings"),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=family != "qwen2" and attention_bias,
            mlp_bias=read_flag(raw, "mlp_bias"),
            raw=raw,
        )


def read_number(raw: dict, name: str, least: float, most: float, default: float | None = None) -> float:
    """A number of a config; the default if it is missing or null. Raises ValueError if it is anything else, or if it is
    missing without a default."""
    value = raw.get(name)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config.json: {name} is missing")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and least <= value <= most):
        raise ValueError(f"config.json: {name} must be a number from {least:g} to {most:g}, not {value!r:.60}")
    return value


def read_whole(raw: dict, name: str, most: int, default: int | None = None) -> int:
    """A whole number of a config from 1 to most, as for `read_number`."""
    value = read_number(raw, name, 1, most, default)
    if not isinstance(value, int):
        raise ValueError(f"config.json: {name} must be a whole number, not {value!r}")
    return value


def read_flag(raw: dict, name: str) -> bool:
    """True or false of a config; false if it is missing or null."""
    value = raw.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"config.json: {name} must be true or false, not {value!r:.60}")
    return bool(value)


def read_family(raw: dict) -> str:
    """The model family of a config. Raises ValueError naming what this decoder doesn't compute."""
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else "(none)"
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"architecture {name} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if quantisation := raw.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise ValueError(f"quantisation {method!r:.60} is not supported; use an unquantised checkpoint")
    layer_types = raw.get("layer_types") or []
    if raw.get("use_sliding_window") or layer_types != ["full_attention"] * len(layer_types):
        raise ValueError("sliding-window attention is not supported; supported: full attention in all layers")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r:.60} is not supported; supported: 'silu'")
    return ARCHITECTURES[name]


def read_rope(raw: dict, family: str) -> tuple[dict, int, float]:
    """(`Config.rope`, the context in tokens, theta) of the rotary embedding. Raises ValueError for a scaling that this
    decoder doesn't compute."""
    # 1. The scaling: its type, then its numbers.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # this order, as in transformers
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("config.json: rope_scaling or rope_parameters must be one object of numbers for all layers")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ValueError(f"rope scaling {rope_type!r:.60} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if missing := [key for key in ROPE_TYPES[rope_type] if rope.get(key) is None]:
        raise ValueError(f"rope scaling {rope_type!r} needs {', '.join(missing)}")
    for name, limits in ROPE_NUMBERS.items():
        if rope.get(name) is not None:
            read_number(rope, name, *limits)
    if rope_type == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ValueError("rope scaling 'llama3' needs a low_freq_factor below its high_freq_factor")

    # 2. The context, and theta.
    positions = read_whole(raw, "max_position_embeddings", 10**9, default=2048 if family == "llama" else 32_768)
    original = read_whole(rope | raw, "original_max_position_embeddings", 10**9, default=positions)  # top level first
    if rope_type == "yarn":  # Qwen's configs switch it on without raising max_position_embeddings
        positions = max(positions, int(rope["factor"] * original))
    either = {"rope_theta": rope.get("rope_theta") or raw.get("rope_theta")}
    theta = float(read_number(either, "rope_theta", 2, 1e12, default=10_000.0))
    return rope | {"rope_type": rope_type, "original_max_position_embeddings": original}, positions, theta


# --------------------------------------------------------------------------- attention


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within each row; right padding is harmless because nothing real looks to its right."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, E)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def packed_attention(lengths: Tensor, layout: Tensor | None = None) -> tuple[Tensor, Attend]:
    """Causal attention over sequences packed one behind the other in a single row of N tokens.

    lengths (S,) long; layout (M,) long, M their sum: where each token of each sequence stands in the packed row; None:
    all in order. Sequences that begin alike may share these tokens, such as a prompt's with all its responses. Returns
    (positions (1, N), attend): everything but attention then runs on N tokens, without padding.

    Two sequences [a b c r] and [a b c u v] of which the packed row has a b only once:

        packed row    a b c r c u v          N = 7
        lengths       4 5                    M = 9
        layout        0 1 2 3  0 1 4 5 6
        positions     0 1 2 3 2 3 4          of each packed token within its sequence
        home          0 1 2 3 6 7 8          of each packed token, one of its places among the M

    In half precision on CUDA attention is PyTorch's flash `varlen_attn`; elsewhere it is padded, among sequences of
    similar lengths.
    """
    device = lengths.device
    sizes = lengths.tolist()
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # (S + 1,): 0 4 9
    places = torch.arange(sum(sizes), device=device)  # (M,)
    shared = layout is not None
    if layout is None:
        layout = places
    home = layout.new_zeros(int(layout.max()) + 1).index_copy(0, layout, places)  # (N,)
    position = places - starts[:-1].repeat_interleave(lengths)  # (M,)

    @functools.cache  # for all layers, and only where attention is padded
    def padded_tables() -> tuple[list[Tensor], Tensor]:
        """For each group of similar sequences a table (R, T) of where their tokens stand in the packed row; and where
        each packed token is in all tables one behind the other, (N,)."""
        pieces = layout.split(sizes)
        tables = []
        offset_of = {}  # sequence -> where its row begins in the tables
        filled = 0
        waiting = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        while waiting:
            longest = sizes[waiting[0]]
            group = [i for i in waiting if sizes[i] >= 0.8 * longest]
            waiting = waiting[len(group) :]
            # The padding is any token: it stands to the right of the real ones, which don't look there.
            tables.append(torch.stack([F.pad(pieces[i], (0, longest - sizes[i])) for i in group]))
            for row, i in enumerate(group):
                offset_of[i] = filled + row * longest
            filled += tables[-1].numel()
        offsets = torch.tensor([offset_of[i] for i in range(len(sizes))], device=device)  # (S,)
        return tables, (position + offsets.repeat_interleave(lengths))[home]

    def attend_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, E), k and v (N, K, E) -> (N, H, E)."""
        from torch.nn.attention.varlen import varlen_attn

        if shared:
            q, k, v = (x.index_select(0, layout) for x in (q, k, v))  # (M, heads, E)
        repeats = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(repeats, dim=1)  # (M, H, E): torch 2.11 has no enable_gqa here
        v = v.repeat_interleave(repeats, dim=1)
        causal = (-1, 0)  # any number of tokens to the left, none to the right
        out = varlen_attn(q, k, v, starts, starts, max(sizes), max(sizes), window_size=causal)
        return out.index_select(0, home) if shared else out

    def attend_padded(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, E), k and v (N, K, E) -> (N, H, E)."""
        tables, where = padded_tables()
        outputs = []
        for table in tables:
            rows = [x.index_select(0, table.flatten()).unflatten(0, table.shape) for x in (q, k, v)]  # (R, T, heads, E)
            outputs.append(causal_attention(layer, *rows).flatten(0, 1))  # (R T, H, E)
        return torch.cat(outputs).index_select(0, where)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return attend_flash(q[0], k[0], v[0])[None]  # (1, N, H, E)
        return attend_padded(layer, q[0], k[0], v[0])[None]

    return position[home][None], attend


def rotary_frequencies(config: Config, device: torch.device) -> tuple[Tensor, float]:
    """(radians per position (E / 2,) fp32, factor on cos and sin) of the rotary embedding; rounds as in transformers.

    Both scalings keep the frequency of pairs that turn often within the original context, which tell neighbours
    apart, and divide by `factor` that of pairs that turn rarely, whose angles beyond it training never showed; `kept`
    blends the two. Llama 3 blends linearly in the number of turns, as the paper on YaRN does (arXiv 2309.00071,
    "NTK-by-parts"); its code, in the index of the pair. YaRN also magnifies cos and sin: attention stays as sharp.
    """
    E, theta, rope = config.head_dim, config.rope_theta, config.rope
    powers = theta ** (torch.arange(0, E, 2, device=device, dtype=torch.float32) / E)  # (E / 2,)
    frequencies = 1 / powers
    if rope["rope_type"] == "default":
        return frequencies, 1.0
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]  # turns
        turns = original / (2 * math.pi / frequencies)  # (E / 2,)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / factor + kept * frequencies, 1.0
    turns = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    # The index i, a fraction, of the pair that turns t times: original = t * 2 pi * theta^(2i / E).
    low, high = (E * math.log(original / (t * 2 * math.pi)) / (2 * math.log(theta)) for t in turns)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, E - 1)
    kept = 1 - ((torch.arange(E // 2, device=device) - low) / ((high - low) or 0.001)).clamp(0, 1)  # (E / 2,)
    mscales = rope.get("mscale"), rope.get("mscale_all_dim")
    above, below = (0.1 * m * math.log(max(factor, 1)) + 1 for m in (mscales if all(mscales) else (1, 0)))
    scale = rope.get("attention_factor")
    return 1 / (factor * powers) * (1 - kept) + frequencies * kept, above / below if scale is None else scale


def rotary_angles(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding, (B, T, 1, E) each, for positions (B, T). Computed in fp32."""
    frequencies, scale = rotary_frequencies(config, positions.device)
    angles = positions[..., None].float() * frequencies  # (B, T, E / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]  # (B, T, 1, E)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to x (B, T, heads, E); pairs are (i, i + E/2), as in Hugging Face."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


# --------------------------------------------------------------------------- the modules


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the mean square in fp32 whatever the dtype of x."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention; how tokens see each other is up to `attend`."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        normed = c.family == "qwen3"
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if normed else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))  # (B, T, H, E)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # (B, T, K, E)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, E)
        out = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, T, H, E)
        return self.o_proj(out.flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The decoder. `model(ids)` gives hidden states; the head is a weight, applied by whoever needs logits."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # Rows of the head that count. Whoever knows the tokenizer lowers it where the vocabulary is padded: the rows
        # beyond are then never drawn and get no probability, in the sampler and in training alike.
        self.vocabulary = config.vocab_size
        self.checkpointing = False  # recompute each block's activations in the backward pass
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, i) for i in range(config.num_layers)),
                "norm": RMSNorm(config.hidden_size, config.norm_eps),
            }
        )
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The (V, D) output weight, without the rows of a padded vocabulary that no token has; the embedding itself
        where the two are tied. Under FSDP it is whole within `forward` only."""
        weight = self.model["embed_tokens"].weight if self.lm_head is None else self.lm_head.weight
        if self.vocabulary == len(weight):
            return weight
        return weight[: self.vocabulary]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model["embed_tokens"].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model["embed_tokens"].weight.dtype

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        attend: Attend = causal_attention,
        targets: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """ids (B, T) long -> hidden states (B, T, D) after the final norm. Positions default to 0..T-1.

        With targets (B, T): (log-probabilities, entropies), (B * T,) fp32 both, of `token_logprobs`; negative targets
        are ignored. That the head is used within forward is what lets FSDP gather it like any other weight.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        x = self.model["embed_tokens"](ids)  # (B, T, D)
        cos, sin = rotary_angles(positions, self.config, x.dtype)
        for block in self.model["layers"]:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend)
        hidden = self.model["norm"](x)
        if targets is None:
            return hidden
        # In more slices of the vocabulary, the gradient of the hidden states is added up more often.
        workspace = (1 << 30) if hidden.is_cuda else (256 << 20)
        return token_logprobs(hidden.flatten(0, 1), self.head, targets.flatten(), temperature, workspace=workspace)

    def packed(
        self,
        ids: Tensor,
        lengths: Tensor,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        layout: Tensor | None = None,
    ):
        """Sequences one behind the other, as for `packed_attention`: ids (N,) long -> hidden states (N, D), or with
        targets (N,) (log-probabilities, entropies), (N,) both."""
        positions, attend = packed_attention(lengths, layout)
        if targets is None:
            return self(ids[None], positions, attend)[0]
        return self(ids[None], positions, attend, targets[None], temperature)


# --------------------------------------------------------------------------- Hugging Face directories


def read_json(file: Path) -> dict:
    """The JSON object of a model directory's file. Raises FileNotFoundError, or ValueError if it isn't one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: not a JSON object; fetch the file again")
    return value


def read_config(path: str | Path) -> Config:
    """The configuration of a Hugging Face directory. Raises FileNotFoundError, or ValueError if it isn't supported."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no config.json there; give a Hugging Face model directory")
    return Config.from_dict(read_json(file))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory. Raises ValueError if its index names others than its own."""
    single = path / "model.safetensors"
    index = path / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():  # the single file goes first, as in transformers
        return [single]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index}: no weight_map; fetch the file again")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map must name safetensors files of this directory, not {shard!r:.60}")
    return [path / shard for shard in sorted(set(shards.values()))]


def read_weights(file: Path, device: str | torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each weight of a safetensors file, one at a time. Raises FileNotFoundError, and ValueError for
    half a file or for weights of integers or 8-bit floats, which need scales that nothing here applies."""
    with open_weights(file, device) as weights:
        for name in weights.keys():  # noqa: SIM118 (not a dict)
            tensor = weights.get_tensor(name)
            if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
                raise ValueError(f"{file}: {name} is {tensor.dtype}, quantised; use an unquantised checkpoint")
            yield name, tensor


@contextlib.contextmanager
def open_weights(file: Path, device: str | torch.device = "cpu") -> Iterator[safe_open]:
    """A safetensors file, whose header says how long a whole one is. Raises as `read_weights`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; only safetensors weights are read")
    try:
        with safe_open(file, framework="pt", device=str(device)) as weights:
            yield weights
    except SafetensorError as error:  # half a file, say
        raise ValueError(f"{file}: not a whole file ({error}); fetch it again") from None


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """Load a Hugging Face directory: `config.json` and `model.safetensors` (or shards with an index).

    The model is built on the meta device and each weight is read once, straight to `device` and `dtype`,
    so there is never a second copy. Raises FileNotFoundError for a missing file and ValueError for an
    architecture or option that isn't supported, or for weights that don't fit the config.
    """
    path = Path(path)
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    for file in weight_files(path):
        for name, tensor in read_weights(file, device):
            if (name == "lm_head.weight" and config.tied) or name.endswith("rotary_emb.inv_freq"):
                continue  # duplicates of what the config already says
            shape, wanted = tuple(tensor.shape), expected.get(name, "no such weight")
            if shape != wanted:
                raise ValueError(f"{file}: {name} is {shape}, the config says {wanted}")
            loaded[name] = tensor.to(dtype)
    missing = sorted(expected.keys() - loaded.keys())
    if missing:
        raise ValueError(f"{path}: {len(missing)} weights are missing, the first is {missing[0]}")
    model.load_state_dict(loaded, assign=True)
    return model.eval()


def copy_file(file: Path, to: Path) -> None:
    """Copy a file, with its permissions where the disk has some (CIFS and mounted buckets don't)."""
    try:
        shutil.copy(file, to)
    except OSError:
        shutil.copyfile(file, to)


def save_model(
    model: Transformer,
    path: str | Path,
    tokenizer_from: str | Path | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a Hugging Face directory that `AutoModelForCausalLM` loads. Whatever else lies in `path` stays.

    The tokenizer files of `tokenizer_from` are copied beside the weights; `weights` replaces the model's own (where
    they are sharded). Every file is written elsewhere and moved here, the weights last: a crash leaves the old
    checkpoint or the new one, and in `path`/.part what the next save removes.
    """
    path = Path(path)
    part = path / ".part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    def put(name: str, write: Callable[[Path], object]) -> None:
        write(part / name)
        with contextlib.suppress(OSError):  # as in `copy_file`
            (part / name).chmod(0o644)
        (part / name).replace(path / name)

    dtype = str(model.dtype).removeprefix("torch.")
    raw = {key: value for key, value in model.config.raw.items() if key != "torch_dtype"}  # the old spelling
    put("config.json", lambda to: to.write_text(json.dumps({**raw, "dtype": dtype}, indent=2) + "\n"))
    for name in TOKENIZER_FILES if tokenizer_from is not None else ():
        file = Path(tokenizer_from) / name
        if file.is_file():
            put(name, functools.partial(copy_file, file))
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in (weights or model.state_dict()).items()}
    try:
        put("model.safetensors", lambda to: save_file(whole, to, metadata={"format": "pt"}))
    except SafetensorError as error:  # a full disk is an OSError everywhere else
        raise OSError(str(error)) from None
    part.rmdir()
