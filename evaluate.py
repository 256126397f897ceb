"""Everything that is measured (SPARK, arXiv 2512.03244, Sec. 4): four commands, each a table and a file.

    python evaluate.py processbench          # a reward model finds the first wrong step     -> runs/tiny/processbench.jsonl
    python evaluate.py benchmark             # a policy solves problems it has not seen      -> runs/tiny/benchmark.jsonl
    python evaluate.py labels                # are the labels of Stage I right?              -> runs/tiny/labels.json
    python evaluate.py plot                  # the curves of GRPO runs                       -> runs/tiny/curves.png

Without further flags each runs on the tiny world, after the stages that it measures. At full scale:

    python evaluate.py processbench --model runs/prm_cot --data gsm8k.json math.json olympiadbench.json omnimath.json \\
        --out runs/processbench.jsonl
    python evaluate.py benchmark --model runs/grpo Qwen/Qwen2.5-Math-7B --problems math500.jsonl aime24.jsonl \\
        --gold gold.jsonl --num_samples 16 --greedy --out runs/benchmark.jsonl
    torchrun --nproc_per_node 8 evaluate.py benchmark ...          # sharded by problem; processbench by case

Besides `verify.py --method reference_guided` and `grpo.py --reward rlvr`, this is the only file that opens answers, and
`labels` the only place where Stage I meets them: afterwards. Nothing here feeds back into training.

What can't be judged is counted, not hidden: an unparsed verification is wrong on ProcessBench, an answer that can't be
graded within its deadline is unknown, and every table has a column for them. What differs from the paper: intervals
stand beside the numbers, and there is a report on the labels themselves.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from math import comb
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from generate import (
    SOLVE_PROMPT,
    InputError,
    Sampler,
    describe_run,
    encode_chat,
    extract_answer,
    log,
    open_model,
    parse_args,
    rank,
    read_records,
    run_stage,
    start_processes,
    with_progress,
    world_size,
    write_json,
    write_records,
)
from verify import METHODS, REWARD_MODELS, score_solutions

# Used when a command's first flag isn't given; an explicit flag wins.
TINY = {
    "processbench": {
        "model": "runs/tiny/prm_cot",
        "data": ["data/tiny/processbench.jsonl"],
        "out": "runs/tiny/processbench.jsonl",
        "max_new_tokens": 200,
        "slots": 256,
    },
    "benchmark": {
        "model": ["runs/tiny/grpo", "data/tiny/policy"],
        "problems": ["data/tiny/heldout.jsonl"],
        "gold": ["data/tiny/gold.jsonl"],
        "out": "runs/tiny/benchmark.jsonl",
        "max_new_tokens": 160,
        "limit": 500,
        "slots": 256,
    },
    "labels": {
        "labels": ["runs/tiny/verify/labels_step_consistency.jsonl"],
        "verifications": "runs/tiny/verify/verifications.jsonl",
        "gold": "data/tiny/gold.jsonl",
        "out": "runs/tiny/labels.json",
    },
    "plot": {"runs": ["runs/tiny/grpo"], "out": "runs/tiny/curves.png"},
}
MADE_BY = {"runs/tiny/prm_cot": "train_prm.py", "runs/tiny/grpo": "grpo.py", "data/tiny/policy": "-m data.make_tiny"}
RESAMPLES = 2000  # of every bootstrap interval

# The paper's numbers, in percent: F1 averaged over ProcessBench's four subsets; accuracy of Qwen2.5-Math-7B after RL.
PROCESSBENCH = ("gsm8k", "math", "olympiadbench", "omnimath")
PAPER_PROCESSBENCH = {
    "PRM, step consistency": 67.5,
    "PRM-CoT, step consistency": 65.7,
    "PRM, reference-guided": 66.4,
    "GPT-4o as critic": 61.9,
}
PAPER_BENCHMARKS = {
    "PRM-CoT reward": "MATH-500 85.4, AIME24 30.0, AIME25 20.0, AMC23 66.3, Olympiad 42.7, Minerva 40.1; average 47.4",
    "PRM reward": "average 44.1",
    "RLVR": "average 43.9",
}

# --------------------------------------------------------------------------- grading answers

# The program of a grading worker. It talks JSON over its pipes and grades in a forked child, under an alarm that kills:
# computer algebra can hang, or fill the memory, inside C code that no Python exception reaches. The parent keeps the
# imported library, so a death costs a fork and not an import. math-verify's own time limits are off: they say "wrong".
GRADER = r"""
import json, logging, os, resource, signal, sys
from math_verify import parse, verify

def judge(prediction, reference):
    answers = [text if "\\boxed" in text else "\\boxed{" + text + "}" for text in (prediction, reference)]
    ours, gold = (parse(text, parsing_timeout=None) for text in answers)
    failed = False
    for a in gold:
        for b in ours:
            try:
                if verify(a, b, timeout_seconds=None, raise_on_error=True):
                    return True
            except Exception:
                failed = True
    return None if failed else False

