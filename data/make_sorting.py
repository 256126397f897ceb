"""Another domain for the same five stages, one without an answer that anybody could check: sorting by exchanges.

    python -m data.make_sorting              # problems, heldout, policy, verifier, blind: into runs/sorting
    python -m data.make_sorting problems     # one part of them
    python -m data.make_sorting check --solutions runs/solutions.jsonl --out runs/gold.jsonl

A problem is a row of digits. Each step of a solution exchanges the first two neighbours that stand in the wrong order,
written `4132>1432`, until all are in order; then it says "done". Right and wrong solutions all say "done", so neither a
reference answer nor a vote over answers can tell one from another. What is right is defined by the steps alone: each
does what the rule says with the row that the one before has left, and the last leaves the digits in order.

The rule is `sort` below. The checkpoints learn it from examples; stages I to III never call it. `check` writes what it
says of solutions, as gold for `evaluate.py labels`, and prints how many are right.

Policy and verifier go on from the tiny verifier, with its tokenizer: prompts and formats are the same. The policy is
then made unsure as in data/make_tiny.py; the verifier is unsure enough. `blind` is a verifier that has never seen a
step too many: what will a policy make of that?
"""

import argparse
import random
import time
from functools import partial
from itertools import permutations
from pathlib import Path

from data import records
from data.make_tiny import SEED, TINY, Problem, draw_from, make_case, make_judgement, make_unsure, train
from generate import SOLVE_PROMPT, open_model, render_response
from kernels import distributed
from kernels.distributed import InputError
from kernels.transformer import save_model

import torch

OUT = Path("runs/sorting")
TEXT = "Sort {row} by exchanging the first neighbours in the wrong order."
TRAIN, HELDOUT = 500, 300  # problems; the rest, 9,910, are for making the checkpoints
MISTAKES = {"wrong": 4, "far": 2, "two": 2, "still": 2, "slip": 5, "skip": 2, "early": 3, "surplus": 3}
TASKS = {"verify": 0.6, "prm_cot": 0.3, "solve": 0.1}  # of the verifier; the other methods and kinds aren't used here
STEPS, RATE = {"policy": 220, "verifier": 420, "blind": 420}, 0.5  # of training; the rate is relative to make_tiny's
HOT, HOT_SAMPLES, HOT_STEPS = 1.7, 7_000, 110  # of the policy: temperature, samples and steps that make it unsure
# What it imitates looks like this, right or wrong:
SOLUTION = r"<think>(<step>\d+>\d+</step> ?)+</think><answer>\\boxed{done}</answer>"

# --------------------------------------------------------------------------- the rule


def exchange(row: str, i: int) -> str:
    """The row with digits i and i + 1 exchanged."""
    return row[:i] + row[i + 1] + row[i] + row[i + 2 :]


def falls(row: str) -> list[int]:
    """Where a digit stands before a smaller one."""
    return [i for i in range(len(row) - 1) if row[i] > row[i + 1]]


def sort(row: str) -> list[str]:
    """The right solution."""
    steps = []
    while where := falls(row):
        after = exchange(row, where[0])
        steps.append(f"{row}>{after}")
        row = after
    return steps


def judge(row: str, steps: list[str]) -> tuple[list[bool], bool]:
    """Which steps are correct, and whether the solution is. Mistakes propagate."""
    right = sort(row)
    return records.gold_labels(steps, right), steps == right


# --------------------------------------------------------------------------- problems and solutions


def make_sets() -> tuple[list[str], list[str], list[str]]:
    """(pool, train, held-out) rows of four or five different digits that take two to five exchanges."""
    rows = ["".join(row) for n in (4, 5) for row in permutations("123456789", n)]
    rows = [row for row in rows if 2 <= len(sort(row)) <= 5]
    random.Random(SEED).shuffle(rows)
    return rows[HELDOUT + TRAIN :], rows[HELDOUT : HELDOUT + TRAIN], rows[:HELDOUT]


