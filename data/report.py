"""Drawing and printing: tables, curves, and one problem's way through the stages on the terminal.

The numbers are computed elsewhere; here they become text and pictures.
"""

import math
import os
import re
import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from data import records
from kernels import distributed
from kernels.distributed import InputError

import numpy as np

# --------------------------------------------------------------------------- tables


def percent(value: float | None, interval: tuple[float, float] | None = None) -> str:
    """A fraction as tables show it: 61.2, or 61.2 [58.0, 64.1]; a dash for None."""
    if value is None:
        return "-"
    text = f"{100 * value:.1f}"
    if interval:
        low, high = interval
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text


def print_table(header: list[str], rows: list[list]) -> None:
    """Print aligned columns, on rank 0."""
    cells = [header]
    for row in rows:
        cells.append([str(cell) for cell in row])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        distributed.log("  ".join(padded).rstrip())


def print_results(rows: list[dict]) -> None:
    """The rows of a results file as a table: a line for each model, benchmark and subset, a column for each metric."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    lines: dict[tuple, dict[str, dict]] = {}  # (model, benchmark, subset) -> metric -> row
    for row in rows:
        name = (row["settings"]["model"], row["benchmark"], row["subset"])
        lines.setdefault(name, {})[row["metric"]] = row
    table = []
    for name, line in lines.items():
        cells = []
        for metric in metrics:
            row = line.get(metric, {"value": None, "interval": None})
            cells.append(percent(row["value"], row["interval"]))
        first = next(iter(line.values()))  # these three are the same in all rows of a line
        table.append([*name, first["n"], *cells, first["tokens"], first["seconds"]])
    print_table(["model", "benchmark", "subset", "n", *metrics, "tokens", "seconds"], table)


BENCHMARK_METRICS = """metrics, each with its 95 % interval over problems in brackets:

  avg@k          mean accuracy
  pass@j         one of j is right
  maj@k          the most frequent answer is right
  greedy         the greedy solution is right (--greedy)
  best@j/RULE    the one of j that a reward model chooses is right (--prm); the RULE is the best
                 outcome score (verdict), mean step score (mean), worst step's score (min), or
                 sum of outcome scores over equal answers (vote)
  unparsed       judgements without a verdict (--prm)
  unknown        answers that can't be graded
  truncated      solutions cut off at the limit of tokens
  too_long       problems left out because their prompts fill the context, if any
  shortened      problems with a lower limit of new tokens, which the context leaves, if any
"""


def print_label_report(rows: list[dict], metrics: tuple[str, ...]) -> None:
    """The label report as a table: accuracy over all labels, then yield and accuracy of the kept ones, gain and
    cost."""
    table = []
    for row in rows:
        kept = row["kept"]
        everything = row["all"]
        cells = [row["method"], row["N"] or "", everything["solutions"]]
        cells += [percent(everything[metric]) for metric in metrics]
        cells += [percent(kept["yield"]), percent(kept["exact"])]
        gains = everything.get("minus_single", {})
        for metric in ("step", "exact"):
            gain = ""
            if metric in gains:
                difference, low, high = gains[metric]
                gain = percent(difference, (low, high))
            cells.append(gain)
        cells.append(", ".join(f"{reason} {count}" for reason, count in row["dropped"].items()))
        cells += [row.get("unparsed", ""), row["tokens"]]
        table.append(cells)
    header = ["method", "N", "solutions", *metrics, "yield", "exact of kept", "step - single", "exact - single"]
    print_table([*header, "dropped", "unparsed", "tokens"], table)


# --------------------------------------------------------------------------- curves

# Key in metrics.jsonl -> title. The last eight show a policy that games its reward, or a sampler unlike the trainer.
PANELS = {
    "reward/mean": "reward",
    "heldout/accuracy": "held-out accuracy",
    "format/valid": "valid format",
    "response/steps": "steps per response",
    "response/length": "tokens per response",
    "kl/k3": "KL from the initial policy (k3)",
    "format/boxes": "boxes per response",
    "format/text_after_answer": "text after the answer",
    "format/hidden_text": "text that the judge doesn't see",
    "format/empty_boxes": "empty boxes per response",
    "reward/count_mismatch": "verdicts for another number of steps",
    "heldout/reward_minus_accuracy": "held-out reward minus accuracy",
    "format/answers": "answers per response",
    "gap/mean": "sampler against trainer, nats a token",
}
# The panels of fractions: their axes show all of 0 to 1.
FRACTIONS = {PANELS[key] for key in ("reward/mean", "heldout/accuracy", "format/valid", "format/hidden_text",
             "format/text_after_answer", "reward/count_mismatch")}  # fmt: skip
AVERAGED = 10  # steps: a metric of single steps is drawn as the mean of the last ten
AXES = ("xlabel", "ylabel", "ylim", "xscale")  # settings of its panel that a curve may bring along
COLOURS = 10  # of Matplotlib's cycle


def read_metrics(run: str) -> dict[str, dict[int, float]]:
    """key -> {step: value} from a run's metrics.jsonl, in order; if a step was repeated, its last record counts."""
    by_step = {}
    for record in records.read_metrics(Path(run) / "metrics.jsonl", "python grpo.py"):
        by_step[record["step"]] = record
    metrics: dict[str, dict[int, float]] = {}
    for step in sorted(by_step):
        for key, value in by_step[step].items():
            metrics.setdefault(key, {})[step] = value
    return metrics


