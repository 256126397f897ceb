"""The fused token log-probability against full logits in fp64: values, gradients, memory, bad input.

Most tests run three times: with the PyTorch passes, with the CUDA kernels of logprob.cu compiled for this machine's
processor, one thread of a block after the other (where there is a C++ compiler), and on a GPU (where there is one).
"""

import contextlib
import ctypes
import math
import shutil
import subprocess
from functools import partial
from pathlib import Path

from kernels import logprob
from kernels.logprob import token_logprobs

import pytest
import torch

SOURCE = Path(logprob.__file__).with_suffix(".cu")
cuda_only = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# logprob.cu as C++: a block's threads are coroutines that change at __syncthreads(). `backwards` starts with the last
# thread: a race would then give another result.
EMULATOR = """
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#define __global__
#define __device__
#define __shared__ static
#define __syncthreads() swapcontext(&threads[threadIdx.x], &scheduler)
static struct { unsigned x; } threadIdx, blockIdx;
static ucontext_t scheduler, threads[1024];
static unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
#include "%s"
static std::function<void()> body;
static bool finished[1024];
static void run_thread() { body(); finished[threadIdx.x] = true; }
static void launch(int grid, bool backwards, std::function<void()> kernel) {
  static char stacks[THREADS][1 << 15];
  body = kernel;
  for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
    for (int i = 0; i < THREADS; i++) {
      getcontext(&threads[i]);
      threads[i].uc_stack.ss_sp = stacks[i], threads[i].uc_stack.ss_size = sizeof stacks[i];
      threads[i].uc_link = &scheduler, finished[i] = false;
      makecontext(&threads[i], run_thread, 0);
    }
    for (int done = 0; !done;) {
      for (int i = 0; i < THREADS; i++) {
        threadIdx.x = backwards ? THREADS - 1 - i : i;
        swapcontext(&scheduler, &threads[threadIdx.x]);
        done += finished[threadIdx.x];
      }
      if (done && done != THREADS) abort();  // a barrier that only some threads reach
    }
  }
}
extern "C" void emulate_merge_slice(int grid, int backwards, const float* z, const long long* t, float* state, int columns,
                              int start, double scale) {
  launch(grid, backwards, [=] { merge_slice(z, t, state, columns, start, scale); });
}
extern "C" void emulate_slice_gradient(int grid, int backwards, const float* z, const long long* t, const float* rows, void* g,
                                 int columns, int start, double scale, int bf16) {
  launch(grid, backwards, [=] { slice_gradient(z, t, rows, g, columns, start, scale, bf16); });
}
"""


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """launch(name, grid, block, args) of the kernels of logprob.cu, on tensors of the CPU."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "emulator.cpp").write_text(EMULATOR % SOURCE)
    command = [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "emulator.cpp", "-o", "emulator.so"]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    library = ctypes.CDLL(str(folder / "emulator.so"))

    def argument(x):
        """As torch.cuda._compile_kernel's callable passes it: a pointer, an int of 32 bits, a double."""
        assert not isinstance(x, torch.Tensor) or x.is_contiguous()  # a kernel knows nothing of strides
        if isinstance(x, torch.Tensor):
            return ctypes.c_void_p(x.data_ptr())
        return ctypes.c_int(x) if isinstance(x, int) else ctypes.c_double(x)

    def launch(name, grid, block, args, backwards=False):
        assert grid[0] > 0 and grid[1:] == (1, 1) and block == (logprob.THREADS, 1, 1)
        getattr(library, f"emulate_{name}")(grid[0], int(backwards), *map(argument, args))

    return launch