logging.disable(logging.CRITICAL)
sys.set_int_max_str_digits(0)
signal.signal(signal.SIGALRM, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
while True:
    child = os.fork()
    if child == 0:
        for line in iter(sys.stdin.readline, ""):
            prediction, reference, timeout = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, timeout)
            verdict = judge(prediction, reference)
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps(verdict), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    print("null", flush=True)
"""
INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_idle: list[subprocess.Popen] = []  # workers between two questions; they end when this process does


def grade_quickly(prediction: str | None, reference: str) -> bool | None:
    """The cases that need no algebra: no answer, the same text, two integers. None: ask a worker."""
    prediction, reference = (prediction or "").strip(), reference.strip()
    if not prediction:
        return False
    if prediction == reference:
        return True
    if INTEGER.fullmatch(prediction) and INTEGER.fullmatch(reference):
        return int(prediction) == int(reference)
    return None


def grade(prediction: str | None, reference: str, timeout: float = 5.0) -> bool | None:
    """Is the answer mathematically equal to the reference? True, False, or None: unknown (not done after `timeout`
    seconds, out of memory, crashed). Answers are LaTeX without or with `\\boxed{…}`; None is no answer: False.

    A worker process grades (math-verify); it is started when first needed and used again. Raises ValueError
    for a timeout that isn't positive, InputError if the worker can't run.
    """
    if timeout <= 0:
        raise ValueError(f"timeout must be positive, got {timeout}")
    verdict = grade_quickly(prediction, reference)
    if verdict is not None:
        return verdict
    try:
        worker = _idle.pop()
    except IndexError:
        command = [sys.executable, "-c", GRADER]
        pipe = subprocess.PIPE
        worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    try:
        worker.stdin.write(json.dumps([prediction, reference, timeout]) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise InputError(f"the grading worker ended with status {worker.wait()}; install it with: pip install math-verify")
    _idle.append(worker)
    return json.loads(answer)


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


def first_error(step_verdicts: list[bool]) -> int:
    """Index of the first step that is judged incorrect, else -1."""
    return step_verdicts.index(False) if False in step_verdicts else -1


def harmonic_mean(a: float | np.ndarray, b: float | np.ndarray) -> float | np.ndarray:
    """2ab / (a + b), and 0 where both are 0."""
    return 2 * a * b / np.where(a + b == 0, 1, a + b)


def processbench_f1(labels: list[int], predictions: list[int | None]) -> dict:
    """ProcessBench's three numbers, as fractions (Zheng et al. 2024, Sec. 4.1).

    A label is the index of the first wrong step or -1; a prediction is the same, or None for unparsed, which is wrong.
    `error_acc` is the accuracy on cases with a wrong step, `correct_acc` on the others, `f1` their harmonic mean.
    Accuracy over no cases is 0, as is F1 of two zeros.
    """
    right = {True: [], False: []}  # by: has a wrong step
    for label, prediction in zip(labels, predictions, strict=True):
        right[label != -1].append(label == prediction)
    error_acc, correct_acc = (sum(hits) / max(len(hits), 1) for hits in (right[True], right[False]))
    return {"error_acc": error_acc, "correct_acc": correct_acc, "f1": float(harmonic_mean(error_acc, correct_acc))}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that k of n samples, c of them right, hold a right one (Chen et al. 2021): 1 - C(n-c, k)/C(n, k)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"need 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - comb(n - c, k) / comb(n, k)


def majority_answer(answers: list[str | None]) -> str | None:
    """The most frequent answer, compared as text without white space; the earliest of equals; None if there is none.

    Samples without an answer don't vote.
    """
    votes = Counter("".join(a.split()) for a in answers if a is not None)
    if not votes:
        return None
    winner = votes.most_common(1)[0][0]
    return next(a for a in answers if a is not None and "".join(a.split()) == winner)


def bootstrap(values: np.ndarray, seed: int, sizes: np.ndarray | None = None) -> np.ndarray:
    """Means of values (P, ...) over RESAMPLES resamples of its P rows -> (RESAMPLES, ...).

    With sizes, of the shape of values, sum(values) / sum(sizes): a mean over parts (steps) of which each row has several.
    """
    if len(values) == 0:
        raise ValueError("nothing to resample: no rows")
    sizes = np.ones(values.shape) if sizes is None else sizes
    rng, P = np.random.default_rng(seed), len(values)
    counts = (np.bincount(rng.integers(P, size=P), minlength=P) for _ in range(RESAMPLES))
    return np.stack([(n @ values) / np.maximum(n @ sizes, 1e-12) for n in counts])


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of (RESAMPLES,) values."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_interval(per_problem: np.ndarray, seed: int) -> tuple[float, float]:
    """(low, high): the 95 % bootstrap interval of the mean of per_problem (P,), resampling problems.

    Problems are what the sample is drawn from; the samples of one problem are not independent of each other.
    """
    return interval(bootstrap(np.asarray(per_problem, dtype=float), seed))


def percent(value: float | None, low_high: tuple[float, float] | None = None) -> str:
    """A fraction as the tables show it: 61.2, or 61.2 [58.0, 64.1]; a dash where there is none."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" [{100 * low_high[0]:.1f}, {100 * low_high[1]:.1f}]" if low_high else "")


