"""The device half of the sampler: the keys and values of the running rows, and the model run over them.

Which sample sits in which slot, what it has drawn and what comes next is decided in kernels/sampler.py; this file has
tensors only. The running rows are always the first n slots. Every slot has a length of its own: nothing is padded on
the left, and only what lies beyond a row's end is hidden.

A prompt is run once. Its keys and values are then copied to the slots of all its samples, or (shared prompts) kept once
and read once for all of its samples in each step. Attention over the prompt and over the row's own tokens are then two
calls, and their outputs o_p and o_s are merged by the logarithms of their softmax sums,

    o = w o_p + (1 - w) o_s,    w = exp(lse_p) / (exp(lse_p) + exp(lse_s)) = sigmoid(lse_p - lse_s).

Attention is one function with two bodies: plain products, and PyTorch's flash attention for sequences of different
lengths, in half precision on a GPU. There one step, drawing included, is captured as a CUDA graph, and several steps
are replayed before the host reads what they drew.

Shapes: n rows, L layers, K key/value heads, E head size, H query heads, G = H / K of them per key/value head, D hidden
size, V vocabulary, S slots, T tokens that fit in a slot; P shared prompts of up to Tp tokens, R samples of a prompt.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

from kernels.logprob import product
from kernels.transformer import Transformer, packed_attention

import torch
from torch import Tensor

# A CUDA graph has a fixed number of rows. The next larger one is used; its slots beyond the running rows are idle.
GRAPH_ROWS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512)


class PromptKV(NamedTuple):
    """What running a prompt leaves."""

    keys: Tensor  # (L, length, K, E)
    values: Tensor  # (L, length, K, E)
    hidden: Tensor  # (D,), of the last token

    def clone(self) -> "PromptKV":
        """A copy with memory of its own: `prefill` returns views, each of which keeps the whole prefill alive."""
        return PromptKV(self.keys.clone(), self.values.clone(), self.hidden.clone())


def prefill(model: Transformer, prompts: list[tuple[int, ...]], max_tokens: int) -> list[PromptKV]:
    """Run prompts, packed one behind the other, about max_tokens at a time."""
    if len(prompts) > 1 and sum(map(len, prompts)) > max_tokens:
        half = len(prompts) // 2
        return prefill(model, prompts[:half], max_tokens) + prefill(model, prompts[half:], max_tokens)
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)  # (N,)
    lengths = [len(prompt) for prompt in prompts]
    positions, packed = packed_attention(torch.tensor(lengths, device=model.device))
    keys, values = [], []  # of each layer

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append(k[0])  # (N, K, E)
        values.append(v[0])
        return packed(layer, q, k, v)

    hidden = model(ids[None], positions, attend)[0]  # (N, D)
    last = torch.tensor(lengths).cumsum(0) - 1  # (prompts,): the place of each prompt's last token
    keys_of_prompts = torch.stack(keys).split(lengths, 1)  # (L, length, K, E) each
    values_of_prompts = torch.stack(values).split(lengths, 1)
    return [PromptKV(*parts) for parts in zip(keys_of_prompts, values_of_prompts, hidden[last], strict=True)]


# --------------------------------------------------------------------------- attention over slots


def has_flash(x: Tensor) -> bool:
    """Whether attention over x is PyTorch's flash attention: in half precision on a GPU."""
    return x.device.type != "cpu" and x.dtype in (torch.bfloat16, torch.float16)


class VisibleKeys(NamedTuple):
    """Which keys the queries of each slot may see; prepared once per step, for all layers."""

    bias: Tensor | None = None  # plain products: (B K, 1, T), added to the scores: 0, or -inf beyond the row's end
    lengths: Tensor | None = None  # flash attention: (B,) int32, keys that count
    query_starts: Tensor | None = None  # flash attention: (B + 1,) int32, where each slot's queries begin
    key_starts: Tensor | None = None  # flash attention: (B + 1,) int32, where each slot's keys begin


