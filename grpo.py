"""Stage III: GRPO with a process reward model as the reward, without reference answers (SPARK, Sec. 3.3 and 4).

    problems.jsonl, a policy, a reward model -> grpo.py -> a Hugging Face directory; metrics.jsonl and training/ inside

    python grpo.py    # the tiny world, on a CPU, in about four minutes

One step: (1) sample a group of G responses to each problem; (2) check their format and let the reward model judge the
valid ones; (3) normalise rewards within each group to advantages; (4) one clipped policy-gradient update with a KL
penalty towards the initial policy. In this order they stand here, then `train`, the loop; the rest can wait.

    --reward             what a response is worth
    process_aware        V y
    step_augmented       V (0.4 k/n + 0.6 y)
    selective_advantage  V y; a token keeps its advantage if its step's verdict agrees with the sign
    global_step          V y, and 0.8 A + 0.2 A_step
    rlvr                 1 if its answer is graded right against the reference
    majority             1 if its answer is the group's most frequent one
    self_certainty       mean KL(uniform || p) over its tokens
    random               V times a coin: the control

V: the format is valid; y: the reward model's verdict; k of n steps judged correct.

Left out of PPO: the critic (the group's mean is the baseline), GAE (there is one reward, at the end), and the pass of
an old policy (with one update per batch it is the current one: the loss is nearly 0, its gradient isn't).
"""

import argparse
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data import records, report
from data.records import COUNT, POSITIVE, SEED, TEMPERATURE, integer, real

# evaluate has the one grader: the verifiable baseline's reward and the held-out monitor must agree with evaluation
from evaluate import Metric, average, cluster_answers, grade_all, heldout_accuracy, majority_answer
from generate import SOLVE_PROMPT, Engine, format_valid, open_engine, open_model
from kernels import distributed
from kernels.chat import find_model, locate_steps
from kernels.distributed import InputError, RunError
from kernels.sampler import Sampler
from kernels.text import describe_format, extract_answer, shown_solution, split_steps
from kernels.transformer import Transformer
from train_prm import NO_TARGET, REWARD_MODELS, Judge, Judgement, check_votes, clip_and_step, score_solutions

import torch
from torch import Tensor
from tqdm import tqdm

