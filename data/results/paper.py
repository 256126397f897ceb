"""The paper's ledger: writes paper.md, where each row of the paper's tables and figures stands beside our command for
it at full scale and our number on the tiny world, which is read from the raw rows of the studies.

    python -m data.results.paper

A number of the paper that no source gives reliably is "not recovered". Where this folder's README says, at the top or
in a study's section, that numbers are from the "earlier world", the study's numbers here get a mark.
"""

import re
from pathlib import Path

from data import records
from data.results.claims import over_seeds
from data.results.hacking import NAMES as HACKING_RUNS
from data.results.hacking import show
from data.results.rewards import NAMES as REWARD_RUNS
from kernels import distributed

HERE = Path(__file__).parent
SECTIONS = {  # study -> its section in README.md
    "claims": "The claims",
    "methods": "Verification methods",
    "rewards": "Which reward",
    "hacking": "Reward hacking",
}
UNKNOWN = "not recovered"
NO_FLAG = "**no flag**"

PAGE = """# The paper's ledger

Each row of the paper's tables and figures (arXiv 2512.03244v1) that is known to us, with our command at full scale
and our number on the tiny world. Nothing here was run at full scale. `python -m data.results.paper` writes this page.

The commands are in [paper/](paper), each file to be run whole, in this order: [data.sh](paper/data.sh),
[stage1.sh](paper/stage1.sh), [stage2.sh](paper/stage2.sh), [processbench.sh](paper/processbench.sh),
[grpo.sh](paper/grpo.sh), [benchmarks.sh](paper/benchmarks.sh), [hacking.sh](paper/hacking.sh); what they share is in
[settings.sh](paper/settings.sh). The tokens that a command samples at most stand above it.
`python -m pytest -m slow tests/test_paper.py` tries every command on small stand-ins.

- *Paper*: "not recovered" is a number that no source gives reliably; whether the paper has that row or cell isn't known
  then, either. [^c] marks numbers from a single secondary source.
- *Command*: the file, and what in it makes the row. `METHODS=single` stands before `bash`; without it all methods run.
  **no flag** means that the code here can't run the row.
- *Tiny world*: percent, means over seeds ± half the 95 % interval. Its problems and models are its own, so its numbers
  compare with each other, not with the paper's. "not run" would be possible; "not comparable" would mean nothing; "-"
  isn't possible with the code here.

Where this code does something in another way than the paper or its released code, [differences from the
paper](../README.md#differences-from-the-paper) gives the reason; the footnotes repeat what bears on a row.
{mark}
## Data and set-up (Sections 3.1, 4.2)

{data}
## Reward models on ProcessBench (Table 2, Figure 3)

The paper's claim is that step consistency is the best way of labelling. [^sft] and [^judge] hold for all of its reward
models. Values by subset are not recovered because the only copy of them is out of line: its rows don't average to
their last cells. Those of other people's judges are in the ProcessBench paper (arXiv 2412.06559).

{processbench}
67.5 isn't the top. Reward models that were trained on labels of stronger models, from the table in GenPRM's paper
(arXiv 2504.00891), and two critics from the ProcessBench paper. None of them was run here (**no flag**: other heads,
prompts and parsers):

{anchors}
## Policies on six benchmarks (the main table of RL)

[^checkpoint], [^decoding] and, for the policies trained here, [^policy] hold for every row; each is a single run.
`grpo.sh` trains the policies, `benchmarks.sh` measures all of them at once. Most of the paper's cells are presumably
greedy. The tiny policy before RL is the shipped one, which `--kind policy` hasn't made.

{benchmarks}
## Curves of RL (Figures 4 to 7)

The paper's values in Figures 5 and 6 are means of MATH-500, AIME24 and AIME25, one greedy sample each; this follows
from their fractions. [^policy] holds for all. The tiny world's are from before the first and after the last of {steps}
steps, at temperature 1; its rewards are those of the first and the last step.

{figures}
## Reward hacking (Section 4.4)

The paper names three patterns; no numbers of them were recovered. The tiny world's are shares of the responses:
*appended* ones have more than one `<answer>`, *inflated* ones more steps than the canonical solution, *reduced* ones at
most one step.

{hacking}
The first table has the run with the paper's cause of the pattern, the second the runs to compare it with: the weak
policy of [hacking.sh](hacking.sh), means (least to greatest) of {hacking_seeds} seeds. The lenient judge is a PRM-CoT
that has learnt to overlook errors when a right solution of another problem follows.

{hacking_runs}
## What is not published

[^c]: One secondary source. Its cells for SPARK and RLVR average to their means, two of which (47.4 and 43.9) are in the
abstract, too.

[^problems]: Which 8,000 ("mixed difficulty") and 17,000 problems of Skywork-OR1 were chosen, how, and whether they
overlap. Here the order of a shuffled file decides, and the problems of all benchmarks are left out; a problem that the
set has twice may be among both.

[^names]: What the paper's Qwen-3-32B-Instruct is: no model has that name. The released code's is qwen3-32b, with
thinking on.

[^release]: The released scripts differ from the paper, and from each other: 20 solutions per problem in one; 8 or 16
verifications with the reference answer; a temperature of 0.8, or of 0.7 in the README, for verifications. Its solutions
are numbered prose, those here have tags. Whether the server also cut off the sampling (top_k), as Qwen3's own settings
do, isn't known.

[^filter]: What was filtered out. 8,000 x 8 solutions are 64,000, so about 1,000 were lost; solutions with no
verification that agrees with the vote, or none that parses, would account for that.

[^balance]: Whether the paper's solutions were chosen like that. `--solutions runs/paper/balanced.jsonl` and an `--out`
of its own, in the commands of `stage1.sh`, label these.

[^labels]: The released code compares outcomes, and "all steps correct", with the answers; the reviewers miss the
numbers. At full scale the gold is answers, so `evaluate.py labels` prints outcomes alone; the tiny world's gold has
steps, too.

[^sft]: Learning rate, epochs, batch, length, LoRA or all weights, masking. `stage2.sh` has ours.

[^choice]: Which verification becomes the label where several were sampled (with the reference answer 8 or 16). Here one
is sampled, and a solution whose one doesn't parse is dropped.

[^vote]: Ties, verifications of another number of steps, whether the chosen text must also have the voted verdict, and
which of several texts that agree with the vote is taken. Here a tie counts as incorrect, such verifications don't vote,
the verdict must be the voted one, and a seeded choice decides.

[^hybrid]: Whether the critique is of what outcome consistency chose (README of the release) or of what step
consistency chose (its configuration). Both are here.

[^judge]: Layout of the steps, decoding, number of judgements, and what a missing label counts. Here one greedy
judgement; one that doesn't parse is wrong.

[^orm]: How an ORM, which names no step, is scored on ProcessBench, if it is. Here by the accuracy of its verdict, no
F1.

[^policy]: The prompt of RL, and the recipe of the format SFT. By deduction it is RL-Tango's: the 113,000 problems, of
Eurus-2-SFT-Data, solved by Llama-3.1-70B-Instruct; two epochs of 90 % of them in batches of 64 are the 3,190 steps of
the released script's checkpoint. `--kind policy` learns from solutions that the vote accepts; no flag for other
solutions, for a 70B generator, which no single GPU has memory for, or for training without a chat template.

[^checkpoint]: The step of the checkpoints. The PRM-CoT's row of the table is from another one than Figures 5 and 6.
According to a reviewer, earlier checkpoints of the ORM's run are considerably better than that of step 300. Here step 300;
`--steps 150`, a measurement, and then `--steps 300` with the same `--out` give both. 25 epochs are `--steps 1650`.

[^decoding]: Decoding and number of samples. Most cells are fractions that one sample gives; AMC23's are averages of
at least 8, and RLVR's 83.7 can't be one sample of 500. `benchmarks.sh` measures greedily and with 16 samples.

[^public]: This model isn't among those of `benchmarks.sh`, but a checkpoint of its size and architecture can be: its
hub name in `models`. It would get the prompt of the policies here.

[^design]: Which reward design the row has; presumably process-aware.

[^grading]: Published, but done in another way here: the released code applies math-verify to the whole output, and
compares votes with sympy; here the extracted answer is graded, and the grader compares votes.

[^prompt]: In the selective and the global design the released code sends the PRM-CoT the ORM's prompt. The paper's
numbers may contain that; there is no flag for it.

[^selective]: Where the numbers of steps and of verdicts differ, the released code's selective design puts verdicts on
wrong steps; and the penalty for a single step cancels itself. The paper's numbers may contain both; no flag for either.

[^bounds]: Where the number of steps is out of bounds, or isn't that of the verdicts, the released code's global design
zeroes the step part alone. Here the reward is 0 out of bounds, and process-aware where the numbers differ; no flag for
the other.

[^runs]: Settings and lengths of these runs, their curves, and how many responses were gamed.
"""
MARK = "† marks numbers that were made on an earlier tiny world.\n"

