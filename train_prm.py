"""Stage II: fine-tune a generative reward model on the labels of Stage I (SPARK, Sec. 3.2).

    labels_<method>.jsonl -> train_prm.py -> a Hugging Face directory; metrics.jsonl and training/ inside it

    python train_prm.py                                    # the tiny world: a PRM-CoT, on a CPU, in about a minute
    python train_prm.py --kind prm --out runs/tiny/prm       # another kind of reward model
    torchrun --nproc_per_node 8 train_prm.py --model Qwen/Qwen2.5-14B-Instruct --out runs/prm_cot \\
        --labels runs/verify/labels_step_consistency.jsonl

| kind     | is trained to write                             |
|----------|-------------------------------------------------|
| orm      | Yes or No                                       |
| prm      | Correct or Incorrect per step, then the verdict |
| prm_cot  | the chosen verification, thinking removed       |
| disc_prm | Yes or No at each step's last token             |
| policy   | a solution judged correct, in tags              |

`--kind policy` learns its format from the reference-free labels, in the paper from a larger model's solutions (App. D).
"""

import argparse
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from data import records
from data.records import COUNT, POSITIVE, SEED, real
from generate import SOLVE_PROMPT, Engine, format_valid, open_model, render_response, render_steps
from kernels import chat, distributed
from kernels.distributed import InputError, RunError
from kernels.sampler import with_progress
from kernels.text import CROSS, TICK, extract_answer, split_steps, unwrap_step
from kernels.transformer import Transformer
from verify import VERDICT, Verification, exactly_once, majority, parse_verification, readable_lines, without_thinking

import torch
from torch import Tensor
from tqdm import tqdm

# Used when no --model is given; an explicit flag wins. The tiny reward models start from a base that knows how a judge
# answers, as Qwen2.5 does, and overlooks most errors (data/README.md).
TINY = {
    "model": "data/tiny/base",
    "labels": "runs/tiny/verify/labels_step_consistency.jsonl",
    "out": "runs/tiny/prm_cot",
    "lr": 2e-4,
    "epochs": 3,
    "batch_size": 32,
    "save_every": 50,
    "device": "cpu",
}

# Ours: the paper gives none. They were never varied, so they are no flags; args.json lists them beside the arguments.
WARMUP = 0.03  # share of the steps in which the learning rate rises
WEIGHT_DECAY = 0.0
MAX_GRAD_NORM = 1.0
CONSTANTS = {"warmup": WARMUP, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM}

MAY_CHANGE_ON_RESUME = {"out", "device", "save_every", "micro_tokens", "activation_checkpointing"}

# --------------------------------------------------------------------------- reward models: question and answer

# ORM: the outcome alone.

ORM_PROMPT = "Problem: {problem}\n\nSolution: {solution}\n\nIs the answer correct (Yes/No)?"


def write_orm_target(label: dict) -> str:
    """Yes or No."""
    return "Yes" if label["outcome"] else "No"


def parse_orm(text: str, num_steps: int) -> Verification:
    """Parses `write_orm_target`: nothing may stand beside it but thinking and emphasis."""
    verdict = {"yes": True, "no": False}.get("\n".join(readable_lines(text)))
    return Verification(step_verdicts=None, verdict=verdict)


# PRM: every step and the outcome, without reasons.

PRM_PROMPT = "Problem: {problem}\n\nStudent Solution: {solution}\n\nLet's verify step by step."
PRM_LINE = re.compile(
    rf"(?=[^{CROSS}]*$|.*incorrect)(?=[^{TICK}]*$|.*\bcorrect)"
    r"[^\w~?]*(?:\d+[.)] ?)?step[ #]*(\d{1,6})[^\w~?]+(correct|incorrect)[^\w~?]*"
)


def write_prm_target(label: dict) -> str:
    """A line for each step, then the Verification line."""
    lines = []
    for k, correct in enumerate(label["step_labels"], 1):
        lines.append(f"Step {k}: {'Correct' if correct else 'Incorrect'}")
    lines.append(f"**Verification: Is the answer correct (Yes/No)? {'Yes' if label['outcome'] else 'No'}**")
    return "\n".join(lines)