# Used when no --policy is given; an explicit flag wins.
TINY = {
    "policy": "data/tiny/policy",
    "prm": "runs/tiny/prm_cot",
    "problems": "data/tiny/problems.jsonl",
    "out": "runs/tiny/grpo",
    "heldout": ["data/tiny/heldout.jsonl"],
    "heldout_temperature": 1.0,
    "gold": ["data/tiny/gold.jsonl"],
    "steps": 24, "batch_size": 16, "group_size": 8, "lr": 1.5e-4, "max_new_tokens": 120, "prm_max_new_tokens": 200,
    "min_steps": 2, "max_steps": 8, "heldout_every": 12, "save_every": 12, "slots": 128, "device": "cpu",
}  # fmt: skip
MAY_CHANGE_ON_RESUME = {
    "out", "device", "steps", "slots", "micro_tokens", "save_every", "dump_rollouts", "sample_every", "heldout_every",
    "heldout", "heldout_temperature", "gold", "activation_checkpointing", "max_gap", "prm", "prm_sha256",
}  # fmt: skip
WEIGHT_DECAY = 0.01  # of the released code
MAX_GRAD_NORM = 1.0  # the paper's gradient clip
CONSTANTS = {"weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM}  # listed in args.json beside the arguments


@dataclass(eq=False)  # tensors have no plain equality
class Rollout:
    """One response on its way from sampler to loss; its ids are never encoded anew."""

    problem_id: str
    prompt: list[int]
    ids: list[int]
    logprobs: list[float]  # as the sampler recorded them
    text: str
    finish: str
    problem: str = ""
    certainty: list[float] = field(default_factory=list)  # of each token, where the reward asks for it
    # What judging adds:
    valid: bool = False  # V: the format is kept
    judgement: Judgement | None = None  # None where the reward model wasn't asked
    step_spans: list[tuple[int, int]] = field(default_factory=list)  # tokens of each judged step; [] without verdicts
    wrong_step_count: bool = False  # too few steps or too many, in the step designs
    ungradable: bool = False  # a baseline that reads answers couldn't grade it
    reward: float = 0.0
    # What the update adds:
    token_advantages: Tensor = field(default_factory=lambda: torch.zeros(0))  # (T,)
    token_weights: Tensor = field(default_factory=lambda: torch.zeros(0))  # (T,), in the loss
    old_logprobs: Tensor | None = None  # (T,) of the policy before the first update of this batch

    @property
    def verdict(self) -> bool | None:
        """On the outcome; None if there is none that can be read."""
        return self.judgement.verdict if self.judgement is not None else None

    @property
    def step_verdicts(self) -> list[bool] | None:
        """None unless there is one for each step."""
        return self.judgement.step_verdicts if self.judgement is not None else None

    @property
    def judged_steps(self) -> list[tuple[bool, tuple[int, int]]]:
        """(verdict, token range) of each step; [] where the verdicts don't match the steps, or these are penalised."""
        if self.wrong_step_count or not self.step_spans:
            return []
        return list(zip(self.step_verdicts, self.step_spans, strict=True))


Group = list[Rollout]  # the G responses to one problem


# --------------------------------------------------------------------------- 1. sample


def batch_for_step(step: int, problems: list[dict], batch_size: int, seed: int) -> list[dict]:
    """The problems of a step, a function of (step, seed), so that a resumed run continues exactly. `place` is the
    problem's number in the run: one that comes twice in a step must get two groups."""
    batch: list[dict] = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(place, len(problems))
        if not batch or position == 0:
            order = list(range(len(problems)))
            random.Random(f"{seed}/{epoch}").shuffle(order)
        batch.append(problems[order[position]] | {"place": place})
    return batch


def sample_rollouts(engine: Engine, problems: list[dict], args, step: int) -> list[Rollout]:
    """G responses to each problem, groups consecutive; without top_p, because the loss uses the full distribution."""
    prompts = [p["prompt"] for p in problems]
    keys = [f"{step}/{p['place']}/{p['id']}" for p in problems]
    limits = [p.get("limit", args.max_new_tokens) for p in problems]
    groups = engine.sample(
        prompts,
        keys=keys,
        num_samples=args.group_size,
        temperature=args.temperature,
        max_new_tokens=limits,
        seed=args.seed,
        certainty=REWARDS[args.reward].needs_certainty,
    )
    rollouts = []
    for p, samples in zip(problems, groups, strict=True):
        for sample in samples:
            text = engine.text(sample.ids, p["prompt"])
            r = Rollout(p["id"], p["prompt"], sample.ids, sample.logprobs, text, sample.finish, p["problem"])
            r.certainty = sample.certainty
            rollouts.append(r)
    return rollouts


# --------------------------------------------------------------------------- 2. judge and reward


def mean(values: list[float]) -> float:
    """0 of nothing."""
    return sum(values) / max(len(values), 1)


def judge_responses(rollouts: list[Rollout], judge: Callable, tokenizer, seed: str, args) -> None:
    """Set `judgement` of the valid responses only, and `step_spans` for the step designs."""
    valid = [r for r in rollouts if r.valid]
    solutions = []
    for r in valid:
        steps, answer = shown_solution(r.text)
        # The id seeds the samples of --prm_votes: equal responses get equal judgements, on any rank.
        solution = {"id": f"{r.problem_id}/{r.text}", "problem": r.problem, "steps": steps, "answer": answer}
        solutions.append(solution)
    for r, solution, judgement in zip(valid, solutions, judge(solutions, seed=seed), strict=True):
        r.judgement = judgement
        if REWARDS[args.reward].least_steps and r.verdict is not None and r.step_verdicts is not None:
            r.step_spans = locate_steps(tokenizer, r.ids, r.text, solution["steps"])


# reward(group, seed of the step, reference answers by problem id) -> a reward for each response


def process_aware_reward(group: Group, seed: str, gold: dict[str, str]) -> list[float]:
    """r = V y. A judgement that can't be parsed is worth 0."""
    return [float(r.valid and r.verdict is True) for r in group]


def step_augmented_reward(group: Group, seed: str, gold: dict[str, str]) -> list[float]:
    """r = V (0.4 k/n + 0.6 y). Without a verdict r = 0; without step verdicts k/n = 0."""
    rewards = []
    for r in group:
        if not r.valid or r.verdict is None:
            rewards.append(0.0)
            continue
        share = mean(r.step_verdicts or [])
        rewards.append(0.4 * share + 0.6 * r.verdict)
    return rewards


def rlvr_reward(group: Group, seed: str, gold: dict[str, str]) -> list[float]:
    """r = 1 if the answer is graded right against the reference."""
    pairs = [(extract_answer(r.text), gold[r.problem_id]) for r in group]
    grades = grade_all(pairs)
    for r, grade in zip(group, grades, strict=True):
        r.ungradable = grade is None
    return [float(grade is True) for grade in grades]


def majority_reward(group: Group, seed: str, gold: dict[str, str]) -> list[float]:
    """r = 1 if the answer equals the group's most frequent one, as the grader sees it (TTRL)."""
    answers = [extract_answer(r.text) for r in group]
    winner = majority_answer(answers)
    clusters = cluster_answers(tuple(answers))
    return [float(cluster is not None and cluster == winner) for cluster in clusters]


def self_certainty_reward(group: Group, seed: str, gold: dict[str, str]) -> list[float]:
    """r = mean over the tokens of KL(uniform || p), recorded by the sampler (Intuitor)."""
    return [mean(r.certainty) for r in group]


def random_reward(group: Group, seed: str, gold: dict[str, str]) -> list[float]:
    """r = V times a coin. It may teach the format, it must not teach mathematics."""
    rewards = []
    for number, r in enumerate(group):
        coin = random.Random(f"{seed}/{r.problem_id}/{number}")
        rewards.append(float(r.valid and coin.random() < 0.5))
    return rewards


def groups_of(rollouts: list[Rollout], group_size: int) -> list[Group]:
    """The groups, which stand one behind the other."""
    return [rollouts[start : start + group_size] for start in range(0, len(rollouts), group_size)]


def score_rollouts(
    rollouts: list[Rollout], judge: Callable | None, tokenizer, gold: dict[str, str], args, step: int, clock=nullcontext
):
    """Set `valid`, `judgement` and `reward` of each rollout. In the step designs too few or too many steps earn
    nothing, before the group's mean and std are taken."""
    reward = REWARDS[args.reward]
    seed = f"{args.seed}/{step}"
    for r in rollouts:
        r.valid = format_valid(r.text, args.format_constraints, finished=r.finish == "stop")
    if reward.asks:
        judge_responses(rollouts, judge, tokenizer, seed, args)
    if not reward.reads_answers:
        gold = {}
    with clock("reward"):  # some rewards compare answers with each other, which takes time
        for group in groups_of(rollouts, args.group_size):
            for r, value in zip(group, reward.of_group(group, seed, gold), strict=True):
                r.reward = value
    if reward.least_steps:
        for r in rollouts:
            r.wrong_step_count = not args.min_steps <= len(split_steps(r.text)) <= args.max_steps
            if r.wrong_step_count:
                r.reward = 0.0


# --------------------------------------------------------------------------- 3. advantages


def group_advantages(rewards: Tensor, group_size: int, std_norm: bool = True) -> Tensor:
    """A = (r - mean of the group) / (std of the group + 1e-6), unbiased std; rewards (B,), groups consecutive -> (B,).
    Without std_norm (Dr. GRPO) A = r - mean.

    A group of equal rewards gives exactly 0, by max and min: in fp32 the mean of sixteen rewards of 0.7 isn't 0.7, and
    the rounding error would be divided by a tiny std.
    """
    groups = rewards.view(-1, group_size)  # (B / G, G)
    advantages = groups - groups.mean(1, keepdim=True)
    if std_norm:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-6)
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).view(-1)


