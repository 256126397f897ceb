"""The README's results table from data/results/claims.jsonl; with --collect, first from runs/claims/<seed>/.

python data/results/claims.py
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs/claims")
REWARDS = ("process_aware", "rlvr", "random")


def read(path: Path) -> list[dict]:
    """All records of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def collect(seed: str) -> dict:
    """The numbers of one seed."""
    run = RUNS / seed
    rows = [r for r in json.loads((run / "labels.json").read_text())["rows"] if r.get("N") == 16]
    labels = {f"{r['method']}/{r['on']}": r for r in rows}
    measured = {}
    for r in read(run / "benchmark.jsonl"):
        model = r["settings"]["model"].removeprefix(f"{run}/")
        measured[f"{model}/{r['metric']}"] = {"value": r["value"], "interval": r["interval"]}
    training = {reward: [m for m in read(run / reward / "metrics.jsonl") if "heldout/accuracy" in m] for reward in REWARDS}
    valid = {reward: [m.get("heldout/accuracy_of_valid", 0.0) for m in (t[0], t[-1])] for reward, t in training.items()}
    processbench = {r["metric"]: r["value"] for r in read(run / "processbench.jsonl")}
    return {"seed": int(seed), "labels": labels, "processbench": processbench, "benchmark": measured, "accuracy_of_valid": valid}


def main() -> None:
    path = HERE / "claims.jsonl"
    if "--collect" in sys.argv[1:]:
        seeds = sorted(d.name for d in RUNS.iterdir() if (d / "benchmark.jsonl").exists())
        path.write_text("".join(json.dumps(collect(seed)) + "\n" for seed in seeds))
    for r in read(path):
        b, labels = r["benchmark"], r["labels"]
        one, voted = labels["single/all"], labels["step_consistency/all"]
        print(f"seed {r['seed']}: labels {100 * one['exact']:.1f} -> {100 * voted['exact']:.1f}", end="")
        print(f" (kept {100 * labels['step_consistency/kept']['yield']:.0f} %), F1 {100 * r['processbench']['f1']:.1f}")
        for model in ("data/tiny/policy", *REWARDS):
            low, high = b[f"{model}/avg@4"]["interval"]
            start, end = r["accuracy_of_valid"].get(model, (None, None))
            among = f", of the valid {100 * start:.1f} -> {100 * end:.1f}" if start is not None else ""
            print(f"  {model:17s} avg@4 {100 * b[f'{model}/avg@4']['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]", end="")
            print(f", greedy {100 * b[f'{model}/greedy']['value']:.1f}{among}")


if __name__ == "__main__":
    main()
