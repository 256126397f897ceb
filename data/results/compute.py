"""The tables of what labels cost, from data/results/compute.jsonl; with --collect, first that file, and the curves of
the figure, from the runs of claims.sh, methods.sh and compute.sh.

    python -m data.results.compute
    python evaluate.py plot --runs data/results/compute_curves.jsonl --out data/results/compute.png
"""

import sys
from pathlib import Path

from data import records
from data.results.claims import find_seeds, over_seeds, read_results, replace_seeds
from evaluate import LABEL_METRICS, count_right, read_gold, vote_report
from kernels import distributed
from verify import keep_parsed

import numpy as np

HERE = Path(__file__).parent
RUNS, CLAIMS, SINGLE = Path("runs/compute"), Path("runs/claims"), Path("runs/methods")
EXACT = LABEL_METRICS.index("exact")
METHODS = ("single", "outcome_consistency", "step_consistency")
TEMPERATURES = ("0.4", "1.2")  # of the verifier, beside the 0.8 of claims.sh
STEPS = ((1, 3), (4, 4), (5, 99))  # steps of a solution, from and to


def collect(seed: str) -> dict:
    """One seed: [tokens, share of right label vectors] of voting by N, of critique by rounds; voting by number of
    steps, and by the verifier's temperature; F1 of the PRM-CoTs that learnt from N votes by step."""
    claims, most = CLAIMS / seed, RUNS / seed / "votes-32"
    files = claims / "solutions.jsonl", claims / "verify" / "verifications.jsonl", most / "verifications.jsonl"
    solutions, verifications, voters = (records.read(file, ["id"]) for file in files)
    solutions = [s for s in solutions if s["steps"]]
    gold = read_gold("data/tiny/gold.jsonl", solutions)
    votes: dict[str, dict[str, list[float]]] = {method: {} for method in METHODS}
    for row in vote_report(solutions, voters, gold, int(seed)):
        votes[row["method"]][str(row["N"])] = [row["tokens"], row["all"]["exact"]]

    def of_sixteen(some: list[dict], votes: list[dict]) -> dict:
        rows = vote_report(some, votes, gold, int(seed))
        found = {row["method"]: row["all"]["exact"] for row in rows if row["N"] == 16}
        return {"solutions": len(some), **found}

    by_steps = {}
    for low, high in STEPS:
        by_steps[f"{low}-{high}"] = of_sixteen([s for s in solutions if low <= len(s["steps"]) <= high], voters)
    by_temperature = {}
    others = {t: RUNS / seed / f"temperature-{t}" for t in TEMPERATURES}
    if all((directory / "report.json").exists() for directory in others.values()):
        by_temperature = {"0.8": of_sixteen(solutions, verifications)}
        for t, directory in others.items():
            by_temperature[t] = of_sixteen(solutions, records.read(directory / "verifications.jsonl", ["id"]))
    files = {"1": SINGLE / seed / "single-prm_cot.jsonl", "16": claims / "processbench.jsonl"}
    files |= {N: RUNS / seed / f"votes-{N}" / "processbench.jsonl" for N in ("2", "4", "8", "32")}
    f1 = {N: read_results(file)["f1"]["value"] for N, file in files.items() if file.exists()}
    first = {r["solution_id"]: r for r in reversed(keep_parsed(verifications))}
    rounds = {}
    for file in sorted((RUNS / seed).glob("rounds-*/labels_meta_critique.jsonl")):
        directory, labels = file.parent, [r for r in records.read(file, ["id"]) if r["dropped"] is None]
        right = [count_right(r["step_labels"], r["outcome"], gold[r["id"]])[0, EXACT] for r in labels]
        one = [first[r["id"]] for r in labels]
        base = [count_right(r["step_verdicts"], r["verdict"], gold[r["solution_id"]])[0, EXACT] for r in one]
        tokens = sum(r["tokens"] for r in records.read(directory / "critiques.jsonl", ["tokens"]))
        tokens += sum(r["tokens"] for r in verifications if r["sample"] == 0)
        of = {
            "right": float(np.mean(right)),
            "first verification": float(np.mean(base)),
            "kept": len(labels) / len(solutions),
        }
        rounds[directory.name[-1]] = {"tokens": tokens, **of}
    return {
        "seed": int(seed),
        "votes": votes,
        "by_steps": by_steps,
        "by_temperature": by_temperature,
        "f1": f1,
        "rounds": rounds,
    }