def spread_advantages(rollouts: list[Rollout], advantages: Tensor, args) -> list[Tensor]:
    """The advantage of every token, (T_i,) for each response, from A (B,)."""
    spread = REWARDS[args.reward].spread
    groups = groups_of(rollouts, args.group_size)
    result = []
    for group, of_group in zip(groups, advantages.view(-1, args.group_size), strict=True):
        result += spread(group, of_group, args)
    return result


def spread_evenly(group: Group, advantages: Tensor, args) -> list[Tensor]:
    """A for every token."""
    return [a.expand(len(r.ids)) for r, a in zip(group, advantages, strict=True)]


# --------------------------------------------------------------------------- 4. the loss and the update


def loss_weights(lengths: list[int], norm: str, max_tokens: int) -> Tensor:
    """The weight of every response token in the loss, (N,) fp32, over the whole global batch of B responses.

    token: 1 / N, every token counts the same (the released code). sequence: 1 / (B * len), every response counts the
    same (the paper). dr_grpo: 1 / (B * max_tokens), without the bias towards long wrong answers.
    """
    B, N = len(lengths), sum(lengths)
    if norm == "token":
        weights = [1 / N] * B
    elif norm == "sequence":
        weights = [1 / (B * max(length, 1)) for length in lengths]
    else:
        weights = [1 / (B * max_tokens)] * B
    return torch.tensor(weights).repeat_interleave(torch.tensor(lengths))


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
) -> tuple[Tensor, dict[str, float]]:
    """The clipped GRPO loss with a KL penalty; every argument (N,) over packed response tokens.

        loss = sum_t w_t [ -min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t) + beta k_t ]
        rho = exp(logp - old),   k = exp(ref - logp) - (ref - logp) - 1

    The estimator k, called k3, has KL(policy || ref) as its expected value. What the loss uses is its gradient, and
    that is another matter: with samples of the current policy, its expected value is the gradient of KL(ref || policy).

    stats: weighted sums over these tokens.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    difference = ref_logprobs - logprobs
    k3 = difference.exp() - difference - 1
    loss = (weights * (kl_coef * k3 - surrogate)).sum()
    with torch.no_grad():
        cut_off = clipped_ratio * advantages < ratio * advantages  # tokens that the clip leaves without a gradient
        stats = {
            "kl": (weights * k3).sum().item(),
            "clip_fraction": (weights * cut_off).sum().item(),
            "surrogate": (weights * surrogate).sum().item(),
        }
    return loss, stats


def pack_responses(rollouts: list[Rollout], device: torch.device) -> tuple[Tensor, ...]:
    """Put the responses of a micro-batch one behind the other, with each prompt only once: (ids (N,), lengths (S,),
    targets (N,), layout (M,)), as `Transformer.packed` takes them.

    Two responses [r s] and [u v w] to the same prompt [a b c]:

        place      0 1 | 2 3 | 4 5 6
        ids        a b | c r | c u v
        targets    - - | r s | u v w        what each place predicts: position i predicts token i + 1
        layout     0 1 2 3 | 0 1 4 5 6      the places of sequence 1, then those of sequence 2
        lengths    4       | 5

    The prompt's last token c is repeated, because it predicts the first token of each response.
    """
    ids, targets, layout, lengths = [], [], [], []
    places_of_prompt: dict[tuple[int, ...], range] = {}  # of its tokens without the last
    for r in rollouts:
        prompt = tuple(r.prompt[:-1])
        if prompt not in places_of_prompt:
            places_of_prompt[prompt] = range(len(ids), len(ids) + len(prompt))
            ids += prompt
            targets += [NO_TARGET] * len(prompt)
        shared = places_of_prompt[prompt]

        inputs = r.prompt[-1:] + r.ids[:-1]
        own = range(len(ids), len(ids) + len(inputs))
        ids += inputs
        targets += r.ids or [NO_TARGET]  # the empty response of an idle rank predicts nothing

        layout += [*shared, *own]
        lengths.append(len(shared) + len(own))
    return tuple(torch.tensor(x, device=device) for x in (ids, lengths, targets, layout))


def deal_groups(rollouts: list[Rollout], rank: int, ranks: int) -> list[Group]:
    """The groups of one rank: responses that follow each other and have one prompt, which is packed and run once for
    all of them. Dealt out by size, so that ranks have similar work."""
    groups: list[Group] = []
    for r in rollouts:
        if not groups or groups[-1][0].prompt != r.prompt:
            groups.append([])
        groups[-1].append(r)

    def size(group: Group) -> int:
        return len(group[0].prompt) + sum(len(r.ids) for r in group)

    groups.sort(key=size)
    return groups[rank::ranks]


def fill_micro_batches(groups: list[Group], max_tokens: int) -> list[list[Rollout]]:
    """Micro-batches of at most max_tokens packed tokens (single longer responses excepted), filled group by group. A
    group that doesn't fit continues in the next one, with its prompt again.

    A group of three responses with 40 tokens each, to a prompt of 1 + 100 tokens; max_tokens 200:

        micro-batch    a1 a2          a3
        tokens         100 + 40 + 40  100 + 40
    """
    batches: list[list[Rollout]] = []
    tokens = 0  # packed in the last of them
    for group in groups:
        prompt = len(group[0].prompt) - 1  # its last token is counted with each response
        packed = 0  # tokens of this prompt in the last micro-batch
        for r in group:
            needed = prompt - packed + len(r.ids)
            if not batches or tokens + needed > max_tokens:
                batches.append([])
                tokens = 0
                needed = prompt + len(r.ids)
            batches[-1].append(r)
            tokens += needed
            packed = prompt
    return batches


def split_into_micro_batches(rollouts: list[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """This rank's share of the global batch, in as many micro-batches as every other rank has: FSDP needs all ranks in
    each. What is missing runs one token that predicts nothing."""
    groups = deal_groups(rollouts, distributed.rank(), distributed.world_size())
    batches = fill_micro_batches(groups, max_tokens)
    most = distributed.max_over_ranks(len(batches))  # a collective: every rank must get here
    while len(batches) < most:
        batches.append([Rollout("", prompt=[0], ids=[], logprobs=[], text="", finish="")])
    return batches


def micro_batch_loss(
    model: Transformer, reference: Transformer | None, batch: list[Rollout], args
) -> tuple[Tensor, dict[str, float]]:
    """The GRPO loss of a micro-batch, a part of the batch's sum, and sums over its N response tokens."""
    ids, lengths, targets, layout = pack_responses(batch, model.device)
    response = targets >= 0

    # 1. Log-probs of the policy and of the reference. The responses were drawn from softmax(logits / T): at any other
    # temperature these would be another policy's, and ratio, KL and the comparison below wrong without an error to see.
    packed = ids, lengths, targets, args.temperature, layout
    if reference is not None:  # first, while no activations of the policy are kept
        with torch.no_grad():
            ref_logprobs, _ = reference.packed(*packed)
        ref_logprobs = ref_logprobs[response]  # (N,)
    logprobs, entropy = model.packed(*packed)
    logprobs = logprobs[response]  # (N,)
    current = logprobs.detach()
    if reference is None:
        ref_logprobs = current  # the KL to itself is zero

    # 2. Old log-probs are those of the policy before the first update of this batch. In that update they are the
    # current ones: the ratio is 1 in value and carries the gradient.
    of_responses = current.split([len(r.ids) for r in batch])
    for r, of_response in zip(batch, of_responses, strict=True):
        if r.old_logprobs is None:
            r.old_logprobs = of_response
    old_logprobs = torch.cat([r.old_logprobs for r in batch])

    # 3. The loss, token by token, and how far the sampler's log-probs are from the trainer's.
    sampled = torch.tensor([x for r in batch for x in r.logprobs], device=model.device)
    advantages = torch.cat([r.token_advantages for r in batch]).to(model.device)
    if args.tis_cap:
        importance = (old_logprobs - sampled).exp()
        advantages = advantages * importance.clamp(max=args.tis_cap)
    weights = torch.cat([r.token_weights for r in batch]).to(model.device)
    settings = {"clip_low": args.clip_low, "clip_high": args.clip_high, "kl_coef": args.kl_coef}
    loss, stats = grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, weights, **settings)
    gap = (sampled - old_logprobs).abs()
    stats["entropy"] = entropy[response].sum().item()
    stats["gap"] = gap.sum().item()
    stats["largest_gap"] = gap.max().item() if len(gap) else 0.0
    return loss, stats


