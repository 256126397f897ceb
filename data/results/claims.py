"""The README's table of the tiny world's claims, from data/results/claims.jsonl; with --collect, first that file from
runs/claims/<seed>/.

    python -m data.results.claims
"""

import json
import sys
from pathlib import Path

from evaluate import read_results
from generate import read_records, write_lines

HERE = Path(__file__).parent
RUNS = Path("runs/claims")
REWARDS = ("process_aware", "rlvr", "random")


def collect(seed: str) -> dict:
    """The numbers of one seed."""
    run = RUNS / seed
    rows = [r for r in json.loads((run / "labels.json").read_text())["rows"] if r["N"] == 16]
    labels = {f"{r['method']}/{r['on']}": r for r in rows}
    measured: dict[str, dict[str, dict]] = {}
    for r in read_records(run / "benchmark.jsonl", []):
        model = r["settings"]["model"].removeprefix(f"{run}/")
        measured.setdefault(model, {})[r["metric"]] = {"value": r["value"], "interval": r["interval"]}
    of_valid = {}  # accuracy among format-valid responses: at the start, at the end
    for reward in REWARDS:
        curve = [
            m["heldout/accuracy_of_valid"]
            for m in read_records(run / reward / "metrics.jsonl", ["step"])
            if "heldout/valid" in m
        ]
        of_valid[reward] = [curve[0], curve[-1]]
    processbench = {m: row["value"] for m, row in read_results(run / "processbench.jsonl").items()}
    found = {"labels": labels, "processbench": processbench, "benchmark": measured, "accuracy_of_valid": of_valid}
    return {"seed": int(seed), **found}


def show(number: dict) -> str:
    """A fraction and its interval, in percent."""
    low, high = number["interval"]
    return f"{100 * number['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> None:
    path = HERE / "claims.jsonl"
    if "--collect" in sys.argv[1:]:
        seeds = sorted(d.name for d in RUNS.iterdir() if (d / "benchmark.jsonl").exists())
        write_lines(path, [collect(seed) for seed in seeds])
    records = read_records(path, ["seed"])
    print("| seed | one verification -> 16, voted by step | gain | kept | PRM-CoT F1 |")
    print("|---|---|---|---|---|")
    for r in records:
        one, voted = r["labels"]["single/all"], r["labels"]["step_consistency/all"]
        gain, low, high = voted["minus_single"]["exact"]
        kept = r["labels"]["step_consistency/kept"]
        print(f"| {r['seed']} | {100 * one['exact']:.1f} -> {100 * voted['exact']:.1f}", end="")
        print(f" | {100 * gain:.1f} [{100 * low:.1f}, {100 * high:.1f}]", end="")
        print(f" | {100 * kept['yield']:.1f} %, {100 * kept['exact']:.1f} right", end="")
        print(f" | {100 * r['processbench']['f1']:.1f} |")
    print()
    print("| seed | start, avg@4 (greedy) | " + " | ".join(REWARDS) + " | random, among valid: start -> end |")
    print("|---|---|---|---|---|---|")
    clear = 0
    for r in records:
        models = [r["benchmark"][name] for name in ("data/tiny/policy", *REWARDS)]
        cells = [f"{show(m['avg@4'])} ({100 * m['greedy']['value']:.1f})" for m in models]
        start, trained = (m["avg@4"] for m in models[:2])
        clear += trained["value"] - start["value"] >= 0.1 and trained["interval"][0] > start["interval"][1]
        before, after = r["accuracy_of_valid"]["random"]
        print(f"| {r['seed']} | {' | '.join(cells)} | {100 * before:.1f} -> {100 * after:.1f} |")
    print(f"\nprocess_aware gains at least 10 points, intervals apart: {clear} of {len(records)} seeds")


if __name__ == "__main__":
    main()
