"""Stage III: GRPO with a process reward model as the reward, without reference answers (SPARK, Sec. 3.3 and 4).

    problems.jsonl, a policy, a reward model -> grpo.py -> a Hugging Face directory; metrics.jsonl and training/ inside

    python grpo.py                                         # the tiny world, on a CPU, in about four minutes
    python grpo.py --reward random --out runs/tiny/random  # the control (an explicit flag wins over the tiny numbers)
    torchrun --nproc_per_node 8 grpo.py --policy runs/policy --prm runs/prm_cot --problems problems.jsonl \\
        --out runs/grpo

One step: (1) sample a group of G responses to each problem; (2) check their format and let the reward model judge the
valid ones; (3) normalise rewards within each group to advantages; (4) one clipped policy-gradient update with a KL
penalty towards the initial policy.

| --reward            | of a response                                                     | baseline |
|---------------------|-------------------------------------------------------------------|----------|
| process_aware       | V y                                                               |          |
| step_augmented      | V (0.4 k/n + 0.6 y)                                               |          |
| selective_advantage | V y, and a token keeps its advantage where its step's verdict agrees |       |
| global_step         | V y, and 0.8 A + 0.2 A_step                                       |          |
| rlvr                | the answer is graded right against the reference                  | x        |
| majority            | the answer is the group's most frequent one                       | x        |
| self_certainty      | mean KL(uniform || p) over its tokens                             | x        |
| random              | V times a coin                                                    | x        |

V: the format is valid; y: the reward model's verdict; k of n steps judged correct.

What is left out of PPO, and why: no critic (the group's mean is the baseline), no GAE (one reward at the end), no
second model of old log-probs (with one update per batch the old policy is the current one, so the ratio is 1 in value
and carries the gradient; the loss *value* is then nearly 0 although its gradient isn't).

What differs from the released code: the reward model always gets the prompt and the layout it was trained on; the
log-probs recorded by the sampler are compared with the trainer's at every step; an unparsed judgement is a reward of
0 and counted.

Shapes: B responses of a global batch, G responses of a group, N response tokens packed one behind the other.
"""

import argparse
import random
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data import records, report

# evaluate has the one grader: the verifiable baseline's reward and the held-out monitor must agree with evaluation
from evaluate import grade_all, heldout_accuracy, majority_answer
from generate import (
    SOLVE_PROMPT,
    STEP_TAG,
    Engine,
    extract_answer,
    find_boxes,
    find_model,
    format_valid,
    open_config,
    open_engine,
    open_model,
    split_steps,
)
from kernels import distributed
from kernels.distributed import InputError, RunError
from kernels.sampler import CPU_SLOTS, PREFILL_TOKENS, Sampler
from kernels.transformer import Config, Transformer, load_model
from train_prm import REWARD_MODELS, Judgement, clip_and_step, rank_share, score_solutions, split_micro_batches

import torch
from torch import Tensor
from tqdm import tqdm

# Used when no --policy is given; an explicit flag wins.
TINY = {
    "policy": "data/tiny/policy",
    "prm": "runs/tiny/prm_cot",
    "problems": "data/tiny/problems.jsonl",
    "out": "runs/tiny/grpo",
    "heldout": "data/tiny/heldout.jsonl",
    "gold": "data/tiny/gold.jsonl",
    "steps": 60,
    "batch_size": 16,
    "group_size": 8,
    "lr": 1.5e-4,
    "max_new_tokens": 120,
    "prm_max_new_tokens": 200,
    "min_steps": 2,
    "max_steps": 8,
    "heldout_every": 10,
    "save_every": 20,
    "slots": 128,
    "device": "cpu",
}
FREE = {"out", "device", "steps", "slots", "micro_tokens", "save_every", "dump_rollouts", "sample_every",
        "heldout_every", "heldout", "activation_checkpointing", "max_gap"}  # fmt: skip
STEP_DESIGNS = {"selective_advantage": 4, "global_step": 3}  # and the fewest steps that they put up with
JUDGED = ["process_aware", "step_augmented", *STEP_DESIGNS]  # these need a reward model
REWARDS = [*JUDGED, "rlvr", "majority", "self_certainty", "random"]

# --------------------------------------------------------------------------- what the reward model is shown


def shown_solution(response: str) -> tuple[list[str], str | None]:
    """(steps, answer) that the reward model is shown: everything up to the last `</answer>`, and the last answer.

    Under the constraint `none` this includes whatever was appended to a first solution; if it were cut away, appending
    could never be rewarded, and could not be studied.
    """
    text = response[: response.rfind("</answer>") + len("</answer>")] if "</answer>" in response else response
    return split_steps(text), extract_answer(text)


# --------------------------------------------------------------------------- rewards


def process_aware_reward(valid: bool, judgement: Judgement | None) -> float:
    """r = V * y, with y the reward model's final verdict; an unparsed judgement is 0."""
    return float(valid and judgement is not None and judgement.verdict is True)


def step_augmented_reward(valid: bool, judgement: Judgement | None) -> float:
    """r = V * (0.4 k/n + 0.6 y), k of n steps judged correct; k/n is 0 without step verdicts, r without a verdict."""
    if not valid or judgement is None or judgement.verdict is None:
        return 0.0
    share = sum(judgement.step_verdicts) / len(judgement.step_verdicts) if judgement.step_verdicts else 0.0
    return 0.4 * share + 0.6 * judgement.verdict


def majority_rewards(answers: list[str | None]) -> list[float]:
    """r = 1 for the answers of one group that equal its most frequent one (TTRL), as the grader sees it, else 0."""
    winner = majority_answer(answers)
    if winner is None:
        return [0.0] * len(answers)
    return [float(grade is True) for grade in grade_all([(answer, winner) for answer in answers])]


