"""The fused log-prob op against the bare matrix products and what else there is: time, memory, error.

    python -m tests.bench_logprob                                    # CPU, fp32: 2048 x 896 x 151936 (Qwen2.5-0.5B's head)
    python -m tests.bench_logprob --shape 8192,3584,152064 --shape 32768,3584,152064 --repeats 30     # on a GPU, bf16
    python -m tests.bench_logprob --only "bare products" "ours, keep = 0"

Everybody gets the same inputs and the same gradient per token, at temperature 1, and returns log-probabilities; only
ours returns the entropy, too. Providers take turns, so that a machine's drift meets all of them; the bare products come
first and last in each round. Time: median. Memory: the peak above inputs and gradients; on the CPU of the whole
process, which counts what the matrix library packs. Errors: against fp64 on the same inputs, at 512 rows. A provider
that isn't installed, or doesn't fit into memory, is a row that says so.
"""

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from kernels.logprob import token_logprobs

import torch
import torch.nn.functional as F
from torch import Tensor

Provider = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, D), weight (V, D), targets (N,) -> log-probs (N,)
ERROR_ROWS = 512


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What everybody writes first: all logits, rounded to the inputs' dtype, then log_softmax in fp32."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def naive_fp32(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same with the product in fp32: exact, and without tensor cores."""
    return naive(hidden.float(), weight.float(), targets)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy (Triton)."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Apple's cut cross-entropy without its gradient filter (Triton)."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce_exact")


