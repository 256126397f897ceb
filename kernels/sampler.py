"""The schedule of the sampler: which sample has which slot, what it has drawn, and which row moves when one ends.

It knows token ids and no text. The tensors, that is keys, values, attention and CUDA graphs, are in kernels/decode.py.

    sampler = Sampler(model)
    groups = sampler.sample(prompts, keys=["a", "b"], num_samples=8, temperature=1.0, max_new_tokens=100, stop_ids=[2])

Two slots, three prompts of one sample each: A ends with its 2nd token, B with its 4th, C with its 3rd. A prompt is run
when a slot is free for one of its samples; the first token of a sample comes from what that run leaves. The last
running row moves into the slot of one that has ended, so that the running rows are always the first ones.

    round     1 start   2 decode   3 start      4 decode   5 decode
    slot 0    A1        A2 end     B moves in   B3         B4 end
    slot 1    B1        B2         C1           C2         C3 end
"""

import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kernels.decode import PromptKV, SlotCache, prefill
from kernels.distributed import InputError, RunError, per_second, rank
from kernels.transformer import Config, Transformer

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

PREFILL_TOKENS = 16_384  # of new prompts that are run at once
NUCLEUS_TOKENS = 4096  # the nucleus of top_p is looked for among so many of the likeliest tokens
CPU_SLOTS = 128  # where --slots isn't given; on a GPU, as many as its memory allows
MOST_SLOTS = 512  # beyond these a step takes longer in proportion

# --------------------------------------------------------------------------- drawing a token


def choose_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at one uniform number per row.

    logits (B, V) fp32, uniform (B,) in [0, 1) -> (tokens (B,), logprobs (B,), full_logprobs (B,)): the log-probability
    under the truncated distribution that was drawn from, and under the whole one at the same temperature. top_k = 0: no
    limit; otherwise top_p is a share of what top_k leaves. The nucleus is the smallest set of likeliest tokens, among
    the first NUCLEUS_TOKENS of them, with mass >= top_p. temperature 0 is greedy, with log-probabilities at 1.

        probabilities   0.1  0.5  0.06  0.3  0.04     top_p 0.85, uniform 0.7
        ranked          0.5  0.3  0.1   0.06  0.04    of tokens 1, 3, 0, 2, 4
        likelier        0    0.5  0.8   0.9   0.96    the mass of all likelier tokens: kept while < 0.85
        cumulative      0.5  0.8  0.9                 0.7 * 0.9 = 0.63 lies in the second: token 3, at 0.3 / 0.9

    The sums are in fp64: over 152k tokens, fp32 would misplace the tail. There is no branch on a value, so that a CUDA
    graph can capture it.
    """
    full = F.log_softmax(logits / (temperature or 1.0), dim=-1)  # (B, V)
    if temperature == 0:
        logprobs, tokens = full.max(-1)
        return tokens, logprobs, logprobs
    if top_p == 1 and top_k == 0:
        mass = full.exp().cumsum(-1, dtype=torch.float64)  # (B, V)
        tokens = draw(mass, mass[:, -1:], uniform)  # (B, 1)
        logprobs = full.gather(1, tokens)[:, 0]
        return tokens[:, 0], logprobs, logprobs
    ranked, token_of_place = full.topk(min(top_k or NUCLEUS_TOKENS, full.shape[1]), dim=-1)  # (B, C), likeliest first
    probabilities = ranked.exp()
    mass = probabilities.cumsum(-1, dtype=torch.float64)  # (B, C)
    enough = top_p * mass[:, -1:] if top_k else top_p
    kept = (mass - probabilities < enough).sum(-1, keepdim=True)  # (B, 1): how many of the likeliest
    last = (kept - 1).clamp(min=0)  # none is kept where the logits are NaN
    total = mass.gather(1, last)
    place = draw(mass, total, uniform).minimum(last)  # the product of uniform and total may round up to the total
    full_logprobs = ranked.gather(1, place)[:, 0]
    return token_of_place.gather(1, place)[:, 0], full_logprobs - total[:, 0].log().float(), full_logprobs


def draw(mass: Tensor, total: Tensor, uniform: Tensor) -> Tensor:
    """(B, 1): the first place at which the cumulative mass (B, C) passes uniform (B,) times the total (B, 1)."""
    place = torch.searchsorted(mass, uniform.double()[:, None] * total, right=True)
    return place.clamp(max=mass.shape[1] - 1)  # it is beyond the last where the logits are NaN


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(uniform || softmax(logits)) in nats, of each row: (B, V) -> (B,). 0 for a uniform distribution."""
    return -F.log_softmax(logits, dim=-1).mean(-1) - math.log(logits.shape[1])