def self_certainty_reward(certainty: list[float]) -> float:
    """r = mean over the response's tokens of KL(uniform || p), recorded by the sampler (Intuitor)."""
    return sum(certainty) / max(len(certainty), 1)


def random_reward(valid: bool, rng: random.Random) -> float:
    """r = V * coin: the control. It may teach the format, it must not teach mathematics."""
    return float(valid and rng.random() < 0.5)


# --------------------------------------------------------------------------- advantages


def group_advantages(rewards: Tensor, group_size: int, std_norm: bool = True) -> Tensor:
    """A = (r - mean of the group) / (std of the group + 1e-6), unbiased std; rewards (B,), groups consecutive -> (B,).
    Without std_norm (Dr. GRPO) A = r - mean.

    A group of equal rewards gives exactly 0: compared by max and min, because in fp32 the mean of sixteen rewards of
    0.7 isn't 0.7, and the tiny difference over a tiny std would be anything.
    """
    groups = rewards.view(-1, group_size)  # (B / G, G)
    if group_size == 1:
        return torch.zeros_like(rewards)
    centred = groups - groups.mean(1, keepdim=True)
    scaled = centred / (groups.std(1, keepdim=True) + 1e-6) if std_norm else centred
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return scaled.masked_fill(equal, 0.0).view(-1)


def locate_steps(tokenizer, ids: list[int], text: str, steps: list[str]) -> list[tuple[int, int]]:
    """The half-open token range of each step of a response in its sampled ids, which decode to text; nothing is encoded
    again. Tagged steps are looked for inside their tags, as the same words may stand outside. [] if a step isn't in the
    text as it stands. A token that holds the end of one step and the beginning of the next belongs to the first; a
    step's range may then be empty."""

    def characters(n: int) -> int:  # that the first n tokens make up; of a character of several tokens the last counts
        return len(tokenizer.decode(ids[:n], skip_special_tokens=True).rstrip("\ufffd"))

    tagged = [match.start(1) for match in STEP_TAG.finditer(text) if match.group(1).strip()]
    spans, place, token = [], 0, 0
    for k, step in enumerate(steps):
        start = text.find(step, max(place, tagged[k] if k < len(tagged) else 0))
        if start < 0:
            return []
        place = start + len(step)
        numbers = range(len(ids) + 1)
        first = bisect_left(numbers, start, lo=token, key=characters)
        if first > token and characters(first) > start:  # the token before holds the step's first character, too
            first -= 1
        token = bisect_left(numbers, place, lo=first, key=characters)
        spans.append((first, token))
    return spans


def selective_advantage(
    advantage: float, step_verdicts: list[bool], step_spans: list[tuple[int, int]], length: int, discount: float = 0.0
) -> Tensor:
    """(T,) advantages of one response's tokens: a token keeps A if its step is correct and A >= 0, or incorrect and
    A < 0; otherwise A times discount. Tokens in no step keep A. Spans: half-open token ranges."""
    tokens = torch.full((length,), advantage)
    for correct, (start, end) in zip(step_verdicts, step_spans, strict=True):
        if correct != (advantage >= 0):
            tokens[start:end] *= discount
    return tokens


def global_step_advantage(
    step_rewards: list[list[float]], step_ends: list[list[int]], lengths: list[int]
) -> list[Tensor]:
    """A_step, (T_i,) for each response of one group: a step's reward stands at its last token, step_ends (inclusive),
    normalised by mean and std over all steps of the group, and a token gets the sum from itself to the end."""
    pool = torch.tensor([reward for rewards in step_rewards for reward in rewards], dtype=torch.float32)
    mean, scale = 0.0, 1.0
    if len(pool) > 1:
        mean, scale = pool.mean().item(), pool.std().item() + 1e-6
    equal = len(pool) > 1 and pool.max() == pool.min()  # then exactly 0, as in group_advantages
    result = []
    for rewards, ends, length in zip(step_rewards, step_ends, lengths, strict=True):
        tokens = torch.zeros(length)
        for reward, end in zip(rewards, ends, strict=True):
            tokens[: end + 1] += 0.0 if equal else (reward - mean) / scale
        result.append(tokens)
    return result


def token_advantages(
    rollouts: list["Rollout"], advantages: Tensor, reward: str, group_size: int, discount: float
) -> list[Tensor]:
    """The advantage of every token, (T_i,) for each response, from A_process (B,). The step designs change it where the
    reward model judged just the steps that the response has, and their number isn't penalised; elsewhere A stays."""
    result = [a.expand(len(r.ids)) for r, a in zip(rollouts, advantages, strict=True)]
    spans = [[] if r.penalised else r.spans for r in rollouts]
    verdicts = [r.judgement.step_verdicts if located else [] for r, located in zip(rollouts, spans, strict=True)]
    if reward == "selective_advantage":
        for i, r in enumerate(rollouts):
            result[i] = selective_advantage(advantages[i].item(), verdicts[i], spans[i], len(r.ids), discount)
    if reward == "global_step":
        for start in range(0, len(rollouts), group_size):
            group = range(start, start + group_size)
            rewards = [[(1 if verdict else -1) / len(verdicts[i]) for verdict in verdicts[i]] for i in group]
            ends = [[end - 1 for _, end in spans[i]] for i in group]
            of_steps = global_step_advantage(rewards, ends, [len(rollouts[i].ids) for i in group])
            for i, a_step in zip(group, of_steps, strict=True):
                if spans[i]:
                    result[i] = 0.8 * advantages[i] + 0.2 * a_step
    return result


