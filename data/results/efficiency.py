"""What each stage costs on this machine: seconds, tokens and peak memory against the number of solutions, of
verifications, of rounds of critique, and the size of a group, and how each grows; and a GRPO step by its reward. Twelve
minutes on two cores, with nothing beside it; one run each.

    python -m data.results.efficiency --run     # runs/efficiency/..., data/results/efficiency.jsonl, its curves, the table
    python -m data.results.efficiency           # the table from data/results/efficiency.jsonl
    python evaluate.py plot --runs data/results/efficiency_curves.jsonl --out data/results/efficiency.png

Each run is one of the five commands on the tiny world, by the clock, start included (the first row shows what that is);
memory is the largest resident set of its process. A GRPO step is measured inside its run, the first one left out.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from data import records, report

import numpy as np

HERE = Path(__file__).parent
RUNS = Path("runs/efficiency")
SOLUTIONS, VERIFICATIONS, GROUPS = (2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32), (2, 4, 8, 16, 32)
PROBLEMS = 25
REWARDS = {  # row of the table of rewards -> flags of grpo.py
    "process_aware": "--prm runs/efficiency/prm_cot",
    "process_aware-votes4": "--prm runs/efficiency/prm_cot --prm_votes 4",
    "step_augmented": "--prm runs/efficiency/prm_cot --reward step_augmented",
    "selective_advantage": "--prm runs/efficiency/prm_cot --reward selective_advantage",
    "global_step": "--prm runs/efficiency/prm_cot --reward global_step",
    "process_aware-orm": "--prm runs/efficiency/orm --prm_kind orm",
    "process_aware-prm": "--prm runs/efficiency/prm --prm_kind prm",
    "majority": "--reward majority",
    "self_certainty": "--reward self_certainty",
    "random": "--reward random",
    "rlvr": "--reward rlvr",
}
PANELS = {  # series -> the name of its axis
    "generate": "solutions a problem, M",
    "verify": "verifications a solution, N",
    "critique": "rounds of critique",
    "grpo": "responses a problem, G",
}


def run(*command: object) -> tuple[float, float]:
    """(seconds, peak MiB) of a stage."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def count_tokens(path: Path) -> int:
    """Tokens of all records."""
    return sum(record["tokens"] for record in records.read(path, ["tokens"]))


def run_steps(out: Path, steps: int, *flags: object) -> tuple[float, float, int]:
    """(seconds, peak MiB, tokens) of a GRPO step: sampled, judged and learnt from; the first one left out."""
    _, peak = run("grpo.py", *flags, "--heldout", "", "--steps", steps, "--out", out)
    metrics = report.read_metrics(str(out))
    seconds, tokens = 0.0, 0.0
    for phase in ("sample", "score", "update"):
        taken = list(metrics[f"time/{phase}"].values())[1:]
        seconds += float(np.mean(taken))
        if phase != "update":  # which adds none
            rates = list(metrics[f"time/{phase}_tokens_per_second"].values())[1:]
            tokens += float(np.mean(np.multiply(taken, rates)))
    return seconds, peak, round(tokens)


def measure() -> list[dict]:
    """A record for each run: series, x, seconds, MiB, tokens."""
    shutil.rmtree(RUNS, ignore_errors=True)
    found = []

    def note(series: str, x: int, seconds: float, peak: float, tokens: int) -> None:
        record = {"series": series, "x": x, "seconds": round(seconds, 2), "MiB": round(peak), "tokens": tokens}
        print(record, flush=True)
        found.append(record)

    note("start", 0, *run("generate.py", "--help"), 0)
    for M in SOLUTIONS:
        path = RUNS / f"M{M}.jsonl"
        cost = run("generate.py", "--num_samples", M, "--limit", PROBLEMS, "--out", path)
        note("generate", M, *cost, count_tokens(path))
    for N in VERIFICATIONS:
        out = RUNS / f"N{N}"
        cost = run("verify.py", "--solutions", RUNS / "M8.jsonl", "--num_verifications", N, "--out", out)
        note("verify", N, *cost, count_tokens(out / "verifications.jsonl"))
    for rounds in (1, 2, 3):  # meta-critique: of one verification, which is made beforehand
        out = RUNS / f"rounds{rounds}"
        common = ("verify.py", "--solutions", RUNS / "M8.jsonl", "--num_verifications", 1, "--out", out)
        run(*common, "--method", "single")
        cost = run(*common, "--method", "meta_critique", "--critique_rounds", rounds)
        note("critique", rounds, *cost, count_tokens(out / "critiques.jsonl"))
    for kind in ("orm", "prm", "prm_cot", "disc_prm"):
        labels = RUNS / "N16" / "labels_step_consistency.jsonl"
        cost = run("train_prm.py", "--kind", kind, "--labels", labels, "--epochs", 1, "--out", RUNS / kind)
        note(f"train_prm {kind}", 1, *cost, 0)
    for G in GROUPS:
        flags = ("--prm", RUNS / "prm_cot", "--batch_size", 8, "--group_size", G)
        note("grpo", G, *run_steps(RUNS / f"G{G}", 4, *flags))
    for name, flags in REWARDS.items():  # 16 x 8 responses, as in the table of rewards
        note(f"reward {name}", 8, *run_steps(RUNS / name, 6, *flags.split()))
    return found


def print_table(records: list[dict]) -> None:
    """A row for each run; then for each series the line through its seconds."""
    print("| run | x | seconds | tokens | peak MiB |\n|---|---|---|---|---|")
    for r in records:
        tokens = f"{r['tokens']:,}" if r["tokens"] else "-"
        print(f"| {r['series']} | {r['x'] or ''} | {r['seconds']:.1f} | {tokens} | {r['MiB']:,} |")
    for series in PANELS:
        rows = [r for r in records if r["series"] == series]
        x, y = np.array([r["x"] for r in rows]), np.array([r["seconds"] for r in rows])
        slope, first = np.polyfit(x, y, 1)
        off = np.abs(slope * x + first - y).max()
        print(
            f"{series}: {first:.1f} s + {slope:.2f} s each, at most {off:.1f} s off; memory {rows[0]['MiB']:,} to {rows[-1]['MiB']:,} MiB"
        )


def make_curves(records: list[dict]) -> list[dict]:
    """A panel a series: seconds on the left, peak memory on the right, both from 0."""
    curves = []
    for series, label in PANELS.items():
        rows = [r for r in records if r["series"] == series]
        for key, curve in (("seconds", "seconds"), ("MiB", "peak memory, MiB (right)")):
            y = [r[key] for r in rows]
            axes = {"xlabel": label, "ylim": [0, 1.1 * max(y)], "right": key == "MiB"}
            title = "grpo, a step" if series == "grpo" else series
            curves.append({"panel": title, "curve": curve, "x": [r["x"] for r in rows], "y": y, **axes})
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="measure; else only the table")
    args = parser.parse_args()
    path = HERE / "efficiency.jsonl"
    if args.run:
        rows = measure()
        records.write_lines(path, rows)
        records.write_lines(HERE / "efficiency_curves.jsonl", make_curves(rows))
    print_table(records.read(path, ["series", "seconds", "MiB", "tokens"]))


if __name__ == "__main__":
    main()
