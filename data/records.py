"""The files that stages read and write: JSON Lines, `args.json`, fingerprints, the metrics file; and the command line.

Here belong: reading records with their types; appending so that a killed run can be resumed, and no two runs write to
one file; files that are replaced as a whole; recording how a file was made; flags, with the tiny world's defaults.
"""

import argparse
import codecs
import fcntl
import hashlib
import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import version
from itertools import chain, pairwise
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, TextIO

from kernels import distributed
from kernels.distributed import InputError
from kernels.text import visible

# --------------------------------------------------------------------------- types of fields


def is_number(value: object) -> bool:
    """A finite number; not true or false, which Python counts as 1 and 0."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def write_digits(value: object) -> object:
    """1e-05 -> "0.00001"; a string as it is."""
    return value if isinstance(value, str) else format(Decimal(str(value)), "f")


class Type(NamedTuple):
    """What the value of a field must be, and how it is converted to what the stages use."""

    wanted: str  # for messages
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] | None = None


def list_of(item: Type, items: str) -> Type:
    """A list; items: the items' type in the plural."""

    def convert(value: list) -> list:
        return [item.convert(entry) for entry in value]

    return Type(
        f"a list of {items}",
        lambda value: isinstance(value, list) and all(map(item.accepts, value)),
        convert if item.convert is not None else None,  # a list that stays as it is costs nothing
    )


def or_null(other: Type) -> Type:
    """A value that may be null; `check_record` doesn't convert null."""
    return Type(f"{other.wanted}, or null", lambda value: value is None or other.accepts(value), other.convert)


STRING = Type("a string", lambda value: isinstance(value, str))
NOT_BLANK = Type("a string that is not blank", lambda value: isinstance(value, str) and value.strip())
# Other programs write numbers as ids and answers, and 3 as 3.0.
NAME = Type("a string or a number", lambda value: is_number(value) or (isinstance(value, str) and value), str)
ANSWER = Type('a string (such as "5, 7" for two answers) or a number',
              lambda value: is_number(value) or isinstance(value, str), write_digits)  # fmt: skip
WHOLE = Type("a whole number from 0, below 2**53",  # up to there a float is exact
             lambda value: is_number(value) and 0 <= value < 2**53 and value == int(value), int)  # fmt: skip
NUMBER = Type("a number in the range of fp32",  # a metric may be NaN
              lambda value: value != value or (is_number(value) and abs(value) < 2**128))  # fmt: skip
# Nothing is taken by its truth value, because that of -1, "No" and "-" is true.
FLAG = Type("true or false", lambda value: isinstance(value, bool))
STRINGS = list_of(STRING, "strings")
VERDICTS = list_of(FLAG, "true and false")
NUMBERS = list_of(NUMBER, "numbers")
COUNTS = list_of(WHOLE, "whole numbers")
VOTES = Type("[correct, incorrect]", lambda value: COUNTS.accepts(value) and len(value) == 2, COUNTS.convert)
INTERVAL = Type("[low, high]", lambda value: NUMBERS.accepts(value) and len(value) == 2)
SETTINGS = Type("an object with model", lambda value: isinstance(value, dict) and isinstance(value.get("model"), str))
JUDGEMENT = Type("an object with text and verdict", lambda value: isinstance(value, dict)
                 and isinstance(value.get("text"), str) and "verdict" in value)  # fmt: skip

# The type of a field, whichever file it comes from. Other fields are taken as they are.
FIELD_TYPES: dict[str, Type] = {
    # problems, solutions
    "id": NAME, "problem_id": NAME, "solution_id": NAME, "problem": NOT_BLANK, "answer": or_null(ANSWER),
    "steps": STRINGS, "sample": WHOLE, "text": STRING, "finish": STRING, "tokens": WHOLE, "model": STRING,
    # verifications, critiques
    "step_verdicts": or_null(VERDICTS), "verdict": or_null(FLAG), "solution_sha256": or_null(STRING),
    "method": STRING, "round": WHOLE, "num_verifications": WHOLE, "critique": or_null(STRING), "merged": or_null(STRING),
    "judged_sha256": or_null(STRING),
    # labels
    "step_labels": VERDICTS, "outcome": FLAG, "dropped": or_null(STRING), "ties": WHOLE,
    "votes": list_of(VOTES, "[correct, incorrect]"),
    # metrics, curves, rollouts
    "step": WHOLE, "panel": STRING, "curve": STRING, "x": NUMBERS, "y": NUMBERS, "low": NUMBERS, "high": NUMBERS,
    "ylim": NUMBERS, "ids": COUNTS, "valid": FLAG, "reward": NUMBER, "advantage": NUMBER,
    "judgement": or_null(JUDGEMENT),
    # results
    "benchmark": STRING, "subset": STRING, "metric": STRING, "value": NUMBER, "n": WHOLE, "interval": or_null(INTERVAL),
    "settings": SETTINGS, "seconds": NUMBER,
}  # fmt: skip
# Fields of a label that are null if the solution was dropped: what a kept label lacks would be missed in training.
NULL_IF_DROPPED = ("step_labels", "outcome", "text")
# Lists that have one entry for each entry of another.
SAME_LENGTH = {"step_labels": "steps", "votes": "steps", "y": "x", "low": "x", "high": "x"}
# What public data sets write for a correct and an incorrect step.
FOREIGN_VERDICTS = (1, 0, -1, "+", "-")


