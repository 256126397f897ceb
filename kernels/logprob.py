"""Log-probabilities of chosen tokens straight from hidden states, without the (N, V) logits.

Supervised fine-tuning and GRPO need one number per token, log p(target), and sometimes the entropy. The
logits they come from would be the largest tensor of the whole training step: 2048 tokens x 152k entries
x 4 bytes are 1.2 GB, several times over in autograd. Here the vocabulary is walked in slices that fit a
fixed workspace. With z = hidden @ weight.T / temperature and p = softmax(z), row by row,

    logprob = z[target] - logsumexp(z)          d logprob / d z_j = [j = target] - p_j
    entropy = logsumexp(z) - sum_j p_j z_j      d entropy / d z_j = -p_j (log p_j + entropy)

The forward pass keeps logsumexp (in two parts) and entropy only; the backward pass computes each slice of z
again, so that the slice of dW is one finished product and dH accumulates in fp32. No reduction happens inside:
losses stay in plain PyTorch, and the gradient is right for whatever arrives from them at both outputs.

Each slice takes matrix products and one pass over it, `merge_slice` forward and `slice_gradient` backward: below in
PyTorch, on an NVIDIA GPU the two kernels of logprob.cu. Reasons and measurements are in kernels/README.md.

Shapes: N tokens, D hidden size, V vocabulary, C columns of one slice, R rows that count.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOWEST = torch.finfo(torch.float32).min  # the running maximum of nothing: unlike -inf it can be subtracted from -inf
VANISHED = -1e4  # a log-probability whose exp is 0, and which times 0 is 0, unlike -inf
CACHED = 1 << 18  # elements of a block of rows that a CPU works on at a time, so that its passes stay in the cache
THREADS, LOADS = 256, 4  # as in logprob.cu


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    workspace: int = 256 << 20,
    keep: int = 0,
    eager: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row, (N,) fp32 both (fp64 for fp64), differentiable.

    hidden (N, D), weight (V, D), targets (N,) long. A negative target means ignored: both outputs are 0
    and no gradient flows. A weight of another dtype than hidden is rounded to hidden's, slice by slice; its gradient
    has its own dtype. workspace: bytes that the logits of one slice may take, in fp32. keep: bytes of logits kept for
    the backward pass rather than computed again (time for memory). eager: PyTorch instead of the CUDA kernels.
    Raises ValueError for shapes that don't fit, targets that aren't long or not below V, a temperature or
    workspace that isn't positive, and a negative keep.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D)")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be (N,) with N = {hidden.shape[0]}")
    if targets.dtype != torch.long:
        raise ValueError(f"targets are {targets.dtype}, must be torch.long")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be positive")
    if workspace <= 0 or keep < 0:
        raise ValueError(f"workspace {workspace} must be positive and keep {keep} not negative")
    keep = keep if torch.is_grad_enabled() else 0
    return _TokenLogprobs.apply(hidden, weight, targets, float(temperature), workspace, keep, eager)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, workspace, keep, eager):
        logprobs, *saved = forward_slices(hidden, weight, targets, temperature, workspace, keep, eager)
        ctx.save_for_backward(hidden, weight, targets, *saved)
        ctx.settings = temperature, workspace, eager
        return logprobs, saved[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        need_h, need_w = ctx.needs_input_grad[:2]
        dh, dw = backward_slices(*ctx.saved_tensors, grad_logprobs, grad_entropy, *ctx.settings, need_h, need_w)
        return dh if need_h else None, dw if need_w else None, *[None] * 5


# How many rows count is known to the data alone, which torch.compile can't trace: both passes are opaque to it.
@torch.library.custom_op("spark::logprob_forward", mutates_args=())
def forward_slices(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, workspace: int, keep: int, eager: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> log-probabilities (N,), entropies (N,), logsumexp (N, 2) in two parts, kept logits (slice behind slice)."""
    (N, _), V = hidden.shape, len(weight)
    if N and targets.max() >= V:
        raise ValueError(f"target {int(targets.max())} is outside the vocabulary of {V}")
    merge, _ = passes(hidden, eager)
    rows = (targets >= 0).nonzero()[:, 0]  # (R,): ignored rows cost nothing
    h, t = select(hidden, rows), targets[rows]
    R, C, kept_columns = len(rows), *widths(N, V, workspace, keep)
    # of each row: m = max z, sum of exp(z - m), sum of exp(z - m) (z - m), z[target]
    state = hidden.new_tensor([LOWEST, 0, 0, 0], dtype=accumulator(hidden)).repeat(R, 1)  # (R, 4)
    kept = state.new_empty(N * kept_columns)
    scratch = state.new_empty(R * C if kept_columns < V else 0)
    for start in range(0, V, C):
        w = weight[start : start + C].to(hidden.dtype)  # (C, D)
        memory = kept[N * start :] if start < kept_columns else scratch
        z = product(h, w.T, out=memory[: R * len(w)].view(R, len(w)))
        merge(z, t, state, start, temperature)
    top, total, moment, chosen = state.unbind(1)
    log_total = total.log()  # logsumexp - top, apart because their sum would round at large offsets
    results = state.new_zeros((N, 4))
    results[rows] = torch.stack([chosen - top - log_total, log_total - moment / total, top, log_total], 1)
    return results[:, 0].clone(), results[:, 1].clone(), results[:, 2:].clone(), kept