def run_curves(run: str, name: str, keys: list[str]) -> list[dict]:
    """A run's metrics as curves of this name, each in the panel of its key; accuracies come with their interval."""
    metrics = read_metrics(run)
    curves = []
    for key in keys:
        if key not in metrics:
            continue
        points = metrics[key]
        curve = {"panel": PANELS.get(key, key), "curve": name, "x": list(points), "y": list(points.values())}
        curve["smooth"] = not key.startswith("heldout/") and len(points) >= 3 * AVERAGED
        if key == "heldout/accuracy":
            for end in ("low", "high"):
                known = metrics.get(f"heldout/{end}", {})
                curve[end] = [known.get(step, value) for step, value in points.items()]
        curves.append(curve)
    return curves


def read_curves(patterns: list[str], keys: list[str]) -> list[dict]:
    """The curves of files of curves and of runs; all runs that a pattern finds have its name, as seeds of one. Raises
    InputError if there are none."""
    curves = []
    for pattern in patterns:
        for run in sorted(glob(pattern)) or [pattern]:
            if run.endswith(".jsonl"):
                curves += records.read(run, ["panel", "curve", "x", "y"], optional=("low", "high", "ylim"))
            else:
                curves += run_curves(run, pattern, keys)
    if not curves:
        raise InputError(f"--keys {' '.join(keys)}: {' '.join(patterns)} have none of them; name others")
    return curves


def label_curves(rows: list[dict]) -> list[dict]:
    """The label report as curves: accuracy against the tokens spent, a curve for each method."""
    panel = {"panel": "solutions labelled right in every step, percent", "xscale": "log"}
    panel["xlabel"] = "tokens of verifications and critiques"
    curves: dict[str, dict] = {}
    for row in rows:
        if row["all"]["exact"] is not None:
            curve = curves.setdefault(row["method"], {**panel, "curve": row["method"], "x": [], "y": []})
            curve["x"].append(row["tokens"])
            curve["y"].append(100 * row["all"]["exact"])
    return list(curves.values())


def draw_curves(curves: list[dict], out: Path) -> None:
    """Draw a panel for each `panel`, in it a line for each `curve`, through the points `x`, `y`.

    Curves of one name in one panel are seeds: the line is their mean at the points that all have, with a band from the
    lowest to the highest. A single curve has its own band, `low` to `high`, if any. A curve with `right` uses the
    right-hand axis. It may also bring settings of its panel: AXES. Without curves nothing is drawn.
    """
    if not curves:
        return
    from matplotlib.figure import Figure  # a Figure by itself draws with Agg: no display, no global state

    # 1. Sort the curves: title of the panel -> name -> its seeds.
    panels: dict[str, dict[str, list[dict]]] = {}
    for curve in curves:
        named = panels.setdefault(curve["panel"], {})
        named.setdefault(curve["curve"], []).append(curve)
    names = list(dict.fromkeys(curve["curve"] for curve in curves))

    # 2. Lay out the panels as a square, or nearly.
    across = math.ceil(math.sqrt(len(panels)))
    down = math.ceil(len(panels) / across)
    width = max(6, 4.2 * across)
    height = max(4, 3.0 * down) + 0.07 * len(names)  # the legend grows with the names
    figure = Figure(figsize=(width, height), layout="constrained")

    # 3. Draw them. A name has the same colour in all panels; after ten the colours repeat, dashed.
    lines = {}
    for place, (title, named) in enumerate(panels.items(), 1):
        left = figure.add_subplot(down, across, place, xlabel="step")
        left.set_title(title, fontsize=10, parse_math=False)  # a $ in a name is a dollar and begins no formula
        left.grid(alpha=0.3)
        right = None
        for name, seeds in named.items():
            number = names.index(name)
            axes = left
            style = "-" if number < COLOURS else "--"
            if seeds[0].get("right"):
                right = right or left.twinx()
                axes = right
                style = ":"
            lines[name] = draw_seeds(axes, seeds, style, f"C{number}")
        if title in FRACTIONS:
            low, high = left.get_ylim()
            left.set_ylim(min(low, 0), max(high, 1))  # a rise of a point must not fill the panel

    legend = figure.legend(lines.values(), lines, loc="outside lower center", ncols=min(3, across + 1))
    for text in legend.get_texts():
        text.set_parse_math(False)
    save_figure(figure, out)