def check_record(record: object, fields: list[str], place: str, optional: tuple[str, ...] = ()) -> None:
    """Convert a record's values by FIELD_TYPES. Raises InputError, beginning with `place`, if one of `fields` is
    missing, or if one of them or of the `optional` fields has another type or length. Any other field may be
    anything."""
    if not isinstance(record, dict):
        record = {}  # a value that is no object has none of the fields
    for field in fields:
        if field not in record:
            raise InputError(f"{place}: no field {field!r}; every record needs {', '.join(fields)}")
    is_dropped = isinstance(record.get("dropped"), str)
    for field, value in record.items():
        field_type = FIELD_TYPES.get(field)
        if field_type is None or (value is None and is_dropped and field in NULL_IF_DROPPED):
            continue
        if field_type.accepts(value):
            if field_type.convert is not None and value is not None:
                record[field] = field_type.convert(value)
        elif field in fields or field in optional:
            wrong = f"{field} must be {field_type.wanted}, not {str(value)[:60]}"
            raise InputError(f"{place}: {wrong}{advise(field, value)}")
    for field, other in SAME_LENGTH.items():
        entries = record.get(field)
        if entries is None or other not in fields or not (field in fields or field in optional):
            continue
        if len(entries) != len(record[other]) and not (field == "votes" and not entries):  # nothing voted
            lengths = f"{len(entries)} {field} for {len(record[other])} {other}"
            raise InputError(f"{place}: {lengths}; there must be one for each")


def advise(field: str, value: object) -> str:
    """How to convert a value, if it is clear what was meant."""
    if value is None and field in NULL_IF_DROPPED:
        return '; null is for labels that were dropped, and "dropped" must then give the reason'
    marks = value if isinstance(value, list) else [value]
    is_verdict = field in ("step_verdicts", "verdict", "step_labels", "outcome")
    if is_verdict and all(isinstance(mark, (int, str)) and mark in FOREIGN_VERDICTS for mark in marks):
        return "; convert PRM800K's 1 or Math-Shepherd's + to true, and -1 or - to false"
    return ""


# --------------------------------------------------------------------------- reading


class Line(NamedTuple):
    """A line of a JSON Lines file."""

    path: str
    number: int  # from 1
    start: int  # where it begins in the file, in bytes
    value: Any  # what it says; a dict if it has been checked

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.path}:{self.number}"


def read_lines(path: str | Path, made_by: str = "", end: int | None = None) -> Iterator[Line]:
    """The lines that are not blank, one by one, because files may be larger than memory; those from byte `end` on are
    left out. Raises InputError for one that is not JSON, and for a file that is missing (made_by: see `read`), or can't
    be read more than once."""
    path = str(path)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file{advise_command(made_by)}")
    if not os.path.isfile(path):
        raise InputError(f"{path}: not a plain file; it is read more than once, so save what a pipe brings to a file")
    start = 0
    # In binary, because only there does a line end at \n alone: U+2028 and the like may stand inside JSON strings.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if start == end:
                return
            if not line.isspace():
                yield Line(path, number, start, parse_json(line, f"{path}:{number}", "fix or remove the line"))
            start += len(line)


def parse_json(data: bytes, place: str, advice: str) -> Any:
    """The value of JSON text; InputError, beginning with `place`, if it is none."""
    try:
        value = json.loads(data)
        if b"\\u" in data:  # a lone surrogate is legal JSON but can't be encoded as UTF-8
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # the latter: a hundred thousand brackets
        raise InputError(f"{place}: not JSON ({error}); {advice}") from None
    return value


def scan(
    path: str | Path, fields: list[str], made_by: str = "", optional: tuple[str, ...] = (), end: int | None = None
) -> Iterator[Line]:
    """The records of a JSON Lines file one by one, each checked by `check_record`; see `read` and `read_lines`."""
    is_empty = True
    for line in read_lines(path, made_by, end):
        check_record(line.value, fields, line.place, optional)
        is_empty = False
        yield line
    if is_empty:
        raise InputError(f"{path}: the file is empty{advise_command(made_by)}")


def advise_command(made_by: str) -> str:
    """The end of a message: the command that creates a file, if there is one."""
    return f"; create it with: {made_by}" if made_by else ""


def read(
    path: str | Path,
    fields: list[str],
    made_by: str = "",
    unique: tuple[str, ...] = ("id",),
    optional: tuple[str, ...] = (),
    only: bool = False,
) -> list[dict]:
    """All records of a JSON Lines file, each with at least these fields, of the types in FIELD_TYPES.

    made_by: the command that creates such a file, for the message. unique: the fields that identify a record. optional:
    fields that may be missing, but not be of another type. only: keep these fields and no others. Raises InputError for
    a missing or empty file, and, with its number, for a line that is not such a record or repeats one.
    """
    has_key = set(unique) <= set(fields)
    key_of = itemgetter(*unique)  # a function: record -> its key
    records = []
    seen = set()
    shared: dict = {}  # the problem of many solutions is kept once
    for line in scan(path, fields, made_by, optional):
        record = line.value
        if has_key:
            key = key_of(record)
            if key in seen:
                raise repeated(line, unique, key)
            seen.add(key)
        if only:
            record = {field: record[field] for field in (*fields, *optional) if field in record}
            if isinstance(record.get("problem"), str):
                record["problem"] = shared.setdefault(record["problem"], record["problem"])
        records.append(record)
    return records


def repeated(line: Line, fields: tuple[str, ...], key: object) -> InputError:
    """The error of a line whose key, the values of these fields, stands in the file already."""
    return InputError(f"{line.place}: {', '.join(fields)} {key!r} appears twice; ids must be unique")


def read_at(file: BinaryIO, start: int) -> dict:
    """The record whose line begins at this byte of a file that `scan` has checked."""
    file.seek(start)
    return json.loads(file.readline())


@dataclass(slots=True)
class StoredVerification:
    """What is kept in memory of a verification in a file, read like a record: verification["verdict"]."""

    solution_id: str
    sample: int
    step_verdicts: list[bool] | None
    verdict: bool | None
    tokens: int
    text: int  # its place: the byte at which the record's line begins, for `read_at`

    def __getitem__(self, field: str) -> Any:
        return getattr(self, field)


def store_verification(record: dict, start: int, shared: dict) -> StoredVerification:
    """A record, whose line begins at this byte, without its text. shared: the same dict for all records of a file, in
    which equal ids, numbers and lists are kept once."""
    step_verdicts = record["step_verdicts"]
    if step_verdicts is not None:
        step_verdicts = shared.setdefault(tuple(step_verdicts), step_verdicts)
    solution_id = shared.setdefault(record["solution_id"], record["solution_id"])
    tokens = shared.setdefault(record["tokens"], record["tokens"])
    return StoredVerification(solution_id, record["sample"], step_verdicts, record["verdict"], tokens, start)


