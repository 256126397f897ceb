r"""Public data sets in this project's form: problems without answers, and the answers in a gold file of their own.

    python -m data.prepare math500 --out data/benchmarks                          # from the hub, at a fixed revision
    python -m data.prepare math500 --out data/benchmarks --source math500.jsonl   # from a file that is here already
    python -m data.prepare processbench --out data/benchmarks                     # --source: the folder of its files
    python -m data.prepare overlap --train data/train/skywork.jsonl --benchmarks data/benchmarks/*.jsonl \
        data/benchmarks/processbench/*.jsonl --out data/train/skywork_clean.jsonl
    python -m data.prepare balance --solutions runs/solutions.jsonl --gold gold.jsonl --out runs/balanced.jsonl

in    one of `SOURCES` as published: JSON, JSON Lines or parquet (which needs pyarrow)
out   <out>/<set>.jsonl: id ("math500/0", the set and the row), problem, source; <out>/gold/<set>.jsonl: id, answer
      <out>/processbench/<subset>.jsonl: id, generator, problem, steps, final_answer_correct, label

`balance` chooses among the solutions of `generate.py` with the help of reference answers, as the released pipeline does
before its verifier judges them. It stands here because no stage may read answers for its labels.

The number of rows is always checked, the sha256 where one is known; what is printed says which. Answers are made plain,
not solved: "025" and 27.0 become integers, dollar signs go, degrees stay. The few rows without an answer are left out.
"""

import argparse
import hashlib
import html
import json
import math
import random
import re
import tempfile
import unicodedata
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from data import records
from data.grader import from_unicode
from evaluate import grade_all
from kernels import distributed
from kernels.distributed import InputError
from kernels.text import find_boxes

# --------------------------------------------------------------------------- a row's problem and answer


def problem_of(row: dict) -> str:
    """The problem's text: a user's turn (Skywork), else under one of two names."""
    if "prompt" in row:
        return next(turn["content"] for turn in row["prompt"] if turn["role"] == "user").strip()
    return (row["problem"] if "problem" in row else row["question"]).strip()


def clean_answer(value: object) -> str:
    r"""LaTeX on its own: several answers are joined, dollar signs go (not the currency, `\$`), and Minerva's 4.5e33 and
    np.arcsin become `4.5 \times 10^{33}` and `\arcsin`; "" for what is missing, None or parquet's NaN. Raises ValueError
    for an object or a truth value."""
    if isinstance(value, list):
        return ", ".join(filter(None, map(clean_answer, value)))
    if isinstance(value, (bool, dict)):
        raise ValueError(f"answer {value!r} is no number, string or list of these")
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    answer = "" if missing else re.sub(r"(?<!\\)\$", "", str(value)).strip()
    answer = re.sub(r"^(-?[0-9.]+)[eE]([+-]?)0*([0-9]+)$", write_power_of_ten, answer)
    return re.sub(r"\bnp\.(?=[a-z])", r"\\", answer)


def write_power_of_ten(number: re.Match) -> str:
    r"""4.5e+33 -> 4.5 \times 10^{33}."""
    sign = number[2].replace("+", "")
    return f"{number[1]} \\times 10^{{{sign}{number[3]}}}"


def integer_answer(row: dict) -> str:
    r"""AIME pads with zeros ("025"), AMC has floats (27.0); what isn't an integer (`336^\circ`) stays as given."""
    answer = clean_answer(row["answer"])
    integer = re.fullmatch(r"(-?)0*(\d+)(\.0)?", answer)
    return integer[1] + integer[2] if integer else answer


def gsm8k_answer(row: dict) -> str:
    """What follows ####, without thousands separators. Raises ValueError if there is no ####."""
    _, marker, answer = row["answer"].rpartition("####")
    if not marker:
        raise ValueError("its answer has no ####")
    return answer.replace(",", "")


