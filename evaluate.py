"""Three commands that measure, two that show (SPARK, arXiv 2512.03244, Sec. 4).

    python evaluate.py processbench   # does a reward model find the first wrong step?  -> runs/tiny/processbench.jsonl
    python evaluate.py benchmark      # does a policy solve problems it hasn't seen?    -> runs/tiny/benchmark.jsonl
    python evaluate.py labels         # are the labels of Stage I right?                -> runs/tiny/labels.json
    python evaluate.py plot           # the curves of GRPO runs, and of studies         -> runs/tiny/curves.png
    python evaluate.py show t0003     # one problem's way through all stages            -> the terminal

Each runs on the tiny world, after the stage that it measures. With your own models, also under torchrun (sharded):

    python evaluate.py processbench --model runs/prm_cot --data gsm8k.json math.json --out runs/processbench.jsonl
    python evaluate.py benchmark --model runs/grpo Qwen/Qwen2.5-Math-7B --problems math500.jsonl aime24.jsonl \\
        --gold gold.jsonl --num_samples 16 --greedy --out runs/benchmark.jsonl
    python evaluate.py benchmark --solutions runs/solutions.jsonl --gold gold.jsonl --prm runs/prm_cot \\
        --out runs/best.jsonl   # does a reward model choose well among samples from any source?

Reference answers are read here, after the fact: nothing feeds back into reference-free training. What can't be judged
is counted: an unparsed verification is wrong on ProcessBench, an answer that can't be graded within its deadline is
`unknown`. What the paper doesn't have: intervals, and a report on the labels themselves.
"""

import argparse
import codecs
import functools
import inspect
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data import grader, records, report
from data.chat import check_model, find_model
from data.records import COUNT, POSITIVE, SEED, TEMPERATURE, TOP_P
from data.text import extract_answer
from generate import SOLVE_PROMPT, Engine, find_incomplete, fit_prompts, generate_solutions, open_engine
from kernels import distributed
from kernels.distributed import InputError
from train_prm import REWARD_MODELS, Judge, Judgement, check_votes, judge_prompt, score_solutions
from verify import AGGREGATES, METHODS, group_by_solution, keep_parsed, label_solutions, read_verifications, single

import numpy as np
import torch

# Used when one of a command's inputs isn't given; an explicit flag wins.
TINY = {
    "processbench": {
        "model": "runs/tiny/prm_cot", "data": ["data/tiny/processbench.jsonl"], "out": "runs/tiny/processbench.jsonl",
        "max_new_tokens": 200, "slots": 256, "device": "cpu",
    },
    "benchmark": {
        "model": ["runs/tiny/grpo", "data/tiny/policy"], "problems": ["data/tiny/heldout.jsonl"],
        "gold": ["data/tiny/gold.jsonl"], "out": "runs/tiny/benchmark.jsonl",
        "max_new_tokens": 160, "prm_max_new_tokens": 200, "limit": 500, "slots": 256, "device": "cpu",
    },
    "labels": {
        "labels": ["runs/tiny/verify/labels_step_consistency.jsonl"],
        "verifications": "runs/tiny/verify/verifications.jsonl",
        "gold": "data/tiny/gold.jsonl", "out": "runs/tiny/labels.json",
    },
    "plot": {"runs": ["runs/tiny/grpo"], "out": "runs/tiny/curves.png"},
    "show": {"labels": "runs/tiny/verify/labels_step_consistency.jsonl"},
}  # fmt: skip
RESAMPLES = 2000  # of every bootstrap

# --------------------------------------------------------------------------- grading answers


def grade(prediction: str | None, reference: str, timeout: float = 5.0) -> bool | None:
    r"""Is an answer mathematically equal to the reference? True, False, or None for unknown: out of time or memory, or
    crashed. Both are LaTeX or plain text, with or without `\boxed{…}`; no answer (None, "") is False.

    Units are dropped (5 g is 5 kg); a capital letter is another symbol; data/grader.py lists these decisions, and runs
    the algebra in a worker process. timeout: seconds of CPU time per reading; a number like 4.5e33 and a percent sign
    have a second reading each. Raises ValueError for a timeout that isn't positive, InputError if no worker can run.
    """
    if timeout <= 0:
        raise ValueError(f"timeout must be positive, got {timeout}")
    try:
        return grader.equal(prediction or "", reference, timeout)
    except ChildProcessError as error:
        raise InputError(str(error)) from None


def grade_all(
    pairs: list[tuple[str | None, str]], timeout: float = 5.0, workers: int = min(8, os.cpu_count() or 1)
) -> list[bool | None]:
    """`grade` of many (prediction, reference) pairs, in order, by several workers; equal pairs are graded once."""
    unique = list(dict.fromkeys(pairs))
    with ThreadPoolExecutor(workers) as threads:  # a thread waits for its worker, so no more than `workers` run
        verdicts = threads.map(lambda pair: grade(*pair, timeout), unique)
        known = dict(zip(unique, verdicts, strict=True))
    return [known[pair] for pair in pairs]


# --------------------------------------------------------------------------- numbers


class Metric(NamedTuple):
    """A measured fraction."""

    value: float  # 0 to 1
    n: int  # cases or problems that it is over
    interval: tuple[float, float] | None = None  # (low, high), 95 %


def first_error(step_verdicts: list[bool]) -> int:
    """Index of the first step judged incorrect, else -1."""
    if False in step_verdicts:
        return step_verdicts.index(False)
    return -1


def processbench_f1(labels: list[int], predictions: list[int | None]) -> dict:
    """ProcessBench's numbers as fractions: accuracy on cases with a wrong step, on the others, their harmonic mean.

    A label is the index of the first wrong step or -1; a prediction likewise, or None for unparsed, which is wrong.
    An accuracy over no cases is 0, and so is F1 of two zeros.
    """
    error_hits, correct_hits = [], []
    for label, prediction in zip(labels, predictions, strict=True):
        hits = correct_hits if label == -1 else error_hits
        hits.append(label == prediction)
    error_acc = sum(error_hits) / max(len(error_hits), 1)
    correct_acc = sum(correct_hits) / max(len(correct_hits), 1)
    f1 = 0.0
    if error_acc + correct_acc > 0:
        f1 = 2 * error_acc * correct_acc / (error_acc + correct_acc)
    return {"error_acc": error_acc, "correct_acc": correct_acc, "f1": f1}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that k of n samples, c of them right, include a right one: 1 - C(n-c, k) / C(n, k), Eq. 1 of
    Chen et al. 2021 (arXiv 2107.03374)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"need 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@functools.lru_cache  # maj@k and the votes of best-of-k ask about the same samples
