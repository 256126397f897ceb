"""The schedule of the sampler: which sample sits in which slot, when prompts are run, what is drawn and when a row ends.

It knows token ids and no text. The tensors, a cache with slots and attention over it, are in kernels/decode.py.
"""

import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kernels import distributed
from kernels.decode import Prefix, SlotCache, prefill
from kernels.distributed import InputError, RunError
from kernels.transformer import Transformer

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


@dataclass
class Sample:
    """One sampled continuation: its token ids (a stop token included), the log-probability of each under the
    distribution it was drawn from and under the untruncated one at the same temperature, and why it ended."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    full_logprobs: list[float] = field(default_factory=list)
    certainty: list[float] = field(default_factory=list)  # on request: KL(uniform || p) of each token, in nats
    finish: str = ""  # "stop" or "length"; empty while it runs


@dataclass
class Row:
    """A sample in progress: where it belongs, its own random numbers, and how far it is."""

    prompt: int
    number: int
    prefix: int  # tokens of the prompt that are in its slot
    limit: int  # tokens that it may have
    rng: random.Random
    sample: Sample = field(default_factory=Sample)

    @property
    def length(self) -> int:
        """Tokens in its slot: the prompt's, unless shared, and all but the newest of its own."""
        return self.prefix + len(self.sample.ids) - 1

    def reason(self, token: int, count: int, stop_ids: list[int]) -> str:
        """Why it ends with this token, the count-th of its own: as in `Sample.finish`."""
        return "stop" if token in stop_ids else "length" if count == self.limit else ""


