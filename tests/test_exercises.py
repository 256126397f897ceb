"""The checks of the exercises: a right change passes, and each typical mistake is told which property it breaks."""

import random
import subprocess
import sys
from pathlib import Path

import grpo
import verify
from verify import NO_VOTES, Label, count_votes, keep_parsed, majority, votes_by_step

import exercises
import pytest
import torch

ROOT = Path(__file__).parents[1]

# --------------------------------------------------------------------------- another aggregation rule


def aggregation(
    rule=lambda votes: 4 * sum(votes) >= 3 * len(votes), outcome=majority, parsed=keep_parsed, text="new", first=False
):
    """step_consistency with another rule for steps, and mistakes. text: whose labels the chosen text says."""

    def step_consistency(verifications: list[dict], rng: random.Random) -> Label:
        voters = parsed(verifications)
        if not voters:
            return NO_VOTES
        labels = [rule(votes) for votes in votes_by_step(voters)]
        wanted = labels if text in ("new", "steps") else [majority(votes) for votes in votes_by_step(voters)]
        verdict = outcome([voter["verdict"] for voter in voters])
        matching = [v for v in voters if v["step_verdicts"] == wanted and (text == "steps" or v["verdict"] == verdict)]
        if text == "anybody":
            matching = voters
        if not matching:
            return Label(labels, verdict, None, count_votes(voters), "no_match")
        chosen = matching[0] if first else rng.choice(matching)
        return Label(labels, verdict, chosen["text"], count_votes(voters), None)

    return step_consistency


def unparsed_votes(verifications: list[dict]) -> list[dict]:
    """A mistake: what can't be read is a vote for incorrect."""
    readable = keep_parsed(verifications)
    return readable and [v if v["verdict"] is not None else v | {"step_verdicts": [False], "verdict": True} for v in verifications]


def three_quarters(votes: list[bool]) -> bool:
    return 4 * sum(votes) >= 3 * len(votes)


@pytest.mark.parametrize(
    "changed, told",
    [
        (verify.step_consistency, "only then; labelled otherwise: 2 of 3"),  # nothing was changed
        (aggregation(lambda votes: 4 * sum(votes) > 3 * len(votes)), "includes the border"),
        (aggregation(lambda votes: sum(votes) >= 12), "labelled otherwise"),
        (aggregation(all), "includes the border"),
        (aggregation(outcome=three_quarters), "the outcome is no longer the majority"),
        (aggregation(parsed=unparsed_votes), "unparsed verifications have become votes"),
        (aggregation(text="old"), "dropped as no_match"),
        (aggregation(text="anybody"), "dropped as no_match"),
        (aggregation(text="steps"), "dropped as no_match"),
        (aggregation(first=True), "drawn at random"),
    ],
)
def test_aggregation(changed, told):
    """Guards: a solution that the check refuses; a mistake that it lets pass, or that it explains by another one."""
    assert exercises.check_aggregation(aggregation()) == []
    broken = exercises.check_aggregation(changed)
    assert any(told in message for message in broken), broken


def test_aggregation_by_a_shared_rule(monkeypatch):
    """Guards: `majority` changed for every method, which nothing in step_consistency itself shows."""
    monkeypatch.setattr(verify, "majority", three_quarters)
    broken = exercises.check_aggregation(verify.step_consistency)
    assert any("outcome_consistency has changed, too" in message for message in broken)
    assert any("the outcome is no longer the majority" in message for message in broken)


# --------------------------------------------------------------------------- another advantage


def advantage(own=False, divide=False, batch=False, exact=True, baseline=True, scale=1.0):
    """Leave-one-out, and mistakes."""

    def group_advantages(rewards: torch.Tensor, group_size: int, std_norm: bool = True) -> torch.Tensor:
        groups = rewards.view(1, -1) if batch else rewards.view(-1, group_size)
        G = groups.shape[1]
        others = groups.mean(1, keepdim=True) if own else (groups.sum(1, keepdim=True) - groups) / (G - 1)
        result = scale * (groups - others if baseline else groups)
        if divide:
            result = result / (groups.std(1, keepdim=True) + 1e-6)
        if exact:
            result = result.masked_fill(groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True), 0.0)
        return result.view(-1)

    return group_advantages


@pytest.mark.parametrize(
    "changed, told",
    [
        (grpo.group_advantages, "divided by the group's spread"),
        (advantage(divide=True), "divided by the group's spread"),
        (advantage(own=True), "own reward is part of its baseline"),
        (advantage(batch=True), "over the whole batch"),
        (advantage(baseline=False), "there is no baseline"),
        (advantage(exact=False), "exactly 0, not a rounding error"),
        (advantage(scale=-1.0), "-0.5, 0.167, -0.5, not"),
        (lambda rewards, G, std_norm=True: advantage()(rewards, G).sort().values, "in that order"),
        (lambda rewards, G, std_norm=True: advantage()(rewards, G).view(-1, G), "must give advantages (B,)"),
    ],
)
def test_advantage(changed, told):
    """Guards: the same."""
    assert exercises.check_advantage(advantage()) == []
    broken = exercises.check_advantage(changed)
    assert any(told in message for message in broken), broken


