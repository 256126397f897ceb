"""Is the policy still better, or does it only please its judge? A vote on responses that the reward accepted.

    python grpo.py --dump_rollouts --out runs/tiny/look
    python -m data.audit --rollouts runs/tiny/look/rollouts --problems data/tiny/problems.jsonl \\
        --model data/tiny/verifier --worked_examples 0 --max_new_tokens 200 --out runs/tiny/audit
    python evaluate.py plot --runs runs/tiny/audit --keys audit/agreement audit/step_agreement --out audit.png

A policy that finds a gap in its reward model is rewarded for wrong responses, and nothing in its own metrics shows it.
Stage I's verifier is another judge, and a vote of it a better one, too expensive for each response but not for some. Of
every --every-th step, a random sample of the responses with a positive reward is verified as solutions are in Stage I,
without a reference answer. What falls when the policy has found a gap is the vote's agreement with the reward. Whether
it falls early enough to be an alarm hasn't been studied.

--out DIR receives verifications.jsonl, where a killed audit resumes, and metrics.jsonl, one line per step:

| metric | what it is |
|---|---|
| audit/agreement, low, high | share of the sampled responses whose voted outcome is correct, and its 95 % interval |
| audit/step_agreement | the same for the steps |
| audit/accepted | responses with a positive reward in that step |
| audit/sampled, audit/voted | responses that were verified, and those of them with at least one parsed verification |
"""

import argparse
import math
import random
from pathlib import Path

import verify
from data import records, report
from data.records import COUNT, POSITIVE, SEED, TEMPERATURE, TOP_P
from evaluate import bootstrap, interval95
from generate import open_engine
from grpo import shown_solution
from kernels import distributed
from kernels.chat import find_model
from kernels.distributed import InputError

import numpy as np

# What may differ between the audit that began an output and the one that resumes it.
MAY_CHANGE_ON_RESUME = {"out", "device", "slots", "every"}


def find_dumps(directory: str, every: int) -> dict[int, Path]:
    """step -> its file of rollouts, of the steps that --every divides. Raises InputError if there are none."""
    dumps = {step: path for step, path in report.find_rollouts(Path(directory)).items() if step % every == 0}
    if not dumps:
        raise InputError(f"--rollouts {directory}: no step_*.jsonl of a step that --every {every} divides; lower it")
    return dumps


def accepted_solutions(step: int, rollouts: list[dict], problems: dict[str, str], count: int, seed: int) -> list[dict]:
    """A random sample of a step's responses with a positive reward, as solutions: with what the judge was shown.

    problems: id -> text. Responses of a problem are numbered in their order: "step 10/t0050/3" is the fourth one.
    """
    solutions = []
    numbers: dict[str, int] = {}
    for rollout in rollouts:
        problem_id = rollout["problem_id"]
        k = numbers.get(problem_id, 0)
        numbers[problem_id] = k + 1
        if rollout["reward"] <= 0:
            continue
        steps, answer = shown_solution(rollout["text"])
        solution = {"id": f"step {step}/{problem_id}/{k}", "problem_id": problem_id, "problem": problems[problem_id]}
        solutions.append({**solution, "steps": steps, "answer": answer})
    rng = random.Random(f"{seed}/{step}")  # the same sample whichever other steps are audited
    return rng.sample(solutions, min(count, len(solutions)))


def agreement(solutions: list[dict], labels: list[verify.Label], seed: int) -> dict[str, float]:
    """The metrics of a step, but for `audit/accepted`. Responses without votes count in `audit/sampled` alone."""
    by_problem: dict[str, list[bool]] = {}
    step_labels: list[bool] = []
    for solution, label in zip(solutions, labels, strict=True):
        if label.outcome is None:
            continue
        by_problem.setdefault(solution["problem_id"], []).append(label.outcome)
        step_labels += label.step_labels
    outcomes = [outcome for of_problem in by_problem.values() for outcome in of_problem]
    numbers = {"audit/sampled": len(solutions), "audit/voted": len(outcomes)}
    if not outcomes:
        return numbers  # the agreement of nothing is not a number
    # Responses to one problem aren't independent, so problems are resampled, each with the weight of its responses.
    accepted = np.array([sum(of_problem) for of_problem in by_problem.values()], dtype=float)
    sizes = np.array([len(of_problem) for of_problem in by_problem.values()], dtype=float)
    low, high = interval95(bootstrap(accepted, seed, sizes))
    numbers["audit/agreement"] = sum(outcomes) / len(outcomes)
    numbers["audit/agreement_low"] = low
    numbers["audit/agreement_high"] = high
    numbers["audit/step_agreement"] = sum(step_labels) / len(step_labels)
    return numbers


