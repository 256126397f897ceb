"""The sampler against `transformers` and exact distributions; solutions as text; record files and the command line."""

import contextlib
import copy
import errno
import fcntl
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import socket
import subprocess
import sys
import time
import weakref
from argparse import Namespace
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import generate
from data import records, report
from generate import render_response, render_steps
from kernels import chat, decode, distributed, sampler
from kernels.decode import SlotCache, ragged_attention, visible_keys
from kernels.distributed import InputError
from kernels.sampler import Sampler, choose_tokens
from kernels.text import (
    TAGS,
    count_empty_boxes,
    extract_answer,
    find_boxes,
    has_layout_line,
    hidden_text,
    split_steps,
    unwrap_boxes,
)
from kernels.transformer import Config, Transformer, load_model, save_model

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.varlen import varlen_attn
from torch.torch_version import TorchVersion

ROOT = Path(__file__).parent.parent
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.25}

# --------------------------------------------------------------------------- the sampler


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> (our model, transformers' model) with the same random weights."""
    pairs = {}
    for name in ("Qwen2", "Qwen3", "Llama"):
        torch.manual_seed(len(name))
        theirs = getattr(transformers, f"{name}ForCausalLM")(
            getattr(transformers, f"{name}Config")(**SIZES, head_dim=8)
        )
        path = tmp_path_factory.mktemp("models") / name
        theirs.eval().save_pretrained(path)
        pairs[name] = load_model(path), theirs
    return pairs


def make_prompts(count: int, longest: int = 30) -> list[list[int]]:
    """Random prompts of all lengths from 1 up."""
    rng = random.Random(count)
    return [[rng.randrange(97) for _ in range(1 + i * (longest - 1) // max(count - 1, 1))] for i in range(count)]


def check_logprobs(model, prompt: list[int], sample, temperature: float = 1.0, top_p: float = 1.0) -> None:
    """Both recorded log-probabilities of a sample against one forward pass of `transformers`, without any cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + sample.ids])).logits[0, len(prompt) - 1 : -1]  # (T, V)
    full = (logits.double() / temperature).log_softmax(-1)
    ids = torch.tensor(sample.ids)[:, None]
    assert (torch.tensor(sample.full_logprobs) - full.gather(1, ids)[:, 0]).abs().max() < 1e-5
    p, order = full.exp().sort(descending=True)
    outside = (p.cumsum(-1) - p >= top_p).gather(1, order.argsort())  # (T, V), by token
    cut = full.masked_fill(outside, -torch.inf).log_softmax(-1)
    assert (torch.tensor(sample.logprobs) - cut.gather(1, ids)[:, 0]).abs().max() < 1e-5


MODES = [{"share_prompts": False}, {"share_prompts": True}, {"steps": 4, "share_prompts": False}, {"steps": 3}]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
def test_greedy_tokens_equal_transformers(models, family, mode):
    """Guards: positions that don't start at 0, a mask that is off by one, query heads folded in the wrong order."""
    ours, theirs = models[family]
    prompts = make_prompts(6)
    samples = Sampler(ours, slots=4, **mode).sample(
        prompts, keys=list("abcdef"), temperature=0.0, max_new_tokens=24, stop_ids=[]
    )
    distinct = set()
    for prompt, (sample,) in zip(prompts, samples, strict=True):
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
        assert sample.ids == expected
        check_logprobs(theirs, prompt, sample)
        distinct |= set(expected)
    assert len(distinct) > 20  # a model that repeats one token would pass with any cache


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_logprobs_equal_a_teacher_forced_forward(models, monkeypatch, top_p, mode):
    """Guards: rows that read a neighbour's keys, or another prompt's, after a refill or a move, samples filed under
    another prompt, a shared prompt whose place is given away too early, a merge of two softmaxes that loses mass, and
    log-probabilities of the wrong temperature or of the distribution before truncation."""
    ours, theirs = models["Qwen3"]
    happened = Counter()

    def spy(name, original):
        monkeypatch.setattr(SlotCache, name, lambda *args: happened.update([name]) or original(*args))

    spy("add", SlotCache.add)
    spy("first_logits", SlotCache.first_logits)
    spy("move", SlotCache.move)
    prompts = make_prompts(11)
    limits = [1, 30, 3, 17, 1, 60, 2, 8, 25, 1, 12]
    samples = Sampler(ours, slots=7, **mode).sample(
        prompts,
        keys=[str(i) for i in range(11)],
        num_samples=4,
        temperature=0.7,
        top_p=top_p,
        max_new_tokens=limits,
        stop_ids=[],
    )
    assert happened["add"] + happened["first_logits"] > 5 and happened["move"] > 5
    for prompt, limit, group in zip(prompts, limits, samples, strict=True):
        assert [len(sample.ids) for sample in group] == [limit] * 4
        for sample in group:
            check_logprobs(theirs, prompt, sample, 0.7, top_p)
            assert (sample.logprobs == sample.full_logprobs) == (top_p == 1.0)


def test_sample_is_a_function_of_seed_key_and_index(models):
    """Guards: random numbers that depend on the slot, the batch, the order, the group's size, on how many steps are
    made between two looks or where the prompt's keys are, or are shared."""
    model, prompts = models["Qwen2"][0], make_prompts(7)
    keys = [f"problem {i}" for i in range(7)]
    settings = {"temperature": 1.0, "max_new_tokens": 12, "stop_ids": [3, 5, 8]}

    def draw(prompts, keys, slots, num_samples=3, seed=1, **mode):
        groups = Sampler(model, slots, **mode).sample(
            prompts, keys=keys, num_samples=num_samples, seed=seed, **settings
        )
        return {key: [sample.ids for sample in group] for key, group in zip(keys, groups, strict=True)}

    expected = draw(prompts, keys, slots=64)
    for slots in (1, 5):
        assert draw(prompts, keys, slots) == expected
    for mode in MODES:
        assert draw(prompts, keys, 5, **mode) == expected
    assert draw(prompts[::-1], keys[::-1], slots=4) == expected
    assert {key: group[:3] for key, group in draw(prompts, keys, 4, num_samples=5).items()} == expected
    rest = Sampler(model, 4).sample(  # single samples, each of another number
        prompts[1:], keys=keys[1:], num_samples=1, first_samples=[2, 1, 0, 2, 1, 0], seed=1, **settings
    )
    assert [group[0].ids for group in rest] == [expected[k][n] for k, n in zip(keys[1:], [2, 1, 0] * 2, strict=True)]
    assert draw(prompts, keys, 64, seed=2) != expected
    texts = {tuple(ids) for group in expected.values() for ids in group if len(ids) > 5}
    assert len(texts) == sum(len(ids) > 5 for group in expected.values() for ids in group) > 10  # no two alike
    same_text = draw([prompts[4]] * 3, ["one", "two", "problem 4"], slots=2)
    assert same_text["one"] != same_text["two"] and same_text["problem 4"] == expected["problem 4"]


@pytest.mark.parametrize("share_prompts", [False, True])
def test_further_samples_join_a_running_call(models, monkeypatch, share_prompts):
    """Guards: samples asked for while others run that are lost, drawn twice, of another number, or kept beyond the need;
    a prompt that is run again for them, or whose place is given away before they come; a cache of shorter slots that is
    made while longer prompts may still need samples."""
    prompts = [*make_prompts(9), [7] * 60, [9] * 50]
    keys = [f"problem {i}" for i in range(11)]
    settings = {"keys": keys, "temperature": 1.0, "max_new_tokens": 12, "stop_ids": [3, 5, 8], "seed": 4}
    settings["first_samples"] = [i % 3 for i in range(11)]
    model = models["Qwen2"][0]

    def lacking(samples):
        """Until three have an even sum, or there are seven."""
        even = sum(sum(sample.ids) % 2 == 0 for sample in samples)
        return min(max(0, 3 - even), 7 - len(samples))

    # Of one call with everything in it, the samples up to the first at which none is lacking.
    expected = []
    for group in Sampler(model, 16).sample(prompts, num_samples=7, **settings):
        count = next(n for n in range(8) if lacking(group[:n]) == 0)
        expected.append([sample.ids for sample in group[:count]])
    assert len({len(group) for group in expected}) >= 4

    def draw(slots, at_first, steps=1):
        ended = defaultdict(list)

        def further(prompt, number, sample):
            ended[prompt].append(sample)
            return lacking(ended[prompt])

        engine = Sampler(model, slots, steps, share_prompts)
        groups = engine.sample(prompts, num_samples=at_first, further=further, **settings)
        assert [len(ended[i]) for i in range(11)] == [len(group) for group in groups]
        return [[sample.ids for sample in group] for group in groups]

    runs, original = [], decode.prefill
    monkeypatch.setattr(
        "kernels.sampler.prefill",
        lambda model, prompts, *args: runs.extend(prompts) or original(model, prompts, *args),
    )
    for slots, at_first, steps in [(1, 3, 1), (4, 2, 3), (7, [3, 1, 2] * 3 + [2, 3], 1), (64, 3, 1)]:
        runs.clear()
        assert draw(slots, at_first, steps) == expected, slots
        assert sorted(runs) == sorted(map(tuple, prompts))

    monkeypatch.setattr(sampler, "free_memory", lambda device: 0)
    monkeypatch.setattr(sampler, "slots_that_fit", lambda *_: 5)
    made, init = [], SlotCache.__init__
    monkeypatch.setattr(SlotCache, "__init__", lambda self, *args, **flags: made.append(1) or init(self, *args, **flags))
    assert draw(None, 3) == expected
    assert 2 <= len(made) <= 5


def test_each_distinct_prompt_is_run_once(models, monkeypatch):
    """Guards: a prefill per sample, or again for a prompt whose text is there under another key; a prompt that waits
    and keeps everything that was run with it in memory."""
    runs, original = [], decode.prefill
    monkeypatch.setattr(
        "kernels.sampler.prefill",
        lambda model, prompts, *args: runs.extend(prompts) or original(model, prompts, *args),
    )
    held, start = [], Sampler._start

    def spy(self, call, new):
        start(self, call, new)
        held.extend(call.held.values())

    monkeypatch.setattr(Sampler, "_start", spy)
    prompts = make_prompts(5)
    settings = {"keys": list("abcdefg"), "num_samples": 6, "max_new_tokens": 4, "stop_ids": [], "seed": 3}
    queue = [*prompts, prompts[1], prompts[0]]
    together = Sampler(models["Qwen2"][0], slots=4).sample(queue, **settings)
    assert sorted(runs) == sorted(map(tuple, prompts))
    assert held and all(x.untyped_storage().nbytes() == x.nbytes for kv in held for x in kv)
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", 8)
    piecewise = Sampler(models["Qwen2"][0], slots=42).sample(queue, **settings)
    assert [[s.ids for s in group] for group in piecewise] == [[s.ids for s in group] for group in together]


@pytest.mark.parametrize("steps", [1, 5])
def test_stop_ids_and_finish_reasons(models, steps):
    """Guards: a stop id that is only looked for alone, a dropped stop token, tokens after it, a wrong finish reason."""
    stops, limit = [11, 40, 77], 60
    sampler = Sampler(models["Llama"][0], slots=8, steps=steps)
    samples = sampler.sample(
        make_prompts(8), keys=list("abcdefgh"), num_samples=5, temperature=2.0, max_new_tokens=limit, stop_ids=stops
    )
    assert [len(group) for group in samples] == [5] * 8  # 40 samples: no multiple of 8 slots ends in step
    flat = [sample for group in samples for sample in group]
    for sample in flat:
        assert not set(sample.ids[:-1]) & set(stops)
        assert sample.finish == ("stop" if sample.ids[-1] in stops else "length")
        assert sample.finish == "stop" or len(sample.ids) == limit
    assert {sample.ids[-1] for sample in flat if sample.finish == "stop"} == set(stops)
    assert sampler.tokens == sum(len(sample.ids) for sample in flat)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_one_long_row_among_short_ones(models, mode):
    """Guards: a long row cut or stalled by refills around it, answers of one token, and an endless loop at the end."""
    ours, theirs = models["Qwen2"]
    prompts, limits = make_prompts(40), [1] * 40
    limits[7] = 90
    samples = Sampler(ours, slots=3, **mode).sample(
        prompts, keys=[str(i) for i in range(40)], max_new_tokens=limits, stop_ids=[]
    )
    assert [len(group[0].ids) for group in samples] == limits
    check_logprobs(theirs, prompts[7], samples[7][0])
    check_logprobs(theirs, prompts[39], samples[39][0])
    assert Sampler(ours).sample([], keys=[], stop_ids=[]) == []


def test_padded_vocabulary(models):
    """Guards: ids that the tokenizer doesn't have, drawn from the rows that pad an embedding, which vanish in the text;
    a sampler and a trainer that don't leave out the same ones."""
    model = copy.copy(models["Qwen2"][0])
    model.vocabulary = 40
    prompts = make_prompts(6)
    groups = Sampler(model).sample(prompts, keys=list("abcdef"), num_samples=5, max_new_tokens=30, stop_ids=[])
    assert max(max(sample.ids) for group in groups for sample in group) == 39
    sample = groups[3][0]
    ids, lengths = torch.tensor(prompts[3] + sample.ids), torch.tensor([len(prompts[3]) + 30])
    targets = torch.cat([torch.full((len(prompts[3]) - 1,), -1), torch.tensor([*sample.ids, -1])])
    logprobs, _ = model.packed(ids, lengths, targets)
    torch.testing.assert_close(logprobs[targets >= 0], torch.tensor(sample.logprobs), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(logprobs.sum(), [model.model["embed_tokens"].weight if model.lm_head is None
                                                       else model.lm_head.weight])  # fmt: skip
    assert gradient.shape[0] == 97 and gradient[:40].any()
    assert model.lm_head is None or not gradient[40:].any()


@pytest.mark.parametrize("share_prompts", [False, True])
def test_slots_from_memory(models, monkeypatch, share_prompts):
    """Guards: slots that are all as long as the longest prompt of a run; a new cache while rows are running, or beside
    the old one; samples that depend on any of this."""
    ours = models["Qwen2"][0]
    prompts = [[2 + i] * length for i, length in enumerate([9, 60, 5, 58, 7, 12, 61, 6])]
    settings = {"keys": list("abcdefgh"), "num_samples": 3, "max_new_tokens": 10, "stop_ids": [5]}

    def draw(slots):
        groups = Sampler(ours, slots, share_prompts=share_prompts).sample(prompts, **settings)
        return [[sample.ids for sample in group] for group in groups]

    expected = draw(4)
    made, alive, original = [], weakref.WeakSet(), SlotCache.__init__

    def spy(cache, model, slots, length, *args, **flags):
        assert not alive
        alive.add(cache)
        made.append((slots, length, flags.get("prompt_length")))
        original(cache, model, slots, length, *args, **flags)

    monkeypatch.setattr(SlotCache, "__init__", spy)
    monkeypatch.setattr(sampler, "free_memory", lambda device: 0)
    monkeypatch.setattr(sampler, "slots_that_fit", lambda free, weights, config, lengths, limits, size: 330 // max(
        a + b for a, b in zip(lengths, limits, strict=True)))  # fmt: skip
    assert draw(None) == expected
    if share_prompts:  # prompts take 4/3 of their length from each slot
        assert made == [(3, 10, 61), (12, 10, 12)]
    else:
        assert made == [(4, 71, None), (15, 22, None)]


# README of kernels: rows by card, model and command; the longest prompt, new tokens -> slots of an H100 and of an H200
@pytest.mark.parametrize(
    "shape, billions, new_tokens, rows",
    [
        ((5120, 13824, 48, 40, 8), 14.77, 8192, {512: (26, 64), 1000: (25, 61), 2000: (22, 55)}),
        ((5120, 25600, 64, 64, 8), 32.76, 8192, {2000: (2, 26), 3000: (2, 24), 5000: (1, 20), 9000: (1, 15)}),
        ((5120, 13824, 48, 40, 8), 14.77, 4096, {2000: (37, 92), 4000: (28, 69)}),
        ((3584, 18944, 28, 28, 4), 7.616, 3072, {1000: (273, 552)}),
    ],
)  # fmt: skip
def test_slots_that_fit(shape, billions, new_tokens, rows):
    """Guards: a cache that doesn't fit beside the weights, or leaves half of the card free. The table was worked out by
    hand from the models' shapes."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    raw = dict(zip(names, shape, strict=True)) | {"vocab_size": 152064, "head_dim": 128}
    config = Config.from_dict(raw | {"architectures": ["Qwen3ForCausalLM"]})
    for longest, (h100, h200) in rows.items():
        for total, wanted in ((79.1, h100), (139.8, h200)):
            free, weights = int(total * 2**30), int(2e9 * billions)
            found = sampler.slots_that_fit(free, weights, config, [30, longest], [new_tokens] * 2)
            assert abs(found - wanted) <= 0.02 * wanted, (longest, total, found)
    assert sampler.slots_that_fit(0, 0, config, [10], [10]) == 1  # let the allocation itself say that it doesn't fit


def test_shared_prompts_are_chosen_by_length(models, monkeypatch):
    """Guards: prompts copied to each of sixteen samples that verify a long solution; a second call of attention for
    short ones; fewer places than prompts, so that a queue stalls."""
    made = []
    original = SlotCache.__init__
    monkeypatch.setattr(SlotCache, "__init__", lambda *args, **flags: made.append(flags) or original(*args, **flags))
    sampler = Sampler(models["Qwen2"][0], slots=8)
    settings = {"keys": list("abcdefghij"), "stop_ids": [], "max_new_tokens": 20}
    sampler.sample([[1] * 40] * 10, num_samples=8, **settings)
    assert made[-1]["prompts"] == 5 and made[-1]["group"] == 8
    sampler.sample([[1] * 40] * 10, **settings)
    sampler.sample([[1] * 2] * 10, num_samples=8, **settings)
    assert not any("prompts" in flags for flags in made[-2:])


@pytest.mark.parametrize("G, lengths", [(1, [5, 1, 9]), (4, [9, 2, 8])])
def test_ragged_attention(G, lengths):
    """Guards: keys beyond a row's end, a group's heads in another order, a log-sum-exp of scaled or rounded scores."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2 * G, 6), torch.randn(3, 2, 9, 6), torch.randn(3, 2, 9, 6)
    out, lse = ragged_attention(q, k, v, visible_keys(torch.tensor(lengths), k), merged=True)
    for b, n in enumerate(lengths):
        keys, values = (x[b, :, :n].double().repeat_interleave(G, 0) for x in (k, v))  # (H, n, E)
        scores = q[b].double().transpose(0, 1) @ keys.mT / 6**0.5  # (H, R, n)
        torch.testing.assert_close(out[b].double(), (scores.softmax(-1) @ values).transpose(0, 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[b].double(), scores.logsumexp(-1).T, rtol=1e-5, atol=1e-5)


def test_a_nucleus_beyond_the_likeliest_tokens(monkeypatch):
    """Guards: a nucleus that is larger than the tokens looked at, of which only some are kept, or whose probabilities
    don't add up to one; a small one that depends on how many are looked at."""
    flat, peaked = torch.zeros(400), torch.zeros(400).index_fill(0, torch.tensor([7]), 30.0)
    logits, uniform = torch.stack([flat, peaked]), torch.tensor([0.99, 0.9], dtype=torch.float64)
    whole = choose_tokens(logits, uniform, 1.0, 0.949, 0)
    monkeypatch.setattr(sampler, "NUCLEUS_TOKENS", 16)
    tokens, logprobs, full_logprobs = choose_tokens(logits, uniform, 1.0, 0.949, 0)
    assert whole[1].exp().tolist() == pytest.approx([1 / 380, 1.0])  # 0.95 of 400
    assert logprobs.exp().tolist() == pytest.approx([1 / 16, 1.0])
    assert full_logprobs.exp().tolist() == pytest.approx([1 / 400, 1.0]) and tokens[1] == whole[0][1] == 7


def test_a_step_never_looks_at_values(models, monkeypatch):
    """Guards: a step that reads a number from the device, for which a CUDA graph can't be captured and every token
    waits. Also the shapes and dtypes that PyTorch's flash attention is given, for both of its interfaces: no GPU is
    needed for that."""
    with torch.device("meta"):  # shapes and dtypes without numbers: what looks at a number raises
        model = Transformer(models["Qwen2"][0].config).to(torch.bfloat16)
    choose = partial(choose_tokens, temperature=0.7, top_p=0.9, top_k=0)
    newer = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 hasn't got that interface
    for version in ("2.11.0", "2.13.0") if newer else ("2.11.0",):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        for shared in ({}, {"prompts": 3, "prompt_length": 12, "group": 4}):
            cache = SlotCache(model, 8, 16, choose, steps=4, **shared)
            for _ in range(2):
                with torch.inference_mode():
                    cache.step(8, 16)
            assert [x.dtype for x in cache.drawn] == [torch.long, torch.float32, torch.float32]
            assert all(x.shape == (4, 8) for x in cache.drawn)


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_graphs_replay_a_step(models, monkeypatch, share_prompts, top_p):
    """Guards: what surrounds CUDA graphs, tried on the CPU with a graph that is its step made again: a trial step that
    spoils the tokens or lengths of rows, idle slots that write to running ones or go on reading all keys that they ever
    held, a graph for fewer rows than there are, a capture that fails and takes the run down, and one without memory
    after which later calls don't try again."""
    replayed, steps, original = Counter(), [], SlotCache.step

    class Graph:
        def replay(self):
            replayed[self.work[1]] += 1
            original(*self.work)

        def pool(self):
            return None

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        yield
        graph.work = steps[-1]

    for name, fake in (("CUDAGraph", Graph), ("graph", capture), ("stream", contextlib.nullcontext)):
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("Stream", "current_stream", "set_stream", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    decode.capture_stream.cache_clear()
    monkeypatch.setattr(SlotCache, "step", lambda *args: steps.append(args) or original(*args))
    loaded, load = [], SlotCache.load

    def spy(cache, tokens, *args):
        load(cache, tokens, *args)
        loaded.append((copy.copy(cache), len(tokens)))
        loaded[-1][0].ends = cache.ends.clone()

    monkeypatch.setattr(SlotCache, "load", spy)
    monkeypatch.setattr(decode, "GRAPH_ROWS", (3, 6))
    prompts, limits = make_prompts(9), [1, 30, 3, 17, 1, 60, 2, 8, 25]
    settings = {"keys": list("abcdefghi"), "num_samples": 3, "max_new_tokens": limits, "stop_ids": [5], "top_p": top_p}
    settings |= {"temperature": 1.5}

    engine = Sampler(models["Qwen2"][0], 7, steps=3, share_prompts=share_prompts)

    def draw():
        return [[sample.ids for sample in group] for group in engine.sample(prompts, **settings)]

    expected = draw()
    steps.clear()
    made = SlotCache.__init__

    def with_graphs(self, *args, **flags):
        made(self, *args, **flags)
        self.graphs = {} if flags["graphs"] else None

    monkeypatch.setattr(SlotCache, "__init__", with_graphs)
    assert draw() == expected
    assert set(replayed) == {3, 6, 7}
    idle = [cache.ends[n:].max() for cache, n in loaded if n < 7]
    assert len(idle) > 5 and not any(idle)
    with monkeypatch.context() as context:
        context.setattr(torch.cuda, "CUDAGraph", MagicMock(side_effect=torch.OutOfMemoryError("full")))
        with pytest.warns(UserWarning, match="no memory for a CUDA graph.*full"):
            assert draw() == expected
    assert torch.cuda.empty_cache.call_count == 1
    replayed.clear()
    assert draw() == expected and set(replayed) == {3, 6, 7}
    monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock(side_effect=RuntimeError("not permitted")))
    with pytest.warns(UserWarning, match="no CUDA graphs.*not permitted"):
        assert draw() == expected
    assert not engine.graphs


def take_turns(rank: int, pause: float, path: str, results) -> None:
    """One of two ranks, for which each number is so much work."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mine = []
    for few in distributed.work_queue(60, "numbers"):
        time.sleep(pause * len(few))
        mine += few
    results.put((rank, mine))
    dist.barrier()
    dist.destroy_process_group()


def test_a_rank_that_is_done_early_takes_more(tmp_path):
    """Guards: a rank that waits while another has most of the queue; a number dealt twice, or to nobody."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = [(rank, pause, str(tmp_path / "store"), results) for rank, pause in ((0, 0.001), (1, 0.2))]
    ranks = [context.Process(target=take_turns, args=x) for x in arguments]
    for process in ranks:
        process.start()
    taken = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    assert sorted(taken[0] + taken[1]) == list(range(60))
    assert len(taken[0]) > len(taken[1]) > 0
    assert [list(few) for few in distributed.work_queue(3, "alone")] == [[0, 1, 2]]


def test_work_queue_example(monkeypatch):
    """Guards: the example in the docstring; an index beyond the last one; an empty batch, which would end a rank's
    work."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    ranks = [distributed.work_queue(10, "example") for _ in range(2)]
    batches = [next(ranks[i % 2]) for i in range(8)]
    assert batches == [[0, 1], [2, 3], [4], [5], [6], [7], [8], [9]]
    assert [list(rank) for rank in ranks] == [[], []]


cuda_only = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda_only)])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_logprobs_in_bf16(models, mode, device):
    """Guards: logits or scores rounded to bf16 on the way: the recorded log-probs may be off from a teacher-forced
    forward by 0.02 on average. On a GPU also graphs of one number of rows replayed for another, stale addresses, idle
    slots that write to running ones."""
    theirs = copy.deepcopy(models["Qwen2"][1]).to(device, torch.bfloat16)
    ours = copy.deepcopy(models["Qwen2"][0]).to(device, torch.bfloat16)
    prompts, limits = make_prompts(20), [1 + 7 * i % 50 for i in range(20)]
    settings = {"keys": [str(i) for i in range(20)], "num_samples": 4, "max_new_tokens": limits, "stop_ids": []}
    samples = Sampler(ours, slots=24, **mode).sample(prompts, top_p=0.9, **settings)
    gaps = []
    for prompt, limit, group in zip(prompts, limits, samples, strict=True):
        assert [len(sample.ids) for sample in group] == [limit] * 4
        for sample in group:
            with torch.no_grad():
                hidden = theirs.model(torch.tensor([prompt + sample.ids], device=device)).last_hidden_state
            logits = hidden[0, len(prompt) - 1 : -1].float() @ theirs.lm_head.weight.float().T
            ids = torch.tensor(sample.ids, device=device)[:, None]
            full = logits.log_softmax(-1).gather(1, ids)[:, 0].cpu()
            gaps += (torch.tensor(sample.full_logprobs) - full).abs().tolist()
    assert sum(gaps) / len(gaps) < 0.02


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_new_tokens": 99}, "b: a prompt of 30 tokens and --max_new_tokens 99 don't fit .* of 128"),
        ({"prompts": [[1], []]}, "b: a prompt of 0 tokens"),
        ({"keys": ["a"]}, "2 prompts, but 1 keys"),
        ({"max_new_tokens": [5]}, "1 limits"),
        ({"max_new_tokens": [5, 0]}, "max_new_tokens=.5, 0."),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_settings_out_of_range(models, change, message):
    """Guards: a prompt silently cut to the context, a nucleus of nothing, and hangs."""
    good = {"prompts": make_prompts(2), "keys": ["a", "b"], "max_new_tokens": 98, "stop_ids": list(range(97))}
    sampler = Sampler(models["Qwen2"][0])
    assert len(sampler.sample(**good)) == 2  # 30 + 98 fits exactly
    with pytest.raises(ValueError, match=message):
        sampler.sample(**{**good, **change})


@pytest.mark.parametrize(
    "vocabulary, scale, temperature, top_p, top_k",
    [
        (12, 1.5, 1.0, 1.0, 0),
        (12, 1.5, 0.7, 1.0, 0),
        (12, 1.5, 1.3, 0.8, 0),
        (12, 1.5, 1.0, 1.0, 4),
        (12, 1.5, 0.9, 0.7, 6),
        (400, 0.3, 1.0, 0.9, 0),  # a nucleus larger than the first windows
        (12, 1.5, 1.0, 1e-9, 0),  # the nucleus is never empty
    ],
)
def test_sampled_frequencies_are_exact(vocabulary, scale, temperature, top_p, top_k):
    """Guards: a nucleus one token too small or too large, top_p before top_k, the temperature applied twice."""
    N = 20_000
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(vocabulary, generator=generator) * scale
    peaked = torch.full((1, vocabulary), -50.0).index_fill(1, torch.tensor([3]), 50.0)  # a row that needs no window
    rows = torch.cat([peaked, logits.expand(N, vocabulary)])
    uniform = torch.rand(N + 1, generator=generator)
    uniform[0] = 0.99999
    tokens, logprobs, full = choose_tokens(rows, uniform, temperature, top_p, top_k)
    assert tokens[0] == 3
    # The definition, in fp64: top_k first, then the smallest set of most likely tokens with mass >= top_p of the rest.
    p = (logits.double() / temperature).softmax(-1)
    exact, order = p.clone(), p.argsort(descending=True)
    if top_k:
        exact[order[top_k:]] = 0
    target, mass = top_p * exact.sum(), 0.0
    for token in order:
        if mass >= target:
            exact[token] = 0
        mass += exact[token]
    exact /= exact.sum()
    counts = torch.bincount(tokens[1:], minlength=vocabulary).double()
    assert counts[exact == 0].sum() == 0
    likely = exact > 0
    chi2 = ((counts - N * exact)[likely] ** 2 / (N * exact[likely])).sum()
    freedom = int(likely.sum()) - 1
    assert abs(chi2 - freedom) <= 5 * math.sqrt(2 * max(freedom, 1)) * (freedom > 0)
    assert (logprobs[1:].double() - exact[tokens[1:]].log()).abs().max() < 1e-5
    assert (full[1:].double() - p[tokens[1:]].log()).abs().max() < 1e-5


# --------------------------------------------------------------------------- solutions as text

SPLIT = [
    ("<think><step>a</step> <step>b\n\nb</step></think><answer>\\boxed{3}</answer>", ["a", "b\n\nb"]),
    ("<think><step>a</step><step>cut off", ["a"]),
    ("<step>lost<step>b</step></step>", ["b"]),
    ("<step> </step><step>b</step>", ["b"]),
    ("Step 1: a\nStep 2: b\nAnswer: 4", ["a", "b"]),
    ("First this.\nStep 1: a\nmore\n\nStep 2: b", ["First this.\na\nmore", "b"]),
    ("**Step 1:** a\n**Step 2:** b\n**Answer:** 4", ["a", "b"]),
    ("**Step 1**: a\nstep 2) b\n**Final answer: 4**", ["a", "b"]),
    ("### Step 1. a\n\n### Step 2. b at Step 1: c\n\nFinal Answer: \\boxed{4}", ["a", "b at Step 1: c"]),
    ("One.\n \t\nTwo,\nstill two.\n\n\n\nAnswer: 7\nignored", ["One.", "Two,\nstill two."]),
    ("<think>One.\n\nTwo.</think><answer>5</answer>", ["One.", "Two."]),
    ("One.\n\n<answer>cut", ["One."]),
    ("One.\r\n\r\nTwo.\r\n\r\nAnswer: 42\r\n", ["One.", "Two."]),
    ("One.\n\nTwo.\n\nStep 3: c\nStep 4: d", ["One.", "Two.", "c", "d"]),
    ("one line", ["one line"]),
    # Sub-steps and numbers: no text is lost.
    ("Step 1: a\nStep 1.1: let x = 2.\nStep 1.2: let y = 3.", ["a\nStep 1.1: let x = 2.\nStep 1.2: let y = 3."]),
    ("Step 1.1: let x = 2.\n\nStep 1.2: let y = 3.", ["Step 1.1: let x = 2.", "Step 1.2: let y = 3."]),
    ("Step 1: he makes a\nstep 2.5 m long\nStep 2: b", ["he makes a\nstep 2.5 m long", "b"]),
    # What follows an answer
    ("Step 1: a\nAnswer: 3\nStep 2: b", ["a", "b"]),
    ("Answer: 7\n\nBecause of a.\n\nAnd of b.", ["Because of a.", "And of b."]),
    ("## Answer\n\nOf a.\n\nAnd of b.", ["## Answer", "Of a.", "And of b."]),
    ("One.\n\nTwo.\n\n### Final Answer\n\nSo it is\n\n\\boxed{5}", ["One.", "Two."]),
    ("One.\n\nTwo.\n\n**Final Answer:**\n\n5", ["One.", "Two."]),
    # Thoughts: closed, opened by the template, several, cut off
    ("<think>Try 7.\n\nNo.</think>\n\nStep 1: a\nStep 2: b", ["a", "b"]),
    ("Try 7.\n\nNo.\n</think>\n\nOne.\n\nTwo.\n\nAnswer: 5", ["One.", "Two."]),
    ("<think>a</think>One.\n\n<think>b</think>Two.", ["One.", "Two."]),
    ("<think>Try 7.\n\nWait,", []),
    ("One.\n\n<think>Is it", ["One."]),
    # Headings of real models
    ("Step 1：a\nStep 2：b\nAnswer：10", ["a", "b"]),
    ("### Step 1\na\n### Step 2\nb", ["a", "b"]),
    ("**Step 1**\r\na\r\n__Step 2__\r\nb", ["a", "b"]),
    ("Step 1 (add): a\nStep 2 (halve it): b", ["(add): a", "(halve it): b"]),
    ("> Step 1: a\n> Step 2: b", ["a", "b"]),
    ("- Step #1: a\n- Step #2: b", ["a", "b"]),
    ("Step 1 of 2: a\nStep 2 of 2: b", ["a", "b"]),
    ("Step 1 - a\nStep 2 – b", ["a", "b"]),
    ("Step 1)a\nStep 2. b", ["a", "b"]),
    # Horizontal rules, but no long addition
    ("One.\n\n---\n\nTwo.", ["One.", "Two."]),
    ("***\n\nOne.\n\n* * *\n\nTwo.", ["One.", "Two."]),
    ("Step 1: a\n\n___\n\nStep 2: b", ["a", "b"]),
    ("  12\n+ 34\n----\n  46\n\nTwo.", ["12\n+ 34\n----\n  46", "Two."]),
    # Tags that are mentioned, have an attribute, or don't close; blank lines of other spaces; a formula that is cut
    ("I write <step>...</step>.\n\nStep 1: a\nStep 2: b", ["I write .\n\na", "b"]),
    ('<think><step id="1">a</step><step >b</step></think>', ["a", "b"]),
    ("<step>a\n<step>b", ["a", "b"]),
    ("One.\n\u3000\nTwo.\r\rThree.", ["One.", "Two.", "Three."]),
    ("\\begin{align*}a\n\nb\\end{align*}", ["\\begin{align*}a", "b\\end{align*}"]),
    ("🔹 **Step 1:** a\n🔹 **Step 2:** b", ["a", "b"]),
    ("[Step 1]: a\n[Step 2]: b", ["a", "b"]),
    ("1. Step 1: a\n2. Step 2: b", ["a", "b"]),
    ("\\textbf{Step 1:} a\n<b>Step 2</b>: b", ["a", "b"]),
    ("Step\xa01: a\nStep No. 2: b", ["a", "b"]),
    ("Step 1: a\nStep 2 - 1 = 1\nStep 2: c", ["a\nStep 2 - 1 = 1", "c"]),
    ("One.\n\n———\n\nTwo.\n\n===\n\nThree.\n\n\\hrule\n\nFour.", ["One.", "Two.", "Three.", "Four."]),
    ("<thinking>a\n\nb</thinking>One.\n\nTwo.", ["One.", "Two."]),
    ("<REASONING>a</REASONING>Step 1: b", ["b"]),
    ("", []),
    (" \n\n ", []),
]
ANSWERS = [
    ("\\boxed{1} and \\boxed{2}", "2"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{\\left\\{ x }", "\\left\\{ x"),
    ("\\boxed {3}", "3"),
    ("{ open \\boxed{4}", "4"),
    ("\\boxed{5} \\boxed{6", "5"),
    ("\\boxed{a{b}", None),
    ("}} \\boxed{7}", "7"),
    ("\\boxed{8 \\boxed{9}}", "9"),
    ("\\boxed{cut\nAnswer: 10", "10"),
    ("Answer: 1\nAnswer: 11", "11"),
    ("**Answer: 12**", "12"),
    ("**Answer: 12**\r\nso", "12"),
    ("\\boxed{5} \\boxed{ }", None),
    ("**Final Answer:** $13$", "$13$"),
    ("the answer: 14", None),
    ("Answer: **5**.", "5."),
    ("Answer: *5*.", "5."),
    ("Answer: __5__", "5"),
    ("Answer: ***5***", "5"),
    ("Answer: **5** apples", "5 apples"),
    ("Answer: (a)**2", "(a)**2"),
    ("Answer: $x_{1}$", "$x_{1}$"),
    ("Answer：15", "15"),
    ("- Answer: 16", "16"),
    ("Answer:\n\n17", "17"),
    ("So.\n\n### Answer\n18\nNice.", "18"),
    ("So.\nAnswer:\nStep 1: no", None),
    ("## Answer\n\nOf a.\n\nAnd of b.", None),
    ("<answer>73</answer>", "73"),
    ("<answer>\\boxed{7</answer>", None),
    ("<think>\\boxed{7}?</think>\n\nAnswer: 8", "8"),
    ("\\boxed{7}?\n</think>\n\nAnswer: 8", "8"),
    ("<think>Say \\boxed{7}, but", None),
    ("<think><step>\\boxed{7}</step>", "7"),
    ("\\boxed{5}. I put it into \\boxed{} as asked.", None),
    ("\\boxed 73", None),
    ("\\\\boxed{73}", None),
    ("#### 73", None),
    ("Answer:\n$$\n5\n$$", "5"),
    ("Answer: \\[\n5\n\\]", "5"),
    ("✅ **Final Answer:** 5", "5"),
    ("1. Answer: 5", "5"),
    ("The answer: 5", "5"),
    ("(Answer: 5)", "5"),
    ("Answer: [0,1)", "[0,1)"),
    ("\\textbf{Answer:} 5", "5"),
    ("<b>Answer:</b> 5", "5"),
    ("Answer: **5**%", "5%"),
    ("Answer:", None),
    ("", None),
]


@pytest.mark.parametrize("text, steps", SPLIT)
def test_split_steps(text, steps):
    """Guards: layouts of other models read as one step, answers and thoughts read as steps, and words lost between
    steps, behind an answer or beside a number."""
    assert split_steps(text) == steps


@pytest.mark.parametrize("text, answer", ANSWERS)
def test_extract_answer(text, answer):
    """Guards: a box cut at its first brace, an unclosed box taken for an answer, the first box instead of the last, an
    answer in a thought, Markdown that makes an answer wrong."""
    assert extract_answer(text) == answer


def test_find_boxes():
    """Guards: unclosed boxes that count (a format constraint asks for exactly one closed box)."""
    text = "a \\boxed{1} \\boxed{2{3}} \\boxed{4"
    assert [text[slice(*box)] for box in find_boxes(text)] == ["1", "2{3}"]


def test_unwrap_boxes():
    """Guards: nested boxes of which one stays, an unclosed box that is opened, braces and text around boxes that
    change."""
    text = r"a \boxed{1 \boxed {b\}}} {c} \boxed{} \boxed{d"
    assert unwrap_boxes(text) == r"a 1 b\} {c}  \boxed{d"


STEP_TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1).map(str.strip).filter(bool)


@given(st.lists(STEP_TEXTS, min_size=1, max_size=4), st.from_regex(r"[^{}\\\s]{1,5}", fullmatch=True))
@example(["Step 2: a", "b\n\nc"], "Answer: 4")
@settings(deadline=None, max_examples=50, database=None)
def test_response_round_trip(steps, answer):
    """Guards: a response in the policy's format whose steps or answer come back otherwise than they went in."""
    text = render_response(steps, answer)
    assert split_steps(text) == steps and extract_answer(text) == answer


RESPONSE = "<think><step>1+1=2</step> <step>2+2=4</step></think><answer>\\boxed{4}</answer>"
EMPTY = ["", " ", "\\text{}", "\u200b", "~", "\\,\\quad", "{{}}", "$ $", "\\mathrm{\u2060}", "\\textbf{ \\hbox{}}"]
EMPTY += ["\\phantom{5}", "\\textcolor{white}{}", "\\hspace{1cm}", "\\displaystyle", "\\emph{}", "\\underline{ }"]
EMPTY += ["\\left.\\right.", "\\thinspace", "\u2800", "\u3164", "\u115f", "\ufe0f", "\u034f"]
FULL = ["0", "\\emptyset", "\\infty", "\\text{no}", "-", "\\frac{1}{2}", "?", "\\{\\}"]


@pytest.mark.parametrize("contents, empty", [(c, True) for c in EMPTY] + [(c, False) for c in FULL])
def test_empty_boxes(contents, empty):
    """Guards: an answer of nothing that keeps the format, and one that isn't counted."""
    response = RESPONSE.replace("{4}", "{" + contents + "}")
    assert count_empty_boxes(response) == empty
    assert generate.format_valid(response, "paper")
    assert generate.format_valid(response, "strict") is not empty
    assert count_empty_boxes("\\boxed{\\boxed{ }} \\boxed{1}") == 2


@pytest.mark.parametrize(
    "step, forged",
    [
        ("Step 3: 1+1=2", True),
        ("so\nStep 3: 1+1=2", True),
        ("so\n **step 3 (add):** 1", True),
        ("so\n## Step 3", True),
        ("so\rAnswer: 5", True),
        ("so\u2028Final answer： 5", True),
        ("so\n\u200bStep 3. 1", True),
        ("so\n✅ Answer: 5", True),
        ("Step\xa02: x", True),
        ("Step No. 2: x", True),
        ("1. Step 2: x", True),
        ("1. Answer: 5", True),
        ("Answer\xa0: 5", True),
        ("Ｓtep 2: x", True),
        ("Verification: Is the answer correct (Yes/No)? Yes", True),
        ("Student Solution: x", True),
        ("Verification: 2 + 3 is 5", False),
        ("by Step 3: it is 1", False),
        ("so\nStep 2.5 m", False),
        ("so\nthe steps 3: 4", False),
    ],
)
def test_a_step_cannot_write_the_judges_layout(step, forged):
    """Guards: a step that holds "Step 3: ..." or an answer on a line of its own, which the judge takes for one."""
    assert has_layout_line(step) is forged
    assert generate.format_valid(RESPONSE.replace("1+1=2", step), "paper")
    assert generate.format_valid(RESPONSE.replace("1+1=2", step), "strict") is not forged


@pytest.mark.parametrize(
    "response, hidden",
    [
        (RESPONSE, ""),
        ("Well. " + RESPONSE, "Well."),
        (RESPONSE.replace("</step> ", "</step> so "), "so"),
        (RESPONSE + "more", "more"),
        (RESPONSE.replace("1+1", "<step>1+1"), ""),
        (RESPONSE.replace("1+1=2", "a<step>1+1=2</step>b"), "ab"),
        ("<think>a</think>Step 1: b\n<answer>\\boxed{4}</answer>", "a"),
        ("Step 1: b\nAnswer: 4", ""),
    ],
)
def test_hidden_text(response, hidden):
    """Guards: text that a judge isn't shown and nobody counts."""
    assert hidden_text(response) == hidden


def test_render_steps():
    """Guards: another layout in one of the prompts that all go through here; and that it can be read back."""
    assert render_steps(["a", "b"], "3") == "Step 1: a\nStep 2: b\nAnswer: 3"
    assert render_steps(["a"]) == "Step 1: a"
    assert split_steps(render_steps(["a", "b\nc"], "3")) == ["a", "b\nc"]


def cpu_milliseconds(function, text: str) -> float:
    """The least of three, in CPU time: a busy machine makes no difference."""
    taken = []
    for _ in range(3):
        started = time.process_time()
        function(text)
        taken.append(1000 * (time.process_time() - started))
    return min(taken)


UNITS = [
    " ",
    "\t",
    "\n",
    " \n",
    "a\n",
    "#",
    "# ",
    "*",
    "é",
    "{",
    "}",
    "\\",
    "\\boxed",
    "\\boxed{",
    "\\boxed{}",
    "<step>",
    "</step>",
]
UNITS += [
    "<answer>",
    "<think>",
    "Step 1",
    "Step 1: ",
    "**Step 1:**\n",
    "answer",
    "answer: ",
    "Answer:\n",
    "final answer ",
]
UNITS += [
    "</think>",
    "<step ",
    "Step #",
    "Step 1 (",
    "Step 1 of ",
    "- - ",
    "---\n\n",
    "**a ",
    "__",
    "Answer: 5\n\n",
    "\r",
]


@pytest.mark.parametrize("function", [split_steps, extract_answer, unwrap_boxes, hidden_text, has_layout_line, count_empty_boxes])
def test_garbage_takes_linear_time(function):
    """Guards: patterns whose parts overlap: 100 kB of blanks took the first version minutes."""
    texts = [(unit * (100_000 // len(unit))) for unit in UNITS] + ["\\boxed{" * 12_000 + "}" * 12_000]
    texts.append("\\boxed{x}" * 12_000)
    slow = {text[:10]: ms for text in texts if (ms := cpu_milliseconds(function, text)) >= 500}  # quadratic: minutes
    assert not slow


# --------------------------------------------------------------------------- models from outside

TEMPLATE = json.loads((ROOT / "data/tiny/tokenizer_config.json").read_text())["chat_template"]


def copy_tokenizer(path: Path, **files) -> Path:
    """A directory with the tiny world's tokenizer. files: other contents for a file named without .json, as a value to
    write, or a dict to merge into what it has; None removes it."""
    path.mkdir()
    contents = {name: (ROOT / f"data/tiny/{name}.json").read_text() for name in ("tokenizer", "tokenizer_config")}
    contents["config"] = (ROOT / "data/tiny/policy/config.json").read_text()
    for name, value in files.items():
        if isinstance(value, dict):
            value = json.dumps(json.loads(contents.get(name, "{}")) | value)
        contents[name] = value
    for name, text in contents.items():
        if text is not None:
            (path / f"{name}.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "files, stops",
    [
        ({}, [476]),
        ({"config": {"eos_token_id": 474}}, [474, 476]),
        ({"config": {"eos_token_id": [474, 475]}}, [474, 475, 476]),
        ({"generation_config": {"eos_token_id": 475}}, [475, 476]),
        ({"generation_config": {"eos_token_id": None}}, [476]),
        ({"tokenizer_config": {"eos_token": "<|endoftext|>"}}, [474, 476]),  # a base model: its template ends turns
        ({"tokenizer_config": {"eos_token": None}}, [476]),
        ({"tokenizer_config": {"bos_token": "", "pad_token": ""}}, [476]),
        ({"tokenizer_config": {"chat_template": [{"name": "default", "template": TEMPLATE}]}}, [476]),
    ],
    ids=str,
)
def test_where_samples_end(tmp_path, files, stops):
    """Guards: end tokens of config.json that are ignored, and the end of a turn where it isn't the end token: samples
    then go on with a next turn; an empty bos or pad token, which made an IndexError of each prompt."""
    tokenizer, found = generate.open_tokenizer(copy_tokenizer(tmp_path / "m", **files))
    assert found == stops
    assert chat.render_chat(tokenizer, "<|im_end|>").startswith("<|im_start|>user\n< |im_end|><|im_end|>")


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer": None}, "its tokenizer makes '' of 'What is 3 [+] 4[?]'; is tokenizer.json missing"),
        ({"tokenizer": "{}"}, "no tokenizer that can be loaded"),
        ({"tokenizer": '{"model": {"type": "Other"}}'}, "no tokenizer that can be loaded"),
        ({"tokenizer_config": "[]"}, "no tokenizer that can be loaded"),
        ({"tokenizer_config": {"auto_map": {"AutoTokenizer": ["x.Y", None]}, "tokenizer_class": "Y"},
          "config": {"model_type": "other"}}, "custom code"),
        ({"tokenizer_config": {"chat_template": [{"name": "a", "template": TEMPLATE}]}}, "its chat template fails .*default"),
        ({"tokenizer_config": {"chat_template": "{{ raise_exception('not so') }}"}}, "TemplateError: not so"),
        ({"tokenizer_config": {"chat_template": "{% if %}"}}, "its chat template fails"),
        ({"tokenizer_config": {"chat_template": "{{ messages[0].a.b }}"}}, "its chat template fails"),
        ({"tokenizer_config": {"chat_template": "{{ 1 / 0 }}"}}, "its chat template fails"),
        ({"tokenizer_config": {"eos_token": None, "chat_template": "{{ messages[0].content }}"}}, "no end token"),
        ({"tokenizer_config": {"chat_template": "Hello"}}, "drops or changes the user's text"),
        ({"tokenizer_config": {"chat_template": "{{ messages[0].content|upper }}"}}, "drops or changes the user's text"),
        ({"tokenizer_config": {"chat_template": TEMPLATE + "{{ range(99999)|random }}"}}, "another prompt each time"),
        ({"generation_config": "{"}, "generation_config.json: not a JSON object"),
        ({"generation_config": "[1]"}, "generation_config.json: not a JSON object"),
        ({"generation_config": b"\xff\xfe"}, "generation_config.json: not a JSON object"),
        ({"generation_config": {"eos_token_id": "476"}}, "generation_config.json: eos_token_id must be .* not '476'"),
        ({"generation_config": {"eos_token_id": [True]}}, "eos_token_id must be .* not True"),
    ],
    ids=str,
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, files, message):
    """Guards: tracebacks; a tokenizer without its file, which makes every prompt the same token; code of a model
    directory that asks on stdin whether it may run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(InputError, match=message):
        generate.open_tokenizer(copy_tokenizer(tmp_path / "m", **files))


def test_a_tokenizer_of_another_model(tmp_path):
    """Guards: token ids that have no row in the embedding."""
    path = make_model(tmp_path / "model", vocab_size=480)
    with pytest.raises(InputError, match="its tokenizer has 506 tokens, its embedding 480"):
        generate.open_model(str(path), torch.device("cpu"), torch.float32)


def test_tags_that_a_tokenizer_calls_special(tmp_path):
    """Guards: <think> dropped in decoding, so that a thought that was cut off votes, and broken up in prompts."""
    text = (ROOT / "data/tiny/tokenizer.json").read_text()
    raw = json.loads(text)
    for token in raw["added_tokens"]:
        token["special"] |= token["content"] in TAGS
    tokenizer, _ = generate.open_tokenizer(copy_tokenizer(tmp_path / "m", tokenizer=json.dumps(raw)))
    assert "<think>" in tokenizer.convert_ids_to_tokens(chat.encode_chat(tokenizer, generate.SOLVE_PROMPT))
    thought = "<think><step>a</step>"
    ids = tokenizer(f"{thought}<|im_end|>", add_special_tokens=False).input_ids
    engine = generate.Engine(None, tokenizer, [])
    assert engine.text(ids) == engine.text(ids, ids) == thought
    opened = tokenizer("<|im_start|>assistant\n<think>\n", add_special_tokens=False).input_ids
    assert split_steps(engine.text(ids[2:3], opened)) == []  # the prompt opened the thought that was cut off


def test_no_template_knows_the_day(tmp_path):
    """Guards: prompts of two days that vote together."""
    template = "{% set f = '%Y' %}{{ strftime_now('%d %b ') }}{{ strftime_now(f) }}\n" + TEMPLATE
    path = copy_tokenizer(tmp_path / "m", tokenizer_config={"chat_template": template})
    tokenizer, _ = generate.open_tokenizer(path)
    assert chat.render_chat(tokenizer, "x").startswith("26 Jul 2024\n<|im_start|>user\nx")


SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"


def test_thinking_is_on_unless_it_is_turned_off(tmp_path, capsys):
    """Guards: --no_thinking that doesn't reach the template, or changes the default prompt; one that does nothing
    without saying so."""
    for name, template in (("with", TEMPLATE + SWITCH), ("without", TEMPLATE)):
        path = make_model(tmp_path / name)
        config = json.loads((path / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        device = torch.device("cpu")
        on, off = (generate.open_engine(str(path), device, 4, thinking=thinking) for thinking in (True, False))
        prompts = [engine.tokenizer.decode(engine.encode("x")) for engine in (on, off)]
        assert prompts[0] == chat.render_chat(on.tokenizer, "x") and "think" not in prompts[0]
        assert prompts[1] == prompts[0] + ("<think>\n\n</think>\n\n" if name == "with" else "")
        told = "its chat template has no enable_thinking, so --no_thinking changes nothing" in capsys.readouterr().out
        assert told == (name == "without")
        assert off.text(on.tokenizer("a").input_ids, off.encode("x")) == "a"  # the thought is closed


PATHS = ["runs/prm_cto", "./m", "../m", "/no/m", "~/m", "m", "m/", "a/b/c", "tests/m", "data/m"]


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_not_looked_for_on_the_hub(monkeypatch, name):
    """Guards: a typo that fetches somebody's weights."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=r"^--prm .*: neither a directory nor a hub name"):
        chat.find_model(name, "--prm")


def test_the_hub_has_a_time_limit(monkeypatch, capsys):
    """Guards: a firewall that drops packets, and a stage that waits for an answer forever, without a word."""
    monkeypatch.setattr(chat, "HUB_TIMEOUT", 0.05)
    server = socket.create_server(("127.0.0.1", 0))  # accepts, and says nothing
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.HfApi", partial(huggingface_hub.HfApi, endpoint=url))
    with server, pytest.raises(InputError, match=r"neither a directory nor a hub model .*timed out"):
        chat.find_model("no-such-organisation/m")
    assert "fetched from the Hugging Face hub" in capsys.readouterr().out


@pytest.mark.parametrize(
    "prompt, limit, expected",
    [(600, 400, 400), (900, 400, 100), (950, 400, 50), (951, 400, None), (999, 1, 1), (1000, 1, None)],
)
def test_the_rule_of_short_contexts(prompt, limit, expected):
    """Guards: prompts that fill the context, sampled for a token or two; and prompts that are left out although they
    leave enough."""
    assert generate.output_limit(prompt, limit, context=1000) == expected


def test_escape_sequences_are_shown():
    """Guards: a model's text that sets the terminal's title, hides what follows it, or turns its direction."""
    text = "a\x1b[8m\x1b]0;b\x07\r\x9b\u202e\ttab\nline · 😀"
    shown = "a\\x1b[8m\\x1b]0;b\\x07\\r\\x9b\\u202e\ttab\nline · 😀"
    assert report.printable(text) == shown
    judgement = {"verdict": True, "text": text}
    rollout = {"ids": [], "finish": "stop", "valid": True, "reward": 1.0, "advantage": 0.0, "judgement": judgement}
    label = {"id": text, "method": "single", "dropped": None, "steps": [text], "answer": text, "text": text}
    label |= {"votes": [[1, 0]], "step_labels": [True], "outcome": True}
    for printed in (report.show_rollout(rollout | {"text": text}), report.show_label(label)):
        assert shown in printed and "\x1b" not in printed


def test_long_problems_are_left_out_and_counted(tmp_path, model_dir, monkeypatch, capsys):
    """Guards: one long problem that refuses the whole run, and a result although no prompt fits; a resumed run that is
    refused because --model m is called m/ now."""
    out, problems = tmp_path / "out.jsonl", tmp_path / "problems.jsonl"
    texts = {"short": "2 + 2?", "longer": "2 + 2?" + " 1" * 50, "too long": "2 + 2?" + " 1" * 500}
    problems.write_text("".join(json.dumps({"id": k, "problem": text}) + "\n" for k, text in texts.items()))
    arguments = [*generate_arguments(model_dir, problems, out), "--num_samples", 1, "--max_new_tokens", 160]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    generate.main()
    counted = "of 3 prompts, 1 are too long for the model's context and left out, 1 leave less than"
    assert counted in capsys.readouterr().out
    assert {record["id"] for record in records.read(out, ["id"])} == {"short/0", "longer/0"}
    before = out.read_bytes()
    monkeypatch.chdir(tmp_path)  # the same inputs, written in another way
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--model", f"{model_dir}/", "--problems", "./problems.jsonl"])
    generate.main()
    assert out.read_bytes() == before and "1 are too long" in capsys.readouterr().out


# --------------------------------------------------------------------------- record files


def open_output(path: Path, **changes) -> records.RecordFile:
    args = Namespace(**{"model": "m", "temperature": 0.7, "seed": 0, "slots": 4, "out": "x", **changes})
    return records.RecordFile(path, args, generate.MAY_CHANGE_ON_RESUME)


def test_record_file_goes_on_where_a_killed_run_stopped(tmp_path):
    """Guards: a torn line that swallows the next record, a whole last line that is taken for a torn one, records twice,
    a second writer, and lines cut at U+2028."""
    path = tmp_path / "deep" / "out.jsonl"
    written = [{"id": str(i), "text": "line\u2028\x85 one\r\n“two”"} for i in range(4)]
    with open_output(path) as output:
        assert not path.exists()
        output.append(written[:2])
        with pytest.raises(InputError, match="another run is writing"), open_output(path):
            pass
    with open(path, "a") as file:
        file.write('{"id": "2", "te')
    with open_output(path, slots=8, out="./x") as output:  # neither changes records
        assert output.done.keys() == {"0", "1"}
        output.append(written)
    assert records.read(path, ["id", "text"]) == written
    assert json.loads(Path(f"{path}.args.json").read_text())["arguments"]["slots"] == 8
    with pytest.raises(InputError, match=r"made with --temperature 0.7, this run has --temperature 0.9"):
        open_output(path, temperature=0.9).__enter__()
    assert records.read(path, ["id", "text"]) == written
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # as another engine may write it
    with open_output(path) as output:
        assert output.done.keys() == {"0", "1", "2", "3"}
        output.append([{"id": "4", "text": ""}])
    assert records.read(path, ["id", "text"]) == [*written, {"id": "4", "text": ""}]
    assert not list(path.parent.glob(".*"))  # no temporary file is left


def test_a_run_is_described_without_git(monkeypatch):
    """Guards: stages that need a program which isn't in requirements.txt."""
    monkeypatch.setenv("PATH", "")
    assert records.describe_run(Namespace(seed=1))["commit"] is None


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file; create it with: python x.py"),
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (b'{"id": 1, "problem": "a"}\n\n{"id": 2,\n', r"in.jsonl:3: not JSON"),
        (b'{"id": 1, "problem": "a"}\n{"id": 2, "problem": "\xff"}\n', r"in.jsonl:2: not JSON"),
        (b'{"id": 1, "problem": "\\ud83d"}\n', r"in.jsonl:1: not JSON .*surrogates"),
        (b'{"id": 1, "problem": null}\n', r"in.jsonl:1: problem must be a string that is not blank, not None"),
        (b'{"id": 1}\n', r"in.jsonl:1: no field 'problem'"),
        (b"[1]\n", r"in.jsonl:1: no field 'id'"),
        (b'{"id": 1, "problem": "a"}\n{"id": 1, "problem": "b"}\n', r"in.jsonl:2: id '1' appears twice"),
        (b'{"id": 1, "problem": "a"}\n{"id": "1", "problem": "b"}\n', r"in.jsonl:2: id '1' appears twice"),
    ],
)
def test_read_records_names_what_is_wrong(tmp_path, content, message):
    """Guards: a traceback, or a bad line that is skipped without a word."""
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        records.read(path, ["id", "problem"], "python x.py")


def test_errors_name_the_thing_once(tmp_path, capsys):
    """Guards: a read-only disk as a traceback, a checksum in the place of the flag whose file has changed, and a flag
    named twice."""

    def write() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "out.jsonl")

    with pytest.raises(SystemExit):
        distributed.run_stage(write)
    message = (
        "error: [Errno 30] Read-only file system: 'out.jsonl'; what was saved before is intact, and the same command "
    )
    assert capsys.readouterr().err == message + "resumes once this is fixed\n"
    (tmp_path / "out").mkdir()
    (tmp_path / "out.args.json").write_text('{"arguments": {"labels_sha256": "a"}}')
    with pytest.raises(InputError, match="the contents of --labels have changed"):
        records.check_arguments(tmp_path / "out", {"labels_sha256": "b"}, set())
    with pytest.raises(InputError) as error:
        generate.open_engine(str(tmp_path / "no/such/model"), torch.device("cpu"), None, "--prm")
    assert str(error.value).count("--prm") == 1


def test_records_of_other_engines(tmp_path):
    """Guards: ids and answers that are numbers, which match nothing or crash the grader; a text taken for a list of
    one-letter steps; a reference answer that is null, graded against as "None"."""
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"id": 1, "problem_id": 2, "solution_id": 3, "answer": 8, "steps": ["a"]}\n{"id": 2, "answer": null}\n'
    )
    first, second = records.read(path, ["id"])
    assert first == {"id": "1", "problem_id": "2", "solution_id": "3", "answer": "8", "steps": ["a"]}
    assert second == {"id": "2", "answer": None}
    with pytest.raises(InputError, match="'2' has no answer"):
        records.read_answers([path])
    path.write_text('{"id": 1, "steps": "ab"}\n')
    with pytest.raises(InputError, match=r"in.jsonl:1: steps must be a list of strings, not ab"):
        records.read(path, ["id", "steps"])
    assert records.read(path, ["id"]) == [{"id": "1", "steps": "ab"}]  # nobody asked for them


# --------------------------------------------------------------------------- the command line

# Processes are forked from a server that has imported torch once: a process costs milliseconds, and is still a process.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["grpo", "torch._dynamo", "hypothesis", "pytest"])  # all that a run or a test imports


def _run_script(script: str, arguments: list[str], stdout: str, stderr: str) -> None:
    for target, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def start_script(script: str, directory: Path, *arguments: object):
    """Start `python script arguments` in another process; its output goes to files in the directory."""
    where = [str(directory / name) for name in ("stdout", "stderr")]
    process = PROCESSES.Process(target=_run_script, args=(script, [str(a) for a in arguments], *where))
    process.start()
    return process


def run_script(script: str, directory: Path, *arguments: object) -> tuple[int, str]:
    """(exit status, stderr) of `python script arguments`."""
    process = start_script(script, directory, *arguments)
    process.join(300)
    return process.exitcode, (directory / "stderr").read_text()


def run_and_kill(script: str, directory: Path, output: Path, size: float, *arguments: object) -> int | None:
    """Start a script, and kill -9 it when its output has more than `size` bytes; returns its exit status."""
    process = start_script(script, directory, *arguments)
    while process.is_alive() and not (output.exists() and output.stat().st_size > size):
        time.sleep(0.001)
    process.kill()
    process.join()
    return process.exitcode


def make_model(path: Path, **changes) -> Path:
    """A model directory with random weights and the tiny world's tokenizer."""
    raw = {**SIZES, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 512}
    raw |= {"max_position_embeddings": 256, "tie_word_embeddings": True, **changes}
    torch.manual_seed(0)
    model = Transformer(Config.from_dict(raw))
    torch.nn.init.normal_(model.head, std=0.3)
    save_model(model, path, ROOT / "data" / "tiny")
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture
def problems(tmp_path) -> Path:
    path = tmp_path / "problems.jsonl"
    lines = [json.dumps({"id": f"p{i}", "problem": f"What is {i} + {i}?"}) for i in range(24)]
    path.write_text("\n".join(lines) + "\n")
    return path


def generate_arguments(model: Path, problems: Path, out: Path) -> list[object]:
    return [
        "--model",
        model,
        "--problems",
        problems,
        "--out",
        out,
        "--num_samples",
        3,
        "--max_new_tokens",
        40,
        "--slots",
        8,
    ]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_and_restart_gives_the_same_solutions(tmp_path, model_dir, problems, kills):
    """Guards: records lost, doubled, torn or drawn otherwise when a run is killed and taken up again."""
    whole, pieces = tmp_path / "whole.jsonl", tmp_path / "pieces.jsonl"
    assert run_script("generate.py", tmp_path, *generate_arguments(model_dir, problems, whole))[0] == 0
    expected = {r["id"]: r for r in records.read(whole, ["id"])}
    assert set(expected) == {f"p{i}/{k}" for i in range(24) for k in range(3)}
    first = expected["p0/0"]
    assert first["steps"] == split_steps(first["text"]) and first["finish"] in ("stop", "length")
    moments = [share * whole.stat().st_size for share in sorted(random.random() * 0.7 for _ in range(kills))]
    again = generate_arguments(model_dir, problems, pieces)
    killed = [run_and_kill("generate.py", tmp_path, pieces, size, *again) for size in moments]
    assert killed[0] == -9  # on a busy machine a later one may come too late
    with open(pieces, "rb+") as file:
        file.truncate(pieces.stat().st_size - 9)  # and the last line is torn
    assert run_script("generate.py", tmp_path, *again)[0] == 0
    written = records.read(pieces, ["id"])
    assert {r["id"]: r for r in written} == expected and len(written) == len(expected)
    before = pieces.read_bytes()
    assert run_script("generate.py", tmp_path, *again)[0] == 0
    assert pieces.read_bytes() == before and "complete, 72 solutions" in (tmp_path / "stdout").read_text()


def break_template(tmp_path, arguments):
    settings = json.loads((ROOT / "data/tiny/tokenizer_config.json").read_text())
    del settings["chat_template"]
    (make_model(tmp_path / "model") / "tokenizer_config.json").write_text(json.dumps(settings))
    return ["--model", tmp_path / "model"]


def break_tokenizer(tmp_path, arguments):
    (make_model(tmp_path / "model") / "tokenizer.json").write_text('{"torn')
    return ["--model", tmp_path / "model"]


def break_architecture(tmp_path, arguments):
    config = make_model(tmp_path / "model") / "config.json"
    config.write_text(config.read_text().replace("Qwen2ForCausalLM", "MambaForCausalLM"))
    return ["--model", tmp_path / "model"]


def break_weights(tmp_path, arguments):
    weights = make_model(tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return ["--model", tmp_path / "model"]


def change_problems(tmp_path, arguments):
    """A run that has answered another problem of the same name."""
    earlier = make_earlier_run(tmp_path, arguments)
    earlier[1].write_text('{"id": "p0/0", "problem": "another"}\n')
    return [*earlier, "--temperature", 0.5]


def break_problems(tmp_path, arguments):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"id": "a", "problem": "b"}\nnot JSON\n')
    return ["--problems", path]


def make_earlier_run(tmp_path, arguments):
    """A run with the same arguments, but for one."""
    out = tmp_path / "earlier.jsonl"
    out.write_text('{"id": "p0/0"}\n')
    names = dict(zip(arguments[::2], arguments[1::2], strict=True)) | {
        "--temperature": 0.5,
        "--top_p": 0.95,
        "--seed": 0,
    }
    run = {name[2:]: str(value) if isinstance(value, Path) else value for name, value in names.items()}
    Path(f"{out}.args.json").write_text(json.dumps({"arguments": run}))
    return ["--out", out]


BAD_INPUT = [
    (break_template, "no chat template"),
    (break_tokenizer, "no tokenizer that can be loaded"),
    (break_architecture, "MambaForCausalLM is not supported"),
    (lambda *_: ["--model", "/no/such/model"], "--model /no/such/model: neither a directory nor"),
    (lambda *_: ["--max_new_tokens", 4000], r"no prompt leaves an eighth of --max_new_tokens 4000 in .* context"),
    (lambda *_: ["--top_p", 0], "--top_p 0: it must be"),
    (lambda tmp_path, _: ["--out", tmp_path], "Is a directory"),
    (break_problems, r"broken.jsonl:2: not JSON"),
    (lambda tmp_path, _: ["--problems", tmp_path / "none.jsonl"], "none.jsonl: no such file; create it with: python"),
    (lambda *_: ["--problems", "/dev/null"], "/dev/null"),
    (make_earlier_run, "--temperature 0.5, this run has --temperature 0.7"),
    (break_weights, r"model.safetensors: not a whole file .*; fetch it again"),
    (change_problems, "problem p0 was generated from a different problem; choose another --out"),
]


@pytest.mark.parametrize("change, message", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(tmp_path, model_dir, problems, change, message):
    """Guards: tracebacks, exit status 1, and a failed run that leaves an empty or half-written output behind."""
    out = tmp_path / "out.jsonl"
    arguments = generate_arguments(model_dir, problems, out)
    arguments += change(tmp_path, arguments)  # the last flag wins
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    status, stderr = run_script("generate.py", tmp_path, *arguments)
    assert status == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert re.search(message, stderr)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json*") if path.suffix != ".lock"} == before


def test_top_k_and_no_thinking_of_the_command_line(tmp_path, model_dir, monkeypatch):
    """Guards: flags that are parsed and recorded, and reach neither the sampler nor the template; a run from before
    they existed that can't be resumed."""
    opened = []
    open_engine = generate.open_engine
    monkeypatch.setattr(generate, "open_engine", lambda *a, **s: opened.append(s["thinking"]) or open_engine(*a, **s))
    problems, out = tmp_path / "problems.jsonl", tmp_path / "out.jsonl"

    def run(count: int, *flags: object) -> list[str]:
        lines = [json.dumps({"id": f"p{i}", "problem": f"What is {i}?"}) for i in range(count)]
        problems.write_text("\n".join(lines) + "\n")
        arguments = ["--model", model_dir, "--problems", problems, "--out", out, "--num_samples", 3, "--max_new_tokens", 9]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, [*arguments, "--temperature", 1, *flags])])
        generate.main()
        return [record["text"] for record in records.read(out, ["text"])]

    one = run(1, "--top_k", 1, "--no_thinking")
    assert len(set(one)) == 1 and opened == [False]
    for flags, message in ((["--no_thinking"], "made with --top_k 1, this run has --top_k 0"),
                           (["--top_k", 1], "made with --no_thinking True")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            run(1, *flags)
    out.unlink()
    two = run(1)
    assert len(set(two)) == 3 and two != one and opened == [False, True]
    recorded = Path(f"{out}.args.json")
    described = json.loads(recorded.read_text())
    assert (described["arguments"].pop("top_k"), described["arguments"].pop("no_thinking")) == (0, False)
    recorded.write_text(json.dumps(described))
    assert run(2)[:3] == two
    described["arguments"].pop("seed")
    recorded.write_text(json.dumps(described))
    with pytest.raises(InputError, match="--top_k None, this run has --top_k 5"):
        run(3, "--top_k", 5)


def test_two_runs_never_share_an_output(tmp_path, model_dir, problems):
    """Guards: interleaved records; and the same through a real command line, whose help loads no model."""
    out = tmp_path / "out.jsonl"
    with open(f"{out}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = map(str, generate_arguments(model_dir, problems, out))
        run = subprocess.run([sys.executable, "generate.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and "another run is writing to it" in run.stderr
    assert not out.exists()
