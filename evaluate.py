"""Three commands that measure, two that show (SPARK, arXiv 2512.03244, Sec. 4), each after the stage that it measures.

    python evaluate.py processbench   # does a reward model find the first wrong step?  -> runs/tiny/processbench.jsonl
    python evaluate.py benchmark      # does a policy solve problems it hasn't seen?    -> runs/tiny/benchmark.jsonl
    python evaluate.py labels         # are the labels of Stage I right?                -> runs/tiny/labels.json
    python evaluate.py plot           # the curves of GRPO runs, and of studies         -> runs/tiny/curves.png
    python evaluate.py show t0003     # one problem's way through all stages            -> the terminal

Reference answers are read here, after the fact: nothing feeds back into reference-free training. What can't be judged
is counted: an unparsed verification is wrong on ProcessBench, an answer that can't be graded within its deadline is
`unknown`.
"""

import argparse
import functools
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data import grader, records, report
from data.records import COUNT, POSITIVE, SEED, TEMPERATURE, TOP_P, name_files, read_cases, require_answers
from generate import SOLVE_PROMPT, Engine, check_model, find_incomplete, fit_prompts, generate_solutions, open_engine
from kernels import distributed
from kernels.chat import find_model
from kernels.distributed import InputError
from kernels.text import extract_answer, states_value
from train_prm import REWARD_MODELS, Judge, Judgement, check_votes, judge_prompt, score_solutions
from verify import AGGREGATES, METHODS, group_by_solution, keep_parsed, label_solutions, read_verifications, single

import numpy as np
import torch