METHODS = {
    "single": "single verification",
    "outcome_consistency": "outcome consistency",
    "step_consistency": "step consistency",
    "meta_critique": "meta-critique",
    "hybrid": "hybrid, of step consistency",
    "hybrid_outcome": "hybrid, of outcome consistency",
    "reference_guided": "reference-guided",
}
METHOD_NOTES = {
    "single": "choice",
    "outcome_consistency": "vote",
    "step_consistency": "vote",
    "meta_critique": "choice",
    "hybrid": "vote hybrid",
    "hybrid_outcome": "vote hybrid",
    "reference_guided": "choice",
}
KINDS = {"orm": "ORM", "prm": "PRM", "prm_cot": "PRM-CoT"}
PROCESSBENCH = {  # (method, kind) -> the paper's average F1
    ("step_consistency", "prm"): "**67.5**",
    ("step_consistency", "prm_cot"): "65.7 [^c]",
    ("reference_guided", "prm"): "66.4",
}
POLICIES = [  # name, the paper's six cells and their mean, code in grpo.sh, run of the rewards study, notes
    ("Qwen2.5-Math-7B, the base", UNKNOWN, UNKNOWN, "", "", ""),
    ("after the format SFT", UNKNOWN, UNKNOWN, "", "start", ""),
    ("RLVR", "83.7 / 26.7 / 16.7 / 59.1 / 40.0 / 37.5 [^c]", "43.9", "--reward rlvr", "rlvr", "grading"),
    ("SPARK, ORM", UNKNOWN, UNKNOWN, "--prm_kind orm", "process_aware-orm", "design"),
    ("SPARK, PRM", "82.8 / 26.7 / 16.7 / 62.5 / 38.7 / 37.1 [^c]", "44.1 [^c]", "--prm_kind prm", "process_aware-prm",
     "design"),
    ("**SPARK, PRM-CoT**", "85.4 / 30.0 / 20.0 / 66.3 / 42.7 / 40.1 [^c]", "**47.4**", "/grpo/prm_cot", "process_aware",
     "design"),
    ("step-augmented", UNKNOWN, UNKNOWN, "--reward step_augmented", "step_augmented", ""),
    ("selective advantage", UNKNOWN, UNKNOWN, "--reward selective_advantage", "selective_advantage",
     "prompt selective"),
    ("global step-reward", UNKNOWN, UNKNOWN, "--reward global_step", "global_step", "prompt bounds"),
    ("self-consistency (TTRL)", UNKNOWN, UNKNOWN, "--reward majority", "majority", "grading"),
    ("random", UNKNOWN, UNKNOWN, "--reward random", "random", ""),
]  # fmt: skip
OTHER_POLICIES = [  # name, the paper's six cells and their mean, command, notes
    ("GPT-4o", "76.6 / 9.3 / - / 47.5 / 43.3 / 36.8 [^c]", "-", f"{NO_FLAG}: no open weights", ""),
    ("o1-preview", "85.5 / 44.6 / - / 90.0 / - / - [^c]", "-", f"{NO_FLAG}: no open weights", ""),
    ("Qwen2.5-Math-72B-Instruct", "82.6 / 23.3 / - / 70.0 / 49.0 / - [^c]", "-", f"{NO_FLAG}: more than one GPU's memory",
     ""),
    ("TANGO 7B", "82.4 / 26.7 / 23.3 / 70.0 / 45.3 / - [^c]", "-", "`benchmarks.sh` `models=`", "public"),
    ("PRIME 7B", "78.2 / 20.0 / 13.3 / 70.0 / 40.3 / 39.3 [^c]", "43.6 [^c] (its cells give 43.5)",
     "`benchmarks.sh` `models=`", "public"),
]  # fmt: skip
FIGURES = [  # figure, curve, the paper's number, code in grpo.sh, run of the rewards study, notes
    ("4", "test accuracy, PRM-CoT", f"above RLVR [^c]; values {UNKNOWN}", "/grpo/prm_cot", "process_aware", "design"),
    ("4", "test accuracy, RLVR", UNKNOWN, "--reward rlvr", "rlvr", "grading"),
    ("4", "test accuracy, random", f"no gain [^c]; values {UNKNOWN}", "--reward random", "random", ""),
    ("5", "step 300, PRM-CoT", "41.13 [^c]", "/grpo/prm_cot", "process_aware", ""),
    ("5", "step 300, PRM", "34.0 [^c]", "--prm_kind prm", "process_aware-prm", "design"),
    ("5", "step 300, ORM", "33.53 [^c]", "--prm_kind orm", "process_aware-orm", ""),
    ("6", "process-aware", "41.13 [^c]", "/grpo/prm_cot", "process_aware", ""),
    ("6", "selective advantage", "44.0 [^c]", "--reward selective_advantage", "selective_advantage",
     "prompt selective"),
    ("6", "step-augmented", UNKNOWN, "--reward step_augmented", "step_augmented", ""),
    ("6", "global step-reward", UNKNOWN, "--reward global_step", "global_step", "prompt bounds"),
]  # fmt: skip
CONTROLS = {  # runs of the hacking study -> reward, judge, format constraints
    "weak": "before RL",
    "weak-none": "process_aware, none",
    "weak-paper": "process_aware, paper",
    "weak-step_augmented": "step_augmented, paper",
    "weak-global_step": "global_step, paper",
    "weak-global_step-bounded": "global_step, paper, 3 to 20 steps",
    "lenient-none": "process_aware, lenient judge, none",
    "lenient-paper": "process_aware, lenient judge, paper",
}
HACKS = ("appended", "inflated", "reduced")


