"""Drawing, and nothing else: tables, curves, and one problem's way through the stages on the terminal.

What is drawn is computed elsewhere; here it becomes text and pictures.
"""

import math
import os
import sys
from pathlib import Path

from data import records
from kernels import distributed

import numpy as np

# --------------------------------------------------------------------------- tables


def percent(value: float | None, low_high: tuple[float, float] | None = None) -> str:
    """A fraction as tables show it: 61.2, or 61.2 [58.0, 64.1]; a dash for None."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" [{100 * low_high[0]:.1f}, {100 * low_high[1]:.1f}]" if low_high else "")


def print_table(header: list[str], rows: list[list]) -> None:
    """Print aligned columns, on rank 0."""
    cells = [header] + [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        distributed.log("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# --------------------------------------------------------------------------- curves

PANELS = {  # key in metrics.jsonl -> title; the last six show a policy that games its reward, or a sampler that differs
    "reward/mean": "reward",
    "heldout/accuracy": "held-out accuracy",
    "format/valid": "valid format",
    "response/steps": "steps per response",
    "response/length": "tokens per response",
    "kl/k3": "KL from the initial policy (k3)",
    "format/boxes": "boxes per response",
    "format/text_after_answer": "text after the answer",
    "reward/count_mismatch": "verdicts for another number of steps",
    "heldout/reward_minus_accuracy": "held-out reward minus accuracy",
    "format/answers": "answers per response",
    "gap/mean": "sampler against trainer, nats a token",
}
AXES = ("xlabel", "ylabel", "ylim", "xscale")


def read_metrics(run: str) -> dict[str, dict[int, float]]:
    """key -> {step: value}, in order, from a run's metrics.jsonl; of a step that was done again the last counts."""
    by_step = {r["step"]: r for r in records.read(Path(run) / "metrics.jsonl", ["step"], "python grpo.py")}
    curves: dict[str, dict[int, float]] = {}
    for step in sorted(by_step):
        for key, value in by_step[step].items():
            curves.setdefault(key, {})[step] = value
    return curves


def run_curves(run: str, name: str, keys: list[str]) -> list[dict]:
    """A run's metrics as curves of this name, each in the panel of its key; accuracies with their interval."""
    metrics, curves = read_metrics(run), []
    for key in keys:
        points = metrics.get(key, {})
        curve: dict = {"panel": PANELS.get(key, key), "curve": name, "x": list(points), "y": list(points.values())}
        if key == "heldout/accuracy":
            for end in ("low", "high"):
                found = metrics.get(f"heldout/{end}", {})
                curve[end] = [found.get(step, value) for step, value in points.items()]
        curves += [curve] if points else []
    return curves


def draw_curves(curves: list[dict], out: Path) -> None:
    """A panel for each `panel`, a colour for each `curve`, of points `x`, `y`.

    Curves of one name in one panel are seeds: what is drawn is their mean at the points that all have, and a band from
    the least to the greatest. A curve alone has its own band, `low` to `high`, if any. One that is `right` has its axis
    there. What else it may bring are settings of its panel: AXES.
    """
    from matplotlib.figure import Figure  # a Figure by itself draws with Agg: no display, no global state

    panels: dict[str, dict[str, list[dict]]] = {}
    for curve in curves:
        panels.setdefault(curve["panel"], {}).setdefault(curve["curve"], []).append(curve)
    names = list(dict.fromkeys(curve["curve"] for curve in curves))
    across = math.ceil(len(panels) ** 0.5)
    down, lines = -(-len(panels) // across), {}
    figure = Figure(figsize=(max(6, 4.2 * across), max(4, 3.0 * down) + 0.07 * len(names)), layout="constrained")
    for place, (title, inside) in enumerate(panels.items(), 1):
        left = figure.add_subplot(down, across, place, xlabel="step")
        left.set_title(title, fontsize=10)
        left.grid(alpha=0.3)
        right = left.twinx() if any(seeds[0].get("right") for seeds in inside.values()) else None
        for name, seeds in inside.items():
            first = seeds[0]
            number = names.index(name)  # colours repeat after ten
            axes, style = (right, ":") if first.get("right") else (left, "-" if number < 10 else "--")
            axes.set(**{key: first[key] for key in AXES if key in first})
            points = [dict(zip(curve["x"], curve["y"], strict=True)) for curve in seeds]
            x = [at for at in points[0] if all(at in others for others in points)]
            y = np.array([[own[at] for at in x] for own in points], float)  # (seeds, points)
            low, high = (y.min(0), y.max(0)) if len(seeds) > 1 else (first.get(end, y[0]) for end in ("low", "high"))
            colour, marker = f"C{number}", "s" if len(x) == 1 else "." if len(x) < 30 else ""
            (lines[name],) = axes.plot(x, y.mean(0), style, color=colour, marker=marker)
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=min(3, across + 1))
    save_figure(figure, out)


def save_figure(figure, out: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(out)


# --------------------------------------------------------------------------- one problem


def paint(text: str, right: bool | None) -> str:
    """Green for right and red for wrong, on a terminal."""
    return text if right is None or not sys.stdout.isatty() else f"\033[{32 if right else 31}m{text}\033[0m"


def show_label(label: dict) -> str:
    """A solution with the votes on its steps, the label, and the verification that was chosen for it."""
    votes, labels = label["votes"] or [None] * len(label["steps"]), label["step_labels"] or [None] * len(label["steps"])
    lines = [f"--- {label['id']}, {label['method']}: " + (label["dropped"] or "kept")]
    for k, (step, vote, right) in enumerate(zip(label["steps"], votes, labels, strict=True), 1):
        count = f"   [{vote[0]} correct, {vote[1]} incorrect]" if vote else ""
        lines.append(paint(f"Step {k}: {step}{count}", right))
    lines.append(paint(f"Answer: {label['answer']}   [judged {label['outcome']}]", label["outcome"]))
    return "\n".join(lines) + (f"\n\n{label['text']}" if label["text"] else "")


def show_rollout(rollout: dict) -> str:
    """A response of GRPO with its judgement, reward and advantage, from what grpo.py --dump_rollouts writes."""
    judgement, form = rollout["judgement"] or {}, "valid" if rollout["valid"] else "invalid"
    numbers = (
        f"reward {rollout['reward']:.2f}, advantage {rollout['advantage']:+.2f}, judged {judgement.get('verdict')}"
    )
    head = f"--- {len(rollout['ids'])} tokens, {rollout['finish']}, format {form}, {numbers}"
    return "\n".join([paint(head, rollout["reward"] > 0), rollout["text"], "", judgement.get("text", "(not judged)")])
