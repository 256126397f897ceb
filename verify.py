"""Stage I, second half: a verifier judges every solution N times; the verifications become labels (Sec. 3.1).

    solutions.jsonl -> verify.py -> verifications.jsonl, labels_<method>.jsonl, report.json   (in --out)

    python verify.py                                       # the tiny world, on a CPU, in two minutes
    python verify.py --method single                       # other labels from the same verifications, in a second
    python verify.py --method hybrid                       # two more calls for each: a critique, and a merge of both
    python verify.py --model Qwen/Qwen3-32B --solutions runs/solutions.jsonl --out runs/verify
    torchrun --nproc_per_node 8 verify.py --model ... --solutions ... --out ...          # sharded by solution

| method              | label                                                                                     |
|---------------------|-------------------------------------------------------------------------------------------|
| single              | what the first parsed verification says                                                   |
| outcome_consistency | a random verification with the majority's verdict                                         |
| step_consistency    | a majority for each step and for the outcome; a random verification that says just that   |
| meta_critique       | the first parsed verification, criticised and merged with the critique into a new one     |
| hybrid              | the same, from the verification that step_consistency selects                             |
| hybrid_outcome      | the same, from the verification that outcome_consistency selects                          |
| reference_guided    | the first parsed verification by a verifier that is shown the reference answer (baseline) |

Only reference_guided reads answers; every other verifier has the problem and the solution, nothing else.
Every prompt stands directly above the parser of its answers. What can't be parsed is *unparsed*: it is counted and
never becomes a vote, a label or a reward.

What differs from the released code:
  1. Text is parsed section by section, so a section without a verdict can't take over the verdict of the next.
  2. Every prompt shows solutions in one layout (`generate.render_steps`); theirs trains reward models on numbered
     prose and feeds them tagged text in RL.
  3. Nothing is balanced or filtered by reference answers (outside the stages, `python -m data.prepare balance` does so).
"""

import argparse
import hashlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from data import records
from generate import Engine, open_engine, render_steps
from kernels import distributed
from kernels.distributed import InputError
from kernels.sampler import CPU_SLOTS, with_progress

import torch

# Used when no --model is given; an explicit flag wins.
TINY = {
    "model": "data/tiny/verifier",
    "solutions": "runs/tiny/solutions.jsonl",
    "out": "runs/tiny/verify",
    "max_new_tokens": 200,
    "worked_examples": 0,  # the tiny verifier was trained on the bare prompt
    "slots": 256,
    "device": "cpu",
}

# These don't change the records of an output that is resumed. The last two were flags of older runs, whose outputs stay
# usable: hybrid_from is a method now, and balancing is `python -m data.prepare balance`.
MAY_CHANGE_ON_RESUME = ("method", "critique_rounds", "hybrid_from", "balance")


@dataclass(frozen=True)
class Verification:
    """A parsed verification. Each field is None if the text doesn't say it exactly once: then it is unparsed."""

    step_verdicts: list[bool] | None
    verdict: bool | None


# --------------------------------------------------------------------------- verification: prompt and parser

# What both prompts ask for, and the parser below reads.
FORM = """A step is correct only if everything in it is right: a step that leaves out something it needs is incorrect, and so is a step that uses the result of an incorrect step.

For each step k of the student's solution write one section:
## Step k: <short title>
<your analysis>
and then, alone on a line, **This step is correct.** or **This step is incorrect.**
After the last section write one final line: **Verification: Is the answer correct (Yes/No)? Yes** or the same with No.{examples}

Problem: {problem}

Student Solution: {solution}"""

VERIFY_PROMPT = f"""Judge a student's solution to a mathematics problem, one step at a time. No reference answer is given, so work out every step yourself. {FORM}"""

REFERENCE_PROMPT = f"""Judge a student's solution to a mathematics problem, one step at a time. The expected answer is given: use it to find mistakes, but work out every step yourself. {FORM}

Expected Answer: {{reference}}"""

HEADING = re.compile(r"[ \t]*#+[ \t*]*Step[ \t]+(\d{1,6})", re.IGNORECASE)
BOLD_HEADING = re.compile(r"[ \t]*\*\*[ \t]*Step[ \t]+(\d{1,6})", re.IGNORECASE)
STEP_VERDICT = re.compile(r"[^\w\n]*This step is (correct|incorrect)[^\w\n]*", re.IGNORECASE)
VERDICT = re.compile(
    r"[^\w\n]*Verification[^\w\n]*Is the answer correct[ \t]*\(Yes/No\)[^\w\n]*(Yes|No)[^\w\n]*", re.IGNORECASE
)