def parse_prm(text: str, num_steps: int) -> Verification:
    """Parses `write_prm_target`, behind thinking or not."""
    steps = []
    verdicts = []
    for line in readable_lines(text):
        if match := PRM_LINE.fullmatch(line):
            steps.append((int(match.group(1)), match.group(2) == "correct"))
        elif match := VERDICT.fullmatch(line):
            verdicts.append(match.group(1) == "yes")
    return exactly_once(steps, verdicts, num_steps)


# PRM-CoT: the PRM's prompt, but reasons before each verdict. It is trained on Stage I's verifications, so their parser,
# `parse_verification`, reads its output.


def write_prm_cot_target(label: dict) -> str:
    """The verification that Stage I chose, without its thinking."""
    return without_thinking(label["text"])


@dataclass(frozen=True)
class RewardModel:
    """A kind of reward model. A new kind is a row of `REWARD_MODELS` and the functions it names."""

    prompt: str  # the user turn, with the problem and the rendered solution
    write_target: Callable[[dict], str] | None = None  # a kept label -> the text to train on
    parse: Callable[[str, int], Verification] | None = None  # its output, the number of steps -> the verdicts
    judges_steps: bool = True
    generative: bool = True  # if not, there is no text: the verdicts are read off log-odds


REWARD_MODELS = {
    "orm": RewardModel(ORM_PROMPT, write_orm_target, parse_orm, judges_steps=False),
    "prm": RewardModel(PRM_PROMPT, write_prm_target, parse_prm),
    "prm_cot": RewardModel(PRM_PROMPT, write_prm_cot_target, parse_verification),
    "disc_prm": RewardModel(PRM_PROMPT, generative=False),  # for comparison: a section near the end
}
KINDS = [*REWARD_MODELS, "policy"]


def judge_prompt(template: str, solution: dict) -> str:
    """The user turn about a solution (problem, steps, answer)."""
    return template.format(problem=solution["problem"], solution=render_steps(solution["steps"], solution["answer"]))


# --------------------------------------------------------------------------- judging solutions with a reward model


@dataclass(frozen=True)
class Judgement:
    """A reward model's judgement of one solution. None: not parsed."""

    step_verdicts: list[bool] | None
    verdict: bool | None
    text: str  # the first vote's output, or the log-odds
    tokens: int  # sampled by all votes, or of the prompt
    step_scores: list[float] | None = None  # shares of the votes, or probabilities of Yes
    score: float | None = None
    too_long: bool = False  # for the context, so the model wasn't asked
    shortened: bool = False  # the context left less than max_new_tokens


UNPARSED = Judgement(step_verdicts=None, verdict=None, text="", tokens=0)  # also of a solution without steps
TOO_LONG = replace(UNPARSED, too_long=True)


@dataclass(frozen=True)
class Judge:
    """A trained reward model, and how it is asked: once, greedily, or for several sampled votes."""

    engine: Engine
    kind: str
    max_new_tokens: int
    votes: int = 1
    temperature: float = 0.8  # of several votes


def check_votes(kind: str, votes: int, flag: str) -> None:
    """Raise InputError for several votes of a reward model that has only one."""
    if votes > 1 and not REWARD_MODELS[kind].generative:
        raise InputError(f"{flag} {votes}: a {kind} is deterministic; leave it at 1")


def score_solutions(
    judge: Judge, solutions: list[dict], *, seed: int | str = 0, title: str | None = None
) -> list[Judgement]:
    """A judgement for each solution (problem, steps, answer; optional id, which seeds its samples). A title shows
    progress. A solution without steps, or too long by `generate.output_limit`, is unparsed."""
    engine = judge.engine
    model = REWARD_MODELS[judge.kind]
    if not model.generative:
        return score_discriminative(engine.sampler.model, engine.tokenizer, solutions)

    # 1. Which solutions can be asked about, and how.
    judgements = [UNPARSED] * len(solutions)
    prompts, limits = {}, {}  # index of a solution -> token ids, most tokens of its judgement
    for i, solution in enumerate(solutions):
        if not solution["steps"]:
            continue
        prompt = engine.encode(judge_prompt(model.prompt, solution))
        limit = engine.output_limit(prompt, judge.max_new_tokens)
        if limit is None:
            judgements[i] = TOO_LONG
        else:
            prompts[i] = prompt
            limits[i] = limit
    asked = list(prompts)

    # 2. Sample. The stream yields (index in `asked`, samples) as prompts are finished. One vote is greedy.
    stream = engine.stream(
        list(prompts.values()),
        keys=[str(solutions[i].get("id", i)) for i in asked],
        num_samples=judge.votes,
        temperature=judge.temperature if judge.votes > 1 else 0.0,
        max_new_tokens=list(limits.values()),
        seed=seed,
    )
    if title:
        stream = with_progress(stream, engine.sampler, title, len(asked), judge.votes)

    # 3. Parse and vote.
    for index, samples in stream:
        i = asked[index]
        texts = [engine.text(sample.ids, prompts[i]) for sample in samples]
        verifications = [model.parse(text, len(solutions[i]["steps"])) for text in texts]
        tokens = sum(len(sample.ids) for sample in samples)
        judgement = put_to_vote(verifications, texts[0], tokens)
        judgements[i] = replace(judgement, shortened=limits[i] < judge.max_new_tokens)
    return judgements