def print_table(header: list[str], rows: list[list[object]]) -> None:
    """Print aligned columns, on rank 0: the first to the left, the others to the right."""
    cells = [header] + [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *rest in cells:
        log("  ".join([first.ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True)]))


# --------------------------------------------------------------------------- shared by the commands


def gather(mine: list) -> list:
    """Undo `everything[rank()::world_size()]`: the results of all ranks, in order, on every rank."""
    if not dist.is_initialized():
        return mine
    parts: list[list] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, mine)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def command_parser(command: str) -> argparse.ArgumentParser:
    """A parser for one command; its description is that of the function that runs the command."""
    about = COMMANDS[command].__doc__
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[command])
    return parser


def need(args: argparse.Namespace, key: str, *flags: str) -> None:
    """Raise InputError for the first of the flags that has no value, though --key was given."""
    for flag in flags:
        if getattr(args, flag) is None:
            raise InputError(f"--{flag} is missing; it goes with --{key}")


def open_sampler(name: str, device: torch.device, slots: int):
    """(sampler, tokenizer, stop ids) of a model; a missing one of the tiny world says which command makes it."""
    if name in MADE_BY and not Path(name).is_dir():
        raise InputError(f"--model {name}: no such directory; make it with: python {MADE_BY[name]}")
    model, tokenizer, stops = open_model(name, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return Sampler(model, slots), tokenizer, stops


# --------------------------------------------------------------------------- ProcessBench


def read_cases(path: str) -> list[dict]:
    """Cases with problem, steps and label from JSON Lines or, as ProcessBench has them, a JSON array.

    Raises InputError for a missing field and for a label that is neither -1 nor the index of a step.
    """
    fields = ["problem", "steps", "label"]
    if Path(path).is_file() and Path(path).read_text(encoding="utf-8").lstrip().startswith("["):
        try:
            cases = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); fix or fetch the file again") from None
    else:
        cases = read_records(path, fields, "python -m data.make_tiny" if path.startswith("data/tiny/") else "")
    for number, case in enumerate(cases):
        missing = [f for f in fields if not isinstance(case, dict) or f not in case]
        if missing:
            raise InputError(f"{path}: case {number} has no field {missing[0]!r}; every case needs {', '.join(fields)}")
        if case["label"] not in range(-1, len(case["steps"])):
            raise InputError(
                f"{path}: case {number} has label {case['label']!r} and {len(case['steps'])} steps; a label is the "
                "index of the first wrong step, from 0, or -1"
            )
    return cases


def processbench() -> None:
    """ProcessBench: how well does a reward model find the first wrong step of a solution?

    A PRM's prediction is the first step that it judges incorrect, else -1. An ORM names no step: its row has the
    accuracy of the verdict alone (against final_answer_correct where the data have it, else against "no wrong step").
    """
    parser = command_parser("processbench")
    parser.add_argument("--model", help="reward model: a Hugging Face directory or hub name; none: the tiny world")
    parser.add_argument("--data", nargs="+", help="a file for each subset: JSON Lines or an array of problem, steps, label")
    parser.add_argument("--out", help="results.jsonl to write")
    parser.add_argument("--kind", default="prm_cot", choices=list(REWARD_MODELS), help="what the model was trained as")
    parser.add_argument("--votes", type=int, default=1, help="1: one greedy pass; K: sample K and take majorities")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the samples that vote")
    parser.add_argument("--max_new_tokens", type=int, default=4096, help="per verification")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use the first so many cases of each file only")
    parser.add_argument("--slots", type=int, default=128, help="rows of the sampler's KV cache")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    args = parse_args(parser, TINY["processbench"])
    need(args, "model", "data", "out")
    subsets = [(Path(path).stem, read_cases(path)[: args.limit]) for path in args.data]
    device = start_processes(args.device)
    sampler, tokenizer, stops = open_sampler(args.model, device, args.slots)
    settings = {name: getattr(args, name) for name in ("model", "kind", "votes", "temperature", "max_new_tokens", "seed")}
    rows, table, means, resampled = [], [], [], []
    for subset, cases in subsets:
        started = time.time()
        solutions = [
            {"id": f"{subset}/{i}", "problem": c["problem"], "steps": c["steps"], "answer": None}
            for i, c in enumerate(cases)
        ]
        scored = score_solutions(
            sampler,
            tokenizer,
            stops,
            args.kind,
            solutions[rank() :: world_size()],
            max_new_tokens=args.max_new_tokens,
            votes=args.votes,
            temperature=args.temperature,
            seed=args.seed,
        )
        scored = gather(scored)
        spent = {"seconds": round(time.time() - started, 1), "tokens": sum(s.tokens for s in scored)}
        labels = [c["label"] for c in cases]
        truths = [c.get("final_answer_correct", c["label"] == -1) for c in cases]
        verdict_right = np.array([s.verdict == truth for s, truth in zip(scored, truths, strict=True)], dtype=float)
        # metric -> (value, number of cases, interval)
        numbers = {"outcome_acc": (verdict_right.mean(), len(cases), bootstrap_interval(verdict_right, args.seed))}
        answered = [s.verdict if args.kind == "orm" else s.step_verdicts for s in scored]
        if args.kind != "orm":
            predictions = [None if s.step_verdicts is None else first_error(s.step_verdicts) for s in scored]
            right = np.array([p == label for p, label in zip(predictions, labels, strict=True)], dtype=float)
            erroneous = np.array(labels) != -1
            # Each kind of case is resampled by itself: how many there are of each is part of the benchmark.
            halves = [right[erroneous], right[~erroneous]]
            error, correct = (bootstrap(h, args.seed) if len(h) else np.zeros(RESAMPLES) for h in halves)
            f1 = processbench_f1(labels, predictions)
            numbers["error_acc"] = (f1["error_acc"], len(halves[0]), interval(error))
            numbers["correct_acc"] = (f1["correct_acc"], len(halves[1]), interval(correct))
            numbers["f1"] = (f1["f1"], len(cases), interval(harmonic_mean(error, correct)))
            means.append(f1["f1"])
            resampled.append(harmonic_mean(error, correct))
        numbers["unparsed"] = (answered.count(None) / len(cases), len(cases), None)
        for metric, (value, n, low_high) in numbers.items():
            about = {"benchmark": "processbench", "subset": subset, "metric": metric, "value": float(value), "n": n}
            rows.append({**about, "interval": low_high, "settings": settings, **spent})
        shown = [percent(*(numbers[m][0], numbers[m][2])) if m in numbers else "-" for m in PROCESSBENCH_COLUMNS]
        table.append([subset, len(cases), *shown, answered.count(None), spent["tokens"], spent["seconds"]])
    if means:
        low_high = interval(np.mean(resampled, axis=0))
        about = {"benchmark": "processbench", "subset": "average", "metric": "f1", "value": float(np.mean(means))}
        spent = {key: sum({r["subset"]: r[key] for r in rows}.values()) for key in ("seconds", "tokens")}
        rows.append({**about, "n": len(means), "interval": low_high, "settings": settings, **spent})
        table.append(["average", "", percent(np.mean(means), low_high), *[""] * 6])
    if rank() == 0:
        write_records(Path(args.out), rows, args)
    ran = {subset for subset, _ in subsets} == set(PROCESSBENCH) and args.limit is None
    table += [[f"paper: {name}", "", f"{value:.1f}", *[""] * 6] for name, value in PAPER_PROCESSBENCH.items()]
    table += [] if ran else [["ours on ProcessBench's four subsets", "", "not run", *[""] * 6]]
    print_table(["subset", "cases", *PROCESSBENCH_COLUMNS, "unparsed", "tokens", "seconds"], table)