# --------------------------------------------------------------------------- cells


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def command(file: str, *code: str) -> str:
    """A shell file, and the code in it that makes the row."""
    return " ".join(f"`{part}`" for part in (file, *code))


def notes(names: str) -> str:
    """References to footnotes."""
    return " ".join(f"[^{name}]" for name in names.split())


def from_earlier_world(study: str, readme: str) -> bool:
    """Whether README.md says so, at the top of the page or in the study's section."""
    parts = re.split(r"^## ", readme, flags=re.MULTILINE)
    about = [part for part in parts[1:] if part.startswith(SECTIONS[study] + "\n")]
    return any("earlier world" in part for part in [parts[0], *about])


def from_first_to_last(seeds: list[list[float]]) -> str:
    """The first and the last value of a curve, over seeds."""
    return f"{over_seeds([y[0] for y in seeds])} → {over_seeds([y[-1] for y in seeds])}"


class Tiny:
    """The numbers of the tiny world as cells, from the raw rows of the studies."""

    def __init__(self, readme: str) -> None:
        self.rows = {study: records.read(HERE / f"{study}.jsonl", ["seed"]) for study in SECTIONS}
        self.curves = records.read(HERE / "rewards_curves.jsonl", ["curve", "x", "y"])
        self.hacking_curves = records.read(HERE / "hacking_curves.jsonl", ["panel", "curve", "x", "y"])
        self.steps = self.curves[0]["x"][-1]  # of RL
        self.votes = self.rows["claims"][0]["labels"]["step_consistency/all"]["N"]
        self.mark = {study: "†" if from_earlier_world(study, readme) else "" for study in SECTIONS}

    def judge(self, method: str, kind: str) -> str:
        """F1 of a reward model, or an ORM's accuracy."""
        name = f"{method}/{kind}"
        if name not in self.rows["methods"][0]["scores"]:
            return "not run"
        value = over_seeds([row["scores"][name] for row in self.rows["methods"]])
        return value + self.mark["methods"] + (" (accuracy)" if kind == "orm" else "")

    def labels(self, name: str, metric: str) -> str:
        """A metric of the labels of the claims: `<method>/kept` or `<method>/all`."""
        return over_seeds([row["labels"][name][metric] for row in self.rows["claims"]]) + self.mark["claims"]

    def policy(self, run: str) -> str:
        """avg@4 and greedy accuracy of a policy after its last step."""
        if not run:
            return "not comparable"
        rows = self.rows["rewards"]
        of_run = [row["start"] if run == "start" else row["runs"][run] for row in rows]
        sampled, greedy = (over_seeds([numbers[key] for numbers in of_run]) for key in ("avg@4", "greedy"))
        return f"{sampled} / {greedy}{self.mark['rewards']}"

    def heldout(self, run: str) -> str:
        """Held-out accuracy before the first step and after the last one."""
        seeds = [curve["y"] for curve in self.curves if curve["curve"] == REWARD_RUNS[run]]
        return from_first_to_last(seeds) + self.mark["rewards"]

    def reward(self) -> str:
        """Training reward of the plain policy, which the hacking study has drawn."""
        panel = HACKING_RUNS["plain-paper"]
        seeds = [c["y"] for c in self.hacking_curves if (c["panel"], c["curve"]) == (panel, "reward")]
        figure = f"([hacking.png](hacking.png), {len(seeds)} seeds)"
        return f"reward {from_first_to_last(seeds)}{self.mark['hacking']} {figure}"

    def hack(self, run: str, key: str) -> str:
        """The share of a policy's responses that are a hack."""
        return show([row["rescored"][run][key] for row in self.rows["hacking"]]) + self.mark["hacking"]

    def hacking_steps(self, run: str) -> str:
        """How many steps of RL a run of the hacking study has."""
        if run not in HACKING_RUNS:
            return "0"
        steps = [c["x"][-1] for c in self.hacking_curves if (c["panel"], c["curve"]) == (HACKING_RUNS[run], "reward")]
        return " or ".join(str(number) for number in sorted(set(steps)))