# --------------------------------------------------------------------------- the loss


def loss_weights(lengths: list[int], norm: str, max_tokens: int) -> Tensor:
    """The weight of every response token in the loss, (N,) fp32, over the whole global batch of B responses.

    token: 1 / N, every token counts the same (the released code). sequence: 1 / (B * len), every response counts the
    same (the paper's formula). dr_grpo: 1 / (B * max_tokens), a constant, which removes the bias towards long wrong
    answers. Computed once, before the batch is split, so that the split can't matter.
    """
    B, N = len(lengths), sum(lengths)
    per_token = {
        "token": [1 / N] * B,
        "sequence": [1 / (B * max(n, 1)) for n in lengths],
        "dr_grpo": [1 / (B * max_tokens)] * B,
    }[norm]
    return torch.tensor(per_token).repeat_interleave(torch.tensor(lengths))


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.001,
    kl: str = "k3",
) -> tuple[Tensor, dict[str, float]]:
    """The clipped GRPO loss with a KL penalty; every argument (N,) over packed response tokens.

        loss = sum_t w_t [ -min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t) + beta k_t ]
        rho = exp(logp - old),   k3 = exp(ref - logp) - (ref - logp) - 1,   k2 = (ref - logp)^2 / 2

    Both have KL(policy || ref) as their expected value or near it (k3 exactly, k2 to second order), but what the loss
    uses is the gradient, and there they part: with samples of the current policy, the expected gradient of k3 is that
    of KL(ref || policy), and only k2's is that of KL(policy || ref).

    stats: weighted sums over these tokens of k3, of the clipped fraction, and of the surrogate.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    difference = ref_logprobs - logprobs
    k3 = difference.exp() - difference - 1
    penalty = k3 if kl == "k3" else difference**2 / 2
    loss = (weights * (kl_coef * penalty - surrogate)).sum()
    with torch.no_grad():
        bound = (clipped * advantages < ratio * advantages).float()  # tokens whose gradient the clip has cut off
        stats = {name: (weights * x).sum().item() for name, x in
                 (("kl", k3), ("clip_fraction", bound), ("surrogate", surrogate))}  # fmt: skip
    return loss, stats


# --------------------------------------------------------------------------- one step


@dataclass
class Rollout:
    """One response on its way from the sampler to the loss. Its token ids are never decoded and encoded again."""

    problem_id: str
    prompt: list[int]
    ids: list[int]
    logprobs: list[float]  # recorded by the sampler
    text: str
    finish: str
    valid: bool = False
    judgement: Judgement | None = None
    reward: float = 0.0
    certainty: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # of the steps that were judged; [] without verdicts
    penalised: bool = False  # its number of steps is out of bounds
    old: Tensor | None = None  # (T,) log-probs before the first update of its batch
    ref: Tensor | None = None  # (T,) log-probs of the frozen initial policy
    unknown: bool = False  # a baseline that reads answers couldn't grade it


# An empty micro-batch still runs, on one token that is no target: FSDP needs every rank in every micro-batch.
NOTHING = Rollout("", [0], [], [], "", "")


def sample_rollouts(engine: Engine, problems: list[dict], args, step: int) -> list[Rollout]:
    """G responses to each problem, groups consecutive, from the full distribution at --temperature, as in the loss."""
    groups = engine.sample(
        [p["prompt"] for p in problems],
        keys=[f"{step}/{p['place']}/{p['id']}" for p in problems],
        num_samples=args.group_size,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        certainty=args.reward == "self_certainty",
    )
    rollouts = []
    for p, s in ((p, s) for p, group in zip(problems, groups, strict=True) for s in group):
        text = engine.text(s)
        rollouts.append(Rollout(p["id"], p["prompt"], s.ids, s.logprobs, text, s.finish, certainty=s.certainty))
    return rollouts


def score_rollouts(
    rollouts: list[Rollout], problems: list[dict], args, step: int, tokenizer, judge: Callable | None, gold: dict
) -> None:
    """Set valid, scored and reward of each rollout. Only format-valid responses cost a reward-model call."""
    text_of = {p["id"]: p["problem"] for p in problems}
    for r in rollouts:
        r.valid = format_valid(r.text, args.format_constraints, r.finish == "stop")
    if args.reward in JUDGED:
        valid = [r for r in rollouts if r.valid]
        shown = [shown_solution(r.text) for r in valid]
        solutions = [  # the id is for the seeds of --prm_votes: equal responses get equal judgements, on any rank
            {"id": f"{r.problem_id}/{r.text}", "problem": text_of[r.problem_id], "steps": steps, "answer": answer}
            for r, (steps, answer) in zip(valid, shown, strict=True)
        ]
        for r, (steps, _), scored in zip(valid, shown, judge(solutions, step), strict=True):
            r.judgement = scored
            if args.reward in STEP_DESIGNS and scored.verdict is not None and scored.step_verdicts is not None:
                r.spans = locate_steps(tokenizer, r.ids, r.text, steps)
        reward_of = step_augmented_reward if args.reward == "step_augmented" else process_aware_reward
        for r in rollouts:
            r.reward = reward_of(r.valid, r.judgement)
            if args.reward in STEP_DESIGNS and not args.min_steps <= len(split_steps(r.text)) <= args.max_steps:
                r.penalised, r.reward = True, 0.0
    elif args.reward == "rlvr":
        pairs = [(extract_answer(r.text) or "", gold[r.problem_id]) for r in rollouts]
        for r, correct in zip(rollouts, grade_all(pairs), strict=True):
            r.unknown, r.reward = correct is None, float(correct is True)
    elif args.reward == "majority":
        for start in range(0, len(rollouts), args.group_size):
            group = rollouts[start : start + args.group_size]
            for r, reward in zip(group, majority_rewards([extract_answer(r.text) for r in group]), strict=True):
                r.reward = reward
    elif args.reward == "self_certainty":
        for r in rollouts:
            r.reward = self_certainty_reward(r.certainty)
    else:
        for i, r in enumerate(rollouts):
            r.reward = random_reward(r.valid, random.Random(f"{args.seed}/{step}/{r.problem_id}/{i % args.group_size}"))
    if args.overlong == "penalise":
        for r in rollouts:
            r.reward = 0.0 if r.finish == "length" else r.reward


def in_loss(rollouts: list[Rollout], advantages: list[Tensor], args) -> list[int]:
    """Indices of the responses that the loss is over: all, but for those that --overlong mask and --drop_equal_groups
    (of which no token, (T_i,) each, has an advantage) leave out. These aren't in the loss's denominator either."""
    kept = []
    for i, r in enumerate(rollouts):
        start = i - i % args.group_size
        equal = not any(a.any() for a in advantages[start : start + args.group_size])
        if not (args.drop_equal_groups and equal) and not (args.overlong == "mask" and r.finish == "length"):
            kept.append(i)
    return kept


def pack_responses(rollouts: list[Rollout], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(ids (N,), lengths (S,), targets (N,), layout (M,)) of a micro-batch, as `Transformer.packed` takes them: the
    targets are all responses, in order, and a prompt stands there once for all responses to it. Its last token is left
    to each of them, because it predicts their first. layout: None if nothing is shared."""
    ids, targets, layout, lengths, prompts = [], [], [], [], {}
    for r in rollouts:
        prompt, last = tuple(r.prompt[:-1]), r.prompt[-1:]
        if prompt not in prompts:
            prompts[prompt] = range(len(ids), len(ids) + len(prompt))
            ids += prompt
            targets += [-1] * len(prompt)
        own = last + r.ids[:-1]
        layout += [*prompts[prompt], *range(len(ids), len(ids) + len(own))]
        lengths.append(len(prompt) + len(own))
        ids += own
        targets += r.ids or [-1]
    ids, lengths, targets, layout = (torch.tensor(x, device=device) for x in (ids, lengths, targets, layout))
    return ids, lengths, targets, layout if len(layout) > len(ids) else None