def boxed_answer(row: dict) -> str | None:
    r"""MATH, Minerva: a field where the edition has one, else what the solution's last `\boxed` holds."""
    if (given := row.get("final_answer", row.get("answer"))) is not None:
        return given
    if boxes := find_boxes(row["solution"]):
        return row["solution"][slice(*boxes[-1])]
    bare = re.findall(r"\\boxed ([^$]+)", row["solution"])  # TeX allows \boxed 2
    return bare[-1] if bare else None


def skywork_answer(row: dict) -> str:
    """The first of the answers, which the hub's edition has as a list in JSON."""
    return json.loads(row["reward_model"]["ground_truth"])[0] if "reward_model" in row else row["answer"]


def case_label(row: dict) -> int:
    """ProcessBench: the index of the first wrong step, or -1. Raises ValueError for anything else."""
    if row["label"] not in range(-1, len(row["steps"])):
        raise ValueError(f"label {row['label']!r} of {len(row['steps'])} steps")
    return row["label"]


# --------------------------------------------------------------------------- the sets


class Source(NamedTuple):
    """A file of a data set of the hub, or of a repository on GitHub, at a commit (which never changes), and what gives
    the answer of one of its rows."""

    hub: str
    file: str
    answer: Callable[[dict], object]


SOURCES = {
    "skywork": Source("Skywork/Skywork-OR1-RL-Data@1cdedc52e0e2db85fdf252f9be682e63a5a38c33",
        "data/math-00000-of-00001.parquet", skywork_answer),
    "deepscaler": Source("agentica-org/DeepScaleR-Preview-Dataset@b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29",
        "deepscaler.json", itemgetter("answer")),
    "math_train": Source("DigitalLearningGmbH/MATH-lighteval@0530c78699ea5e8eb5530600900e1f328b48acad",
        "data/train-00000-of-00001.parquet", boxed_answer),
    "gsm8k": Source("openai/gsm8k@740312add88f781978c0658806c59bc2815b9866",
        "main/test-00000-of-00001.parquet", gsm8k_answer),
    "math500": Source("HuggingFaceH4/MATH-500@6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        "test.jsonl", itemgetter("answer")),
    "aime24": Source("HuggingFaceH4/aime_2024@2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        "data/train-00000-of-00001.parquet", integer_answer),
    "aime25": Source("math-ai/aime25@563bb8404243c5f09de6ec262f2db674fe5bce9b", "test.jsonl", integer_answer),
    "amc23": Source("math-ai/amc23@80815d37005feb82cd7f8fbc6901d5d3eff43057",
        "test-00000-of-00001.parquet", integer_answer),
    # The 675 open-ended problems without pictures on which the field, and the paper, measure. The hub's edition
    # (Hothan/OlympiadBench, OE_TO_maths_en_COMP.parquet, for --source) has 674.
    "olympiadbench": Source("github.com/QwenLM/Qwen2.5-Math@a45202bd16f1ec06f433442dc1152d0074773465",
        "evaluation/data/olympiadbench/test.jsonl", itemgetter("final_answer")),
    "minerva": Source("math-ai/minervamath@ee46ddc498933b1977577953250ca5c66be64f96", "test.jsonl", boxed_answer),
} | {
    f"processbench/{subset}": Source("Qwen/ProcessBench@3bdcd5371ed567559a78f559c01c13a6deee7604",
        f"{subset}.json", case_label)
    for subset in ("gsm8k", "math", "olympiadbench", "omnimath")
}  # fmt: skip
# The editions of each file that are known, on the hub or elsewhere: set, suffix, rows, sha256. A checksum is of a file
# that was at hand, or one on which several public records agree; None: neither, so it isn't checked.
KNOWN = [
    ("skywork", ".parquet", 105_055, None),
    ("skywork", ".jsonl", 8_000, "fc744964bb207eafeed861329be59d36d6f614608e39cb3e34589e1e108f8047"),  # a part
    ("deepscaler", ".json", 40_315, None),
    ("math_train", ".parquet", 7_500, "eca6e667f4305dd5e5ba09b4fd55e7f3174a0fbe361cdfd4c44758b593a76933"),
    ("math_train", ".json", 7_500, "3435af98be9a32eba356fcdee00c64cbcd0f5d3f92b4349d19660d98119f01fc"),
    ("gsm8k", ".parquet", 1_319, "ee7b8da9e381df27b9e3f7758a159ab2bdaa4dbaa910546cbbc47e0cb44e4f59"),
    ("gsm8k", ".jsonl", 1_319, "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    ("math500", ".jsonl", 500, "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"),
    ("aime24", ".parquet", 30, "26139847601a5037c237d5928b195e7260ca8074cf4f264b794af42847f79ccf"),
    ("aime24", ".jsonl", 30, "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac"),
    ("aime25", ".jsonl", 30, "b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331"),
    ("aime25", ".jsonl", 30, "e0a6e3154594486609e12eec863e0f80e9557f3fc822faf775fe971b328071f0"),
    ("amc23", ".parquet", 40, "b696e87ba47be4e879a60fd4ef1d4aa522ba78c5ae013c6aff5cc9788a397c5e"),
    ("amc23", ".jsonl", 40, "43707e1ca784602d8479de24ee8ce36609dbebc46dd152b0b12a46611aa898a4"),
    ("olympiadbench", ".parquet", 674, None),
    ("olympiadbench", ".jsonl", 675, "bb8c1e38a16ea9eacb77530315a674d883f267fbff79183effc53681b4fcc416"),
    ("minerva", ".jsonl", 272, None),
    ("minerva", ".jsonl", 272, "0e656b430d3a0a1dab6aa853f453ba3805e28e2cabe4fc72486a897cc09d8ba2"),
    ("processbench/gsm8k", ".json", 400, "fb1c59dfd1e83e1c5a48dbe598db27e4bc0b8bc524a09445f2d4b69178f61349"),
    ("processbench/math", ".json", 1_000, "60cb0d7a69cbec98d43cf50855b9b7e7294599c3c9a24bdd031abd18c3b6b136"),
    ("processbench/olympiadbench", ".json", 1_000, "e9d801c9f3c03f949adbfa08e90cb21ad85c0b9224bc5e98326f8215c218aa55"),
    ("processbench/omnimath", ".json", 1_000, "e8d7cf4512c82168dae2fe48b1718069a3002e7910af1d180a27ee0d9948ba47"),
]
CASE_FIELDS = ("generator", "steps", "final_answer_correct", "label")  # of ProcessBench, beside the problem


# --------------------------------------------------------------------------- reading, checking, converting, comparing


def find_file(source: Source, given: str | None) -> Path:
    """The file to read: --source, a file of that name in the folder --source, or the hub's, downloaded once."""
    if given is not None:
        path = Path(given, Path(source.file).name) if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise InputError(f"--source {given}: no file {path}; without --source it is downloaded from {source.hub}")
        return path
    from huggingface_hub import hf_hub_download

    name, _, revision = source.hub.partition("@")
    try:
        if name.startswith("github.com/"):
            return fetch_from_github(name.removeprefix("github.com/"), revision, source.file)
        return Path(hf_hub_download(name, source.file, repo_type="dataset", revision=revision))
    except OSError as error:  # hub and network errors are OSErrors
        reason = str(error).partition("\n")[0]
        raise InputError(f"{source.hub}: {source.file} can't be downloaded ({reason}); try --source") from None


def fetch_from_github(repository: str, commit: str, file: str) -> Path:
    """A file of a repository, downloaded once into the folder for temporary files."""
    path = Path(tempfile.gettempdir(), f"{commit}-{Path(file).name}")
    if not path.exists():
        url = f"https://raw.githubusercontent.com/{repository}/{commit}/{file}"
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read().decode()
        with records.replace_file(path) as file:
            file.write(content)
    return path


def read_rows(path: Path) -> list[dict]:
    """All rows of a parquet file, a JSON array or JSON Lines. Raises InputError for one that is cut off."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8").strip()
        return json.loads(text) if text.startswith("[") else [json.loads(x) for x in text.split("\n") if x.strip()]
    except ModuleNotFoundError:
        raise InputError(f"{path}: parquet needs pyarrow; pip install pyarrow") from None
    except (ValueError, OSError, RecursionError) as error:  # both readers' errors are ValueErrors
        raise InputError(f"{path}: can't be read as {path.suffix} ({error}); fetch the file again") from None


def check_file(name: str, path: Path, rows: list[dict]) -> str:
    """What was checked, in words. Raises InputError for another number of rows, or another sha256 than known."""
    known = [edition for edition in KNOWN if edition[0] == name]
    if len(rows) not in (counts := sorted({count for _, _, count, _ in known})):
        raise InputError(f"{path}: {len(rows)} rows, expected one of {counts}; fetch it again or add it to KNOWN")
    sums = [sha256 for _, suffix, count, sha256 in known if (suffix, count) == (path.suffix, len(rows))]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if sums and found not in sums and None not in sums:
        raise InputError(f"{path}: sha256 {found}, expected one of {sums}; fetch it again or add it to KNOWN")
    return "rows and sha256 as expected" if found in sums else f"rows as expected, sha256 not checked ({found})"


def convert(name: str, rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(problems, gold) of a set; ProcessBench's problems are its cases. A row without a problem or an answer is in
    neither. Raises InputError if more than one in a hundred is like that, or if a row lacks the set's fields."""
    problems, gold, fields = [], [], CASE_FIELDS if name.startswith("processbench/") else ()
    for number, row in enumerate(rows):
        try:
            record = {"id": f"{name}/{number}", "problem": problem_of(row), "source": name}
            record |= {field: row[field] for field in fields}
            answer = clean_answer(SOURCES[name].answer(row))
        except (AttributeError, LookupError, TypeError, ValueError, StopIteration) as error:
            raise InputError(f"{name}, row {number}: {error!r}; the file isn't {SOURCES[name].hub}'s") from None
        if answer and record["problem"]:
            problems.append(record)
            gold.append({"id": record["id"], "answer": answer})
    if 100 * (len(rows) - len(problems)) > len(rows):
        raise InputError(f"{name}: {len(problems)} of {len(rows)} rows have a problem and an answer; fetch it again")
    return problems, gold


def prepare(args: argparse.Namespace) -> None:
    """Convert a set, or ProcessBench's four subsets; nothing is written before everything is converted."""
    outputs: dict[Path, list[dict]] = {}
    for name in [name for name in SOURCES if name.split("/")[0] == args.command]:
        path = find_file(SOURCES[name], args.source)
        rows = read_rows(path)
        checked = check_file(name, path, rows)
        problems, gold = convert(name, rows)
        if not name.startswith("processbench/"):  # gold comes first: nobody should find problems without it
            outputs[Path(args.out, "gold", f"{name}.jsonl")] = gold
        outputs[Path(args.out, f"{name}.jsonl")] = problems
        print(f"{name}: {len(problems)} of {len(rows)} rows from {path}; {checked}")
    for path, results in outputs.items():
        records.write_records(path, results, args)


LAYOUT = re.compile(r"\\(?:[bB]igg?[lrm]?|left|right|displaystyle|textstyle|limits|quad|qquad|[,;:! ])(?![a-zA-Z])")
SYNONYMS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge",
    "neq": "ne", "textbf": "text", "textit": "text", "textrm": "text", "mathrm": "text", "mathbf": "text", "mbox": "text",
    "operatorname": "text", "lbrace": "{", "rbrace": "}", "cdotp": "cdot", "ldots": "dots", "cdots": "dots",
}  # fmt: skip


def normalise(problem: str) -> str:
    r"""Lower case, letters and digits only, in one typesetting: `$ab$` is `{a} b`, `\dfrac{1}{2}` is `\frac12`, and
    `\left( x \right)` is `(x)`. So is `a-b` the same as `ab`: better one match too many than a leak."""
    problem = LAYOUT.sub("", problem)
    problem = re.sub(r"\\([a-zA-Z]+)", lambda command: "\\" + SYNONYMS.get(command[1], command[1]), problem)
    problem = problem.replace("\\text", "")
    return re.sub(r"[\W_]+", "", problem.lower())


# What a problem looks like and doesn't say: figures in Asymptote, HTML, and commands with an environment, a length or a
# colour. The other commands are the last alternative, with the name in a group.
TYPESETTING = re.compile(
    r"""\[asy\].*?(?:\[/asy\]|\Z) | </?(?:p|br|b|i|u|em|strong|sub|sup|div|span)\b[^<>]*>
    | \\(?:begin|end|[hv]space|label|tag|(?:text)?color|colorbox|[hv]?phantom) \*? [ ]? \{[^{}]*\}
      (?:\[[a-z]\])? (?:\{[clr|@! .\d]*\})?
    | \\\\ \*? [ ]? (?:\[ [^\[\]\n]{0,20} \])? | \\[hk](?:skip|ern) [ ]? -?[\d.]+ [ ]? [a-z]{2}
    | \\([a-zA-Z]+) """,
    re.VERBOSE | re.DOTALL,
)
# Commands that print a word, which others write without a command. \pmod and \bmod print "mod".
PRINTED = re.compile(
    r"[pb]?(mod)|([CNQRZ]|arc(?:sin|cos|tan)|(?:sin|cos|tan|cot|sec|csc)h?|sqrt|log|ln|lg|exp|gcd|lcm|min|max|lim|det)"
)


def write_command(command: re.Match) -> str:
    """What is left of it in `words`."""
    printed = PRINTED.fullmatch(command[1] or "")
    return printed[1] or printed[2] if printed else ""


def words(problem: str) -> str:
    r"""The letters and digits of a problem, for comparing Unicode with LaTeX: `x²≤π` and `$x^2 \le \pi$` are both "x2".

    Commands go, but for those that print a word; so do Greek letters, most of which are commands. Accents go, and
    ligatures and full-width digits become plain ones."""
    problem = TYPESETTING.sub(write_command, from_unicode(html.unescape(problem)))
    return re.sub(r"[\W_\u0370-\u03ff]+", "", unicodedata.normalize("NFKD", problem).casefold())


def keys(problem: str) -> frozenset[str]:
    """What a problem is known by: two problems are the same if they share a key. `words` is blind to relations and
    `normalise` to Unicode."""
    return frozenset({normalise(problem), words(problem)} - {""})


def report_overlap(args: argparse.Namespace) -> None:
    """Which benchmark problems are in the training file, as a whole; --out: the training file without them."""
    train = [(keys(record["problem"]), record) for record in records.read(args.train, ["id", "problem"])]
    known = frozenset().union(*(own for own, _ in train))
    found: set[str] = set()
    for path in args.benchmarks:
        problems = {keys(record["problem"]) for record in records.read(path, ["id", "problem"])}
        shared = [problem for problem in problems if problem & known]
        print(f"{path}: {len(shared)} of {len(problems)} different problems are in {args.train}")
        found.update(*shared)
    kept = [record for own, record in train if not own & found]
    print(f"{args.train}: {len(train) - len(kept)} of {len(train)} problems are in a benchmark")
    if args.out is not None:
        records.write_records(Path(args.out), kept, args)


# --------------------------------------------------------------------------- balancing solutions

MOST_OF_A_KIND = 3  # correct and incorrect solutions of a problem, at most; from the released code


def balance_solutions(solutions: list[dict], grades: list[bool | None], seed: int) -> list[dict]:
    """As many correct as incorrect solutions of each problem, at most MOST_OF_A_KIND of either, chosen at random.

    grades: for each solution, whether its answer is correct; None (unknown) leaves it out. A problem whose solutions
    are all correct or all incorrect keeps none. The order stays. Source: the released code's data preparation.

        grades of a problem's 8 solutions    T F T T F T T T     2 are incorrect, so 2 of the 6 correct ones are kept
                                             F F F F F F F F     none is kept
    """
    # 1. Sort the solutions of each problem into correct and incorrect ones.
    correct, incorrect = defaultdict(list), defaultdict(list)
    for solution, grade in zip(solutions, grades, strict=True):
        if grade is True:
            correct[solution["problem_id"]].append(solution["id"])
        elif grade is False:
            incorrect[solution["problem_id"]].append(solution["id"])

    # 2. Choose. Sorted and seeded per problem: neither the order of the file nor other problems change the choice.
    kept = set()
    for problem in correct:
        rng = random.Random(f"{seed}/{problem}")
        count = min(len(correct[problem]), len(incorrect[problem]), MOST_OF_A_KIND)
        kept.update(rng.sample(sorted(correct[problem]), count))
        kept.update(rng.sample(sorted(incorrect[problem]), count))
    return [solution for solution in solutions if solution["id"] in kept]


def write_balanced(args: argparse.Namespace) -> None:
    """Write the solutions that `balance_solutions` keeps, with all their fields."""
    if Path(args.out).resolve() == Path(args.solutions).resolve():
        raise InputError(f"--out {args.out} is the file of --solutions; choose another")
    solutions = records.read(args.solutions, ["id", "problem_id", "steps", "answer"], "python generate.py")
    gold = records.read_answers([args.gold])
    # A solution without steps gives a verifier nothing to judge: it would get no label, and the balance would be lost.
    judgeable = [solution for solution in solutions if solution["steps"]]
    pairs = []
    for solution in judgeable:
        if solution["problem_id"] not in gold:
            raise InputError(f"{args.gold}: no answer for the problem of solution {solution['id']}; add it")
        pairs.append((solution["answer"], gold[solution["problem_id"]]))
    grades = grade_all(pairs)

    kept = balance_solutions(judgeable, grades, args.seed)
    if not kept:
        raise InputError(f"{args.solutions}: no problem has both correct and incorrect solutions; sample more of each")
    records.write_records(Path(args.out), kept, args)
    problems = {solution["problem_id"] for solution in solutions}
    problems_kept = {solution["problem_id"] for solution in kept}
    print(f"{args.out}: {len(kept)} of {len(solutions)} solutions, half of them correct")
    print(f"{len(problems_kept)} of {len(problems)} problems; {grades.count(None)} answers could not be graded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in dict.fromkeys(name.split("/")[0] for name in SOURCES):
        command = commands.add_parser(name)
        command.add_argument("--out", required=True, help="the folder to write to")
        command.add_argument("--source", help="a local file or folder instead of the hub's")
    command = commands.add_parser("overlap", help=report_overlap.__doc__)
    command.add_argument("--train", required=True, help="JSON Lines with id and problem")
    command.add_argument("--benchmarks", nargs="+", required=True, help="the same, one file a benchmark")
    command.add_argument("--out", help="write the training file without the benchmarks' problems")
    command = commands.add_parser("balance", help=balance_solutions.__doc__.partition("\n")[0])
    command.add_argument("--solutions", required=True, help="solutions.jsonl of generate.py")
    command.add_argument("--gold", required=True, help="JSON Lines with id and answer of the problems")
    command.add_argument("--out", required=True, help="the solutions file to write")
    command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "overlap":
        report_overlap(args)
    elif args.command == "balance":
        write_balanced(args)
    else:
        prepare(args)


if __name__ == "__main__":
    distributed.run_stage(main)
