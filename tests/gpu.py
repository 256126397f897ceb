"""What only a GPU can show: is it right there, how fast is it, and does it fit?

    python -m tests.gpu                                        # every part, one after another
    python -m tests.gpu --parts env logprob attention          # some of them
    python -m tests.gpu --out runs/gpu                         # where gpu.txt is written, the lines as printed

Each part stands by itself: a failure in one doesn't stop the next. A number is one line, PASS or FAIL where it has a
bound, INFO where it is measured. Times are medians; they belong to the card that the first part names. Without a GPU
everything runs at toy sizes on the CPU, which tests this script and nothing else.

| part      | question                                                                                             |
|-----------|------------------------------------------------------------------------------------------------------|
| env       | which card; how fast does it copy and multiply: the ceilings for all that follows                    |
| logprob   | are the kernels of logprob.cu compiled, right, and near the speed of the bare products               |
| attention | decoding over slots of different lengths, and over shared prompts: output and log-sum-exp            |
| packed    | attention in training, with shared prompts, forward and backward                                     |
| sampler   | CUDA graphs: captured, equal to single steps, log-probs equal to the trainer's                       |
| train     | GRPO updates under FSDP2: do they agree with the sampler, what do they cost, and the head's share     |
| tiny      | the stages as commands on the tiny world, one of them under torchrun, one of them resumed            |
| speed     | a decoding step of a 7B model by rows, drawing a token, a whole queue                                |
| memory    | a 14B model with as many slots as memory allows, twice                                               |
"""

import argparse
import gc
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import grpo
from kernels import decode, distributed, logprob, sampler
from kernels.decode import SlotCache
from kernels.sampler import Sampler
from kernels.transformer import Config, Transformer, packed_attention

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
STARTED = time.time()
lines: list[str] = []


# --------------------------------------------------------------------------- reporting and timing


def say(kind: str, name: str, text: str = "") -> None:
    """One line of the report: PASS, FAIL or INFO."""
    lines.append(f"{time.time() - STARTED:6.1f} {kind:4} {name}{': ' if text else ''}{text}")
    print(lines[-1], flush=True)


def check(name: str, value: float, *, least: float = -torch.inf, most: float = torch.inf) -> None:
    """A number that has to lie between two bounds; NaN lies nowhere."""
    bound = f"at most {most:g}" if most < torch.inf else f"at least {least:g}"
    say("PASS" if least <= value <= most else "FAIL", name, f"{value:.3g} ({bound})")


def expect(name: str, good: bool, text: str = "") -> None:
    """Something that has to be so."""
    say("PASS" if good else "FAIL", name, text)


def gib(count: float) -> str:
    """Bytes as GiB."""
    return f"{count / 2**30:.1f} GiB"


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||, in fp64."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def milliseconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Median time of work that the host launches operation by operation."""
    for _ in range(2):
        work()
    times = []
    for _ in range(repeats):
        if not GPU:
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def device_milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Time of work on the device alone, captured as a CUDA graph: single operations are over before the host has
    launched the next."""
    if not GPU:
        return milliseconds(work, 2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs are being made there
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()

    def replay() -> None:
        for _ in range(repeats):
            graph.replay()

    return milliseconds(replay, 5) / repeats


# --------------------------------------------------------------------------- models of real shapes, with random weights


def qwen2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool = False) -> Config:
    """A configuration of the Qwen2 family."""
    return Config.from_dict(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "tie_word_embeddings": tied,
        }
    )


if GPU:
    QWEN_7B = qwen2(3584, 18944, 28, 28, 4, 152064)
    QWEN_14B = qwen2(5120, 13824, 48, 40, 8, 152064)
    QWEN_1_5B = qwen2(1536, 8960, 28, 12, 2, 151936, tied=True)
    TWO_LAYERS = qwen2(3584, 4096, 2, 28, 4, 2048)
else:
    QWEN_7B = QWEN_14B = TWO_LAYERS = qwen2(56, 64, 2, 14, 2, 211)
    QWEN_1_5B = qwen2(48, 64, 2, 4, 2, 211, tied=True)


def random_model(config: Config, dtype: torch.dtype = DTYPE, std: float = 0.02) -> Transformer:
    """A model with random weights. Its distribution is nearly uniform: draw greedily or with top_p 1, because a nucleus
    would be the whole vocabulary."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # so that no copy in fp32 is made
    try:
        with torch.device(DEVICE):
            model = Transformer(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


# --------------------------------------------------------------------------- correctness


def env() -> None:
    say("INFO", "versions", f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}")
    if not GPU:
        return
    card = torch.cuda.get_device_properties(0)
    free, _ = torch.cuda.mem_get_info()
    say("INFO", "card", f"{card.name}, {card.multi_processor_count} SMs, {gib(card.total_memory)}, {gib(free)} free")
    source = torch.empty(2**30, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source))
    say("INFO", "copy, bytes read and written", f"{2 * source.nbytes / ms / 1e9:.2f} TB/s")
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    ms = device_milliseconds(lambda: a @ b, 5)
    say("INFO", "product of 8192 x 8192 x 8192, bf16", f"{2 * 8192**3 / ms / 1e9:.0f} TFLOP/s")


