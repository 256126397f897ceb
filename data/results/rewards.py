"""The tables of rewards, from data/results/rewards.jsonl and, for the held-out accuracy of every step,
rewards_curves.jsonl; with
--collect, first these files from runs/rewards/<seed>/ and runs/claims/<seed>/.

    python -m data.results.rewards
    python evaluate.py plot --runs data/results/rewards_curves.jsonl --out data/results/rewards.png
    python evaluate.py plot --runs data/results/votes_curves.jsonl --out data/results/votes.png
"""

import sys
from pathlib import Path

from data import records, report
from data.results.claims import REWARDS as CLAIMED
from data.results.claims import find_seeds, over_seeds, read_points, read_results, replace_seeds
from kernels import distributed

import numpy as np

HERE = Path(__file__).parent
RUNS, CLAIMS = Path("runs/rewards"), Path("runs/claims")
VOTES = ("1", "2", "4", "8")
NAMES = {
    "process_aware": "process_aware, PRM-CoT",
    "process_aware-votes4": "process_aware, PRM-CoT, 4 votes",
    "step_augmented": "step_augmented",
    "selective_advantage": "selective_advantage",
    "global_step": "global_step",
    "process_aware-orm": "process_aware, ORM",
    "process_aware-prm": "process_aware, PRM",
    "majority": "majority",
    "self_certainty": "self_certainty",
    "random": "random",
    "rlvr": "rlvr (reads answers)",
}
PANELS = {  # of the figure
    "judged by the PRM-CoT": ["process_aware", "process_aware-votes4", "rlvr"],
    "rewards for steps": ["step_augmented", "selective_advantage", "global_step"],
    "other reward models": ["process_aware-orm", "process_aware-prm"],
    "no judge": ["majority", "self_certainty", "random"],
}


def directory(seed: str, name: str) -> Path:
    """Where a run lies; three of them are those of claims.sh."""
    return (CLAIMS if name in CLAIMED else RUNS) / seed / name


def collect(seed: str) -> dict:
    """One seed: of each reward the accuracy at the last step and the tokens of a step; F1 and accuracy by votes."""
    runs = {}
    for name in NAMES:
        run, claimed = directory(seed, name), name in CLAIMED
        own = read_results(run.with_name("benchmark.jsonl" if claimed else f"{name}.jsonl"), str(run))
        metrics = report.read_metrics(str(run))
        record = {key: own[key]["value"] for key in ("avg@4", "greedy")}
        if not claimed:  # the others ran before rates were logged
            for phase in ("sample", "score"):
                rate, seconds = (metrics.get(f"time/{phase}{end}", {}) for end in ("_tokens_per_second", ""))
                record[f"{phase} tokens"] = round(float(np.mean([rate.get(s, 0) * seconds[s] for s in seconds])))
        runs[name] = record
    start = read_results(CLAIMS / seed / "benchmark.jsonl", "data/tiny/policy")
    start = {key: start[key]["value"] for key in ("avg@4", "greedy")}
    return {"seed": int(seed), "start": start, "runs": runs, "votes": collect_votes(seed, runs)}


def collect_curves(seed: str) -> list[dict]:
    """One seed: held-out accuracy by step, a curve for each reward."""
    curves = []
    for panel, names in PANELS.items():
        for name in names:
            points = read_points(directory(seed, name), "heldout/accuracy")
            curve = {"seed": int(seed), "panel": panel, "curve": NAMES[name], **points}
            curves.append({**curve, "ylabel": "held-out accuracy"})
    return curves


def collect_votes(seed: str, runs: dict) -> dict:
    """votes -> F1 of the seed's PRM-CoT on the tiny ProcessBench with so many votes, and tokens; avg@4 of the policy
    that such votes have trained, where there is one."""
    found = {}
    for votes in VOTES:
        row = read_results(RUNS / seed / f"votes-{votes}.jsonl")["f1"]
        found[votes] = {"f1": row["value"], "tokens": row["tokens"]}
        name = "process_aware" if votes == "1" else f"process_aware-votes{votes}"
        if name in runs:
            found[votes]["avg@4"] = runs[name]["avg@4"]
        elif (path := RUNS / seed / f"{name}.jsonl").exists():
            found[votes]["avg@4"] = read_results(path)["avg@4"]["value"]
    return found


