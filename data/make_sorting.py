"""Another domain for the same five stages, one without an answer that anybody could check: sorting by exchanges.

    python -m data.make_sorting              # problems, heldout, policy, verifier: into runs/sorting
    python -m data.make_sorting problems     # one part of them
    python -m data.make_sorting check --solutions runs/solutions.jsonl --out runs/gold.jsonl

A problem is a row of digits. Each step of a solution exchanges two neighbours that stand in the wrong order, written
`4132>1432`, until all are in order; then it says "done". Right and wrong solutions all say "done", so neither a reference
answer nor a vote over answers can tell one from another. What is right is defined by the steps alone: each is a legal
exchange of what the one before has left, and the last leaves the digits in order. Most problems have several right
solutions, none of them canonical.

The rule is `judge` below. The checkpoints learn it from examples; stages I to III never call it. `check` writes what it
says of solutions, as gold for `evaluate.py labels`, and prints how many are right.

Policy and verifier go on from the tiny verifier, with its tokenizer: prompts and formats are the same. Then they are made
unsure as in data/make_tiny.py.
"""

import argparse
import random
import time
from itertools import permutations
from pathlib import Path

import torch

from data.make_tiny import SEED, TINY, VERIFIER_TASKS, Problem, make_judgement, make_unsure, slip, train, write_lines
from generate import SOLVE_PROMPT, InputError, open_model, read_records, render_response, run_stage
from kernels.transformer import save_model

OUT = Path("runs/sorting")
TEXT = "Sort {row} by exchanging neighbours."
TRAIN, HELDOUT = 500, 300  # problems; the rest, 9,910, are for making the checkpoints
MISTAKES = {"far": 3, "ordered": 2, "two": 3, "slip": 3, "skip": 2, "early": 3}
TASKS = {task: share for task, share in VERIFIER_TASKS.items() if task != "reference"}
STEPS, RATE = {"policy": 220, "verifier": 300}, 0.5  # of training; the rate is relative to that of make_tiny
HOT = {"policy": 1.25, "verifier": 1.65}  # temperature of the samples that make a model unsure
HOT_SAMPLES, HOT_STEPS = 7_000, 110

# --------------------------------------------------------------------------- the rule


def exchange(row: str, i: int) -> str:
    """The row with digits i and i + 1 exchanged."""
    return row[:i] + row[i + 1] + row[i] + row[i + 2 :]


def falls(row: str) -> list[int]:
    """Where a digit stands before a smaller one."""
    return [i for i in range(len(row) - 1) if row[i] > row[i + 1]]


def judge(row: str, steps: list[str]) -> tuple[list[str], list[bool], bool]:
    """What should be at each step, which steps are correct, and whether the solution is.

    A step should be the exchange that it seems to mean: of the first digit that it changes with the next one, carried out
    on what the step before left. "none" if that isn't legal, and after a mistake: mistakes propagate.
    """
    expected, labels, before = [], [], row
    for step in steps:
        after = step.partition(">")[2]
        first = next((i for i in range(len(before)) if before[i] != after[i : i + 1]), None)
        legal = all(labels) and first in falls(before)
        expected.append(f"{before}>{exchange(before, first)}" if legal else "none")
        labels.append(step == expected[-1])
        before = after
    return expected, labels, bool(steps) and all(labels) and not falls(before)


# --------------------------------------------------------------------------- problems and solutions


def make_sets() -> tuple[list[str], list[str], list[str]]:
    """(pool, train, held-out) rows of four or five different digits that take two to five exchanges."""
    rows = ["".join(row) for n in (4, 5) for row in permutations("123456789", n)]
    rows = [row for row in rows if 2 <= sum(a > b for i, b in enumerate(row) for a in row[:i]) <= 5]
    random.Random(SEED).shuffle(rows)
    return rows[HELDOUT + TRAIN :], rows[HELDOUT : HELDOUT + TRAIN], rows[:HELDOUT]


def sort(row: str, rng: random.Random) -> list[str]:
    """A right solution."""
    steps = []
    while where := falls(row):
        after = exchange(row, rng.choice(where))
        steps.append(f"{row}>{after}")
        row = after
    return steps