def set_reference_logprobs(model: Transformer, rollouts: list[Rollout], args) -> None:
    """Set ref of each rollout of this rank: its log-probs under the frozen initial policy."""
    with torch.no_grad():
        for group in split_micro_batches([len(r.prompt) + len(r.ids) for r in rollouts], args.micro_tokens):
            chunk = [rollouts[i] for i in group]
            ids, row_lengths, targets, layout = pack_responses(chunk or [NOTHING], model.device)
            logprobs, _ = model.packed(ids, row_lengths, targets, args.temperature, layout)
            for r, values in zip(chunk, logprobs[targets >= 0].split([len(r.ids) for r in chunk]), strict=True):
                r.ref = values


def update_policy(
    model, optimizer, reference, rollouts: list[Rollout], advantages: list[Tensor], args
) -> dict[str, float]:
    """One gradient step on the global batch of rollouts; returns its metrics. Every rank has all rollouts and
    advantages, (T_i,) or one number each, and trains on its share. A batch's first update fixes its old log-probs."""
    lengths = [len(r.ids) for r in rollouts]
    weights = loss_weights(lengths, args.loss_norm, args.max_new_tokens).to(model.device)
    weight = weights.sum().item()  # 1 except under dr_grpo: metrics are divided by it, the loss isn't
    weights = weights.split(lengths)
    total = [len(r.prompt) + len(r.ids) for r in rollouts]
    mine = rank_share(total)
    # All ranks or none: a rank with no rollouts of its own has to take part.
    if reference is not None and distributed.max_over_ranks(any(rollouts[i].ref is None for i in mine)):
        set_reference_logprobs(reference, [rollouts[i] for i in mine], args)
    sums = dict.fromkeys(("kl", "clip_fraction", "surrogate", "entropy", "gap"), 0.0)
    worst = 0.0
    for group in split_micro_batches([total[i] for i in mine], args.micro_tokens):
        chunk = [mine[j] for j in group]
        ids, row_lengths, targets, layout = pack_responses([rollouts[i] for i in chunk] or [NOTHING], model.device)
        logprobs, entropy = model.packed(ids, row_lengths, targets, args.temperature, layout)
        if not chunk:
            (0.0 * logprobs.sum()).backward()
            continue
        here = targets >= 0
        logprobs, entropy = logprobs[here], entropy[here].detach()  # (N,)
        for i, values in zip(chunk, logprobs.detach().split([lengths[i] for i in chunk]), strict=True):
            rollouts[i].old = values if rollouts[i].old is None else rollouts[i].old
        old = torch.cat([rollouts[i].old for i in chunk])
        recorded = torch.tensor([x for i in chunk for x in rollouts[i].logprobs], device=model.device)
        importance = (old - recorded).exp().clamp(max=args.tis_cap) if args.tis_cap else 1.0
        loss, stats = grpo_loss(
            logprobs,
            old,
            torch.cat([rollouts[i].ref for i in chunk]) if reference is not None else old,
            torch.cat([advantages[i].expand(lengths[i]) for i in chunk]).to(model.device) * importance,
            torch.cat([weights[i] for i in chunk]),
            clip_low=args.clip_low,
            clip_high=args.clip_high,
            kl_coef=args.kl_coef,
            kl=args.kl,
        )
        (loss * distributed.world_size()).backward()  # FSDP averages gradients over ranks; the loss is a sum
        gap = (recorded - old).abs()
        worst = max(worst, gap.max().item())
        stats |= {"entropy": entropy.sum().item() / sum(lengths), "gap": gap.sum().item() / sum(lengths)}
        for name, value in stats.items():
            sums[name] += value
    values = dict(zip(sums, distributed.sum_over_ranks(*sums.values()), strict=True))
    if not values["gap"] <= args.max_gap:
        raise RunError(
            f"the sampler's log-probs differ from the trainer's by {values['gap']:.4f} nats a token, more than "
            f"--max_gap {args.max_gap}: the sampled policy isn't the one being trained; stopped before the update"
        )
    norm = clip_and_step(model, optimizer, args.lr, args.max_grad_norm)
    measured = {"kl/k3": values["kl"] / weight} if reference is not None else {}  # from itself it would be 0
    return measured | {
        "loss/clip_fraction": values["clip_fraction"] / weight,
        "loss/surrogate": values["surrogate"],
        "policy/entropy": values["entropy"],
        "gap/mean": values["gap"],
        "gap/max": distributed.max_over_ranks(worst),
        "train/grad_norm": norm,
    }