# Used when one of a command's inputs isn't given; an explicit flag wins.
TINY = {
    "processbench": {
        "model": ["runs/tiny/prm_cot"], "data": ["data/tiny/processbench.jsonl"], "out": "runs/tiny/processbench.jsonl",
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

    Units are dropped (5 g is 5 kg); data/grader.py lists such decisions. timeout: seconds of CPU time per reading, of
    which some numbers have two. Raises ValueError if it isn't positive, InputError if the grading worker can't run.
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
        verdicts = list(threads.map(lambda pair: grade(*pair, timeout), unique))
    known = dict(zip(unique, verdicts, strict=True))
    return [known[pair] for pair in pairs]


# --------------------------------------------------------------------------- numbers


class Metric(NamedTuple):
    """A measured fraction."""

    value: float  # 0 to 1
    n: int  # cases or problems that it is over
    interval: tuple[float, float] | None = None  # (low, high), 95 %


def first_error(step_verdicts: list[bool] | None) -> int | None:
    """Index of the first step judged incorrect, else -1; None for unparsed verdicts."""
    if step_verdicts is None:
        return None
    return step_verdicts.index(False) if False in step_verdicts else -1


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
    return {"error_acc": error_acc, "correct_acc": correct_acc, "f1": float(harmonic_mean(error_acc, correct_acc))}


def harmonic_mean(a: float | np.ndarray, b: float | np.ndarray) -> float | np.ndarray:
    """2 a b / (a + b) of fractions, or of arrays of them; 0 of two zeros."""
    return 2 * a * b / np.maximum(a + b, 1e-12)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that k of n samples, c of them right, include a right one: 1 - C(n-c, k) / C(n, k), Eq. 1 of
    Chen et al. 2021 (arXiv 2107.03374)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"need 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@functools.lru_cache  # maj@k and the votes of best-of-k ask about the same samples
def cluster_answers(answers: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Each answer's cluster, named by its first answer: ("5", "7", "5.0", None) -> ("5", "7", "5", None).

    Each distinct string joins the first cluster whose first answer it equals by `grade`, or begins a new one. An answer
    that states no value, as None and "?", has no cluster.
    """
    cluster_of = {}
    unclustered = [answer for answer in dict.fromkeys(answers) if states_value(answer)]
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
    return max(votes, key=votes.get, default=None)


def sizes_up_to(n: int) -> list[int]:
    """2, 4, 8, ... below n, and n."""
    powers = [2**i for i in range(1, n.bit_length())]
    return [*(k for k in powers if k < n), n]


def bootstrap(values: np.ndarray, seed: int, sizes: np.ndarray) -> np.ndarray:
    """sum(values) / sum(sizes) over resamples of their P rows, (P, ...) each -> (RESAMPLES, ...): a mean over parts
    (steps), of which a row may have several. Raises ValueError for no rows."""
    P = len(values)
    if P == 0:
        raise ValueError("nothing to resample: no rows")
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(P, size=P)  # P rows, with replacement
        times = np.bincount(drawn, minlength=P)  # (P,) how often each row was drawn
        size = np.maximum(times @ sizes, 1e-12)
        means.append(times @ values / size)
    return np.stack(means)


def interval95(values: np.ndarray) -> tuple[float, float]:
    """(low, high): the 2.5 % and 97.5 % quantiles of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_interval(per_problem: np.ndarray, seed: int) -> tuple[float, float]:
    """(low, high): 95 % interval of the mean of per_problem (P,). Problems are resampled, as the samples of one problem
    aren't independent of each other."""
    values = np.asarray(per_problem, dtype=float)
    return interval95(bootstrap(values, seed, np.ones(len(values))))


def measure(per_problem: np.ndarray, seed: int) -> Metric:
    """The mean of per_problem (P,) with its `bootstrap_interval`."""
    return Metric(float(per_problem.mean()), len(per_problem), bootstrap_interval(per_problem, seed))


# --------------------------------------------------------------------------- shared by the commands


def average(metrics: list[Metric]) -> Metric:
    """The plain mean over subsets, benchmarks or files; n counts them."""
    n = len(metrics)
    mean = sum(metric.value for metric in metrics) / n
    # The samples are independent, so the variances of the sum add up, and with them the squares of the half-widths.
    half = sum((high - low) ** 2 for _, _, (low, high) in metrics) ** 0.5 / 2 / n
    return Metric(mean, n, (mean - half, mean + half))


def average_rows(benchmark: str, rows: list[dict], metrics: list[str]) -> list[dict]:
    """`average` of each metric over the subsets or benchmarks of each model, if it has several."""
    averages = []
    for model in dict.fromkeys(row["settings"]["model"] for row in rows):
        for name in metrics:
            measured = [row for row in rows if row["metric"] == name and row["settings"]["model"] == model]
            if len(measured) < 2:
                continue
            mean = average([Metric(row["value"], row["n"], row["interval"]) for row in measured])
            seconds = sum(row["seconds"] for row in measured)
            tokens = sum(row["tokens"] for row in measured)
            settings = measured[0]["settings"]
            averages += records.result_rows(benchmark, "average", {name: mean}, settings, seconds, tokens)
    return averages


def score_shared(judge: Judge, solutions: list[dict], seed: int, title: str) -> list[Judgement]:
    """`score_solutions`; every rank does its share and has all."""
    mine = distributed.my_part(solutions)
    return distributed.gather(score_solutions(judge, mine, seed=seed, title=title))


def limit_metrics(limits: list[int | None], max_new_tokens: int) -> dict[str, Metric]:
    """The shares of prompts that are too long (None) and of those that get fewer new tokens; none for a share of 0."""
    n = len(limits)
    too_long = limits.count(None)
    shortened = n - too_long - limits.count(max_new_tokens)
    counts = {"too_long": too_long, "shortened": shortened}
    return {name: Metric(count / n, n) for name, count in counts.items() if count}


def add_sampling_flags(parser: argparse.ArgumentParser, temperature: float, max_new_tokens: int) -> None:
    """The flags of commands with a model."""
    parser.add_argument("--out", help="results.jsonl to write")
    parser.add_argument("--temperature", type=TEMPERATURE, default=temperature, help="a greedy pass has none")
    parser.add_argument("--max_new_tokens", type=POSITIVE, default=max_new_tokens, help="per sample")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--limit", type=POSITIVE, help="use only the first N records of each file")
    parser.add_argument("--slots", type=COUNT, help="samples at a time; default: by the GPU's memory, on a CPU 128")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")


# --------------------------------------------------------------------------- ProcessBench


def processbench_numbers(kind: str, cases: list[dict], judgements: list[Judgement], seed: int) -> dict[str, Metric]:
    """The metrics of one subset. A PRM's prediction is the first step that it judges incorrect, else -1. An ORM names
    no step; its verdict is compared with final_answer_correct."""
    n = len(cases)
    if not REWARD_MODELS[kind].judges_steps:
        verdicts = [judgement.verdict for judgement in judgements]
        truths = [records.final_answer_correct(case, f"case {i}") for i, case in enumerate(cases)]
        right = np.array(verdicts) == np.array(truths)  # (n,); None equals neither
        unparsed = Metric(verdicts.count(None) / n, n)
        return {"outcome_acc": measure(right, seed), "unparsed": unparsed}

    labels = [case["label"] for case in cases]
    predictions = [first_error(judgement.step_verdicts) for judgement in judgements]
    found = processbench_f1(labels, predictions)

    # F1 is no mean over cases: each resample of the cases has accuracies of its own, and F1 follows from them.
    is_wrong = np.array(labels) != -1  # (n,)
    groups = np.stack([is_wrong, ~is_wrong], axis=1).astype(float)  # (n, 2): in which group a case is
    hits = np.array(labels) == np.array(predictions)  # (n,)
    resampled = bootstrap(hits[:, None] * groups, seed, groups)  # (RESAMPLES, 2)
    error_acc, correct_acc = resampled.T
    f1 = harmonic_mean(error_acc, correct_acc)

    num_wrong = int(is_wrong.sum())
    metrics = {}
    metrics["f1"] = Metric(found["f1"], n, interval95(f1))
    metrics["error_acc"] = Metric(found["error_acc"], num_wrong, interval95(error_acc))
    metrics["correct_acc"] = Metric(found["correct_acc"], n - num_wrong, interval95(correct_acc))
    metrics["unparsed"] = Metric(predictions.count(None) / n, n)
    return metrics


def match_kinds(models: list[str], kinds: list[str]) -> dict[str, str]:
    """model -> what it was trained as. Raises InputError if there are neither one kind nor as many as models."""
    if len(set(models)) < len(models):
        raise InputError(f"--model {' '.join(models)}: name each once")
    if len(kinds) == 1:
        kinds = kinds * len(models)
    if len(kinds) != len(models):
        raise InputError(f"--kind {' '.join(kinds)}: {len(kinds)} kinds for {len(models)} models; give one, or as many")
    return dict(zip(models, kinds, strict=True))


def run_processbench(parser: argparse.ArgumentParser) -> None:
    """ProcessBench: do reward models find the first wrong step of a solution?"""
    parser.add_argument("--model", nargs="+", help="reward models: directories or hub names; none: the tiny world")
    parser.add_argument("--data", nargs="+", help="one file per subset: JSON Lines or array of problem, steps, label")
    parser.add_argument("--kind", nargs="+", default=["prm_cot"], choices=list(REWARD_MODELS),
                        help="what they were trained as: one kind for all, or one for each")  # fmt: skip
    parser.add_argument("--votes", type=COUNT, default=1, help="1: one greedy pass; K: sample K and take majorities")
    add_sampling_flags(parser, temperature=0.8, max_new_tokens=4096)
    args = records.parse_inputs(parser, TINY, "model", "data")

    # 1. Whatever is wrong with the input is found before the first judgement.
    kinds = match_kinds(args.model, args.kind)
    subsets = {}
    for name, path in name_files("data", args.data).items():
        # ProcessBench has no separate answer, so an answer field of a case is ignored.
        cases = read_cases(path)[: args.limit]
        subsets[name] = [{**case, "id": f"{name}/{i}", "answer": None} for i, case in enumerate(cases)]
    limits = {}  # (model, subset) -> the most new tokens of each case
    for model, kind in kinds.items():
        check_votes(kind, args.votes, "--votes")
        tokenizer, context = check_model(model)
        for name, cases in subsets.items():
            turns = [judge_prompt(REWARD_MODELS[kind].prompt, case) for case in cases]
            _, limits[model, name] = fit_prompts(tokenizer, context, turns, args.max_new_tokens, name)
    device = distributed.init_distributed(args.device)
    inputs = [*args.data, *(find_model(model) for model in kinds)]
    results = records.ResultsFile(args.out, args, inputs)

    # 2. Model by model, subset by subset: judge, measure, write.
    for model, kind in kinds.items():
        settings = {"model": model, "kind": kind, "votes": args.votes, "temperature": args.temperature,
                    "seed": args.seed, "max_new_tokens": args.max_new_tokens}  # fmt: skip
        judge = None  # there may not be memory for two
        for subset, cases in subsets.items():
            rows = results.earlier.pop((model, "processbench", subset), None)
            if rows is None:
                if judge is None:
                    judge = Judge(
                        open_engine(model, device, args.slots), kind, args.max_new_tokens, args.votes, args.temperature
                    )
                started = time.time()
                judgements = score_shared(judge, cases, args.seed, subset)
                metrics = processbench_numbers(kind, cases, judgements, args.seed)
                metrics |= limit_metrics(limits[model, subset], args.max_new_tokens)
                tokens = sum(judgement.tokens for judgement in judgements)
                rows = records.result_rows("processbench", subset, metrics, settings, time.time() - started, tokens)
            results.add(rows)

    # 3. The paper's headline is the average over subsets.
    results.add(average_rows("processbench", results.rows, ["f1", "outcome_acc"]), complete=True)
    report.print_results(results.rows)


# --------------------------------------------------------------------------- benchmarks


@dataclass
class Graded:
    """P problems with k graded samples each, and their accuracy with its 95 % interval over problems."""

    samples: list[list[dict]]  # P lists of k solutions: problem_id, problem, text, answer, finish, tokens
    correct: np.ndarray  # (P, k) bool; an answer that can't be graded isn't correct
    unknown: int  # answers that can't be graded
    tokens: int  # of all samples
    accuracy: float
    low: float
    high: float


def grade_samples(samples: list[list[dict]], gold: dict[str, str], seed: int) -> Graded:
    """Grade P >= 1 lists of k samples against gold (problem id -> answer). Under torchrun every rank has all samples,
    grades its share, and returns the same."""
    k = len(samples[0])
    pairs = []
    for sample in chain.from_iterable(distributed.my_part(samples)):
        pairs.append((sample["answer"], gold[sample["problem_id"]]))
    verdicts = grade_all(pairs)
    mine = [verdicts[i : i + k] for i in range(0, len(verdicts), k)]
    grades = distributed.gather(mine)  # P lists of k

    correct = np.equal(grades, True)  # (P, k); None, an answer that can't be graded, isn't
    unknown = sum(group.count(None) for group in grades)
    tokens = sum(sample["tokens"] for sample in chain.from_iterable(samples))
    accuracy = measure(correct.mean(axis=1), seed)
    return Graded(samples, correct, unknown, tokens, accuracy.value, *accuracy.interval)


def heldout_accuracy(
    engine: Engine, problems: list[dict], gold: dict[str, str], *, max_new_tokens: int, seed: int, **settings
) -> Graded:
    """Sample k solutions to each of P >= 1 problems (id, problem) and grade them against gold (id -> answer): a look at
    a policy in training, without files. settings: num_samples and temperature, optionally top_p. A collective.

    Problems that are too long for the context are left out. Raises InputError for a problem without a gold answer, and
    if all are too long.
    """
    require_answers([problem["id"] for problem in problems], gold)
    mine = distributed.my_part(engine.fit_problems(problems, max_new_tokens, "held-out problems"))
    prompts = [problem["prompt"] for problem in mine]
    keys = [problem["id"] for problem in mine]
    limits = [problem["limit"] for problem in mine]
    groups = engine.sample(prompts, keys=keys, max_new_tokens=limits, seed=seed, **settings)
    solutions = []
    for problem, samples in zip(mine, groups, strict=True):
        of_problem = []
        for sample in samples:
            text = engine.text(sample.ids, problem["prompt"])
            solution = {"problem_id": problem["id"], "problem": problem["problem"], "text": text}
            solution |= {"answer": extract_answer(text), "finish": sample.finish, "tokens": len(sample.ids)}
            of_problem.append(solution)
        solutions.append(of_problem)
    return grade_samples(distributed.gather(solutions), gold, seed)


def benchmark_numbers(graded: Graded, others: dict[str, np.ndarray], seed: int) -> dict[str, Metric]:
    """avg@k, pass@j for j = 2, 4, ... k, and maj@k of graded samples; others: further metrics' values (P,)."""
    P, k = graded.correct.shape
    per_problem = {f"avg@{k}": graded.correct.mean(axis=1)}  # (P,) each
    counts = graded.correct.sum(axis=1)  # (P,)
    for j in sizes_up_to(k):
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
        metrics[name] = measure(values, seed)
    truncated = sum(sample["finish"] == "length" for sample in chain.from_iterable(graded.samples))
    metrics["unknown"] = Metric(graded.unknown / (P * k), P)
    metrics["truncated"] = Metric(truncated / (P * k), P)
    return metrics


# --- best of k: a reward model chooses among the same samples


def best_of_k(
    correct: np.ndarray, answers: list[list[str | None]], judgements: list[list[Judgement]]
) -> dict[str, np.ndarray]:
    """metric -> (P,) 1.0 where the sample that a reward model chooses among a problem's first k is correct, else 0.0;
    correct is (P, n), and k = 2, 4, 8, ... and n. The sample with the greatest score by the rule is chosen (see
    `report.BENCHMARK_METRICS`), the earliest of equals. An unparsed judgement scores 0."""
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
            hits = correct[np.arange(P), chosen]
            found[f"best@{k}/{rule}"] = hits.astype(float)
    return found


def sum_by_answer(answers: list[list[str | None]], scores: np.ndarray, k: int) -> np.ndarray:
    """(P, k): for each of a problem's first k samples the sum of the scores (P, n) of those with an equal answer; 0
    without an answer."""
    sums = np.zeros((len(answers), k))
    for p, group in enumerate(answers):
        clusters = cluster_answers(tuple(group))[:k]
        totals = Counter()
        for i, cluster in enumerate(clusters):
            totals[cluster] += scores[p, i]
        totals[None] = 0
        sums[p] = [totals[cluster] for cluster in clusters]
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
    for name, path in name_files("solutions", args.solutions).items():
        started = time.time()
        samples = list(records.read_samples(path).values())[: args.limit]
        problem_ids = [group[0]["problem_id"] for group in samples]
        require_answers(problem_ids, gold)
        graded = grade_samples(samples, gold, args.seed)
        settings = {"num_samples": len(samples[0]), "seed": args.seed}
        model = samples[0][0]["model"]
        seconds = time.time() - started
        yield Benchmark(model, name, settings, graded, greedy=None, limits={}, seconds=seconds)


def plan_samples(args: argparse.Namespace, gold: dict[str, str]) -> list[tuple]:
    """(model, benchmark, the problems that fit the model's context, `limit_metrics`) of every model and file."""
    files = records.read_problem_sets("problems", args.problems, gold, args.limit)
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
    """Sample and grade what `plan_samples` says. The samples stay in solutions files beside --out, which a killed run
    continues; with other settings it may not."""
    settings = {"num_samples": args.num_samples, "temperature": args.temperature, "top_p": args.top_p,
                "max_new_tokens": args.max_new_tokens, "seed": args.seed}  # fmt: skip
    passes = {"": settings}  # suffix of the file -> how to sample
    if args.greedy:
        passes["_greedy"] = {**settings, "num_samples": 1, "temperature": 0.0}
    directory = Path(args.out.removesuffix(".jsonl") + "_samples")
    engine = None
    opened = ""  # the model that the engine has
    for model, name, problems, limits in plan:
        started = time.time()
        if model != opened:
            engine = None  # there may not be memory for two
            opened = model
        # A model that has been trained on under the same name isn't the one that sampled.
        source = {"model": model, "model_sha256": records.hash_model(find_model(model))}
        source["prompt_sha256"] = records.hash_text(SOLVE_PROMPT)
        file_name = model.strip("/").replace("/", "-")
        graded = {}
        for suffix, how in passes.items():
            path = directory / f"{file_name}_{name}{suffix}.jsonl"
            described = argparse.Namespace(**source, **how)
            with records.RecordFile(path, described, may_change=set(), remembered_field="problem") as output:
                if find_incomplete(problems, output, described.num_samples):
                    engine = engine or open_engine(model, device, args.slots)
                    generate_solutions(engine, problems, output, described)
            groups = records.read_samples(path)  # it may also have problems beyond --limit
            samples = [groups[problem["id"]] for problem in problems]
            graded[suffix] = grade_samples(samples, gold, args.seed)
        seconds = time.time() - started
        yield Benchmark(model, name, settings, graded[""], graded.get("_greedy"), limits, seconds)


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
        settings |= {"prm": args.prm, "kind": args.prm_kind, "votes": args.prm_votes,
                     "prm_max_new_tokens": args.prm_max_new_tokens}  # fmt: skip
        solutions = list(chain.from_iterable(graded.samples))
        judgements = score_shared(judge, solutions, args.seed, f"{benchmark.name}, judged")  # P * k
        tokens += sum(judgement.tokens for judgement in judgements)
        answers = [[sample["answer"] for sample in group] for group in graded.samples]
        by_problem = [judgements[i : i + k] for i in range(0, P * k, k)]
        others |= best_of_k(graded.correct, answers, by_problem)
        unparsed = [judgement.verdict is None for judgement in judgements]
        others["unparsed"] = np.reshape(unparsed, (P, k)).mean(axis=1)
    metrics = benchmark_numbers(graded, others, args.seed) | benchmark.limits
    seconds = benchmark.seconds + time.time() - started
    return records.result_rows(benchmark.name, "all", metrics, settings, seconds, tokens)


def accuracies(benchmark: Benchmark) -> dict[str, float]:
    """problem id -> accuracy of its samples."""
    problem_ids = [group[0]["problem_id"] for group in benchmark.graded.samples]
    return dict(zip(problem_ids, benchmark.graded.correct.mean(axis=1), strict=True))


def compare_with_last(benchmarks: list[Benchmark], headline: str, seed: int) -> list[dict]:
    """Rows of each model's accuracy minus that of the last one; paired, over the problems that both have."""
    last_model = benchmarks[-1].model
    last = {benchmark.name: accuracies(benchmark) for benchmark in benchmarks if benchmark.model == last_model}
    rows = []
    for benchmark in benchmarks:
        mine = accuracies(benchmark)
        others = last.get(benchmark.name, {})
        change = [mine[problem_id] - others[problem_id] for problem_id in mine if problem_id in others]
        if benchmark.model != last_model and change:
            metrics = {headline: measure(np.array(change), seed)}
            settings = {"model": f"{benchmark.model} minus {last_model}", **benchmark.settings}
            rows += records.result_rows(benchmark.name, "all", metrics, settings, 0.0, 0)
    return rows


def run_benchmark(parser: argparse.ArgumentParser) -> None:
    """Benchmarks: k solutions per problem, graded. Several models are each compared with the last, problem by problem.
    The samples are kept beside --out as solutions files, so a killed run resumes."""
    parser.epilog = report.BENCHMARK_METRICS
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
    args = records.parse_inputs(parser, TINY, "model", "problems", "gold", unless="solutions")
    if args.solutions and (args.model or args.problems or args.greedy):
        raise InputError("--solutions are measured as they are; leave out --model, --problems and --greedy")
    if not args.gold:
        raise InputError("--gold is missing; it goes with --solutions")

    # 1. Whatever is wrong with the input is found before the first sample.
    gold = records.read_answers(args.gold)
    if args.prm:
        check_votes(args.prm_kind, args.prm_votes, "--prm_votes")
        check_model(args.prm, "--prm")
    device = distributed.init_distributed(args.device)
    if args.solutions:
        benchmarks = grade_files(args, gold)
    else:
        benchmarks = sample_benchmarks(plan_samples(args, gold), gold, args, device)
    models = [find_model(model) for model in [*(args.model or []), args.prm] if model]
    inputs = [*(args.solutions or args.problems), *args.gold, *models]
    results = records.ResultsFile(args.out, args, inputs)

    # 2. Benchmark by benchmark: sample, grade, measure, write.
    judge = None
    if args.prm:
        benchmarks = list(benchmarks)  # all samples come first: the reward model needs the memory
        engine = open_engine(args.prm, device, args.slots, "--prm")
        judge = Judge(engine, args.prm_kind, args.prm_max_new_tokens, args.prm_votes)
    measured = []
    for benchmark in benchmarks:
        measured.append(benchmark)
        rows = results.earlier.pop((benchmark.model, benchmark.name, "all"), None)
        results.add(rows or measure_benchmark(benchmark, judge, args))

    # 3. Average over benchmarks, compare models. The paper's table of six benchmarks is greedy.
    headline = f"avg@{measured[0].settings['num_samples']}"
    averages = average_rows("benchmarks", results.rows, [headline, "greedy"])
    results.add(averages + compare_with_last(measured, headline, args.seed), complete=True)
    report.print_results(results.rows)


# --------------------------------------------------------------------------- the labels of Stage I

# Accuracy of: a step, a solution labelled right in every step (exact), the first wrong step, the outcome.
LABEL_METRICS = ("step", "exact", "first_error", "outcome")
PREFIXES = (1, 2, 4, 8, 16, 32)
Gold = tuple[list[bool] | None, bool | None]  # step labels and outcome of a solution, each None where not known


def read_gold(path: str, solutions: list[dict]) -> dict[str, Gold]:
    """solution id -> gold, for the solutions (id, steps, answer) that have it by `records.find_gold`; an outcome that
    isn't given is the grade of the answer."""
    found = records.find_gold(path, solutions)
    answers = {}  # solution id -> (its answer, the reference answer)
    for solution, _, _, reference in found:
        if reference is not None:
            answers[solution["id"]] = (solution["answer"], reference)
    graded = grade_all(list(answers.values()))
    grades = dict(zip(answers, graded, strict=True))
    gold: dict[str, Gold] = {}
    for solution, step_labels, outcome, _ in found:
        gold[solution["id"]] = (step_labels, grades.get(solution["id"], outcome))
    return gold


def count_right(step_labels: list[bool], outcome: bool, gold: Gold) -> np.ndarray:
    """(2, 4): by each of LABEL_METRICS, how much is right in one label, and of how much; 0 of 0 if gold isn't known."""
    gold_steps, gold_outcome = gold
    counts = [(0, 0)] * 4
    if gold_steps is not None:
        same = sum(ours == theirs for ours, theirs in zip(step_labels, gold_steps, strict=True))
        counts[0] = (same, len(gold_steps))
        counts[1] = (step_labels == gold_steps, 1)
        counts[2] = (first_error(step_labels) == first_error(gold_steps), 1)
    if gold_outcome is not None:
        counts[3] = (outcome == gold_outcome, 1)
    return np.array(counts, dtype=float).T


def summarize(counts: list[np.ndarray], num_labels: int) -> dict:
    """How many of num_labels solutions are counted, and the accuracy by each metric, None where nothing is known."""
    right, of = np.sum([np.zeros((2, 4)), *counts], axis=0)
    summary = {"solutions": len(counts), "yield": len(counts) / num_labels}
    for m, metric in enumerate(LABEL_METRICS):
        summary[metric] = float(right[m] / of[m]) if of[m] else None
    return summary


def count_labels(labels: dict[str, dict], gold: dict[str, Gold]) -> dict[str, np.ndarray]:
    """solution id -> `count_right` of its label, for the labels (step_labels, outcome) that had a vote."""
    counts = {}
    for solution_id, label in labels.items():
        if label["step_labels"] is not None:
            counts[solution_id] = count_right(label["step_labels"], label["outcome"], gold[solution_id])
    return counts


def label_row(about: dict, labels: dict[str, dict], counts: dict[str, np.ndarray]) -> dict:
    """A row of the report for labels (solution id -> dropped, ties) and their `count_labels`. The accuracy is that of
    the labels that were `kept`, and that of `all` that had a vote, so that dropping the hard ones can't pass for
    accuracy."""
    kept = [count for solution_id, count in counts.items() if labels[solution_id]["dropped"] is None]
    ties = [label.get("ties", 0) for label in labels.values()]
    reasons = [label["dropped"] for label in labels.values() if label["dropped"]]
    row = {**about, "ties": sum(ties), "dropped": dict(Counter(reasons))}
    row["kept"] = summarize(kept, len(labels))
    row["all"] = summarize(list(counts.values()), len(labels))
    return row


def paired_gain(counts: dict[str, np.ndarray], base: dict[str, np.ndarray], seed: int) -> dict[str, list[float]]:
    """metric -> [difference, low, high] of two labellings of the same solutions; 95 % interval over their problems."""
    by_problem: dict[str, np.ndarray] = {}  # (2, 4) each: how much more is right, of how much
    for solution_id, (right, of) in base.items():
        more = counts[solution_id][0] - right
        problem_id = records.problem_of(solution_id)
        by_problem[problem_id] = by_problem.get(problem_id, 0) + np.stack([more, of])
    gains, sizes = np.stack(list(by_problem.values()), axis=1)  # (P, 4) each
    resampled = bootstrap(gains, seed, sizes)  # (RESAMPLES, 4)
    found = {}
    for m, metric in enumerate(LABEL_METRICS):
        size = sizes[:, m].sum()
        if size > 0:
            difference = float(gains[:, m].sum() / size)
            found[metric] = [difference, *interval95(resampled[:, m])]
    return found


def vote_rows(N: int, solutions: list[dict], used: list[dict], gold: dict[str, Gold], seed: int) -> list[dict]:
    """A row for each way of voting, from the verifications used: the first N of each solution."""
    parsed = keep_parsed(used)
    of_each: dict[str, list[np.ndarray]] = {}
    for v in parsed:
        counts = count_right(v["step_verdicts"], v["verdict"], gold[v["solution_id"]])
        of_each.setdefault(v["solution_id"], []).append(counts)
    # Which verification came first is chance; the average over all parsed ones is a steadier measure of one.
    singles = {solution_id: np.mean(several, axis=0) for solution_id, several in of_each.items()}

    tokens = sum(v["tokens"] for v in used)
    cost = {"N": N, "verifications": len(used), "unparsed": len(used) - len(parsed), "tokens": tokens}
    rows = []
    for method, aggregate in AGGREGATES.items():
        voted = label_solutions(solutions, used, aggregate, seed)
        labels = {solution["id"]: vars(label) for solution, label in zip(solutions, voted, strict=True)}
        counts = count_labels(labels, gold)
        row = label_row({"method": method, **cost}, labels, counts)
        if method == "single":
            row["all"] = summarize(list(singles.values()), len(labels))
        elif singles:
            row["all"]["minus_single"] = paired_gain(counts, singles, seed)
        rows.append(row)
    return rows


def vote_report(
    solutions: list[dict], verifications: list[dict], gold: dict[str, Gold], seed: int, stopped: bool = False
) -> list[dict]:
    """What voting buys: rows for single, outcome-level and step-level labels from the first N = 1, 2, 4, ...
    verifications; `minus_single` of a voted row is its paired gain over one verification. stopped: by verify.py --stop;
    then only hard solutions have many, and no row is on more votes than all have."""
    by_solution = group_by_solution(solutions, verifications)
    numbers = [group[-1]["sample"] + 1 for group in by_solution.values() if group]  # each group is in order
    most = max(numbers, default=0)
    if stopped:
        most = min(numbers, default=0)
    rows = []
    for N in PREFIXES:
        if most >= N:
            used = [v for v in chain.from_iterable(by_solution.values()) if v["sample"] < N]
            rows += vote_rows(N, solutions, used, gold, seed)
    return rows


def file_row(
    method: str, labels: dict[str, dict], verifications: list[dict], critiques: list[dict], gold: dict
) -> dict:
    """The row of a labels file, with the tokens of the verifications and critiques that its method uses."""
    only_first = method in METHODS and METHODS[method].aggregate is single
    tokens = sum(critique["tokens"] for critique in critiques if critique["method"] == method)
    for verification in verifications:
        if verification["solution_id"] in labels and (verification["sample"] == 0 or not only_first):
            tokens += verification["tokens"]
    about = {"method": f"{method} (file)", "N": None, "tokens": tokens}
    return label_row(about, labels, count_labels(labels, gold))


def run_labels(parser: argparse.ArgumentParser) -> None:
    """The label report: are Stage I's labels right, and what does voting buy?"""
    parser.add_argument("--labels", nargs="+", help="labels_<method>.jsonl of verify.py; none: the tiny world")
    parser.add_argument("--verifications", help="verifications.jsonl of verify.py")
    parser.add_argument("--gold", help="id, answer, steps of problems, or id, step_labels, outcome of solutions")
    parser.add_argument("--out", help="labels.json to write")
    parser.add_argument("--seed", type=SEED, default=0, help="verify.py's, for the same choices; also the bootstrap's")
    args = records.parse_inputs(parser, TINY, "labels", "verifications", "gold")
    figure = Path(args.out).with_suffix(".png")
    if records.read_args(Path(args.out)) is None:  # so the figure is not of this command
        records.check_output(figure, args)

    # 1. Read the labels, what they were made from, and what would be right.
    fields = ["id", "steps", "answer", "method", "step_labels", "outcome", "dropped"]
    files = {path: records.read(path, fields, "python verify.py", optional=("ties",)) for path in args.labels}
    solutions = records.merge_labels(files)
    verifications = read_verifications(args.verifications, solutions)
    stop = (records.read_args(Path(args.verifications)) or {}).get("stop", "all")
    # What other methods have sampled, if their files lie beside the verifications.
    path = Path(args.verifications).with_name("verifications_reference.jsonl")
    with_reference = read_verifications(path, solutions) if path.exists() else []
    path = path.with_name("critiques.jsonl")
    critiques = records.read(path, ["method", "tokens"]) if path.exists() else []
    gold = read_gold(args.gold, solutions)
    without_gold = len(solutions) - len(gold)
    unknown = sum(outcome is None for _, outcome in gold.values())
    counts = {"solutions": len(gold), "without_gold": without_gold, "unknown_outcomes": unknown}

    # 2. Measure the files as they are, then what each way of voting makes of the verifications.
    rows = []
    for file in files.values():
        labels = {label["id"]: label for label in file if label["id"] in gold}
        method = file[0]["method"]
        judged = verifications
        if method == "reference_guided":
            judged = with_reference
        if labels:
            rows.append(file_row(method, labels, judged, critiques, gold))
    solutions = [solution for solution in solutions if solution["id"] in gold]
    rows += vote_report(solutions, verifications, gold, args.seed, stopped=stop != "all")

    # 3. Write, print and draw.
    records.write_args(Path(args.out), args)
    records.write_json(Path(args.out), {**counts, "rows": rows})
    report.print_label_report(rows, LABEL_METRICS)
    report.draw_curves(report.label_curves(rows), figure)
    if stop != "all":
        distributed.log(f"{args.verifications}: --stop {stop}, so no row is on more votes than all solutions have")
    distributed.log(" | ".join(f"{name} {value}" for name, value in counts.items()), "->", args.out, "and .png")


# --------------------------------------------------------------------------- what only shows


def run_plot(parser: argparse.ArgumentParser) -> None:
    """Curves of GRPO runs, or of a file of curves: a panel for each metric, a colour for each run. The runs that a
    pattern finds ('runs/*/grpo') are seeds of one, drawn as their mean and a band from the lowest to the highest."""
    parser.add_argument("--runs", nargs="+", help="directories with metrics.jsonl, patterns of them, files of curves "
                        "(panel, curve, x, y); none: the tiny world")  # fmt: skip
    parser.add_argument("--out", help="PNG, SVG or PDF to write")
    parser.add_argument("--keys", nargs="+", default=list(report.PANELS), help="metrics to draw, where a run has them")
    args = records.parse_inputs(parser, TINY, "runs", is_figure=True)
    curves = report.read_curves(args.runs, args.keys)
    report.draw_curves(curves, Path(args.out))
    print(f"{args.out}: {len(curves)} curves")


def run_show(parser: argparse.ArgumentParser) -> None:
    """One problem's way through the stages: each solution with the votes on its steps, its label and the verification
    chosen for it; then GRPO's responses, each with its judgement, reward and advantage."""
    parser.add_argument("id", nargs="?", help="of a problem or of a solution; none: the first problem")
    parser.add_argument("--labels", help="labels_<method>.jsonl of verify.py; none: the tiny world")
    parser.add_argument("--rollouts", help="the directory that grpo.py --dump_rollouts made")
    args = records.parse_inputs(parser, TINY, "labels")
    labels, rollouts = report.read_problem(args.id, args.labels, args.rollouts)
    path = Path(args.labels).with_name("verifications.jsonl")  # for the votes on the answer
    verifications = read_verifications(path, labels) if path.exists() else []
    report.print_problem(labels, keep_parsed(verifications), rollouts)


# --------------------------------------------------------------------------- main

COMMANDS = {
    "processbench": run_processbench,
    "benchmark": run_benchmark,
    "labels": run_labels,
    "plot": run_plot,
    "show": run_show,
}


def main() -> None:
    records.run_command(COMMANDS, __doc__)


if __name__ == "__main__":
    distributed.run_stage(main)
