"""The tables of the tiny world's claims, from data/results/claims.jsonl; with --collect, first that file from
runs/claims/<seed>/. And what the other studies share: results of a model, means over seeds,
points of curves.

    python -m data.results.claims
"""

import json
import math
import sys
from operator import itemgetter
from pathlib import Path

from data import records, report
from kernels import distributed
from kernels.distributed import InputError

import numpy as np

HERE = Path(__file__).parent
RUNS = Path("runs/claims")
REWARDS = ("process_aware", "rlvr", "random")


def read_results(path: str | Path, model: str | None = None) -> dict[str, dict]:
    """metric -> its row in a results file; of one model, where the file has several."""
    rows = records.read(path, ["metric", "value", "settings"])
    return {row["metric"]: row for row in rows if model in (None, row["settings"]["model"])}


def find_seeds(runs: Path, *files: str) -> list[str]:
    """The seeds whose directory in `runs` has these files, which may be patterns. Raises InputError if there are none,
    so that tables which are there aren't replaced by nothing."""
    seeds = sorted(directory.name for directory in runs.glob("*") if all(any(directory.glob(file)) for file in files))
    if not seeds:
        raise InputError(f"--collect: no seed in {runs} has {', '.join(files)}; run the study's script first")
    return seeds


def replace_seeds(path: Path, rows: list[dict]) -> list[dict]:
    """Write the rows of these seeds into a file of results, and return all that it has then: those of other seeds,
    whose runs may lie on another machine, stay."""
    seeds = {row["seed"] for row in rows}
    if path.exists():
        rows = [row for row in records.read(path, ["seed"]) if row["seed"] not in seeds] + rows
    rows.sort(key=itemgetter("seed"))
    records.write_lines(path, rows)
    return rows


def over_seeds(values: list[float], sign: str = "") -> str:
    """Mean over up to ten seeds and half the width of its 95 % interval (Student's t), in percent; nan for one seed."""
    t = [math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26][len(values) - 1]
    half = t * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else t
    return f"{100 * np.mean(values):{sign}.1f} ± {100 * half:.1f}"


def read_points(run: Path, key: str) -> dict[str, list]:
    """x, the steps, and y, the values, of a metric of a GRPO run, as a file of curves has them."""
    points = report.read_metrics(str(run))[key]
    return {"x": list(points), "y": [round(y, 4) for y in points.values()]}


def collect(seed: str) -> dict:
    """The numbers of one seed."""
    run = RUNS / seed
    rows = [r for r in json.loads((run / "labels.json").read_text())["rows"] if r["N"] == 16]
    labels = {f"{r['method']}/{on}": r[on] for r in rows for on in ("kept", "all")}
    measured: dict[str, dict[str, dict]] = {}
    for r in records.read(run / "benchmark.jsonl", []):
        model = r["settings"]["model"].removeprefix(f"{run}/")
        measured.setdefault(model, {})[r["metric"]] = {"value": r["value"], "interval": r["interval"]}
    of_valid = {}  # accuracy among format-valid responses: at the start, at the end
    for reward in REWARDS:
        curve = list(report.read_metrics(str(run / reward))["heldout/accuracy_of_valid"].values())
        of_valid[reward] = [curve[0], curve[-1]]
    processbench = {m: row["value"] for m, row in read_results(run / "processbench.jsonl").items()}
    found = {"labels": labels, "processbench": processbench, "benchmark": measured, "accuracy_of_valid": of_valid}
    return {"seed": int(seed), **found}


def main() -> None:
    path = HERE / "claims.jsonl"
    if "--collect" in sys.argv[1:]:
        replace_seeds(path, [collect(seed) for seed in find_seeds(RUNS, "benchmark.jsonl")])
    rows = records.read(path, ["seed"])
    print("| seed | one verification -> 16, voted by step | gain | kept | PRM-CoT F1 |")
    print("|---|---|---|---|---|")
    for r in rows:
        one, voted = r["labels"]["single/all"], r["labels"]["step_consistency/all"]
        gain, low, high = voted["minus_single"]["exact"]
        kept = r["labels"]["step_consistency/kept"]
        print(f"| {r['seed']} | {100 * one['exact']:.1f} -> {100 * voted['exact']:.1f}", end="")
        print(f" | {report.percent(gain, (low, high))}", end="")
        print(f" | {100 * kept['yield']:.1f} %, {100 * kept['exact']:.1f} right", end="")
        print(f" | {100 * r['processbench']['f1']:.1f} |")
    print()
    print("| seed | start, avg@4 (greedy) | " + " | ".join(REWARDS) + " | random, among valid: start -> end |")
    print("|---|---|---|---|---|---|")
    clear = 0
    for r in rows:
        models = [r["benchmark"][name] for name in ("data/tiny/policy", *REWARDS)]
        cells = [f"{report.percent(*m['avg@4'].values())} ({report.percent(m['greedy']['value'])})" for m in models]
        start, trained = (m["avg@4"] for m in models[:2])
        clear += trained["value"] - start["value"] >= 0.1 and trained["interval"][0] > start["interval"][1]
        before, after = r["accuracy_of_valid"]["random"]
        print(f"| {r['seed']} | {' | '.join(cells)} | {100 * before:.1f} -> {100 * after:.1f} |")
    print(f"\nprocess_aware gains at least 10 points, intervals apart: {clear} of {len(rows)} seeds")


if __name__ == "__main__":
    distributed.run_stage(main)