PROCESSBENCH_COLUMNS = ["f1", "error_acc", "correct_acc", "outcome_acc"]


# --------------------------------------------------------------------------- benchmarks


def heldout_accuracy(
    sampler: Sampler,
    tokenizer,
    stop_ids: list[int],
    problems: list[dict],
    gold: dict[str, str],
    num_samples: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = 3072,
    seed: int = 0,
    *,
    top_p: float = 1.0,
    title: str | None = None,
) -> dict:
    """Sample solutions of P problems (id, problem), grade them against gold (id -> answer). P >= 1, k samples each.

    Returns accuracy, low, high (the mean and its 95 % interval over problems), per_problem (P,) means, correct (P, k)
    bool, and, as P lists of k: answers, texts; and counts: unknown (not gradable; they are wrong), truncated, tokens.
    Under torchrun each rank does its share: call it on every rank; the result is the same on all. With a title there
    is a progress bar. Raises InputError for a problem that leaves no room in the context or has no gold answer.
    """
    mine = problems[rank() :: world_size()]
    prompts = [encode_chat(tokenizer, SOLVE_PROMPT.format(problem=p["problem"])) for p in mine]
    context = sampler.model.config.max_positions
    for problem, prompt in zip(mine, prompts, strict=True):
        if problem["id"] not in gold:
            raise InputError(f"problem {problem['id']}: the gold file has no answer for it; give one that has")
        if len(prompt) + max_new_tokens > context:
            raise InputError(
                f"problem {problem['id']}: its prompt of {len(prompt)} tokens and --max_new_tokens {max_new_tokens} "
                f"exceed the model's context of {context}; lower the flag"
            )
    stream = sampler.stream(
        prompts,
        keys=[p["id"] for p in mine],
        num_samples=num_samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        seed=seed,
    )
    if title:
        stream = with_progress(stream, sampler, title, len(prompts), num_samples)
    texts: list[list[str]] = [[] for _ in mine]
    spent: list[tuple[int, int]] = [(0, 0)] * len(mine)  # tokens, truncated
    for i, samples in stream:
        texts[i] = [tokenizer.decode(sample.ids, skip_special_tokens=True) for sample in samples]
        spent[i] = (sum(len(s.ids) for s in samples), sum(s.finish == "length" for s in samples))
    answers = [[extract_answer(text) for text in group] for group in texts]
    grades = grade_all([(a, gold[p["id"]]) for p, group in zip(mine, answers, strict=True) for a in group])
    by_problem = [grades[i : i + num_samples] for i in range(0, len(grades), num_samples)]
    everything = gather(list(zip(texts, answers, by_problem, spent, strict=True)))
    texts, answers, by_problem, spent = (list(column) for column in zip(*everything, strict=True))
    correct = np.array([[bool(g) for g in group] for group in by_problem])  # (P, k)
    per_problem = correct.mean(axis=1)
    low, high = bootstrap_interval(per_problem, seed)
    return {
        "accuracy": float(per_problem.mean()),
        "low": low,
        "high": high,
        "per_problem": per_problem,
        "correct": correct,
        "answers": answers,
        "texts": texts,
        "unknown": sum(group.count(None) for group in by_problem),
        "truncated": sum(cut for _, cut in spent),
        "tokens": sum(tokens for tokens, _ in spent),
    }