@torch.library.custom_op("spark::logprob_backward", mutates_args=())
def backward_slices(
    hidden: Tensor, weight: Tensor, targets: Tensor, entropies: Tensor, logsumexp: Tensor, kept: Tensor,
    grad_logprobs: Tensor, grad_entropy: Tensor, temperature: float, workspace: int, eager: bool,
    need_h: bool, need_w: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> dH (N, D) and dW (V, D), without elements where it isn't needed."""
    (N, _), V = hidden.shape, len(weight)
    _, gradient = passes(hidden, eager)
    C, kept_columns = widths(N, V, workspace, 0)[0], len(kept) // max(N, 1)
    counted = (targets >= 0).nonzero()[:, 0]  # the rows of the forward pass
    live = ((grad_logprobs != 0) | (grad_entropy != 0))[counted].nonzero()[:, 0]
    rows = counted[live]  # (R,): the others have a gradient of exactly zero
    h, t = select(hidden, rows), targets[rows]
    values = torch.column_stack([logsumexp, entropies, grad_logprobs, grad_entropy])[rows]  # (R, 5)
    R = len(rows)
    dh = torch.zeros_like(h, dtype=values.dtype) if need_h else hidden.new_empty(0)  # (R, D): a sum over slices
    dw = torch.empty_like(weight) if need_w else weight.new_empty(0)  # (V, D): each slice is written once
    scratch = values.new_empty(R * C)
    # the products of the gradient belong to tensor cores where there are any; elsewhere it takes the place of z
    g_scratch = hidden.new_empty(R * C) if hidden.is_cuda and hidden.dtype.itemsize == 2 else scratch
    for start in range(0, V, C):
        w = weight[start : start + C].to(hidden.dtype)  # (C, D)
        z, g = (memory[: R * len(w)].view(R, len(w)) for memory in (scratch, g_scratch))  # (R, C) both
        if start < kept_columns:
            z = select(kept[N * start :][: len(counted) * len(w)].view(-1, len(w)), live)
        else:
            product(h, w.T, out=z)
        gradient(z, t, values, g, start, temperature)
        if need_h:
            dh += product(g, w, out=torch.empty_like(dh))
        if need_w:
            product(g.T, h, out=dw[start : start + len(w)])
    if need_h:
        dh = torch.zeros_like(hidden).index_copy_(0, rows, dh.to(hidden.dtype))
    return dh, dw


@forward_slices.register_fake
def _(hidden, weight, targets, temperature, workspace, keep, eager):
    kept_columns = widths(len(hidden), len(weight), workspace, keep)[1]
    shapes = [(len(hidden),), (len(hidden),), (len(hidden), 2), (len(hidden) * kept_columns,)]
    return tuple(hidden.new_empty(shape, dtype=accumulator(hidden)) for shape in shapes)


@backward_slices.register_fake
def _(hidden, weight, *others):
    need_h, need_w = others[-2:]
    return tuple(torch.empty_like(x) if need else x.new_empty(0) for x, need in ((hidden, need_h), (weight, need_w)))


def widths(N: int, V: int, workspace: int, keep: int) -> tuple[int, int]:
    """Columns C of a slice, and how many columns are kept: whole slices, or all."""
    C = max(1, min(V, workspace // (4 * max(N, 1))))
    C -= C % 256 if 256 < C < V else 0  # widths that tiled products like
    columns = keep // (4 * max(N, 1))
    return C, V if columns >= V else columns - columns % C


def accumulator(x: Tensor) -> torch.dtype:
    """fp32, in which sums and softmax are made; fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def select(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], without a copy if that is all of them."""
    return x if len(rows) == len(x) else x[rows]


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, accumulated in fp32 and rounded once, to out's dtype.

    Products of two bf16 numbers are exact in fp32. A GPU's tensor cores add them up in fp32, and out_dtype keeps them
    from rounding the sum; on the CPU, which has no such product, a slice is cheap to convert.
    """
    if a.is_cuda and a.dtype.itemsize == 2 and out.dtype == torch.float32:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    if a.dtype == b.dtype == out.dtype and (a.is_cuda or a.dtype.itemsize > 2):
        return torch.mm(a, b, out=out)
    return out.copy_(a.to(accumulator(a)) @ b.to(accumulator(a)))


def merge_slice(z: Tensor, targets: Tensor, state: Tensor, start: int, temperature: float) -> None:
    """Let state (R, 4) take in z (R, C), the logits of columns start, start + 1, ... before the temperature."""
    for rows, column, here in blocks(z, targets - start):
        top, total, moment, chosen = state[rows].unbind(1)  # views
        x = z[rows] / temperature
        chosen[here] = x[here, column]
        new_top = torch.maximum(top, x.amax(1))
        x.sub_(new_top[:, None]).clamp_(min=VANISHED)
        e = x.exp()
        shift = torch.where(total > 0, top - new_top, 0.0)  # the first slice has nothing to rescale
        moment.add_(shift * total).mul_(shift.exp()).add_(x.mul_(e).sum(1))
        total.mul_(shift.exp()).add_(e.sum(1))
        top.copy_(new_top)


def slice_gradient(z: Tensor, targets: Tensor, values: Tensor, g: Tensor, start: int, temperature: float) -> None:
    """g (R, C), which may be z itself: the gradient of z (R, C). values (R, 5): logsumexp in two parts, entropy, and
    the gradients of log-probability and entropy."""
    for rows, column, here in blocks(z, targets - start):
        top, log_total, entropies, gl, ge = values[rows].unsqueeze(1).unbind(2)  # (R, 1) each
        gl, ge = gl / temperature, ge / temperature
        logp = (z[rows] / temperature).sub_(top).sub_(log_total).clamp_(min=VANISHED)
        d = logp.exp()
        d *= logp.add_(entropies).mul_(ge).add_(gl) if ge.any() else gl
        d[here, column] -= gl[here, 0]  # in fp32, then rounded once: both may be nearly equal
        torch.neg(d, out=d)
        g[rows] = d


def blocks(z: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of the rows of z (R, C): the rows, the columns (r,) that lie within C, and which rows of the block have
    them."""
    size = len(z) if z.is_cuda else max(1, CACHED // z.shape[1])
    for first in range(0, len(z), max(size, 1)):
        rows = slice(first, first + size)
        here = ((columns[rows] >= 0) & (columns[rows] < z.shape[1])).nonzero()[:, 0]
        yield rows, columns[rows][here], here


def passes(hidden: Tensor, eager: bool) -> tuple[Callable, Callable]:
    """merge_slice and slice_gradient, as CUDA kernels where the device and dtype have them."""
    if eager or not hidden.is_cuda or hidden.dtype not in (torch.float32, torch.bfloat16):
        return merge_slice, slice_gradient
    return cuda_passes(hidden.device)


@functools.cache  # a module belongs to its device
def cuda_passes(device: torch.device) -> tuple[Callable, Callable]:
    """The kernels of logprob.cu with the signatures of their PyTorch twins; those, and one warning, if they can't be
    made."""
    try:
        from torch.utils import cpp_extension

        # PyTorch looks for a toolkit's headers even where none are included; any directory will do
        cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME or str(Path(__file__).parent)
        source = Path(__file__).with_suffix(".cu").read_text()
        with torch.cuda.device(device):
            merge, gradient = (torch.cuda._compile_kernel(source, name) for name in ("merge_slice", "slice_gradient"))
    except Exception as error:  # a private interface: whatever is wrong with it, training can go on
        warnings.warn(f"kernels/logprob.cu doesn't compile, PyTorch does its work more slowly: {error}", stacklevel=2)
        return merge_slice, slice_gradient

    def merge_on_gpu(z, targets, state, start, temperature):
        if not len(z):  # a grid of no blocks is an error
            return
        with torch.cuda.device(device):
            merge((len(z), 1, 1), (THREADS, 1, 1), [z, targets, state, z.shape[1], start, 1 / temperature])

    def gradient_on_gpu(z, targets, values, g, start, temperature):
        if not len(z):
            return
        chunks = -(-z.shape[1] // (THREADS * LOADS))
        arguments = [z, targets, values, g, z.shape[1], start, 1 / temperature, int(g.dtype == torch.bfloat16)]
        with torch.cuda.device(device):
            gradient((len(z) * chunks, 1, 1), (THREADS, 1, 1), arguments)

    return merge_on_gpu, gradient_on_gpu