def corrupt(row: str, rng: random.Random) -> list[str]:
    """A solution with a mistake somewhere, mostly; it goes on from the mistake."""
    right = sort(row, rng)
    kind = rng.choices(list(MISTAKES), list(MISTAKES.values()))[0]
    where = rng.randrange(len(right))
    before = right[where].partition(">")[0]
    n = len(before)
    if kind == "early":
        return right[: max(1, where)]
    if kind == "skip" and where + 1 < len(right):
        return right[:where] + right[where + 1 :]
    after = before
    if kind == "far":
        i = rng.randrange(n - 2)
        after = before[:i] + before[i + 2] + before[i + 1] + before[i] + before[i + 3 :]
    elif kind == "ordered":
        after = exchange(before, rng.choice([i for i in range(n - 1) if i not in falls(before)] or [0]))
    elif kind == "two":
        after = right[min(where + 1, len(right) - 1)].partition(">")[2]
    else:
        i = rng.randrange(n)
        after = before[:i] + str(slip(int(before[i]), rng) % 10) + before[i + 1 :]
    return [*right[:where], f"{before}>{after}", *sort(after, rng)]


def make_example(task: str, row: str, rng: random.Random) -> tuple[str, str]:
    """(user turn, target) of one training sequence."""
    problem = Problem(TEXT.format(row=row), (), "done")
    if task == "solve":
        return SOLVE_PROMPT.format(problem=problem.text), render_response(sort(row, rng), problem.answer)
    steps = sort(row, rng) if rng.random() < 0.4 else corrupt(row, rng)
    return make_judgement(task, problem, steps, problem.answer, *judge(row, steps), rng)


# --------------------------------------------------------------------------- the parts


def write_problems() -> None:
    """problems.jsonl and heldout.jsonl."""
    _, *sets = make_sets()
    for file, rows in zip(("problems", "heldout"), sets, strict=True):
        records = [{"id": f"{file[0]}{i:04d}", "problem": TEXT.format(row=row)} for i, row in enumerate(rows)]
        write_lines(OUT / f"{file}.jsonl", records)


def make_model(name: str) -> None:
    """The policy or the verifier."""
    model, tokenizer, _ = open_model(str(TINY / "verifier"), torch.device("cpu"), torch.float32)
    pool, _, _ = make_sets()
    tasks = {"solve": 1.0} if name == "policy" else TASKS
    names, shares = list(tasks), list(tasks.values())

    def draw(rng: random.Random) -> tuple[str, str]:
        return make_example(rng.choices(names, shares)[0], rng.choice(pool), rng)

    train(model, draw, STEPS[name], tokenizer, SEED, RATE)
    make_unsure(model, draw, HOT[name], tokenizer, num_samples=HOT_SAMPLES, steps=HOT_STEPS)
    save_model(model, OUT / name, TINY)


def check(solutions: str, out: str, cases: str | None) -> None:
    """Write {id, step_labels, outcome} for each solution, and if asked for the same as cases in ProcessBench's form; print
    how many are right."""
    records, benchmark = [], []
    for s in read_records(solutions, ["id", "problem", "steps", "answer"]):
        _, labels, sorts = judge(s["problem"].split()[1], s["steps"])
        outcome, wrong = sorts and s["answer"] == "done", labels.index(False) if False in labels else -1
        records.append({"id": s["id"], "step_labels": labels, "outcome": outcome})
        case = {"id": s["id"], "generator": s["model"], "problem": s["problem"], "steps": s["steps"]}
        if s["steps"] and (outcome or wrong >= 0):  # a flawless beginning without the end has no first wrong step
            benchmark.append(case | {"final_answer_correct": outcome, "label": wrong})
    write_lines(Path(out), records)
    if cases:
        write_lines(Path(cases), benchmark)
    right = sum(r["outcome"] for r in records)
    print(f"{solutions}: {right} of {len(records)} solutions are right, {100 * right / len(records):.1f} %")


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
    run_stage(main)