def read_answers(paths: list[str]) -> dict[str, str]:
    """id -> answer of gold files; InputError if two of them disagree on an id."""
    gold: dict[str, str] = {}
    for path in paths:
        for record in read_records(path, ["id", "answer"], "python -m data.make_tiny problems"):
            answer = str(record["answer"])
            if gold.setdefault(record["id"], answer) != answer:
                raise InputError(
                    f"{path}: id {record['id']!r} has answer {answer!r}, an earlier gold file {gold[record['id']]!r}; "
                    "make the ids of different benchmarks different"
                )
    return gold


def benchmark() -> None:
    """Benchmarks: k solutions a problem, graded against gold answers.

    avg@k is the mean accuracy of a sample, with its 95 % interval over problems; pass@k the chance that one of k is
    right; maj@k the accuracy of the most frequent answer. Several models are also compared, on the same problems, with
    the last one named.
    """
    parser = command_parser("benchmark")
    parser.add_argument("--model", nargs="+", help="policies: directories or hub names; none: the tiny world")
    parser.add_argument("--problems", nargs="+", help="a file for each benchmark: JSON Lines with id and problem")
    parser.add_argument("--gold", nargs="+", help="JSON Lines with id and answer")
    parser.add_argument("--out", help="results.jsonl to write")
    parser.add_argument("--num_samples", type=int, default=4, help="k, samples per problem")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=3072, help="per solution")
    parser.add_argument("--greedy", action="store_true", help="also one greedy solution per problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use the first so many problems of each file only")
    parser.add_argument("--slots", type=int, default=128, help="rows of the sampler's KV cache")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    args = parse_args(parser, TINY["benchmark"])
    need(args, "model", "problems", "gold", "out")
    k = args.num_samples
    made_by = "python -m data.make_tiny problems"
    files = {Path(path).stem: read_records(path, ["id", "problem"], made_by)[: args.limit] for path in args.problems}
    gold = read_answers(args.gold)
    device = start_processes(args.device)
    rows, table = [], []
    measured: dict[tuple[str, str], np.ndarray] = {}  # (model, benchmark) -> accuracy of each problem

    def add(name: str, model: str, metric: str, value: float, n: int, low_high: tuple | None, spent: dict) -> None:
        settings = {f: getattr(args, f) for f in ("num_samples", "temperature", "top_p", "max_new_tokens", "seed")}
        about = {"benchmark": name, "subset": "all", "metric": metric, "value": float(value), "n": n}
        rows.append({**about, "interval": low_high, "settings": {"model": model, **settings}, **spent})

    for model in args.model:
        sampler, tokenizer, stops = open_sampler(model, device, args.slots)
        for name, problems in files.items():
            started = time.time()
            common = (sampler, tokenizer, stops, problems, gold)
            budget = {"max_new_tokens": args.max_new_tokens, "seed": args.seed, "title": name}
            result = heldout_accuracy(*common, k, args.temperature, top_p=args.top_p, **budget)
            greedy = heldout_accuracy(*common, 1, 0.0, **budget) if args.greedy else None
            spent = {"seconds": round(time.time() - started, 1), "tokens": result["tokens"]}
            right = result["correct"].sum(axis=1)  # (P,)
            winners = [group.index(majority_answer(group)) for group in result["answers"]]
            numbers = {f"avg@{k}": (result["accuracy"], (result["low"], result["high"]))}
            for j in sorted({2**e for e in range(1, k.bit_length()) if 2**e < k} | {k}):
                numbers[f"pass@{j}"] = (np.mean([pass_at_k(k, int(c), j) for c in right]), None)
            voted = result["correct"][np.arange(len(winners)), winners]  # no answer at all: index of a None, wrong
            numbers[f"maj@{k}"] = (voted.mean(), bootstrap_interval(voted, args.seed))
            if greedy is not None:
                numbers["greedy"] = (greedy["accuracy"], (greedy["low"], greedy["high"]))
                spent["tokens"] += greedy["tokens"]
            numbers["unknown"] = (result["unknown"] / result["correct"].size, None)
            numbers["truncated"] = (result["truncated"] / result["correct"].size, None)
            for metric, (value, low_high) in numbers.items():
                add(name, model, metric, value, len(problems), low_high, spent)
            shown = [percent(*numbers.get(m, (None,))) for m in (f"avg@{k}", f"pass@{k}", f"maj@{k}", "greedy")]
            counts = [result["unknown"], result["truncated"], spent["tokens"], spent["seconds"]]
            table.append([model, name, len(problems), *shown, *counts])
            measured[model, name] = result["per_problem"]
        if len(files) > 1:  # the paper's headline is the plain mean over benchmarks
            per_file = [measured[model, name] for name in files]
            mean = float(np.mean([x.mean() for x in per_file]))
            low_high = interval(np.mean([bootstrap(x, args.seed) for x in per_file], axis=0))
            spent = {"seconds": sum(row[-1] for row in table if row[0] == model)}
            spent["tokens"] = sum(row[-2] for row in table if row[0] == model)
            add("average", model, f"avg@{k}", mean, len(files), low_high, spent)
            table.append([model, "average", "", percent(mean, low_high), *[""] * 7])
    baseline = args.model[-1]
    for model in args.model[:-1]:
        for name in files:
            change = measured[model, name] - measured[baseline, name]
            low_high = bootstrap_interval(change, args.seed)
            add(name, model, f"avg@{k} minus {baseline}", change.mean(), len(change), low_high, {"seconds": 0, "tokens": 0})
            table.append([f"{model} minus {baseline}", name, len(change), percent(change.mean(), low_high), *[""] * 7])
    if rank() == 0:
        write_records(Path(args.out), rows, args)
    columns = [f"avg@{k}", f"pass@{k}", f"maj@{k}", "greedy", "unknown", "truncated", "tokens", "seconds"]
    print_table(["model", "benchmark", "problems", *columns], table)
    for name, numbers in PAPER_BENCHMARKS.items():
        log(f"paper, Qwen2.5-Math-7B after GRPO with {name}: {numbers}")