def visible_keys(lengths: Tensor, keys: Tensor, queries: int = 1) -> VisibleKeys:
    """The first lengths (B,) of keys (B, K, T, E) are visible, to so many queries per slot."""
    B, K, T = keys.shape[:3]
    if has_flash(keys):
        slots = torch.arange(B + 1, dtype=torch.int32, device=keys.device)
        return VisibleKeys(None, lengths.int(), slots * queries, slots * T)
    beyond = torch.arange(T, device=keys.device) >= lengths[:, None]  # (B, T)
    bias = torch.zeros(beyond.shape, dtype=keys.dtype, device=keys.device).masked_fill_(beyond, -torch.inf)
    return VisibleKeys(bias.repeat_interleave(K, 0)[:, None])


def ragged_attention(
    q: Tensor, keys: Tensor, values: Tensor, visible: VisibleKeys, merged: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries q (B, R, H, E) over the visible ones of keys and values (B, K, T, E).

    Returns the output (B, R, H, E) and, if it is to be merged with another, the logarithm of the softmax's sum (B, R,
    H), in fp32. The G query heads of a key/value head are rows of one product: each key is read once, not G times.
    """
    if has_flash(q):
        return flash_attention(q, keys, values, visible)
    B, R, H, E = q.shape
    K = keys.shape[1]
    G = H // K
    q = q.view(B, R, K, G, E).transpose(1, 2).reshape(B * K, R * G, E)
    scores = torch.baddbmm(visible.bias, q, keys.flatten(0, 1).mT, alpha=1 / math.sqrt(E)).float()  # (B K, R G, T)
    weights = scores.softmax(-1)
    out = weights.to(values.dtype) @ values.flatten(0, 1)  # (B K, R G, E)
    out = out.view(B, K, R, G, E).transpose(1, 2).reshape(B, R, H, E)
    if not merged:
        return out, None
    # At the largest score, lse = score - log(weight); PyTorch's logsumexp takes longer than everything else here.
    lse = scores.amax(-1) - weights.amax(-1).log()  # (B K, R G)
    return out, lse.view(B, K, R, G).transpose(1, 2).reshape(B, R, H)


def flash_attention(q: Tensor, keys: Tensor, values: Tensor, visible: VisibleKeys) -> tuple[Tensor, Tensor]:
    """`ragged_attention` by PyTorch's flash attention on a GPU, for keys and values that lie in memory as (B, T, K, E).

    The slots, one behind the other, are its packed keys: slot b begins at b T and has lengths[b] tokens. With several
    queries per slot the mask isn't causal; with one, the heads of a group become rows, and long keys are split over
    multiprocessors.
    """
    B, R, H, E = q.shape
    K, T = keys.shape[1:3]
    packed_keys = keys.transpose(1, 2).reshape(B * T, K, E)  # a view
    packed_values = values.transpose(1, 2).reshape(B * T, K, E)
    packed = q.reshape(B * R, H, E), packed_keys, packed_values, visible.query_starts, visible.key_starts, R, T
    if torch.__version__ >= "2.12":
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        out, lse = varlen_attn(*packed, return_aux=AuxRequest(lse=True), enable_gqa=True, seqused_k=visible.lengths)
    else:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(*packed, 0.0, False, False, seqused_k=visible.lengths)
    assert lse.shape == (H, B * R), lse.shape
    return out.view(B, R, H, E), lse.T.reshape(B, R, H)


# --------------------------------------------------------------------------- the cache


def copy_prompt(keys: Tensor, values: Tensor, slot: int, prompt: PromptKV) -> None:
    """Copy a prompt to the beginning of a slot of keys and values (L, S, K, T, E)."""
    length = prompt.keys.shape[1]
    keys[:, slot, :, :length] = prompt.keys.transpose(1, 2)  # (L, K, length, E)
    values[:, slot, :, :length] = prompt.values.transpose(1, 2)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream on which graphs are warmed up and captured.

    cuBLAS keeps a workspace of 32 MiB for each stream that it was ever used on, so one stream per graph would add up.
    Since graphs share that workspace, all graphs that are alive must belong to one cache: destroying one of them frees
    it (pytorch issue 193402). A call of the sampler therefore ends before the next cache is made.
    """
    return torch.cuda.Stream(device)


