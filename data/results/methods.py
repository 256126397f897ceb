"""The README's table of verification methods, from data/results/methods.jsonl; with --collect, first that file from
runs/methods/<seed>/.

    python -m data.results.methods
"""

import json
import sys
from pathlib import Path

from data import records
from data.results.claims import find_seeds, over_seeds, read_results, replace_seeds
from kernels import distributed

import numpy as np

HERE = Path(__file__).parent
RUNS = Path("runs/methods")
METHODS = ["single", "outcome_consistency", "step_consistency", "meta_critique", "hybrid", "reference_guided"]
KINDS = ["orm", "prm", "prm_cot", "disc_prm"]


def collect(seed: str) -> dict:
    """The numbers of one seed: labels (kept and all) of each method, and the results of each method and kind."""
    run = RUNS / seed
    rows = [r for r in json.loads((run / "labels.json").read_text())["rows"] if r["method"].endswith(" (file)")]
    labels = {}
    for r in rows:
        for on in ("kept", "all"):
            labels[f"{r['method'].removesuffix(' (file)')}/{on}"] = {"tokens": r["tokens"], **r[on]}
    scores = {}
    for method in METHODS:
        for kind in KINDS:
            found = read_results(run / f"{method}-{kind}.jsonl")
            scores[f"{method}/{kind}"] = found["outcome_acc" if kind == "orm" else "f1"]["value"]
    return {"seed": int(seed), "labels": labels, "scores": scores}


def main() -> None:
    path = HERE / "methods.jsonl"
    if "--collect" in sys.argv[1:]:
        replace_seeds(path, [collect(seed) for seed in find_seeds(RUNS, "reference_guided-disc_prm.jsonl")])
    rows = records.read(path, ["seed"])
    print(f"{len(rows)} seeds; mean ± half the 95 % interval over seeds, in percent")
    print(
        "| method | whole vector right, all | minus single, paired | kept | yield | tokens | ORM, accuracy | PRM, F1 | PRM-CoT, F1 | disc. PRM, F1 |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    base = [r["labels"]["single/all"]["exact"] for r in rows]
    for method in METHODS:
        everything, kept = ([r["labels"][f"{method}/{on}"] for r in rows] for on in ("all", "kept"))
        gain = [x["exact"] - b for x, b in zip(everything, base, strict=True)]
        cells = [over_seeds([x["exact"] for x in everything]), "-" if method == "single" else over_seeds(gain, "+")]
        cells.append(over_seeds([x["exact"] for x in kept]))
        cells += [over_seeds([x["yield"] for x in kept]), f"{np.mean([x['tokens'] for x in kept]) / 1000:,.0f}k"]
        cells += [over_seeds([r["scores"][f"{method}/{kind}"] for r in rows]) for kind in KINDS]
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    distributed.run_stage(main)
