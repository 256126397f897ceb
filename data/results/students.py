"""The table of students that hadn't seen a verification before, from data/results/students.jsonl; with --collect, first that
file from runs/students/<seed>/.

    python -m data.results.students
"""

import json
import sys
from pathlib import Path

from data.results.claims import over_seeds, read_results
from generate import read_records, write_lines

HERE = Path(__file__).parent
RUNS = Path("runs/students")
METHODS = ["single", "outcome_consistency", "step_consistency", "reference_guided"]
METRICS = ["f1", "error_acc", "correct_acc", "unparsed"]


def collect(seed: str) -> dict:
    """The numbers of one seed: kept labels of each method, and ProcessBench of its student."""
    run = RUNS / seed
    rows = json.loads((run / "labels.json").read_text())["rows"]
    kept = {r["method"].removesuffix(" (file)"): r for r in rows if r["N"] is None and r["on"] == "kept"}
    found = {}
    for method in METHODS:
        results = read_results(run / f"{method}.jsonl")
        label = {key: kept[method][key] for key in ("solutions", "exact", "outcome")}
        found[method] = label | {metric: results[metric]["value"] for metric in METRICS}
    return {"seed": int(seed), "students": found}


def main() -> None:
    path = HERE / "students.jsonl"
    if "--collect" in sys.argv[1:]:
        seeds = sorted(d.name for d in RUNS.iterdir() if (d / f"{METHODS[-1]}.jsonl").exists())
        write_lines(path, [collect(seed) for seed in seeds])
    records = read_records(path, ["seed", "students"])
    print(f"{len(records)} seeds; mean ± half the 95 % interval over seeds, in percent; differences are paired by seed")
    print(
        "| labels by | whole vector right, of the kept | F1 | minus single | wrong step found | right ones passed | unparsed |"
    )
    print("|---|---|---|---|---|---|---|")
    for method in METHODS:
        of = [r["students"][method] for r in records]
        gain = [x["f1"] - r["students"]["single"]["f1"] for x, r in zip(of, records, strict=True)]
        cells = [over_seeds([x[key] for x in of]) for key in ("exact", *METRICS)]
        cells.insert(2, "-" if method == "single" else over_seeds(gain, "+"))
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
