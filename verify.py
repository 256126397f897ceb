"""Stage I, second half: a verifier judges every solution N times; the judgements become labels (Sec. 3.1).

    solutions.jsonl -> verify.py -> verifications.jsonl, labels_<method>.jsonl, report.json   (in --out)

    python verify.py                                       # the tiny world, on a CPU, in about two minutes
    python verify.py --method single                       # other labels from the same verifications, in a second
    python verify.py --model Qwen/Qwen3-32B --solutions runs/solutions.jsonl --out runs/verify
    torchrun --nproc_per_node 8 verify.py --model ... --solutions ... --out ...          # sharded by solution

No reference answer is used anywhere in this file's default path: the verifier reads the problem and the solution.
Every prompt stands directly above the parser of its answers. What can't be parsed is *unparsed*: it is counted and
never becomes a vote, a label or a reward.

What differs from the released code:
  1. Text is parsed section by section, so a section without a verdict can't take over the verdict of the next.
  2. Every prompt shows solutions in one layout (`generate.render_steps`); theirs trains reward models on numbered
     prose and feeds them tagged text in RL.
  3. Nothing is balanced or filtered by reference answers.
"""

import argparse
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from generate import (
    InputError,
    RecordFile,
    Sampler,
    encode_chat,
    log,
    open_model,
    parse_args,
    rank,
    read_records,
    render_steps,
    run_stage,
    start_processes,
    with_progress,
    world_size,
    write_json,
    write_records,
)

# Used when no --model is given; an explicit flag wins.
TINY = {
    "model": "data/tiny/verifier",
    "solutions": "runs/tiny/solutions.jsonl",
    "out": "runs/tiny/verify",
    "max_new_tokens": 200,
    "worked_examples": 0,  # the tiny verifier was trained on the bare prompt
    "slots": 256,
}


@dataclass(frozen=True)
class Verification:
    """A parsed verification. Each field is None if the text doesn't say it exactly once: then it is unparsed."""

    step_verdicts: list[bool] | None
    verdict: bool | None


# --------------------------------------------------------------------------- verification: prompt and parser

VERIFY_PROMPT = """Judge a student's solution to a mathematics problem, one step at a time. No reference answer is given, so work out every step yourself. A step is correct only if everything in it is right: a step that leaves out something it needs is incorrect, and so is a step that uses the result of an incorrect step.

For each step k of the student's solution write one section:
## Step k: <short title>
<your analysis>
and then, alone on a line, **This step is correct.** or **This step is incorrect.**
After the last section write one final line: **Verification: Is the answer correct (Yes/No)? Yes** or the same with No.{examples}

Problem: {problem}

Student Solution: {solution}"""

REFERENCE_PROMPT = """Judge a student's solution to a mathematics problem, one step at a time. The expected answer is given: use it to find mistakes, but work out every step yourself. A step is correct only if everything in it is right: a step that leaves out something it needs is incorrect, and so is a step that uses the result of an incorrect step.

For each step k of the student's solution write one section:
## Step k: <short title>
<your analysis>
and then, alone on a line, **This step is correct.** or **This step is incorrect.**
After the last section write one final line: **Verification: Is the answer correct (Yes/No)? Yes** or the same with No.{examples}

Problem: {problem}

Student Solution: {solution}

Expected Answer: {reference}"""