def draw_seeds(axes, seeds: list[dict], style: str, colour: str):
    """Draw the mean of some seeds' curves and their band; returns the line."""
    first = seeds[0]
    try:
        axes.set(**{key: first[key] for key in AXES if key in first})
    except (ValueError, TypeError, AttributeError) as error:  # Matplotlib knows what these may be
        raise InputError(f"curve {first['curve']}: {', '.join(AXES)} can't be set ({error}); fix its record") from None
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_parse_math(False)

    # 1. The points that all seeds have.
    points = [dict(zip(seed["x"], seed["y"], strict=True)) for seed in seeds]
    x = list(points[0])
    for others in points:
        x = [at for at in x if at in others]
    y = np.empty((len(seeds), len(x)))
    for row, values in zip(y, points, strict=True):
        row[:] = [values[at] for at in x]

    # 2. What jumps from step to step is shown as a moving average, with the steps themselves behind it.
    if first.get("smooth"):
        axes.plot(x, y.mean(axis=0), style, color=colour, alpha=0.3, linewidth=0.7)
        y = np.array([moving_average(row) for row in y])

    # 3. The band: from the lowest seed to the highest, or that of the only one.
    low = y.min(axis=0)
    high = y.max(axis=0)
    if len(seeds) == 1:
        low = first.get("low", low)
        high = first.get("high", high)

    # 4. Few points are marked: a single one would be invisible.
    marker = ""
    if len(x) == 1:
        marker = "s"
    elif len(x) < 30:
        marker = "."
    (line,) = axes.plot(x, y.mean(axis=0), style, color=colour, marker=marker)
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    return line


def moving_average(values: Sequence[float]) -> list[float]:
    """Each value as the mean of the last AVERAGED, itself included; the first ones of fewer."""
    averages = []
    for end in range(1, len(values) + 1):
        last = values[max(0, end - AVERAGED) : end]
        averages.append(sum(last) / len(last))
    return averages


