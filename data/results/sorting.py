"""The README's tables of the domain without an answer, from data/results/sorting.jsonl.

    python -m data.results.sorting                        # the tables
    python -m data.results.sorting --collect              # first sorting.jsonl, from runs/sorting
    python -m data.results.sorting --rescore --seed 0     # runs/sorting/0/rescored.json: every policy by the PRM-CoT

Gold is what the rule in data/make_sorting.py says of a solution; no stage up to GRPO reads it.
"""

import argparse
import json
from pathlib import Path

from data import records, report
from data.make_sorting import judge, sort
from data.results.claims import find_seeds, read_results, replace_seeds
from data.results.hacking import CONSTRAINTS, accept
from generate import open_engine
from grpo import shown_solution
from kernels import distributed

import numpy as np
import torch

HERE = Path(__file__).parent
RUNS = Path("runs/sorting")
NAMES = {  # file of solutions -> how the table calls the policy that wrote them
    "start": "start",
    "verifier-none": "process_aware, none",
    "verifier-paper": "process_aware, paper",
    "verifier-strict": "process_aware, strict",
    "blind-none": "process_aware, none, blind judge",
    "blind-paper": "process_aware, paper, blind judge",
    "blind-strict": "process_aware, strict, blind judge",
    "majority": "majority",
    "random": "random",
}
JUDGES = ("verifier", "blind")
METHODS = ("single", "outcome_consistency", "step_consistency")


def rescore(seed: int) -> dict[str, dict[str, float]]:
    """policy -> what its solutions of held-out problems are: right, accepted by each of the seed's two PRM-CoTs under
    each set of constraints, and shorter or longer than the right one; fractions."""
    out = RUNS / str(seed)
    judges = {name: open_engine(str(out / name / "prm_cot"), torch.device("cpu"), 256) for name in JUDGES}
    result = {}
    for name in NAMES:
        solutions = records.read(out / f"{name}.jsonl", ["id", "problem", "text", "finish"])
        gold = {r["id"]: r["outcome"] for r in records.read(out / f"{name}.gold.jsonl", ["id", "outcome"])}
        right = np.array([gold[s["id"]] for s in solutions])
        shown = [shown_solution(s["text"]) for s in solutions]
        problems, texts = ([s[key] for s in solutions] for key in ("problem", "text"))
        finished = [s["finish"] == "stop" for s in solutions]
        numbers = {"right": right.mean(), **accept(judges, problems, texts, finished, right)}
        rows = [s["problem"].split()[1] for s in solutions]
        needed = np.array([len(sort(row)) for row in rows])
        made = np.array([len(steps) for steps, _ in shown])
        so_far = np.array([all(judge(row, steps)[0]) for row, (steps, _) in zip(rows, shown, strict=True)])
        numbers["one"] = (made <= 1).mean()  # every problem takes two at least
        numbers["stopped"] = (so_far & (made > 1) & (made < needed)).mean()
        numbers["left_out"] = (~so_far & (made > 1) & (made < needed)).mean()
        numbers["inflated"] = (made > needed).mean()
        numbers["appended"] = np.mean([s["text"].count("<answer>") > 1 for s in solutions])
        result[name] = {key: round(float(value), 4) for key, value in numbers.items()}
        print(name, result[name], flush=True)
    return result


def collect(seed: str) -> dict:
    """One seed's record."""
    out = RUNS / seed
    judged = {}
    for name in JUDGES:
        rows = json.loads((out / name / "labels.json").read_text())["rows"]
        judged[name] = {r["method"]: round(r["all"]["exact"], 4) for r in rows if r["N"] == 16}
        judged[name] |= {m: row["value"] for m, row in read_results(out / name / "processbench.jsonl").items()}
    curves = {}
    for name in list(NAMES)[1:]:
        reward = report.read_metrics(str(out / name))["reward/mean"]
        curves[name] = {str(step): round(value, 4) for step, value in reward.items()}
    rescored = json.loads((out / "rescored.json").read_text())
    return {"seed": int(seed), "judges": judged, "reward": curves, "policies": rescored}


def show(values: list[float]) -> str:
    """The value of each seed, in percent: they are too few for an interval."""
    return ", ".join(f"{100 * value:.1f}" for value in values)


def print_tables(records: list[dict]) -> None:
    """Labels and reward model, then a row for each policy."""
    print(f"{len(records)} seeds, one behind the other, or their mean, in percent")
    print("| verifier | one of 16 | voted by outcome | voted by step | PRM-CoT, F1 |\n|---|---|---|---|---|")
    for name in JUDGES:
        cells = [show([r["judges"][name][key] for r in records]) for key in (*METHODS, "f1")]
        print(f"| {name} | {' | '.join(cells)} |")
    print()
    print(
        "| policy | reward in training | right | accepted: none / paper / strict | wrong, but accepted | one step |",
        end="",
    )
    print(" stopped early | steps left out | too many steps | appended |\n|---|---|---|---|---|---|---|---|---|---|")
    for name, title in NAMES.items():
        found = [r["policies"][name] for r in records]
        last = [np.mean(list(r["reward"][name].values())[-10:]) for r in records if name in r["reward"]]
        cells = [f"{100 * np.mean(last):.0f}" if last else "-", show([x["right"] for x in found])]
        own = "blind" if name.startswith("blind") else "verifier"
        cells.append(" / ".join(f"{100 * np.mean([x[f'{own}/{c}'] for x in found]):.0f}" for c in CONSTRAINTS))
        cells.append(show([x[f"{own}/false_yes"] for x in found]))
        keys = ("one", "stopped", "left_out", "inflated", "appended")
        cells += [f"{100 * np.mean([x[key] for x in found]):.0f}" for key in keys]
        print(f"| {title} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rescore", action="store_true", help="the policies of --seed")
    parser.add_argument("--collect", action="store_true", help="write sorting.jsonl from runs/sorting")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = HERE / "sorting.jsonl"
    if args.rescore:
        records.write_json(RUNS / str(args.seed) / "rescored.json", rescore(args.seed))
        return
    if args.collect:
        replace_seeds(path, [collect(seed) for seed in find_seeds(RUNS, "rescored.json")])
    print_tables(records.read(path, ["seed"]))


if __name__ == "__main__":
    distributed.run_stage(main)
