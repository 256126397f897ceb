"""Tokens per second of our sampler against `transformers` generate on CPU: the same tiny model, the same queue.

    OMP_NUM_THREADS=1 python -m tests.bench_sampler          # about five minutes; prints one line a run and the ratio

The queue: 64 prompts with 8 samples each, in order; the number of tokens of each of the 512 is forced and long-tailed
(mean a third of the longest). `generate` gets consecutive batches of 64 rows, left-padded, and runs each to its longest
row; we get 64 slots. Same weights, dtype, threads, temperature 1 without truncation. Only the forced tokens count, for
both. The two take turns, and the median of three runs each is compared: by the clock, and by CPU seconds,
which a busy machine disturbs less.
"""

import argparse
import random
import statistics
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM

from data.make_tiny import new_model
from generate import Sampler
from kernels.transformer import Transformer, save_model

ROWS, PROMPTS, SAMPLES, LONGEST = 64, 64, 8, 256


def make_queue() -> list[tuple[list[int], int]]:
    """512 x (prompt of 40 to 120 tokens, how many tokens to sample)."""
    rng = random.Random(0)
    prompts = [[rng.randrange(512) for _ in range(rng.randint(40, 120))] for _ in range(PROMPTS)]
    lengths = [min(LONGEST, max(4, int(rng.lognormvariate(4.15, 0.8)))) for _ in range(PROMPTS * SAMPLES)]
    return [(prompts[i // SAMPLES], length) for i, length in enumerate(lengths)]


def run_ours(model: Transformer, queue: list[tuple[list[int], int]]) -> None:
    prompts, limits = (list(column) for column in zip(*queue, strict=True))
    keys = [str(i) for i in range(len(queue))]
    samples = Sampler(model, ROWS).sample(prompts, keys=keys, max_new_tokens=limits, stop_ids=[])
    assert [len(group[0].ids) for group in samples] == limits


def run_theirs(model, queue: list[tuple[list[int], int]]) -> None:
    for start in range(0, len(queue), ROWS):
        prompts, limits = zip(*queue[start : start + ROWS], strict=True)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])  # (64, width)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=max(limits),
            eos_token_id=None,
            pad_token_id=0,
        )
        assert out.shape == (ROWS, width + max(limits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours = new_model(vocab_size=512).eval()
    with tempfile.TemporaryDirectory() as directory:
        save_model(ours, f"{directory}/model")
        theirs = AutoModelForCausalLM.from_pretrained(f"{directory}/model", dtype=torch.float32).eval()
    queue = make_queue()
    tokens = sum(length for _, length in queue)
    print(f"{sum(p.numel() for p in ours.parameters()):,} parameters, fp32, {args.threads} thread(s), {ROWS} rows")
    print(f"{len(queue)} samples of {tokens / len(queue):.0f} tokens on average, at most {max(n for _, n in queue)}")
    speed: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for _ in range(args.runs):
        for name, run, model in (("ours", run_ours, ours), ("theirs", run_theirs, theirs)):
            clock, cpu = time.perf_counter(), time.process_time()
            run(model, queue)
            clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
            speed[name].append((tokens / clock, tokens / cpu))
            print(f"{name:>6}: {tokens / clock:6,.0f} tokens/s, {tokens / cpu:6,.0f} tokens per CPU second", flush=True)
    ratios = [
        statistics.median(s[i] for s in speed["ours"]) / statistics.median(s[i] for s in speed["theirs"])
        for i in (0, 1)
    ]
    print(f"ratio of the medians: {ratios[0]:.2f} by the clock, {ratios[1]:.2f} by CPU seconds")


if __name__ == "__main__":
    main()
