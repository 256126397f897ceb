"""Stage II: fine-tune a generative reward model on the labels of Stage I (SPARK, Sec. 3.2).

    labels_<method>.jsonl -> train_prm.py -> a Hugging Face directory; metrics.jsonl and training/ inside it

    python train_prm.py                                    # the tiny world: a PRM-CoT, on a CPU, in about a minute
    python train_prm.py --kind prm --out runs/tiny/prm       # another kind of reward model
    torchrun --nproc_per_node 8 train_prm.py --model Qwen/Qwen2.5-14B-Instruct --out runs/prm_cot \\
        --labels runs/verify/labels_step_consistency.jsonl

| kind     | user turn                                      | target                                            |
|----------|------------------------------------------------|---------------------------------------------------|
| orm      | problem, solution, "Is the answer correct?"    | Yes or No                                         |
| prm      | problem, solution, "Let's verify step by step" | one Correct/Incorrect a step, the verdict         |
| prm_cot  | the same                                       | the chosen verification, thinking removed         |
| disc_prm | the same                                       | Yes or No after each step's last token (baseline) |
| policy   | the solver prompt                              | a solution judged correct, in tags                |

The loss is the mean negative log-likelihood of the target tokens, the end-of-turn token included, over the whole
global batch: micro-batches and ranks sum their tokens and divide by one common count.

What differs from the paper: its fine-tuning settings are not published, so learning rate, epochs and batch size are
ours. `--kind policy` fine-tunes the policy's format on the reference-free labels (the paper: on solutions of a larger
model, App. D).

The file introduces what evaluation and GRPO share: the reward models and scoring with them, packed batches and the update.
FSDP2 and checkpoints are in kernels/distributed.py.
"""

import argparse
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import records
from generate import (
    SOLVE_PROMPT,
    Engine,
    encode_chat,
    escape_special_tokens,
    find_boxes,
    find_model,
    open_model,
    render_chat,
    render_response,
    render_steps,
    unwrap_boxes,
)
from kernels import distributed
from kernels.distributed import InputError, RunError
from kernels.sampler import with_progress
from kernels.transformer import Transformer
from verify import VERDICT, Verification, decode_judgement, exactly_once, majority, parse_verification, without_thinking

import torch
from torch import Tensor
from tqdm import tqdm

