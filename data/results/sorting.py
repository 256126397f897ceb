"""The README's tables of the domain without an answer, from data/results/sorting.jsonl.

    python -m data.results.sorting                        # the tables
    python -m data.results.sorting --collect              # first sorting.jsonl, from runs/sorting
    python -m data.results.sorting --rescore --seed 0     # runs/sorting/0/rescored.json: every policy by the PRM-CoT

Gold is what the rule in data/make_sorting.py says of a solution; no stage up to GRPO reads it.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from data.make_sorting import judge, sort
from evaluate import over_seeds, read_metrics
from generate import open_sampler, read_records, write_json, write_text
from grpo import format_valid, shown_solution
from verify import score_solutions

HERE = Path(__file__).parent
RUNS = Path("runs/sorting")
CONSTRAINTS = ("none", "paper", "strict")
NAMES = {  # file of solutions -> how the table calls the policy that wrote them
    "start": "start",
    "process_aware-none": "process_aware, none",
    "process_aware-paper": "process_aware, paper",
    "process_aware-strict": "process_aware, strict",
    "majority": "majority",
    "random": "random",
}
METHODS = ("single", "outcome_consistency", "step_consistency")


def rescore(seed: int) -> dict[str, dict[str, float]]:
    """policy -> what its solutions of held-out problems are: right, accepted by the seed's PRM-CoT under each set of
    constraints, and shorter or longer than the right one; fractions."""
    out = RUNS / str(seed)
    prm, tokenizer, stops = open_sampler(str(out / "prm_cot"), torch.device("cpu"), 256)
    result = {}
    for name in NAMES:
        solutions = read_records(out / f"{name}.jsonl", ["id", "problem", "text", "finish"])
        gold = {r["id"]: r["outcome"] for r in read_records(out / f"{name}.gold.jsonl", ["id", "outcome"])}
        right = np.array([gold[s["id"]] for s in solutions])
        shown = [shown_solution(s["text"]) for s in solutions]
        asked = [
            {"problem": s["problem"], "steps": steps, "answer": answer}
            for s, (steps, answer) in zip(solutions, shown, strict=True)
        ]
        scored = score_solutions(prm, tokenizer, stops, "prm_cot", asked, max_new_tokens=260)
        verdicts = np.array([s.verdict is True for s in scored])
        numbers = {"right": right.mean(), "false_yes": (verdicts & ~right).sum() / max((~right).sum(), 1)}
        for constraints in CONSTRAINTS:
            valid = [format_valid(s["text"], constraints, s["finish"] == "stop") for s in solutions]
            numbers[constraints] = (verdicts & np.array(valid)).mean()
        rows = [s["problem"].split()[1] for s in solutions]
        needed = np.array([len(sort(row)) for row in rows])
        made = np.array([len(steps) for steps, _ in shown])
        so_far = np.array([all(judge(row, steps)[1]) for row, (steps, _) in zip(rows, shown, strict=True)])
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
    rows = json.loads((out / "labels.json").read_text())["rows"]
    labels = {r["method"]: round(r["exact"], 4) for r in rows if r["on"] == "all" and r["N"] == 16}
    processbench = {r["metric"]: r["value"] for r in read_records(out / "processbench.jsonl", [])}
    curves = {}
    for name in list(NAMES)[1:]:
        reward = read_metrics(str(out / name))["reward/mean"]
        curves[name] = {str(step): round(value, 4) for step, value in reward.items()}
    rescored = json.loads((out / "rescored.json").read_text())
    return {"seed": int(seed), "labels": labels, "processbench": processbench, "reward": curves, "policies": rescored}


def print_tables(records: list[dict]) -> None:
    """Labels and reward model, then a row for each policy."""
    print(f"{len(records)} seeds; mean ± half the 95 % interval over seeds, in percent")
    print("| one of 16 | voted by outcome | voted by step | PRM-CoT, F1 |\n|---|---|---|---|")
    cells = [over_seeds([r["labels"][method] for r in records]) for method in METHODS]
    cells.append(over_seeds([r["processbench"]["f1"] for r in records]))
    print(f"| {' | '.join(cells)} |\n")
    print(
        "| policy | reward in training | right | accepted: none / paper / strict | wrong, but accepted | one step |",
        end="",
    )
    print(" stopped early | steps left out | too many steps | appended |\n|---|---|---|---|---|---|---|---|---|---|")
    for name, title in NAMES.items():
        found = [r["policies"][name] for r in records]
        last = [np.mean(list(r["reward"][name].values())[-10:]) for r in records if name in r["reward"]]
        cells = [f"{100 * np.mean(last):.0f}" if last else "-", over_seeds([x["right"] for x in found])]
        cells.append(" / ".join(f"{100 * np.mean([x[constraints] for x in found]):.0f}" for constraints in CONSTRAINTS))
        cells.append(over_seeds([x["false_yes"] for x in found]))
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
        write_json(RUNS / str(args.seed) / "rescored.json", rescore(args.seed))
        return
    if args.collect:
        seeds = sorted(file.parent.name for file in RUNS.glob("*/rescored.json"))
        write_text(path, "".join(json.dumps(collect(seed)) + "\n" for seed in seeds))
    print_tables(read_records(path, ["seed"]))


if __name__ == "__main__":
    main()