def update_policy(
    model, optimizer, reference, rollouts: list[Rollout], advantages: list[Tensor], args
) -> dict[str, float]:
    """One gradient step on the global batch; returns its metrics. Every rank has all rollouts and their token
    advantages, (T_i,) each, and trains on its share."""
    # 1. What each token brings into the loss.
    lengths = [len(r.ids) for r in rollouts]
    weights = loss_weights(lengths, args.loss_norm, args.max_new_tokens)  # (N,)
    for r, of_advantage, of_weight in zip(rollouts, advantages, weights.split(lengths), strict=True):
        r.token_advantages = of_advantage
        r.token_weights = of_weight

    # 2. Gradients add up over micro-batches, and over ranks: FSDP averages them, and the loss is a sum.
    totals = dict.fromkeys(("kl", "clip_fraction", "surrogate", "entropy", "gap"), 0.0)
    largest_gap = 0.0
    for batch in split_into_micro_batches(rollouts, args.micro_tokens):
        loss, stats = micro_batch_loss(model, reference, batch, args)
        (loss * distributed.world_size()).backward()
        largest_gap = max(largest_gap, stats.pop("largest_gap"))
        for name, value in stats.items():
            totals[name] += value
    totals = dict(zip(totals, distributed.sum_over_ranks(*totals.values()), strict=True))

    # 3. Is what was sampled what is trained?
    gap = totals["gap"] / sum(lengths)
    if not gap <= args.max_gap:
        raise RunError(f"the sampler's log-probs differ from the trainer's by {gap:.4f} nats per token, more than --max_gap "
                       f"{args.max_gap}: they aren't of one policy; stopped before the update")  # fmt: skip

    # 4. The step.
    norm = clip_and_step(model, optimizer, args.lr, MAX_GRAD_NORM)
    weight = weights.sum().item()  # 1 except under dr_grpo
    metrics = {
        "loss/clip_fraction": totals["clip_fraction"] / weight,
        "loss/surrogate": totals["surrogate"],
        "policy/entropy": totals["entropy"] / sum(lengths),
        "gap/mean": gap,
        "gap/max": distributed.max_over_ranks(largest_gap),
        "train/grad_norm": norm,
    }
    if reference is not None:
        metrics["kl/k3"] = totals["kl"] / weight
    return metrics