class SlotCache:
    """Keys and values of the running rows, (L, S, K, T, E) each, and of shared prompts, (L, P, K, Tp, E) each.

    model; slots S of length T. prompts P and prompt_length Tp: shared prompts; without them each slot has its prompt
    before its own tokens. group R: samples of a prompt. choose(logits (n, V), uniform (n,)) draws: tensors (n,), the
    tokens first. steps: how many of them between two looks of the host. graphs: whether a step is captured as a CUDA
    graph, on a GPU.
    """

    def __init__(
        self,
        model: Transformer,
        slots: int,
        length: int,
        choose: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        *,
        prompts: int = 0,
        prompt_length: int = 0,
        group: int = 1,
        steps: int = 1,
        graphs: bool = True,
    ):
        self.model = model
        self.slots = slots
        self.length = length
        self.prompts = prompts
        self.steps = steps
        self.choose = choose
        self.keys = self.new_memory(slots, length)
        self.values = self.new_memory(slots, length)
        if prompts:
            self.prompt_keys = self.new_memory(prompts, prompt_length)
            self.prompt_values = self.new_memory(prompts, prompt_length)
            self.prompt_hidden = torch.zeros((prompts, model.config.hidden_size), dtype=model.dtype, device=model.device)
        # What the host decides between two looks. A graph has their addresses: they are written in place.
        self.tokens = self.new_numbers(slots)  # the newest token of each row, not yet in its slot
        self.ends = self.new_numbers(slots)  # tokens that are in the slot
        self.starts = self.new_numbers(slots)  # position of a slot's first token: the length of its shared prompt, or 0
        self.prompt_lengths = self.new_numbers(prompts)
        self.members = self.new_numbers(prompts, group)  # the rows of each shared prompt, filled up with row 0
        self.places = self.new_numbers(slots)  # where a row stands in members.flatten()
        self.step_number = self.new_numbers(1)
        self.uniform = torch.zeros((steps, slots), dtype=torch.float64, device=model.device)
        self.drawn: list[Tensor] = []  # (steps, S) each, in the order of `choose`
        self.graphs: dict[int, torch.cuda.CUDAGraph] | None = {} if graphs and self.tokens.is_cuda else None
        self.can_capture = True  # False once a capture has failed for another reason than memory
        self.used_prompts = 0
        self.longest_prompt = 0

    def new_memory(self, slots: int, length: int) -> Tensor:
        """(L, slots, K, length, E) zeros: what is hidden is still multiplied by 0, and 0 * nan is nan.

        In memory the heads of a token lie together on a GPU, where flash attention wants them so; on the CPU the tokens
        of a head do, as a product wants them.
        """
        c, dtype, device = self.model.config, self.model.dtype, self.model.device
        L, K, E = c.num_layers, c.num_kv_heads, c.head_dim
        if device.type == "cpu":
            return torch.zeros((L, slots, K, length, E), dtype=dtype)
        return torch.zeros((L, slots, length, K, E), dtype=dtype, device=device).transpose(2, 3)

    def new_numbers(self, *shape: int) -> Tensor:
        """Zeros, long, on the model's device."""
        return torch.zeros(shape, dtype=torch.long, device=self.model.device)

    # ------------------------------------------------------------------- rows that come, move and share

    def add(self, first: int, prompts: list[PromptKV]) -> Tensor:
        """Fill the slots from `first` on with prompts; returns the logits (rows, V) of the first token of each."""
        for slot, prompt in enumerate(prompts, first):
            copy_prompt(self.keys, self.values, slot, prompt)
        return self.logits(torch.stack([prompt.hidden for prompt in prompts]))

    def share(self, place: int, prompt: PromptKV) -> None:
        """Keep a prompt at this place among the shared ones."""
        copy_prompt(self.prompt_keys, self.prompt_values, place, prompt)
        self.prompt_hidden[place] = prompt.hidden
        self.prompt_lengths[place] = prompt.keys.shape[1]

    def move_prompt(self, source: int, target: int) -> None:
        """Copy a shared prompt to another place."""
        for part in (self.prompt_hidden, self.prompt_lengths):
            part[target] = part[source]
        for cache in (self.prompt_keys, self.prompt_values):
            cache[:, target] = cache[:, source]

    def first_logits(self, places: list[int]) -> Tensor:
        """The logits (rows, V) of the first token of new rows that have the shared prompts at these places."""
        return self.logits(self.prompt_hidden[places])

    def arrange(self, place_of_row: list[int]) -> None:
        """Tell the first n rows which shared prompt each has. Called whenever rows have come, gone or moved.

        Rows 0..3 with the prompts at places 1, 0, 1, 1 and R = 4:

            members   [[1 0 0 0] [0 2 3 0]]    prompt 0 has row 1, prompt 1 has rows 0, 2, 3; the rest is filled up
            places    [4 0 5 6]                row 0 is members.flatten()[4], row 1 is members.flatten()[0], ...
        """
        R = self.members.shape[1]
        rows_of_prompt: list[list[int]] = [[] for _ in range(self.prompts)]
        places = [0] * self.slots  # an idle slot may look at any prompt
        for row, place in enumerate(place_of_row):
            places[row] = place * R + len(rows_of_prompt[place])
            rows_of_prompt[place].append(row)
        members = [rows + [0] * (R - len(rows)) for rows in rows_of_prompt]
        self.members.copy_(torch.tensor(members))
        self.places.copy_(torch.tensor(places))
        prompt_of_row = torch.tensor(place_of_row, device=self.starts.device)  # (n,)
        self.starts[: len(place_of_row)] = self.prompt_lengths[prompt_of_row]
        self.used_prompts = max(place_of_row) + 1
        self.longest_prompt = int(self.prompt_lengths[: self.used_prompts].max())

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row of `length` tokens to another slot."""
        for cache in (self.keys, self.values):
            cache[:, target, :, :length] = cache[:, source, :, :length]

    # ------------------------------------------------------------------- steps

    def decode(self, tokens: list[int], ends: list[int], uniform: list[list[float]]) -> list[list[list[float]]]:
        """len(uniform) steps of the first n rows, whose slots hold `ends` tokens before the newest, `tokens`.

        Returns, for each tensor of `choose`, a list of steps of lists of n numbers. What a row draws after its end is
        to be discarded; it stays within the row's slot.
        """
        n = len(tokens)
        self.load(tokens, ends, uniform)
        graph = self.find_graph(n)
        self.load(tokens, ends, uniform)  # again: a capture, even one that fails, makes steps of its own
        for i in range(len(uniform)):
            if graph is not None:
                graph.replay()
            else:
                self.step(n, min(max(ends) + i + 1, self.length))
        return [x[:, :n].tolist() for x in self.drawn]  # the one place where the host waits for the device

    def load(self, tokens: list[int], ends: list[int], uniform: list[list[float]]) -> None:
        """Write what the next steps begin with."""
        n = len(tokens)
        self.tokens[:n] = torch.tensor(tokens)
        self.ends.zero_()  # an idle slot of a graph would go on reading every key that it ever held
        self.ends[:n] = torch.tensor(ends)
        self.uniform[:, :n] = torch.tensor(uniform, dtype=torch.float64)
        self.step_number.zero_()

    def find_graph(self, n: int) -> torch.cuda.CUDAGraph | None:
        """The CUDA graph of a step of n rows, or None where every operation is to be launched by itself: on the CPU,
        and after a capture that failed, of which a warning tells once."""
        if self.graphs is None:
            return None
        stream = torch.cuda.current_stream()
        try:
            try:
                return self.graph(n)
            except torch.OutOfMemoryError:
                torch.cuda.set_stream(stream)  # a failed capture leaves its own stream behind
                torch.cuda.empty_cache()
                return self.graph(n)
        except torch.OutOfMemoryError as error:  # in this call only: the next one may have more memory
            warnings.warn(f"no memory for a CUDA graph, so this call decodes without: {error}", stacklevel=2)
        except RuntimeError as error:
            self.can_capture = False
            warnings.warn(f"no CUDA graphs, so that every operation waits to be launched: {error}", stacklevel=2)
        torch.cuda.set_stream(stream)
        self.graphs = None
        return None

    def graph(self, n: int) -> torch.cuda.CUDAGraph:
        """The graph of a step of at least n rows, captured when first needed, after a warm-up step whose results are
        discarded (the real one writes to the same places). Idle slots also draw; their results are ignored."""
        rows = next((size for size in GRAPH_ROWS if n <= size <= self.slots), self.slots)
        if rows in self.graphs:
            return self.graphs[rows]
        self.step_number.zero_()
        stream = capture_stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(rows, self.length)  # libraries allocate in their first call, which a capture can't
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self.graphs.values()), None)  # one pool of memory for all of them
        # What other threads do meanwhile (NCCL's, say) doesn't concern the capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.step(rows, self.length)
        self.graphs[rows] = graph
        return graph

    def step(self, n: int, longest: int) -> None:
        """Feed its newest token to each of the first n rows, none of which then has more than `longest` tokens in its
        slot, and draw the next one. Nothing here depends on a value that only the device knows."""
        # 1. Which keys may each row see?
        rows = torch.arange(n, device=self.ends.device)  # (n,)
        ends = self.ends[:n].clone()  # (n,): where the newest token's key goes
        if has_flash(self.keys):  # it stops at each row's end by itself, and a part of the slots would be copied
            longest = self.length
        own = visible_keys(ends + 1, self.keys[0, :n, :, :longest])
        if self.prompts:
            P, Tp = self.prompts, None  # a graph sees each prompt at its full length ...
            if rows.device.type == "cpu":
                P, Tp = self.used_prompts, self.longest_prompt  # ... and the CPU no more than there is
            members = self.members[:P]  # (P, R)
            prompts = visible_keys(self.prompt_lengths[:P], self.prompt_keys[0, :P, :, :Tp], members.shape[1])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """q (n, 1, H, E), k and v (n, 1, K, E) of the newest tokens -> (n, 1, H, E)."""
            keys, values = self.keys[layer, :n], self.values[layer, :n]  # (n, K, T, E)
            keys[rows, :, ends] = k[:, 0]  # (n, K, E)
            values[rows, :, ends] = v[:, 0]
            merged = self.prompts > 0
            out, lse = ragged_attention(q, keys[:, :, :longest], values[:, :, :longest], own, merged)
            if not merged:
                return out
            # The queries of all samples of a prompt together, so that its keys are read once.
            grouped = q[members.flatten(), 0].unflatten(0, members.shape)  # (P, R, H, E)
            prompt_keys = self.prompt_keys[layer, :P, :, :Tp]
            prompt_values = self.prompt_values[layer, :P, :, :Tp]
            of_prompts, lse_of_prompts = ragged_attention(grouped, prompt_keys, prompt_values, prompts, merged)
            # Back to the order of the rows: (P R, H, E) -> (n, 1, H, E), and the same of lse.
            of_prompts = of_prompts.flatten(0, 1)[self.places[:n]][:, None]
            lse_of_prompts = lse_of_prompts.flatten(0, 1)[self.places[:n]][:, None]
            weight = (lse_of_prompts - lse).sigmoid()[..., None]  # (n, 1, H, 1)
            return torch.lerp(out.float(), of_prompts.float(), weight).to(out.dtype)

        # 2. Run the model on the newest tokens.
        positions = self.starts[:n] + ends
        hidden = self.model(self.tokens[:n, None], positions[:, None], attend)  # (n, 1, D)

        # 3. Draw, and write down what was drawn as number `step_number` of this look.
        uniform = self.uniform.index_select(0, self.step_number)[0, :n]  # (n,)
        drawn = self.choose(self.logits(hidden[:, 0]), uniform)
        if not self.drawn:
            shape = (self.steps, self.slots)
            self.drawn = [torch.zeros(shape, dtype=x.dtype, device=x.device) for x in drawn]
        for buffer, values in zip(self.drawn, drawn, strict=True):
            buffer[:, :n].index_copy_(0, self.step_number, values[None])

        # 4. The drawn tokens are the newest ones now.
        self.tokens[:n] = drawn[0]
        self.ends[:n] = (ends + 1).clamp(max=self.length - 1)  # a row that has ended stays in its slot
        self.step_number += 1

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, D) -> logits (n, V) in fp32, by the same product as the trainer's log-probs."""
        head = self.model.head
        return product(hidden, head.T, out=hidden.new_empty((len(hidden), len(head)), dtype=torch.float32))