def choose_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int, window: int = 0):
    """Draw one token a row by inverting the distribution function at one uniform number a row.

    logits (B, V) fp32, uniform (B,) in [0, 1) -> (tokens (B,), logprobs (B,), full_logprobs (B,), exact (B,)). The
    nucleus is the smallest set of most likely tokens with mass >= top_p; top_k = 0 means no limit. temperature 0 is
    greedy, with log-probabilities at temperature 1. fp64 sums: at V = 152k, fp32 would misplace the tail.

    The nucleus is looked for among the `window` most likely tokens; 0: among as many as it takes, which needs a look at
    values that a CUDA graph can't take. exact: whether it was found there.
    """
    full = F.log_softmax(logits / (temperature or 1.0), dim=-1)  # (B, V)
    exact = torch.ones_like(full[:, 0], dtype=torch.bool)
    if temperature == 0:
        logprobs, tokens = full.max(-1)
        return tokens, logprobs, logprobs, exact
    ranked, order, truncated = full, None, top_p < 1 or top_k > 0
    if truncated:
        size = min(top_k or window or 64, full.shape[1])
        ranked, order = full.topk(size, dim=-1)  # (B, size), most likely first
        # The nucleus nearly always lies within a small window; widen it when it doesn't.
        while not (top_k or window) and size < full.shape[1] and bool((ranked.exp().sum(-1) < top_p).any()):
            size = min(4 * size, full.shape[1])
            ranked, order = full.topk(size, dim=-1)
        mass = ranked.exp().cumsum(-1, dtype=torch.float64)
        if not top_k and size < full.shape[1]:
            exact = mass[:, -1] >= top_p
        before = mass - ranked.exp()  # what lies before a kept token is less than top_p
        ranked = ranked.masked_fill(before >= (top_p * mass[:, -1:] if top_k else top_p), -torch.inf)
    cdf = ranked.exp().cumsum(-1, dtype=torch.float64)  # (B, V) or (B, size)
    place = torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True)  # (B, 1)
    place = place.clamp(max=ranked.shape[1] - 1)  # it is beyond where the logits are NaN
    logprobs = ranked.gather(1, place)[:, 0]
    if not truncated:
        return place[:, 0], logprobs, logprobs, exact
    return order.gather(1, place)[:, 0], logprobs - cdf[:, -1].log().float(), logprobs, exact


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(uniform || softmax(logits)) in nats, of each row: (B, V) -> (B,). 0 where nothing is known."""
    return -F.log_softmax(logits, dim=-1).mean(-1) - math.log(logits.shape[1])


PREFILL_TOKENS = 16_384  # of new prompts that are run at once


class Sampler:
    """Batched sampling with a slot KV cache: per-row lengths, no left padding, refill and compaction.

    Running rows always fill the first n slots. Each decoding step feeds one token a row; rows that finish are
    overwritten by the last ones, and new rows are appended when an eighth of the slots is free. A prompt is
    run once, packed with others; its keys and values are copied to the slots of all its samples, or kept once for
    all of them if share_prompts, which by default is decided by the lengths.

    `steps` are made between two looks at what was drawn, 8 on a GPU, where a look makes the device wait; what a row
    draws after its end is thrown away.

    This is the schedule; the tensors are in kernels/decode.py.
    """

    def __init__(
        self,
        model: Transformer,
        slots: int = 64,
        prefill_tokens: int = PREFILL_TOKENS,
        steps: int | None = None,
        share_prompts: bool | None = None,
    ):
        self.model, self.slots, self.prefill_tokens = model, max(slots, 1), prefill_tokens
        self.steps, self.share_prompts = steps or (8 if model.device.type == "cuda" else 1), share_prompts
        self.tokens, self.graphs = 0, True  # sampled so far, by all calls; whether CUDA graphs are tried

    def sample(self, prompts: list[list[int]], **settings) -> list[list[Sample]]:
        """num_samples samples of every prompt, in order; the settings are those of `stream`."""
        return [samples for _, samples in sorted(self.stream(prompts, **settings), key=lambda pair: pair[0])]

    def stream(
        self,
        prompts: list[list[int]],
        *,
        keys: list[str],
        num_samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int | list[int] = 1024,
        stop_ids: list[int],
        seed: int = 0,
        certainty: bool = False,
        turns: Iterator[list[int]] | None = None,
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Yield (prompt index, its samples) as prompts are finished. max_new_tokens: for all, or one per prompt.
        turns: which prompts are this rank's, asked for when slots are free (`distributed.work_queue`); none: all of them.

        A sample is a function of (seed, key of its prompt, sample index): these seed its random numbers, so neither
        the slots nor the order matter (but for ties within rounding, which other batch shapes may break otherwise).
        Raises InputError, a ValueError, for settings out of range and for a prompt with too little room.
        """
        limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
        if not len(keys) == len(limits) == len(prompts):
            raise InputError(f"{len(prompts)} prompts, but {len(keys)} keys and {len(limits)} limits of new tokens")
        if not (temperature >= 0 and 0 < top_p <= 1 and top_k >= 0 and min(limits, default=1) > 0):
            raise InputError(f"out of range: {temperature=}, {top_p=}, {top_k=} or {max_new_tokens=}")
        context = self.model.config.max_positions
        for key, prompt, limit in zip(keys, prompts, limits, strict=True):
            if not prompt or len(prompt) + limit > context:
                sizes = f"a prompt of {len(prompt)} tokens and --max_new_tokens {limit}"
                raise InputError(f"{key}: {sizes} don't fit the model's context of {context}; lower the flag")

        def choose(logits: Tensor, uniform: Tensor, window: int = 0) -> tuple[Tensor, ...]:
            drawn = choose_tokens(logits, uniform, temperature, top_p, top_k, window)
            return (*drawn, kl_to_uniform(logits)) if certainty else drawn

        turns = turns or iter([range(len(prompts))])
        return self._run(prompts, keys, limits, num_samples, choose, stop_ids, seed, turns)

    @torch.no_grad()
    def _run(
        self, prompts, keys, limits, num_samples, choose, stop_ids, seed, turns
    ) -> Iterator[tuple[int, list[Sample]]]:
        queue: deque[tuple[int, int]] = deque()  # (prompt, number of the sample)
        waiting: Counter[tuple[int, ...]] = Counter()  # how often each distinct prompt is in the queue
        held: dict[tuple[int, ...], Prefix] = {}  # what running a prompt left, while it is in the queue
        share = self._shares(prompts, limits, num_samples)
        places: dict[int, int] = {}  # where each prompt whose samples are running is shared
        cache = self._cache(prompts, limits, num_samples, share, choose)
        free_places = list(range(cache.prompts))[::-1]  # the lowest first: the CPU looks at all up to the highest
        rows: list[Row] = []  # row i sits in slot i
        groups: dict[int, dict[int, Sample]] = {}
        while True:
            free, new, missing, room = cache.slots - len(rows), [], {}, self.prefill_tokens
            if free >= max(1, cache.slots // 8):
                if not queue:
                    for p in next(turns, []):
                        waiting[tuple(prompts[p])] += num_samples
                        queue.extend((p, k) for k in range(num_samples))
                while queue and len(new) < free and room > 0:  # what a prefill leaves is held beside the cache
                    p = queue[0][0]
                    if share and p not in places:
                        if not free_places:
                            break
                        places[p] = free_places.pop()
                    new.append(queue.popleft())
                    ids = tuple(prompts[p])
                    if ids not in held and ids not in missing:
                        missing[ids] = None
                        room -= len(ids)
            if not new and not rows:
                return
            if new:
                wanted = [tuple(prompts[p]) for p, _ in new]
                if missing:
                    held |= zip(missing, prefill(self.model, list(missing), self.prefill_tokens), strict=True)
                for p in dict.fromkeys(p for p, k in new if share and k == 0):
                    cache.share(places[p], held[tuple(prompts[p])])
                logits = cache.add(len(rows), [held[ids] for ids in wanted])  # (len(new), V)
                waiting.subtract(wanted)
                held = {ids: prefix for ids, prefix in held.items() if waiting[ids]}
                rngs = [random.Random(f"{seed}/{keys[p]}/{k}") for p, k in new]
                lengths = [0 if share else len(prompts[p]) for p, _ in new]
                drawing = [Row(p, k, n, limits[p], rng) for (p, k), n, rng in zip(new, lengths, rngs, strict=True)]
                rows += drawing
                uniform = torch.tensor([row.rng.random() for row in drawing], dtype=torch.float64, device=logits.device)
                drawn = [x[None].tolist() for x in choose(logits, uniform)]
            else:
                drawing = rows
                uniform = [[row.rng.random() for row in rows] for _ in range(self.steps)]
                drawn = self._decode(cache, rows, uniform, stop_ids)
            self._note(drawing, drawn, stop_ids)
            finished = self._take_finished(rows, cache)
            for row in finished:
                group = groups.setdefault(row.prompt, {})
                group[row.number] = row.sample
                if len(group) == num_samples:
                    if share:
                        free_places.append(places.pop(row.prompt))
                    yield row.prompt, [group[k] for k in range(num_samples)]
                    del groups[row.prompt]
            if share and rows and (new or finished):
                cache.arrange([places[row.prompt] for row in rows])

    def _decode(self, cache: SlotCache, rows: list[Row], uniform: list[list[float]], stop_ids: list[int]) -> list:
        """What `SlotCache.decode` draws; again without a CUDA graph if a row's nucleus was larger than a graph's
        window, unless that was after its end."""
        tokens, lengths = [row.sample.ids[-1] for row in rows], [row.length for row in rows]
        drawn = cache.decode(tokens, lengths, uniform)
        self.graphs = cache.graphs is not None  # where capturing one has failed, it isn't tried again
        for i, row in enumerate(rows if not all(map(all, drawn[3])) else []):
            for step, (ids, exact) in enumerate(zip(drawn[0], drawn[3], strict=True), 1):
                if not exact[i]:
                    return cache.decode(tokens, lengths, uniform, exact=True)
                if row.reason(ids[i], len(row.sample.ids) + step, stop_ids):
                    break
        return drawn

    def _note(self, rows: list[Row], drawn: list[list[list]], stop_ids: list[int]) -> None:
        """Give each row what it has drawn in one step or several, up to its end."""
        for step in zip(*drawn, strict=True):
            for row, token, logprob, full_logprob, _, *spread in zip(rows, *step, strict=True):
                sample = row.sample
                if sample.finish:  # in an earlier one of these steps
                    continue
                if math.isnan(logprob):
                    raise RunError("the model's log-probs are NaN, so its weights are spoilt: take an earlier "
                                     "checkpoint; if it was in training, lower --lr, with another --out")  # fmt: skip
                sample.ids.append(token)
                sample.logprobs.append(logprob)
                sample.full_logprobs.append(full_logprob)
                sample.certainty.extend(spread)
                sample.finish = row.reason(token, len(sample.ids), stop_ids)
                self.tokens += 1

    def _shares(self, prompts: list[list[int]], limits: list[int], num_samples: int) -> bool:
        """Whether prompts are kept once for all their samples: where the keys that needn't be read for each of them are
        more than a quarter of those of a row in its middle. They have to make up for a second call of attention."""
        if self.share_prompts is not None or not prompts or num_samples < 2:
            return bool(self.share_prompts and prompts)
        prompt, own = sum(map(len, prompts)) / len(prompts), sum(limits) / len(limits) / 2
        return prompt * (1 - 1 / num_samples) > (prompt + own) / 4

    def _cache(self, prompts, limits, num_samples, share: bool, choose: Callable) -> SlotCache:
        """Slots for the longest row; with shared prompts four times as many places for these as full groups would take,
        since of some only a last sample is left."""
        slots, flags = min(self.slots, len(prompts) * num_samples), {"steps": self.steps, "graphs": self.graphs}
        if share:
            longest, places = max(map(len, prompts)), min(len(prompts), slots, 4 * slots // num_samples + 1)
            shared = {"prompts": places, "prompt_length": longest, "group": min(num_samples, slots)}
            return SlotCache(self.model, slots, max(limits), choose, **flags, **shared)
        longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), default=0)
        return SlotCache(self.model, slots, longest, choose, **flags)

    def _take_finished(self, rows: list[Row], cache: SlotCache) -> list[Row]:
        """Take the finished rows out; the last running ones move into the holes, so that the first slots stay dense."""
        finished = [row for row in rows if row.sample.finish]
        n = len(rows) - len(finished)
        holes = [i for i in range(n) if rows[i].sample.finish]
        movers = [i for i in range(n, len(rows)) if not rows[i].sample.finish]
        for hole, mover in zip(holes, movers, strict=True):
            rows[hole] = rows[mover]
            cache.move(mover, hole, rows[mover].length)
        del rows[n:]
        return finished


def with_progress(stream: Iterator, sampler: Sampler, title: str, prompts: int, num_samples: int) -> Iterator:
    """Pass a sampler's stream through, with a progress bar over rank 0's samples, tokens/s and the time left."""
    bar = tqdm(total=prompts * num_samples, desc=title, unit="sample", disable=distributed.rank() != 0, mininterval=1.0)
    started, before = time.time(), sampler.tokens
    with bar:
        for i, samples in stream:
            bar.set_postfix_str(f"{(sampler.tokens - before) / (time.time() - started):,.0f} tok/s", refresh=False)
            bar.update(len(samples))
            yield i, samples