WORKED_EXAMPLES = [
    """Example

Problem: A rectangle is 6 cm wide and 4 cm high. How long is its diagonal, squared?

Student Solution: Step 1: The diagonal, the width and the height form a right triangle.
Step 2: So the squared diagonal is 6^2 + 4^2 = 36 + 16.
Step 3: 36 + 16 = 52.
Answer: 52

## Step 1: The right triangle
The corners of a rectangle are right angles, so width, height and diagonal form a right triangle.
**This step is correct.**
## Step 2: Pythagoras
6^2 = 36 and 4^2 = 16, and the theorem adds them.
**This step is correct.**
## Step 3: The sum
36 + 16 = 52.
**This step is correct.**
**Verification: Is the answer correct (Yes/No)? Yes**""",
    """Example

Problem: A shop sells pens at 3 for 2 euros. How much do 12 pens cost with a discount of 25 percent?

Student Solution: Step 1: 12 pens are 12 / 3 = 4 packs.
Step 2: 4 packs cost 4 * 3 = 12 euros.
Step 3: 25 percent of 12 is 3, so the price is 12 - 3 = 9 euros.
Answer: 9

## Step 1: The number of packs
A pack has 3 pens, and 12 / 3 = 4.
**This step is correct.**
## Step 2: The price without the discount
A pack costs 2 euros, not 3, so it should be 4 * 2 = 8 euros.
**This step is incorrect.**
## Step 3: The discount
The arithmetic is right, but it starts from the wrong price of Step 2; it should be 8 - 2 = 6 euros.
**This step is incorrect.**
**Verification: Is the answer correct (Yes/No)? No**""",
]

HEADING = re.compile(r"[ \t]*#+[ \t*]*Step[ \t]+(\d{1,6})", re.IGNORECASE)
BOLD_HEADING = re.compile(r"[ \t]*\*\*[ \t]*Step[ \t]+(\d{1,6})", re.IGNORECASE)
STEP_VERDICT = re.compile(r"[^\w\n]*This step is (correct|incorrect)[^\w\n]*", re.IGNORECASE)
VERDICT = re.compile(
    r"[^\w\n]*Verification[^\w\n]*Is the answer correct[ \t]*\(Yes/No\)[^\w\n]*(Yes|No)[^\w\n]*", re.IGNORECASE
)


def verification_prompt(problem: str, steps: list[str], answer: str | None, worked_examples: int) -> str:
    """The user turn that asks for one verification."""
    examples = "".join(f"\n\n{example}" for example in WORKED_EXAMPLES[:worked_examples])
    return VERIFY_PROMPT.format(examples=examples, problem=problem, solution=render_steps(steps, answer))


def parse_verification(text: str, num_steps: int) -> Verification:
    """Step verdicts and final verdict of a verification text; num_steps is the solution's known number of steps.

    Thinking (up to the last `</think>`) is dropped. Line by line: a heading opens the section of its step; a step
    verdict alone on a line closes the section's analysis; a Verification line counts outside analyses only, or as the
    last line. `step_verdicts` is None unless there is exactly one verdict for each of the steps 1..num_steps and
    none for any other; `verdict` is None unless there is exactly one Verification line. Linear in len(text).
    """
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    elif "<think>" in text:
        return Verification(None, None)  # cut off while thinking: what follows are drafts
    lines = text.rstrip().split("\n")
    heading = HEADING if any(HEADING.match(line) for line in lines) else BOLD_HEADING
    step, in_analysis = None, False
    found: list[tuple[int, bool]] = []
    verdicts: list[bool] = []
    for number, line in enumerate(lines, 1):
        if match := heading.match(line):
            step, in_analysis = int(match.group(1)), True
        elif (match := STEP_VERDICT.fullmatch(line)) and step is not None:
            found.append((step, match.group(1).lower() == "correct"))
            in_analysis = False
        elif (match := VERDICT.fullmatch(line)) and (not in_analysis or number == len(lines)):
            verdicts.append(match.group(1).lower() == "yes")
    return _exactly_once(found, verdicts, num_steps)


def _exactly_once(found: list[tuple[int, bool]], verdicts: list[bool], num_steps: int) -> Verification:
    found.sort(key=lambda pair: pair[0])
    complete = [step for step, _ in found] == list(range(1, num_steps + 1))
    return Verification([v for _, v in found] if complete else None, verdicts[0] if len(verdicts) == 1 else None)


# --------------------------------------------------------------------------- critique and merge: prompts