def group_by_solution(solutions: list[dict], verifications: list[dict]) -> dict[str, list[dict]]:
    """solution id -> its verifications in the order of their samples; those of other solutions are ignored. Raises
    InputError for one that appears twice, or has another number of steps: it was made from another solution."""
    groups: dict[str, list[dict]] = {s["id"]: [] for s in solutions}
    num_steps = {s["id"]: len(s["steps"]) for s in solutions}
    for verification in verifications:
        solution_id = verification["solution_id"]
        if solution_id not in groups:
            continue
        verdicts = verification["step_verdicts"]
        if verdicts is not None and len(verdicts) != num_steps[solution_id]:
            mismatch = f"{len(verdicts)} step_verdicts for the {num_steps[solution_id]} steps of solution {solution_id}"
            raise InputError(f"{mismatch}; both files must come from the same solutions")
        groups[solution_id].append(verification)
    for solution_id, group in groups.items():
        group.sort(key=itemgetter("sample"))
        for one, next_one in pairwise(group):
            if one["sample"] == next_one["sample"]:
                raise InputError(f"verification {solution_id}/{one['sample']} appears twice; ids must be unique")
    return groups


def torn_line(path: str | Path) -> int | None:
    """Where the last line begins, in bytes, if it lacks its newline, because a killed run has left it or a running one
    is writing it; otherwise None. Only the end of the file is read."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:  # block by block, backwards
            start = max(0, end - 65_536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                line = start + newline + 1
                return line if line < size else None
            end = start
    return 0 if size > 0 else None


def is_object(path: Path, start: int) -> bool:
    """Is the last line, which begins at this byte and has no newline, a whole record?"""
    with open(path, "rb") as file:
        file.seek(start)
        try:
            return isinstance(json.loads(file.read()), dict)
        except (ValueError, RecursionError):
            return False


def read_answers(paths: list[str]) -> dict[str, str]:
    """id -> reference answer from gold files. Raises InputError for an answer that is null or shows nothing, and if two
    disagree."""
    gold: dict[str, str] = {}
    for path in paths:
        for record in read(path, ["id", "answer"], "python -m data.make_tiny problems"):
            name = record["id"]
            answer = record["answer"]
            if answer is None:
                raise InputError(f"{path}: {name!r} has no answer (null); remove it or write one")
            if not visible(answer).strip():
                raise InputError(f"{path}: {name!r} has an answer that shows nothing, {answer!r}; remove it or write one")
            if name in gold and gold[name] != answer:
                answers = f"{gold[name]!r} and {answer!r}"
                raise InputError(f"{path}: {name!r} has two different answers, {answers}; rename one id")
            gold[name] = answer
    return gold


def require_answers(problem_ids: Iterable[str], gold: dict[str, str]) -> None:
    """Raise InputError for the first problem without a reference answer."""
    for problem_id in problem_ids:
        if problem_id not in gold:
            raise InputError(f"problem {problem_id}: no gold answer; --gold must have one for every problem")


def problem_of(solution_id: str) -> str:
    """The problem's id in <problem_id>/<k>; an id without a slash is that of a problem with one solution."""
    problem_id, _, _ = solution_id.rpartition("/")
    return problem_id or solution_id


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


def find_gold(path: str, solutions: list[dict]) -> list[tuple[dict, list[bool] | None, bool | None, str | None]]:
    """(solution, step labels, outcome, reference answer) for the solutions (id, steps) that have a record in a gold
    file: their own (step_labels, outcome), or their problem's (answer, and steps if solutions are canonical). What a
    record doesn't give is None. Raises InputError if there is no record, or one for another number of steps."""
    optional = ("answer", "steps", "step_labels", "outcome")
    lines = read(path, ["id"], "python -m data.make_tiny problems", optional=optional)
    known = {record["id"]: record for record in lines}
    found = []
    for solution in solutions:
        name = solution["id"]
        own = known.get(name)
        problem = known.get(problem_of(name))
        if own:
            labels = own.get("step_labels")
            if labels is not None and len(labels) != len(solution["steps"]):
                lengths = f"{len(labels)} step_labels and {len(solution['steps'])} steps"
                raise InputError(f"{path}: {name} has {lengths}; fix the record")
            found.append((solution, labels, own.get("outcome"), None))
        elif problem:
            labels = gold_labels(solution["steps"], problem["steps"]) if problem.get("steps") else None
            found.append((solution, labels, None, problem.get("answer")))
    if not found:
        raise InputError(f"{path}: no record for any of {len(solutions)} solutions, by their ids or their problems'")
    return found


def name_files(flag: str, paths: list[str]) -> dict[str, str]:
    """name -> path, the name being the file's without its suffix. Raises InputError if two are the same."""
    named = {Path(path).stem: path for path in paths}
    if len(named) < len(paths):
        raise InputError(f"--{flag} {' '.join(paths)}: two files share a name, the key of results; rename one")
    return named


def read_problem_sets(
    flag: str, paths: list[str], gold: dict[str, str], limit: int | None = None
) -> dict[str, list[dict]]:
    """name -> the first `limit` problems of each file, by `name_files`. Raises InputError for one without an answer."""
    sets = {}
    for name, path in name_files(flag, paths).items():
        sets[name] = read(path, ["id", "problem"], "python -m data.make_tiny problems")[:limit]
        require_answers([problem["id"] for problem in sets[name]], gold)
    return sets


def merge_labels(files: dict[str, list[dict]]) -> list[dict]:
    """The solutions (id, steps, answer) of files of labels, each once. Raises InputError if two files have different
    ones under an id, because they were made from different solutions."""
    merged: dict[str, dict] = {}
    for path, labels in files.items():
        for label in labels:
            first = merged.setdefault(label["id"], label)
            if any(label[field] != first[field] for field in ("steps", "answer")):
                raise InputError(f"{path}: {label['id']} is another solution than in the files before; give labels of the "
                                 "same solutions")  # fmt: skip
    return list(merged.values())