def cluster_answers(answers: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Each answer's cluster, named by its first answer: ("5", "7", "5.0", None) -> ("5", "7", "5", None).

    Each distinct string joins the first cluster whose first answer it equals by `grade`, or begins a new one: at most
    one question to the grader per distinct string and cluster. An answer that is None or blank has no cluster.
    """
    cluster_of = {}
    unclustered = [answer for answer in dict.fromkeys(answers) if answer and answer.strip()]
    while unclustered:
        first, *others = unclustered
        cluster_of[first] = first
        equal = grade_all([(other, first) for other in others])
        unclustered = []
        for other, same in zip(others, equal, strict=True):
            if same:
                cluster_of[other] = first
            else:
                unclustered.append(other)
    return tuple(cluster_of.get(answer) for answer in answers)


def majority_answer(answers: list[str | None]) -> str | None:
    """The first answer of the largest cluster, the earliest of equals; None (no answer) doesn't vote."""
    votes = Counter(cluster for cluster in cluster_answers(tuple(answers)) if cluster is not None)
    if not votes:
        return None
    [(winner, _)] = votes.most_common(1)
    return winner


def sizes_up_to(n: int) -> list[int]:
    """2, 4, 8, ... below n, and n."""
    powers = [2**i for i in range(1, n.bit_length())]
    return [*(k for k in powers if k < n), n]


def bootstrap(values: np.ndarray, seed: int, sizes: np.ndarray | None = None) -> np.ndarray:
    """Means of values (P, ...) over resamples of the P rows -> (RESAMPLES, ...). Raises ValueError for no rows.

    With sizes, of the same shape: sum(values) / sum(sizes), a mean over parts (steps) of which a row has several.
    """
    P = len(values)
    if P == 0:
        raise ValueError("nothing to resample: no rows")
    if sizes is None:
        sizes = np.ones(values.shape)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(P, size=P)  # P rows, with replacement
        times = np.bincount(drawn, minlength=P)  # (P,) how often each row was drawn
        means.append((times @ values) / np.maximum(times @ sizes, 1e-12))
    return np.stack(means)


def interval95(values: np.ndarray) -> tuple[float, float]:
    """(low, high): the 2.5 % and 97.5 % quantiles of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_interval(per_problem: np.ndarray, seed: int) -> tuple[float, float]:
    """(low, high): 95 % interval of the mean of per_problem (P,). Problems are resampled, as the samples of one problem
    aren't independent of each other."""
    return interval95(bootstrap(np.asarray(per_problem, dtype=float), seed))


# --------------------------------------------------------------------------- shared by the commands


def result_rows(
    benchmark: str, subset: str, metrics: dict[str, Metric], settings: dict, seconds: float, tokens: int
) -> list[dict]:
    """Rows of a results file, one for each metric."""
    rows = []
    for name, metric in metrics.items():
        row = {"benchmark": benchmark, "subset": subset, "metric": name, **metric._asdict()}
        rows.append({**row, "settings": settings, "seconds": round(seconds, 1), "tokens": tokens})
    return rows


def average_rows(benchmark: str, rows: list[dict], metrics: list[str]) -> list[dict]:
    """Each metric's plain mean over the subsets or benchmarks of one model, if there are several; n counts them."""
    averages = []
    for metric in metrics:
        measured = [row for row in rows if row["metric"] == metric]
        if len(measured) < 2:
            continue
        mean = float(np.mean([row["value"] for row in measured]))
        # The samples are independent, so the variances of the sum add up, and with them the squares of the half-widths.
        squares = 0.0
        for row in measured:
            low, high = row["interval"]
            squares += (high - low) ** 2
        half = squares**0.5 / 2 / len(measured)
        average = Metric(mean, len(measured), (mean - half, mean + half))
        seconds = sum(row["seconds"] for row in measured)
        tokens = sum(row["tokens"] for row in measured)
        averages += result_rows(benchmark, "average", {metric: average}, measured[0]["settings"], seconds, tokens)
    return averages


def limit_metrics(limits: list[int | None], max_new_tokens: int) -> dict[str, Metric]:
    """The shares of prompts that are too long (None) and of those that get fewer new tokens; none for a share of 0."""
    n = len(limits)
    counts = {"too_long": limits.count(None), "shortened": n - limits.count(None) - limits.count(max_new_tokens)}
    return {name: Metric(count / n, n) for name, count in counts.items() if count}


def add_sampling_flags(parser: argparse.ArgumentParser, temperature: float, max_new_tokens: int) -> None:
    """The flags that all commands with a model have."""
    parser.add_argument("--out", help="results.jsonl to write")
    parser.add_argument("--temperature", type=TEMPERATURE, default=temperature, help="a greedy pass has none")
    parser.add_argument("--max_new_tokens", type=POSITIVE, default=max_new_tokens, help="per sample")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--limit", type=POSITIVE, help="use only the first N records of each file")
    parser.add_argument("--slots", type=COUNT, help="samples at a time; default: by the GPU's memory, on a CPU 128")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")


def parse_command(parser: argparse.ArgumentParser, *inputs: str, unless: str = "") -> argparse.Namespace:
    """Parse the flags of one command. If one of its inputs isn't given, the tiny world's values replace the defaults,
    unless there is the flag that makes do without them."""
    args = records.parse_flags(parser)
    missing = [name for name in inputs if getattr(args, name) is None]
    if missing and not getattr(args, unless, None):
        args = records.parse_args(parser, TINY[args.command], missing[0])
    if "out" in args:  # fail early, not after hours of sampling
        if args.out is None:
            raise InputError("--out is missing; say where to write the result")
        records.check_place(Path(args.out))
        records.check_output(args.out, args, report.check_format(args.out, args.command == "plot"))
    return args


# --------------------------------------------------------------------------- ProcessBench


def processbench_numbers(kind: str, cases: list[dict], judgements: list[Judgement], seed: int) -> dict[str, Metric]:
    """The metrics of one subset. A PRM's prediction is the first step that it judges incorrect, else -1. An ORM names no
    step; its verdict is compared with the correctness of the final answer."""
    n = len(cases)
    if not REWARD_MODELS[kind].judges_steps:
        verdicts = [judgement.verdict for judgement in judgements]
        truths = [records.final_answer_correct(case, f"case {i}") for i, case in enumerate(cases)]
        right = np.array([verdict == truth for verdict, truth in zip(verdicts, truths, strict=True)], dtype=float)
        accuracy = Metric(float(right.mean()), n, bootstrap_interval(right, seed))
        return {"outcome_acc": accuracy, "unparsed": Metric(verdicts.count(None) / n, n)}

    labels = [case["label"] for case in cases]
    predictions = []
    for judgement in judgements:
        verdicts = judgement.step_verdicts
        predictions.append(None if verdicts is None else first_error(verdicts))
    found = processbench_f1(labels, predictions)

    # F1 is no mean over cases: each resample of the cases has accuracies of its own, and F1 follows from them.
    is_wrong = np.array(labels) != -1
    groups = np.stack([is_wrong, ~is_wrong], axis=1).astype(float)  # (n, 2): in which group a case is
    hits = np.equal(labels, np.array(predictions, dtype=object)).astype(float)  # (n,)
    error_acc, correct_acc = bootstrap(hits[:, None] * groups, seed, groups).T  # (RESAMPLES,) each
    f1 = 2 * error_acc * correct_acc / np.maximum(error_acc + correct_acc, 1e-12)

    num_wrong = int(is_wrong.sum())
    return {
        "f1": Metric(found["f1"], n, interval95(f1)),
        "error_acc": Metric(found["error_acc"], num_wrong, interval95(error_acc)),
        "correct_acc": Metric(found["correct_acc"], n - num_wrong, interval95(correct_acc)),
        "unparsed": Metric(predictions.count(None) / n, n),
    }


def run_processbench(parser: argparse.ArgumentParser) -> None:
    """ProcessBench: does a reward model find the first wrong step of a solution?"""
    parser.add_argument("--model", help="reward model: a Hugging Face directory or hub name; none: the tiny world")
    parser.add_argument("--data", nargs="+", help="one file per subset: JSON Lines or array of problem, steps, label")
    parser.add_argument("--kind", default="prm_cot", choices=list(REWARD_MODELS), help="what the model was trained as")
    parser.add_argument("--votes", type=COUNT, default=1, help="1: one greedy pass; K: sample K and take majorities")
    add_sampling_flags(parser, temperature=0.8, max_new_tokens=4096)
    args = parse_command(parser, "model", "data")

    # 1. Whatever is wrong with the input is found before the first judgement.
    check_votes(args.kind, args.votes, "--votes")
    tokenizer, context = check_model(args.model)
    subsets, limits = {}, {}
    for name, path in records.name_files("data", args.data).items():
        # ProcessBench has no separate answer, so an answer field of a case is ignored.
        cases = read_cases(path)[: args.limit]
        subsets[name] = [{**case, "id": f"{name}/{i}", "answer": None} for i, case in enumerate(cases)]
        turns = [judge_prompt(REWARD_MODELS[args.kind].prompt, case) for case in subsets[name]]
        _, limits[name] = fit_prompts(tokenizer, context, turns, args.max_new_tokens, name)
    device = distributed.init_distributed(args.device)
    results = records.ResultsFile(args, [*args.data, find_model(args.model)])

    # 2. Subset by subset: judge, measure, write.
    settings = {"model": args.model, "kind": args.kind, "votes": args.votes, "temperature": args.temperature,
                "seed": args.seed, "max_new_tokens": args.max_new_tokens}  # fmt: skip
    engine = None
    for subset, cases in subsets.items():
        rows = results.earlier.get((args.model, "processbench", subset))
        if rows is None:
            started = time.time()
            engine = engine or open_engine(args.model, device, args.slots)
            judge = Judge(engine, args.kind, args.max_new_tokens, args.votes, args.temperature)
            judgements = score_shared(judge, cases, args.seed, subset)
            metrics = processbench_numbers(args.kind, cases, judgements, args.seed)
            metrics |= limit_metrics(limits[subset], args.max_new_tokens)
            tokens = sum(judgement.tokens for judgement in judgements)
            rows = result_rows("processbench", subset, metrics, settings, time.time() - started, tokens)
        results.add(rows)

    # 3. The paper's headline is the average over subsets.
    results.add(average_rows("processbench", results.rows, ["f1", "outcome_acc"]), complete=True)
    report.print_results(results.rows)


# --------------------------------------------------------------------------- benchmarks


@dataclass
class Graded:
    """P problems with k graded samples each, and their accuracy with its 95 % interval over problems."""

    samples: list[list[dict]]  # P lists of k solutions: problem_id, text, answer, finish, tokens
    correct: np.ndarray  # (P, k) bool; an answer that can't be graded isn't correct
    unknown: int  # answers that can't be graded
    tokens: int  # of all samples
    accuracy: float
    low: float
    high: float


def require_answers(problem_ids: list[str], gold: dict[str, str]) -> None:
    """Raise InputError for the first problem without a reference answer."""
    for problem_id in problem_ids:
        if problem_id not in gold:
            raise InputError(f"problem {problem_id}: no gold answer; --gold must have one for every problem")


def grade_samples(samples: list[list[dict]], gold: dict[str, str], seed: int) -> Graded:
    """Grade P >= 1 lists of k samples against gold (problem id -> answer). Under torchrun every rank has all samples,
    grades its share, and returns the same."""
    pairs = []
    for group in distributed.my_part(samples):
        for sample in group:
            pairs.append((sample["answer"], gold[sample["problem_id"]]))
    verdicts = grade_all(pairs)
    k = len(samples[0])
    mine = [verdicts[i : i + k] for i in range(0, len(verdicts), k)]
    grades = distributed.gather(mine)  # P lists of k: True, False or None

    correct = np.array([[verdict is True for verdict in group] for group in grades])  # (P, k)
    unknown = sum(group.count(None) for group in grades)
    tokens = sum(sample["tokens"] for group in samples for sample in group)
    per_problem = correct.mean(axis=1)  # (P,)
    low, high = bootstrap_interval(per_problem, seed)
    return Graded(samples, correct, unknown, tokens, float(per_problem.mean()), low, high)


def heldout_accuracy(
    engine: Engine, problems: list[dict], gold: dict[str, str], *, max_new_tokens: int, seed: int, **settings
) -> Graded:
    """Sample k solutions to each of P >= 1 problems (id, problem) and grade them against gold (id -> answer): a look at
    a policy in training, without files. settings: num_samples and temperature, optionally top_p, as for the sampler.

    Under torchrun every rank calls it, does its share, and returns the same. Problems that are too long for the context
    are left out. Raises InputError for a problem without a gold answer, and if all are too long.
    """
    require_answers([problem["id"] for problem in problems], gold)
    turns = [SOLVE_PROMPT.format(problem=problem["problem"]) for problem in problems]
    prompts, limits = fit_prompts(engine.tokenizer, engine.context, turns, max_new_tokens, "held-out problems")
    mine = distributed.my_part([i for i, limit in enumerate(limits) if limit is not None])
    groups = engine.sample(
        [prompts[i] for i in mine],
        keys=[problems[i]["id"] for i in mine],
        max_new_tokens=[limits[i] for i in mine],
        seed=seed,
        **settings,
    )
    solutions = []
    for i, samples in zip(mine, groups, strict=True):
        of_problem = []
        for sample in samples:
            text = engine.text(sample.ids, prompts[i])
            solution = {"problem_id": problems[i]["id"], "text": text, "answer": extract_answer(text)}
            of_problem.append({**solution, "finish": sample.finish, "tokens": len(sample.ids)})
        solutions.append(of_problem)
    return grade_samples(distributed.gather(solutions), gold, seed)


def benchmark_numbers(graded: Graded, others: dict[str, np.ndarray], seed: int) -> dict[str, Metric]:
    """avg@k, pass@j for j = 2, 4, ... k, and maj@k of graded samples; others: further metrics' values (P,)."""
    P, k = graded.correct.shape
    per_problem = {f"avg@{k}": graded.correct.mean(axis=1)}  # (P,) each
    for j in sizes_up_to(k):
        counts = graded.correct.sum(axis=1)  # (P,)
        per_problem[f"pass@{j}"] = np.array([pass_at_k(k, int(c), j) for c in counts])
    majority = np.zeros(P)
    for p, group in enumerate(graded.samples):
        answers = [sample["answer"] for sample in group]
        winner = majority_answer(answers)
        if winner is not None:  # a sample's answer, so it was graded
            majority[p] = graded.correct[p, answers.index(winner)]
    per_problem[f"maj@{k}"] = majority
    per_problem |= others

    metrics = {}
    for name, values in per_problem.items():
        metrics[name] = Metric(float(values.mean()), P, bootstrap_interval(values, seed))
    truncated = sum(sample["finish"] == "length" for group in graded.samples for sample in group)
    metrics["unknown"] = Metric(graded.unknown / (P * k), P)
    metrics["truncated"] = Metric(truncated / (P * k), P)
    return metrics


# --- best of k: a reward model chooses among the same samples


def best_of_k(
    correct: np.ndarray, answers: list[list[str | None]], judgements: list[list[Judgement]]
) -> dict[str, np.ndarray]:
    """metric -> (P,) 1.0 where the sample that a reward model chooses among a problem's first k is correct, else 0.0;
    correct is (P, n), and k = 2, 4, 8, ... and n. The sample with the greatest score is chosen, the earliest of equals.

        verdict   scores the outcome
        mean      the steps, by their mean
        min       the steps, by the worst of them
        vote      the answer, by the sum of the outcome scores of all samples with this answer

    An unparsed judgement scores 0.
    """
    P, n = correct.shape
    scores = {rule: np.zeros((P, n)) for rule in ("verdict", "mean", "min")}
    for p, i in np.ndindex(P, n):
        judgement = judgements[p][i]
        step_scores = judgement.step_scores or [0.0]
        scores["verdict"][p, i] = judgement.score or 0.0
        scores["mean"][p, i] = np.mean(step_scores)
        scores["min"][p, i] = min(step_scores)
    found = {}
    for k in sizes_up_to(n):
        scores["vote"] = sum_by_answer(answers, scores["verdict"], k)
        for rule, of_rule in scores.items():
            chosen = of_rule[:, :k].argmax(axis=1)  # (P,) the first of equals
            found[f"best@{k}/{rule}"] = correct[np.arange(P), chosen].astype(float)
    return found


def sum_by_answer(answers: list[list[str | None]], scores: np.ndarray, k: int) -> np.ndarray:
    """(P, k): for each of a problem's first k samples the sum of the scores (P, n) of those with an equal answer. A
    sample without an answer gets 0."""
    sums = np.zeros((len(answers), k))
    for p, group in enumerate(answers):
        clusters = cluster_answers(tuple(group))[:k]
        for i, cluster in enumerate(clusters):
            if cluster is not None:
                sums[p, i] = sum(scores[p, j] for j in range(k) if clusters[j] == cluster)
    return sums


# --- the command


@dataclass
class Benchmark:
    """One model's solutions to the problems of one file."""

    model: str
    name: str
    settings: dict  # of sampling, as far as known
    graded: Graded
    greedy: Graded | None
    limits: dict[str, Metric]  # `limit_metrics` of all its problems
    seconds: float  # of sampling and grading


def grade_files(args: argparse.Namespace, gold: dict[str, str]) -> Iterator[Benchmark]:
    """Samples from any source, one benchmark per solutions file."""
    for name, path in records.name_files("solutions", args.solutions).items():
        started = time.time()
        groups = records.read_samples(path)
        problem_ids = list(groups)[: args.limit]
        require_answers(problem_ids, gold)
        samples = [groups[problem_id] for problem_id in problem_ids]
        graded = grade_samples(samples, gold, args.seed)
        settings = {"num_samples": len(samples[0]), "seed": args.seed}
        yield Benchmark(samples[0][0]["model"], name, settings, graded, None, {}, time.time() - started)


def plan_samples(args: argparse.Namespace, gold: dict[str, str]) -> list[tuple]:
    """(model, benchmark, the problems that fit the model's context, `limit_metrics`) of every model and file. Raises
    InputError for what would otherwise be found after hours of sampling."""
    files = {}
    for name, path in records.name_files("problems", args.problems).items():
        files[name] = records.read(path, ["id", "problem"], "python -m data.make_tiny problems")[: args.limit]
        require_answers([problem["id"] for problem in files[name]], gold)
    plan = []
    for model in args.model:
        tokenizer, context = check_model(model)
        for name, problems in files.items():
            turns = [SOLVE_PROMPT.format(problem=problem["problem"]) for problem in problems]
            _, limits = fit_prompts(tokenizer, context, turns, args.max_new_tokens, f"{name}, {model}")
            fitting = [problem for problem, limit in zip(problems, limits, strict=True) if limit is not None]
            plan.append((model, name, fitting, limit_metrics(limits, args.max_new_tokens)))
    return plan


def sample_benchmarks(
    plan: list[tuple], gold: dict[str, str], args: argparse.Namespace, device: torch.device
) -> Iterator[Benchmark]:
    """Sample and grade what `plan_samples` says. The samples stay in solutions files beside --out, and what an earlier
    run has written to them isn't sampled again. Raises InputError if it was made with other settings."""
    settings = {"num_samples": args.num_samples, "temperature": args.temperature, "top_p": args.top_p,
                "max_new_tokens": args.max_new_tokens, "seed": args.seed}  # fmt: skip
    passes = {"": settings}  # suffix of the file -> how to sample
    if args.greedy:
        passes["_greedy"] = {**settings, "num_samples": 1, "temperature": 0.0}
    directory = Path(args.out.removesuffix(".jsonl") + "_samples")
    engine, opened = None, None  # opened only if a solution is missing
    for model, name, problems, limits in plan:
        started = time.time()
        # A model that has been trained on under the same name isn't the one that sampled.
        fingerprints = {"model_sha256": records.hash_model(find_model(model)),
                        "prompt_sha256": records.hash_text(SOLVE_PROMPT)}  # fmt: skip
        graded: dict[str, Graded | None] = {"_greedy": None}
        for suffix, how in passes.items():
            path = directory / f"{model.strip('/').replace('/', '-')}_{name}{suffix}.jsonl"
            described = argparse.Namespace(model=model, **fingerprints, **how)
            with records.RecordFile(path, described, may_change=set(), remembered_field="problem") as output:
                if find_incomplete(problems, output, how["num_samples"]):
                    if opened != model:
                        engine = None  # there may not be memory for two
                        engine = open_engine(model, device, args.slots)
                        opened = model
                    generate_solutions(engine, problems, output, described)
            groups = records.read_samples(path)  # it may also have problems beyond --limit
            graded[suffix] = grade_samples([groups[problem["id"]] for problem in problems], gold, args.seed)
        yield Benchmark(model, name, settings, graded[""], graded["_greedy"], limits, time.time() - started)


def measure_benchmark(benchmark: Benchmark, judge: Judge | None, args: argparse.Namespace) -> list[dict]:
    """The result rows of one benchmark. judge: --prm, which chooses among its samples."""
    started = time.time()
    graded = benchmark.graded
    P, k = graded.correct.shape
    settings = {"model": benchmark.model, **benchmark.settings}
    tokens = graded.tokens
    others = {}  # metric -> (P,)
    if benchmark.greedy:
        others["greedy"] = benchmark.greedy.correct.mean(axis=1)
        tokens += benchmark.greedy.tokens
    if judge:
        settings |= {"prm": args.prm, "kind": args.prm_kind, "votes": args.prm_votes}
        settings["prm_max_new_tokens"] = args.prm_max_new_tokens
        solutions = list(chain.from_iterable(graded.samples))
        judgements = score_shared(judge, solutions, args.seed, f"{benchmark.name}, judged")  # P * k
        tokens += sum(judgement.tokens for judgement in judgements)
        answers = [[sample["answer"] for sample in group] for group in graded.samples]
        others |= best_of_k(graded.correct, answers, [judgements[i : i + k] for i in range(0, P * k, k)])
        unparsed = np.array([judgement.verdict is None for judgement in judgements])
        others["unparsed"] = unparsed.reshape(P, k).mean(axis=1)
    metrics = benchmark_numbers(graded, others, args.seed) | benchmark.limits
    seconds = benchmark.seconds + time.time() - started
    return result_rows(benchmark.name, "all", metrics, settings, seconds, tokens)


def compare_with_last(benchmarks: list[Benchmark], headline: str, seed: int) -> list[dict]:
    """Rows of each model's accuracy minus that of the last one, over the problems that both have; paired by problem."""
    accuracies = {}  # (model, benchmark) -> problem id -> accuracy
    for benchmark in benchmarks:
        problem_ids = [group[0]["problem_id"] for group in benchmark.graded.samples]
        accuracy = dict(zip(problem_ids, benchmark.graded.correct.mean(axis=1), strict=True))
        accuracies[benchmark.model, benchmark.name] = accuracy
    last_model = benchmarks[-1].model
    rows = []
    for benchmark in benchmarks:
        mine = accuracies[benchmark.model, benchmark.name]
        last = accuracies.get((last_model, benchmark.name), {})
        change = np.array([mine[problem_id] - last[problem_id] for problem_id in mine if problem_id in last])
        if benchmark.model != last_model and len(change) > 0:
            metric = Metric(float(change.mean()), len(change), bootstrap_interval(change, seed))
            settings = {"model": f"{benchmark.model} minus {last_model}", **benchmark.settings}
            rows += result_rows(benchmark.name, "all", {headline: metric}, settings, 0.0, 0)
    return rows


def run_benchmark(parser: argparse.ArgumentParser) -> None:
    """Benchmarks: k solutions per problem, graded; 95 % intervals over problems in brackets.

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

    Several models are each compared with the last, problem by problem. The samples are kept beside --out as solutions
    files, so a killed run resumes."""
    parser.add_argument("--model", nargs="+", help="policies: directories or hub names; none: the tiny world")
    parser.add_argument("--problems", nargs="+", help="one file per benchmark: JSON Lines with id and problem")
    parser.add_argument("--gold", nargs="+", help="JSON Lines with id and answer")
    parser.add_argument("--num_samples", type=COUNT, default=4, help="k, samples per problem")
    parser.add_argument("--top_p", type=TOP_P, default=1.0)
    parser.add_argument("--greedy", action="store_true", help="also one greedy solution per problem")
    parser.add_argument("--solutions", nargs="+", help="measure these solutions files, one per benchmark, instead")
    parser.add_argument("--prm", help="reward model that chooses among the samples: a directory or hub name")
    parser.add_argument("--prm_kind", default="prm_cot", choices=list(REWARD_MODELS), help="what --prm was trained as")
    parser.add_argument("--prm_votes", type=COUNT, default=1, help="judgements per sample; 1: a greedy one")
    parser.add_argument("--prm_max_new_tokens", type=POSITIVE, default=4096, help="per judgement")
    add_sampling_flags(parser, temperature=1.0, max_new_tokens=3072)
    args = parse_command(parser, "model", "problems", "gold", unless="solutions")
    if args.solutions and (args.model or args.problems or args.greedy):
        raise InputError("--solutions are measured as they are; leave out --model, --problems and --greedy")
    if not args.gold:
        raise InputError("--gold is missing; it goes with --solutions")

    # 1. Whatever is wrong with the input is found before the first sample.
    gold = records.read_answers(args.gold)
    inputs = [*(args.problems or args.solutions), *args.gold, *map(find_model, args.model or [])]
    if args.prm:
        check_votes(args.prm_kind, args.prm_votes, "--prm_votes")
        check_model(args.prm, "--prm")
        inputs.append(find_model(args.prm, "--prm"))
    device = distributed.init_distributed(args.device)
    if args.solutions:
        benchmarks = grade_files(args, gold)
    else:
        benchmarks = sample_benchmarks(plan_samples(args, gold), gold, args, device)
    results = records.ResultsFile(args, inputs)

    # 2. Benchmark by benchmark: sample, grade, measure, write.
    if args.prm:
        benchmarks = list(benchmarks)  # all samples come first: the reward model needs the memory
    judge = None
    measured = []
    for benchmark in benchmarks:
        measured.append(benchmark)
        rows = results.earlier.get((benchmark.model, benchmark.name, "all"))
        if rows is None:
            if args.prm and judge is None:
                engine = open_engine(args.prm, device, args.slots, "--prm")
                judge = Judge(engine, args.prm_kind, args.prm_max_new_tokens, args.prm_votes)
            rows = measure_benchmark(benchmark, judge, args)
        results.add(rows)

    # 3. Average over benchmarks, compare models. The paper's table of six benchmarks is greedy.
    headline = f"avg@{measured[0].settings['num_samples']}"
    rows = []
    for model in dict.fromkeys(benchmark.model for benchmark in measured):
        of_model = [row for row in results.rows if row["settings"]["model"] == model]
        rows += average_rows("benchmarks", of_model, [headline, "greedy"])
    results.add(rows + compare_with_last(measured, headline, args.seed), complete=True)
    report.print_results(results.rows)


# --------------------------------------------------------------------------- the labels of Stage I

# Accuracy of: a step, a solution labelled right in every step (exact), the first wrong step, the outcome.
LABEL_METRICS = ("step", "exact", "first_error", "outcome")
PREFIXES = (1, 2, 4, 8, 16, 32)
Gold = tuple[list[bool] | None, bool | None]  # step labels and outcome of a solution, each None where not known
Counts = dict[str, tuple[float, int]]  # metric -> (how many are right, of how many), where gold is known


def problem_of(solution_id: str) -> str:
    """The problem's id in <problem_id>/<k>."""
    problem_id, _, _ = solution_id.rpartition("/")
    return problem_id


def gold_labels(steps: list[str], gold_steps: list[str]) -> list[bool]:
    """Step k is right if it is the gold step k, white space aside, and all before it are right.

    Exact where solutions are canonical, as in the tiny world; elsewhere another way to the answer would count as wrong.
    """
    labels = []
    right = True
    for k, step in enumerate(steps):
        right = right and k < len(gold_steps) and "".join(step.split()) == "".join(gold_steps[k].split())
        labels.append(right)
    return labels


def read_gold(path: str, solutions: list[dict]) -> dict[str, Gold]:
    """solution id -> gold, for the solutions (id, steps, answer) that have a record: their own (step_labels, outcome),
    or their problem's (answer, and steps if solutions are canonical)."""
    optional = ("answer", "steps", "step_labels", "outcome")
    known = {}
    for record in records.read(path, ["id"], "python -m data.make_tiny problems", optional=optional):
        known[record["id"]] = record
    gold: dict[str, Gold] = {}
    ungraded: dict[str, tuple[str | None, str]] = {}  # solution id -> (its answer, the reference answer)
    for solution in solutions:
        solution_id = solution["id"]
        steps = solution["steps"]
        own = known.get(solution_id)
        problem = known.get(problem_of(solution_id))
        if own:
            labels = own.get("step_labels")
            if labels is not None and len(labels) != len(steps):
                found = f"{len(labels)} step_labels and {len(steps)} steps"
                raise InputError(f"{path}: {solution_id} has {found}; fix the record")
            gold[solution_id] = (labels, own.get("outcome"))
        elif problem:
            labels = gold_labels(steps, problem["steps"]) if problem.get("steps") else None
            gold[solution_id] = (labels, None)
            if problem.get("answer") is not None:
                ungraded[solution_id] = (solution["answer"], problem["answer"])
    outcomes = grade_all(list(ungraded.values()))
    for solution_id, outcome in zip(ungraded, outcomes, strict=True):
        labels, _ = gold[solution_id]
        gold[solution_id] = (labels, outcome)
    if not gold:
        raise InputError(f"{path}: no record for any of {len(solutions)} solutions, by their ids or their problems'")
    return gold


def count_right(step_labels: list[bool], outcome: bool, gold: Gold) -> Counts:
    """What is right in the label of one solution."""
    gold_steps, gold_outcome = gold
    counts: Counts = {}
    if gold_steps is not None:
        right = sum(ours == theirs for ours, theirs in zip(step_labels, gold_steps, strict=True))
        counts["step"] = (right, len(gold_steps))
        counts["exact"] = (int(step_labels == gold_steps), 1)
        counts["first_error"] = (int(first_error(step_labels) == first_error(gold_steps)), 1)
    if gold_outcome is not None:
        counts["outcome"] = (int(outcome == gold_outcome), 1)
    return counts


def average_counts(several: list[Counts]) -> Counts:
    """The mean over several labels of the same solution."""
    average: Counts = {}
    for metric, (_, of) in several[0].items():
        right = sum(counts[metric][0] for counts in several)
        average[metric] = (right / len(several), of)
    return average


def summarize(counts: dict[str, Counts], num_labels: int) -> dict:
    """How many of num_labels solutions are counted, and the accuracy by each metric, None where nothing is known."""
    summary = {"solutions": len(counts), "yield": len(counts) / num_labels}
    for metric in LABEL_METRICS:
        known = [each[metric] for each in counts.values() if metric in each]
        right = sum(right for right, _ in known)
        of = sum(of for _, of in known)
        summary[metric] = right / of if of else None
    return summary


def label_row(about: dict, labels: dict[str, dict], gold: dict[str, Gold]) -> tuple[dict, dict[str, Counts]]:
    """A row of the report for labels (solution id -> step_labels, outcome, dropped, ties), and each solution's counts.

    The accuracy is given twice: over the labels that were `kept`, and over `all` that had a vote, so that dropping the
    hard ones can't pass for accuracy.
    """
    everything: dict[str, Counts] = {}
    kept: dict[str, Counts] = {}
    for solution_id, label in labels.items():
        if label["step_labels"] is None:  # nothing voted
            continue
        everything[solution_id] = count_right(label["step_labels"], label["outcome"], gold[solution_id])
        if label["dropped"] is None:
            kept[solution_id] = everything[solution_id]
    row = {
        **about,
        "ties": sum(label.get("ties", 0) for label in labels.values()),
        "dropped": dict(Counter(label["dropped"] for label in labels.values() if label["dropped"])),
        "kept": summarize(kept, len(labels)),
        "all": summarize(everything, len(labels)),
    }
    return row, everything


def paired_gain(counts: dict[str, Counts], base: dict[str, Counts], seed: int) -> dict[str, list[float]]:
    """metric -> [difference, low, high] of two labellings of the same solutions; 95 % interval over their problems."""
    problem_ids = list(dict.fromkeys(problem_of(solution_id) for solution_id in base))
    row_of = {problem_id: p for p, problem_id in enumerate(problem_ids)}
    found = {}
    for metric in LABEL_METRICS:
        gains = np.zeros(len(row_of))  # (P,) how many more are right
        sizes = np.zeros(len(row_of))  # (P,) of how many
        for solution_id in base:
            if metric in base[solution_id]:
                p = row_of[problem_of(solution_id)]
                gains[p] += counts[solution_id][metric][0] - base[solution_id][metric][0]
                sizes[p] += base[solution_id][metric][1]
        if sizes.any():
            low, high = interval95(bootstrap(gains, seed, sizes))
            found[metric] = [float(gains.sum() / sizes.sum()), low, high]
    return found


def vote_rows(
    N: int, solutions: list[dict], by_solution: dict[str, list[dict]], gold: dict[str, Gold], seed: int
) -> list[dict]:
    """A row for each way of voting, from the first N verifications of each solution."""
    used = []  # the verifications
    singles: dict[str, Counts] = {}
    num_parsed = 0
    for solution_id, verifications in by_solution.items():
        first = [v for v in verifications if v["sample"] < N]
        used += first
        parsed = keep_parsed(first)
        num_parsed += len(parsed)
        if parsed:
            several = [count_right(v["step_verdicts"], v["verdict"], gold[solution_id]) for v in parsed]
            singles[solution_id] = average_counts(several)

    cost = {"verifications": len(used), "unparsed": len(used) - num_parsed, "tokens": sum(v["tokens"] for v in used)}
    rows = []
    for method, aggregate in AGGREGATES.items():
        labels = {}
        for solution_id, label in zip(by_solution, label_solutions(solutions, used, aggregate, seed), strict=True):
            labels[solution_id] = vars(label)
        row, counts = label_row({"method": method, "N": N, **cost}, labels, gold)
        if method == "single":
            # Which verification came first is chance; the average over all parsed ones is a steadier measure of one.
            row["all"] = summarize(singles, len(labels))
        elif singles:
            row["all"]["minus_single"] = paired_gain(counts, singles, seed)
        rows.append(row)
    return rows


def vote_report(solutions: list[dict], verifications: list[dict], gold: dict[str, Gold], seed: int) -> list[dict]:
    """What voting buys: rows for single, outcome-level and step-level labels from the first 1, 2, 4, ... verifications;
    `minus_single` of a voted row is its paired gain over one verification."""
    by_solution = group_by_solution(solutions, verifications)
    most = max((group[-1]["sample"] + 1 for group in by_solution.values() if group), default=0)  # they are in order
    rows = []
    for N in PREFIXES:
        if most >= N:
            rows += vote_rows(N, solutions, by_solution, gold, seed)
    return rows


def file_row(
    method: str, labels: dict[str, dict], verifications: list[dict], critiques: list[dict], gold: dict
) -> dict:
    """The row of a labels file, with the tokens that its method took: of the verifications it reads and its
    critiques."""
    of_one_verification = [name for name, known in METHODS.items() if known.aggregate is single]
    only_first = method in of_one_verification
    tokens = sum(critique["tokens"] for critique in critiques if critique["method"] == method)
    for verification in verifications:
        if verification["solution_id"] in labels and (verification["sample"] == 0 or not only_first):
            tokens += verification["tokens"]
    row, _ = label_row({"method": f"{method} (file)", "N": None, "tokens": tokens}, labels, gold)
    return row


def run_labels(parser: argparse.ArgumentParser) -> None:
    """The label report: are Stage I's labels right, and what does voting buy?"""
    parser.add_argument("--labels", nargs="+", help="labels_<method>.jsonl of verify.py; none: the tiny world")
    parser.add_argument("--verifications", help="verifications.jsonl of verify.py")
    parser.add_argument("--gold", help="id, answer, steps of problems, or id, step_labels, outcome of solutions")
    parser.add_argument("--out", help="labels.json to write")
    parser.add_argument("--seed", type=SEED, default=0, help="verify.py's, for the same choices; also the bootstrap's")
    args = parse_command(parser, "labels", "verifications", "gold")

    # 1. Read the labels, what they were made from, and what would be right.
    fields = ["id", "steps", "answer", "method", "step_labels", "outcome", "dropped"]
    files = [records.read(path, fields, "python verify.py", optional=("ties",)) for path in args.labels]
    solutions = {}
    for file in files:
        solutions.update({label["id"]: label for label in file})
    verifications = read_verifications(args.verifications, list(solutions.values()))
    # What other methods have sampled, if their files lie beside the verifications.
    path = Path(args.verifications).with_name("verifications_reference.jsonl")
    with_reference = read_verifications(path, list(solutions.values())) if path.exists() else []
    path = path.with_name("critiques.jsonl")
    critiques = records.read(path, ["method", "tokens"]) if path.exists() else []
    gold = read_gold(args.gold, list(solutions.values()))

    # 2. Measure the files as they are, then what each way of voting makes of the verifications.
    rows = []
    for file in files:
        labels = {label["id"]: label for label in file if label["id"] in gold}
        method = file[0]["method"]
        judged = with_reference if method == "reference_guided" else verifications
        if labels:
            rows.append(file_row(method, labels, judged, critiques, gold))
    known = [solution for solution_id, solution in solutions.items() if solution_id in gold]
    rows += vote_report(known, verifications, gold, args.seed)
    counts = {
        "solutions": len(gold),
        "without_gold": len(solutions) - len(gold),
        "unknown_outcomes": sum(outcome is None for _, outcome in gold.values()),
    }

    # 3. Write, print and draw.
    records.write_args(Path(args.out), args)
    records.write_json(Path(args.out), {**counts, "rows": rows})
    report.print_label_report(rows, LABEL_METRICS)
    report.draw_curves(report.label_curves(rows), Path(args.out).with_suffix(".png"))
    distributed.log(" | ".join(f"{name} {value}" for name, value in counts.items()), "->", args.out, "and .png")


# --------------------------------------------------------------------------- what only shows


def run_plot(parser: argparse.ArgumentParser) -> None:
    """Curves of GRPO runs, or of a file of curves: a panel for each metric, a colour for each run. The runs that a
    pattern finds are seeds of one, drawn as their mean and a band from the lowest to the highest:
    python evaluate.py plot --runs 'runs/*/grpo' --out curves.png."""
    parser.add_argument("--runs", nargs="+", help="directories with metrics.jsonl, patterns of them, files of curves "
                        "(panel, curve, x, y); none: the tiny world")  # fmt: skip
    parser.add_argument("--out", help="PNG to write")
    parser.add_argument("--keys", nargs="+", default=list(report.PANELS), help="metrics to draw, where a run has them")
    args = parse_command(parser, "runs")
    curves = report.read_curves(args.runs, args.keys)
    if not curves:
        raise InputError(f"--keys {' '.join(args.keys)}: {' '.join(args.runs)} have none of them; name others")
    report.draw_curves(curves, Path(args.out))
    panels = {curve["panel"] for curve in curves}
    names = {curve["curve"] for curve in curves}
    print(f"{args.out}: {len(panels)} panels, {len(names)} runs")


def run_show(parser: argparse.ArgumentParser) -> None:
    """One problem's way through the stages: each solution with the votes on its steps, the label and the verification
    chosen for it; then the responses of GRPO's steps (grpo.py --dump_rollouts), each with the reward model's judgement,
    its reward and its advantage. The votes on the answer are counted if verifications.jsonl lies beside --labels."""
    parser.add_argument("id", nargs="?", help="of a problem or of a solution; none: the first problem")
    parser.add_argument("--labels", help="labels_<method>.jsonl of verify.py; none: the tiny world")
    parser.add_argument("--rollouts", help="the directory that grpo.py --dump_rollouts made")
    args = parse_command(parser, "labels")
    fields = ["id", "problem", "steps", "answer", "method", "step_labels", "outcome", "text", "votes", "dropped"]
    labels = records.read(args.labels, fields, "python verify.py")
    wanted = args.id or problem_of(labels[0]["id"])
    found = [label for label in labels if wanted in (label["id"], problem_of(label["id"]))]
    rollouts = report.read_rollouts(Path(args.rollouts), wanted) if args.rollouts else []
    if not found and not rollouts:
        raise InputError(f"{wanted}: no such problem or solution in {args.labels}, nor in --rollouts {args.rollouts}")
    path = Path(args.labels).with_name("verifications.jsonl")
    verifications = read_verifications(path, found) if path.exists() else []
    report.print_problem(found, keep_parsed(verifications), rollouts)


# --------------------------------------------------------------------------- main

COMMANDS = {
    "processbench": run_processbench,
    "benchmark": run_benchmark,
    "labels": run_labels,
    "plot": run_plot,
    "show": run_show,
}


def main() -> None:
    """Each command has a parser of its own, so that its --help shows its flags only."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    run = COMMANDS.get(command)
    parser = records.new_parser()
    if run is None:
        parser.description = __doc__
        parser.add_argument("command", choices=list(COMMANDS), help="each has a --help of its own")
        records.parse_flags(parser)  # prints the help or says what is wrong, and exits
    parser.description = inspect.cleandoc(run.__doc__)
    parser.add_argument("command", choices=[command])
    run(parser)


if __name__ == "__main__":
    distributed.run_stage(main)