def save_figure(figure, out: Path) -> None:
    """Write a figure in the format of its name, one of `records.FORMATS`, whole or not at all."""
    out = records.follow_link(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    figure.savefig(temporary, format=out.suffix.lower().removeprefix("."), dpi=120)
    temporary.replace(out)


# --------------------------------------------------------------------------- one problem


# What a terminal obeys instead of showing it: control characters but for tab and newline, and changes of direction.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Somebody's text as it can go to a terminal: "\x1b[8m", which would hide what follows, is shown, not obeyed."""
    return CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def paint(text: str, right: bool | None) -> str:
    """On a terminal, green for right and red for wrong."""
    text = printable(text)
    if right is None or not sys.stdout.isatty():
        return text
    colour = 32 if right else 31
    return f"\033[{colour}m{text}\033[0m"


def read_problem(name: str | None, labels: str, rollouts: str | None) -> tuple[list[dict], list[tuple[int, dict]]]:
    """(its labels, its responses of GRPO) of the problem or solution of this name; None: of the first problem. labels:
    a file of verify.py; rollouts: see `read_rollouts`. Raises InputError if neither has anything."""
    fields = ["id", "problem", "steps", "answer", "method", "step_labels", "outcome", "text", "votes", "dropped"]
    everything = records.read(labels, fields, "python verify.py")
    name = name or records.problem_of(everything[0]["id"])
    found = [label for label in everything if name in (label["id"], records.problem_of(label["id"]))]
    responses = read_rollouts(Path(rollouts), name) if rollouts else []
    if not found and not responses:
        raise InputError(f"{name}: no such problem or solution in {labels}, nor in --rollouts {rollouts}")
    return found, responses


def read_rollouts(directory: Path, problem_id: str) -> list[tuple[int, dict]]:
    """(step, response) of the responses to a problem in files that grpo.py --dump_rollouts wrote."""
    fields = ["problem_id", "text", "ids", "finish", "valid", "reward", "advantage", "judgement"]
    rollouts = []
    for step, path in find_rollouts(directory).items():
        for response in records.read(path, fields):
            if response["problem_id"] == problem_id:
                rollouts.append((step, response))
    return rollouts


def find_rollouts(directory: Path) -> dict[int, Path]:
    """step -> its file of responses. Raises InputError if there are none, or if one is not named by its step."""
    paths = {}
    for path in sorted(directory.glob("step_*.jsonl")):
        number = path.stem.removeprefix("step_")
        if not number.isdecimal():
            raise InputError(f"{path}: not named by its step, such as step_0000001.jsonl; rename or remove it")
        paths[int(number)] = path
    if not paths:
        raise InputError(f"{directory}: no responses of GRPO there; python grpo.py --dump_rollouts writes them")
    return paths


def count_outcome_votes(label: dict, voters: list[dict]) -> tuple[int, int] | None:
    """(correct, incorrect): the verdicts of a solution's parsed verifications; None if its label isn't their vote."""
    verdicts = [voter["verdict"] for voter in voters if voter["solution_id"] == label["id"]]
    # Each step has as many votes as voters. Another number than that of these verifications means that the label comes
    # from one of them (single), or from others (reference_guided).
    if not label["votes"] or sum(label["votes"][0]) != len(verdicts):
        return None
    return sum(verdicts), len(verdicts) - sum(verdicts)


def show_label(label: dict, outcome_votes: tuple[int, int] | None = None) -> str:
    """A solution with the votes on its steps and, if they are known, on its answer; the label, and the verification
    that was chosen for it."""
    lines = [printable(f"--- {label['id']}, {label['method']}: {label['dropped'] or 'kept'}")]
    for k, step in enumerate(label["steps"]):
        text = f"Step {k + 1}: {step}"
        if label["votes"]:
            correct, incorrect = label["votes"][k]
            text += f"   [{correct} correct, {incorrect} incorrect]"
        right = label["step_labels"][k] if label["step_labels"] else None
        lines.append(paint(text, right))
    judged = f"judged {label['outcome']}"
    if outcome_votes:
        correct, incorrect = outcome_votes
        judged += f": {correct} correct, {incorrect} incorrect"
    lines.append(paint(f"Answer: {label['answer']}   [{judged}]", label["outcome"]))
    if label["text"]:
        lines += ["", printable(label["text"])]
    return "\n".join(lines)


def show_rollout(rollout: dict) -> str:
    """A response of GRPO with its judgement, reward and advantage, from a record of grpo.py --dump_rollouts."""
    judgement = rollout["judgement"] or {"verdict": None, "text": "(not judged)"}
    head = (
        f"--- {len(rollout['ids'])} tokens, {rollout['finish']}, format {'valid' if rollout['valid'] else 'invalid'}, "
        f"reward {rollout['reward']:.2f}, advantage {rollout['advantage']:+.2f}, judged {judgement['verdict']}"
    )
    return "\n".join([paint(head, rollout["reward"] > 0), printable(f"{rollout['text']}\n\n{judgement['text']}")])


def print_step(bar, metrics: dict, rollouts: list, advantages: Sequence, tokenizer, sample_every: int) -> None:
    """What grpo.py prints of a step: a warning if no response can be rewarded, the first response of every
    sample_every steps, and two metrics behind the progress bar."""
    step = metrics["step"]
    if metrics["reward/unparsed"] == 1:  # so the update is noise
        texts = [r.judgement.text for r in rollouts if r.judgement is not None]
        bar.write(f"warning: step {step}: not one of {len(texts)} judgements has a verdict; check --prm, --prm_kind and "
                  f"--prm_max_new_tokens; the first one: {texts[0][:200]!r}")  # fmt: skip
    if (step - 1) % sample_every == 0:
        first = records.describe_rollout(rollouts[0], float(advantages[0]), tokenizer)
        bar.write(f"--- step {step} · {printable(rollouts[0].problem)}\n{show_rollout(first)}")
    bar.set_postfix({"reward": metrics["reward/mean"], "valid": metrics["format/valid"]}, refresh=False)


def print_problem(labels: list[dict], voters: list[dict], rollouts: list[tuple[int, dict]]) -> None:
    """Print a problem's labelled solutions, then GRPO's (step, response) pairs. voters: parsed verifications."""
    parts = []
    if labels:
        parts.append(printable(labels[0]["problem"]))
    for label in labels:
        parts.append("\n" + show_label(label, count_outcome_votes(label, voters)))
    for step, rollout in rollouts:
        parts.append(f"\nGRPO step {step}\n" + show_rollout(rollout))
    try:
        print("\n".join(parts), flush=True)
    except BrokenPipeError:  # the reader has seen enough, as in `show | head`
        os._exit(0)  # at an ordinary exit Python would flush once more, and complain