@pytest.fixture
def emulated(emulator, monkeypatch):
    """(merge_slice, slice_gradient) as on a GPU, launched there."""
    monkeypatch.setattr(torch.cuda, "_compile_kernel", lambda source, name: partial(emulator, name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    logprob.cuda_passes.cache_clear()
    yield logprob.cuda_passes(torch.device("cpu"))
    logprob.cuda_passes.cache_clear()


@pytest.fixture(params=["pytorch", "logprob.cu on the CPU", pytest.param("cuda", marks=cuda_only)])
def device(request, monkeypatch):
    """Where the op runs, and with which passes."""
    if request.param == "logprob.cu on the CPU":
        found = request.getfixturevalue("emulated")
        assert found[0] is not logprob.merge_slice
        monkeypatch.setattr(logprob, "passes", lambda hidden, eager: found)
    return torch.device("cuda" if request.param == "cuda" else "cpu")


def reference(hidden, weight, targets, temperature=1.0):
    """(logprobs, entropy) in fp64 from the whole (N, V) logits; rows with a negative target are 0."""
    log_p = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    ignored = targets < 0
    chosen = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = torch.distributions.Categorical(logits=log_p, validate_args=False).entropy()
    return chosen.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def columns(count, rows):
    """The workspace (or keep) in bytes that holds `count` columns of fp32 logits for `rows` rows."""
    return 4 * rows * count


def random_case(N, V, D, dtype=torch.float32, device="cpu", scale=1.0):
    """hidden, weight (leaves) and targets: the first and last column first, some of them ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(N, D, generator=generator, dtype=torch.float64)).to(device, dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[:1], targets[2:3], targets[1::4] = 0, V - 1, -100
    return hidden, weight, targets.to(device)


def gradients(outputs, inputs, upstream):
    """d(outputs . upstream) / d inputs; the upstream gradients in the dtype of their outputs."""
    return torch.autograd.grad(outputs, inputs, [u.to(x) for u, x in zip(upstream, outputs, strict=True)])


@pytest.mark.parametrize("slice_columns", [1, 4, 7, 10, 100])
@pytest.mark.parametrize("kept_columns", [0, 5, 10])
def test_gradcheck(slice_columns, kept_columns):
    """A wrong derivative of either output at any slicing: the target's +1 in the wrong slice, temperature missing
    in one factor, entropy's running moment not rescaled, a kept slice taken for another, ignored rows leaking, rows of
    zero upstream gradient that shift the others."""
    hidden, weight, _ = random_case(N=6, V=10, D=3, dtype=torch.float64)
    targets = torch.tensor([0, -1, 9, 3, -100, 7])  # first and last column, two in between, two ignored
    sizes = {"workspace": columns(slice_columns, rows=6), "keep": columns(kept_columns, rows=6)}
    mask = torch.tensor([1.0, 1, 0, -2, 1, 0.5], dtype=torch.float64)  # row 2: a zero
    op = lambda h, w: tuple(mask * x for x in token_logprobs(h, w, targets, 0.7, **sizes))  # noqa: E731
    assert torch.autograd.gradcheck(op, (hidden, weight))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("slice_columns", [13, 1000])
def test_values_and_gradients_are_those_of_the_full_logits(slice_columns, temperature, device):
    """A merge of slices that loses mass or the temperature; the entropy's gradient dropped, as in TRL; fp32 sums
    instead of fp32 accuracy; inputs written to."""
    hidden, weight, targets = random_case(N=16, V=97, D=24, device=device)
    before = [x.detach().clone() for x in (hidden, weight, targets)]
    outputs = token_logprobs(hidden, weight, targets, temperature, workspace=columns(slice_columns, rows=16))
    wanted = reference(hidden, weight, targets, temperature)
    for got, exact in zip(outputs, wanted, strict=True):
        assert got.dtype == torch.float32 and got.shape == (16,)
        torch.testing.assert_close(got.double(), exact, rtol=5e-6, atol=5e-6)
        assert (got[targets < 0] == 0).all()
    upstream = torch.linspace(-1, 2, 16), torch.linspace(2, -0.5, 16)
    results = (gradients(x, [hidden, weight], upstream) for x in (outputs, wanted))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
    for x, copy in zip((hidden, weight, targets), before, strict=True):
        assert torch.equal(x.detach(), copy)


RAGGED = [(0, 10, 8, 3), (1, 1, 8, 1), (3, 2, 123, 1), (127, 507, 8, 100), (129, 1000, 123, 999), (3, 5000, 8, 2049)]


@pytest.mark.parametrize("N, V, D, slice_columns", RAGGED)
def test_ragged_shapes(N, V, D, slice_columns, device):
    """Sizes that no tile divides: phantom columns that add exp(0) to the sum (log-probabilities of +123 in verl), a
    target in the first or last column of a slice that is missed, no rows at all. Memory that nobody wrote holds nan
    here."""
    hidden, weight, targets = random_case(N, V, D, device=device, scale=3.0)  # peaked: flat logits hide phantom columns
    if N > 100:
        targets[4:8] = torch.tensor([slice_columns - 1, slice_columns, 2 * slice_columns, V - 1]).clamp(max=V - 1)
    upstream = torch.linspace(-1, 2, N), torch.linspace(2, -0.5, N)
    with poison():
        outputs = token_logprobs(hidden, weight, targets, workspace=columns(slice_columns, max(N, 1)))
        got = gradients(outputs, [hidden, weight], upstream)
    wanted = reference(hidden, weight, targets)
    for x, exact in zip((*outputs, *got), (*wanted, *gradients(wanted, [hidden, weight], upstream)), strict=True):
        torch.testing.assert_close(x.double(), exact.double(), rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def poison():
    """torch.empty gives nan."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1000).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999])
def test_the_gradient_of_a_likely_target(probability, device):
    """p rounded before the one is subtracted: at p = 0.999 nothing of 1 - p is left in bf16. One planted row of the
    weight points along the hidden state, so that the target has this probability; its gradient is looked at alone."""
    N, V, D = 4, 300, 16
    hidden, weight, targets = random_case(N, V, D, dtype=torch.bfloat16, device=device)
    targets[:] = 7
    with torch.no_grad():
        hidden[:] = hidden[0]
        others = (hidden[0].double() @ weight.double().T)[torch.arange(V, device=device) != 7].logsumexp(0)
        wanted = others + math.log(probability / (1 - probability))
        weight[7] = (hidden[0].double() * wanted / hidden[0].double().square().sum()).to(weight.dtype)
    outputs = token_logprobs(hidden, weight, targets, workspace=columns(50, N))
    exact = reference(hidden, weight, targets)
    assert abs(exact[0][0].exp() - probability) < 0.2 * (1 - probability) + 0.01
    upstream = torch.ones(N), torch.zeros(N)
    (dw,), (exact_dw,) = gradients(outputs, [weight], upstream), gradients(exact, [weight], upstream)
    error = (dw[7].double() - exact_dw[7].double()).norm() / exact_dw[7].double().norm()
    assert error < 6e-3  # of one rounding to bf16, 2^-8 at most in each element, and of the products'


@pytest.mark.parametrize("descending", [False, True])
def test_peaked_and_offset_logits(descending, device):
    """exp overflowing, 0 * inf in a rescaled moment, and rounding: a logsumexp stored as one fp32 number next to
    logits of 4096 is off by up to 2.4e-4, next to 2^24 by 1. Logits are exact here, so only the op itself can round."""
    ladder = torch.tensor([0.0, 0.125, 0.5, 1.0, 2.0, 3.25])  # + 4096: still exact in fp32
    cliff = torch.tensor([0.0, -3e4, -200.0, 0.0, -90.0, -3e4])  # two winners, everything else vanishes
    even = torch.tensor([2.0**24, 0, 0, 2.0**24, 0, 0])  # log 1/2 has to stay log 1/2
    rows = torch.stack([ladder + 4096, ladder - 4096, cliff, cliff * 1e30, torch.zeros(6), even, 1e4 * (ladder - 1)])
    weight = (rows.flip(1) if descending else rows).T.contiguous().to(device).requires_grad_()  # (V, D)
    hidden = torch.eye(7, device=device, requires_grad=True)
    targets = torch.tensor([2, 2, 0, 5, 1, 2 if descending else 0, 3], device=device)
    for slice_columns in (1, 2, 6):
        outputs = token_logprobs(hidden, weight, targets, workspace=columns(slice_columns, rows=7))
        wanted = reference(hidden, weight, targets)
        for got, exact in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(outputs[1][4].cpu(), torch.tensor(math.log(6)))
        torch.testing.assert_close(outputs[0][5].cpu(), -torch.tensor(math.log(2)))
        upstream = torch.tensor([1.0, -2.0, 0.5, 1.5, 3.0, 1, 1]), torch.tensor([0.0, 0.5, -2.0, 1.0, 0.25, 1, 1])
        upstream = [x.to(device) for x in upstream]
        (got,), (exact,) = gradients(outputs, [weight], upstream), gradients(wanted, [weight], upstream)
        torch.testing.assert_close(got, exact, rtol=2e-6, atol=2e-6)


def test_infinite_and_undefined_logits_stay_where_they_are(device):
    """A masked token (a logit of -inf) that turns its row to nan through 0 * inf, and one nan that spreads to other
    rows or is swallowed by a maximum that ignores it."""
    hidden, weight, targets = random_case(N=6, V=9, D=9, device=device)
    targets = torch.tensor([0, 3, 8, 1, 2, 5], device=device)
    with torch.no_grad():
        weight.copy_(torch.eye(9))  # hidden states are the logits
        hidden[0, 2] = hidden[2, 0] = hidden[2, 1] = -1e38
        hidden[4, 7] = torch.nan
    keeps = torch.tensor([0, 1, 2, 3, 5], device=device)
    for slice_columns in (1, 4, 9):
        z = hidden.detach().clone()
        z[z == -1e38] = -torch.inf
        got, exact = torch.zeros(6, 4, device=device), z.double().log_softmax(1)
        got[:, 0] = logprob.LOWEST
        state, (merge, gradient) = got, logprob.passes(z, False)
        for start in range(0, 9, slice_columns):  # the passes themselves: a product would make 0 * inf = nan first
            merge(z[:, start : start + slice_columns].contiguous(), targets, state, start, 1.0)
        top, total, moment, chosen = state.double().unbind(1)
        entropy = total.log() - moment / total
        torch.testing.assert_close((chosen - top - total.log())[keeps], exact.gather(1, targets[:, None])[keeps, 0])
        p = exact.exp()
        torch.testing.assert_close(entropy[keeps], -torch.special.xlogy(p, p).sum(1)[keeps])
        assert state[4].isnan().any() and not state[keeps].isnan().any()
        values = torch.stack([top, total.log(), entropy, torch.ones_like(top), torch.ones_like(top)], 1).float()
        g = torch.empty_like(z)
        gradient(z, targets, values, g, 0, 1.0)
        assert g[4].isnan().any() and not g[keeps].isnan().any() and g[0, 2] == 0
    one = token_logprobs(hidden, weight, targets)[0]
    assert one[4].isnan() and not one[keeps].isnan().any()


def test_upstream_gradients_of_any_form(device):
    """A stride of zero (which .sum() sends) or two read as if it were one, a missing gradient of one output, a second
    backward pass over logits that the first has overwritten, products made for a frozen input."""
    hidden, weight, targets = random_case(N=9, V=20, D=5, device=device)
    wanted = reference(hidden, weight, targets)
    for keep in (0, columns(8, 9), columns(20, 9)):
        outputs = token_logprobs(hidden, weight, targets, workspace=columns(8, 9), keep=keep)
        for chosen in ([0], [1], [0, 1]):
            for upstream in (torch.ones(1, device=device).expand(9), torch.arange(-9.0, 9, device=device)[::2]):
                for _ in range(2):  # twice through the same graph
                    results = []
                    for one, dtype in ((outputs, torch.float32), (wanted, torch.float64)):
                        sent = [upstream if dtype == torch.float32 else upstream.double()] * len(chosen)
                        results.append(torch.autograd.grad([one[i] for i in chosen], [hidden, weight], sent, True))
                    for a, b in zip(*results, strict=True):
                        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    full = gradients(wanted, [hidden, weight], [torch.ones(9, device=device)] * 2)
    for frozen in (0, 1):
        inputs = [x.detach().requires_grad_(i != frozen) for i, x in enumerate((hidden, weight))]
        sum(token_logprobs(*inputs, targets)).sum().backward()
        assert inputs[frozen].grad is None
        torch.testing.assert_close(inputs[1 - frozen].grad, full[1 - frozen], rtol=1e-5, atol=1e-5)


def test_ignored_and_unweighted_rows_touch_nothing(device):
    """A prompt or padding row (target -1) or a row of zero upstream gradient that poisons the rest: 0 * inf from a
    hidden row that isn't finite gives nan in every row of dW if the row takes part in the products."""
    hidden, weight, targets = random_case(N=8, V=11, D=4, device=device)
    clean = hidden.detach().clone()
    with torch.no_grad():
        hidden[1], hidden[2] = torch.nan, torch.inf
        clean[1:3] = 0.0
    clean.requires_grad_()
    targets[1], targets[2] = -1, 5  # row 1 is ignored; row 2 counts, with weight 0
    upstream = torch.linspace(-1, 2, 8, device=device)
    upstream[2] = 0.0

    def both(hidden, keep):
        logprobs, entropy = token_logprobs(hidden, weight, targets, workspace=columns(4, rows=8), keep=keep)
        return logprobs, entropy, *torch.autograd.grad([logprobs, entropy], [hidden, weight], [upstream, upstream])

    for keep in (0, columns(4, 8), columns(11, 8)):
        logprobs, entropy, dh, dw = both(hidden, keep)
        assert logprobs[1] == 0 and entropy[1] == 0 and (dh[1:3] == 0).all()
        _, _, clean_dh, clean_dw = both(clean, keep)
        torch.testing.assert_close(dh, clean_dh, rtol=0, atol=1e-6)
        torch.testing.assert_close(dw, clean_dw, rtol=0, atol=1e-6)
        everything, few = token_logprobs(clean, weight, targets.clamp(min=0)), token_logprobs(clean, weight, targets)
        counted = targets >= 0
        torch.testing.assert_close(everything[0][counted], few[0][counted], rtol=0, atol=1e-6)

    for nothing in (torch.full((8,), -1), torch.empty(0, dtype=torch.long)):  # all ignored, and no rows at all
        outputs = token_logprobs(clean[: len(nothing)], weight, nothing.to(device))
        dh, dw = torch.autograd.grad(sum(outputs).sum(), [clean, weight])
        assert not any(x.any() for x in (*outputs, dh, dw))


def test_bf16_is_accumulated_in_fp32(device):
    """Logits rounded to bf16 (errors of 1e-2), or dH summed over slices in bf16, or dW over rows: judged against what
    one rounding of the exact result costs."""
    hidden, weight, targets = random_case(N=256, V=500, D=32, dtype=torch.bfloat16, device=device)
    outputs = token_logprobs(hidden, weight, targets, workspace=columns(100, rows=256))
    wanted = reference(hidden, weight, targets)
    for got, exact, bound in zip(outputs, wanted, (1e-4, 2e-4), strict=True):
        assert got.dtype == torch.float32 and (got.double() - exact).abs().max() < bound
    upstream = torch.linspace(-1, 2, 256, device=device), torch.linspace(0.5, -0.5, 256, device=device)
    double = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = gradients(reference(*double, targets), double, upstream)
    for got, full in zip(gradients(outputs, [hidden, weight], upstream), exact, strict=True):
        assert got.dtype == torch.bfloat16
        once = (full.to(torch.bfloat16).double() - full).norm()
        # on a GPU the gradient of the logits is rounded, too, for the tensor cores
        assert (got.double() - full).norm() < (1.8 if device.type == "cuda" else 1.01) * once
        assert (got.double() - full).norm() < 3e-3 * full.norm()


def test_bf16_rounding_of_the_kernel(emulator):
    """Truncation instead of rounding to nearest even, and a nan whose bits carry over into infinity or a number."""
    generator = torch.Generator().manual_seed(0)
    z, targets = torch.randn(3, 5000, generator=generator), torch.tensor([0, 4999, 17])
    z[2, 5] = torch.nan
    p = z.log_softmax(1)
    values = torch.stack([z[:, 0] * 0, -p[:, 0] + z[:, 0], -(p.exp() * p).sum(1), torch.ones(3), torch.ones(3)], 1)
    values[2, 1:3] = 1.0
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for backwards in (False, True):
            results[dtype, backwards] = torch.empty(3, 5000, dtype=dtype)
            arguments = [z, targets, values, results[dtype, backwards], 5000, 0, 1 / 0.7, int(dtype == torch.bfloat16)]
            emulator("slice_gradient", (3 * 5, 1, 1), (256, 1, 1), arguments, backwards)
        assert torch.equal(results[dtype, False].nan_to_num(9), results[dtype, True].nan_to_num(9))
    rounded, kernel = results[torch.float32, False].bfloat16(), results[torch.bfloat16, False]
    assert torch.equal(rounded.nan_to_num(9), kernel.nan_to_num(9)) and kernel.isnan().sum() == 1


def test_the_kernels_have_no_race(emulator):
    """A barrier too few in the reduction: the order in which threads run would show."""
    z = torch.randn(2, 3001, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3000, 4])
    states = []
    for backwards in (False, True):
        state = torch.zeros(2, 4)
        state[:, 0] = logprob.LOWEST
        for start in (0, 1500):
            part = z[:, start : start + 1501].contiguous()
            arguments = [part, targets, state, part.shape[1], start, 2.0]
            emulator("merge_slice", (2, 1, 1), (256, 1, 1), arguments, backwards)
        states.append(state)
    assert torch.equal(*states)


def test_the_kernels_compile(tmp_path):
    """What a C++ compiler lets pass and nvcc doesn't; registers spilled to memory. No GPU is needed for it."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    assert len(SOURCE.read_text().splitlines()) <= 90 and "#include" not in SOURCE.read_text()
    for architecture in ("sm_80", "sm_90"):
        command = ["nvcc", "-cubin", f"-arch={architecture}", "-Xptxas=-v", SOURCE, "-o", tmp_path / "cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
        assert report.count("0 bytes spill stores, 0 bytes spill loads") == 2, report


def test_other_weights(device):
    """A weight in fp32 beside hidden states in bf16, whose gradient has to come back in fp32; one that is also the
    embedding, whose two gradients add up; one that is a part of a larger tensor."""
    hidden, weight, targets = random_case(N=12, V=30, D=8, dtype=torch.bfloat16, device=device)
    master = weight.detach().float().requires_grad_()
    upstream = [torch.linspace(-1, 2, 12, device=device)] * 2
    (got,) = gradients(token_logprobs(hidden, master, targets), [master], upstream)
    (exact,) = gradients(reference(hidden, master, targets), [master], upstream)
    assert got.dtype == torch.float32
    assert (got - exact).norm() < (3e-3 if device.type == "cuda" else 1e-5) * exact.norm()

    _, tied, _ = random_case(N=1, V=30, D=8, device=device)
    ids = torch.arange(12, device=device)
    (got,) = gradients(token_logprobs(tied[ids], tied, targets), [tied], upstream)
    (exact,) = gradients(reference(tied[ids], tied, targets), [tied], upstream)
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)

    part, targets = tied[3:20, ::2], targets.clamp(max=16)
    (got,) = gradients(token_logprobs(tied[ids, ::2], part, targets), [tied], upstream)
    (exact,) = gradients(reference(tied[ids, ::2], part, targets), [tied], upstream)
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


def test_the_same_bits_again_and_the_same_result_for_any_slices(device):
    """Atomic additions or unordered sums; results that hang on the workspace."""
    hidden, weight, targets = random_case(N=33, V=700, D=16, device=device, scale=0.2)
    results = []
    for slice_columns, keep in ((700, 0), (700, 0), (256, 0), (100, 0), (100, 300), (700, 700)):
        sizes = {"workspace": columns(slice_columns, 33), "keep": columns(keep, 33)}
        outputs = token_logprobs(hidden, weight, targets, **sizes)
        results.append([*outputs, *gradients(outputs, [hidden, weight], [torch.ones(33, device=device)] * 2)])
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    for other in results[2:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


def test_custom_operators():
    """An operator whose fake twin returns other shapes, writes to its inputs or returns them: torch.compile would
    believe it."""
    hidden, weight, targets = random_case(N=12, V=30, D=8)
    targets = targets.clamp(min=0)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for keep in (0, columns(30, 12)):
        arguments = [hidden.detach(), weight.detach(), targets, 0.7, columns(7, 12), keep, False]
        torch.library.opcheck(torch.ops.spark.logprob_forward.default, arguments, test_utils=checks)
        _, *saved = torch.ops.spark.logprob_forward(*arguments)
        for need in ((True, True), (True, False), (False, True)):
            rest = [torch.ones(12), torch.ones(12), 0.7, columns(7, 12), False, *need]
            torch.library.opcheck(
                torch.ops.spark.logprob_backward.default, [*arguments[:3], *saved, *rest], test_utils=checks
            )


def test_compiled_as_one_graph():
    """A graph break at the op, or gradients that differ under torch.compile."""
    hidden, weight, targets = random_case(N=12, V=30, D=8)

    def loss(hidden, weight):
        sizes = {"workspace": columns(7, 12), "keep": columns(14, 12)}
        logprobs, entropy = token_logprobs(2 * hidden, weight, targets, 0.7, **sizes)
        return (logprobs * logprobs + 0.1 * entropy).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(hidden, weight)
        results.append([value, *torch.autograd.grad(value, [hidden, weight])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def allocated_peak(work, device):
    """Bytes that `work` allocates at most, beyond what is there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(sum(sizes[: i + 1]) for i in range(len(sizes)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda_only)])