CRITIQUE_PROMPT = """Below are a problem, a student's solution and somebody's verification of it. Criticise the verification: look for errors of the student that it missed, for correct steps that it calls incorrect, for right verdicts with a wrong reason, and for a final verdict at odds with its steps. Go through the sections in order and say of each whether it judged rightly, and why.

Problem: {problem}

Student Solution: {solution}

Verification: {verification}"""

MERGE_PROMPT = """Below are a problem, a student's solution, a verification of it and a critique of that verification. Write one corrected verification, as if done in one go, in the same form: for each step a section "## Step k: <short title>" with your analysis and, alone on a line, **This step is correct.** or **This step is incorrect.**, and one final line **Verification: Is the answer correct (Yes/No)? Yes** or the same with No.

Problem: {problem}

Student Solution: {solution}

Verification: {verification}

Critique: {critique}"""


# --------------------------------------------------------------------------- reward models: prompts and parsers

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
    lines = text.rstrip().split("\n")
    steps = [match for line in lines if (match := PRM_LINE.fullmatch(line))]
    verdicts = [match.group(1).lower() == "yes" for line in lines if (match := VERDICT.fullmatch(line))]
    return _exactly_once([(int(m.group(1)), m.group(2).lower() == "correct") for m in steps], verdicts, num_steps)


# kind of reward model -> (user turn, parser of its answer); PRM and PRM-CoT share the turn, their training differs
REWARD_MODELS: dict[str, tuple[str, Callable[[str, int], Verification]]] = {
    "orm": (ORM_PROMPT, parse_orm),
    "prm": (PRM_PROMPT, parse_prm),
    "prm_cot": (PRM_PROMPT, parse_verification),
}


@dataclass(frozen=True)
class Scored:
    """A reward model's judgement of one solution: parsed, and the text it was parsed from."""

    step_verdicts: list[bool] | None
    verdict: bool | None
    text: str
    tokens: int


