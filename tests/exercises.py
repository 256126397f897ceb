"""Is an exercise of data/exercises.md solved? Checks of properties that a right change has, however it is written.

    python -m tests.exercises advantage    # or aggregation, k2, first_error: checks the code as it is now
    python -m tests.exercises              # all four

A check takes the function that the exercise changes and returns a message for each property that is broken; none means
that the change does what was asked. tests/test_exercises.py makes the typical mistakes.
"""

import random
import sys
from collections.abc import Callable

import grpo
import verify

import torch
from torch import Tensor


def close(found: Tensor | list[float], wanted: Tensor | list[float]) -> bool:
    """Equal up to rounding, and of the same shape."""
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    return found.shape == wanted.shape and torch.allclose(found.float(), wanted.float(), atol=1e-5)


# --------------------------------------------------------------------------- another aggregation rule


def votes(correct: int, incorrect: int, yes: int, no: int) -> list[dict]:
    """Verifications of a solution of one step: so many call the step correct and incorrect, so many say Yes and No."""
    steps = [True] * correct + [False] * incorrect
    verdicts = [True] * yes + [False] * no
    voters = []
    for step, verdict in zip(steps, verdicts, strict=True):
        voters.append({"text": f"step {step}, answer {verdict}", "step_verdicts": [step], "verdict": verdict})
    return voters


def check_aggregation(step_consistency: Callable = verify.step_consistency) -> list[str]:
    """A step is correct if at least three quarters of its votes say so; everything else stays."""
    broken = []

    def label(voters: list[dict], seed: int = 0) -> verify.Label:
        return step_consistency(voters, random.Random(seed))

    if label(votes(12, 4, 16, 0)).step_labels != [True]:
        broken.append("12 of 16 votes are exactly three quarters, and the step isn't labelled correct: \"at least\" "
                      "includes the border")  # fmt: skip
    wrong = []
    for number in range(1, 25):
        for correct in range(number + 1):
            given = label(votes(correct, number - correct, number, 0)).step_labels
            if given != [4 * correct >= 3 * number]:
                wrong.append(f"{correct} of {number}")
    if wrong:
        broken.append(f"a step is correct if at least three quarters of its votes say so, and only then; labelled "
                      f"otherwise: {', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}")  # fmt: skip
    if not label(votes(16, 0, 9, 7)).outcome or label(votes(16, 0, 8, 8)).outcome:
        broken.append("the outcome is no longer the majority of the verdicts (9 of 16 are enough, 8 aren't): only steps "
                      "need three quarters")  # fmt: skip
    if not verify.outcome_consistency(votes(16, 0, 9, 7), random.Random(0)).outcome:
        broken.append("outcome_consistency has changed, too: it shares `majority`, so write a rule of your own beside it")
    unreadable = {"text": "?", "step_verdicts": None, "verdict": None}
    if label(votes(3, 1, 4, 0) + [unreadable] * 4).step_labels != [True]:
        broken.append("unparsed verifications have become votes: of the four that can be read, three call the step correct")
    if label([unreadable]).dropped != "no_votes":
        broken.append("a solution without a readable verification must be dropped as no_votes")
    if label(votes(11, 5, 16, 0)).votes != [[11, 5]]:
        broken.append("`votes` must still count the votes as they were cast: [11, 5]")
    # 11 of 16 is too few for the step, and enough for the outcome.
    none = label(votes(11, 5, 11, 5))
    if (none.text, none.dropped) != (None, "no_match"):
        broken.append("nobody says that the step is incorrect and the answer right, so the solution must be dropped as "
                      "no_match: its text would contradict the new labels")  # fmt: skip
    if label(votes(11, 5, 12, 4)).text != "step False, answer True":
        broken.append("the chosen text must say the new labels and the outcome: here one verification does")
    several = [voter | {"text": f"text {place}"} for place, voter in enumerate(votes(4, 0, 4, 0))]
    if len({label(several, seed).text for seed in range(50)}) < 4:
        broken.append("the text must be drawn at random from all that match")
    return broken


# --------------------------------------------------------------------------- another advantage


