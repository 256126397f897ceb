"""The fused token log-probability against full logits in fp64: values, gradients, memory, bad input."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import logprob
from kernels.logprob import token_logprobs


def reference(hidden, weight, targets, temperature=1.0):
    """(logprobs, entropy) in fp64 from the whole (N, V) logits; rows with a negative target are 0."""
    log_p = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    ignored = targets < 0
    chosen = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = torch.distributions.Categorical(logits=log_p).entropy()
    return chosen.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def columns(count, rows):
    """The workspace (or keep) in bytes that holds `count` columns of fp32 logits for `rows` rows."""
    return 4 * rows * count


def random_case(N, V, D, dtype=torch.float32, seed=0):
    """hidden, weight (leaves) and targets, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[1::4] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("slice_columns, kept_columns", [(1, 0), (3, 0), (3, 3), (3, 7), (7, 7), (100, 100)])
def test_gradcheck(slice_columns, kept_columns):
    """A wrong derivative of either output at any slicing: the target's +1 in the wrong slice, temperature missing
    in one factor, entropy's running moment not rescaled, a kept slice taken for another, ignored rows leaking."""
    hidden, weight, _ = random_case(N=5, V=7, D=3, dtype=torch.float64)
    targets = torch.tensor([0, -1, 6, 3, -100])  # first and last column, a middle one, two ignored
    sizes = {"workspace": columns(slice_columns, rows=3), "keep": columns(kept_columns, rows=3)}
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, 0.7, **sizes), (hidden, weight))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("slice_columns", [1, 10, 1000])
def test_values_are_those_of_the_full_logits(slice_columns, temperature):
    """A merge of slices that loses mass or the temperature; fp32 sums instead of fp32 accuracy; inputs written to."""
    hidden, weight, targets = random_case(N=16, V=97, D=24)
    before = [x.detach().clone() for x in (hidden, weight, targets)]
    outputs = token_logprobs(hidden, weight, targets, temperature, workspace=columns(slice_columns, rows=12))
    for got, wanted in zip(outputs, reference(hidden, weight, targets, temperature), strict=True):
        assert got.dtype == torch.float32 and got.shape == (16,)
        torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=2e-6)
        assert (got[targets < 0] == 0).all()
    sum(outputs).sum().backward()
    for x, copy in zip((hidden, weight, targets), before, strict=True):
        assert torch.equal(x.detach(), copy)


@pytest.mark.parametrize("descending", [False, True])
def test_peaked_and_offset_logits(descending):
    """exp overflowing, 0 * inf in a rescaled moment, and rounding: a logsumexp stored as one fp32 number next to
    logits of 4096 is off by up to 2.4e-4. Logits are exact here, so nothing but the op itself can round."""
    ladder = torch.tensor([0.0, 0.125, 0.5, 1.0, 2.0, 3.25])  # + 4096: still exact in fp32
    cliff = torch.tensor([0.0, -3e4, -200.0, 0.0, -90.0, -3e4])  # two winners, everything else vanishes
    rows = torch.stack([ladder + 4096, ladder - 4096, cliff, cliff * 1e30, torch.zeros(6)])
    weight = (rows.flip(1) if descending else rows).T.contiguous().requires_grad_()  # (V, D) with hidden = identity
    hidden, targets = torch.eye(5, requires_grad=True), torch.tensor([2, 2, 0, 5, 1])
    for V in (1, 2, 6):
        logprobs, entropy = token_logprobs(hidden, weight, targets, workspace=columns(V, rows=5))
        wanted = reference(hidden, weight, targets)
        torch.testing.assert_close(logprobs.double(), wanted[0].detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropy.double(), wanted[1].detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropy[4], torch.tensor(math.log(6)))
        upstream = [torch.tensor([1.0, -2.0, 0.5, 1.5, 3.0]), torch.tensor([0.0, 0.5, -2.0, 1.0, 0.25])]
        (got,) = torch.autograd.grad([logprobs, entropy], [weight], upstream)
        (full,) = torch.autograd.grad(wanted, [weight], [x.double() for x in upstream])
        torch.testing.assert_close(got, full, rtol=2e-6, atol=2e-6)