# --------------------------------------------------------------------------- the loop


@dataclass
class Setup:
    """What the loop works with."""

    policy: Engine  # samples
    model: Transformer  # is trained: fp32 weights, sharded
    reference: Transformer | None  # the frozen initial policy, sharded
    optimizer: torch.optim.Optimizer
    judge: Callable | None  # judge(solutions, seed=...) -> judgements
    problems: list[dict]
    heldout: dict[str, list[dict]]  # name of a file -> its problems
    gold: dict[str, str]
    start: int  # steps done by an earlier run


def train(run: Setup, args: argparse.Namespace, metrics: records.MetricsFile) -> None:
    """The loop."""
    out = Path(args.out)
    source = find_model(args.policy)
    tokenizer = run.policy.tokenizer
    signals = distributed.stop_on_signal()
    if run.start == 0 and run.heldout:
        metrics.append({"step": 0, **heldout_metrics(run, args, 0)})
    if run.start == args.steps:  # an earlier run may have been killed just before its last export
        distributed.export(run.model, source, out)
    steps = range(run.start, args.steps)
    bar = tqdm(steps, initial=run.start, total=args.steps, desc="grpo", unit="step", disable=distributed.rank() > 0)
    for step in bar:
        clock = distributed.Clock()

        # 1. Sample a group of G responses to each problem of this step.
        with clock("sample"):
            problems = batch_for_step(step, run.problems, args.batch_size, args.seed)
            rollouts = sample_rollouts(run.policy, distributed.my_part(problems), args, step)

        # 2. Judge them. Problems were dealt out one by one, so whole groups come back, in the order of the batch.
        with clock("score"):
            score_rollouts(rollouts, run.judge, tokenizer, run.gold, args, step, clock)
            groups = distributed.gather(groups_of(rollouts, args.group_size))
            rollouts = [r for group in groups for r in group]  # all B responses, on every rank
            distributed.free_cached_memory()

        # 3. How much better than its group is each response, and each of its tokens?
        with clock("update"):
            rewards = torch.tensor([r.reward for r in rollouts])  # (B,)
            advantages = group_advantages(rewards, args.group_size, std_norm=args.loss_norm != "dr_grpo")  # (B,)
            token_advantages = spread_advantages(rollouts, advantages, args)  # B tensors (T_i,)

            # 4. One clipped update (or several), and the sampler gets the new weights.
            for _ in range(args.updates):
                trained = update_policy(run.model, run.optimizer, run.reference, rollouts, token_advantages, args)
            distributed.copy_weights(run.policy.sampler.model, run.model)

        # What a reader watches, and what a later run resumes from.
        done = step + 1
        last = done == args.steps
        stopped = distributed.max_over_ranks(len(signals)) > 0  # a collective: a signal to one rank stops all
        record = {"step": done, **rollout_metrics(rollouts, advantages, args.group_size, args.prm_kind), **trained}
        sampled = sum(len(r.ids) for r in rollouts)
        judged = sum(r.judgement.tokens for r in rollouts if r.judgement is not None)
        record |= clock.metrics(sample=sampled, score=judged, update=sampled)
        if run.heldout and (last or done % args.heldout_every == 0):
            record |= heldout_metrics(run, args, done)
        if distributed.rank() == 0:
            report.print_step(bar, record, rollouts, advantages, tokenizer, args.sample_every)
            if args.dump_rollouts:
                records.write_rollouts(out, done, rollouts, advantages, tokenizer)
        metrics.append(record)
        if last or stopped or done % args.save_every == 0:
            # First what the run resumes from: whatever goes wrong with the copy for others then costs nothing.
            distributed.save_checkpoint(out / "training", done, run.model, run.optimizer)
            distributed.export(run.model, source, out)
        if stopped and not last:
            distributed.log(f"{out}: stopped by a signal after step {done} and saved; the same command resumes it")
            raise SystemExit(143)


# --------------------------------------------------------------------------- rewards for steps, and all rewards


def selective_advantage(
    advantage: float, step_verdicts: list[bool], step_spans: list[tuple[int, int]], length: int, discount: float = 0.0
) -> Tensor:
    """(T,) advantages of one response's tokens: A if the step is correct and A >= 0, or incorrect and A < 0; otherwise
    A times discount. Tokens in no step keep A. Spans: half-open token ranges."""
    tokens = torch.full((length,), advantage)
    for correct, (start, end) in zip(step_verdicts, step_spans, strict=True):
        agrees = correct == (advantage >= 0)
        if not agrees:
            tokens[start:end] *= discount
    return tokens


def global_step_advantage(
    step_rewards: list[list[float]], step_ends: list[list[int]], lengths: list[int]
) -> list[Tensor]:
    """A_step, (T_i,) for each response of one group: a step's reward stands at its last token, step_ends (inclusive),
    normalised by mean and std over all steps of the group, and a token gets the sum from itself to the end."""
    pool = torch.tensor([reward for rewards in step_rewards for reward in rewards], dtype=torch.float32)
    if len(pool) > 1:
        pool = group_advantages(pool, len(pool))  # 0 if all are equal
    normalised = iter(pool.tolist())
    result = []
    for ends, length in zip(step_ends, lengths, strict=True):
        tokens = torch.zeros(length)
        for end in ends:
            tokens[: end + 1] += next(normalised)
        result.append(tokens)
    return result