def read_samples(path: str | Path) -> dict[str, list[dict]]:
    """problem id -> its samples in order, from a solutions file. Raises InputError if some problems have fewer."""
    fields = ["id", "problem_id", "problem", "sample", "steps", "answer", "finish", "tokens", "model"]
    groups: dict[str, list[dict]] = {}
    for solution in sorted(read(path, fields, "python generate.py"), key=itemgetter("sample")):
        groups.setdefault(solution["problem_id"], []).append(solution)
    if len({len(group) for group in groups.values()}) > 1:
        raise InputError(f"{path}: problems have different numbers of samples; let generate.py finish the file")
    return groups


def read_cases(path: str) -> list[dict]:
    """ProcessBench cases (problem, steps, label) from JSON Lines or, as published, a JSON array.

    Raises InputError, with the number of the case, for a field that is missing or of another type, and for a label that
    is neither -1 nor the index of a step.
    """
    fields = ["problem", "steps"]
    data = Path(path).read_bytes() if Path(path).is_file() else b""
    if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        cases = parse_json(data, path, "fetch the file again")
        if not cases:
            raise InputError(f"{path}: an empty array, no cases; fetch the file again")
        for number, case in enumerate(cases):
            check_record(case, fields, f"{path}: case {number}")
    else:
        cases = read(path, fields, "python -m data.make_tiny")
    for number, case in enumerate(cases):
        label = case.get("label")
        num_steps = len(case["steps"])
        if type(label) is not int or label not in range(-1, num_steps):  # True is an int, too
            given = f"label {label!r} and {num_steps} steps"
            raise InputError(f"{path}: case {number} has {given}; a label is the index of the first wrong step or -1")
        final_answer_correct(case, f"{path}: case {number}")
    return cases


def final_answer_correct(case: dict, place: str) -> bool:
    """Is the final answer of a ProcessBench case correct? Its final_answer_correct, which some tools write as a string;
    without it, whether no step is wrong. Raises InputError, beginning with `place`, for any other value."""
    value = case.get("final_answer_correct", case["label"] == -1)
    known = {"true": True, "false": False}.get(str(value).lower())
    if known is None:
        raise InputError(f"{place}: final_answer_correct must be true or false, not {value!r}")
    return known


def read_references(path: str, solutions: list[dict]) -> dict[str, str]:
    """solution id -> reference answer of its problem. Raises InputError for a solution without one."""
    answers = read_answers([path])
    references = {}
    for solution in solutions:
        problem_id = problem_of(solution["id"])
        if problem_id not in answers:
            raise InputError(f"{path}: no answer for the problem of solution {solution['id']}; add it")
        references[solution["id"]] = answers[problem_id]
    return references


def read_metrics(path: Path, made_by: str = "") -> list[dict]:
    """The records of a run's metrics.jsonl: `step`, and numbers. A last line without its newline is left out: a run is
    writing it, or was killed. Raises InputError if another value is no number; made_by: see `read`."""
    records = []
    end = torn_line(path) if path.is_file() else None
    for line in read_lines(path, made_by, end):
        check_record(line.value, ["step"], line.place)
        for key, value in line.value.items():
            if not NUMBER.accepts(value) and value not in (math.inf, -math.inf):  # what has diverged may be infinite
                raise InputError(f"{line.place}: {key} must be {NUMBER.wanted}, not {str(value)[:60]}; fix the line")
        records.append(line.value)
    return records


# --------------------------------------------------------------------------- writing


def follow_link(path: str | Path) -> Path:
    """Where a symbolic link leads; any other path as it is. A lock and a replacement are the target's."""
    path = Path(path)
    return path.resolve() if path.is_symlink() else path