def vote_curves(records: list[dict]) -> list[dict]:
    """F1 of the judge, and accuracy of the policy that it has trained, by votes, of each seed."""
    curves = []
    for key, panel in (("f1", "F1 of the PRM-CoT, %"), ("avg@4", "avg@4 of the policy that it has trained, %")):
        for r in records:
            points = {int(votes): round(100 * found[key], 2) for votes, found in r["votes"].items() if key in found}
            curve = {"seed": r["seed"], "panel": panel, "curve": "mean of the seeds, least to greatest"}
            curve |= {"x": list(points), "y": list(points.values())}
            curves.append({**curve, "ylim": [55, 90], "xlabel": "judgements of a response, put to the vote"})
    return curves


def tokens_per_step(records: list[dict], name: str) -> tuple[float, float]:
    """(sampled, judged) in a step. Where a run didn't log them, those of one with as many responses and the same
    judge."""
    measured = {"process_aware": "step_augmented", "rlvr": "majority", "random": "majority"}.get(name, name)
    runs = [r["runs"][measured] for r in records]
    return tuple(float(np.mean([run[f"{phase} tokens"] for run in runs])) for phase in ("sample", "score"))


def print_table(rows: list[dict], curves: list[dict]) -> None:
    """A row for each reward; differences are paired by seed. Between the points of a curve it is a straight line."""
    budget = 60 * sum(tokens_per_step(rows, "majority"))
    measured = records.read(HERE / "efficiency.jsonl", ["series", "seconds"])
    seconds = {r["series"].removeprefix("reward "): r["seconds"] for r in measured}
    print(
        f"{len(rows)} seeds; mean ± half the 95 % interval, in percent; start {over_seeds([r['start']['avg@4'] for r in rows])}"
    )
    print("| reward | avg@4 at the last step | minus process_aware | greedy | held-out, mean of the curve ", end="")
    print(
        "| tokens a step: sampled + judged | seconds a step "
        f"| held-out after {budget / 1000:,.0f}k tokens |\n|---|---|---|---|---|---|---|---|"
    )
    base = [r["runs"]["process_aware"]["avg@4"] for r in rows]
    for name, title in NAMES.items():
        runs = [r["runs"][name] for r in rows]
        last = [run["avg@4"] for run in runs]
        less = "-" if name == "process_aware" else over_seeds([a - b for a, b in zip(last, base, strict=True)], "+")
        sampled, judged = tokens_per_step(rows, name)
        heldout = [curve for curve in curves if curve["curve"] == title]
        whole = over_seeds([np.mean(curve["y"]) for curve in heldout])
        equal = over_seeds([np.interp(budget / (sampled + judged), curve["x"], curve["y"]) for curve in heldout])
        cells = [
            over_seeds(last),
            less,
            over_seeds([run["greedy"] for run in runs]),
            whole,
            f"{sampled:,.0f} + {judged:,.0f}",
            f"{seconds[name]:.1f}",
            equal,
        ]
        print(f"| {title} | {' | '.join(cells)} |")


def print_votes(records: list[dict]) -> None:
    """What votes at reward time cost and bring."""
    print("\n| votes | PRM-CoT, F1 | minus one | tokens | avg@4 of the policy (seeds) |\n|---|---|---|---|---|")
    base = [r["votes"]["1"]["f1"] for r in records]
    for votes in VOTES:
        found = [r["votes"][votes] for r in records]
        gain = [x["f1"] - b for x, b in zip(found, base, strict=True)]
        cells = [over_seeds([x["f1"] for x in found]), "-" if votes == "1" else over_seeds(gain, "+")]
        cells.append(f"{np.mean([x['tokens'] for x in found]) / 1000:,.0f}k")
        trained = [x["avg@4"] for x in found if "avg@4" in x]
        cells.append(f"{over_seeds(trained)} ({len(trained)})" if len(trained) > 1 else f"{100 * trained[0]:.1f} (1)")
        print(f"| {votes} | {' | '.join(cells)} |")


def main() -> None:
    """Collect if asked to; print the tables."""
    path = HERE / "rewards.jsonl"
    if "--collect" in sys.argv[1:]:
        judged = [name for name in NAMES if name not in CLAIMED]
        seeds = find_seeds(RUNS, *(f"{name}.jsonl" for name in judged))
        rows = replace_seeds(path, [collect(seed) for seed in seeds])
        records.write_lines(HERE / "votes_curves.jsonl", vote_curves(rows))
        replace_seeds(HERE / "rewards_curves.jsonl", [curve for seed in seeds for curve in collect_curves(seed)])
    rows = records.read(path, ["seed"])
    print_table(rows, records.read(HERE / "rewards_curves.jsonl", ["curve", "x", "y"]))
    print_votes(rows)


if __name__ == "__main__":
    distributed.run_stage(main)