@pytest.mark.parametrize("kept_slices", [0, 2, 8])
def test_logits_never_exist_and_keep_is_what_it_says(kept_slices, device, monkeypatch):
    """The (N, V) logits in memory after all, whole or as the sum of what is saved; a workspace that isn't obeyed; a
    keep that saves slices and computes them again all the same. The bound: 1.6 workspaces and 8 N D bytes beside the
    gradients."""
    N, V, D, C = 1024, 8192, 8, 1024
    hidden, weight, targets = random_case(N, V, D, device=device)
    products = []

    def counted(a, b, out, product=logprob.product):
        products.append(out.shape)
        return product(a, b, out)

    monkeypatch.setattr(logprob, "product", counted)
    sizes = {"workspace": columns(C, N), "keep": columns(C * kept_slices, N)}
    upstream = torch.ones(N, device=device)

    def both_passes():
        torch.autograd.grad(token_logprobs(hidden, weight, targets, **sizes)[0], [hidden, weight], upstream)

    both_passes()  # lets libraries allocate what they keep
    products.clear()
    peak = allocated_peak(both_passes, device)
    blocks = 0 if device == "cuda" else 4 * 4 * logprob.CACHED  # the PyTorch passes' copies of a block of rows
    gradient_bytes = hidden.nbytes + weight.nbytes
    small = 64 * N  # what is saved for each row
    assert peak <= 1.6 * sizes["workspace"] + sizes["keep"] + 8 * N * D + gradient_bytes + small + blocks
    assert max(shape.numel() for shape in products) <= C * N
    assert sum(shape[1] == C for shape in products) == 2 * V // C - kept_slices
    with torch.no_grad():
        peak = allocated_peak(lambda: token_logprobs(hidden, weight, targets, **sizes), device)
        assert peak <= 1.1 * sizes["workspace"] + 4 * N * D + small + blocks  # nothing is kept without a backward pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("N, V, D", [(70_000, 1000, 64), (15_000, 151_936, 64)])