def log_probs() -> None:
    # 1. The kernels themselves, and products that stay in fp32.
    merge, gradient = logprob.merge_slice, logprob.slice_gradient
    if GPU:
        merge, gradient = logprob.cuda_passes(DEVICE)
        expect("logprob.cu is compiled by NVRTC", merge is not logprob.merge_slice)
    a, b = (torch.randn(256, 3584, device=DEVICE).to(DTYPE) for _ in range(2))
    out = logprob.product(a, b.T, torch.empty(256, 256, device=DEVICE))
    check("product of bf16 in fp32, relative error", relative_error(out, a.double() @ b.double().T), most=1e-5)
    for rows in (0, 1):
        hidden = torch.randn(rows, 64, device=DEVICE, dtype=DTYPE).requires_grad_()
        weight = torch.randn(300, 64, device=DEVICE, dtype=DTYPE).requires_grad_()
        ignored = torch.full((rows,), -1, device=DEVICE)
        logprobs, _ = logprob.token_logprobs(hidden, weight, ignored)
        logprobs.sum().backward()
        expect(f"{rows} rows, none with a target: no gradient", not weight.grad.any())

    # 2. At the size of a 7B model's head, against fp64.
    N, D, V = (8192, 3584, 152064) if GPU else (64, 32, 1000)
    hidden = (3 * torch.randn(N, D, device=DEVICE)).to(DTYPE).requires_grad_()
    weight = (torch.randn(V, D, device=DEVICE) / D**0.5).to(DTYPE).requires_grad_()
    targets = torch.randint(V, (N,), device=DEVICE)
    targets[::7] = -1
    upstream = torch.randn(N, device=DEVICE)
    few = slice(0, 64)
    counted = (targets[few] >= 0).double()  # (64,)
    logprobs, entropies = logprob.token_logprobs(hidden, weight, targets, 0.9)
    exact = (hidden[few].detach().double() @ weight.detach().double().T / 0.9).log_softmax(-1)  # (64, V)
    chosen = exact.gather(1, targets[few].clamp(min=0)[:, None])[:, 0]
    entropy = -(exact.exp() * exact).sum(1)
    check("log p, largest error", float((logprobs[few].detach().double() - chosen * counted).abs().max()), most=5e-4)
    check("entropy, largest error", float((entropies[few].detach().double() - entropy * counted).abs().max()), most=1e-3)
    dh, _ = torch.autograd.grad(logprobs, [hidden, weight], upstream)
    d = -exact.exp()  # d log p / d z = [j = target] - p
    d[torch.arange(64, device=DEVICE), targets[few].clamp(min=0)] += 1
    d *= (upstream[few].double() * counted / 0.9)[:, None]
    check("dH, relative error", relative_error(dh[few], d @ weight.detach().double()), most=6e-3)
    del exact, d, dh

    # 3. Speed: tests/bench_logprob.py compares with others.
    z = torch.randn(N, 4096 if GPU else 64, device=DEVICE)
    state = torch.zeros(N, 4, device=DEVICE)
    values = torch.randn(N, 5, device=DEVICE)
    g = torch.empty(z.shape, device=DEVICE, dtype=DTYPE)
    ms = device_milliseconds(lambda: merge(z, targets, state, 0, 1.0))
    say("INFO", "merge_slice, its bytes", f"{z.nbytes / ms / 1e9:.2f} TB/s, {ms:.3f} ms")
    ms = device_milliseconds(lambda: gradient(z, targets, values, g, 0, 1.0))
    say("INFO", "slice_gradient, its bytes", f"{(z.nbytes + g.nbytes) / ms / 1e9:.2f} TB/s, {ms:.3f} ms")