# --------------------------------------------------------------------------- the labels of Stage I

LABEL_METRICS = ("step", "exact", "first_error", "outcome")
PREFIXES = (1, 2, 4, 8, 16)


def gold_labels(steps: list[str], gold_steps: list[str]) -> list[bool]:
    """Step k is right if it is the gold step k, white space aside, and all steps before it are right.

    That is exact only where solutions are canonical, as in the tiny world: a right step put differently counts as wrong.
    """
    labels, fine = [], True
    for k, step in enumerate(steps):
        fine = fine and k < len(gold_steps) and "".join(step.split()) == "".join(gold_steps[k].split())
        labels.append(fine)
    return labels


def read_gold(path: str, solutions: list[dict]) -> dict[str, tuple[list[bool] | None, bool | None]]:
    """solution id -> (gold step labels, gold outcome), either None where it isn't known.

    A gold record is either of a solution (its id; step_labels, outcome) or of a problem (its id; answer, and steps if
    the solutions are canonical). Solutions without a record are left out.
    """
    records = {r["id"]: r for r in read_records(path, ["id"], "python -m data.make_tiny problems")}
    gold: dict[str, tuple[list[bool] | None, bool | None]] = {}
    ungraded = []
    for s in solutions:
        problem_id, _, _ = s["id"].rpartition("/")
        if s["id"] in records:
            record = records[s["id"]]
            labels = record.get("step_labels")
            if labels is not None and len(labels) != len(s["steps"]):
                raise InputError(f"{path}: {s['id']} has {len(labels)} step_labels for {len(s['steps'])} steps")
            gold[s["id"]] = (labels, record.get("outcome"))
        elif problem_id in records:
            record = records[problem_id]
            labels = gold_labels(s["steps"], record["steps"]) if record.get("steps") else None
            gold[s["id"]] = (labels, None)
            if record.get("answer") is not None:
                ungraded.append((s["id"], (s["answer"], str(record["answer"]))))
    for (solution_id, _), outcome in zip(ungraded, grade_all([pair for _, pair in ungraded]), strict=True):
        gold[solution_id] = (gold[solution_id][0], outcome)
    if not gold:
        raise InputError(f"{path}: no record for any of the {len(solutions)} solutions; ids are those of their problems")
    return gold


def score_label(
    labels: list[bool], outcome: bool, gold: tuple[list[bool] | None, bool | None]
) -> tuple[np.ndarray, np.ndarray]:
    """(right, of), each (4,), one for each of LABEL_METRICS: how many were right, of how many that gold knows."""
    right, of = np.zeros(4), np.zeros(4)
    gold_steps, gold_outcome = gold
    if gold_steps is not None:
        hits = sum(a == b for a, b in zip(labels, gold_steps, strict=True))
        right[:3] = hits, labels == gold_steps, first_error(labels) == first_error(gold_steps)
        of[:3] = len(gold_steps), 1, 1
    if gold_outcome is not None:
        right[3], of[3] = outcome == gold_outcome, 1
    return right, of


def accuracies(scores: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float | None]:
    """LABEL_METRICS over many (right, of); None where gold knows nothing."""
    right, of = (sum(column) for column in zip(*scores, strict=True)) if scores else (np.zeros(4), np.zeros(4))
    return {m: float(right[i] / of[i]) if of[i] else None for i, m in enumerate(LABEL_METRICS)}