def spread_selective(group: Group, advantages: Tensor, args) -> list[Tensor]:
    """`selective_advantage` of each response of a group."""
    result = []
    for r, advantage in zip(group, advantages.tolist(), strict=True):
        verdicts = [verdict for verdict, _ in r.judged_steps]
        spans = [span for _, span in r.judged_steps]
        result.append(selective_advantage(advantage, verdicts, spans, len(r.ids), args.selective_discount))
    return result


def spread_global(group: Group, advantages: Tensor, args) -> list[Tensor]:
    """0.8 A + 0.2 A_step, where a correct one of n steps is worth 1/n and an incorrect one -1/n. Responses without
    judged steps keep A."""
    step_rewards, step_ends = [], []
    for r in group:
        steps = r.judged_steps
        step_rewards.append([(1 if verdict else -1) / len(steps) for verdict, _ in steps])
        step_ends.append([end - 1 for _, (_, end) in steps])
    of_steps = global_step_advantage(step_rewards, step_ends, [len(r.ids) for r in group])
    result = []
    for r, advantage, a_step in zip(group, advantages, of_steps, strict=True):
        if r.judged_steps:
            result.append(0.8 * advantage + 0.2 * a_step)
        else:
            result.append(advantage.expand(len(r.ids)))
    return result


@dataclass(frozen=True)
class Reward:
    """A choice of --reward: the rewards of a group, and what they need."""

    of_group: Callable[[Group, str, dict[str, str]], list[float]]
    asks: str = ""  # the reward model: for a verdict on the "outcome", or also on the "steps"
    reads_answers: bool = False  # a baseline that may see the reference answers
    needs_certainty: bool = False  # of the sampler
    least_steps: int = 0  # of the step designs, default of --min_steps; 0: responses may have any number of steps
    # (group, advantages (G,), args) -> advantages of tokens
    spread: Callable[[Group, Tensor, argparse.Namespace], list[Tensor]] = spread_evenly


REWARDS = {
    "process_aware": Reward(process_aware_reward, asks="outcome"),
    "step_augmented": Reward(step_augmented_reward, asks="steps"),
    "selective_advantage": Reward(process_aware_reward, asks="steps", least_steps=4, spread=spread_selective),
    "global_step": Reward(process_aware_reward, asks="steps", least_steps=3, spread=spread_global),
    "rlvr": Reward(rlvr_reward, reads_answers=True),
    "majority": Reward(majority_reward),
    "self_certainty": Reward(self_certainty_reward, needs_certainty=True),
    "random": Reward(random_reward),
}


# --------------------------------------------------------------------------- what a reader watches


def rollout_metrics(rollouts: list[Rollout], advantages: Tensor, group_size: int, prm_kind: str) -> dict[str, float]:
    """The reward, its parts, and indicators of reward hacking: means over the batch."""
    rewards = [r.reward for r in rollouts]
    metrics = {"reward/mean": mean(rewards), "reward/std": 0.0}
    if len(rewards) > 1:
        metrics["reward/std"] = torch.tensor(rewards).std().item()

    judgements = [r.judgement for r in rollouts if r.judgement is not None]
    step_verdicts = [j.step_verdicts for j in judgements if j.step_verdicts]
    mismatched = []  # another number of step verdicts than steps
    if REWARD_MODELS[prm_kind].judges_steps:
        mismatched = [j.verdict is not None and j.step_verdicts is None for j in judgements]
    values: dict[str, list] = {}  # of each response, or of each judgement
    values["reward/verdict"] = [j.verdict is True for j in judgements]
    values["reward/steps_correct"] = [mean(verdicts) for verdicts in step_verdicts]
    values["reward/unknown"] = [r.ungradable for r in rollouts]
    values["reward/unparsed"] = [j.verdict is None for j in judgements]
    values["reward/count_mismatch"] = mismatched
    values["reward/too_long"] = [j.too_long for j in judgements]
    values["reward/shortened"] = [j.shortened for j in judgements]
    values["format/valid"] = [r.valid for r in rollouts]
    formats = [describe_format(r.text) for r in rollouts]
    for name in formats[0]:
        values[f"format/{name}"] = [numbers[name] for numbers in formats]
    values["response/steps"] = [len(split_steps(r.text)) for r in rollouts]
    values["response/length"] = [len(r.ids) for r in rollouts]
    values["response/penalised"] = [r.wrong_step_count for r in rollouts]
    values["response/truncated"] = [r.finish == "length" for r in rollouts]
    values["group/zero_std"] = (advantages.view(-1, group_size) == 0).all(dim=1).tolist()
    for name, of_each in values.items():
        metrics[name] = mean(of_each)
    return metrics


def heldout_metrics(run: Setup, args: argparse.Namespace, step: int) -> dict[str, float]:
    """`measure_heldout` of each file as heldout/<name>/accuracy and so on, and as heldout/accuracy the mean over files.
    Of one file, only the latter."""
    files = {name: measure_heldout(run, problems, args, step) for name, problems in run.heldout.items()}
    metrics = {}
    for key in next(iter(files.values())):
        values = [numbers[key] for numbers in files.values() if key in numbers]
        if len(values) == len(files):
            metrics[f"heldout/{key}"] = mean(values)
    if len(files) > 1:
        accuracies = []
        for name, numbers in files.items():
            accuracies.append(Metric(numbers["accuracy"], 1, (numbers["low"], numbers["high"])))
            metrics |= {f"heldout/{name}/{key}": value for key, value in numbers.items()}
        metrics["heldout/low"], metrics["heldout/high"] = average(accuracies).interval
    return metrics