def test_beyond_32_bits_and_65535_rows(N, V, D):
    """Row numbers in a grid dimension that ends at 65,535, and N * V offsets that overflow 32 bits."""
    hidden, weight, targets = random_case(N, V, D, dtype=torch.bfloat16, device="cuda")
    outputs = token_logprobs(hidden, weight, targets, workspace=columns(V, N))
    few = slice(N - 50, N)
    for got, exact in zip(outputs, reference(hidden[few], weight, targets[few]), strict=True):
        assert (got[few].double() - exact).abs().max() < 2e-4
    upstream = torch.zeros(N, device="cuda")
    upstream[few] = 1.0
    (dw,) = gradients(outputs[:1], [weight], [upstream])
    (exact,) = gradients(reference(hidden[few], weight, targets[few])[:1], [weight], [upstream[few]])
    assert (dw.double() - exact.double()).norm() < 4e-3 * exact.double().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_are_in_use():
    """The fallback taken without anybody noticing."""
    assert logprob.cuda_passes(torch.device("cuda", 0))[0] is not logprob.merge_slice


def test_the_fallback_announces_itself_once(monkeypatch):
    """A kernel that doesn't compile and takes training down, or slows it without a word."""
    monkeypatch.setattr(torch.cuda, "_compile_kernel", None)
    logprob.cuda_passes.cache_clear()
    with pytest.warns(UserWarning, match="logprob.cu"):
        assert logprob.cuda_passes(torch.device("cuda", 0)) == (logprob.merge_slice, logprob.slice_gradient)
    assert logprob.cuda_passes(torch.device("cuda", 0)) == (logprob.merge_slice, logprob.slice_gradient)
    logprob.cuda_passes.cache_clear()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(2, 3, 4)}, "hidden"),
        ({"weight": torch.zeros(7, 5)}, "weight"),
        ({"targets": torch.zeros(2, dtype=torch.long)}, "targets"),
        ({"targets": torch.zeros(3)}, "torch.float32"),
        ({"targets": torch.tensor([0, 7, 1])}, "target 7"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"workspace": 0}, "workspace 0"),
        ({"keep": -1}, "keep -1"),
    ],
)
def test_bad_arguments(change, message):
    """A target beyond the vocabulary would silently count as logit 0, a wrong shape broadcast, temperature 0 give
    nan far away from its cause; each is a ValueError that names the argument."""
    good = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        token_logprobs(**{**good, **change})


def test_second_derivative_is_refused():
    """Autograd differentiating the hand-written backward, whose saved logsumexp it takes for a constant: a wrong
    Hessian without a word."""
    hidden, weight, targets = random_case(N=4, V=5, D=3)
    loss = token_logprobs(hidden, weight, targets)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
