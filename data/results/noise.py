"""How noisy may labels be? The noise of noise.sh, its table and its figure.

    python -m data.results.noise                                                          # table and figure
    python -m data.results.noise --collect                                                # first noise.jsonl, from runs/noise
    python -m data.results.noise --turn 20 --seed 0 --labels labels.jsonl --out F.jsonl   # labels, 20 % turned over

A label is turned over as a whole. Of a solution that it calls right, a step is called incorrect and with it all that follow,
and the solution wrong; of one that it calls wrong, everything is called correct. The verification that goes with the label,
from which a PRM-CoT learns, says the same: its reasons stay, its verdicts are turned.
"""

import argparse
import json
import random
import re
from pathlib import Path

from evaluate import draw_seeds, over_seeds, read_metrics, save_figure
from generate import read_records, write_text
from verify import parse_verification

HERE = Path(__file__).parent
RUNS, CLAIMS = Path("runs/noise"), Path("runs/claims")


def turn_over(label: dict, rng: random.Random) -> dict:
    """The opposite label, with a text that says it."""
    n = len(label["steps"])
    first = rng.randrange(n) if label["outcome"] else n  # of the steps that are now incorrect
    steps, outcome = [k < first for k in range(n)], not label["outcome"]
    verdicts = iter(steps)

    def verdict(_: re.Match) -> str:
        return f"**This step is {'correct' if next(verdicts) else 'incorrect'}.**"

    text = re.sub(r"\*\*This step is (?:in)?correct\.\*\*", verdict, label["text"])
    text = re.sub(r"\(Yes/No\)\? (Yes|No)\*\*", f"(Yes/No)? {'Yes' if outcome else 'No'}**", text)
    parsed = parse_verification(text, n)
    assert (parsed.step_verdicts, parsed.verdict) == (steps, outcome), text
    return {**label, "step_labels": steps, "outcome": outcome, "text": text}


def collect(seed: int) -> dict:
    """One seed: share of labels turned over, in percent -> F1 of the reward model, accuracy of the policy, reward."""
    runs = {"0": CLAIMS / str(seed)} | {
        d.name: d for d in (RUNS / str(seed)).iterdir() if (d / "benchmark.jsonl").exists()
    }
    found = {}
    for share, run in sorted(runs.items(), key=lambda pair: int(pair[0])):
        f1 = {r["metric"]: r["value"] for r in read_records(run / "processbench.jsonl", [])}["f1"]
        policy = [
            r for r in read_records(run / "benchmark.jsonl", []) if r["settings"]["model"].endswith("/process_aware")
        ]
        accuracy = {r["metric"]: r["value"] for r in policy}
        metrics = read_metrics(str(run / "process_aware"))
        found[share] = {"f1": f1, "avg@4": accuracy["avg@4"], "greedy": accuracy["greedy"]}
        curves = {name: metrics[f"{name}"] for name in ("reward/mean", "heldout/accuracy")}
        found[share] |= {name: {str(k): round(v, 4) for k, v in curve.items()} for name, curve in curves.items()}
    start = [
        r
        for r in read_records(CLAIMS / str(seed) / "benchmark.jsonl", [])
        if r["settings"]["model"] == "data/tiny/policy"
    ]
    return {"seed": seed, "start": {r["metric"]: r["value"] for r in start}["avg@4"], "shares": found}


def print_table(records: list[dict]) -> None:
    """A row for each share of labels turned over."""
    start = over_seeds([r["start"] for r in records])
    print(f"{len(records)} seeds; mean ± half the 95 % interval over seeds, in percent; start {start}")
    print("| labels turned over | PRM-CoT, F1 | reward at the end | avg@4 | greedy |\n|---|---|---|---|---|")
    for share in records[0]["shares"]:
        runs = [r["shares"][share] for r in records]
        last = [list(run["reward/mean"].values())[-10:] for run in runs]
        cells = [over_seeds([run["f1"] for run in runs]), over_seeds([sum(x) / len(x) for x in last])]
        cells += [over_seeds([run[key] for run in runs]) for key in ("avg@4", "greedy")]
        print(f"| {share} % | {' | '.join(cells)} |")


def draw(records: list[dict], path: Path) -> None:
    """Held-out accuracy by step, a line for each share of labels turned over."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(ylim=(0, 1), xlabel="step", ylabel="held-out accuracy")
    axes.grid(alpha=0.3)
    for colour, share in enumerate(records[0]["shares"]):
        curves = [r["shares"][share]["heldout/accuracy"] for r in records]
        draw_seeds(axes, curves, "-", f"C{colour}", f"{share} % of the labels turned over")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turn", type=int, help="share of the labels, in percent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", help="to be turned over")
    parser.add_argument("--out", type=Path, help="where the turned ones go")
    parser.add_argument("--collect", action="store_true", help="write noise.jsonl from runs/noise")
    args = parser.parse_args()
    path = HERE / "noise.jsonl"
    if args.turn is not None:
        rng = random.Random(f"{args.seed}/{args.turn}")
        labels = read_records(args.labels, ["steps", "text", "step_labels", "outcome", "dropped"])
        turned = [turn_over(x, rng) if x["dropped"] is None and rng.random() < args.turn / 100 else x for x in labels]
        write_text(args.out, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in turned))
        return
    if args.collect:
        seeds = sorted(int(d.name) for d in RUNS.iterdir())
        write_text(path, "".join(json.dumps(collect(seed)) + "\n" for seed in seeds))
    records = read_records(path, ["seed"])
    print_table(records)
    draw(records, HERE / "noise.png")


if __name__ == "__main__":
    main()