@contextmanager
def replace_file(path: str | Path) -> Iterator[TextIO]:
    """A file to write that replaces `path` at the end: a reader sees the old file or the new one, never part of it."""
    path = follow_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the rank, because pids are not unique across machines.
    temporary = path.with_name(f".{path.name}.{distributed.rank()}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # it is there only if something failed


def write_json(path: str | Path, value: object) -> None:
    """Write one JSON value, whole or not at all."""
    with replace_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def to_line(record: dict) -> str:
    """The record as a line of JSON Lines."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_lines(path: str | Path, records: Iterable[dict]) -> None:
    """Write a JSON Lines file, whole or not at all."""
    with replace_file(path) as file:
        for record in records:
            file.write(to_line(record))


def write_records(path: Path, records: Iterable[dict], args: argparse.Namespace) -> None:
    """Write a JSON Lines file and its args.json, each whole or not at all. Raises InputError as `check_output`."""
    check_output(path, args)
    write_args(path, args)
    write_lines(path, records)


# --------------------------------------------------------------------------- how a file was made


def describe_run(args: argparse.Namespace, constants: dict | None = None) -> dict:
    """The contents of an args.json: resolved arguments, constants that were never flags, package versions, git commit,
    with "-dirty" behind it if a file of the checkout has been changed since."""
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
    command += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # no tags: the whole hash
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # git is not installed
        commit = ""
    return {
        "arguments": vars(args),
        "constants": constants or {},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "commit": commit or None,  # not a git checkout
    }


def args_file(output: Path) -> Path:
    """Where the args.json of an output is: beside a file, inside a run directory. Older runs wrote it beside their
    directory, too; it is read there if there is none inside."""
    beside = Path(f"{output}.args.json")
    if output.is_dir() and ((output / "args.json").exists() or not beside.exists()):
        return output / "args.json"
    return beside


def write_args(output: Path, args: argparse.Namespace, constants: dict | None = None) -> None:
    """Write the args.json of an output; that of a run directory lies inside, so that it stays with a renamed one."""
    output = follow_link(output)
    path = output / "args.json" if output.is_dir() else args_file(output)
    write_json(path, describe_run(args, constants))


def read_args(output: Path) -> dict | None:
    """The arguments and constants that an output was made with; None if there is no args.json. Raises InputError for a
    damaged one."""
    path = args_file(follow_link(output))
    if not path.exists():
        return None
    advice = f"remove it if {output} needn't be resumed"
    run = parse_json(path.read_bytes(), str(path), advice)
    constants = run.get("constants", {}) if isinstance(run, dict) else None
    if not isinstance(constants, dict) or not isinstance(run.get("arguments"), dict):
        raise InputError(f"{path}: not an args.json, which has arguments and constants; {advice}")
    return run["arguments"] | constants


def hash_text(text: str) -> str:
    """First 16 hex digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: str | Path) -> str:
    """First 16 hex digits of the file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# The files of a model directory that decide what the model says.
MODEL_FILES = ("config.json", "generation_config.json", "*token*", "vocab.json", "merges.txt", "chat_template*",
               "*.safetensors", "*.safetensors.index.json")  # fmt: skip


def hash_model(path: str | Path) -> str:
    """A fingerprint of a model directory, 16 hex digits: other weights, another tokenizer or chat template give another
    one. Of a large file its size and 64 blocks of 64 KiB are read, spread evenly: training changes weights in all of
    them, and a model of 30 GB costs no minute."""
    blocks = 64
    size = 1 << 16
    digest = hashlib.sha256()
    for file in sorted({file for pattern in MODEL_FILES for file in Path(path).glob(pattern) if file.is_file()}):
        length = file.stat().st_size
        digest.update(f"{file.name} {length}\n".encode())
        if length <= blocks * size:
            digest.update(hash_file(file).encode())
            continue
        with open(file, "rb") as opened:
            for i in range(blocks):
                opened.seek(i * (length - size) // (blocks - 1))  # the first block at 0, the last one at the end
                digest.update(opened.read(size))
    return digest.hexdigest()[:16]


def note_model(history: list[list], step: int, fingerprint: str) -> list[list]:
    """[step, fingerprint] of each model that a flag has named in a run, with the number of steps done when it came: a
    reward model may be another when a run resumes.

    [[0, "a"]] becomes [[0, "a"], [20, "b"]] for a run that resumes after step 20 with the model b.
    """
    for entry in history if isinstance(history, list) else [history]:
        if not (isinstance(entry, list) and len(entry) == 2 and FIELD_TYPES["step"].accepts(entry[0])):
            raise InputError(f"args.json in --out: {str(entry)[:60]} in the history of a model, which has pairs [step, "
                             "fingerprint]; restore the file or choose another --out")  # fmt: skip
    history = [entry for entry in history if entry[0] < step]
    if not history or history[-1][1] != fingerprint:
        history.append([step, fingerprint])
    return history


def check_arguments(output: Path, arguments: dict, may_change: set[str]) -> None:
    """Raise InputError if the args.json of an output differs from these arguments, apart from those that may change.

    An argument named x_sha256 is the hash of what --x names; one that an older run hasn't recorded is not compared.
    Constants may be among the arguments: an earlier run may have had one of them as a flag. A flag that no longer
    exists is ignored.
    """
    earlier = read_args(output)
    if earlier is None or not output.exists():
        return
    for name in sorted(arguments.keys() - may_change):
        before = earlier.get(name)
        now = arguments.get(name)
        if same_value(before, now) or (name.endswith("_sha256") and name not in earlier):
            continue
        difference = f"made with --{name} {before}, this run has --{name} {now}"
        if name == "prompt_sha256":
            difference = "made with another prompt, which this code no longer has"
        elif name.endswith("_sha256"):
            difference = f"the contents of --{name.removesuffix('_sha256')} have changed"
        raise InputError(f"{output}: {difference}; choose another --out or remove it")


def same_value(before: object, now: object) -> bool:
    """Whether two values of an argument are the same. A path may be written in several ways: m, m/, ./m. A run from
    before a flag existed is like one that doesn't use it."""
    if before is None and now == 0:
        return True
    if isinstance(before, str) and isinstance(now, str):
        return os.path.realpath(before) == os.path.realpath(now)
    return before == now


# --------------------------------------------------------------------------- whose is an existing output?

# The stage that wrote an output, by a flag that is only among its arguments. In this order, because one of the last may
# be among those of evaluate.py, too.
STAGE_OF_FLAG = {
    "command": "a command of evaluate.py or data/prepare.py",
    "policy": "grpo.py",
    "kind": "train_prm.py",
    "num_verifications": "verify.py",
    "num_samples": "generate.py",
}


def stage_of(arguments: dict) -> str | None:
    """The stage whose arguments these are; of evaluate.py the command, because each has outputs of its own."""
    for flag, stage in STAGE_OF_FLAG.items():
        if flag in arguments:
            return str(arguments[flag]) if flag == "command" else stage
    return None


def check_place(out: Path) -> None:
    """Raise InputError if no file can be written at --out."""
    if out.is_dir():
        raise InputError(f"--out {out} is a directory; name a file in it")
    nearest = next(parent for parent in follow_link(out).absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"--out {out}: nothing can be written in {nearest}; choose another")


def check_output(out: str | Path, args: argparse.Namespace, signature: bytes | None = None) -> None:
    """Raise InputError for an --out that is one of the inputs, a model directory that no run with an args.json has
    made, the output of another stage, or a device or pipe. Nothing is written; RecordFile and `lock_run` ask before
    they lock.

    A file with an args.json may be replaced, as may one that begins with `signature`; any other existing file is
    somebody's. For an output that is appended to, give b"": its records will be looked at.
    """
    out = Path(out)
    if not out.exists():
        return
    if not out.is_file() and not out.is_dir():
        raise InputError(f"--out {out}: not a plain file, which could be replaced; choose another --out")
    # 1. An input. Every argument may be one: a name that is no file's is not the same file.
    for flag, value in vars(args).items():
        for path in value if isinstance(value, list) else [value]:
            if flag != "out" and isinstance(path, str) and os.path.exists(path) and out.samefile(path):
                raise InputError(f"--out {out} is --{flag} itself, which would be overwritten; choose another")

    # 2. Another stage's output.
    earlier = read_args(out)
    if earlier is not None:
        before, now = stage_of(earlier), stage_of(vars(args))
        if before is not None and before != now:
            raise InputError(f"--out {out} was written by {before}; choose another --out")
        return

    # 3. What no stage has made. An empty file or directory is free.
    advice = "and no args.json says that this program made it; choose another --out"
    if out.is_dir():
        for pattern in ("config.json", "tokenizer*", "*.safetensors", "*.bin", "training", "metrics.jsonl"):
            for found in out.glob(pattern):
                raise InputError(f"--out {out} has a {found.name}, {advice}")
    elif out.stat().st_size > 0:
        with open(out, "rb") as file:
            begins_as_ours = signature is not None and file.read(len(signature)) == signature
        if not begins_as_ours:
            raise InputError(f"--out {out} exists, {advice}")


