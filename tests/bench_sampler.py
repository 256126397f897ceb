"""Tokens per second of our sampler against `transformers` generate: the same weights, the same queue, in turns.

    OMP_NUM_THREADS=1 python -m tests.bench_sampler                 # a tiny model at 64 rows, five minutes on one core
    python -m tests.bench_sampler --workload small                  # Qwen2.5-0.5B's shape at 16 rows, CPU
    python -m tests.bench_sampler --workload A B C                  # Qwen2.5-7B's shape at 128 rows, a GPU
    python -m tests.bench_sampler --workload queue                  # what 100,000 prompts cost on the host

| workload | prompts x samples | prompt | answer |
|---|---|---|---|
| tiny  | 64 x 8  | 40 to 120     | long-tailed, mean 82, at most 256 |
| small | 12 x 4  | 40 to 120     | long-tailed, mean about 21, at most 64 |
| A     | 256 x 1 | 100 to 1,024  | 100 to 1,024 |
| B     | 64 x 8  | 150           | long-tailed, mean about 600, at most 2,048 |
| C     | 32 x 16 | 1,200         | 400 to 750: verification |

The number of tokens of each sample is forced. `generate` gets consecutive batches of as many rows as we have slots,
left-padded, and runs each to its longest row. Temperature 1 without truncation, random weights. Only the forced tokens
count, for both; the median of the runs. The floor is the time that the machine's own rates, measured first, allow: for
each step the weights are read once or multiplied with all rows, whichever takes longer, every key and value of every
row is read once, and every distinct prompt is run once.
"""

import argparse
import random
import statistics
import tempfile
import time

from data.make_tiny import new_model
from kernels.sampler import Sampler
from kernels.transformer import Config, Transformer, save_model

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

Queue = list[tuple[list[int], int]]  # (prompt, tokens to sample), the samples of a prompt one behind the other

QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 32768, "num_hidden_layers": 24, "vocab_size": 151936,
        "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
        "tie_word_embeddings": True}  # fmt: skip
QWEN_7B = QWEN | {"num_hidden_layers": 28, "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
                  "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}  # fmt: skip


def make_queue(workload: str) -> tuple[Queue, int]:
    """(the queue, samples of each prompt)."""
    rng = random.Random(0)

    def long_tailed(mean_log: float, longest: int) -> int:
        return min(longest, max(4, int(rng.lognormvariate(mean_log, 0.8))))

    prompts, samples, prompt_length, length = {
        "tiny": (64, 8, lambda: rng.randint(40, 120), lambda: long_tailed(4.15, 256)),
        "small": (12, 4, lambda: rng.randint(40, 120), lambda: long_tailed(2.8, 64)),
        "A": (256, 1, lambda: rng.randint(100, 1024), lambda: rng.randint(100, 1024)),
        "B": (64, 8, lambda: 150, lambda: long_tailed(6.15, 2048)),
        "C": (32, 16, lambda: 1200, lambda: rng.randint(400, 750)),
    }[workload]
    texts = [[rng.randrange(500) for _ in range(prompt_length())] for _ in range(prompts)]
    return [(text, length()) for text in texts for _ in range(samples)], samples


def make_model(size: str) -> Transformer:
    """Random weights of the shape."""
    if size == "tiny":
        return new_model(vocab_size=512).eval()
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = Transformer(Config.from_dict(QWEN if size == "small" else QWEN_7B))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(torch.bfloat16 if on_gpu else torch.float32).eval()


def run_ours(model: Transformer, queue: Queue, rows: int, samples: int, **flags) -> None:
    """Our sampler with as many slots as rows. Lengths are forced per prompt, so every sample is a prompt of its own;
    but not where prompts are to be shared, whose samples then have to be equally long."""
    count = samples if flags.get("share_prompts") else 1
    queue = queue[::count]
    prompts, limits = (list(column) for column in zip(*queue, strict=True))
    settings = {
        "keys": [str(i) for i in range(len(queue))],
        "num_samples": count,
        "max_new_tokens": limits,
        "stop_ids": [],
    }
    drawn = Sampler(model, rows, **flags).sample(prompts, **settings)
    assert [len(s.ids) for group in drawn for s in group] == [limit for limit in limits for _ in range(count)]


def run_theirs(model, queue: Queue, rows: int, **flags) -> None:
    """`generate` in batches."""
    for start in range(0, len(queue), rows):
        prompts, limits = zip(*queue[start : start + rows], strict=True)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)  # (rows, width)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        settings = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": max(limits)}
        out = model.generate(ids, attention_mask=mask, eos_token_id=None, pad_token_id=0, **settings, **flags)
        assert out.shape == (len(prompts), width + max(limits))


def clocked(work) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - cpu


def machine_rates(model: Transformer, rows: int) -> tuple[float, float]:
    """(operations a second of a product like the MLP's with this many rows, or more; bytes a second that a sum
    reads)."""
    c = model.config
    wide = torch.randn(max(rows, 256), c.hidden_size, device=model.device, dtype=model.head.dtype)
    weight = torch.randn(c.hidden_size, c.intermediate_size, device=model.device, dtype=model.head.dtype)
    large = torch.zeros(1 << 28, dtype=torch.uint8, device=model.device).view(torch.float32)

    def fastest(work) -> float:
        return min(clocked(work)[0] for _ in range(10))

    return 2 * wide.shape[0] * weight.numel() / fastest(lambda: wide @ weight), large.nbytes / fastest(large.sum)


