"""The device half of the sampler: the keys and values of the running rows, and the model run over them.

Which sample sits in which slot, what was drawn and what comes next is decided by `generate.Sampler`; here
are tensors only. The running rows always are the first n slots, and every slot has a length of its own: no padding on
the left, and nothing but what lies behind each row's end is hidden.

A prompt is run once. Its keys and values are then copied to the slots of all its samples (each slot starts at position
0); or, with shared prompts, kept once and read once for all of its samples in each step: attention over the prompt and
over the row's own tokens are two calls, and their outputs o_p and o_s are merged by the logarithms of their softmax
sums,

    o = w o_p + (1 - w) o_s,    w = exp(lse_p) / (exp(lse_p) + exp(lse_s)).

Attention itself is one function with two bodies: plain products, and in half precision on a GPU PyTorch's flash
attention for sequences of various lengths. There a step, with its drawing, is a CUDA graph, and several steps pass
before the host looks.

Shapes: n rows, L layers, K key/value heads, E head size, H query heads, G of them per key/value head, D hidden size,
V vocabulary, S slots, T tokens that a slot can hold; P shared prompts of up to Tp tokens, R rows of one prompt.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

from kernels.logprob import product
from kernels.transformer import Transformer, packed_attention

import torch
from torch import Tensor

WINDOW = 256  # most likely tokens among which a graph looks for the nucleus
GRAPH_ROWS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512)  # rows of a CUDA graph; others are filled up with idle slots


class Prefix(NamedTuple):
    """What running a prompt leaves."""

    keys: Tensor  # (L, length, K, E)
    values: Tensor  # (L, length, K, E)
    hidden: Tensor  # (D,), the last token's


def prefill(model: Transformer, prompts: list[tuple[int, ...]], max_tokens: int) -> list[Prefix]:
    """Run prompts, packed one behind the other, about max_tokens at a time."""
    if len(prompts) > 1 and sum(map(len, prompts)) > max_tokens:
        half = len(prompts) // 2
        return prefill(model, prompts[:half], max_tokens) + prefill(model, prompts[half:], max_tokens)
    ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=model.device)  # (1, N)
    lengths = [len(prompt) for prompt in prompts]
    positions, packed = packed_attention(torch.tensor(lengths, device=model.device))
    keys, values = [], []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append(k[0])  # (N, K, E)
        values.append(v[0])
        return packed(layer, q, k, v)

    hidden = model(ids, positions, attend)[0]  # (N, D)
    last = hidden[torch.tensor(lengths).cumsum(0) - 1]  # (prompts, D)
    return list(map(Prefix, torch.stack(keys).split(lengths, 1), torch.stack(values).split(lengths, 1), last))


def fill(keys: Tensor, values: Tensor, slot: int, prefix: Prefix) -> None:
    """Copy a prompt to the beginning of a slot of keys and values (L, S, K, T, E)."""
    for cache, new in ((keys, prefix.keys), (values, prefix.values)):
        cache[:, slot, :, : new.shape[1]] = new.transpose(1, 2)  # (L, K, length, E)


def has_flash(x: Tensor) -> bool:
    """Whether attention over x is PyTorch's flash attention: in half precision on a GPU."""
    return x.device.type != "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def limits(lengths: Tensor, keys: Tensor) -> Tensor:
    """What `ragged_attention` has to know of the lengths (B,) of keys (B, K, T, E), made once for all layers: what is
    added to the scores, (B K, 1, T); for flash attention the lengths, in the dtype of its kernel."""
    if has_flash(keys):
        return lengths.int()
    beyond = torch.arange(keys.shape[2], device=keys.device) >= lengths[:, None]  # (B, T)
    bias = torch.zeros(beyond.shape, dtype=keys.dtype, device=keys.device).masked_fill_(beyond, -torch.inf)
    return bias.repeat_interleave(keys.shape[1], 0)[:, None]