def score_solutions(
    sampler: Sampler,
    tokenizer,
    stop_ids: list[int],
    kind: str,
    solutions: list[dict],
    *,
    max_new_tokens: int,
    votes: int = 1,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[Scored]:
    """Judge solutions (problem, steps, answer; optional id) with a generative reward model, in order.

    votes = 1 is one greedy pass. votes = K samples K at `temperature` and aggregates them as in Stage I: the labels are
    majorities over the verifications that parsed (an ORM votes on its verdict alone). A solution without steps, or
    whose prompt leaves no room for max_new_tokens in the context, is unparsed.
    """
    prompt, parse = REWARD_MODELS[kind]
    room = sampler.model.config.max_positions - max_new_tokens
    turns, where = [], []
    for i, s in enumerate(solutions):
        solution = render_steps(s["steps"], s["answer"])
        ids = encode_chat(tokenizer, prompt.format(problem=s["problem"], solution=solution)) if s["steps"] else []
        if 0 < len(ids) <= room:
            turns.append(ids)
            where.append(i)
    samples = sampler.sample(
        turns,
        keys=[str(solutions[i].get("id", i)) for i in where],
        num_samples=votes,
        temperature=temperature if votes > 1 else 0.0,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        seed=seed,
    )
    scored = [Scored(None, None, "", 0)] * len(solutions)
    for i, group in zip(where, samples, strict=True):
        texts = [tokenizer.decode(sample.ids, skip_special_tokens=True) for sample in group]
        parsed = [parse(text, len(solutions[i]["steps"])) for text in texts]
        tokens = sum(len(sample.ids) for sample in group)
        if votes == 1:
            scored[i] = Scored(parsed[0].step_verdicts, parsed[0].verdict, texts[0], tokens)
            continue
        verdicts = [p.verdict for p in parsed if p.verdict is not None]
        stepwise = [p.step_verdicts for p in parsed if p.verdict is not None and p.step_verdicts is not None]
        scored[i] = Scored(
            [majority(column) for column in zip(*stepwise, strict=True)] if stepwise else None,
            majority(verdicts) if verdicts else None,
            texts[0],
            tokens,
        )
    return scored


# --------------------------------------------------------------------------- aggregation


@dataclass(frozen=True)
class Label:
    """What becomes of the verifications of one solution."""

    step_labels: list[bool] | None  # None only if nothing voted
    outcome: bool | None
    text: str | None  # a real verification, unchanged; None if dropped
    votes: list[list[int]]  # per step: [correct, incorrect]
    dropped: str | None  # None, or the reason
    ties: int = 0  # majorities decided by the tie rule, steps and outcome together


def majority(votes: list[bool]) -> bool:
    """True if more than half are; a tie counts as incorrect."""
    return 2 * sum(votes) > len(votes)


def _voters(records: list[dict]) -> list[dict]:
    """Only verifications with both fields parsed vote."""
    return [r for r in records if r["step_verdicts"] is not None and r["verdict"] is not None]


def _count_votes(voters: list[dict]) -> tuple[list[list[int]], int]:
    """([[correct, incorrect] of each step], number of ties including the outcome's)."""
    columns = zip(*(r["step_verdicts"] for r in voters), strict=True)
    votes = [[sum(column), len(column) - sum(column)] for column in columns]
    yes = sum(r["verdict"] for r in voters)
    return votes, sum(c == i for c, i in votes) + (2 * yes == len(voters))


def single(records: list[dict], rng: random.Random) -> Label:
    """The first parsed verification, as it is; rng is unused and there for the common signature."""
    voters = _voters(records)
    if not voters:
        return Label(None, None, None, [], "no_votes")
    first = voters[0]
    votes, _ = _count_votes([first])
    return Label(first["step_verdicts"], first["verdict"], first["text"], votes, None)


def outcome_consistency(records: list[dict], rng: random.Random) -> Label:
    """Outcome = majority verdict; text and step labels are those of a random verification with that verdict."""
    voters = _voters(records)
    if not voters:
        return Label(None, None, None, [], "no_votes")
    votes, _ = _count_votes(voters)
    verdicts = [r["verdict"] for r in voters]
    outcome = majority(verdicts)
    chosen = rng.choice([r for r in voters if r["verdict"] == outcome])
    return Label(chosen["step_verdicts"], outcome, chosen["text"], votes, None, int(2 * sum(verdicts) == len(verdicts)))


def step_consistency(records: list[dict], rng: random.Random) -> Label:
    """label_i = majority of the verdicts on step i, outcome = majority verdict; the text is a random verification
    that says exactly that. If none does, the solution is dropped as `no_match` and its labels stand without a text."""
    voters = _voters(records)
    if not voters:
        return Label(None, None, None, [], "no_votes")
    votes, ties = _count_votes(voters)
    labels = [majority(list(column)) for column in zip(*(r["step_verdicts"] for r in voters), strict=True)]
    outcome = majority([r["verdict"] for r in voters])
    matching = [r for r in voters if r["step_verdicts"] == labels and r["verdict"] == outcome]
    if not matching:
        return Label(labels, outcome, None, votes, "no_match", ties)
    return Label(labels, outcome, rng.choice(matching)["text"], votes, None, ties)


METHODS = {"single": single, "outcome_consistency": outcome_consistency, "step_consistency": step_consistency}


# --------------------------------------------------------------------------- main


def write_labels(args: argparse.Namespace, solutions: list[dict], by_solution: dict[str, list[dict]]) -> dict:
    """Aggregate, write labels_<method>.jsonl, and return the method's part of the report."""
    labels = []
    for s in solutions:
        records = sorted(by_solution.get(s["id"], []), key=lambda r: r["sample"])
        label = METHODS[args.method](records, random.Random(f"{args.seed}/{s['id']}"))
        about = {key: s[key] for key in ("id", "problem", "steps", "answer")}
        labels.append({**about, "method": args.method, **asdict(label)})
    write_records(Path(args.out) / f"labels_{args.method}.jsonl", labels, args)
    kept = [label for label in labels if label["dropped"] is None]
    return {
        "solutions": len(labels),
        "kept": len(kept),
        "yield": len(kept) / len(labels),
        "dropped": dict(Counter(label["dropped"] for label in labels if label["dropped"])),
        "ties": sum(label["ties"] for label in labels),
        "outcome_yes": sum(label["outcome"] for label in kept) / max(len(kept), 1),
    }


def verify_solutions(args: argparse.Namespace, solutions: list[dict], output: RecordFile) -> None:
    """Sample the verifications that the output doesn't have yet."""
    N = args.num_verifications
    todo = [s for s in solutions[rank() :: world_size()] if s["steps"]]
    todo = [s for s in todo if any(f"{s['id']}/{j}" not in output.done for j in range(N))]
    if not todo:
        return
    device = start_processes(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer, stops = open_model(args.model, device, dtype)
    sampler = Sampler(model, args.slots)
    room = model.config.max_positions - args.max_new_tokens
    prompts, judged = [], []
    for s in todo:
        ids = encode_chat(tokenizer, verification_prompt(s["problem"], s["steps"], s["answer"], args.worked_examples))
        if len(ids) <= room:  # otherwise no verification, and the label says no_votes
            prompts.append(ids)
            judged.append(s)
    if not prompts:
        raise InputError(f"no prompt leaves room for --max_new_tokens {args.max_new_tokens} in the model's context")
    stream = sampler.stream(
        prompts,
        keys=[s["id"] for s in judged],
        num_samples=N,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        stop_ids=stops,
        seed=args.seed,
    )
    for i, samples in with_progress(stream, sampler, "verify", len(prompts), N):
        s, records = judged[i], []
        for j, sample in enumerate(samples):
            text = tokenizer.decode(sample.ids, skip_special_tokens=True)
            parsed = asdict(parse_verification(text, len(s["steps"])))
            about = {"id": f"{s['id']}/{j}", "solution_id": s["id"], "sample": j, "text": text}
            records.append({**about, **parsed, "finish": sample.finish, "tokens": len(sample.ids)})
        output.append(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="verifier: a Hugging Face directory or hub name; none: the tiny world")
    parser.add_argument("--solutions", help="solutions.jsonl of generate.py, or anybody's with the same fields")
    parser.add_argument("--out", help="directory for verifications, labels and report")
    parser.add_argument("--method", default="step_consistency", choices=list(METHODS))
    parser.add_argument("--num_verifications", type=int, default=16, help="N, verifications per solution")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--max_new_tokens", type=int, default=8192, help="per verification, thinking included")
    parser.add_argument("--worked_examples", type=int, default=2, choices=[0, 1, 2], help="examples in the prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use the first so many solutions only")
    parser.add_argument("--slots", type=int, default=128, help="rows of the sampler's KV cache")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    args = parse_args(parser, TINY)
    start_processes(args.device)
    fields = ["id", "problem", "steps", "answer"]
    solutions = read_records(args.solutions, fields, "python generate.py")[: args.limit]
    started = time.time()
    path = Path(args.out) / "verifications.jsonl"
    with RecordFile(path, args, free=("method",)) as output:
        verify_solutions(args, solutions, output)
    if rank() != 0:
        return
    by_solution: dict[str, list[dict]] = {}
    verifications = read_records(path, ["id", "solution_id", "sample", "text", "step_verdicts", "verdict", "tokens"])
    for record in verifications:
        by_solution.setdefault(record["solution_id"], []).append(record)
    voted = sum(r["step_verdicts"] is not None and r["verdict"] is not None for r in verifications)
    report = {
        "method": args.method,
        **write_labels(args, solutions, by_solution),
        "verifications": len(verifications),
        "unparsed": len(verifications) - voted,
        "tokens": sum(r["tokens"] for r in verifications),
        "seconds": round(time.time() - started, 1),
    }
    write_json(Path(args.out) / "report.json", report)
    log(" | ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in report.items()))


if __name__ == "__main__":
    run_stage(main)