def label_rows(method: str, N: int | None, solutions: list[dict], labels: list[dict], gold: dict) -> list[dict]:
    """Two rows of the report, `kept` and `all` (those with at least one vote), for the labels of these solutions.

    labels: step_labels, outcome, dropped, ties, in the order of the solutions.
    """
    voted = [(s["id"], label) for s, label in zip(solutions, labels, strict=True) if label["step_labels"] is not None]
    scores = [(label["dropped"], score_label(label["step_labels"], label["outcome"], gold[i])) for i, label in voted]
    kept = [score for dropped, score in scores if dropped is None]
    about = {"method": method, "N": N}
    counts = {"ties": sum(label.get("ties", 0) for label in labels)}
    counts["dropped"] = dict(Counter(label["dropped"] for label in labels if label["dropped"]))
    rows = []
    for which, chosen in (("kept", kept), ("all", [score for _, score in scores])):
        size = {"solutions": len(chosen), "yield": len(chosen) / len(solutions)}
        rows.append({**about, "on": which, **size, **accuracies(chosen), **counts})
    return rows


def vote_report(solutions: list[dict], verifications: list[dict], gold: dict, seed: int) -> list[dict]:
    """What voting buys: the report's rows for single, outcome-level and step-level labels from the first N verifications.

    On `all`, `single` is the mean over the parsed verifications of each solution, i.e. what one of them is worth on
    average, and the voted rows have `minus_single`: for each metric [difference, low, high], a 95 % interval over
    solutions of the paired difference. On `kept`, `single` is the first parsed verification, the method's label.
    """
    by_solution: dict[str, list[dict]] = {s["id"]: [] for s in solutions}
    for record in sorted(verifications, key=lambda r: r["sample"]):
        if record["solution_id"] in by_solution:
            by_solution[record["solution_id"]].append(record)
    most = max((r["sample"] + 1 for records in by_solution.values() for r in records), default=0)
    rows = []
    for N in (N for N in PREFIXES if N <= most):
        prefix = {i: [r for r in records if r["sample"] < N] for i, records in by_solution.items()}
        used = [r for records in prefix.values() for r in records]
        single: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        voters = 0
        for i, records in prefix.items():
            parsed = [r for r in records if r["step_verdicts"] is not None and r["verdict"] is not None]
            voters += len(parsed)
            if parsed:
                scores = [score_label(r["step_verdicts"], r["verdict"], gold[i]) for r in parsed]
                single[i] = (np.mean([right for right, _ in scores], axis=0), scores[0][1])
        spent = {"verifications": len(used), "unparsed": len(used) - voters, "tokens": sum(r["tokens"] for r in used)}
        for method, aggregate in METHODS.items():
            labels = [aggregate(prefix[s["id"]], random.Random(f"{seed}/{s['id']}")) for s in solutions]
            kept, on_all = label_rows(method, N, solutions, [vars(label) for label in labels], gold)
            if method == "single":
                on_all |= accuracies(list(single.values()))
            elif single:
                pairs = zip(solutions, labels, strict=True)
                voted = [(i, label) for i, label in ((s["id"], label) for s, label in pairs) if i in single]
                right = [score_label(label.step_labels, label.outcome, gold[i])[0] - single[i][0] for i, label in voted]
                of = np.stack([single[i][1] for i, _ in voted])  # (S, 4)
                resampled = bootstrap(np.stack(right), seed, of)  # (RESAMPLES, 4)
                difference = sum(right) / np.maximum(of.sum(axis=0), 1e-12)
                on_all["minus_single"] = {
                    m: [float(difference[j]), *interval(resampled[:, j])] if of[:, j].any() else None
                    for j, m in enumerate(LABEL_METRICS)
                }
            rows += [{**kept, **spent}, {**on_all, **spent}]
    return rows