def test_ignored_and_unweighted_rows_touch_nothing():
    """A prompt or padding row (target -1) or a row of zero upstream gradient that poisons the rest: 0 * inf from a
    hidden row that isn't finite gives nan in every row of dW if the row takes part in the products."""
    hidden, weight, targets = random_case(N=8, V=11, D=4)
    clean = hidden.detach().clone()
    with torch.no_grad():
        hidden[1], hidden[2] = torch.nan, torch.inf
        clean[1:3] = 0.0
    clean.requires_grad_()
    targets[1], targets[2] = -1, 5  # row 1 is ignored; row 2 counts, with weight 0
    upstream = torch.linspace(-1, 2, 8)
    upstream[2] = 0.0

    def gradients(hidden, targets):
        logprobs, entropy = token_logprobs(hidden, weight, targets, workspace=columns(4, rows=8))
        return logprobs, entropy, *torch.autograd.grad([logprobs, entropy], [hidden, weight], [upstream, upstream])

    logprobs, entropy, dh, dw = gradients(hidden, targets)
    assert logprobs[1] == 0 and entropy[1] == 0 and (dh[1:3] == 0).all()
    _, _, clean_dh, clean_dw = gradients(clean, targets)
    assert torch.equal(dh, clean_dh) and torch.equal(dw, clean_dw)

    for nothing in (torch.full((8,), -1), torch.empty(0, dtype=torch.long)):  # all ignored, and no rows at all
        outputs = token_logprobs(clean[: len(nothing)], weight, nothing)
        dh, dw = torch.autograd.grad(sum(outputs).sum(), [clean, weight])
        assert not any(x.any() for x in (*outputs, dh, dw))


def test_bf16_is_accumulated_in_fp32():
    """Logits rounded to bf16 (errors of 1e-2), or dH summed over slices in bf16: with one column a slice its error
    grows with V, while rounding the finished sum once costs at most 2^-8."""
    hidden, weight, targets = random_case(N=8, V=500, D=32, dtype=torch.bfloat16)
    got = token_logprobs(hidden, weight, targets, workspace=columns(1, rows=6))
    wanted = reference(hidden, weight, targets)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-5)
    exact = torch.autograd.grad(sum(wanted).sum(), [hidden, weight])
    for a, b in zip(torch.autograd.grad(sum(got).sum(), [hidden, weight]), exact, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b.double(), rtol=2**-7, atol=1e-4)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("kept_slices", [0, 2])
def test_logits_never_exist_and_keep_is_what_it_says(kept_slices, monkeypatch):
    """The (N, V) logits in memory after all, whole or as the sum of what is saved for the backward pass; a workspace
    that isn't obeyed; and a keep that saves slices and computes them again all the same."""
    N, V, D, C = 60, 1024, 8, 128
    hidden, weight, targets = random_case(N, V, D)
    rows, saved, products = int((targets >= 0).sum()), [], []

    def counted(*args, product=logprob.slice_logits):
        products.append(product(*args))
        return products[-1]

    monkeypatch.setattr(logprob, "slice_logits", counted)
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sizes = {"workspace": columns(C, rows), "keep": columns(C * kept_slices, rows)}
        sum(token_logprobs(hidden, weight, targets, **sizes)).sum().backward()
    assert V * D == 8192 > rows * C  # the largest tensor may be dW, nothing larger
    assert largest.elements == V * D
    assert all(z.shape == (rows, C) for z in products)
    assert len(products) == 2 * V // C - kept_slices
    extra = sum(x.numel() for x in saved if x.data_ptr() not in (hidden.data_ptr(), weight.data_ptr()))
    assert extra <= rows * C * kept_slices + 8 * N


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