def ragged_attention(
    q: Tensor, keys: Tensor, values: Tensor, limit: Tensor, merged: bool
) -> tuple[Tensor, Tensor | None]:
    """Queries q (B, R, H, E) over the first keys and values (B, K, T, E) of each row, as `limits` says: over all of
    these.

    Returns the output (B, R, H, E) and, if it is to be merged with another, the logarithm of the softmax's sum (B, R,
    H), in fp32. The G query heads of a key/value head are rows of one product: each key is read once, not G times.
    """
    B, R, H, E = q.shape
    if has_flash(q):
        return flash_attention(q, keys, values, limit)
    K = keys.shape[1]
    q = q.view(B, R, K, H // K, E).transpose(1, 2).reshape(B * K, R * H // K, E)
    scores = torch.baddbmm(limit, q, keys.flatten(0, 1).mT, alpha=1 / math.sqrt(E)).float()  # (B K, R G, T)
    weights = scores.softmax(-1)
    # At the largest score, s = log(weight) + lse; PyTorch's logsumexp takes longer than everything else here.
    lse = scores.amax(-1) - weights.amax(-1).log() if merged else None  # (B K, R G)
    out = weights.to(values.dtype) @ values.flatten(0, 1)  # (B K, R G, E)

    def by_query(x: Tensor) -> Tensor:
        """(B K, R G, E) -> (B, R, H, E)."""
        return x.view(B, K, R, H // K, -1).transpose(1, 2).reshape(B, R, H, -1)

    return by_query(out), by_query(lse)[..., 0] if merged else None


def flash_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """`ragged_attention` by PyTorch's flash attention on a GPU, with keys and values that lie in memory as (B, T, K,
    E).

    The slots, one behind the other, are its packed keys: slot b begins at b T and has lengths[b] tokens. With several
    queries a slot it isn't causal; with one, it makes rows of the heads of a group and splits long keys over
    multiprocessors.
    """
    B, R, H, E = q.shape
    K, T = keys.shape[1:3]
    packed = (x.transpose(1, 2).reshape(B * T, K, E) for x in (keys, values))  # views
    starts = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    arguments = q.reshape(B * R, H, E), *packed, starts * R, starts * T, R, T
    if torch.__version__ >= "2.12":
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        out, lse = varlen_attn(*arguments, return_aux=AuxRequest(lse=True), enable_gqa=True, seqused_k=lengths)
    else:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(*arguments, 0.0, False, False, seqused_k=lengths)
    assert lse.shape == (H, B * R), lse.shape
    return out.view(B, R, H, E), lse.T.reshape(B, R, H)


class SlotCache:
    """Keys and values of the running rows, (L, S, K, T, E) each, and of shared prompts, (L, P, K, Tp, E) each.

    model; slots S, length T. prompts P and prompt_length Tp: shared prompts; without them each slot has its prompt
    before its own tokens. group R: samples of a prompt. choose(logits (n, V), uniform (n,), window) draws: tensors
    (n,), first the tokens, fourth whether the window, if there is one, was large enough. steps: how many of them
    between two looks. graphs: replay a step as a CUDA graph, on a GPU.
    """

    def __init__(
        self,
        model: Transformer,
        slots: int,
        length: int,
        choose: Callable[[Tensor, Tensor, int], tuple[Tensor, ...]],
        *,
        prompts: int = 0,
        prompt_length: int = 0,
        group: int = 1,
        steps: int = 1,
        graphs: bool = True,
    ):
        self.model, self.slots, self.length, self.prompts, self.steps = model, slots, length, prompts, steps
        self.choose = choose
        self.keys, self.values = self.memory(slots, length), self.memory(slots, length)
        if prompts:
            self.prompt_keys, self.prompt_values = (self.memory(prompts, prompt_length) for _ in range(2))
        # What the host decides between two looks. A graph holds their addresses: they are written in place.
        self.tokens, self.ends = self.numbers(slots), self.numbers(slots)  # newest token; tokens in the slot before it
        self.starts = self.numbers(slots)  # position of a slot's first token: the length of a shared prompt, else 0
        self.prompt_lengths = self.numbers(prompts)
        self.members = self.numbers(prompts, group)  # the rows of each shared prompt, filled up with others
        self.places = self.numbers(slots)  # where a row stands in members.flatten()
        self.step_number = self.numbers(1)
        self.uniform = torch.zeros((steps, slots), dtype=torch.float64, device=model.device)
        self.drawn: list[Tensor] = []  # (steps, S) each, in the order of `choose`
        self.graphs: dict[int, torch.cuda.CUDAGraph] | None = {} if graphs and self.tokens.is_cuda else None
        self.used = self.longest_prompt = 0  # shared prompts in use, and their longest

    def memory(self, slots: int, length: int) -> Tensor:
        """(L, slots, K, length, E); zeros, since what is hidden is still multiplied by 0, and 0 * nan is nan.

        In memory the heads of a token lie together on a GPU, where flash attention takes them so; on the CPU the tokens
        of a head do, as a product wants them.
        """
        c, head = self.model.config, self.model.head
        shape = (c.num_layers, slots, c.num_kv_heads, length, c.head_dim)
        if head.device.type == "cpu":
            return torch.zeros(shape, dtype=head.dtype)
        L, S, K, T, E = shape
        return torch.zeros((L, S, T, K, E), dtype=head.dtype, device=head.device).transpose(2, 3)

    def numbers(self, *shape: int) -> Tensor:
        """Zeros, long, on the model's device."""
        return torch.zeros(shape, dtype=torch.long, device=self.model.device)

    def add(self, first: int, prefixes: list[Prefix]) -> Tensor:
        """Fill the slots from `first` on with prompts, if they aren't shared; returns the logits (rows, V) of the first
        token of each."""
        if not self.prompts:
            for slot, prefix in enumerate(prefixes, first):
                fill(self.keys, self.values, slot, prefix)
        return self.logits(torch.stack([prefix.hidden for prefix in prefixes]))

    def share(self, place: int, prefix: Prefix) -> None:
        """Keep a prompt as number `place` of the shared ones."""
        fill(self.prompt_keys, self.prompt_values, place, prefix)
        self.prompt_lengths[place] = prefix.keys.shape[1]

    def arrange(self, places: list[int]) -> None:
        """Which shared prompt each of the first n rows has. To be called when rows have come, gone or moved."""
        members: list[list[int]] = [[] for _ in range(self.prompts)]
        where, R = [], self.members.shape[1]
        for row, place in enumerate(places):
            where.append(place * R + len(members[place]))
            members[place].append(row)
        self.members.copy_(torch.tensor([rows + [0] * (R - len(rows)) for rows in members]))
        self.places.copy_(torch.tensor(where + [0] * (self.slots - len(where))))  # an idle slot looks at any prompt
        self.starts[: len(places)] = self.prompt_lengths[torch.tensor(places, device=self.starts.device)]
        self.used = max(places) + 1
        self.longest_prompt = int(self.prompt_lengths[: self.used].max())

    def decode(
        self, tokens: list[int], ends: list[int], uniform: list[list[float]], exact: bool = False
    ) -> list[list[list[float]]]:
        """len(uniform) steps of the first n rows, whose slots hold `ends` tokens before the newest, `tokens`.

        Returns, for each tensor of `choose`, a list of steps of lists of n numbers. What a row draws after its end is
        to be thrown away; it stays within the row's slot. exact: without CUDA graphs, whose window may have been too
        small; the same steps may be asked for again.
        """
        n = len(tokens)
        drawn = self.replay(tokens, ends, uniform) if self.graphs is not None and not exact else None
        if drawn is None:
            self.load(tokens, ends, uniform)
            for i in range(len(uniform)):
                self.step(n, min(max(ends) + i + 1, self.length))
            drawn = self.look(n)
        return drawn

    def replay(self, tokens: list[int], ends: list[int], uniform: list[list[float]]) -> list[list[list[float]]] | None:
        """The steps of `decode` by a CUDA graph. If none can be captured: None, a warning, and no further attempt."""
        self.load(tokens, ends, uniform)
        stream = torch.cuda.current_stream()
        try:
            graph = self.graph(len(tokens))
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a failed capture leaves its own behind
            warnings.warn(f"no CUDA graphs, so that every operation waits to be launched: {error}", stacklevel=2)
            self.graphs = None
            return None
        self.load(tokens, ends, uniform)
        for _ in uniform:
            graph.replay()
        return self.look(len(tokens))

    def load(self, tokens: list[int], ends: list[int], uniform: list[list[float]]) -> None:
        """Write what the next steps begin with."""
        n = len(tokens)
        self.ends.zero_()  # an idle slot of a graph would go on reading every key that it ever held
        self.tokens[:n], self.ends[:n] = torch.tensor(tokens), torch.tensor(ends)
        self.uniform[:, :n] = torch.tensor(uniform, dtype=torch.float64)
        self.step_number.zero_()

    def look(self, n: int) -> list[list[list[float]]]:
        """What the first n rows have drawn: the one place where the host waits for the device."""
        return [x[:, :n].tolist() for x in self.drawn]

    def graph(self, n: int) -> torch.cuda.CUDAGraph:
        """The graph of a step of at least n rows; captured when first asked for, after a step that is made for nothing
        (the real one writes to the same places). Idle slots draw, too, for nobody."""
        rows = next((size for size in GRAPH_ROWS if size >= n and size <= self.slots), self.slots)
        if rows not in self.graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step(rows, self.length, WINDOW)  # libraries allocate in their first call, which a graph can't
            torch.cuda.current_stream().wait_stream(stream)
            self.graphs[rows] = torch.cuda.CUDAGraph()
            pool = next(iter(self.graphs.values())).pool() if len(self.graphs) > 1 else None
            # what other threads do meanwhile (NCCL's, say) doesn't concern the capture
            with torch.cuda.graph(self.graphs[rows], pool=pool, capture_error_mode="thread_local"):
                self.step(rows, self.length, WINDOW)
        return self.graphs[rows]

    def step(self, n: int, longest: int, window: int = 0) -> None:
        """Feed its newest token to each of the first n rows, none of which then has more than `longest` in its slot;
        draw."""
        rows, ends = torch.arange(n, device=self.ends.device), self.ends[:n].clone()
        if has_flash(self.keys):  # its kernel ends by itself, and a part of the slots would be copied
            longest = self.length
        limit = limits(ends + 1, self.keys[0, :n, :, :longest])
        if self.prompts:  # a graph has each of them at its full length; the CPU takes no more than there is
            P, Tp = (self.used, self.longest_prompt) if rows.device.type == "cpu" else (self.prompts, None)
            members, prompt_limit = self.members[:P], limits(self.prompt_lengths[:P], self.prompt_keys[0, :P, :, :Tp])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer, :n], self.values[layer, :n]  # (n, K, T, E)
            keys[rows, :, ends] = k[:, 0]  # (n, K, E)
            values[rows, :, ends] = v[:, 0]
            merged = self.prompts > 0
            # (n, 1, H, E) and (n, 1, H)
            out, lse = ragged_attention(q, keys[:, :, :longest], values[:, :, :longest], limit, merged)
            if merged:
                grouped = q[members.flatten(), 0].unflatten(0, members.shape)  # (P, R, H, E)
                prompt = (x[layer, :P, :, :Tp] for x in (self.prompt_keys, self.prompt_values))
                shared = ragged_attention(grouped, *prompt, prompt_limit, merged)
                theirs, their_lse = (x.flatten(0, 1)[self.places[:n]][:, None] for x in shared)
                out = torch.lerp(out.float(), theirs.float(), (their_lse - lse).sigmoid()[..., None]).to(out.dtype)
            return out

        positions = self.starts[:n] + ends
        hidden = self.model(self.tokens[:n, None], positions[:, None], attend)  # (n, 1, D)
        uniform = self.uniform.index_select(0, self.step_number)[0, :n]
        drawn = self.choose(self.logits(hidden[:, 0]), uniform, window=window)
        if not self.drawn:
            shape = (self.steps, self.slots)
            self.drawn = [torch.zeros(shape, dtype=x.dtype, device=x.device) for x in drawn]
        for buffer, value in zip(self.drawn, drawn, strict=True):
            buffer[:, :n].index_copy_(0, self.step_number, value[None])
        self.tokens[:n] = drawn[0]
        self.ends[:n] = (ends + 1).clamp(max=self.length - 1)  # a row that has ended stays in its slot
        self.step_number += 1

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, D) -> logits (n, V) in fp32, by the product that the trainer's log-probs come from."""
        head = self.model.head
        return product(hidden, head.T, out=hidden.new_empty((len(hidden), len(head)), dtype=torch.float32))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row of `length` tokens to another slot."""
        for cache in (self.keys, self.values):
            cache[:, target, :, :length] = cache[:, source, :, :length]