# Used when no --model is given; an explicit flag wins. The tiny reward models start from the checkpoint that has seen
# verification text, as Qwen2.5 has.
TINY = {
    "model": "data/tiny/verifier",
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

KINDS = ["orm", "prm", "prm_cot", "disc_prm", "policy"]

FREE = {"out", "device", "save_every", "micro_tokens", "activation_checkpointing"}  # may change on resuming

# A training sequence: token ids, and for each position the token that it is to predict, or -1.
Sequence = tuple[list[int], list[int]]

# --------------------------------------------------------------------------- reward models: prompt, target, parser, score

ORM_PROMPT = "Problem: {problem}\n\nSolution: {solution}\n\nIs the answer correct (Yes/No)?"


def parse_orm(text: str, num_steps: int) -> Verification:
    """The outcome reward model says Yes or No and nothing else."""
    return Verification(None, {"yes": True, "no": False}.get(text.strip().lower()))


PRM_PROMPT = "Problem: {problem}\n\nStudent Solution: {solution}\n\nLet's verify step by step."


PRM_LINE = re.compile(r"[ \t]*Step (\d{1,6}): (Correct|Incorrect)[ \t.]*", re.IGNORECASE)


def write_prm_target(labels: list[bool], outcome: bool) -> str:
    """The PRM's target: one line a step, then the Verification line."""
    lines = [f"Step {k}: {'Correct' if label else 'Incorrect'}" for k, label in enumerate(labels, 1)]
    lines.append(f"**Verification: Is the answer correct (Yes/No)? {'Yes' if outcome else 'No'}**")
    return "\n".join(lines)


def parse_prm(text: str, num_steps: int) -> Verification:
    """Parses `write_prm_target`."""
    lines = text.replace("\r", "").rstrip().split("\n")
    steps = [match for line in lines if (match := PRM_LINE.fullmatch(line))]
    verdicts = [match.group(1).lower() == "yes" for line in lines if (match := VERDICT.fullmatch(line))]
    return exactly_once([(int(m.group(1)), m.group(2).lower() == "correct") for m in steps], verdicts, num_steps)


# kind of reward model -> (user turn, parser of its answer); PRM and PRM-CoT share the turn, their training differs
REWARD_MODELS: dict[str, tuple[str, Callable[[str, int], Verification] | None]] = {
    "orm": (ORM_PROMPT, parse_orm),
    "prm": (PRM_PROMPT, parse_prm),
    "prm_cot": (PRM_PROMPT, parse_verification),
    "disc_prm": (PRM_PROMPT, None),  # says nothing: its log-odds are read off, see `score_discriminative`
}


def step_end_positions(tokenizer, solution: dict) -> tuple[list[int], list[int]]:
    """(token ids of a PRM's prompt, n + 1 positions in them): the last token of each of n steps, and the prompt's."""
    rendered = escape_special_tokens(tokenizer, render_steps(solution["steps"], solution["answer"]))
    text = render_chat(tokenizer, PRM_PROMPT.format(problem=solution["problem"], solution=rendered))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start, ends, token = text.rindex(rendered), [], 0
    for k in range(1, len(solution["steps"]) + 1):
        end = start + len(escape_special_tokens(tokenizer, render_steps(solution["steps"][:k])))
        while token + 1 < len(encoded.input_ids) and encoded.offset_mapping[token + 1][0] < end:
            token += 1
        ends.append(token)
    return encoded.input_ids, [*ends, len(encoded.input_ids) - 1]


def yes_no_ids(tokenizer) -> tuple[int, int]:
    """The two fixed tokens of a discriminative PRM: the first of "Yes" and the first of "No"."""
    yes, no = (tokenizer(text, add_special_tokens=False).input_ids[0] for text in ("Yes", "No"))
    if yes == no:
        raise InputError("the tokenizer begins Yes and No with one token: no discriminative PRM with this model")
    return yes, no


@dataclass(frozen=True)
class Judgement:
    """A reward model's judgement of one solution: parsed, and the text it was parsed from. The scores are the shares of
    votes for it, 0 or 1 if there is one, and a disc_prm's probabilities."""

    step_verdicts: list[bool] | None
    verdict: bool | None
    text: str
    tokens: int
    step_scores: list[float] | None = None
    score: float | None = None


@torch.no_grad()
def score_discriminative(
    model: Transformer, tokenizer, solutions: list[dict], batch_tokens: int = 16_384
) -> list[Judgement]:
    """Judge solutions with a discriminative PRM: a step is correct if at its last token Yes is likelier than No, and so
    is the outcome at the prompt's. One forward pass, nothing is sampled; text: the log-odds."""
    yes, no = yes_no_ids(tokenizer)
    scored = [Judgement(None, None, "", 0)] * len(solutions)
    batches: list[list[tuple[int, list[int], list[int]]]] = [[]]
    for i, s in enumerate(solutions):
        ids, ends = step_end_positions(tokenizer, s) if s["steps"] else ([], [])
        if 0 < len(ids) <= model.config.max_positions:
            if sum(len(ids) for _, ids, _ in batches[-1]) + len(ids) > batch_tokens:
                batches.append([])
            batches[-1].append((i, ids, ends))
    for batch in filter(None, batches):
        ids = torch.tensor([token for _, of_one, _ in batch for token in of_one], device=model.device)  # (N,)
        lengths = torch.tensor([len(of_one) for _, of_one, _ in batch], device=model.device)  # (S,)
        both = [model.packed(ids, lengths, torch.full_like(ids, token))[0] for token in (yes, no)]
        odds = (both[0] - both[1]).split(lengths.tolist())  # (n tokens,) each
        for (i, of_one, ends), values in zip(batch, odds, strict=True):
            *steps, outcome = values[ends].tolist()
            *chances, chance = values[ends].sigmoid().tolist()
            text = " ".join(f"{x:+.2f}" for x in (*steps, outcome))
            scored[i] = Judgement([x > 0 for x in steps], outcome > 0, text, len(of_one), chances, chance)
    return scored


def score_solutions(
    engine: Engine,
    kind: str,
    solutions: list[dict],
    *,
    max_new_tokens: int,
    votes: int = 1,
    temperature: float = 0.8,
    seed: int | str = 0,
    title: str | None = None,
) -> list[Judgement]:
    """Judge solutions (problem, steps, answer; optional id) with a generative reward model, in order.

    votes = 1 is one greedy pass. votes = K samples K at `temperature` (top_p 1) and aggregates them as in Stage I: the
    labels are majorities over the verifications that parsed (an ORM votes on its verdict alone). A solution without
    steps, or whose prompt leaves no room for max_new_tokens in the context, is unparsed. A disc_prm has no votes. A
    title shows progress.
    """
    prompt, parse = REWARD_MODELS[kind]
    if parse is None:
        if votes > 1:
            raise InputError(f"--votes {votes}: a {kind} says the same every time; leave it at 1")
        return score_discriminative(engine.sampler.model, engine.tokenizer, solutions)
    room = engine.context - max_new_tokens
    turns, where = [], []
    for i, s in enumerate(solutions):
        solution = render_steps(s["steps"], s["answer"])
        ids = engine.encode(prompt.format(problem=s["problem"], solution=solution)) if s["steps"] else []
        if 0 < len(ids) <= room:
            turns.append(ids)
            where.append(i)
    stream = engine.stream(
        turns,
        keys=[str(solutions[i].get("id", i)) for i in where],
        num_samples=votes,
        temperature=temperature if votes > 1 else 0.0,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    scored = [Judgement(None, None, "", 0)] * len(solutions)
    for place, group in with_progress(stream, engine.sampler, title, len(turns), votes) if title else stream:
        i = where[place]
        texts = [decode_judgement(engine, turns[place], sample.ids) for sample in group]
        parsed = [parse(text, len(solutions[i]["steps"])) for text in texts]
        # Among several only those that parsed as a whole vote, as in Stage I; verdicts alone where none did (an ORM's).
        whole = [p for p in parsed if p.step_verdicts and p.verdict is not None]
        verdicts = [p.verdict for p in (whole if votes > 1 and whole else parsed) if p.verdict is not None]
        stepwise = [p.step_verdicts for p in (whole if votes > 1 else parsed) if p.step_verdicts]
        columns = list(zip(*stepwise, strict=True))
        scored[i] = Judgement(
            [majority(column) for column in columns] or None,
            majority(verdicts) if verdicts else None,
            texts[0],
            sum(len(sample.ids) for sample in group),
            [sum(column) / len(column) for column in columns] or None,
            sum(verdicts) / len(verdicts) if verdicts else None,
        )
    return scored


# --------------------------------------------------------------------------- examples


def make_example(kind: str, label: dict) -> tuple[str, str] | None:
    """(user turn, target) for one kept record of a labels file; None if this kind has no use for it."""
    solution = render_steps(label["steps"], label["answer"])
    texts = {"problem": label["problem"], "solution": solution}
    if kind == "orm":
        return ORM_PROMPT.format(**texts), "Yes" if label["outcome"] else "No"
    if kind == "prm":
        return PRM_PROMPT.format(**texts), write_prm_target(label["step_labels"], label["outcome"])
    if kind == "prm_cot":
        return PRM_PROMPT.format(**texts), without_thinking(label["text"])
    if not label["outcome"] or label["answer"] is None:
        return None
    # An instruct model often boxes its answer in the last step, too; GRPO will allow one box and no tag inside another.
    response = render_response([unwrap_boxes(step) for step in label["steps"]], label["answer"])
    if len(find_boxes(response)) != 1 or len(re.findall(r"</?(?:think|answer)>", response)) != 4:
        return None
    return SOLVE_PROMPT.format(problem=label["problem"]), response


def make_sequences(
    kind: str, labels: list[dict], tokenizer, end_id: int, max_length: int
) -> tuple[list[Sequence], dict]:
    """(training sequences, counts): labels that were dropped or whose sequence is too long are left out and counted."""
    sequences, counts = [], {"dropped": 0, "unused": 0, "too_long": 0}
    for label in labels:
        if label["dropped"] is not None:
            counts["dropped"] += 1
            continue
        if kind == "disc_prm":
            sequence = discriminative_sequence(label, tokenizer)
        elif example := make_example(kind, label):
            prompt = encode_chat(tokenizer, example[0])
            sequence = targets_after_prompt(prompt, [*tokenizer(example[1], add_special_tokens=False).input_ids, end_id])
        else:
            counts["unused"] += 1
            continue
        if len(sequence[0]) > max_length:
            counts["too_long"] += 1
            continue
        sequences.append(sequence)
    return sequences, counts


def targets_after_prompt(prompt: list[int], response: list[int]) -> Sequence:
    """The sequence whose targets are the response's tokens, found by position and never by token value (the padding
    token may equal the end-of-turn token, which is trained on). Position i predicts token i + 1."""
    return prompt + response, [-1] * (len(prompt) - 1) + response + [-1]


def discriminative_sequence(label: dict, tokenizer) -> Sequence:
    """The sequence of a discriminative PRM: the prompt alone; each step's last token is to predict one of two fixed
    tokens, and the prompt's last token the outcome. Where other tokens would follow nothing is trained."""
    ids, ends = step_end_positions(tokenizer, label)
    right, wrong = yes_no_ids(tokenizer)
    targets = [-1] * len(ids)
    for end, correct in zip(ends, [*label["step_labels"], label["outcome"]], strict=True):
        targets[end] = right if correct else wrong
    return ids, targets


def split_by_problem(labels: list[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """(training labels, evaluation labels), split by problem text so that no problem is on both sides."""
    problems = sorted({label["problem"] for label in labels})
    random.Random(0).shuffle(problems)
    held = set(problems[: round(fraction * len(problems))])
    return [x for x in labels if x["problem"] not in held], [x for x in labels if x["problem"] in held]


# --------------------------------------------------------------------------- packed batches


def pack(sequences: list[Sequence], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences one behind the other, without padding: (ids (N,), lengths (S,), targets (N,))."""
    ids = [token for tokens, _ in sequences for token in tokens]
    targets = [target for _, of_one in sequences for target in of_one]
    lengths = [len(tokens) for tokens, _ in sequences]
    return tuple(torch.tensor(x, device=device) for x in (ids, lengths, targets))


def split_micro_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that no group has more than max_tokens tokens (single longer sequences excepted), similar
    lengths together. Under torchrun every rank gets the same number of groups, the last ones possibly empty: FSDP's
    collectives need every rank to take part in every micro-batch."""
    groups: list[list[int]] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or total + lengths[i] > max_tokens:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += lengths[i]
    return groups + [[] for _ in range(int(distributed.max_over_ranks(len(groups))) - len(groups))]


def rank_share(lengths: list[int]) -> list[int]:
    """Indices of this rank's share of a global batch: dealt out by length, so that ranks have similar work."""
    return sorted(range(len(lengths)), key=lengths.__getitem__)[distributed.rank() :: distributed.world_size()]


def sft_batch_loss(model: Transformer, sequences: list[Sequence], micro_tokens: int, train: bool) -> float:
    """Loss of one global batch, which every rank has whole: negative log-likelihood per target token, averaged over
    all target tokens. With train=True its gradient is added to the parameters'."""
    denominator = sum(target >= 0 for _, targets in sequences for target in targets)
    mine = [sequences[i] for i in rank_share([len(ids) for ids, _ in sequences])]
    total = 0.0
    with torch.set_grad_enabled(train):
        for group in split_micro_batches([len(ids) for ids, _ in mine], micro_tokens):
            # An empty group still runs, on one token that is no target: its loss and gradient are zero.
            chunk = [mine[i] for i in group] or [([0], [-1])]
            logprobs, _ = model.packed(*pack(chunk, model.device))
            loss = -logprobs.sum() / denominator
            if train:
                (loss * distributed.world_size()).backward()  # FSDP averages gradients over ranks; the loss is a sum
            total += loss.item()
    return distributed.sum_over_ranks(total)[0]


# --------------------------------------------------------------------------- updates


def clip_and_step(model: Transformer, optimizer: torch.optim.Optimizer, lr: float, max_norm: float) -> float:
    """Clip the gradient's norm, update, reset the gradient; returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = distributed.whole(norm)
    if not torch.isfinite(norm):
        raise RunError(f"the gradient's norm is {norm.item()}; stopped, the last checkpoint is intact; "
                         "start again with a lower --lr and another --out")  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


# --------------------------------------------------------------------------- main


def cosine_schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def batch_for_step(step: int, sequences: list[Sequence], batch_size: int, seed: int) -> list[Sequence]:
    """The global batch of a step: a function of (step, seed), so a resumed run sees what it would have seen."""
    per_epoch = math.ceil(len(sequences) / batch_size)
    order = list(range(len(sequences)))
    random.Random(f"{seed}/{step // per_epoch}").shuffle(order)
    start = step % per_epoch * batch_size
    return [sequences[i] for i in order[start : start + batch_size]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="where to start: a Hugging Face directory or hub name; none: the tiny world")
    parser.add_argument("--labels", help="labels_<method>.jsonl of verify.py")
    parser.add_argument("--out", help="directory of the new checkpoint")
    parser.add_argument("--kind", default="prm_cot", choices=KINDS)
    parser.add_argument("--lr", type=float, default=1e-5, help="peak learning rate (ours: the paper gives none)")
    parser.add_argument("--epochs", type=int, default=2, help="(ours)")
    parser.add_argument("--batch_size", type=int, default=64, help="sequences per update (ours)")
    parser.add_argument("--max_length", type=int, default=8192, help="longer sequences are left out, in tokens")
    parser.add_argument("--micro_tokens", type=int, default=16_384, help="tokens per forward pass and rank")
    parser.add_argument("--eval_fraction", type=float, default=0.05, help="share of the problems held out")
    parser.add_argument("--save_every", type=int, default=200, help="steps between checkpoints and evaluations")
    parser.add_argument("--activation_checkpointing", action="store_true", help="recompute activations: less memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    args = records.parse_args(parser, TINY, "model", "labels", "out")
    records.check_numbers(args, "epochs", "batch_size", "max_length", "micro_tokens", "save_every")
    records.check_numbers(args, "lr", least=0)
    records.check_numbers(args, "eval_fraction", least=0, most=0.9)
    if Path(args.out).resolve() == Path(args.model).resolve():
        raise InputError(f"--out {args.out} is the model itself; choose another, a resumed run starts from it")
    device = distributed.init_distributed(args.device)
    fields = ["id", "problem", "steps", "answer", "step_labels", "outcome", "text", "dropped"]
    labels = records.read(args.labels, fields, "python verify.py")
    args.labels_sha256 = records.hash_file(args.labels)  # a run that goes on must find the same labels
    model, tokenizer, stop_ids = open_model(args.model, device, torch.float32)
    model = distributed.prepare_training(model, args.activation_checkpointing)
    end_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else stop_ids[0]
    training, evaluation = split_by_problem(labels, args.eval_fraction)
    sequences, counts = make_sequences(args.kind, training, tokenizer, end_id, args.max_length)
    held, _ = make_sequences(args.kind, evaluation, tokenizer, end_id, args.max_length)
    if not sequences:
        raise InputError(f"{args.labels}: no usable label for --kind {args.kind} ({counts})")
    # On a GPU the fused kernel needs no memory beside the moments, and passes over them once.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=device.type == "cuda"
    )
    steps = args.epochs * math.ceil(len(sequences) / args.batch_size)
    out = Path(args.out)
    records.check_arguments(out, vars(args) | CONSTANTS, FREE)
    start = distributed.load_checkpoint(out / "training", model, optimizer)
    tokens = sum(len(ids) for ids, _ in sequences)
    distributed.log(f"{args.kind}: {len(sequences)} sequences of {tokens / len(sequences):.0f} tokens, {len(held)} held "
        f"out, {counts}, {steps} steps" + (f", resumed after step {start}" if start else ""))  # fmt: skip
    if distributed.rank() == 0:
        records.write_json(Path(f"{out}.args.json"), records.describe_run(args, CONSTANTS))
    with records.MetricsFile(out / "metrics.jsonl", start) as metrics:
        train(model, optimizer, sequences, held, args, start, steps, metrics)
    distributed.log(f"{out}: done")


def train(model, optimizer, sequences, held, args, start, steps, metrics) -> None:
    """The loop: steps start..steps-1, evaluation and checkpoint every `save_every` steps and at the end. The exported
    model is the best one by evaluation loss, or the last one if nothing is held out."""
    out, source = Path(args.out), find_model(args.model)
    best = min((m["eval/loss"] for m in metrics.records if "eval/loss" in m), default=math.inf)
    bar = tqdm(
        range(start, steps), initial=start, total=steps, desc="train", unit="step", disable=distributed.rank() != 0
    )
    for step in bar:
        started = time.time()
        batch = batch_for_step(step, sequences, args.batch_size, args.seed)
        loss = sft_batch_loss(model, batch, args.micro_tokens, train=True)
        lr = args.lr * cosine_schedule(step, steps, math.ceil(WARMUP * steps))
        norm = clip_and_step(model, optimizer, lr, MAX_GRAD_NORM)
        record = {"step": step + 1, "train/loss": loss, "train/lr": lr, "train/grad_norm": norm}
        record["time/tokens_per_second"] = sum(len(ids) for ids, _ in batch) / (time.time() - started)
        saving = step + 1 == steps or (step + 1) % args.save_every == 0
        if saving and held:
            record["eval/loss"] = sft_batch_loss(model, held, args.micro_tokens, train=False)
        metrics.append(record)
        if saving:
            if record.get("eval/loss", -math.inf) < best:
                best = record.get("eval/loss", math.inf)
                distributed.export(model, source, out)
            distributed.save_checkpoint(out / "training", step + 1, model, optimizer)
        bar.set_postfix_str(f"loss {loss:.4f}, {record['time/tokens_per_second']:,.0f} tok/s", refresh=False)


if __name__ == "__main__":
    distributed.run_stage(main)