def check_advantage(group_advantages: Callable = grpo.group_advantages) -> list[str]:
    """The baseline of a response is the mean of the others, and nothing is divided by the standard deviation."""
    broken = []
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0])
    other = torch.tensor([0.0, 1.0, 1.0, 0.25])
    advantages = group_advantages(rewards, 4)
    if advantages.shape != rewards.shape:
        return [f"rewards (B,) must give advantages (B,), not {tuple(advantages.shape)}"]
    if not close(group_advantages(rewards + 5, 4), advantages):
        broken.append("adding the same number to all rewards of a group must change nothing: there is no baseline")
    if not close(group_advantages(2 * rewards, 4), 2 * advantages):
        broken.append("doubling the rewards must double the advantages: they are still divided by the group's spread")
    raised = group_advantages(rewards + torch.tensor([0.3, 0, 0, 0]), 4) - advantages
    if abs(raised[0].item() - 0.3) > 1e-5 and close(group_advantages(2 * rewards, 4), 2 * advantages):
        broken.append("a reward that is 0.3 higher must raise its own advantage by 0.3: a response's own reward is part of "
                      "its baseline")  # fmt: skip
    if abs(advantages.sum().item()) > 1e-5:
        broken.append("the advantages of a group must add up to 0")
    if not close(group_advantages(torch.cat([rewards, other]), 4)[:4], advantages):
        broken.append("the advantages of a group depend on another group: the baseline goes over the whole batch")
    order = [2, 0, 3, 1]
    if not close(group_advantages(rewards[order], 4), advantages[order]):
        broken.append("responses in another order must get the same advantages, in that order")
    if not close(advantages, [1 - 0.5 / 3, -1.5 / 3, 0.5 - 1 / 3, -1.5 / 3]):
        broken.append("rewards 1, 0, 0.5, 0: the mean of the others is 0.167, 0.5, 0.333, 0.5, so the advantages are 0.833, "
                      f"-0.5, 0.167, -0.5, not {', '.join(f'{a:.3f}' for a in advantages.tolist())}")  # fmt: skip
    if any(group_advantages(torch.full((16,), 0.7), 16).tolist()):
        broken.append("sixteen rewards of 0.7 must give exactly 0, not a rounding error: it would be a gradient of noise")
    return broken


# --------------------------------------------------------------------------- the k2 estimator


def penalty(grpo_loss: Callable, difference: float, kl_coef: float = 1.0) -> tuple[float, float, dict]:
    """(loss, its gradient by the log-prob, stats) of one token without an advantage, log policy - log ref being the
    difference."""
    logprobs = torch.tensor([-1.0 + difference], requires_grad=True)
    ref, zero, weights = torch.tensor([-1.0]), torch.zeros(1), torch.ones(1)
    loss, stats = grpo_loss(logprobs, logprobs.detach(), ref, zero, weights, kl_coef=kl_coef)
    gradient = 0.0
    if loss.requires_grad:
        loss.backward()
        gradient = logprobs.grad.item()
    return loss.item(), gradient, stats


def kl_gradients(grpo_loss: Callable) -> tuple[Tensor, Tensor]:
    """(expected gradient of the penalty, gradient of KL(policy || ref)) by the logits of a policy over four tokens."""
    logits = torch.tensor([0.5, -1.0, 0.3, 1.2], requires_grad=True)
    ref = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    logprobs = logits.log_softmax(0)
    policy = logprobs.detach().exp()  # each token counts as often as it is drawn
    loss, _ = grpo_loss(logprobs, logprobs.detach(), ref, torch.zeros(4), policy, kl_coef=1.0)
    expected = torch.zeros(4)
    if loss.requires_grad:
        (expected,) = torch.autograd.grad(loss, logits, retain_graph=True)
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    (gradient,) = torch.autograd.grad(exact, logits)
    return expected, gradient


def check_k2(grpo_loss: Callable = grpo.grpo_loss) -> list[str]:
    """The penalty in the loss is k2 = (log ref - log policy)^2 / 2; the metric stays k3."""
    broken = []
    above, slope_above, stats = penalty(grpo_loss, 0.4)
    below, slope_below, _ = penalty(grpo_loss, -0.4)
    if abs(penalty(grpo_loss, 0.0)[0]) > 1e-6 or abs(penalty(grpo_loss, 0.0)[1]) > 1e-6:
        broken.append("where policy and reference agree, the penalty and its gradient must be 0")
    if abs(above - below) > 1e-5:
        broken.append("k2 is the same whether the policy is 0.4 above the reference or 0.4 below; this penalty isn't (k1 "
                      "and k3 aren't)")  # fmt: skip
    if slope_above == slope_below == 0:
        broken.append("the penalty has no gradient: is the difference detached?")
    elif slope_above < 0:
        broken.append("the penalty pushes the policy away from the reference: look at its sign")
    elif abs(slope_above - 0.8) < 1e-5:
        broken.append("the gradient is twice as large as it should be: the square needs its factor 1/2")
    expected, gradient = kl_gradients(grpo_loss)
    if not close(expected, gradient):
        broken.append("with tokens of the policy, the expected gradient of the penalty must be that of KL(policy || ref): "
                      f"{rounded(gradient)}, not {rounded(expected)}")  # fmt: skip
    k3 = torch.tensor(-0.4).exp().item() + 0.4 - 1
    if abs(stats["kl"] - k3) > 1e-5:
        broken.append(f"the metric must stay k3, or runs can't be compared: {k3:.4f} at a difference of 0.4, not "
                      f"{stats['kl']:.4f}")  # fmt: skip
    half = penalty(grpo_loss, 0.4, kl_coef=0.5)[0]
    if abs(half - above / 2) > 1e-6 or penalty(grpo_loss, 0.4, kl_coef=0.0)[0] != 0:
        broken.append("the penalty must be multiplied by kl_coef")
    new, old = torch.tensor([1.5, 0.5]).log(), torch.zeros(2)
    arguments = (new, old, new, torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.25]))
    if abs(grpo_loss(*arguments)[0].item() - (-0.5 * 1.2 + 0.25 * 0.8)) > 1e-5:
        broken.append("the clipped part of the loss, or the weights of its tokens, have changed")
    return broken