# --------------------------------------------------------------------------- tables


def data_table(tiny: Tiny) -> str:
    """What the paper's sections give about its data."""
    outcome, vector = (
        f"{tiny.labels('single/all', metric)} → {tiny.labels('step_consistency/all', metric)}"
        for metric in ("outcome", "exact")
    )
    kept = tiny.labels("step_consistency/kept", "yield")
    rows = [
        ["generator and verifier", "Qwen2.5-14B-Instruct, Qwen-3-32B-Instruct",
         command("settings.sh", "generator=", "verifier="), "not comparable", notes("names")],
        ["labelled problems", "8,000", command("data.sh", "head -n 8000"), "not comparable", notes("problems")],
        ["solutions, verifications", "8 per problem, 16 per solution: 1,024,000 in all",
         command("stage1.sh", "--num_samples 8", "--num_verifications 16"), f"{tiny.votes} per solution",
         notes("release")],
        ["training examples", "about 63,000, of 64,000", command("stage1.sh", "--method step_consistency"),
         f"{kept} kept", notes("filter")],
        ["solutions chosen with answers", "released code only", command("stage1.sh", "data.prepare balance"), "not run",
         notes("balance")],
        ["labels that are right, one verification → vote", "not in the submission",
         command("stage1.sh", "evaluate.py labels"), f"outcome: {outcome}; all steps: {vector}", notes("labels")],
        ["policy's format SFT", "113,000 problems, structured solutions",
         f"{NO_FLAG} for those solutions; ours: {command('stage2.sh', '--kind policy')}", "not run", notes("policy")],
        ["problems of RL", "17,000", command("settings.sh", "--limit 17000"), "not comparable", notes("problems")],
        ["steps of RL", "300 in Figure 5; 25 epochs in the released script", command("settings.sh", "--steps 300"),
         str(tiny.steps), notes("checkpoint")],
    ]  # fmt: skip
    return table(["", "paper", "command", "tiny world", "not published"], rows)