def attention() -> None:
    for H, K, E in [(28, 4, 128), (40, 8, 128), (64, 8, 128), (14, 2, 64), (8, 8, 128)] if GPU else [(4, 2, 8)]:
        worst, worst_lse = 0.0, 0.0
        for B, R in itertools.product((1, 3, 8, 32, 128) if GPU else (3,), (1, 16)):
            T = (4096 if B <= 32 else 700) if GPU else 20
            q = torch.randn(B, R, H, E, device=DEVICE).to(DTYPE)
            memory = torch.randn(2, B, T, K, E, device=DEVICE).to(DTYPE)
            keys, values = memory.transpose(2, 3)  # (B, K, T, E) each, as the cache has them on a GPU
            lengths = torch.randint(1, T + 1, (B,), device=DEVICE)
            lengths[0], lengths[-1] = 1, T
            visible = decode.visible_keys(lengths, keys, R)
            out, lse = decode.ragged_attention(q, keys, values, visible, merged=True)
            for b in {0, B // 2, B - 1}:
                n = int(lengths[b])
                k = keys[b, :, :n].double().repeat_interleave(H // K, 0)  # (H, n, E)
                v = values[b, :, :n].double().repeat_interleave(H // K, 0)
                scores = q[b].double().transpose(0, 1) @ k.mT / E**0.5  # (H, R, n)
                exact = (scores.softmax(-1) @ v).transpose(0, 1)  # (R, H, E)
                worst = max(worst, relative_error(out[b], exact))
                worst_lse = max(worst_lse, float((lse[b].double() - scores.logsumexp(-1).T).abs().max()))
        check(f"decoding, {H} heads, {K} for keys, of {E}: relative error", worst, most=8e-3)
        check(f"decoding, {H} heads, {K} for keys, of {E}: log-sum-exp", worst_lse, most=1e-2)
    for H, K in ((28, 4), (40, 8)) if GPU else ():
        for B, length in itertools.product((8, 32, 128), (256, 4096)):
            q = torch.randn(B, 1, H, 128, device=DEVICE, dtype=DTYPE)
            keys, values = torch.randn(2, B, 4096, K, 128, device=DEVICE, dtype=DTYPE).transpose(2, 3)
            visible = decode.visible_keys(torch.full((B,), length, device=DEVICE), keys)

            def step(q=q, keys=keys, values=values, visible=visible) -> None:
                decode.ragged_attention(q, keys, values, visible, merged=False)

            ms = device_milliseconds(step)
            speed = 4 * B * length * K * 128 / ms / 1e9  # two bytes of a key, two of a value
            say("INFO", f"decoding, {H} heads, {B} rows of {length}", f"{1e3 * ms:.0f} us, {speed:.2f} TB/s")


def packed() -> None:
    # The last sequence begins like the first, and shares these tokens with it.
    lengths = torch.tensor([70, 1, 129, 300] if GPU else [5, 1, 9, 7], device=DEVICE)
    alike = 50 if GPU else 2
    last = int(lengths[-1])
    before = int(lengths.sum()) - last
    layout = torch.cat([torch.arange(before), torch.arange(alike), before + torch.arange(last - alike)]).to(DEVICE)
    N = int(layout.max()) + 1
    for H, K, E in ((28, 4, 128), (12, 2, 128)) if GPU else ((4, 2, 8),):
        inputs = [torch.randn(1, N, heads, E, device=DEVICE).to(DTYPE) for heads in (H, K, K)]
        upstream = torch.randn(1, N, H, E, device=DEVICE)
        results = []
        for dtype in (torch.float32, DTYPE):
            _, attend = packed_attention(lengths, layout)
            qkv = [x.to(dtype).requires_grad_() for x in inputs]
            out = attend(0, *qkv)
            results.append([out, *torch.autograd.grad(out, qkv, upstream.to(dtype))])
        for name, exact, got in zip(("out", "dq", "dk", "dv"), *results, strict=True):
            check(f"packed attention, {H} heads, {name}: relative error", relative_error(got, exact), most=1.5e-2)
    for rows in ([16384], [1024] * 16) if GPU else ():
        qkv = [torch.randn(1, 16384, heads, 128, device=DEVICE, dtype=DTYPE).requires_grad_() for heads in (28, 4, 4)]
        upstream = torch.randn(1, 16384, 28, 128, device=DEVICE, dtype=DTYPE)
        _, attend = packed_attention(torch.tensor(rows, device=DEVICE))
        ms = milliseconds(lambda attend=attend, qkv=qkv, up=upstream: torch.autograd.grad(attend(0, *qkv), qkv, up), 5)
        operations = 3.5 * 4 * 28 * 128 * sum(n * n for n in rows) / 2  # backward is 2.5 times forward
        speed = f"{ms:.1f} ms, {operations / ms / 1e9:.0f} TFLOP/s"
        say("INFO", f"packed attention, forward and backward, {len(rows)} rows of {rows[0]}", speed)


def graphs() -> None:
    """Graphs and single steps draw the same, but for ties within rounding; what is recorded is what the trainer
    sees."""
    model = random_model(TWO_LAYERS, std=0.05)
    with torch.no_grad():
        model.head.mul_(2.7 if GPU else 20)  # logits of std 8, so that a nucleus is small
    prompts = [torch.randint(model.vocabulary, (3 + 13 * i % (300 if GPU else 20),)).tolist() for i in range(24)]
    limits = [1 + 37 * i % (200 if GPU else 12) for i in range(24)]
    settings = {"keys": [str(i) for i in range(24)], "num_samples": 2, "max_new_tokens": limits, "stop_ids": []}
    for top_p, temperature, share in ((1.0, 1.0, False), (0.9, 1.0, True), (1.0, 0.0, False), (1.0, 0.0, True)):
        name = f"top_p {top_p}, temperature {temperature}, prompts {'shared' if share else 'copied'}"
        drawn = []
        for captured in (True, False):
            engine = Sampler(model, 20, share_prompts=share)
            engine.graphs = captured
            drawn.append(engine.sample(prompts, top_p=top_p, temperature=temperature, **settings))
            if captured and GPU:
                expect(f"CUDA graphs, {name}", engine.graphs)
        pairs = [
            (a, b)
            for with_graphs, without in zip(*drawn, strict=True)
            for x, y in zip(with_graphs, without, strict=True)
            for a, b in zip(x.ids, y.ids, strict=True)
        ]
        check(f"tokens as without graphs, {name}", statistics.mean(a == b for a, b in pairs), least=0.5)
        gaps = []
        for prompt, group in zip(prompts, drawn[0], strict=True):
            for sample in group:
                ids = torch.tensor(prompt + sample.ids, device=DEVICE)
                targets = torch.tensor([-1] * (len(prompt) - 1) + sample.ids + [-1], device=DEVICE)
                with torch.no_grad():
                    logprobs, _ = model.packed(ids, torch.tensor([len(ids)], device=DEVICE), targets, temperature or 1)
                recorded = torch.tensor(sample.full_logprobs, device=DEVICE)
                gaps += (logprobs[targets >= 0] - recorded).abs().tolist()
        check(f"mean gap to the trainer's log-probs, {name}", statistics.mean(gaps), most=0.06)


def train() -> None:
    distributed.init_distributed("cuda" if GPU else "cpu")
    model = random_model(QWEN_1_5B, torch.float32)
    inference = random_model(QWEN_1_5B)
    reference = distributed.prepare_training(random_model(QWEN_1_5B).requires_grad_(False), False)
    model = distributed.prepare_training(model, True)
    distributed.copy_weights(inference, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=GPU)
    problems, G, T = (16, 8, 512) if GPU else (3, 4, 10)
    prompts = [torch.randint(model.vocabulary, (300 if GPU else 6,)).tolist() for _ in range(problems)]
    keys = [str(i) for i in range(problems)]
    started = time.time()
    engine = Sampler(inference, 128 if GPU else 8)
    groups = engine.sample(prompts, keys=keys, num_samples=G, max_new_tokens=T, stop_ids=[])
    say("INFO", "sampling, 1.5B, 128 rows", f"{engine.tokens / (time.time() - started):,.0f} tokens/s, captures included")
    settings = {"loss_norm": "token", "max_new_tokens": T, "micro_tokens": 16384 if GPU else 50, "temperature": 1.0}
    settings |= {"tis_cap": 0.0, "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 1e-3, "max_gap": 1.0, "lr": 1e-6}
    args = argparse.Namespace(**settings)
    advantages = [a.expand(T) for a in torch.randn(problems * G)]
    for step in range(3):
        rollouts = [
            grpo.Rollout(str(i), prompts[i], sample.ids, sample.logprobs, "", "length")
            for i, group in enumerate(groups)
            for sample in group
        ]
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        started = time.time()
        numbers = grpo.update_policy(model, optimizer, reference, rollouts, advantages, args)
        seconds = time.time() - started
        if step == 0:
            check("gap of sampler and trainer, nats per token", numbers["gap/mean"], most=0.03)
            check("k3 to the reference, which is the policy", abs(numbers["kl/k3"]), most=1e-3)
        elif GPU:
            tokens = sum(len(r.prompt) + len(r.ids) for r in rollouts)
            work = 10 * tokens * sum(p.numel() for p in inference.parameters())  # reference 2, forward 2 + 2, backward 4
            speed = f"{seconds:.2f} s, {tokens / seconds:,.0f} tokens/s, {work / seconds / 1e12:.0f} TFLOP/s"
            peak = f"peak {gib(torch.cuda.max_memory_allocated())}, reserved {gib(torch.cuda.max_memory_reserved())}"
            say("INFO", f"update {step}, 1.5B", f"{speed}, {peak}")
            say("INFO", "  of which in the head", f"{head_seconds(model, problems * G * T) / seconds:.0%}")


def head_seconds(model: Transformer, tokens: int) -> float:
    """Seconds that an update spends on the log-probs of so many tokens: policy forward and backward, reference
    forward."""
    rows = 16384
    hidden = torch.randn(rows, model.config.hidden_size, device=DEVICE, dtype=DTYPE).requires_grad_()
    weight = torch.randn(model.vocabulary, model.config.hidden_size, device=DEVICE, dtype=DTYPE).requires_grad_()
    targets = torch.randint(model.vocabulary, (rows,), device=DEVICE)
    upstream = torch.randn(rows, device=DEVICE)

    def log_probs_of_a_micro_batch() -> None:
        with torch.no_grad():
            logprob.token_logprobs(hidden, weight, targets, workspace=1 << 30)
        logprobs, _ = logprob.token_logprobs(hidden, weight, targets, workspace=1 << 30)
        torch.autograd.grad(logprobs, [hidden, weight], upstream)

    return milliseconds(log_probs_of_a_micro_batch, 3) / 1000 * tokens / rows


def tiny(out: Path) -> None:
    run = out / "tiny"
    shutil.rmtree(run, ignore_errors=True)
    python = [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    few = ["--limit", "24" if GPU else "3"]
    labels = f"{run}/verify/labels_step_consistency.jsonl"
    grpo_flags = ["--prm", f"{run}/prm", "--out", f"{run}/grpo", "--save_every", "1", "--heldout", ""]
    judge = ["processbench", "--model", f"{run}/prm", "--data", "data/tiny/processbench.jsonl", "--limit", "16"]
    commands = {
        "generate.py": [*torchrun, "generate.py", *few, "--out", f"{run}/solutions.jsonl"],
        "verify.py": [*python, "verify.py", "--solutions", f"{run}/solutions.jsonl", "--out", f"{run}/verify"],
        "train_prm.py": [*python, "train_prm.py", "--labels", labels, "--out", f"{run}/prm", "--epochs", "1"],
        "grpo.py": [*torchrun, "grpo.py", *grpo_flags, "--steps", "2"],
        "grpo.py, resumed": [*python, "grpo.py", *grpo_flags, "--steps", "3"],
        "evaluate.py": [*python, "evaluate.py", *judge, "--max_new_tokens", "200", "--out", f"{run}/bench.jsonl"],
    }
    for name, command in commands.items():
        started = time.time()
        device = ["--device", DEVICE.type]
        done = subprocess.run([*command, *device], capture_output=True, text=True, timeout=300, check=False)
        output = (done.stdout + done.stderr).strip().splitlines()
        expect(f"{name} on the tiny world", done.returncode == 0, f"{time.time() - started:.0f} s, {output[-1][-100:]}")
        for line in output if done.returncode else [line for line in output if "warn" in line.lower()]:
            print("      ", line[:300], flush=True)
    for line in (run / "grpo" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        check(f"gap of sampler and trainer, tiny, step {record['step']}", record["gap/mean"], most=0.02)


# --------------------------------------------------------------------------- speed and memory


def speed() -> None:
    model = random_model(QWEN_7B)

    def greedy(logits: Tensor, uniform: Tensor) -> tuple[Tensor, ...]:
        return sampler.choose_tokens(logits, uniform, 0.0, 1.0, 0)

    for rows in (8, 32, 128, 256) if GPU else (4,):
        time_steps(model, rows, greedy)
        logits = 2.5 * torch.randn(rows, model.vocabulary, device=DEVICE)
        uniform = torch.rand(rows, device=DEVICE, dtype=torch.float64)
        for name, drawing in (("greedy", (0.0, 1.0, 0)), ("temperature 1", (1.0, 1.0, 0)), ("top_p", (0.7, 0.95, 0))):
            ms = device_milliseconds(lambda d=drawing, z=logits, u=uniform: sampler.choose_tokens(z, u, *d))
            say("INFO", f"drawing, {rows} rows, {name}", f"{ms:.3f} ms")
    if GPU:
        profile_step(model, greedy)
    engine = Sampler(model, 128 if GPU else 4)
    limits = [100 + 41 * i % 900 for i in range(256)] if GPU else [2, 3, 4]
    prompts = [[i % 200] * (200 if GPU else 5) for i in range(len(limits))]
    for attempt in ("first call", "second call"):
        started = time.time()
        engine.sample(prompts, keys=[str(i) for i in range(len(limits))], max_new_tokens=limits, stop_ids=[])
        say("INFO", f"7B, {len(limits)} answers, 128 slots, {attempt}", f"{sum(limits) / (time.time() - started):,.0f} tokens/s")


@torch.no_grad()
def time_steps(model: Transformer, rows: int, choose: Callable) -> None:
    """Steps of so many rows, with a graph and without."""
    c = model.config
    weights = 2 * (sum(p.numel() for p in model.parameters()) - model.head.numel())  # bytes; of the embedding only rows
    length, filled = (2560, 1024) if GPU else (32, 4)
    cache = SlotCache(model, rows, length, choose, steps=8)

    def look() -> None:
        cache.decode([1] * rows, [filled] * rows, [[0.5] * rows] * 8)

    started = time.time()
    look()
    say("INFO", f"7B, {rows} rows: first look, capture included", f"{time.time() - started:.2f} s")
    ms = milliseconds(look, 5) / 8
    read = weights + rows * filled * 4 * c.num_layers * c.num_kv_heads * c.head_dim
    numbers = f"{ms:.2f} ms, {1e3 * rows / ms:,.0f} tokens/s, {read / ms / 1e9:.2f} TB/s of weights and keys"
    say("INFO", f"7B, {rows} rows: a step by graph, host included", numbers)
    cache.graphs = None
    ms = milliseconds(look, 2) / 8
    say("INFO", f"7B, {rows} rows: a step without a graph", f"{ms:.2f} ms")


def profile_step(model: Transformer, choose: Callable) -> None:
    """Which kernels a step of 32 rows consists of, those with the most time first."""
    from torch.profiler import ProfilerActivity, profile

    cache = SlotCache(model, 32, 2560, choose, steps=8)
    work = [1] * 32, [1024] * 32, [[0.5] * 32] * 8
    with torch.no_grad():
        cache.decode(*work)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            cache.decode(*work)
    kernels = sorted(profiler.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    total = sum(kernel.self_device_time_total for kernel in kernels)
    say("INFO", "7B, 32 rows: kernels of a step", f"{total / 8e3:.2f} ms, {sum(k.count for k in kernels) // 8} of them")
    for kernel in kernels[:12]:
        share = f"{100 * kernel.self_device_time_total / total:4.1f} % in {kernel.count // 8:4} calls"
        say("INFO", f"  {share}", kernel.key[:70])


def memory() -> None:
    """A sampler that takes as many slots as memory allows; then again, with other lengths, in the memory it left."""
    model = random_model(QWEN_14B)
    for length in (7800, 8192) if GPU else (12, 16):
        engine = Sampler(model, None if GPU else 3)
        new = length // 2
        answers = 96 if GPU else 4
        prompts = [[i + 1] * (length - new) for i in range(answers)]
        limits = [24] * (answers - 1) + [new]
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        started = time.time()
        keys = [str(i) for i in range(answers)]
        often = range(0, model.vocabulary, 3)  # a third of all tokens ends an answer
        stream = engine.stream(prompts, keys=keys, max_new_tokens=limits, stop_ids=often)
        finished = sum(1 for _ in stream)
        text = f"{finished} answers in {time.time() - started:.0f} s"
        if GPU:
            counts = torch.cuda.memory_stats()
            text += f", peak {gib(torch.cuda.max_memory_allocated())}, reserved {gib(torch.cuda.memory_reserved())}"
            text += f", {counts['num_alloc_retries']} retries, {counts['num_ooms']} out of memory"
        expect(f"14B, slots of {length} tokens from memory", finished == answers and engine.graphs, text)


# --------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/gpu", help="directory for gpu.txt and what the parts write")
    parts = {
        "env": lambda out: env(),
        "logprob": lambda out: log_probs(),
        "attention": lambda out: attention(),
        "packed": lambda out: packed(),
        "sampler": lambda out: graphs(),
        "train": lambda out: train(),
        "tiny": tiny,
        "speed": lambda out: speed(),
        "memory": lambda out: memory(),
    }
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        say("----", name)
        try:
            parts[name](out)
        except Exception as error:
            traceback.print_exc()
            say("FAIL", name, f"{type(error).__name__}: {str(error).splitlines()[0][:300]}")
            if isinstance(error, torch.AcceleratorError):
                say("FAIL", "the rest", "after such an error nothing more runs on this GPU in this process")
                break
        if GPU:
            gc.collect()
            torch.cuda.empty_cache()
    (out / "gpu.txt").write_text("\n".join(lines) + "\n")
    failures = [line for line in lines if " FAIL " in line]
    print("\n".join(failures) or "no failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