def rollout_metrics(rollouts: list[Rollout], advantages: Tensor, group_size: int, prm_kind: str) -> dict[str, float]:
    """What a reader watches: the reward and its parts, and the indicators of reward hacking; means over the batch."""
    judged = [r for r in rollouts if r.judgement is not None]
    stepwise = prm_kind != "orm"  # which judges no steps
    mismatched = [stepwise and r.judgement.verdict is not None and r.judgement.step_verdicts is None for r in judged]

    def mean(values: list) -> float:
        return sum(map(float, values)) / max(len(values), 1)

    rewards = torch.tensor([r.reward for r in rollouts])
    return {
        "reward/mean": mean([r.reward for r in rollouts]),
        "reward/std": rewards.std().item() if len(rollouts) > 1 else 0.0,
        "reward/verdict": mean([r.judgement.verdict is True for r in judged]),
        "reward/steps_correct": mean([sum(v) / len(v) for r in judged if (v := r.judgement.step_verdicts)]),
        "reward/unknown": mean([r.unknown for r in rollouts]),
        "reward/unparsed": mean([r.judgement.verdict is None for r in judged]),
        "reward/count_mismatch": mean(mismatched),
        "format/valid": mean([r.valid for r in rollouts]),
        "format/boxes": mean([len(find_boxes(r.text)) for r in rollouts]),
        "format/answers": mean([r.text.count("<answer>") for r in rollouts]),
        "format/text_after_answer": mean([bool(r.text.partition("</answer>")[2].strip()) for r in rollouts]),
        "response/steps": mean([len(split_steps(r.text)) for r in rollouts]),
        "response/length": mean([len(r.ids) for r in rollouts]),
        "response/penalised": mean([r.penalised for r in rollouts]),
        "response/truncated": mean([r.finish == "length" for r in rollouts]),
        "group/zero_std": mean((advantages.view(-1, group_size) == 0).all(1).tolist()),
    }


def heldout_metrics(
    engine: Engine, heldout: list[dict], gold: dict[str, str], judge: Callable | None, args, step: int
) -> dict[str, float]:
    """avg@1 of a policy on the held-out problems, and among responses that are valid under `paper` (what the format alone
    can't raise). With a reward model also the reward: where it goes up and the accuracy doesn't, it is being gamed."""
    result = heldout_accuracy(
        engine, heldout, gold, num_samples=1, temperature=1.0, max_new_tokens=args.max_new_tokens, seed=args.seed
    )
    texts, right = [sample["text"] for (sample,) in result.samples], torch.from_numpy(result.correct[:, 0])
    valid = torch.tensor([format_valid(text) for text in texts])
    numbers = {"accuracy": result.accuracy, "low": result.low, "high": result.high}
    numbers["valid"] = valid.float().mean().item()
    if valid.any():  # the accuracy of no response isn't a number
        numbers["accuracy_of_valid"] = right[valid].float().mean().item()
    if judge:
        ends = [sample["finish"] for (sample,) in result.samples]
        responses = [Rollout(p["id"], [], [], [], *x) for p, *x in zip(heldout, texts, ends, strict=True)]
        mine = responses[distributed.rank() :: distributed.world_size()]
        score_rollouts(mine, heldout, args, step, engine.tokenizer, judge, gold)
        rewards = distributed.gather([r.reward for r in mine])
        numbers["reward"] = sum(rewards) / len(rewards)
        numbers["reward_minus_accuracy"] = numbers["reward"] - numbers["accuracy"]
    return {f"heldout/{name}": value for name, value in numbers.items()}


