"""The device half of the sampler: the keys and values of the running rows, and the model run over them.

Which sample sits in which slot, what was drawn and what comes next is decided by `generate.Sampler`; here
are tensors only. The running rows always are the first n slots, every slot starts at position 0 and has a
length of its own: no padding on the left, and the only mask hides what lies behind each row's end.

Shapes: n rows, L layers, K key/value heads, E head size, G query heads per key/value head, D hidden size,
V vocabulary, S slots, T tokens that a slot can hold.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.logprob import product
from kernels.transformer import Transformer, packed_attention

# What running a prompt leaves: keys (L, length, K, E), values (L, length, K, E), last hidden state (D,).
Prefix = tuple[Tensor, Tensor, Tensor]


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
    return list(zip(torch.stack(keys).split(lengths, 1), torch.stack(values).split(lengths, 1), last, strict=True))


class SlotCache:
    """Keys and values of the running rows, (L, S, K, T, E) each."""

    def __init__(self, model: Transformer, slots: int, length: int):
        c = model.config
        self.model, self.slots = model, slots
        # Zeros, not empty: what the mask hides is still multiplied by 0, and 0 * NaN is NaN.
        shape = (c.num_layers, slots, c.num_kv_heads, length, c.head_dim)
        self.keys = torch.zeros(shape, device=model.device, dtype=model.head.dtype)
        self.values = torch.zeros_like(self.keys)

    def add(self, first: int, prefixes: list[Prefix]) -> Tensor:
        """Fill the slots from `first` on with prompts; returns the logits (rows, V) of the first token of each."""
        for slot, (keys, values, _) in enumerate(prefixes, first):
            self.keys[:, slot, :, : keys.shape[1]] = keys.transpose(1, 2)  # (L, K, length, E)
            self.values[:, slot, :, : keys.shape[1]] = values.transpose(1, 2)
        return self.logits(torch.stack([hidden for *_, hidden in prefixes]))

    def decode(self, tokens: list[int], lengths: list[int]) -> Tensor:
        """Feed one token to each of the first n rows, which hold `lengths` tokens: the logits (n, V) of the next."""
        n, longest, device = len(tokens), max(lengths) + 1, self.keys.device
        rows, ends = torch.arange(n, device=device), torch.tensor(lengths, device=device)
        visible = torch.arange(longest, device=device) <= ends[:, None]  # (n, longest)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer, :n], self.values[layer, :n]
            keys[rows, :, ends] = k[:, 0]  # (n, K, E)
            values[rows, :, ends] = v[:, 0]
            # The G query heads of a key/value head become G query rows: each key is read once, not G times.
            q = q.view(n, keys.shape[1], -1, q.shape[-1])  # (n, K, G, E)
            mask = visible[:, None, None]
            out = F.scaled_dot_product_attention(q, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask)
            return out.reshape(n, 1, -1, q.shape[-1])  # (n, 1, H, E)

        hidden = self.model(torch.tensor(tokens, device=device)[:, None], ends[:, None], attend)  # (n, 1, D)
        return self.logits(hidden[:, 0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, D) -> logits (n, V) in fp32, by the product that the trainer's log-probs come from."""
        head = self.model.head
        return product(hidden, head.T, out=hidden.new_empty((len(hidden), len(head)), dtype=torch.float32))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row of `length` tokens to another slot."""
        for cache in (self.keys, self.values):
            cache[:, target, :, :length] = cache[:, source, :, :length]