def verification_prompt(solution: dict, worked_examples: int, reference: str | None = None) -> str:
    """The user turn that asks for one verification of a solution (problem, steps, answer); with a reference answer, if
    there is one."""
    return (VERIFY_PROMPT if reference is None else REFERENCE_PROMPT).format(
        examples="".join(f"\n\n{example}" for example in WORKED_EXAMPLES[:worked_examples]),
        problem=solution["problem"],
        solution=render_steps(solution["steps"], solution["answer"]),
        reference=reference,
    )


def decode_judgement(engine: Engine, prompt: list[int], ids: list[int]) -> str:
    """What a judge has written, from its token ids. Some chat templates open the thought at the end of the prompt; then
    `<think>` is put in front again, or a thought that was cut off would pass for a judgement."""
    opened = engine.tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")
    return ("<think>" if opened else "") + engine.text(ids)


def without_thinking(text: str) -> str:
    """What follows the last `</think>`, or all of a text that has none."""
    return text.rpartition("</think>")[2].strip()


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
    return exactly_once(found, verdicts, num_steps)


def exactly_once(found: list[tuple[int, bool]], verdicts: list[bool], num_steps: int) -> Verification:
    found.sort(key=lambda pair: pair[0])
    complete = [step for step, _ in found] == list(range(1, num_steps + 1))
    return Verification([v for _, v in found] if complete else None, verdicts[0] if len(verdicts) == 1 else None)


# --------------------------------------------------------------------------- verification: two examples of what is asked for

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


def critique_prompt(solution: dict, verification: str, critique: str | None = None) -> str:
    """The user turn that asks for a critique of a verification; or, given the critique, for the merge of both."""
    return (CRITIQUE_PROMPT if critique is None else MERGE_PROMPT).format(
        problem=solution["problem"],
        solution=render_steps(solution["steps"], solution["answer"]),
        verification=without_thinking(verification),
        critique=without_thinking(critique or ""),
    )


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


def keep_parsed(records: list[dict]) -> list[dict]:
    """Only verifications with both fields parsed vote; the others are unparsed."""
    return [r for r in records if r["step_verdicts"] is not None and r["verdict"] is not None]


def _count_votes(voters: list[dict]) -> tuple[list[list[int]], int]:
    """([[correct, incorrect] of each step], number of ties including the outcome's)."""
    columns = zip(*(r["step_verdicts"] for r in voters), strict=True)
    votes = [[sum(column), len(column) - sum(column)] for column in columns]
    yes = sum(r["verdict"] for r in voters)
    return votes, sum(c == i for c, i in votes) + (2 * yes == len(voters))


def single(records: list[dict], rng: random.Random) -> Label:
    """The first parsed verification, as it is; rng is unused and there for the common signature."""
    voters = keep_parsed(records)
    if not voters:
        return Label(None, None, None, [], "no_votes")
    first = voters[0]
    votes, _ = _count_votes([first])
    return Label(first["step_verdicts"], first["verdict"], first["text"], votes, None)


def outcome_consistency(records: list[dict], rng: random.Random) -> Label:
    """Outcome = majority verdict; text and step labels are those of a random verification with that verdict."""
    voters = keep_parsed(records)
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
    voters = keep_parsed(records)
    if not voters:
        return Label(None, None, None, [], "no_votes")
    votes, ties = _count_votes(voters)
    labels = [majority(list(column)) for column in zip(*(r["step_verdicts"] for r in voters), strict=True)]
    outcome = majority([r["verdict"] for r in voters])
    matching = [r for r in voters if r["step_verdicts"] == labels and r["verdict"] == outcome]
    if not matching:
        return Label(labels, outcome, None, votes, "no_match", ties)
    return Label(labels, outcome, rng.choice(matching)["text"], votes, None, ties)


AGGREGATES = {"single": single, "outcome_consistency": outcome_consistency, "step_consistency": step_consistency}


class Method(NamedTuple):
    """How a method makes a label of a solution's verifications."""

    aggregate: Callable[[list[dict], random.Random], Label]
    needs_critique: bool = False  # the chosen verification is criticised and merged with its critique
    reads_answers: bool = False  # its verifier is shown the reference answer