def batch_for_step(step: int, problems: list[dict], batch_size: int, seed: int) -> list[dict]:
    """The problems of a step: every epoch a new order; a function of (step, seed), so a resumed run goes on exactly."""
    start, n = step * batch_size, len(problems)
    order: list[int] = []  # of the epochs that the batch touches
    for epoch in range(start // n, (start + batch_size - 1) // n + 1):
        fresh = list(range(n))
        random.Random(f"{seed}/{epoch}").shuffle(fresh)
        order += fresh
    return [{**problems[order[start % n + k]], "place": start + k} for k in range(batch_size)]


def estimate_memory(policy: Config, prm: Config | None, args, gpu: bool) -> dict[str, float]:
    """What a rank will need, in GiB. Shared out over ranks: fp32 weights, gradients and AdamW's two moments, the
    frozen reference. On every rank: the sampler's copy, the reward model, and one KV cache, the larger of two (the
    sampler's is freed before the reward model's is made). Left out: a few gathered layers, what the CUDA libraries
    take, fragments, and the start, where all fp32 weights (4 bytes a parameter) are on each rank for a moment."""

    def parameters(c: Config) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in Transformer(c).parameters())

    def cache(c: Config, new_tokens: int) -> int:
        longest = min(args.max_prompt_tokens + new_tokens, c.max_positions)
        held = 2 * PREFILL_TOKENS  # of the prompts that have just been run, twice while they are put together
        return 2 * c.num_layers * ((args.slots or CPU_SLOTS) * longest + held) * c.num_kv_heads * c.head_dim * size

    size = 2 if gpu else 4  # bytes of a number outside the optimizer
    weights, shared = parameters(policy), 4 + size * (args.kl_coef > 0)
    # Kept for the backward pass, for each token: at a norm 4 numbers of hidden size; queries, keys and values for all
    # heads, and the attention's output twice; 4 of the MLP's width. Recomputing keeps only the input of a layer.
    norm, heads = 4 * policy.hidden_size, policy.num_heads * policy.head_dim
    layer, layers = 2 * norm + 5 * heads + 4 * policy.intermediate_size, policy.num_layers
    kept = norm + (layer + layers * policy.hidden_size if args.activation_checkpointing else layers * layer)
    judgement = args.max_new_tokens + args.prm_max_new_tokens  # the response is part of the reward model's prompt
    needed = {
        "weights": shared * weights / distributed.world_size()
        + (size * weights if gpu or distributed.world_size() > 1 else 0),
        "gradients and optimizer": 12 * weights / distributed.world_size(),
        "activations": args.micro_tokens * kept * size,
        "KV cache": max(cache(policy, args.max_new_tokens), cache(prm, judgement) if prm else 0),
        "reward model": size * parameters(prm) if prm else 0,
    }
    return {name: count / 2**30 for name, count in needed.items()}


def describe_rollout(r: Rollout, advantage: float) -> dict:
    """A response as a record: what --dump_rollouts writes and `report.show_rollout` shows."""
    return {
        "problem_id": r.problem_id, "text": r.text, "ids": r.ids, "finish": r.finish, "valid": r.valid,
        "reward": r.reward, "advantage": advantage, "judgement": r.judgement and vars(r.judgement),
    }  # fmt: skip


def dump_rollouts(path: Path, rollouts: list[Rollout], advantages: Tensor) -> None:
    """Everything about a step's responses, one a line, for reading later."""
    rows = [describe_rollout(r, a) for r, a in zip(rollouts, advantages.tolist(), strict=True)]
    records.write_lines(path, rows)


def warn_of_garbage(rollouts: list[Rollout], step: int) -> None:
    """Say that a whole batch of judgements has no verdict: nobody is rewarded, and the policy only drifts."""
    texts = [r.judgement.text for r in rollouts if r.judgement is not None]
    tqdm.write(f"warning: step {step}: not one of {len(texts)} judgements has a verdict, so nothing is rewarded; check "
               f"--prm, --prm_kind and --prm_max_new_tokens; the first one: {texts[0][:200]!r}")  # fmt: skip


def print_sample(problem: dict, r: Rollout, advantage: float, step: int) -> None:
    """One response with its judgement: reading samples is the first diagnostic."""
    tqdm.write(f"--- step {step} · {problem['problem']}\n{report.show_rollout(describe_rollout(r, advantage))}")