# --------------------------------------------------------------------------- files that runs append to


def take_lock(path: Path, refusal: str) -> IO:
    """Lock a file until it is closed or the process ends. If another run has it, raises InputError with `refusal`. On a
    file system without locks, says so and goes on."""
    file = open(path, "a")  # noqa: SIM115 - it stays open as long as the lock is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise InputError(f"{refusal}; wait for it or choose another --out") from None
    except OSError as error:
        reason = f"{path}: no lock on this file system ({error.strerror})"
        print(f"{reason}; see to it that no second run writes there", file=sys.stderr, flush=True)
    return file


@contextmanager
def lock_run(out: str | Path, args: argparse.Namespace) -> Iterator[None]:
    """Keep a run directory for one training. Enter it before anything is loaded or written: a run that is refused
    leaves the directory as it is. Rank 0 locks it. Raises InputError as `check_output`, and if another run has it."""
    if distributed.rank() != 0:
        yield
        return
    check_output(out, args)
    Path(out).mkdir(parents=True, exist_ok=True)
    with take_lock(Path(out) / "metrics.lock", f"{out}: another run is training into it"):
        yield


class RecordFile:
    """An append-only JSON Lines output that a killed run can resume. Use as a context manager.

        with RecordFile("out.jsonl", args, MAY_CHANGE_ON_RESUME, remembered_field="problem") as output:
            if output.find_missing([["p0/0", "p0/1"]]):
                output.append([{"id": "p0/0", "problem": "1 + 1", ...}, {"id": "p0/1", ...}])

    may_change: the arguments that may differ from those of the run that made the file, as they don't change records.
    key_fields: what identifies a record. other_fields: what else its records have; without them a file that has no
    args.json is somebody's. After entry, `done` maps the key of each record that is there, an id, or a tuple if there
    are several key fields, to its remembered field (None without one), a tuple for several: a million records are too
    large to keep more. Only rank 0 has them, unless is_mine says which records this rank must know.

    Under torchrun rank 0 locks, checks, repairs and reads the file; every rank appends whole lines. Only the lock is
    written before the first record, so a run that fails early leaves nothing behind.
    """

    def __init__(
        self,
        path: str | Path,
        args: argparse.Namespace,
        may_change: set[str],
        key_fields: tuple[str, ...] = ("id",),
        remembered_field: str | tuple[str, ...] | None = None,
        other_fields: tuple[str, ...] = (),
        is_mine: Callable[[dict], bool] | None = None,
    ):
        self.path = follow_link(path)
        self.args = argparse.Namespace(**vars(args))  # a copy, for `check_made_with`
        self.run = describe_run(self.args)  # now, because the code may be changed while it runs
        self.may_change = may_change
        self.key_fields = key_fields
        self.key_of = itemgetter(*key_fields)  # a function: record -> its key
        self.remembered_field = remembered_field
        self.other_fields = other_fields
        self.is_mine = is_mine
        self.done: dict = {}
        self.shared: dict = {}  # equal values of many records, such as their problem, are kept once
        self.was_there = False  # did an earlier run write records?
        self.file: int | None = None  # its descriptor, once a record has been appended

    def __enter__(self) -> "RecordFile":
        # 1. One rank makes sure that the file can be continued.
        if distributed.rank() == 0:
            if self.path.is_dir():
                raise InputError(f"{self.path}: Is a directory; name a file in it")
            check_output(self.path, self.args, signature=b"")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = take_lock(Path(f"{self.path}.lock"), f"{self.path}: another run is writing to it")
            if self._has_content():
                check_arguments(self.path, vars(self.args), self.may_change)
                self._read_and_repair()
        distributed.barrier()

        # 2. Another rank reads what it must know, before any rank appends to the file.
        self.was_there = self._has_content()
        if self.was_there and self.is_mine is not None and distributed.rank() != 0:
            for line in scan(self.path, list(self.key_fields)):
                if self.is_mine(line.value):
                    self._remember([line.value])
        distributed.barrier()
        return self

    def check_made_with(self, **arguments: str) -> None:
        """Add arguments that are known only when a model is needed, such as its fingerprint. Raises InputError if the
        records that are there were made with others."""
        vars(self.args).update(arguments)
        if distributed.rank() == 0 and self.was_there:
            check_arguments(self.path, arguments, self.may_change)

    def find_missing(self, groups: Iterable[list]) -> list[int]:
        """The numbers of the groups of keys that lack a record, on every rank. A collective: rank 0 looks at its
        `groups`, and tells the others which records of these groups are there, for `append`."""
        missing = []
        there = {}
        if distributed.rank() == 0:
            for number, keys in enumerate(groups):
                done = [key for key in keys if key in self.done]
                if len(done) < len(keys):
                    missing.append(number)
                    there |= {key: self.done[key] for key in done}
        missing, there = distributed.broadcast((missing, there))
        self.done |= there
        return missing

    def append(self, records: list[dict]) -> None:
        """Append the records whose keys are not there yet."""
        if self.file is None:
            write_json(args_file(self.path), self.run)
            self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        new = [record for record in records if self.key_of(record) not in self.done]
        self._remember(new)
        # One system call for all of them, because another rank may append at the same time.
        data = "".join(map(to_line, new)).encode()
        while data:
            written = os.write(self.file, data)
            data = data[written:]  # normally none; if the disk is full, the next call raises

    def __exit__(self, error: type | None, *_) -> None:
        self.done, self.shared = {}, {}  # free the memory: the stage may go on to read the records
        if self.file is not None:
            os.close(self.file)
        if error is None:  # a rank that fails must not wait for the others
            distributed.barrier()
        if distributed.rank() == 0:
            self.lock.close()

    def _has_content(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0

    def _read_and_repair(self) -> None:
        """Remember what is there, and mend the last line, which a killed run may have left without its newline: end it
        if the record is complete, else cut it off. A file that isn't this stage's is left as it is."""
        # 1. Where the records end. If all that is there is torn, the args.json decides whose it is.
        is_ours = args_file(self.path).exists()
        refusal = "this is not an output of this command; choose another --out"
        torn = torn_line(self.path)
        end = torn
        if torn is not None and is_object(self.path, torn):
            end = None
        if end == 0 and not is_ours:
            raise InputError(f"{self.path}: {refusal}")

        # 2. Read them, all of them before anything is written. Every field has its type now, rather than when the
        #    records are used, after hours of sampling.
        fields = self.key_fields if is_ours else self.key_fields + self.other_fields
        try:
            lines: Iterable[Line] = ()
            if end != 0:
                lines = scan(self.path, list(fields), optional=tuple(FIELD_TYPES), end=end)
            for line in lines:
                key = self.key_of(line.value)
                if key in self.done:
                    raise repeated(line, self.key_fields, key)
                self._remember([line.value])
        except InputError as error:
            if is_ours:
                raise
            raise InputError(f"{error}; {refusal}") from None

        # 3. Mend the last line.
        if torn is not None:
            with open(self.path, "rb+") as file:
                if end is None:
                    file.seek(0, os.SEEK_END)
                    file.write(b"\n")
                else:
                    file.truncate(torn)

    def _remember(self, records: list[dict]) -> None:
        for record in records:
            key = self.key_of(record)
            if len(self.key_fields) > 1:
                key = tuple(self.shared.setdefault(part, part) for part in key)
            if isinstance(self.remembered_field, tuple):
                value = tuple(record.get(field) for field in self.remembered_field)
            else:
                value = record.get(self.remembered_field)
            self.done[key] = self.shared.setdefault(value, value)


def result_rows(
    benchmark: str, subset: str, metrics: dict[str, Any], settings: dict, seconds: float, tokens: int
) -> list[dict]:
    """Rows of a results file, one for each metric (a NamedTuple of value, n, interval)."""
    rows = []
    for name, metric in metrics.items():
        row = {"benchmark": benchmark, "subset": subset, "metric": name, **metric._asdict()}
        rows.append({**row, "settings": settings, "seconds": round(seconds, 1), "tokens": tokens})
    return rows


class ResultsFile:
    """The rows of a results file, which is written anew when rows are added, so that a killed run loses only the
    benchmark that was under way.

    inputs: the files and model directories that the rows depend on; their fingerprints go into the args.json. earlier:
    (model, benchmark, subset) -> rows that a run with the same arguments and inputs had added when it was killed, to be
    popped and added again. A complete file is measured anew. Under torchrun every rank has the rows, and rank 0 writes.
    """

    def __init__(self, path: str | Path, args: argparse.Namespace, inputs: list[str | Path]):
        self.path = Path(path)
        self.args = args
        args.inputs_sha256 = [hash_model(path) if Path(path).is_dir() else hash_file(path) for path in inputs]
        args.complete = False
        self.rows: list[dict] = []
        self.earlier: dict[tuple[str, str, str], list[dict]] = {}
        fields = ["benchmark", "subset", "metric", "value", "n", "interval", "settings", "seconds", "tokens"]
        if self.path.is_file() and read_args(self.path) == vars(args):
            for row in read(self.path, fields):
                key = (row["settings"]["model"], row["benchmark"], row["subset"])
                self.earlier.setdefault(key, []).append(row)
        distributed.barrier()  # rank 0 writes to the file only after every rank has read it

    def add(self, rows: list[dict], complete: bool = False) -> None:
        """Add rows and write the file; complete: these are the last."""
        self.rows += rows
        self.args.complete = complete
        if distributed.rank() == 0:
            write_records(self.path, chain(self.rows, *self.earlier.values()), self.args)


class MetricsFile:
    """metrics.jsonl of a training run, one record per step. Use as a context manager, within `lock_run`.

    Resuming after step `start` drops the records of later steps, which will be trained again. Under torchrun every rank
    has `records`, and rank 0 writes.
    """

    def __init__(self, path: Path, start: int):
        self.path = path
        self.start = start
        self.records: list[dict] = []

    def __enter__(self) -> "MetricsFile":
        if self.start > 0 and self.path.exists():
            for record in read_metrics(self.path):
                if record["step"] <= self.start:
                    self.records.append(record)
        if distributed.rank() == 0:
            write_lines(self.path, self.records)
            self.file = open(self.path, "a", encoding="utf-8")
        return self

    def append(self, record: dict) -> None:
        """Add the numbers of one step."""
        self.records.append(record)
        if distributed.rank() == 0:
            self.file.write(to_line(record))
            self.file.flush()

    def __exit__(self, *_) -> None:
        if distributed.rank() == 0:
            self.file.close()


def describe_rollout(rollout: Any, advantage: float, tokenizer) -> dict:
    """The record of a `grpo.Rollout` that --dump_rollouts writes, and `report.show_rollout` shows."""
    return {
        "problem_id": rollout.problem_id,
        "prompt": tokenizer.decode(rollout.prompt),
        "text": rollout.text,
        "ids": rollout.ids,
        "finish": rollout.finish,
        "valid": rollout.valid,
        "reward": rollout.reward,
        "advantage": advantage,
        "token_advantages": rollout.token_advantages.tolist(),
        "judgement": vars(rollout.judgement) if rollout.judgement is not None else None,
    }


def write_rollouts(out: Path, step: int, rollouts: list, advantages: Iterable, tokenizer) -> None:
    """Write the responses of a step, with one advantage for each, to the file of this step in the run's directory."""
    rows = []
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        rows.append(describe_rollout(rollout, float(advantage), tokenizer))
    write_lines(out / "rollouts" / f"step_{step:07d}.jsonl", rows)


# --------------------------------------------------------------------------- the command line

LARGEST = 1e30  # for numbers that have to be finite, and need no other bound

ROOT = Path(__file__).parents[1]  # where the default paths of the tiny world begin



def new_parser(description: str | None = None) -> argparse.ArgumentParser:
    """A parser that takes no abbreviated flags, as each new flag would change what they mean."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,  # `parse_flags` reports them
    )


def number(convert: Callable, kind: str, limits: str, accepts: Callable[[float], bool]) -> Callable[[str], float]:
    """The type of a flag for `add_argument`. limits: for the message."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: it must be {kind}, {limits}") from None
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text}: it must be {limits}")
        return value

    return parse