def put_to_vote(verifications: list[Verification], text: str, tokens: int) -> Judgement:
    """One judgement from all votes on a solution. The majorities are those of `verify.step_consistency`, but nothing is
    dropped. An ORM gives no steps; then the verdicts alone vote."""
    # 1. Who votes? As in Stage I, those parsed whole; but a greedy judgement counts as far as it was parsed.
    voters = verifications
    if len(verifications) > 1:
        voters = [v for v in verifications if v.step_verdicts and v.verdict is not None]

    # 2. The steps, one after another.
    votes_by_step = list(zip(*(voter.step_verdicts for voter in voters if voter.step_verdicts), strict=True))
    step_verdicts = [majority(votes) for votes in votes_by_step] or None
    step_scores = [sum(votes) / len(votes) for votes in votes_by_step] or None

    # 3. The outcome.
    verdict = None
    score = None
    verdicts = [voter.verdict for voter in voters or verifications if voter.verdict is not None]
    if verdicts:
        verdict = majority(verdicts)
        score = sum(verdicts) / len(verdicts)
    return Judgement(step_verdicts, verdict, text, tokens, step_scores, score)


# --------------------------------------------------------------------------- examples

# The fields of a label that an example is made from, beside the solution. Others may be missing.
SOURCES = {"orm": ["outcome"], "prm": ["step_labels", "outcome"], "prm_cot": ["text"],
           "disc_prm": ["step_labels", "outcome"], "policy": ["outcome"]}  # fmt: skip
NO_TARGET = -1  # a position that predicts nothing: `token_logprobs` ignores negative targets


class Example(NamedTuple):
    """A training sequence of T tokens."""

    ids: list[int]
    targets: list[int]  # for each position the token that it is to predict, or NO_TARGET


def training_texts(kind: str, label: dict) -> tuple[str, str] | None:
    """(user turn, target) of a kept record of a labels file; None if this kind has no use for it."""
    if kind == "policy":
        user_turn = SOLVE_PROMPT.format(problem=label["problem"])
        target = write_policy_target(label)
    else:
        model = REWARD_MODELS[kind]
        user_turn = judge_prompt(model.prompt, label)
        target = model.write_target(label)
    # A PRM-CoT's is empty if another program's text is thinking alone.
    return (user_turn, target) if target else None


def write_policy_target(label: dict) -> str | None:
    """A solution that was judged correct, in the policy's format; None if there is none."""
    if not label["outcome"] or label["answer"] is None:
        return None
    steps = [unwrap_step(step) for step in label["steps"]]
    steps = [step for step in steps if step]
    response = render_response(steps, label["answer"])
    # A policy isn't taught what GRPO would give nothing for, or what reads back as another solution.
    unchanged = split_steps(response) == steps and extract_answer(response) == label["answer"].strip()
    return response if unchanged and format_valid(response, "strict") else None


def encode_example(kind: str, label: dict, tokenizer, end_id: int) -> Example | None:
    """The example of `training_texts`."""
    if kind == "disc_prm":  # it has no target text
        return discriminative_example(label, tokenizer)
    texts = training_texts(kind, label)
    if texts is None:
        return None
    user_turn, target = texts
    prompt = chat.encode_chat(tokenizer, user_turn)
    if chat.opens_thought(tokenizer, prompt):
        # The policy's format begins with this tag. A judgement has no thought, so this one is closed before it.
        target = target.removeprefix("<think>") if kind == "policy" else "\n</think>\n\n" + target
    response = tokenizer(target, add_special_tokens=False).input_ids
    return targets_after_prompt(prompt, [*response, end_id])