def labels() -> None:
    """The label report: are Stage I's labels right, and what does voting buy?

    From labels files, each method as it was written; from the raw verifications, single, outcome-level and step-level
    labels by the number of verifications N. Rows `kept` are over the solutions that a method keeps; rows `all` over all
    with at least one vote, so that dropping the hard ones can't pass for accuracy.
    """
    parser = command_parser("labels")
    parser.add_argument("--labels", nargs="+", help="labels_<method>.jsonl of verify.py; none: the tiny world")
    parser.add_argument("--verifications", help="verifications.jsonl of verify.py")
    parser.add_argument("--gold", help="JSON Lines: id, answer and steps of problems, or id, step_labels, outcome of solutions")
    parser.add_argument("--out", help="labels.json to write")
    parser.add_argument("--seed", type=int, default=0, help="verify.py's, for the same random choices; and the bootstrap's")
    args = parse_args(parser, TINY["labels"], key="labels")
    need(args, "labels", "verifications", "gold", "out")
    fields = ["id", "steps", "answer", "method", "step_labels", "outcome", "dropped"]
    files = [read_records(path, fields, "python verify.py") for path in args.labels]
    known = {label["id"]: label for labels in files for label in labels}
    gold = read_gold(args.gold, list(known.values()))
    fields = ["solution_id", "sample", "step_verdicts", "verdict", "tokens"]
    verifications = read_records(args.verifications, fields, "python verify.py")
    for r in verifications:
        steps = known.get(r["solution_id"], {}).get("steps")
        if steps is not None and r["step_verdicts"] is not None and len(r["step_verdicts"]) != len(steps):
            raise InputError(
                f"{args.verifications}: a verification of {r['solution_id']} has {len(r['step_verdicts'])} step_verdicts, "
                f"the solution {len(steps)} steps; both files must come from the same solutions"
            )
    rows = []
    for labels in files:
        judged = [label for label in labels if label["id"] in gold]
        rows += label_rows(labels[0]["method"] + " (file)", None, judged, judged, gold) if judged else []
    rows += vote_report([s for i, s in known.items() if i in gold], verifications, gold, args.seed)
    unknown = sum(outcome is None for _, outcome in gold.values())
    report = {"solutions": len(gold), "without_gold": len(known) - len(gold), "unknown_outcomes": unknown, "rows": rows}
    write_json(Path(args.out + ".args.json"), describe_run(args))
    write_json(Path(args.out), report)
    table = []
    for r in rows:
        minus = r.get("minus_single") or {}
        gains = [percent(x[0], x[1:]) if (x := minus.get(m)) else "" for m in ("step", "exact")]
        numbers = [percent(r[m]) for m in ("yield", *LABEL_METRICS)]
        drops = ", ".join(f"{reason} {n}" for reason, n in r["dropped"].items()) if r["on"] == "kept" else ""
        cost = [r.get("unparsed", ""), r.get("tokens", "")]
        table.append([r["method"], r["N"] or "", r["on"], r["solutions"], *numbers, *gains, r["ties"], *cost, drops])
    gains = ["step - single", "exact - single"]
    head = ["method", "N", "on", "solutions", "yield", *LABEL_METRICS, *gains, "ties", "unparsed", "tokens", "dropped"]
    print_table(head, table)
    log(f"{len(gold)} solutions, {report['without_gold']} without gold, {unknown} with an unknown outcome -> {args.out}")


# --------------------------------------------------------------------------- curves

# key in metrics.jsonl -> title of its panel
PANELS = {
    "reward/mean": "reward",
    "heldout/accuracy": "held-out accuracy (95 % interval)",
    "format/valid": "valid format",
    "response/steps": "steps per response",
    "response/length": "tokens per response",
    "kl/k3": "KL from the initial policy (k3)",
}


def read_metrics(run: str) -> dict[str, list[tuple[float, float]]]:
    """key -> [(step, value), …] by step, from a run's metrics.jsonl; of a step that was done again the last counts."""
    records = read_records(Path(run) / "metrics.jsonl", ["step"], "python grpo.py")
    by_step = {record["step"]: record for record in records}
    curves: dict[str, list[tuple[float, float]]] = {}
    for step in sorted(by_step):
        for key, value in by_step[step].items():
            if isinstance(value, int | float):
                curves.setdefault(key, []).append((step, value))
    return curves


def plot() -> None:
    """Curves of one or more GRPO runs, a panel for each key, from their metrics.jsonl."""
    parser = command_parser("plot")
    parser.add_argument("--runs", nargs="+", help="directories with a metrics.jsonl; none: the tiny world")
    parser.add_argument("--out", help="PNG to write")
    parser.add_argument("--keys", nargs="+", default=list(PANELS), help="metrics to draw; those no run has are skipped")
    args = parse_args(parser, TINY["plot"], key="runs")
    need(args, "runs", "out")
    runs = {run: read_metrics(run) for run in args.runs}
    keys = [key for key in args.keys if any(key in curves for curves in runs.values())]
    if not keys:
        raise InputError(f"--keys {' '.join(args.keys)}: in no metrics.jsonl of {' '.join(args.runs)}; name other keys")

    from matplotlib.figure import Figure  # a Figure without pyplot draws with Agg: no display, no global state

    across = min(3, len(keys))
    down = -(-len(keys) // across)
    figure = Figure(figsize=(4.2 * across, 3.0 * down), layout="constrained")
    for axes, key in zip(figure.subplots(down, across, squeeze=False).flat, keys, strict=False):
        for j, (run, curves) in enumerate(runs.items()):
            if key not in curves:
                continue
            steps, values = zip(*curves[key], strict=True)
            axes.plot(steps, values, color=f"C{j}", label=run, marker="." if len(steps) < 30 else None)
            if key == "heldout/accuracy" and {"heldout/low", "heldout/high"} <= curves.keys():
                low, high = dict(curves["heldout/low"]), dict(curves["heldout/high"])
                banded = [step for step in steps if step in low and step in high]
                band = ([low[step] for step in banded], [high[step] for step in banded])
                axes.fill_between(banded, *band, color=f"C{j}", alpha=0.2, linewidth=0)
        axes.set_title(PANELS.get(key, key), fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(keys) :]:
        axes.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(out)
    print(f"{out}: {len(keys)} panels of {len(runs)} runs")


# --------------------------------------------------------------------------- main

COMMANDS = {"processbench": processbench, "benchmark": benchmark, "labels": labels, "plot": plot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=list(COMMANDS), help="each has its own --help")
    COMMANDS[parser.parse_args(sys.argv[1:2]).command]()


if __name__ == "__main__":
    run_stage(main)