def integer(least: int, most: int = 1_000_000_000) -> Callable[[str], int]:
    """The type of a flag that is a whole number from least to most."""
    limits = f"at least {least} and at most {most}"
    return number(int, "a whole number", limits, lambda value: least <= value <= most)


def real(least: float, most: float = LARGEST, or_zero: bool = False) -> Callable[[str], float]:
    """The type of a flag that is a number from least to most, or 0; neither infinite nor NaN."""
    limits = f"from {least} to {most}"
    if most == LARGEST:
        limits = f"at least {least} and at most {most}"
    if or_zero:
        limits = f"0 or {limits}"
    return number(float, "a number", limits, lambda value: least <= value <= most or (or_zero and value == 0))


# Ranges that several flags share.
COUNT = integer(1, 100_000)  # of samples, votes, batches: of more, even the list would take all memory
POSITIVE = integer(1)  # of tokens, or steps between two events
WHOLE = integer(0)  # the same, where 0 turns something off
SEED = integer(0, 2**63 - 1)
TEMPERATURE = real(0.001, 100, or_zero=True)  # at 0 the sampler is greedy; logits divided by less overflow
TOP_P = real(1e-6, 1)


def parse_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line. Raises InputError, naming the flag and its value, for one that isn't as declared, and for
    a word that isn't UTF-8, such as a file's name: args.json couldn't say it."""
    for word in sys.argv[1:]:
        if word.encode(errors="ignore") != os.fsencode(word):  # it has bytes that aren't UTF-8
            raise InputError(f"{word}: not UTF-8; rename the file")
    try:
        args, unknown = parser.parse_known_args()
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name} {error.message}; see --help") from None
    if unknown:
        raise InputError(f"{' '.join(unknown)}: no such flag (none can be abbreviated); see --help")
    return args