def processbench_table(tiny: Tiny) -> str:
    """Every way of labelling and kind of reward model, then the judges of others."""
    rows = []
    for method, title in METHODS.items():
        for kind, name in KINDS.items():
            unpublished = METHOD_NOTES.get(method, "") + (" orm" if kind == "orm" else "")
            how = command("processbench.sh", f"METHODS={method}", f"--kind {kind}")
            f1 = PROCESSBENCH.get((method, kind), UNKNOWN)
            rows.append([f"{title}, {name}", f1, UNKNOWN, how, tiny.judge(method, kind), notes(unpublished)])
    thinking = f"{NO_FLAG}: no kind that learns the verifier's thinking"
    critic = f"{NO_FLAG}: no prompt of ProcessBench's critics"
    head = f"{NO_FLAG}: its head isn't read"
    other = f"{NO_FLAG}: another architecture and prompt"
    rows += [
        ["each of these, Think-PRM (released code only)", UNKNOWN, UNKNOWN, thinking, "-", ""],
        ["GPT-4o as a critic", "61.9", UNKNOWN, critic, "not comparable", ""],
        ["Qwen2.5-72B-Instruct as a critic", "61.2 (worked out)", UNKNOWN, critic, "not comparable", ""],
        ["Qwen2.5-Math-7B-PRM800K", "56.5", UNKNOWN, head, "not comparable", ""],
        ["Skywork-PRM-7B", "42.1", UNKNOWN, head, "not comparable", ""],
        ["Math-Shepherd-PRM-7B", "31.5 (worked out)", UNKNOWN, other, "not comparable", ""],
    ]
    return table(["labels, reward model", "paper, mean F1", "paper, by subset", "command", "tiny world, F1",
                  "not published"], rows)  # fmt: skip