# --------------------------------------------------------------------------- how many slots


def slots_that_fit(
    free: int, weights: int, config: Config, prompt_lengths: list[int], limits: list[int], element_size: int = 2
) -> int:
    """How many slots a GPU has memory for, at least 1; each has to take the longest prompt with its limit.

    free: bytes without the weights; weights: bytes that they will take of these (0 once they are loaded). limits: new
    tokens of each prompt. Set aside are a prefill of PREFILL_TOKENS and 1.5 GiB for the libraries.

        Qwen2.5-14B in bf16 on a GPU with 139.8 GiB: 27.5 GiB of weights, 192 KiB per token, 9.4 GiB set aside;
        a slot of 2,000 + 8,192 tokens takes 1.87 GiB, so that 55 fit
    """
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * element_size  # bytes of keys and values
    activations = (3 * config.intermediate_size + 4 * config.hidden_size) * element_size  # bytes per token, in the MLP
    # The prefill's keys and values are there twice while those of the layers are stacked.
    set_aside = PREFILL_TOKENS * (2 * token + activations) + 3 * 2**29
    longest = max(prompt + limit for prompt, limit in zip(prompt_lengths, limits, strict=True))
    return max(1, (free - weights - set_aside) // (longest * token))


def free_memory(device: torch.device) -> int | None:
    """Bytes that a new cache may take on a GPU: what is free, and what PyTorch keeps for its own use. None
    elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


# --------------------------------------------------------------------------- the schedule


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
    """A sample in progress. Row i of a call sits in slot i."""

    prompt: int  # index of its prompt
    number: int  # which sample of that prompt it is
    prompt_tokens: int  # of its prompt in this slot; 0 if prompts are shared
    limit: int  # tokens that it may draw
    rng: random.Random  # its own random numbers
    sample: Sample = field(default_factory=Sample)

    @property
    def length(self) -> int:
        """Tokens in its slot: the newest one isn't there yet."""
        return self.prompt_tokens + len(self.sample.ids) - 1


@dataclass
class Call:
    """One call of `Sampler.stream`: what was asked for, and where it stands."""

    prompts: list[tuple[int, ...]]
    keys: list[str]
    limits: list[int]  # new tokens of each prompt
    asked: list[int]  # of each prompt, how many samples were asked for so far
    group: int  # most samples of a prompt that are in the queue or running at a time
    further: Callable[[int, int, Sample], int] | None  # see `Sampler.stream`
    choose: Callable  # logits (n, V), uniform (n,) -> tensors (n,): token, log-prob, full log-prob (, certainty)
    stop_ids: set[int]
    seed: int
    first_samples: list[int]  # of each prompt, the number of its first sample
    batches: Iterator[list[int]]  # of the work queue: places in `order`
    order: list[int]  # the prompts, longest first
    shared: bool  # whether prompts are kept once for all their samples
    cache: SlotCache | None = None
    slot_tokens: int = 0  # tokens of the longest sample that the cache was made for
    rows: list[Row] = field(default_factory=list)
    queue: deque[tuple[int, int]] = field(default_factory=deque)  # (prompt, number) of samples without a slot
    waiting: Counter[tuple[int, ...]] = field(default_factory=Counter)  # of each distinct prompt, copies still to make
    held: dict[tuple[int, ...], PromptKV] = field(default_factory=dict)  # of prompts with copies still to make
    places: dict[int, int] = field(default_factory=dict)  # of each shared prompt in use: 0, 1, 2, ...
    groups: dict[int, dict[int, Sample]] = field(default_factory=dict)  # finished samples of unfinished prompts

    def tokens(self, prompt: int) -> int:
        """Tokens that a sample of this prompt may come to, the prompt included."""
        return len(self.prompts[prompt]) + self.limits[prompt]

    def is_copied(self, prompt: int, number: int) -> bool:
        """Whether this sample starts with a copy of its prompt: each does, or the first one if prompts are shared."""
        return number == 0 or not self.shared

    @property
    def holds_prompts(self) -> bool:
        """Whether a prompt is held until it is finished, because further samples may need a copy."""
        return self.further is not None and not self.shared


class Sampler:
    """Batched sampling with a slot KV cache: a length for each row, no left padding, refill and compaction.

    A decoding step feeds one token per row. New rows come when an eighth of the slots is free. A prompt is run once,
    packed with others; its keys and values are copied to the slots of all its samples, or kept once for all of them if
    share_prompts, which by default is decided by the lengths.

    slots: rows that run at once; None: as many as the GPU's memory allows, or CPU_SLOTS. steps: decoding steps between
    two reads by the CPU of what was drawn, 8 on a GPU, which waits meanwhile; tokens after a row's end are discarded.
    """

    def __init__(
        self,
        model: Transformer,
        slots: int | None = None,
        steps: int | None = None,
        share_prompts: bool | None = None,
    ):
        self.model = model
        self.slots = slots
        self.steps = steps or (8 if model.device.type == "cuda" else 1)
        self.share_prompts = share_prompts
        self.tokens = 0  # sampled so far, in all calls
        self.graphs = True  # whether CUDA graphs are tried

    def sample(self, prompts: list[list[int]], **settings) -> list[list[Sample]]:
        """num_samples samples of every prompt, in the order of the prompts; settings as for `stream`."""
        groups = dict(self.stream(prompts, **settings))
        return [groups[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: list[list[int]],
        *,
        keys: list[str],
        num_samples: int | list[int] = 1,
        further: Callable[[int, int, Sample], int] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int | list[int] = 1024,
        stop_ids: list[int],
        seed: int = 0,
        certainty: bool = False,
        first_samples: list[int] | None = None,
        batches: Iterator[list[int]] | None = None,
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Yield (prompt index, its samples) as prompts are finished. num_samples, max_new_tokens: for all prompts, or
        one for each. further(prompt index, number, sample), where the samples decide how many a prompt needs: called
        for each that has ended, it returns how many are needed at least beside those that have; so many join the
        running call.
        first_samples: of each prompt, the number of its first sample, to continue where an earlier call ended; None: 0.
        batches: this rank's numbers from 0 to len(prompts) - 1, places in the order of the longest first, asked for
        when slots are free (`distributed.work_queue`); None: all of them.

        A sample is a function of (seed, key of its prompt, sample number): these seed its random numbers, so neither
        the slots nor the order matter (except for ties within rounding, which other batch shapes may break otherwise).
        Raises InputError, a ValueError, for settings out of range and for a prompt that leaves too little context.
        """
        limits = for_each(max_new_tokens, prompts)
        asked = for_each(num_samples, prompts)
        group = max(asked, default=1)
        if not len(keys) == len(limits) == len(prompts):
            raise InputError(f"{len(prompts)} prompts, but {len(keys)} keys and {len(limits)} limits of new tokens")
        if not (temperature >= 0 and 0 < top_p <= 1 and top_k >= 0 and min(limits, default=1) > 0):
            raise InputError(f"out of range: {temperature=}, {top_p=}, {top_k=} or {max_new_tokens=}")
        context = self.model.config.max_positions
        for key, prompt, limit in zip(keys, prompts, limits, strict=True):
            if not prompt or len(prompt) + limit > context:
                sizes = f"a prompt of {len(prompt)} tokens and --max_new_tokens {limit}"
                raise InputError(f"{key}: {sizes} don't fit the model's context of {context}; lower the flag")

        def choose(logits: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
            drawn = choose_tokens(logits, uniform, temperature, top_p, top_k)
            if certainty:
                drawn += (kl_to_uniform(logits),)
            return drawn

        call = Call(
            prompts=[tuple(prompt) for prompt in prompts],
            keys=keys,
            limits=limits,
            asked=asked,
            group=group,
            further=further,
            choose=choose,
            stop_ids=set(stop_ids),
            seed=seed,
            first_samples=first_samples or [0] * len(prompts),
            batches=batches or iter([list(range(len(prompts)))]),
            order=sorted(range(len(prompts)), key=lambda p: -len(prompts[p]) - limits[p]),
            shared=self._shares_prompts(prompts, limits, group, further is not None),
        )
        return self._run(call)

    @torch.no_grad()
    def _run(self, call: Call) -> Iterator[tuple[int, list[Sample]]]:
        """The rounds of a call; see the trace at the top of the file."""
        while True:
            new = self._admit(call)
            if new:
                self._start(call, new)
            elif call.rows:
                self._decode(call)
            else:
                return
            yield from self._retire(call)

    def _admit(self, call: Call) -> list[tuple[int, int]]:
        """Samples from the queue for the free slots, as (prompt, number); none if there are too few of either."""
        # 1. A prefill makes all running rows wait, so a few slots have to be free.
        if call.cache is not None and call.cache.slots - len(call.rows) < max(1, call.cache.slots // 8):
            return []

        # 2. If the queue is empty, more work for this rank; the longest prompts come first.
        if not call.queue:
            for place in next(call.batches, []):
                prompt = call.order[place]
                numbers = range(call.asked[prompt])
                call.queue.extend((prompt, number) for number in numbers)
                copies = sum(call.is_copied(prompt, number) for number in numbers)
                call.waiting[call.prompts[prompt]] += copies + call.holds_prompts
        if not call.queue:
            return []

        # 3. Slots of another length? Two caches don't fit side by side, so the running rows end first.
        if self._needs_new_cache(call):
            if call.rows:
                return []
            self._make_cache(call)

        # 4. As many samples as there are free slots, and new prompts as fit in one prefill.
        new = []
        to_run = set()
        tokens_left = PREFILL_TOKENS
        while call.queue and len(new) < call.cache.slots - len(call.rows) and tokens_left > 0:
            if self._needs_new_cache(call):
                break
            prompt, number = call.queue[0]
            if call.shared and prompt not in call.places:
                if len(call.places) == call.cache.prompts:
                    break
                call.places[prompt] = len(call.places)
            new.append(call.queue.popleft())
            ids = call.prompts[prompt]
            if call.is_copied(prompt, number) and ids not in call.held and ids not in to_run:
                to_run.add(ids)
                tokens_left -= len(ids)
        return new

    def _start(self, call: Call, new: list[tuple[int, int]]) -> None:
        """Run the prompts of new samples, put them into the next slots, and draw their first tokens."""
        # 1. Run each distinct prompt that hasn't been run.
        wanted = [call.prompts[prompt] for prompt, number in new if call.is_copied(prompt, number)]
        to_run = [ids for ids in dict.fromkeys(wanted) if ids not in call.held]
        if to_run:
            call.held |= zip(to_run, prefill(self.model, to_run, PREFILL_TOKENS), strict=True)

        # 2. Into the cache: once per prompt if shared, else to the slot of each sample.
        if call.shared:
            for prompt, number in new:
                if call.is_copied(prompt, number):
                    call.cache.share(call.places[prompt], call.held[call.prompts[prompt]])
            logits = call.cache.first_logits([call.places[prompt] for prompt, _ in new])  # (len(new), V)
        else:
            logits = call.cache.add(len(call.rows), [call.held[ids] for ids in wanted])  # (len(new), V)

        # 3. Keep what is to be copied again, with memory of its own, and let the rest go.
        call.waiting.subtract(wanted)
        call.held = {ids: kv for ids, kv in call.held.items() if call.waiting[ids] > 0}
        for ids in to_run:
            if ids in call.held:
                call.held[ids] = call.held[ids].clone()

        # 4. The first tokens.
        rows = []
        for prompt, number in new:
            sample_number = call.first_samples[prompt] + number
            rng = random.Random(f"{call.seed}/{call.keys[prompt]}/{sample_number}")
            prompt_tokens = 0 if call.shared else len(call.prompts[prompt])
            rows.append(Row(prompt, number, prompt_tokens, call.limits[prompt], rng))
        uniform = torch.tensor([row.rng.random() for row in rows], dtype=torch.float64, device=logits.device)
        drawn = [values[None].tolist() for values in call.choose(logits, uniform)]  # one step, as `_note` expects
        call.rows += rows
        self._note(rows, drawn, call.stop_ids)
        if call.shared:
            call.cache.arrange([call.places[row.prompt] for row in call.rows])

    def _decode(self, call: Call) -> None:
        """Draw the next tokens of all rows, `steps` of them at most."""
        newest = [row.sample.ids[-1] for row in call.rows]
        lengths = [row.length for row in call.rows]
        uniform = [[row.rng.random() for row in call.rows] for _ in range(self.steps)]
        drawn = call.cache.decode(newest, lengths, uniform)
        self.graphs = call.cache.can_capture
        self._note(call.rows, drawn, call.stop_ids)

    def _note(self, rows: list[Row], drawn: list[list[list]], stop_ids: set[int]) -> None:
        """Append to each row what it drew, up to its end. drawn: for each result of `choose`, steps of rows."""
        for results in zip(*drawn, strict=True):  # of one step
            for row, token, logprob, full_logprob, *certainty in zip(rows, *results, strict=True):
                sample = row.sample
                if sample.finish:  # it ended in an earlier one of these steps
                    continue
                if math.isnan(logprob):
                    raise RunError("the model's log-probs are NaN, so its weights are, too: go back to an earlier "
                                   "checkpoint; if it was in training, lower --lr, with another --out")  # fmt: skip
                sample.ids.append(token)
                sample.logprobs.append(logprob)
                sample.full_logprobs.append(full_logprob)
                sample.certainty += certainty
                if token in stop_ids:
                    sample.finish = "stop"
                elif len(sample.ids) == row.limit:
                    sample.finish = "length"
                self.tokens += 1

    def _retire(self, call: Call) -> Iterator[tuple[int, list[Sample]]]:
        """Take the finished rows out, move the last running rows into the holes, and yield the finished groups.

        Rows a b C d E, of which C and E have ended: n = 3 run on, the hole at 2 lies among the first n, the mover d
        (row 3) beyond them: a b d.
        """
        finished = [row for row in call.rows if row.sample.finish]
        if not finished:
            return
        n = len(call.rows) - len(finished)
        holes = [i for i in range(n) if call.rows[i].sample.finish]
        movers = [i for i in range(n, len(call.rows)) if not call.rows[i].sample.finish]
        for hole, mover in zip(holes, movers, strict=True):
            call.rows[hole] = call.rows[mover]
            call.cache.move(mover, hole, call.rows[mover].length)
        del call.rows[n:]

        whole = []
        for row in finished:
            group = call.groups.setdefault(row.prompt, {})
            group[row.number] = row.sample
            if call.further is not None:
                needed = call.further(row.prompt, row.number, row.sample)
                self._ask(call, row.prompt, len(group) + min(needed, call.group))  # the rest after the next one
            if len(group) == call.asked[row.prompt]:
                whole.append(row.prompt)
        if call.shared:
            for prompt in whole:
                self._free_place(call, prompt)
            if call.rows:
                call.cache.arrange([call.places[row.prompt] for row in call.rows])
        for prompt in whole:
            call.waiting[call.prompts[prompt]] -= call.holds_prompts
            group = call.groups.pop(prompt)
            yield prompt, [group[number] for number in range(len(group))]

    def _free_place(self, call: Call, prompt: int) -> None:
        """Give up a prompt's place among the shared ones. The last one moves there: the CPU looks at all of them."""
        place = call.places.pop(prompt)
        last = len(call.places)
        if place < last:
            (mover,) = [other for other, its_place in call.places.items() if its_place == last]
            call.cache.move_prompt(last, place)
            call.places[mover] = place

    def _ask(self, call: Call, prompt: int, total: int) -> None:
        """Put the samples that a prompt lacks of so many at the front of the queue. What has begun comes first: few
        prompts then have a place at a time, and no longer one is left when shorter slots are made."""
        for number in range(call.asked[prompt], total):
            call.queue.appendleft((prompt, number))
            call.waiting[call.prompts[prompt]] += call.is_copied(prompt, number)
            call.asked[prompt] += 1

    # ------------------------------------------------------------------- sizes

    def _shares_prompts(self, prompts: list[list[int]], limits: list[int], num_samples: int, one_by_one: bool) -> bool:
        """Whether prompts are kept once for all their samples. That takes a second call of attention; it pays if it
        saves reading more than a quarter of the keys of a row halfway to its limit. But it computes num_samples rows of
        each prompt, running or not: too many for a CPU where they come one by one, about half of them at a time."""
        if self.share_prompts is not None:
            return self.share_prompts and bool(prompts)
        if not prompts or num_samples < 2 or (one_by_one and self.model.device.type == "cpu"):
            return False
        prompt = sum(map(len, prompts)) / len(prompts)
        own = sum(limits) / len(limits) / 2
        return prompt * (1 - 1 / num_samples) > (prompt + own) / 4

    def _needs_new_cache(self, call: Call) -> bool:
        """Whether there is no cache yet, or memory decides how many slots there are and the next sample, thus every
        later one, needs at most two thirds of a slot."""
        if call.cache is None:
            return True
        if self.slots is not None or free_memory(self.model.device) is None:
            return False
        next_prompt = call.queue[0][0]
        return 3 * call.tokens(next_prompt) <= 2 * call.slot_tokens

    def _make_cache(self, call: Call) -> None:
        """Slots for the next sample of the queue, which is the longest of the rest of the prompts."""
        call.cache = None  # its memory has to be free before the new one is measured
        next_prompt = call.queue[0][0]
        call.slot_tokens = call.tokens(next_prompt)
        rest = call.order[call.order.index(next_prompt) :]
        prompt_lengths = [len(call.prompts[prompt]) for prompt in rest]
        limits = [call.limits[prompt] for prompt in rest]

        slots = self.slots
        free = free_memory(self.model.device)
        if slots is None and free is None:
            slots = CPU_SLOTS
        elif slots is None:
            per_slot = prompt_lengths
            if call.shared:  # there is a place for a prompt per group / 4 slots, see below
                per_slot = [math.ceil(4 * length / call.group) for length in prompt_lengths]
            size = self.model.dtype.itemsize
            slots = min(MOST_SLOTS, slots_that_fit(free, 0, self.model.config, per_slot, limits, size))
        slots = min(slots, len(rest) * call.group)

        settings = {"steps": self.steps, "graphs": self.graphs}
        if not call.shared:
            call.cache = SlotCache(self.model, slots, call.slot_tokens, call.choose, **settings)
            return
        # Four times as many places for prompts as full groups would need: a prompt keeps its place until its last
        # sample ends.
        places = min(len(rest), slots, 4 * slots // call.group + 1)
        settings |= {"prompts": places, "prompt_length": max(prompt_lengths), "group": min(call.group, slots)}
        call.cache = SlotCache(self.model, slots, max(limits), call.choose, **settings)


def for_each(setting: int | list[int], prompts: list) -> list[int]:
    """A new list of a setting of each prompt, which may be given once for all of them."""
    return list(setting) if isinstance(setting, list) else [setting] * len(prompts)


def with_progress(stream: Iterator, sampler: Sampler, title: str, prompts: int, num_samples: int) -> Iterator:
    """Pass a sampler's stream through, with a progress bar over rank 0's samples, tokens per second and time left."""
    bar = tqdm(total=prompts * num_samples, desc=title, unit="sample", disable=rank() != 0, mininterval=1.0)
    started, before = time.perf_counter(), sampler.tokens
    with bar:
        for i, samples in stream:
            speed = per_second(sampler.tokens - before, time.perf_counter() - started)
            bar.set_postfix_str(f"{speed:,.0f} tok/s", refresh=False)
            bar.update(num_samples)
            yield i, samples