def print_tables(records: list[dict]) -> None:
    """By N, by rounds, by number of steps, by temperature."""
    print(f"{len(records)} seeds; mean ± half the 95 % interval over seeds, in percent")
    print("| verifications | tokens | " + " | ".join(METHODS) + " | PRM-CoT, F1 |\n|---|---|---|---|---|---|")
    for N in records[0]["votes"]["single"]:
        tokens = np.mean([r["votes"]["single"][N][0] for r in records])
        cells = [over_seeds([r["votes"][method][N][1] for r in records]) for method in METHODS]
        f1 = [r["f1"][N] for r in records if N in r["f1"]]
        cells.append(over_seeds(f1) if f1 else "not run")
        print(f"| {N} | {tokens / 1000:,.0f}k | {' | '.join(cells)} |")
    with_rounds = [r for r in records if len(r["rounds"]) == 3]
    if with_rounds:
        print(
            f"\n{len(with_rounds)} seeds\n| rounds | tokens | kept | right, of the kept | their first verification | gain |"
        )
        print("|---|---|---|---|---|---|")
        for n in "123":
            found = [r["rounds"][n] for r in with_rounds]
            gain = [x["right"] - x["first verification"] for x in found]
            cells = [f"{np.mean([x['tokens'] for x in found]) / 1000:,.0f}k"]
            cells += [over_seeds([x[key] for x in found]) for key in ("kept", "right", "first verification")] + [
                over_seeds(gain)
            ]
            print(f"| {n} | {' | '.join(cells)} |")
    for title, key in (("steps", "by_steps"), ("temperature", "by_temperature")):
        having = [r[key] for r in records if r[key]]
        if not having:
            continue
        print(
            f"\n{len(having)} seeds\n| {title} | solutions | {' | '.join(METHODS)} | step minus outcome |\n|---|---|---|---|---|---|"
        )
        for name in sorted(having[0]):
            found = [x[name] for x in having]
            gain = [x["step_consistency"] - x["outcome_consistency"] for x in found]
            cells = [f"{np.mean([x['solutions'] for x in found]):.0f}"]
            cells += [over_seeds([x[m] for x in found]) for m in METHODS]
            print(f"| {name} | {' | '.join(cells)} | {over_seeds(gain, '+')} |")


def make_curves(records: list[dict]) -> list[dict]:
    """Right label vectors, and F1 of what learns from them, by tokens, of each seed; the tokens of a point are their
    mean over seeds."""
    axes = {"panel": "whole label vectors right, %", "xscale": "log", "xlabel": "tokens for 800 solutions"}
    curves = []
    for method in METHODS:
        found = np.array([list(r["votes"][method].values()) for r in records])  # (seeds, N, tokens and share)
        for r, share in zip(records, found[:, :, 1], strict=True):
            points = {"x": found[:, :, 0].mean(0).round().tolist(), "y": (100 * share).round(2).tolist()}
            curve = {"seed": r["seed"], "curve": method.replace("_", " "), **points, **axes}
            curves.append(curve)
            if method == "step_consistency":
                f1 = [round(100 * r["f1"][N], 2) for N in r["votes"][method]]
                curves.append({**curve, "y": f1, "panel": "F1 of the PRM-CoT from these labels, %", "ylim": [70, 90]})
    with_rounds = [r for r in records if len(r["rounds"]) == 3]
    for r in with_rounds:
        x = [round(np.mean([other["rounds"][n]["tokens"] for other in with_rounds])) for n in "123"]
        points = {"x": x, "y": [round(100 * r["rounds"][n]["right"], 2) for n in "123"]}
        curves.append({"seed": r["seed"], "curve": "critique, 1 to 3 rounds (of the kept)", **points, **axes})
    return curves


def main() -> None:
    """Collect if asked to; print the tables."""
    path = HERE / "compute.jsonl"
    if "--collect" in sys.argv[1:]:
        rows = replace_seeds(path, [collect(seed) for seed in find_seeds(RUNS, "votes-32/processbench.jsonl")])
        records.write_lines(HERE / "compute_curves.jsonl", make_curves(rows))
    print_tables(records.read(path, ["seed"]))


if __name__ == "__main__":
    distributed.run_stage(main)