# --------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("data and models")
    group.add_argument("--policy", help="where to start: a Hugging Face directory or hub name; none: the tiny world")
    group.add_argument("--prm", help="reward model: a Hugging Face directory or hub name")
    group.add_argument("--prm_kind", default="prm_cot", choices=list(REWARD_MODELS), help="what --prm was trained as")
    group.add_argument("--problems", help="JSON Lines with id and problem")
    group.add_argument("--out", help="directory of the trained policy")
    group.add_argument("--heldout", help="problems for monitoring, never for training")
    group.add_argument("--gold", help="JSON Lines with id and answer, for monitoring and --reward rlvr only")
    group = parser.add_argument_group("reward")
    group.add_argument("--reward", default="process_aware", choices=REWARDS)
    group.add_argument("--format_constraints", default="paper", choices=["none", "paper", "strict"])
    group.add_argument("--prm_max_new_tokens", type=int, default=4096, help="per judgement")
    group.add_argument("--prm_votes", type=int, default=1, help="judgements per response; 1: a greedy one")
    group.add_argument("--selective_discount", type=float, default=0.0, help="0.5 halves what is 0 in the paper")
    group.add_argument("--min_steps", type=int, help="fewer earn nothing; default: 4 (selective), 3 (global_step)")
    group.add_argument("--max_steps", type=int, default=20, help="more earn nothing, in these two")
    group.add_argument("--overlong", default="keep", choices=["keep", "mask", "penalise"],
                       help="responses cut by the length limit: left, out of the loss, or with reward 0")  # fmt: skip
    group.add_argument("--drop_equal_groups", action="store_true", help="groups without any advantage leave the loss")
    group = parser.add_argument_group("GRPO")
    group.add_argument("--steps", type=int, default=300, help="updates")
    group.add_argument("--batch_size", type=int, default=256, help="problems per step")
    group.add_argument("--group_size", type=int, default=16, help="G, responses per problem")
    group.add_argument("--max_new_tokens", type=int, default=2048, help="per response")
    group.add_argument("--max_prompt_tokens", type=int, default=2048, help="longer problems are left out")
    group.add_argument("--temperature", type=float, default=1.0, help="of the rollouts and of every log-prob")
    group.add_argument("--lr", type=float, default=1e-6, help="constant")
    group.add_argument("--weight_decay", type=float, default=0.0)
    group.add_argument("--max_grad_norm", type=float, default=1.0)
    group.add_argument("--clip_low", type=float, default=0.2)
    group.add_argument("--clip_high", type=float, default=0.2)
    group.add_argument("--no_std_norm", action="store_true", help="advantages aren't divided by the group's std")
    group.add_argument("--updates", type=int, default=1, help="per batch")
    group.add_argument("--tis_cap", type=float, default=0.0, help="caps importance weights, trainer/sampler; 0: none")
    group.add_argument("--kl_coef", type=float, default=0.001, help="0 turns the KL term off")
    group.add_argument("--kl", default="k3", choices=["k3", "k2"], help="the estimator in the loss, see grpo_loss")
    group.add_argument("--loss_norm", default="token", choices=["token", "sequence", "dr_grpo"])
    group.add_argument("--max_gap", type=float, default=0.1, help="largest mean |sampler - trainer| log-prob, nats")
    group = parser.add_argument_group("running")
    group.add_argument("--micro_tokens", type=int, default=16_384, help="tokens per forward pass and rank")
    group.add_argument("--slots", type=int, help="answers sampled at once; default: by the GPU's memory, on a CPU 128")
    group.add_argument("--activation_checkpointing", action="store_true", help="recompute activations: less memory")
    group.add_argument("--heldout_every", type=int, default=10, help="steps between measurements on --heldout")
    group.add_argument("--sample_every", type=int, default=10, help="steps between printed samples")
    group.add_argument("--dump_rollouts", action="store_true", help="write every step's responses to <out>/rollouts")
    group.add_argument("--save_every", type=int, default=20, help="steps between checkpoints")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    args = records.parse_args(parser, TINY, "policy", "problems", "out")
    if args.min_steps is None:
        args.min_steps = STEP_DESIGNS.get(args.reward, 1)
    records.check_numbers(args, "steps", "updates", "prm_votes", "min_steps", "max_steps", "batch_size",
                 "max_new_tokens", "prm_max_new_tokens", "micro_tokens", "slots", "heldout_every", "sample_every",
                 "save_every")  # fmt: skip
    records.check_numbers(args, "lr", "weight_decay", "kl_coef", least=0)
    records.check_numbers(args, "group_size", least=2)  # one response is always as good as its group
    if args.reward in JUDGED and args.prm is None:
        raise InputError("--prm is missing; it goes with --policy")
    if args.reward in ("step_augmented", *STEP_DESIGNS) and args.prm_kind == "orm":
        raise InputError(
            f"--reward {args.reward} needs verdicts on steps, and --prm_kind orm gives none; take process_aware"
        )
    if args.min_steps > args.max_steps:
        raise InputError(f"--min_steps {args.min_steps} is more than --max_steps {args.max_steps}; lower it")
    if not args.temperature > 0:
        raise InputError(f"--temperature {args.temperature}: it must be positive, a greedy group has no advantage")
    if Path(args.out).resolve() == Path(args.policy).resolve():
        raise InputError(f"--out {args.out} is the policy itself, which the KL term needs as it is; choose another")
    run(args)


def load_gold(args: argparse.Namespace, problems: list[dict]) -> dict[str, str]:
    """Reference answers by problem id, those of --gold (only the tiny world's file may be missing). Only --reward rlvr
    needs them, and only then those in the problems file count, too; InputError if it lacks one."""
    needed = args.reward == "rlvr"
    gold = {p["id"]: p["answer"] for p in problems if needed and p.get("answer") is not None}
    if args.gold is not None and (needed or args.gold != TINY["gold"] or Path(args.gold).is_file()):
        gold |= records.read_answers([args.gold])
    missing = [p["id"] for p in problems if needed and p["id"] not in gold]
    if missing:
        raise InputError(f"--reward rlvr: problem {missing[0]} has no reference answer; give --gold with all of them")
    return gold