# --------------------------------------------------------------------------- the k2 estimator


def k2_loss(factor=0.5, sign=1.0, power=2, detach=False, metric="k3", coefficient=True, weighted=True):
    """grpo_loss with k2, and mistakes."""

    def grpo_loss(logprobs, old, ref, advantages, weights, *, clip_low=0.2, clip_high=0.2, kl_coef=0.001):
        ratio = (logprobs - old).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
        difference = ref - logprobs
        k3 = difference.exp() - difference - 1
        k2 = sign * factor * (difference.detach() if detach else difference) ** power
        used = weights if weighted else torch.ones_like(weights) / len(weights)
        loss = (used * ((kl_coef if coefficient else 1.0) * k2 - surrogate)).sum()
        return loss, {"kl": (weights * (k3 if metric == "k3" else k2)).sum().item()}

    return grpo_loss


@pytest.mark.parametrize(
    "changed, told",
    [
        (grpo.grpo_loss, "KL(policy || ref)"),
        (grpo.grpo_loss, "k1 and k3 aren't"),
        (k2_loss(factor=1.0), "factor 1/2"),
        (k2_loss(sign=-1.0), "away from the reference"),
        (k2_loss(power=1, factor=-1.0), "k1 and k3 aren't"),
        (k2_loss(detach=True), "no gradient"),
        (k2_loss(metric="k2"), "the metric must stay k3"),
        (k2_loss(coefficient=False), "multiplied by kl_coef"),
        (k2_loss(weighted=False), "the weights of its tokens"),
    ],
)
def test_k2(changed, told):
    """Guards: the same."""
    assert exercises.check_k2(k2_loss()) == []
    broken = exercises.check_k2(changed)
    assert any(told in message for message in broken), broken


# --------------------------------------------------------------------------- first-error credit


def first_error(choose=min, offset=0, both_signs=False, steps_only=False, cancel=False, only_step=False, keep=True):
    """Credit from the first error on, and mistakes."""

    def selective_advantage(advantage, step_verdicts, step_spans, length, discount=0.0):
        tokens = torch.full((length,), advantage)
        if advantage >= 0 and not both_signs:
            return tokens
        starts = [start for correct, (start, _) in zip(step_verdicts, step_spans, strict=True) if not correct]
        if not starts:
            return torch.zeros(length) if cancel else tokens
        border = choose(starts) + offset
        if steps_only:
            for start, end in step_spans:
                if end <= border:
                    tokens[start:end] *= discount
        else:
            tokens[:border] *= discount if keep else 0.0
        if only_step:
            ends = dict(step_spans)
            tokens[ends[choose(starts)] :] *= discount
        return tokens

    return selective_advantage


@pytest.mark.parametrize(
    "changed, told",
    [
        (grpo.selective_advantage, "builds on the error"),
        (grpo.selective_advantage, "whatever its steps"),
        (first_error(both_signs=True), "whatever its steps"),
        (first_error(choose=max), "the first one counts"),
        (first_error(offset=1), "from its first token"),
        (first_error(offset=2), "from its first token"),
        (first_error(steps_only=True), "tags included"),
        (first_error(cancel=True), "never be cancelled"),
        (first_error(only_step=True), "builds on the error"),
        (first_error(only_step=True), "tags and the answer"),
        (first_error(keep=False), "must keep its meaning"),
        (lambda *arguments: first_error()(*arguments)[:-1], "each of the 12 tokens"),
    ],
)
def test_first_error(changed, told):
    """Guards: the same."""
    assert exercises.check_first_error(first_error()) == []
    broken = exercises.check_first_error(changed)
    assert any(told in message for message in broken), broken


# --------------------------------------------------------------------------- the command


def test_the_command(monkeypatch, capsys):
    """Guards: a check that says "solved" of the code as it is shipped; a traceback where the change fails; a page that
    tells another command."""
    monkeypatch.setattr(sys, "argv", ["exercises", "k2", "advantage"])
    assert exercises.main() == 1
    said = capsys.readouterr().out
    assert "k2: not yet" in said and "advantage: not yet" in said and "aggregation" not in said
    monkeypatch.setitem(exercises.EXERCISES, "k2", lambda: [])
    monkeypatch.setitem(exercises.EXERCISES, "advantage", lambda: [].pop())
    assert exercises.main() == 1
    said = capsys.readouterr().out
    assert "k2: solved" in said and "the changed function fails: IndexError" in said
    monkeypatch.setattr(sys, "argv", ["exercises", "k1"])
    assert exercises.main() == 2 and capsys.readouterr().err.count("\n") == 1
    text = (ROOT / "data" / "exercises.md").read_text()
    assert all(f"python -m tests.exercises {name}\n" in text for name in exercises.EXERCISES)
    command = [sys.executable, "-m", "tests.exercises", "first_error"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout.startswith("first_error: not yet\n  - ")