def anchor_table() -> str:
    """Judges trained on a stronger model's labels, and critics."""
    rows = [
        ["Qwen2.5-Math-PRM-7B", "82.4 / 77.6 / 67.5 / 66.3", "73.5"],
        ["Qwen2.5-Math-PRM-72B", "87.3 / 80.6 / 74.3 / 71.1", "78.3"],
        ["GenPRM-7B", "78.7 / 80.3 / 72.2 / 69.8", "75.2"],
        ["GenPRM-7B, eight votes", "81.0 / 85.7 / 78.4 / 76.8", "80.5"],
        ["QwQ-32B-Preview as a critic", "-", "71.5"],
        ["o1-mini as a critic", "-", "87.9"],
    ]
    return table(["reward model", "GSM8K / MATH / OlympiadBench / Omni-MATH", "mean F1"], rows)


def benchmark_table(tiny: Tiny) -> str:
    """The main table of RL."""
    rows = []
    for name, cells, average, code, run, unpublished in POLICIES:
        how = command("benchmarks.sh", "$policy" if not run else "$runs/policy")
        if code:
            how = command("grpo.sh", code)
        rows.append([name, cells, average, how, tiny.policy(run), notes(unpublished)])
    for name, cells, average, how, unpublished in OTHER_POLICIES:
        rows.append([name, cells, average, how, "not comparable", notes(unpublished)])
    released = "released code only"
    rows += [
        ["step-augmented, PRM", released, "", command("grpo.sh", "/grpo/step_augmented_prm"), "not run", ""],
        ["selective, halved", released, "", command("grpo.sh", "--selective_discount 0.5"), "not run",
         notes("prompt selective")],
        ["global, penalty on the step part alone", released, "", NO_FLAG, "-", notes("bounds")],
        ["global, missing labels padded, others cut", released, "", NO_FLAG, "-", ""],
        ["Think-PRM as the reward (8,192 tokens)", released, "", NO_FLAG, "-", ""],
    ]  # fmt: skip
    return table(["policy", "MATH-500 / AIME24 / AIME25 / AMC23 / OlympiadBench / Minerva", "mean", "command",
                  "tiny world, avg@4 / greedy", "not published"], rows)  # fmt: skip


