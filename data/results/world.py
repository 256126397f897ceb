"""What the tiny world's models can do: the preconditions by which the world was chosen, measured.

    python -m data.results.world --tried "base: 1,600 steps" --minutes 62 --out data/results/world.jsonl

A row has the share of the policy's solutions that are right (sampled and greedy), well-formed and garbled; of single
verifications, and of votes, that get all labels of a solution right; and how each kind of reward model judges the tiny
ProcessBench, as the base answers it and after Stage II on the voted labels of 300 problems with 8 solutions each. The
reward models are trained with `train_prm.py`'s values for the tiny world, once for each seed of the stages.

PRM and PRM-CoT share their question, so the base could answer it in either form: its answer is begun for it.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import generate
import train_prm
import verify
from data import records
from data.make_tiny import OPERATION
from data.records import gold_labels
from evaluate import processbench_numbers
from generate import SOLVE_PROMPT, Engine, format_valid, open_engine
from kernels import distributed
from kernels.text import extract_answer
from train_prm import REWARD_MODELS, Judge, Judgement, judge_prompt, score_solutions

import torch

TINY = Path("data/tiny")
PROBLEMS = 300  # 8 solutions and 16 verifications of each, as the stages have it
MAX_NEW_TOKENS = 200
STARTS = {"prm": "Step ", "prm_cot": "## Step "}  # how an answer of each form begins


def run(main: Callable[[], None], *flags) -> None:
    """Run a stage in this process: importing torch anew takes longer than some of them."""
    sys.argv = [main.__module__, *map(str, flags)]
    main()


def measure_policy(gold: dict[str, dict], device: torch.device) -> dict[str, float]:
    """Shares of held-out problems, and of the first errors of the tiny ProcessBench."""
    problems = records.read(TINY / "heldout.jsonl", ["id", "problem"])
    engine = open_engine(str(TINY / "policy"), device, 256)
    prompts = [engine.encode(SOLVE_PROMPT.format(problem=problem["problem"])) for problem in problems]
    row = {}
    for name, temperature, num_samples in (("sampled", 1.0, 4), ("greedy", 0.0, 1)):
        groups = engine.sample(prompts, keys=[p["id"] for p in problems], num_samples=num_samples,
                               temperature=temperature, max_new_tokens=160, seed=100)  # fmt: skip
        right, valid = [], []
        for problem, group in zip(problems, groups, strict=True):
            for sample in group:
                text = engine.text(sample.ids)
                right.append(extract_answer(text) == gold[problem["id"]]["answer"])
                valid.append(format_valid(text, "strict", sample.finish == "stop"))
        row[f"policy/{name}"] = mean(right)
        row[f"policy/{name}_valid"] = mean(valid)
    cases = records.read(TINY / "processbench.jsonl", ["steps", "label"])
    errors = [case["steps"][case["label"]] for case in cases if case["label"] >= 0]
    row["policy/garbled"] = mean(re.fullmatch(OPERATION, step) is None for step in errors)
    return row


def measure_labels(out: Path, gold: dict[str, dict]) -> dict[str, float]:
    """Shares of single verifications and of kept labels that are right about every step of a solution."""
    solutions = {s["id"]: s for s in records.read(out / "solutions.jsonl", ["id", "problem_id", "steps"])}
    truth = {id: gold_labels(s["steps"], gold[s["problem_id"]]["steps"]) for id, s in solutions.items()}
    singles, voted = [], []
    for verification in records.read(out / "verify/verifications.jsonl", ["solution_id", "step_verdicts"]):
        singles.append(verification["step_verdicts"] == truth[verification["solution_id"]])
    labels = records.read(out / "verify/labels_step_consistency.jsonl", ["id", "step_labels", "dropped"])
    for label in labels:
        if label["dropped"] is None:
            voted.append(label["step_labels"] == truth[label["id"]])
    return {"verify/single": mean(singles), "verify/voted": mean(voted or [0]), "verify/kept": len(voted) / len(labels)}


def judge_begun(engine: Engine, kind: str, cases: list[dict]) -> list[Judgement]:
    """Greedy judgements whose first tokens are given."""
    model, start = REWARD_MODELS[kind], STARTS[kind]
    begun = engine.tokenizer(start, add_special_tokens=False).input_ids
    prompts = [engine.encode(judge_prompt(model.prompt, case)) + begun for case in cases]
    groups = engine.sample(prompts, keys=[case["id"] for case in cases], num_samples=1, temperature=0.0,
                           max_new_tokens=MAX_NEW_TOKENS)  # fmt: skip
    judgements = []
    for case, (sample,) in zip(cases, groups, strict=True):
        text = start + engine.text(sample.ids)
        parsed = model.parse(text, len(case["steps"]))
        judgements.append(Judgement(parsed.step_verdicts, parsed.verdict, text, len(sample.ids)))
    return judgements


def measure_judge(model: str, kind: str, device: torch.device, *, begin: bool) -> dict[str, float]:
    """A reward model on the tiny ProcessBench: F1 or outcome accuracy, its parts, and the unparsed share."""
    cases = records.read(TINY / "processbench.jsonl", ["id", "problem", "steps", "label"])
    cases = [case | {"answer": None} for case in cases]
    engine = open_engine(model, device, 256)
    if begin and kind in STARTS:
        judgements = judge_begun(engine, kind, cases)
    else:
        judgements = score_solutions(Judge(engine, kind, MAX_NEW_TOKENS), cases)
    found = processbench_numbers(kind, cases, judgements, seed=0)
    return {name: metric.value for name, metric in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tried", required=True, help="what was changed")
    parser.add_argument("--minutes", type=float, required=True, help="that training the checkpoints took")
    parser.add_argument("--machine", default="2 CPU cores", help="on which that was")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--lr", type=float, help="of Stage II; default: train_prm.py's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--out", default="data/results/world.jsonl")
    args = parser.parse_args()
    device = distributed.find_device(args.device)
    gold = {row["id"]: row for row in records.read(TINY / "gold.jsonl", ["id", "answer", "steps"])}
    started = time.time()
    row = {"tried": args.tried, "minutes": args.minutes, "machine": args.machine, **measure_policy(gold, device)}
    for kind in REWARD_MODELS:
        for name, value in measure_judge(str(TINY / "base"), kind, device, begin=True).items():
            row[f"base/{kind}/{name}"] = value
    for seed in args.seeds:
        out = Path("runs/world") / str(seed)
        common = ["--seed", seed, "--device", device.type]
        slots = ["--slots", args.slots]
        run(generate.main, "--out", out / "solutions.jsonl", "--limit", PROBLEMS, *slots, *common)
        run(verify.main, "--solutions", out / "solutions.jsonl", "--out", out / "verify", *slots, *common)
        for name, value in measure_labels(out, gold).items():
            row[f"{seed}/{name}"] = value
        for kind in REWARD_MODELS:
            # The base by name, because it isn't what train_prm.py starts from by default.
            settings = train_prm.TINY | {"model": TINY / "base", "kind": kind, "out": out / kind}
            settings |= {"labels": out / "verify/labels_step_consistency.jsonl"}
            settings |= {"seed": seed, "device": device.type}
            if args.lr:
                settings["lr"] = args.lr
            run(train_prm.main, *(part for name, value in settings.items() for part in (f"--{name}", value)))
            for name, value in measure_judge(str(out / kind), kind, device, begin=False).items():
                row[f"{seed}/{kind}/{name}"] = value
    row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
    row["measured_seconds"] = round(time.time() - started)
    with open(args.out, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    distributed.run_stage(main)