def floor(model: Transformer, queue: Queue, rows: int, rates: tuple[float, float]) -> float:
    """Seconds below which this machine can't be: see the top."""
    c, (operations, bandwidth) = model.config, rates
    size = model.head.element_size()
    embedding = 0 if c.tied else model.head.numel()
    used = sum(p.numel() for p in model.parameters()) - embedding  # of an embedding only rows are read
    tokens = sum(length for _, length in queue)
    steps = max(-(-tokens // rows), max(length for _, length in queue))
    prefill = 2 * used * sum(map(len, {tuple(prompt): 0 for prompt, _ in queue})) / operations
    read = sum(length * len(prompt) + length * (length + 1) // 2 for prompt, length in queue)  # tokens' keys and values
    read *= 2 * c.num_layers * c.num_kv_heads * c.head_dim * size
    return prefill + max(steps * used * size / bandwidth, 2 * used * tokens / operations) + read / bandwidth


def make_models(size: str) -> tuple[Transformer, PreTrainedModel]:
    """The same random weights in our model and in that of `transformers`."""
    ours = make_model(size)
    with tempfile.TemporaryDirectory() as directory:
        save_model(ours, f"{directory}/model")
        theirs = AutoModelForCausalLM.from_pretrained(f"{directory}/model", dtype=ours.head.dtype)
    return ours, theirs.eval().to(ours.device)


def compare(workload: str, ours: Transformer, theirs: PreTrainedModel, rows: int, runs: int, batches: int) -> None:
    """Prints a table of the workload: tokens a second, and how much of the time is the floor."""
    queue, samples = make_queue(workload)
    rates = machine_rates(ours, rows)
    some = queue[: batches * rows] if batches else queue  # what `generate` samples
    longest = {tuple(prompt): max(n for p, n in queue if p == prompt) for prompt, _ in queue}
    equal = [(prompt, longest[tuple(prompt)]) for prompt, _ in queue]  # all samples of a prompt as long as its longest

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(p.numel() for p in ours.parameters())
    mean = sum(length for _, length in queue) / len(queue)
    print(f"\n{workload}: {parameters:,} parameters, {str(ours.head.dtype)[6:]}, {rows} rows")
    print(f"{len(queue)} samples of {mean:.0f} tokens on average, at most {max(n for _, n in queue)}")
    print(
        f"{machine}, torch {torch.__version__}: {rates[0] / 1e9:,.0f} GFLOP/s, {rates[1] / 1e9:,.1f} GB/s", flush=True
    )

    work = {
        "ours": (queue, lambda: run_ours(ours, queue, rows, samples)),
        "generate": (some, lambda: run_theirs(theirs, some, rows)),
    }
    if workload == "C":
        work["ours, prompts copied, equal lengths"] = (
            equal,
            lambda: run_ours(ours, equal, rows, samples, share_prompts=False),
        )
        work["ours, prompts shared, equal lengths"] = (
            equal,
            lambda: run_ours(ours, equal, rows, samples, share_prompts=True),
        )

    # 1. Warm up: the first call of either pays for libraries, not for sampling.
    few = [(prompt, 8) for prompt, _ in queue[:rows]]
    run_ours(ours, few, rows, samples)
    run_theirs(theirs, few, rows)
    # 2. Measure in turns, so that a slow minute of the machine meets all of them.
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(runs):
        for name, (drawn, call) in work.items():
            seconds[name].append(clocked(call))
            print(f"{name}: {len(drawn)} samples in {seconds[name][-1][0]:.1f} s", flush=True)
    # 3. The table of medians.
    print("| | tokens/s | per CPU second | of the floor |\n|---|---|---|---|")
    for name, (drawn, _) in work.items():
        clock, cpu = (statistics.median(column) for column in zip(*seconds[name], strict=True))
        count = sum(length for _, length in drawn)
        least = floor(ours, drawn, rows, rates)
        print(f"| {name} | {count / clock:,.0f} | {count / cpu:,.0f} | {100 * least / clock:.0f} % |", flush=True)


def queue_cost(count: int = 100_000) -> None:
    """Host time of a long queue: answers of one token, with a model whose work is as good as nothing."""

    def seconds(prompts: int) -> float:
        model = new_model(vocab_size=8).eval()
        texts = [[i % 8, i // 8 % 8] for i in range(64)] * (prompts // 64 + 1)
        keys = [str(i) for i in range(prompts)]
        return clocked(lambda: Sampler(model, 256).sample(texts[:prompts], keys=keys, max_new_tokens=1, stop_ids=[]))[1]

    seconds(1000)
    few, many = seconds(count // 10), seconds(count)
    print(
        f"queue of {count // 10:,}: {1e6 * few / (count / 10):.1f} us a prompt; of {count:,}: {1e6 * many / count:.1f} us"
    )


def main() -> None:
    """Parse flags, print a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=["tiny"], choices=["tiny", "small", "A", "B", "C", "queue"])
    parser.add_argument("--rows", type=int, help="default: 64, 16 and 128")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batches", type=int, help="give `generate` only so many batches of the queue; default: all")
    args = parser.parse_args()
    models: dict[str, tuple[Transformer, PreTrainedModel]] = {}
    for workload in args.workload:
        if workload == "queue":
            queue_cost()
            continue
        size = workload if workload in ("tiny", "small") else "7B"
        if size not in models:
            models[size] = make_models(size)
        compare(
            workload, *models[size], args.rows or {"tiny": 64, "small": 16, "7B": 128}[size], args.runs, args.batches
        )


if __name__ == "__main__":
    main()