def parse_arguments() -> argparse.Namespace:
    """The command line: what is audited, and the flags of verify.py, whose functions read them."""
    parser = records.new_parser(__doc__)
    parser.add_argument("--rollouts", required=True, help="<out>/rollouts of a run with grpo.py --dump_rollouts")
    parser.add_argument("--problems", required=True, help="the problems of that run")
    parser.add_argument("--model", required=True, help="verifier: a Hugging Face directory or hub name")
    parser.add_argument("--out", required=True, help="directory for verifications and metrics")
    parser.add_argument("--every", type=COUNT, default=10, help="audit each step that this number divides")
    parser.add_argument("--responses", type=COUNT, default=64, help="responses to verify per step")
    parser.add_argument("--num_verifications", type=COUNT, default=16, help="votes on each")
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.8)
    parser.add_argument("--top_p", type=TOP_P, default=0.95)
    parser.add_argument("--max_new_tokens", type=POSITIVE, default=8192, help="per verification")
    parser.add_argument("--worked_examples", type=int, default=2, choices=[0, 1, 2], help="examples in the prompt")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--slots", type=COUNT, help="samples at a time; default: by the GPU's memory, on a CPU 128")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.set_defaults(method="step_consistency", stop="all", top_k=0)
    return records.parse_flags(parser)


def main() -> None:
    args = parse_arguments()
    device = distributed.init_distributed(args.device)
    out = Path(args.out)
    path = out / "verifications.jsonl"
    if "rollouts" not in (records.read_args(path) or {}):  # no earlier audit's, so its metrics.jsonl is another's
        records.check_output(out, args)
    problems = {p["id"]: p["problem"] for p in records.read(args.problems, ["id", "problem"])}

    # 1. Choose the responses of each step.
    solutions_of_step: dict[int, list[dict]] = {}
    accepted: dict[int, int] = {}
    for step, dump in find_dumps(args.rollouts, args.every).items():
        rollouts = records.read(dump, ["problem_id", "text", "reward"])
        unknown = {rollout["problem_id"] for rollout in rollouts} - problems.keys()
        if unknown:
            raise InputError(f"{dump}: problem {min(unknown)} isn't in --problems {args.problems}")
        accepted[step] = sum(rollout["reward"] > 0 for rollout in rollouts)
        solutions_of_step[step] = accepted_solutions(step, rollouts, problems, args.responses, args.seed)
    solutions = [solution for of_step in solutions_of_step.values() for solution in of_step]

    # 2. Verify them all as Stage I does: in one queue, resumable, shared by the ranks.
    key = ("solution_id", "sample")
    with records.RecordFile(path, args, MAY_CHANGE_ON_RESUME, key, other_fields=("text",)) as output:
        todo, votes = verify.find_unverified(solutions, args, output)
        if todo:
            model = records.hash_model(find_model(args.model))
            output.check_made_with(model_sha256=model, prompt_sha256=verify.hash_prompt(args))
            engine = open_engine(args.model, device, args.slots)
            verify.verify_solutions(args, engine, todo, votes, {}, output)
    if distributed.rank() != 0:
        return

    # 3. Put them to the vote, step by step.
    verifications = verify.read_verifications(path, solutions)
    lines = []
    for step, of_step in solutions_of_step.items():
        labels = verify.label_solutions(of_step, verifications, verify.step_consistency, args.seed)
        line = {"step": step, "audit/accepted": accepted[step], **agreement(of_step, labels, args.seed)}
        lines.append(line)
        low, share, high = (
            line.get(f"audit/{name}", math.nan) for name in ("agreement_low", "agreement", "agreement_high")
        )
        print(f"step {step}: the vote accepts {share:.3f} [{low:.3f}, {high:.3f}] of {line['audit/voted']} responses")
    records.write_lines(out / "metrics.jsonl", lines)


if __name__ == "__main__":
    distributed.run_stage(main)