def builtin(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own, from 2.13; with options it walks over rows in chunks, of 256 on a CPU, where its own choice is
    two."""
    options = torch.nn.LinearCrossEntropyOptions(**({} if hidden.is_cuda else {"batch_chunk_size": 256}))
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def providers(N: int, V: int, cuda: bool) -> dict[str, Provider]:
    """Name -> function, in the order of the table."""
    workspace = (1 << 30) if cuda else (256 << 20)

    def ours(**flags) -> Provider:
        return lambda h, w, t: token_logprobs(h, w, t, workspace=workspace, **flags)[0]

    half_rows = lambda h, w, t: ours()(h, w, t) * (torch.arange(len(t), device=t.device) % 2)  # noqa: E731
    found = {"naive": naive}
    if cuda:
        found |= {"naive, fp32 product": naive_fp32, "naive, compiled": torch.compile(naive)}
        found |= {"Liger": liger, "CCE, exact": cce}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found |= {"PyTorch's linear_cross_entropy": builtin}
    if cuda:
        found |= {"ours, PyTorch passes": ours(eager=True)}
    keep_all = {"ours, keep = all": ours(keep=4 * N * V)}
    return found | {"ours, keep = 0": ours()} | keep_all | {"ours, half the rows without gradient": half_rows}


def measure(work: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds and bytes of peak memory above what was there."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts again from what is resident now
    before, start = memory_line("VmRSS"), time.perf_counter()
    work()
    return time.perf_counter() - start, memory_line("VmHWM") - before


def memory_line(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def errors(provider: Provider, inputs: list[Tensor], upstream: Tensor, exact: list[Tensor]) -> str:
    """Greatest error of a log-probability, and relative Frobenius errors of dH and dW, against fp64."""
    h, w = (x.detach().requires_grad_() for x in inputs[:2])
    logprobs = provider(h, w, inputs[2])
    got = [logprobs.detach(), *torch.autograd.grad(logprobs, [h, w], upstream.to(logprobs.dtype))]
    if got[1].count_nonzero(1).eq(0).any():  # the provider that leaves out half of the rows
        return "- | - | -"
    relative = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got[1:], exact[1:], strict=True)]
    return f"{float((got[0].double() - exact[0]).abs().max()):.1e} | {relative[0]:.1e} | {relative[1]:.1e}"


def compare(N: int, D: int, V: int, dtype: torch.dtype, device: torch.device, repeats: int, only: list[str]) -> None:
    """One table: a row for each provider, the bare products of the same rounds as the denominator."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    hidden, weight = (3 * random(N, D)).to(dtype).requires_grad_(), (random(V, D) / D**0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator, device=device)
    upstream = random(N)
    gradients = hidden.nbytes + weight.nbytes  # every provider has to make these: no extra memory
    dw = torch.empty_like(weight)

    few = slice(0, min(N, ERROR_ROWS))
    h, w = hidden[few].detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    log_p = (h @ w.T).log_softmax(-1).gather(1, targets[few, None])[:, 0]
    exact = [log_p.detach(), *torch.autograd.grad(log_p, [h, w], upstream[few].double())]
    del h, w, log_p

    halves = {"out_dtype": torch.float32} if dtype != torch.float32 else {}
    C = min(V, 32768)  # the bare products, too, in slices: all of the logits may not fit

    def bare(parts: str) -> None:
        """Products only: l the logits, h dH, w dW."""
        with torch.no_grad():
            g = torch.empty(N, C, dtype=dtype, device=device) if "h" in parts or "w" in parts else None
            for start in range(0, V, C):
                s = weight[start : start + C]
                for part in parts:
                    if part == "l":
                        torch.mm(hidden, s.T, **halves)
                    elif part == "h":
                        torch.mm(g[:, : len(s)], s, **halves)
                    else:
                        torch.mm(g[:, : len(s)].T, hidden, out=dw[start : start + C])

    def both(provider: Provider) -> None:
        torch.autograd.grad(provider(hidden, weight, targets), [hidden, weight], upstream)

    def forward(provider: Provider) -> None:
        with torch.no_grad():
            provider(hidden, weight, targets)

    table = {name: f for name, f in providers(N, V, device.type == "cuda").items() if not only or name in only}
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in table}
    products: list[tuple[float, float, float]] = []
    problems: dict[str, str] = {}
    for _ in range(repeats + 1):  # the first round warms up
        products.append(tuple(measure(lambda parts=parts: bare(parts), device)[0] for parts in ("l", "lhw", "llhw")))
        for name, provider in table.items():
            if name in problems:
                continue
            try:
                seconds = measure(lambda provider=provider: forward(provider), device)[0]
                times[name].append((seconds, *measure(lambda provider=provider: both(provider), device)))
            except (ImportError, torch.OutOfMemoryError, RuntimeError, TypeError) as problem:
                problems[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:80]}"
                torch.cuda.empty_cache()
        products.append(tuple(measure(lambda parts=parts: bare(parts), device)[0] for parts in ("l", "lhw", "llhw")))
    logits, kept, recomputed = (statistics.median(x) for x in zip(*products[2:], strict=True))

    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{N} x {D} x {V}, {str(dtype)[6:]}, {machine}, torch {torch.__version__}, {repeats} rounds")
    print("| | forward | forward + backward | memory | error of log p | dH | dW |\n|---|---|---|---|---|---|---|")
    print(f"| bare products, 2NDV / 6NDV | {show(logits)} | {show(kept)} | - | - | - | - |")
    print(f"| bare products, 2NDV / 8NDV | {show(logits)} | {show(recomputed)} | - | - | - | - |")
    for name, provider in table.items():
        if name in problems:
            print(f"| {name} | not measured: {problems[name]} | | | | | |")
            continue
        f, b, m = (statistics.median(x) for x in zip(*times[name][1:], strict=True))
        row = f"| {name} | {show(f)} ({f / logits:.2f}) | {show(b)} ({b / kept:.2f}, {b / recomputed:.2f}) | {(m - gradients) / 2**30:.2f} GiB | "
        print(row + errors(provider, [hidden[few], weight, targets[few]], upstream[few], exact) + " |", flush=True)


def show(seconds: float) -> str:
    """Milliseconds or seconds with three digits."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def main() -> None:
    """Parse flags, print a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="N,D,V; repeatable")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="names of the table's rows")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    for package in ("liger-kernel", "cut-cross-entropy"):
        try:
            print(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            print(package, "isn't installed")
    for shape in args.shape or ["2048,896,151936"]:
        compare(*map(int, shape.split(",")), dtype, device, args.repeats, args.only)


if __name__ == "__main__":
    main()