def parse_args(parser: argparse.ArgumentParser, tiny: dict, *needed: str) -> argparse.Namespace:
    """`parse_flags`. If the first needed flag is omitted, use the TINY defaults in place of the paper's. Raises
    InputError if it is given without the others, or if this directory isn't the project's."""
    key = needed[0]
    args = parse_flags(parser)
    if getattr(args, key) is None:
        # Flags that were given win over TINY, and once parsed they can't be told from defaults. So: other defaults, and
        # parse again.
        parser.set_defaults(**tiny)
        args = parse_flags(parser)
        # torchrun's RANK: distributed.rank() knows it only after joining the process group, which needs --device.
        if os.environ.get("RANK", "0") == "0":
            defaults = ", ".join(f"{name}={getattr(args, name)}" for name in tiny)
            print(f"no --{key}: the tiny world, {defaults}", flush=True)
        check_directory(args, tiny.keys() - {"out"})
    for flag in needed:
        if getattr(args, flag) is None:
            raise InputError(f"--{key} also needs --{flag}")
    return args


FORMATS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}  # of figures, by suffix: how such a file begins


def parse_inputs(
    parser: argparse.ArgumentParser, tiny: dict, *inputs: str, unless: str = "", is_figure: bool = False
) -> argparse.Namespace:
    """The flags of one command of a stage; tiny: the TINY defaults of each command. They are used if one of its inputs
    isn't given, unless the flag is that makes do without them. Raises InputError, before hours of sampling, if --out
    can't be written, is somebody's file, or is named as a figure where none is drawn."""
    args = parse_flags(parser)
    missing = [name for name in inputs if getattr(args, name) is None]
    if missing and not getattr(args, unless, None):
        args = parse_args(parser, tiny[args.command], missing[0])
    if "out" in args:
        if args.out is None:
            raise InputError("--out is missing; say where to write the result")
        out = Path(args.out)
        signature = FORMATS.get(out.suffix.lower())
        if (signature is not None) != is_figure:
            raise InputError(f"--out {out}: figures are named {', '.join(FORMATS)}, other results otherwise; rename it")
        check_place(out)
        check_output(out, args, signature)
    return args


def run_command(commands: dict[str, Callable[[argparse.ArgumentParser], None]], description: str) -> None:
    """Run the command that the command line names. Each has a parser of its own, so that its --help shows its flags
    only, and its function's docstring."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    run = commands.get(command)
    parser = new_parser()
    if run is None:
        parser.description = description
        parser.add_argument("command", choices=list(commands), help="each has a --help of its own")
        parse_flags(parser)  # prints the help or says what is wrong, and exits
    parser.description = inspect.cleandoc(run.__doc__)
    parser.add_argument("command", choices=[command])
    run(parser)


def check_directory(args: argparse.Namespace, inputs: set[str]) -> None:
    """Raise InputError if files of these flags, which begin at the project's root, aren't here but there."""
    for name in sorted(inputs):
        value = getattr(args, name)
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and not Path(path).exists() and (ROOT / path).exists():
                raise InputError(f"--{name} {path}: not here, but in {ROOT}; run this command there: cd {ROOT}")