METHODS = {
    **{name: Method(aggregate) for name, aggregate in AGGREGATES.items()},
    "meta_critique": Method(single, needs_critique=True),
    "hybrid": Method(step_consistency, needs_critique=True),
    "hybrid_outcome": Method(outcome_consistency, needs_critique=True),
    "reference_guided": Method(single, reads_answers=True),
}


def group_by_solution(solutions: list[dict], verifications: list[dict]) -> dict[str, list[dict]]:
    """solution id -> its verifications in the order of their samples, for all solutions; others' are left out. Raises
    InputError for a verification of another number of steps: it was made from another solution."""
    records: dict[str, list[dict]] = {s["id"]: [] for s in solutions}
    lengths = {s["id"]: len(s["steps"]) for s in solutions}
    for r in sorted(verifications, key=lambda r: r["sample"]):
        name, verdicts = r["solution_id"], r["step_verdicts"]
        if name in records:
            if verdicts is not None and len(verdicts) != lengths[name]:
                about = f"{len(verdicts)} step_verdicts for the {lengths[name]} steps of solution {name}"
                raise InputError(f"{about}; both files must come from the same solutions")
            records[name].append(r)
    return records


def label_solutions(solutions: list[dict], verifications: list[dict], aggregate: Callable, seed: int) -> list[Label]:
    """A label for each solution. The seed of its choice is (seed, its id): other solutions don't matter."""
    groups = group_by_solution(solutions, verifications)
    return [aggregate(records, random.Random(f"{seed}/{name}")) for name, records in groups.items()]


def merged_label(base: Label, merged: str | None, num_steps: int) -> Label:
    """The label that a merged verification (None: it didn't fit the context) gives in place of its base's. If it says
    nothing that parses, the solution is dropped, and the base's labels stand without a text."""
    if base.dropped:
        return base
    if merged is None:
        return replace(base, text=None, dropped="too_long")
    parsed = parse_verification(merged, num_steps)
    if parsed.step_verdicts is None or parsed.verdict is None:
        return replace(base, text=None, dropped="unparsed_merge")
    votes, _ = _count_votes([asdict(parsed)])
    return Label(parsed.step_verdicts, parsed.verdict, merged, votes, None)


# --------------------------------------------------------------------------- sampling


def hash_solution(solution: dict) -> str:
    """The beginning of the SHA-256 of what a verifier is shown of a solution, to know it again."""
    shown = json.dumps([solution[field] for field in ("problem", "steps", "answer")])
    return hashlib.sha256(shown.encode()).hexdigest()[:16]


def find_unverified(args: argparse.Namespace, solutions: list[dict], output: records.RecordFile) -> list[dict]:
    """The solutions, of those with steps, whose verifications aren't all there yet. Raises InputError if a verification that
    is there was made from another solution of that id."""
    N = args.num_verifications
    for s in solutions:
        if {output.done.get(f"{s['id']}/{j}") for j in range(N)} - {None, hash_solution(s)}:
            raise InputError(f"{output.path}: {s['id']} was another solution then; choose another --out or remove it")
    return [s for s in solutions if s["steps"] and any(f"{s['id']}/{j}" not in output.done for j in range(N))]