def encode_labels(
    kind: str, labels: list[dict], tokenizer, end_id: int, max_length: int
) -> tuple[list[Example], dict[str, int]]:
    """The examples of a labels file, and how many of its labels gave none, by reason."""
    examples = []
    counts = {"dropped": 0, "unused": 0, "too_long": 0}
    for label in labels:
        if label["dropped"] is not None:
            counts["dropped"] += 1
            continue
        example = encode_example(kind, label, tokenizer, end_id)
        if example is None:
            counts["unused"] += 1
        elif len(example.ids) > max_length:
            counts["too_long"] += 1
        else:
            examples.append(example)
    return examples, counts


def targets_after_prompt(prompt: list[int], response: list[int]) -> Example:
    """Every token of the response is a target, and none of the prompt. Position i predicts token i + 1:

        prompt [a b c], response [r s .]
        ids        a  b  c  r  s  .
        targets    -  -  r  s  .  -

    Found by position, never by token: the padding token may be the end-of-turn token, which is a target.
    """
    targets = [NO_TARGET] * (len(prompt) - 1) + response + [NO_TARGET]
    return Example(prompt + response, targets)


def split_by_problem(labels: list[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """(training labels, held-out labels): no problem is on both sides."""
    problems = sorted({label["problem"] for label in labels})
    random.Random(0).shuffle(problems)
    held_out = set(problems[: round(fraction * len(problems))])
    training = [label for label in labels if label["problem"] not in held_out]
    evaluation = [label for label in labels if label["problem"] in held_out]
    return training, evaluation


# --------------------------------------------------------------------------- the loss of a global batch

# FSDP needs every rank in every micro-batch. A rank that has none left runs this: without a target there is no loss.
DUMMY = Example(ids=[0], targets=[NO_TARGET])


def group_by_length(lengths: dict[int, int], max_tokens: int) -> list[list[int]]:
    """Groups of indices from index -> length: at most max_tokens tokens, similar lengths together. A longer sequence is
    a group of its own."""
    groups: list[list[int]] = []
    tokens = 0  # in the last group
    for i in sorted(lengths, key=lambda i: lengths[i]):
        if not groups or tokens + lengths[i] > max_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(i)
        tokens += lengths[i]
    return groups


def split_micro_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """This rank's micro-batches of a global batch, as indices. Sequences are dealt out by length, so that ranks have
    similar work, and every rank has as many micro-batches, some of them empty. A collective.

    Five sequences on two ranks, at max_tokens 8:

        index        0  1  2  3  4
        lengths      5  2  9  4  3
        by length    1  4  3  0  2    (2 3 4 5 9 tokens)
        rank 0       [1 3] [2]        2 + 4 tokens, then 9
        rank 1       [4 0] []         3 + 5 tokens, then DUMMY
    """
    shortest_first = sorted(range(len(lengths)), key=lambda i: lengths[i])
    mine = {i: lengths[i] for i in distributed.my_part(shortest_first)}
    groups = group_by_length(mine, max_tokens)
    most = distributed.max_over_ranks(len(groups))
    while len(groups) < most:
        groups.append([])
    return groups


def pack(examples: list[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(ids (N,), lengths (S,), targets (N,)) of S examples, one behind the other without padding."""
    ids, lengths, targets = [], [], []
    for example in examples:
        ids += example.ids
        lengths.append(len(example.ids))
        targets += example.targets
    return torch.tensor(ids, device=device), torch.tensor(lengths, device=device), torch.tensor(targets, device=device)


def sft_batch_loss(model: Transformer, batch: list[Example], micro_tokens: int, train: bool) -> float:
    """Loss of a global batch, which every rank has whole. With train=True its gradient is added to the parameters'. A
    collective.

        loss = - sum over all targets of log p(target) / number of targets
    """
    # The denominator is the number of targets in the whole batch, which every rank counts for itself. Means per
    # micro-batch or per rank would weigh a token by what it happens to be packed with.
    num_targets = 0
    for example in batch:
        num_targets += sum(target != NO_TARGET for target in example.targets)

    my_loss = 0.0
    with torch.set_grad_enabled(train):
        for group in split_micro_batches([len(example.ids) for example in batch], micro_tokens):
            examples = [batch[i] for i in group] or [DUMMY]
            ids, lengths, targets = pack(examples, model.device)
            logprobs, _ = model.packed(ids, lengths, targets)  # (N,), 0 where there is no target
            loss = -logprobs.sum() / num_targets
            if train:
                # FSDP averages gradients over ranks, but the loss is the sum of the ranks' shares.
                (loss * distributed.world_size()).backward()
            my_loss += loss.item()
    return distributed.sum_over_ranks(my_loss)[0]


# --------------------------------------------------------------------------- the optimizer's step


def cosine_schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up over `warmup` steps, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def check_finite(name: str, value: float) -> None:
    """Raise RunError if training has diverged."""
    if not math.isfinite(value):
        advice = "start again with a lower --lr and another --out"
        raise RunError(f"{name} is {value}; stopped, the last checkpoint is intact; {advice}")


def clip_and_step(model: Transformer, optimizer: torch.optim.Optimizer, lr: float, max_norm: float) -> float:
    """Clip the gradient's norm, update, reset the gradient; returns the norm before clipping. A collective. Raises
    RunError for a gradient that isn't finite, before it reaches the weights."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = distributed.whole(norm).item()
    check_finite("the gradient's norm", norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


# --------------------------------------------------------------------------- the loop


@dataclass
class Setup:
    model: Transformer
    optimizer: torch.optim.Optimizer
    examples: list[Example]
    held_out: list[Example]  # of other problems, for the evaluation loss
    steps: int
    start: int  # steps done by an earlier run


def set_up(args: argparse.Namespace, device: torch.device) -> Setup:
    """Make the examples and the model, which resumes from the newest checkpoint if there is one."""
    # 1. The labels. A resumed run must find the same ones, and the same model.
    fields = ["id", "problem", "steps", "answer", "dropped", *SOURCES[args.kind]]
    labels = records.read(args.labels, fields, "python verify.py")
    training, evaluation = split_by_problem(labels, args.eval_fraction)
    args.labels_sha256 = records.hash_file(args.labels)
    args.model_sha256 = records.hash_model(chat.find_model(args.model))

    # 2. The model, with fp32 weights.
    model, tokenizer, stop_ids = open_model(args.model, device, torch.float32)
    model = distributed.prepare_training(model, args.activation_checkpointing)
    end_id = tokenizer.eos_token_id
    if end_id is None:
        end_id = stop_ids[0]

    # 3. The examples.
    max_length = min(args.max_length, model.config.max_positions)
    examples, counts = encode_labels(args.kind, training, tokenizer, end_id, max_length)
    held_out, _ = encode_labels(args.kind, evaluation, tokenizer, end_id, max_length)
    if not examples:
        raise InputError(f"{args.labels}: no usable label for --kind {args.kind} ({counts})")
    steps = args.epochs * math.ceil(len(examples) / args.batch_size)

    # 4. The optimizer, and where an earlier run stopped. On a GPU the fused kernel needs no memory beside the moments.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=device.type == "cuda"
    )
    out = Path(args.out)
    records.check_arguments(out, vars(args) | CONSTANTS, MAY_CHANGE_ON_RESUME)
    start = distributed.load_checkpoint(out / "training", model, optimizer)
    if distributed.rank() == 0:
        records.write_args(out, args, CONSTANTS)

    tokens = sum(len(example.ids) for example in examples) / len(examples)
    found = f"{len(examples)} sequences of {tokens:.0f} tokens, {len(held_out)} held out, {counts}"
    resumed = f", resumed after step {start}" if start else ""
    distributed.log(f"{args.kind}: {found}, {steps} steps{resumed}")
    return Setup(model, optimizer, examples, held_out, steps, start)


def batch_for_step(step: int, examples: list[Example], batch_size: int, seed: int) -> list[Example]:
    """The global batch of a step: every epoch a new order, and its last batch may be smaller. A function of (step,
    seed), so a resumed run sees what an uninterrupted one would have."""
    steps_per_epoch = math.ceil(len(examples) / batch_size)
    epoch = step // steps_per_epoch
    order = list(range(len(examples)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    start = step % steps_per_epoch * batch_size
    return [examples[i] for i in order[start : start + batch_size]]


def train(run: Setup, args: argparse.Namespace) -> None:
    """The exported model is the best by evaluation loss, or the last one if nothing is held out. A signal ends the
    training after a step, which is saved but not evaluated, as without the signal."""
    out = Path(args.out)
    source = chat.find_model(args.model)
    warmup = math.ceil(WARMUP * run.steps)
    signals = distributed.stop_on_signal()
    with records.MetricsFile(out / "metrics.jsonl", run.start) as metrics:
        best = min((record["eval/loss"] for record in metrics.records if "eval/loss" in record), default=math.inf)
        last = metrics.records[-1] if metrics.records else {}
        if run.start > 0 and (not run.held_out or last.get("eval/loss") == best):
            # An earlier run may have ended between saving and exporting.
            distributed.export(run.model, source, out)
        bar = tqdm(
            range(run.start, run.steps), initial=run.start, total=run.steps,
            desc="train", unit="step", disable=distributed.rank() != 0,
        )  # fmt: skip
        for step in bar:
            # 1. The batch: the same on every rank.
            started = time.perf_counter()
            batch = batch_for_step(step, run.examples, args.batch_size, args.seed)

            # 2. Loss and gradient.
            loss = sft_batch_loss(run.model, batch, args.micro_tokens, train=True)

            # 3. Update.
            lr = args.lr * cosine_schedule(step, run.steps, warmup)
            norm = clip_and_step(run.model, run.optimizer, lr, MAX_GRAD_NORM)

            # 4. Log; from time to time, and at the end, evaluate and save.
            record = {"step": step + 1, "train/loss": loss, "train/lr": lr, "train/grad_norm": norm}
            tokens = sum(len(example.ids) for example in batch)
            speed = distributed.per_second(tokens, time.perf_counter() - started)
            record["time/tokens_per_second"] = speed
            saving = step + 1 == run.steps or (step + 1) % args.save_every == 0
            if saving:
                # Without held-out examples the loss on the batch still tells whether the weights are sound.
                eval_loss = sft_batch_loss(run.model, run.held_out or batch, args.micro_tokens, train=False)
                check_finite("the evaluation loss", eval_loss)
                if run.held_out:
                    record["eval/loss"] = eval_loss
            metrics.append(record)
            # A collective: a signal to one rank stops all.
            stopped = distributed.max_over_ranks(len(signals)) > 0
            if saving or stopped:
                distributed.save_checkpoint(out / "training", step + 1, run.model, run.optimizer)
            if saving and (not run.held_out or eval_loss < best):
                best = eval_loss
                distributed.export(run.model, source, out)
            if stopped and step + 1 < run.steps:
                distributed.log(f"{out}: stopped by a signal after step {step + 1}; the same command resumes it")
                raise SystemExit(143)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tok/s", refresh=False)


# --------------------------------------------------------------------------- a discriminative PRM, for comparison

# A discriminative PRM writes nothing. Its verdict on a step is whether it expects Yes or No after the step's last
# token; the outcome is read after the prompt's last.


def yes_no_ids(tokenizer) -> tuple[int, int]:
    """The first token of "Yes" and the first of "No"."""
    yes = tokenizer("Yes", add_special_tokens=False).input_ids[0]
    no = tokenizer("No", add_special_tokens=False).input_ids[0]
    if yes == no:
        raise InputError("the tokenizer begins Yes and No with one token: no discriminative PRM with this model")
    return yes, no


def step_end_positions(tokenizer, solution: dict) -> tuple[list[int], list[int]]:
    """(token ids of the prompt, the positions of the n steps' verdicts and of the outcome's)."""
    rendered = chat.escape_special_tokens(tokenizer, render_steps(solution["steps"], solution["answer"]))
    text = chat.render_chat(tokenizer, PRM_PROMPT.format(problem=solution["problem"], solution=rendered))

    # Escaping adds blanks, but no lines: a step ends where its last line does.
    solution_start = text.rindex(rendered)
    line_ends = [match.start() for match in re.finditer("\n|$", rendered)]
    last_line = -1
    step_ends = []
    for step in solution["steps"]:
        last_line += 1 + step.count("\n")
        step_ends.append(solution_start + line_ends[last_line])
    ids, positions = chat.encode_to_ends(tokenizer, text, step_ends)
    return ids, [*positions, len(ids) - 1]


def discriminative_example(label: dict, tokenizer) -> Example:
    """The prompt alone. The positions of verdicts have the target Yes or No in place of the next token, the others
    none."""
    ids, positions = step_end_positions(tokenizer, label)
    yes, no = yes_no_ids(tokenizer)
    targets = [NO_TARGET] * len(ids)
    for position, correct in zip(positions, [*label["step_labels"], label["outcome"]], strict=True):
        targets[position] = yes if correct else no
    return Example(ids, targets)


@torch.no_grad()
def score_discriminative(
    model: Transformer, tokenizer, solutions: list[dict], batch_tokens: int = 16_384
) -> list[Judgement]:
    """`score_solutions` for a discriminative PRM: a verdict is whether Yes is likelier than No. Nothing is sampled."""
    # log p(Yes) - log p(No) is a difference of logits, so it takes one direction in place of the whole vocabulary.
    yes, no = yes_no_ids(tokenizer)
    towards_yes = model.head[yes].float() - model.head[no].float()  # (D,)

    # 1. Where to read. Solutions without steps, or too long for the context, stay unparsed.
    judgements = [UNPARSED] * len(solutions)
    prompts, places, lengths = {}, {}, {}  # index of a solution -> token ids, positions of the verdicts, number of ids
    for i, solution in enumerate(solutions):
        if not solution["steps"]:
            continue
        ids, positions = step_end_positions(tokenizer, solution)
        if len(ids) > model.config.max_positions:
            judgements[i] = TOO_LONG
        else:
            prompts[i] = ids
            places[i] = positions
            lengths[i] = len(ids)

    # 2. The log-odds of every token, packed, then those at the positions.
    for group in group_by_length(lengths, batch_tokens):
        packed = torch.tensor([token for i in group for token in prompts[i]], device=model.device)  # (N,)
        group_lengths = [lengths[i] for i in group]
        hidden = model.packed(packed, torch.tensor(group_lengths, device=model.device))  # (N, D)
        log_odds = (hidden.float() @ towards_yes).split(group_lengths)  # of each prompt
        for i, of_prompt in zip(group, log_odds, strict=True):
            read = of_prompt[places[i]]  # (n + 1,)
            verdicts = (read > 0).tolist()
            scores = read.sigmoid().tolist()
            text = " ".join(f"{value:+.2f}" for value in read.tolist())
            judgements[i] = Judgement(verdicts[:-1], verdicts[-1], text, lengths[i], scores[:-1], scores[-1])
    return judgements


# --------------------------------------------------------------------------- main


def main() -> None:
    parser = records.new_parser(__doc__)
    parser.add_argument("--model", help="a Hugging Face directory or hub name; none: the tiny world")
    parser.add_argument("--labels", help="labels_<method>.jsonl of verify.py")
    parser.add_argument("--out", help="directory of the new checkpoint")
    parser.add_argument("--kind", default="prm_cot", choices=KINDS)
    parser.add_argument("--lr", type=real(0), default=1e-5, help="peak learning rate (ours)")
    parser.add_argument("--epochs", type=COUNT, default=2, help="(ours)")
    parser.add_argument("--batch_size", type=COUNT, default=64, help="sequences per update (ours)")
    parser.add_argument("--max_length", type=POSITIVE, default=8192, help="tokens; longer sequences are left out")
    parser.add_argument("--micro_tokens", type=POSITIVE, default=16_384, help="tokens per forward pass and rank")
    parser.add_argument("--eval_fraction", type=real(0, 0.9), default=0.05, help="share of the problems held out")
    parser.add_argument("--save_every", type=POSITIVE, default=200, help="steps between checkpoints and evaluations")
    parser.add_argument("--activation_checkpointing", action="store_true", help="needs less memory")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", help="cpu or cuda; default: cuda if available")
    args = records.parse_args(parser, TINY, "model", "labels", "out")
    device = distributed.init_distributed(args.device)
    with records.lock_run(args.out, args):
        train(set_up(args, device), args)
    distributed.log(f"{args.out}: done")


if __name__ == "__main__":
    distributed.run_stage(main)