def corrupt(row: str, rng: random.Random, mistakes: dict[str, int] = MISTAKES) -> list[str]:
    """A solution with a mistake of one of these kinds somewhere; it goes on from the mistake."""
    right = sort(row)
    kind = rng.choices(list(mistakes), list(mistakes.values()))[0]
    where = rng.randrange(len(right) - (kind in ("skip", "two")))  # these need a step behind
    if kind == "early":
        return right[: max(1, where)]
    if kind == "skip":
        return right[:where] + right[where + 1 :]
    if kind == "surplus":
        end = right[-1].partition(">")[2]
        return [*right, f"{end}>{rng.choice([end, exchange(end, rng.randrange(len(row) - 1))])}"]
    before, after = right[where].split(">")
    if kind == "wrong":
        after = exchange(before, rng.choice([i for i in range(len(row) - 1) if i != falls(before)[0]]))
    elif kind == "far":
        i = rng.randrange(len(row) - 2)
        after = before[:i] + before[i + 2] + before[i + 1] + before[i] + before[i + 3 :]
    elif kind == "two":
        after = right[where + 1].partition(">")[2]
    elif kind == "still":
        after = before
    step = f"{before}>{after}"
    if kind == "slip":
        i = rng.choice([i for i in range(len(step)) if step[i] != ">"])
        step = step[:i] + rng.choice([digit for digit in "123456789" if digit != step[i]]) + step[i + 1 :]
    return [*right[:where], step, *sort(step.partition(">")[2])]


def make_example(task: str, row: str, rng: random.Random, mistakes: dict[str, int] = MISTAKES) -> tuple[str, str]:
    """(user turn, target) of one training sequence."""
    problem = Problem(TEXT.format(row=row), tuple(sort(row)), "done")
    if task == "solve":
        return SOLVE_PROMPT.format(problem=problem.text), render_response(problem.steps, problem.answer)
    steps = list(problem.steps) if rng.random() < 0.4 else corrupt(row, rng, mistakes)
    shown = problem.answer if rng.random() < 0.9 else None  # ProcessBench shows no separate answer
    return make_judgement(task, problem, steps, shown, *judge(row, steps), rng)


# --------------------------------------------------------------------------- the parts


def write_problems() -> None:
    """problems.jsonl and heldout.jsonl."""
    _, *sets = make_sets()
    for file, rows in zip(("problems", "heldout"), sets, strict=True):
        results = [{"id": f"{file[0]}{i:04d}", "problem": TEXT.format(row=row)} for i, row in enumerate(rows)]
        records.write_lines(OUT / f"{file}.jsonl", results)


def make_model(name: str) -> None:
    """The policy, the verifier, or one that has never seen a surplus step."""
    model, tokenizer, _ = open_model(str(TINY / "verifier"), torch.device("cpu"), torch.float32)
    pool, _, _ = make_sets()
    tasks = {"solve": 1.0} if name == "policy" else TASKS
    mistakes = {kind: share for kind, share in MISTAKES.items() if not (name == "blind" and kind == "surplus")}
    draw = draw_from(partial(make_example, mistakes=mistakes), tasks, pool)
    train(model, draw, STEPS[name], tokenizer, SEED, RATE)
    if name == "policy":
        make_unsure(model, draw, HOT, tokenizer, num_samples=HOT_SAMPLES, steps=HOT_STEPS, solution=SOLUTION)
    save_model(model, OUT / name, TINY)


def check(solutions: str, out: str, cases: str | None) -> None:
    """Write {id, step_labels, outcome} for each solution, and if asked for the same as cases in ProcessBench's form;
    print how many are right."""
    rows, benchmark = [], []
    for s in records.read(solutions, ["id", "problem", "steps", "answer"]):
        labels, sorts = judge(s["problem"].split()[1], s["steps"])
        outcome = sorts and s["answer"] == "done"
        rows.append({"id": s["id"], "step_labels": labels, "outcome": outcome})
        about = {"id": s["id"], "generator": s["model"], "problem": s["problem"]}
        benchmark.append(make_case(about, s["steps"], labels, outcome))
    inputs = argparse.Namespace(solutions=solutions)
    records.write_records(Path(out), rows, inputs)
    if cases:
        records.write_records(Path(cases), [case for case in benchmark if case], inputs)
    right = sum(r["outcome"] for r in rows)
    print(f"{solutions}: {right} of {len(rows)} solutions are right, {100 * right / len(rows):.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=["all", "problems", *STEPS, "check"])
    parser.add_argument("--solutions", help="of check: solutions of these problems")
    parser.add_argument("--out", help="of check: where the gold goes")
    parser.add_argument("--cases", help="of check: where it goes in ProcessBench's form")
    args = parser.parse_args()
    if args.part == "check":
        if not (args.solutions and args.out):
            raise InputError("check needs --solutions and --out; give both")
        check(args.solutions, args.out, args.cases)
        return
    started = time.time()
    if args.part in ("all", "problems"):
        write_problems()
    for name in STEPS:
        if args.part in ("all", name):
            make_model(name)
    print(f"made {args.part} in {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    distributed.run_stage(main)