def rounded(values: Tensor) -> list[float]:
    """For messages."""
    return [round(value, 3) for value in values.tolist()]


# --------------------------------------------------------------------------- first-error credit


def check_first_error(selective_advantage: Callable = grpo.selective_advantage) -> list[str]:
    """A response that is pushed down is so from its first incorrect step on; one that is pushed up keeps A."""
    broken = []
    # Twelve tokens, three steps in tags: t ss t ss t sss tt
    spans = [(1, 3), (4, 6), (7, 10)]

    def tokens(advantage: float, verdicts: list[bool], discount: float = 0.0) -> list[float]:
        found = selective_advantage(advantage, verdicts, spans[: len(verdicts)], 12, discount)
        return torch.as_tensor(found).tolist()

    if len(tokens(-1.0, [True, False, True])) != 12:
        return ["there must be one advantage for each of the 12 tokens"]
    if tokens(1.5, [True, False, True]) != [1.5] * 12 or tokens(0.0, [False, False, False]) != [0.0] * 12:
        broken.append("a response with A >= 0 keeps A on every token, whatever its steps: only penalties are moved")
    found = tokens(-1.0, [True, False, True])
    if any(found[:4]):
        broken.append("tokens before the first incorrect step, tags included, must get 0: the prefix is good")
    if found[4:6] != [-1.0, -1.0]:
        broken.append("the first incorrect step must keep A from its first token to its last")
    if found[7:10] != [-1.0] * 3:
        broken.append("a step after the first incorrect one must keep A even if it is called correct: it builds on the "
                      "error")  # fmt: skip
    if found[6] != -1.0 or found[10:] != [-1.0, -1.0]:
        broken.append("tags and the answer behind the first incorrect step must keep A")
    if tokens(-1.0, [True, False, False])[:7] != [0.0] * 4 + [-1.0] * 3:
        broken.append("of two incorrect steps the first one counts")
    if tokens(-1.0, [False, True, True]) != [0.0] + [-1.0] * 11:
        broken.append("where the first step is incorrect, everything from it on must keep A")
    if tokens(-1.0, [True, True, True]) != [-1.0] * 12 or tokens(-1.0, []) != [-1.0] * 12:
        broken.append("without an incorrect step every token must keep A: a penalty must never be cancelled altogether")
    if tokens(-1.0, [True, False, True], discount=0.5)[:4] != [-0.5] * 4:
        broken.append("--selective_discount must keep its meaning: what is spared gets A times the discount")
    return broken


# --------------------------------------------------------------------------- the command

EXERCISES = {
    "aggregation": check_aggregation,
    "advantage": check_advantage,
    "k2": check_k2,
    "first_error": check_first_error,
}


def main() -> int:
    names = sys.argv[1:] or list(EXERCISES)
    unknown = [name for name in names if name not in EXERCISES]
    if unknown:
        print(f"error: {unknown[0]}: no such exercise; there are {', '.join(EXERCISES)}", file=sys.stderr)
        return 2
    unsolved = 0
    for name in names:
        try:
            broken = EXERCISES[name]()
        except Exception as error:
            broken = [f"the changed function fails: {type(error).__name__}: {error}"]
        unsolved += bool(broken)
        print(f"{name}: {'solved, every property holds' if not broken else 'not yet'}")
        for message in broken:
            print(f"  - {message}")
    return int(unsolved > 0)


if __name__ == "__main__":
    sys.exit(main())