def run(args: argparse.Namespace) -> None:
    """The training loop."""
    device = distributed.init_distributed(args.device)
    out = Path(args.out)
    problems = records.read(args.problems, ["id", "problem"], "python -m data.make_tiny problems")
    args.problems_sha256 = records.hash_file(args.problems)  # a run that goes on must find the same problems
    gold = load_gold(args, problems)
    heldout = records.read(args.heldout, ["id", "problem"]) if args.heldout and gold else []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    configs = [open_config(args.policy, "--policy"), open_config(args.prm, "--prm") if args.reward in JUDGED else None]
    memory = estimate_memory(*configs, args, device.type == "cuda")
    distributed.log(f"estimated memory of each rank: {sum(memory.values()):.2f} GiB, of which")
    distributed.log("\n".join(f"{gib:10.2f}  {name}" for name, gib in memory.items()))
    source = find_model(args.policy, "--policy")
    reference = None
    if args.kl_coef:  # one after another: each is whole only for a moment
        reference = distributed.prepare_training(load_model(source, device, dtype).requires_grad_(False), False)
    model, tokenizer, stop_ids = open_model(args.policy, device, torch.float32, "--policy")
    model = distributed.prepare_training(model, args.activation_checkpointing)
    sharded = device.type == "cuda" or distributed.world_size() > 1
    inference = load_model(source, device, dtype) if sharded else model
    inference.vocabulary = model.vocabulary
    if reference is not None:
        reference.vocabulary = model.vocabulary
    policy = Engine(Sampler(inference, args.slots), tokenizer, stop_ids)
    judge = None
    if args.reward in JUDGED:
        prm = open_engine(args.prm, device, args.slots, "--prm")

        def judge(solutions: list[dict], step: int) -> list[Judgement]:
            return score_solutions(
                prm, args.prm_kind, solutions, max_new_tokens=args.prm_max_new_tokens,
                votes=args.prm_votes, seed=f"{args.seed}/{step}",
            )  # fmt: skip

    for p in problems:
        p["prompt"] = policy.encode(SOLVE_PROMPT.format(problem=p["problem"]))
    left = inference.config.max_positions - args.max_new_tokens
    fitting = [p for p in problems if len(p["prompt"]) <= min(args.max_prompt_tokens, left)]
    if not fitting:
        about = (
            f"--max_prompt_tokens {args.max_prompt_tokens} and the {max(left, 0)} tokens that --max_new_tokens leaves"
        )
        raise InputError(f"{args.problems}: no problem fits into both {about} of the context; change one")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=device.type == "cuda"
    )
    records.check_arguments(out, vars(args), FREE)
    start = distributed.load_checkpoint(out / "training", model, optimizer)
    distributed.copy_weights(inference, model)
    if distributed.rank() == 0:
        records.write_json(Path(f"{out}.args.json"), records.describe_run(args))
    distributed.log(f"GRPO: {len(fitting)} problems ({len(problems) - len(fitting)} too long), "
        f"{args.batch_size} x {args.group_size} responses a step, reward {args.reward}, constraints {args.format_constraints}"
        + (f", resumed after step {start}" if start else "")
        + ("" if gold else ", no gold file: held-out accuracy isn't measured"))  # fmt: skip

    measure = partial(heldout_metrics, policy, heldout, gold, judge, args)  # of a step
    signals = distributed.stop_on_signal()
    with records.MetricsFile(out / "metrics.jsonl", start) as metrics:
        if start == 0 and heldout:
            metrics.append({"step": 0, **measure(0)})
        todo = range(start, args.steps)
        bar = tqdm(todo, initial=start, total=args.steps, desc="grpo", unit="step", disable=distributed.rank() != 0)
        for step in bar:
            t0 = time.perf_counter()
            batch = batch_for_step(step, fitting, args.batch_size, args.seed)
            mine = sample_rollouts(policy, batch[distributed.rank() :: distributed.world_size()], args, step)
            t1 = time.perf_counter()
            score_rollouts(mine, batch, args, step, tokenizer, judge, gold)
            groups = [mine[i : i + args.group_size] for i in range(0, len(mine), args.group_size)]
            # Of all ranks, in the order of the batch.
            rollouts = [r for group in distributed.gather(groups) for r in group]
            if device.type == "cuda":
                # The caches have just been freed. If PyTorch kept their memory, the optimizer's state would come to lie in
                # between, and the next step's caches, of another size, might find no piece that is large enough.
                torch.cuda.empty_cache()
            t2 = time.perf_counter()
            rewards = torch.tensor([r.reward for r in rollouts])  # (B,)
            advantages = group_advantages(rewards, args.group_size, not args.no_std_norm)  # (B,)
            of_tokens = token_advantages(rollouts, advantages, args.reward, args.group_size, args.selective_discount)
            trained, kept = {}, in_loss(rollouts, of_tokens, args)
            chosen, theirs = [rollouts[i] for i in kept], [of_tokens[i] for i in kept]
            for _ in range(args.updates if kept else 0):  # nothing kept, nothing learnt
                trained = update_policy(model, optimizer, reference, chosen, theirs, args)
            distributed.copy_weights(inference, model)
            t3 = time.perf_counter()
            record = {"step": step + 1, **rollout_metrics(rollouts, advantages, args.group_size, args.prm_kind)}
            record |= trained
            record["loss/responses"] = len(kept)
            sampled, judged = sum(len(r.ids) for r in rollouts), sum(r.judgement.tokens for r in rollouts if r.judgement)
            for phase, tokens, seconds in (("sample", sampled, t1 - t0), ("score", judged, t2 - t1),
                                           ("update", sampled, t3 - t2)):  # fmt: skip
                record |= {f"time/{phase}": seconds, f"time/{phase}_tokens_per_second": tokens / seconds}
            record["time/tokens_per_second"] = sampled / (t3 - t0)
            if distributed.rank() == 0 and record["reward/unparsed"] == 1:
                warn_of_garbage(rollouts, step + 1)
            last, stopped = step + 1 == args.steps, distributed.max_over_ranks(len(signals)) > 0
            if heldout and (last or (step + 1) % args.heldout_every == 0):
                record |= measure(step + 1)
            if distributed.rank() == 0 and args.dump_rollouts:
                dump_rollouts(out / "rollouts" / f"step_{step + 1:07d}.jsonl", rollouts, advantages)
            metrics.append(record)
            if last or stopped or (step + 1) % args.save_every == 0:
                distributed.export(model, source, out)
                distributed.save_checkpoint(out / "training", step + 1, model, optimizer)
            if distributed.rank() == 0 and step % args.sample_every == 0:
                print_sample(batch[0], rollouts[0], advantages[0].item(), step + 1)
            bar.set_postfix_str(
                f"reward {record['reward/mean']:.3f}, valid {record['format/valid']:.2f}, "
                f"{record['time/tokens_per_second']:,.0f} tok/s", refresh=False
            )  # fmt: skip
            if stopped and not last:
                distributed.log(
                    f"{out}: stopped by a signal after step {step + 1} and saved; the same command goes on from there"
                )
                raise SystemExit(143)
    distributed.log(f"{out}: done")


if __name__ == "__main__":
    distributed.run_stage(main)