def figure_table(tiny: Tiny) -> str:
    """Figures 4 to 7."""
    rows = []
    for figure, curve, value, code, run, unpublished in FIGURES:
        rows.append([figure, curve, value, command("grpo.sh", code), tiny.heldout(run), notes(unpublished)])
    rows.insert(3, ["4", "training reward, PRM-CoT", UNKNOWN, command("grpo.sh", "reward/mean"), tiny.reward(),
                    notes("design")])  # fmt: skip
    rows.append(["7", f"content {UNKNOWN}", UNKNOWN, "not known", "not known", ""])
    return table(["figure", "curve", "paper", "command", "tiny world, held-out", "not published"], rows)


def hacking_table(tiny: Tiny) -> str:
    """Section 4.4: the share of responses that show the pattern, in the run that stands for it."""
    bounds = ("--min_steps 1 --max_steps 1000",)
    rows = [
        ["solution appending", "process reward without format constraints",
         command("hacking.sh", "--format_constraints none"), tiny.hack("weak-none", "appended"), notes("runs")],
        ["step inflation", "step-augmented", command("grpo.sh", "--reward step_augmented"),
         tiny.hack("weak-step_augmented", "inflated"), notes("runs")],
        ["step reduction", "step-level advantages", command("hacking.sh", "--reward global_step", *bounds),
         tiny.hack("weak-global_step", "reduced"), notes("runs prompt bounds")],
        ["", "", command("hacking.sh", "--reward selective_advantage", *bounds), "not run",
         notes("runs prompt selective")],
    ]  # fmt: skip
    return table(["pattern", "paper: seen in", "command", "tiny world", "not published"], rows)


def hacking_runs_table(tiny: Tiny) -> str:
    """The same shares in other runs of the weak policy, the ones without a cause for the pattern included."""
    rows = []
    for run, title in CONTROLS.items():
        rows.append([title, tiny.hacking_steps(run), *(tiny.hack(run, key) for key in HACKS)])
    return table(["reward, format constraints", "steps of RL", *HACKS], rows)


def ledger() -> str:
    """The text of paper.md."""
    tiny = Tiny((HERE / "README.md").read_text(encoding="utf-8"))
    return PAGE.format(
        mark=MARK if any(tiny.mark.values()) else "",
        data=data_table(tiny),
        processbench=processbench_table(tiny),
        anchors=anchor_table(),
        benchmarks=benchmark_table(tiny),
        steps=tiny.steps,
        figures=figure_table(tiny),
        hacking=hacking_table(tiny),
        hacking_seeds=len(tiny.rows["hacking"]),
        hacking_runs=hacking_runs_table(tiny),
    )


def main() -> None:
    (HERE / "paper.md").write_text(ledger(), encoding="utf-8")
    print(HERE / "paper.md")


if __name__ == "__main__":
    distributed.run_stage(main)