def measure_heldout(run: Setup, problems: list[dict], args: argparse.Namespace, step: int) -> dict[str, float]:
    """Accuracy of one response to each problem, and of those valid under `paper`. Where a reward model's reward rises
    and the accuracy doesn't, it is being gamed."""
    settings = {"temperature": args.heldout_temperature, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    result = heldout_accuracy(run.policy, problems, run.gold, num_samples=1, **settings)
    rollouts = []
    for (sample,) in result.samples:
        r = Rollout(sample["problem_id"], [], [], [], sample["text"], sample["finish"], sample["problem"])
        rollouts.append(r)
    correct = torch.from_numpy(result.correct[:, 0])  # (P,)
    valid = torch.tensor([format_valid(r.text) for r in rollouts])
    numbers = {"accuracy": result.accuracy, "low": result.low, "high": result.high}
    numbers["valid"] = valid.float().mean().item()
    if len(rollouts) < len(problems):
        numbers["too_long"] = 1 - len(rollouts) / len(problems)
    if valid.any():  # the accuracy of no response isn't a number
        numbers["accuracy_of_valid"] = correct[valid].float().mean().item()
    if run.judge is not None:
        mine = distributed.my_part(rollouts)
        score_rollouts(mine, run.judge, run.policy.tokenizer, {}, args, step)
        numbers["reward"] = mean(distributed.gather([r.reward for r in mine]))
        numbers["reward_minus_accuracy"] = numbers["reward"] - numbers["accuracy"]
    return numbers


# --------------------------------------------------------------------------- set-up


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = records.new_parser(__doc__)
    group = parser.add_argument_group("data and models")
    group.add_argument("--policy", help="Hugging Face directory or hub name (default: the tiny world)")
    group.add_argument("--prm", help="reward model: Hugging Face directory or hub name")
    group.add_argument("--prm_kind", default="prm_cot", choices=list(REWARD_MODELS), help="what --prm was trained as")
    group.add_argument("--problems", help="JSON Lines with id and problem")
    group.add_argument("--limit", type=POSITIVE,
                       help="only the first N; the paper trains on 17,000 problems apart from the 8,000 that it labels: "
                            "head -n 8000 ALL.jsonl for these, tail -n +8001 ALL.jsonl for the others")  # fmt: skip
    group.add_argument("--out", help="directory of the trained policy")
    group.add_argument("--heldout", nargs="+", help="problems for monitoring only")
    group.add_argument("--heldout_temperature", type=TEMPERATURE, default=0.0, help="0 is greedy, as in the paper")
    group.add_argument("--gold", nargs="+", help="JSON Lines with id and answer, for --heldout and --reward rlvr only")
    group = parser.add_argument_group("reward")
    group.add_argument("--reward", default="process_aware", choices=list(REWARDS))
    group.add_argument("--format_constraints", default="paper", choices=["none", "paper", "strict"])
    group.add_argument("--prm_max_new_tokens", type=POSITIVE, default=4096, help="per judgement")
    group.add_argument("--prm_votes", type=COUNT, default=1, help="judgements per response; 1: greedy")
    group.add_argument("--selective_discount", type=real(0, 1), default=0.0, help="0.5 halves what is 0 in the paper")
    group.add_argument("--min_steps", type=POSITIVE, help="fewer: reward 0; default: 4 (selective), 3 (global_step)")
    group.add_argument("--max_steps", type=POSITIVE, default=20, help="more: reward 0, under these two rewards")
    group = parser.add_argument_group("GRPO")
    group.add_argument("--steps", type=COUNT, default=300, help="batches of responses")
    group.add_argument("--batch_size", type=COUNT, default=256, help="problems per step")
    group.add_argument("--group_size", type=integer(2, 100_000), default=16, help="G, responses per problem")
    group.add_argument("--max_new_tokens", type=POSITIVE, default=2048, help="per response")
    group.add_argument("--max_prompt_tokens", type=POSITIVE, default=2048, help="longer problems are left out")
    group.add_argument("--temperature", type=real(0.001, 100), default=1.0, help="of rollouts and log-probs")
    group.add_argument("--lr", type=real(0), default=1e-6, help="constant")
    group.add_argument("--clip_low", type=real(0, 1), default=0.2)
    group.add_argument("--clip_high", type=real(0), default=0.2)
    group.add_argument("--updates", type=COUNT, default=1, help="per batch")
    group.add_argument("--tis_cap", type=real(0), default=0.0, help="caps weights trainer/sampler; 0: none")
    group.add_argument("--kl_coef", type=real(0), default=0.001, help="0 turns the KL term off")
    group.add_argument("--loss_norm", default="token", choices=["token", "sequence", "dr_grpo"], help="dr_grpo: no std")
    group.add_argument("--max_gap", type=real(0), default=0.1, help="most mean |sampler - trainer|, nats")
    group = parser.add_argument_group("running")
    group.add_argument("--micro_tokens", type=POSITIVE, default=16_384, help="tokens per forward pass and rank")
    group.add_argument("--slots", type=COUNT, help="samples at a time; default: by the GPU's memory, on a CPU 128")
    group.add_argument("--activation_checkpointing", action="store_true", help="recompute activations: less memory")
    group.add_argument("--heldout_every", type=POSITIVE, default=10, help="steps between measurements on --heldout")
    group.add_argument("--sample_every", type=POSITIVE, default=10, help="steps between printed samples")
    group.add_argument("--dump_rollouts", action="store_true", help="write every step's responses to <out>/rollouts")
    group.add_argument("--save_every", type=POSITIVE, default=20, help="steps between checkpoints")
    group.add_argument("--seed", type=SEED, default=0)
    group.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    args = records.parse_args(parser, TINY, "policy", "problems", "out")
    check_settings(args)
    return args


def check_settings(args: argparse.Namespace) -> None:
    """Refuse what can't work before anything is loaded; set --min_steps if it wasn't given."""
    reward = REWARDS[args.reward]
    if args.min_steps is None:
        args.min_steps = reward.least_steps or 1
    if reward.asks and args.prm is None:
        raise InputError("--policy also needs --prm with this --reward")
    if reward.asks == "steps" and not REWARD_MODELS[args.prm_kind].judges_steps:
        raise InputError(f"--reward {args.reward} needs verdicts on steps, and --prm_kind {args.prm_kind} gives none")
    if args.min_steps > args.max_steps:
        raise InputError(f"--min_steps {args.min_steps} is more than --max_steps {args.max_steps}; lower it")
    check_votes(args.prm_kind, args.prm_votes, "--prm_votes")


def load_gold(args: argparse.Namespace, problems: list[dict]) -> dict[str, str]:
    """Reference answers by problem id, for --reward rlvr and the accuracy on --heldout only. The tiny world's file may
    be missing; for rlvr the problems' own answers count, too."""
    gold = {}
    if args.gold and (args.gold != TINY["gold"] or Path(args.gold[0]).is_file()):
        gold = records.read_answers(args.gold)
    if REWARDS[args.reward].reads_answers:
        own = {p["id"]: p["answer"] for p in problems if p.get("answer") is not None}
        gold = own | gold
        problem_ids = [p["id"] for p in problems]
        records.require_answers(problem_ids, gold)
        # A resumed run must find the same answers; those for monitoring may change, as --heldout may.
        answers = [gold[problem_id] for problem_id in problem_ids]
        args.gold_sha256 = records.hash_text(str(answers))
    return gold


def fitting_problems(problems: list[dict], engine: Engine, args) -> list[dict]:
    """The problems whose prompts leave space for a response, by `Engine.fit_problems`."""
    fitting = engine.fit_problems(problems, args.max_new_tokens, args.problems)
    fitting = [p for p in fitting if len(p["prompt"]) <= args.max_prompt_tokens]
    if not fitting:
        raise InputError(f"{args.problems}: no problem fits into both --max_prompt_tokens {args.max_prompt_tokens} and "
                         f"the {engine.context} tokens that the model's context has; change one")  # fmt: skip
    return fitting


def set_up(args: argparse.Namespace, device: torch.device) -> Setup:
    """Read data, models (one by one, as each is whole on every rank for a moment) and checkpoint."""
    out = Path(args.out)
    # 1. The data.
    problems = records.read(args.problems, ["id", "problem"], "python -m data.make_tiny problems")[: args.limit]
    gold = load_gold(args, problems)
    heldout = {}
    if gold:
        paths = [path for path in args.heldout or [] if path]
        heldout = records.read_problem_sets("heldout", paths, gold)
    # A resumed run must find the same problems, and the same policy, to which the KL term refers.
    source = find_model(args.policy, "--policy")
    args.problems_sha256 = records.hash_file(args.problems)
    args.policy_sha256 = records.hash_model(source)
    args.prompt_sha256 = records.hash_text(SOLVE_PROMPT)

    # 2. Three copies of the policy: the one that is trained, the frozen one of the KL term, and the one that samples.
    model, tokenizer, stop_ids = open_model(args.policy, device, torch.float32, "--policy")
    model = distributed.prepare_training(model, args.activation_checkpointing)
    reference = distributed.load_reference(model, source) if args.kl_coef else None
    inference = distributed.load_inference(model, source)
    policy = Engine(Sampler(inference, args.slots), tokenizer, stop_ids)

    # 3. The reward model.
    judge = None
    if REWARDS[args.reward].asks:
        prm = open_engine(args.prm, device, args.slots, "--prm")
        judge = partial(score_solutions, Judge(prm, args.prm_kind, args.prm_max_new_tokens, args.prm_votes))

    # 4. The optimizer, and where an earlier run stopped. On a GPU the fused kernel needs no memory beside the moments.
    fitting = fitting_problems(problems, policy, args)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda")
    records.check_arguments(out, vars(args) | CONSTANTS, MAY_CHANGE_ON_RESUME)
    start = distributed.load_checkpoint(out / "training", model, optimizer)
    if start > args.steps:
        raise InputError(f"--steps {args.steps}: {out} has already {start}; ask for more, or choose another --out")
    if judge is not None:
        history = (records.read_args(out) or {}).get("prm_sha256", [])
        fingerprint = records.hash_model(find_model(args.prm, "--prm"))
        args.prm_sha256 = records.note_model(history, start, fingerprint)
    distributed.copy_weights(inference, model)
    resumed = f", resumed after step {start}" if start else ""
    measured = "" if gold else ", no --gold: held-out accuracy isn't measured"
    distributed.log(f"GRPO: {len(fitting)} problems ({len(problems) - len(fitting)} too long){measured}{resumed}")
    return Setup(policy, model, reference, optimizer, judge, fitting, heldout, gold, start)


def main() -> None:
    args = parse_arguments()
    device = distributed.init_distributed(args.device)
    out = Path(args.out)
    with records.lock_run(out, args):
        run = set_up(args, device)
        if distributed.rank() == 0:
            records.write_args(out, args, CONSTANTS)
        with records.MetricsFile(out / "metrics.jsonl", run.start) as metrics:
            train(run, args, metrics)
    distributed.log(f"{out}: done")


if __name__ == "__main__":
    distributed.run_stage(main)
