"""The start and the table of students.sh: with --make the model that its students start from; with --collect
data/results/students.jsonl from runs/students/<seed>/.

    python -m data.results.students
    python -m data.results.students --make runs/students/start    # eight minutes on one core

The start knows the form of a verification, and calls every step correct: the tiny policy after the first 250 steps of
what makes a verifier (`data/make_tiny.py`: 450, from a better start, and then its own samples).
"""

import argparse
import json
from pathlib import Path

from data import make_tiny, records
from data.results.claims import find_seeds, over_seeds, read_results, replace_seeds
from generate import open_model
from kernels import distributed
from kernels.transformer import save_model

import torch

HERE = Path(__file__).parent
RUNS = Path("runs/students")
STEPS = 250
METHODS = ["single", "outcome_consistency", "step_consistency", "reference_guided"]
METRICS = ["f1", "error_acc", "correct_acc", "unparsed"]


def make_start(out: Path) -> None:
    """Train the tiny policy on scripted verifications and write it to out."""
    world = make_tiny.WORLDS["tiny"]
    pool, _, _ = make_tiny.make_sets(world)
    model, tokenizer, _ = open_model(str(world.directory / "policy"), torch.device("cpu"), torch.float32)
    draw = make_tiny.draw_from(make_tiny.make_example, make_tiny.VERIFIER_TASKS, pool)
    make_tiny.train(model, draw, STEPS, tokenizer, make_tiny.SEED + 1)
    save_model(model, out, world.directory)


def collect(seed: str) -> dict:
    """The numbers of one seed: kept labels of each method, and ProcessBench of its student."""
    run = RUNS / seed
    rows = json.loads((run / "labels.json").read_text())["rows"]
    kept = {r["method"].removesuffix(" (file)"): r["kept"] for r in rows if r["N"] is None}
    found = {}
    for method in METHODS:
        results = read_results(run / f"{method}.jsonl")
        label = {key: kept[method][key] for key in ("solutions", "exact", "outcome")}
        found[method] = label | {metric: results[metric]["value"] for metric in METRICS}
    return {"seed": int(seed), "students": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, help="directory for the start")
    parser.add_argument("--collect", action="store_true", help="write students.jsonl from runs/students")
    args = parser.parse_args()
    path = HERE / "students.jsonl"
    if args.make:
        make_start(args.make)
        return
    if args.collect:
        seeds = find_seeds(RUNS, *(f"{method}.jsonl" for method in METHODS))
        replace_seeds(path, [collect(seed) for seed in seeds])
    rows = records.read(path, ["seed", "students"])
    print(f"{len(rows)} seeds; mean ± half the 95 % interval over seeds, in percent; differences are paired by seed")
    print("| labels by | whole vector right, of the kept | F1 | minus single ", end="")
    print("| wrong step found | right ones passed | unparsed |\n|---|---|---|---|---|---|---|")
    for method in METHODS:
        of = [r["students"][method] for r in rows]
        gain = [x["f1"] - r["students"]["single"]["f1"] for x, r in zip(of, rows, strict=True)]
        cells = [over_seeds([x[key] for x in of]) for key in ("exact", *METRICS)]
        cells.insert(2, "-" if method == "single" else over_seeds(gain, "+"))
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    distributed.run_stage(main)
