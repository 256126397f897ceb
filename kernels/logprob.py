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

Shapes: N tokens, D hidden size, V vocabulary, C columns of one slice, R rows that count.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    workspace: int = 256 << 20,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row, (N,) fp32 both, differentiable.

    hidden (N, D), weight (V, D), targets (N,) long. A negative target means ignored: both outputs are 0
    and no gradient flows. workspace: bytes that the logits of one slice may take, in fp32. keep: bytes of
    logits kept for the backward pass rather than computed again (time for memory).
    Raises ValueError for shapes that don't fit, targets that aren't long or not below V, a temperature or
    workspace that isn't positive, and a negative keep.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D)")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be (N,) with N = {hidden.shape[0]}")
    if targets.dtype != torch.long:
        raise ValueError(f"targets are {targets.dtype}, must be torch.long")
    if len(targets) and targets.max() >= len(weight):
        raise ValueError(f"target {int(targets.max())} is outside the vocabulary of {len(weight)}")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be positive")
    if workspace <= 0 or keep < 0:
        raise ValueError(f"workspace {workspace} must be positive and keep {keep} not negative")
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, workspace, keep)


def slice_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """hidden (R, D) @ weight (C, D).T / temperature -> (R, C), accumulated and returned in fp32 (fp64 for fp64).

    bf16 products are exact in fp32, so on CUDA the half-precision product with an fp32 result loses nothing.
    """
    if hidden.dtype == torch.float64:
        return hidden @ weight.double().T / temperature
    if hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32).div_(temperature)
    return (hidden.float() @ weight.float().T).div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, workspace, keep):
        rows = (targets >= 0).nonzero()[:, 0]  # (R,): ignored rows cost nothing
        h, t = hidden[rows], targets[rows]
        R, V = len(rows), weight.shape[0]
        columns = max(1, min(V, workspace // (4 * max(R, 1))))  # C
        kept_columns = keep // (4 * max(R, 1))
        top = h.new_full((R,), -torch.inf, dtype=_accumulator(h))  # running maximum m of z
        total = torch.zeros_like(top)  # sum of exp(z - m)
        moment = torch.zeros_like(top)  # sum of exp(z - m) (z - m)
        chosen = torch.zeros_like(top)  # z[target]
        kept = []
        for start in range(0, V, columns):
            z = slice_logits(h, weight[start : start + columns], temperature)  # (R, C)
            if start + z.shape[1] <= kept_columns:
                kept.append(z)
            here = (t >= start) & (t < start + z.shape[1])
            column = (t - start).clamp(0, z.shape[1] - 1)
            chosen = torch.where(here, z.gather(1, column[:, None])[:, 0], chosen)
            new_top = torch.maximum(top, z.amax(1))
            shift = torch.where(total > 0, top - new_top, 0.0)  # the first slice has nothing to rescale
            shifted = z - new_top[:, None]
            e = shifted.exp()
            scale = shift.exp()
            moment = scale * (moment + shift * total) + (e * shifted).sum(1)
            total = scale * total + e.sum(1)
            top = new_top
        log_total = total.log()  # (R,): logsumexp - top, apart because their sum would round at large offsets
        row_entropy = log_total - moment / total  # (R,)
        row_logprobs = chosen - top - log_total  # (R,)
        logprobs = hidden.new_zeros(len(targets), dtype=top.dtype).index_copy(0, rows, row_logprobs)
        entropy = torch.zeros_like(logprobs).index_copy(0, rows, row_entropy)
        ctx.save_for_backward(hidden, weight, targets, rows, top, log_total, row_entropy, *kept)
        ctx.temperature, ctx.columns = temperature, columns
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, rows, top, log_total, row_entropy, *kept = ctx.saved_tensors
        gl, ge = grad_logprobs[rows], grad_entropy[rows]
        live = ((gl != 0) | (ge != 0)).nonzero()[:, 0]  # rows whose upstream gradient is zero give exactly zero
        gl, ge = gl / ctx.temperature, ge / ctx.temperature  # here once, rather than in every slice
        gl, ge, top, log_total, ent = (x[live, None] for x in (gl, ge, top, log_total, row_entropy))  # (R, 1)
        rows = rows[live]
        h, t = hidden[rows], targets[rows]
        need_h, need_w = ctx.needs_input_grad[:2]
        dh = torch.zeros_like(h, dtype=top.dtype) if need_h else None  # (R, D)
        dw = torch.empty_like(weight) if need_w else None  # (V, D): each slice is written once
        for i, start in enumerate(range(0, weight.shape[0], ctx.columns)):
            w = weight[start : start + ctx.columns]  # (C, D)
            z = kept[i][live] if i < len(kept) else slice_logits(h, w, ctx.temperature)  # (R, C)
            logp = z - top - log_total
            p = logp.exp()
            dz = -p * (gl + ge * (logp + ent))
            here = ((t >= start) & (t < start + len(w))).nonzero()[:, 0]
            dz[here, t[here] - start] += gl[here, 0]
            if need_h:
                dh += dz @ w.to(dz.dtype)
            if need_w:
                dw[start : start + len(w)] = dz.T @ h.to(dz.dtype)
        if need_h:
            dh = torch.zeros_like(hidden).index_copy(0, rows, dh.to(hidden.dtype))
        return dh, dw, None, None, None, None


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
