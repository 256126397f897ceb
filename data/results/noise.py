"""How noisy may labels be? The noise of noise.sh, its table and the curves of its figure.

    python -m data.results.noise                                                          # the table
    python evaluate.py plot --runs data/results/noise_curves.jsonl --out data/results/noise.png
    python -m data.results.noise --collect                                                # first both files, from the runs
    python -m data.results.noise --turn 20 --seed 0 --labels labels.jsonl --out F.jsonl   # labels, 20 % turned over

A label is turned over as a whole. Of a solution that it calls right, a step is called incorrect and with it all that
follow, and the solution wrong; of one that it calls wrong, everything is called correct. The verification that goes
with the label, from which a PRM-CoT learns, says the same: its reasons stay, its verdicts are turned.
"""

import random
import re
from pathlib import Path

from data import records, report
from data.results.claims import find_seeds, over_seeds, read_points, read_results, replace_seeds
from evaluate import read_gold
from kernels import distributed
from kernels.distributed import InputError
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
    if (parsed.step_verdicts, parsed.verdict) != (steps, outcome):
        raise InputError(
            f"{label['id']}: its text doesn't say its label, so it can't be turned over; use labels of verify.py"
        )
    return {**label, "step_labels": steps, "outcome": outcome, "text": text}


def find_runs(seed: int) -> dict[int, Path]:
    """Share of labels turned over, in percent -> where the run lies; without noise it is one of claims.sh."""
    runs = {int(file.parent.name): file.parent for file in RUNS.glob(f"{seed}/*/benchmark.jsonl")}
    return dict(sorted({0: CLAIMS / str(seed), **runs}.items()))


def collect(seed: int) -> dict:
    """One seed: share of labels turned over, in percent -> share of right outcomes among the labels, F1 of the reward
    model, accuracy of the policy, reward of the last ten steps."""
    found = {}
    for share, run in find_runs(seed).items():
        labels = run / "labels.jsonl" if share else run / "verify" / "labels_step_consistency.jsonl"
        labels = [x for x in records.read(labels, ["id", "steps", "answer", "outcome"]) if x["dropped"] is None]
        gold = read_gold("data/tiny/gold.jsonl", labels)
        right = sum(x["outcome"] == gold[x["id"]][1] for x in labels) / len(labels)
        policy = read_results(run / "benchmark.jsonl", str(run / "process_aware"))
        numbers = {"f1": read_results(run / "processbench.jsonl")["f1"], **{m: policy[m] for m in ("avg@4", "greedy")}}
        last = list(report.read_metrics(str(run / "process_aware"))["reward/mean"].values())[-10:]
        found[str(share)] = {"labels": round(right, 4), **{m: row["value"] for m, row in numbers.items()}}
        found[str(share)]["reward"] = sum(last) / len(last)
    return {"seed": seed, "shares": found}


def collect_curves(seed: int) -> list[dict]:
    """One seed: held-out accuracy by step, a curve for each share."""
    curves = []
    for share, run in find_runs(seed).items():
        curve = {"seed": seed, "panel": "held-out accuracy", "curve": f"{share} % of the labels turned over"}
        curves.append({**curve, **read_points(run / "process_aware", "heldout/accuracy"), "ylim": [0, 1]})
    return curves


def print_table(records: list[dict]) -> None:
    """A row for each share of labels turned over."""
    print(f"{len(records)} seeds; mean ± half the 95 % interval over seeds, in percent")
    print(
        "| labels turned over | outcome right | PRM-CoT, F1 | reward at the end | avg@4 | greedy |\n|---|---|---|---|---|---|"
    )
    for share in sorted(set.intersection(*(set(r["shares"]) for r in records)), key=int):
        runs = [r["shares"][share] for r in records]
        cells = [over_seeds([run[key] for run in runs]) for key in ("labels", "f1", "reward", "avg@4", "greedy")]
        print(f"| {share} % | {' | '.join(cells)} |")


def main() -> None:
    parser = records.new_parser(__doc__)
    parser.add_argument("--turn", type=records.integer(0, 100), help="share of the labels, in percent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", help="to be turned over")
    parser.add_argument("--out", help="where the turned ones go")
    parser.add_argument("--collect", action="store_true", help="write both files from runs/noise")
    args = records.parse_flags(parser)
    path = HERE / "noise.jsonl"
    if args.turn is not None:
        if not (args.labels and args.out):
            raise InputError("--turn needs --labels and --out; give both")
        rng = random.Random(f"{args.seed}/{args.turn}")
        labels = records.read(args.labels, ["steps", "text", "step_labels", "outcome", "dropped"])
        kept = [i for i, label in enumerate(labels) if label["dropped"] is None]
        chosen = set(rng.sample(kept, round(args.turn / 100 * len(kept))))
        turned = [turn_over(label, rng) if i in chosen else label for i, label in enumerate(labels)]
        records.write_records(Path(args.out), turned, args)
        return
    if args.collect:
        seeds = [int(seed) for seed in find_seeds(RUNS, "*/benchmark.jsonl")]
        replace_seeds(path, [collect(seed) for seed in seeds])
        replace_seeds(HERE / "noise_curves.jsonl", [curve for seed in seeds for curve in collect_curves(seed)])
    print_table(records.read(path, ["seed"]))


if __name__ == "__main__":
    distributed.run_stage(main)