def verify_solutions(
    args: argparse.Namespace, engine: Engine, solutions: list[dict], answers: dict[str, str], output: records.RecordFile
) -> None:
    """Sample the solutions' verifications. answers: by problem id; empty where none are used."""
    N = args.num_verifications
    room = engine.context - args.max_new_tokens
    prompts, judged = [], []
    for s in solutions:
        reference = answers.get(s["id"].rpartition("/")[0])
        ids = engine.encode(verification_prompt(s, args.worked_examples, reference))
        if len(ids) <= room:  # otherwise no verification, and the label says no_votes
            prompts.append(ids)
            judged.append(s)
    if not prompts:
        if output.done:
            return  # the others are there
        raise InputError(f"no prompt leaves room for --max_new_tokens {args.max_new_tokens} in the model's context")
    stream = engine.stream(
        prompts,
        keys=[s["id"] for s in judged],
        num_samples=N,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        batches=distributed.work_queue(len(prompts), "verify"),
    )
    for i, samples in with_progress(stream, engine.sampler, "verify", -(-len(prompts) // distributed.world_size()), N):
        s, verifications = judged[i], []
        digest = hash_solution(s)
        for j, sample in enumerate(samples):
            text = decode_judgement(engine, prompts[i], sample.ids)
            parsed = asdict(parse_verification(text, len(s["steps"])))
            about = {"id": f"{s['id']}/{j}", "solution_id": s["id"], "sample": j, "text": text}
            about |= {**parsed, "finish": sample.finish, "tokens": len(sample.ids)}
            verifications.append({**about, "solution_sha256": digest})
        output.append(verifications)


def critique_and_merge(
    args: argparse.Namespace, engine: Engine, solutions: list[dict], texts: list[str]
) -> Iterator[tuple[int, list[tuple[str, int] | None]]]:
    """Yield (index, [critique, merge]) for each solution and its verification text: each (text, tokens), greedy, or
    None where a prompt leaves no room for the answer. A critique that ends in thought has no merge."""
    room = engine.context - args.max_new_tokens

    def ask(turns: dict[int, str]) -> dict[int, tuple[str, int]]:
        encoded = {i: engine.encode(turn) for i, turn in turns.items()}
        fitting = {i: ids for i, ids in encoded.items() if len(ids) <= room}
        groups = engine.sample(
            list(fitting.values()),
            keys=[solutions[i]["id"] for i in fitting],
            temperature=0.0,
            max_new_tokens=args.max_new_tokens,
        )
        answers = {i: sample.ids for i, (sample,) in zip(fitting, groups, strict=True)}
        return {i: (decode_judgement(engine, fitting[i], ids), len(ids)) for i, ids in answers.items()}

    chunk = 4 * (args.slots or CPU_SLOTS)  # work lost if the run is killed
    for start in range(0, len(solutions), chunk):
        here = range(start, min(start + chunk, len(solutions)))
        critiques = ask({i: critique_prompt(solutions[i], texts[i]) for i in here})
        whole = {i: text for i, (text, _) in critiques.items() if "</think>" in text or "<think>" not in text}
        merges = ask({i: critique_prompt(solutions[i], texts[i], text) for i, text in whole.items()})
        for i in here:
            yield i, [critiques.get(i), merges.get(i)]


def improve_labels(
    args: argparse.Namespace,
    method: str,
    solutions: list[dict],
    bases: list[Label],
    engine: Engine | None,
    device: torch.device,
) -> tuple[list[Label], int]:
    """(labels, tokens spent) of meta-critique or a hybrid: each kept base's text is criticised and merged with its
    critique, --critique_rounds times, every round from the merge before; two calls a round and label. A merge that
    doesn't parse ends the rounds. engine: opened if it is None and needed. Under torchrun the result is rank 0's."""
    path, name = Path(args.out) / "critiques.jsonl", ("id", "method", "round")
    pairs = list(zip(solutions, bases, strict=True))
    with records.RecordFile(path, args, MAY_CHANGE_ON_RESUME, name, keep="merged") as output:
        for number in range(1, args.critique_rounds + 1):
            todo, texts = [], []
            for s, base in pairs[distributed.rank() :: distributed.world_size()]:
                earlier = (s["id"], method, number - 1)
                if number > 1:
                    base = merged_label(base, output.done[earlier], len(s["steps"])) if earlier in output.done else None
                if base and base.text and (s["id"], method, number) not in output.done:
                    todo.append(s)
                    texts.append(base.text)
            if not todo:
                continue
            if engine is None:
                engine = open_engine(args.model, device, args.slots)
            stream = critique_and_merge(args, engine, todo, texts)
            for i, pair in with_progress(stream, engine.sampler, f"critique {number}", len(todo), 2):
                (critique, of_critique), (merged, of_merge) = (x or (None, 0) for x in pair)
                about = {"id": todo[i]["id"], "method": method, "round": number}
                output.append([{**about, "critique": critique, "merged": merged, "tokens": of_critique + of_merge}])
    if distributed.rank() != 0 or not path.exists():
        return bases, 0
    ids = {s["id"] for s in solutions}
    critiques = [r for r in records.read(path, [*name, "merged", "tokens"], unique=name) if r["id"] in ids]
    critiques = [r for r in critiques if r["method"] == method and r["round"] <= args.critique_rounds]
    critiques.sort(key=lambda r: r["round"])
    last = {r["id"]: r["merged"] for r in critiques}
    labels = [merged_label(base, last.get(s["id"]), len(s["steps"])) for s, base in pairs]
    return labels, sum(r["tokens"] for r in critiques)


# --------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("data and model")
    group.add_argument("--model", help="verifier: a Hugging Face directory or hub name; none: the tiny world")
    group.add_argument("--solutions", help="solutions.jsonl of generate.py, or anybody's with the same fields")
    group.add_argument("--out", help="directory for verifications, critiques, labels and report")
    group.add_argument("--answers", help="JSON Lines with id and answer, for --method reference_guided only")
    group.add_argument("--limit", type=int, help="use the first so many solutions only")
    group = parser.add_argument_group("labels")
    group.add_argument("--method", default="step_consistency", choices=METHODS)
    group.add_argument("--critique_rounds", type=int, default=1, help="of critique and merge")
    group = parser.add_argument_group("sampling")
    group.add_argument("--num_verifications", type=int, default=16, help="N, verifications per solution")
    group.add_argument("--temperature", type=float, default=0.8)
    group.add_argument("--top_p", type=float, default=0.95)
    group.add_argument("--max_new_tokens", type=int, default=8192, help="per verification, thinking included")
    group.add_argument("--worked_examples", type=int, default=2, choices=[0, 1, 2], help="examples in the prompt")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--slots", type=int, help="answers sampled at once; default: by the GPU's memory, on a CPU 128")
    group.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    args = records.parse_args(parser, TINY, "model", "solutions", "out")
    method = METHODS[args.method]
    if method.reads_answers and args.answers is None:
        raise InputError(f"--method {args.method} needs --answers")
    if args.answers is not None and not method.reads_answers:
        raise InputError("--answers is used with --method reference_guided only")
    records.check_numbers(args, "num_verifications", "critique_rounds", "max_new_tokens", "limit", "slots")
    device = distributed.init_distributed(args.device)
    solutions = records.read(args.solutions, ["id", "problem", "steps", "answer"], "python generate.py")[: args.limit]
    answers = {}
    if method.reads_answers:
        answers = records.read_answers([args.answers])
        missing = [s["id"] for s in solutions if s["id"].rpartition("/")[0] not in answers]
        if missing:
            raise InputError(f"{args.answers}: no answer for the problem of solution {missing[0]}; add it")
    started = time.time()
    engine = None  # other labels from verifications that are all there need no model
    # A verifier that has seen the answer fills a file of its own: no other method may take its verifications.
    path = Path(args.out) / ("verifications_reference.jsonl" if method.reads_answers else "verifications.jsonl")
    with records.RecordFile(path, args, MAY_CHANGE_ON_RESUME, keep="solution_sha256") as output:
        todo = find_unverified(args, solutions, output)
        if todo:
            engine = open_engine(args.model, device, args.slots)
            verify_solutions(args, engine, todo, answers, output)
    speed = {}
    if engine:  # this run has sampled verifications; critiques are slower and don't count
        speed = {"tokens_per_second": engine.sampler.tokens * distributed.world_size() / (time.time() - started)}
    if distributed.rank() != 0 and not method.needs_critique:  # in critiques every rank takes part
        return
    verifications = records.read(path, ["id", "solution_id", "sample", "text", "step_verdicts", "verdict", "tokens"])
    ids = {s["id"] for s in solutions}  # --limit may be less than before
    verifications = [r for r in verifications if r["solution_id"] in ids]
    labels = label_solutions(solutions, verifications, method.aggregate, args.seed)
    critique_tokens = 0
    if method.needs_critique:
        labels, critique_tokens = improve_labels(args, args.method, solutions, labels, engine, device)
    if distributed.rank() != 0:
        return
    about = [{key: s[key] for key in ("id", "problem", "steps", "answer")} | {"method": args.method} for s in solutions]
    labelled = [{**s, **asdict(label)} for s, label in zip(about, labels, strict=True)]
    records.write_records(Path(args.out) / f"labels_{args.method}.jsonl", labelled, args)
    kept = [label for label in labels if label.dropped is None]
    report = {
        "method": args.method,
        "solutions": len(labels),
        "kept": len(kept),
        "yield": len(kept) / len(labels),
        "dropped": dict(Counter(label.dropped for label in labels if label.dropped)),
        "ties": sum(label.ties for label in labels),
        "outcome_yes": sum(label.outcome for label in kept) / max(len(kept), 1),
        "verifications": len(verifications),
        "unparsed": len(verifications) - len(keep_parsed(verifications)),
        "tokens": sum(r["tokens"] for r in verifications),
        "critique_tokens": critique_tokens,
        **speed,
        "seconds": round(time.time() - started, 1),
    }
    records.write_json(Path(args.out) / "report.json", report)
    distributed.log(" | ".join(f"{key} {v:.3f}" if isinstance(v, float) else f"{key} {v}" for key, v in report.items()))


if __name__ == "__main__":
    distributed.run_stage(main)
