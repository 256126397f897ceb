"""What stages read and write: JSON Lines in and out, `args.json`, fingerprints, the metrics file; and the command line.

Here belong: reading records with their types; appending so that a killed run can be taken up again, and no two runs write
to one file; files that are there whole or not at all; what a run was made with; flags, with the tiny world's defaults.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import subprocess
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import IO

from kernels import distributed
from kernels.distributed import InputError

import torch.distributed as dist

# --------------------------------------------------------------------------- records


def read(path: str | Path, fields: list[str], made_by: str = "", unique: tuple[str, ...] = ("id",)) -> list[dict]:
    """All records of a JSON Lines file; ids and answers that are numbers are read as text. Raises InputError for a
    missing or empty file, for a line that is not an object with these fields (with its number), for a problem that
    isn't a text, for steps that aren't a list of texts, and for a repeated id."""
    path, advice = Path(path), f"; make it with: {made_by}" if made_by else ""
    if not path.is_file():
        raise InputError(f"{path}: no such file{advice}")
    records, seen = [], set()
    # Not splitlines(): it also cuts at U+2028 and the like, which JSON allows inside strings.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if b"\\u" in line:  # half of a pair that stands for one character is legal there, but no text
                json.dumps(record, ensure_ascii=False).encode()
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); fix or remove the line") from None
        missing = [f for f in fields if not isinstance(record, dict) or f not in record]
        if missing:
            raise InputError(f"{path}:{number}: no field {missing[0]!r}; every line needs {', '.join(fields)}")
        texts = [name for name in ("id", "problem_id", "solution_id", "answer") if record.get(name) is not None]
        record |= {name: str(record[name]) for name in texts}
        steps = record["steps"] if "steps" in fields else []
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise InputError(f"{path}:{number}: steps must be a list of texts, not {str(steps)[:60]}")
        if "problem" in fields and not isinstance(record["problem"], str):
            raise InputError(f"{path}:{number}: problem must be a text, not {str(record['problem'])[:60]}")
        name = tuple(record.get(field) for field in unique)
        if set(unique) <= set(fields) and name in seen:
            twice = f"{', '.join(unique)} {', '.join(map(repr, name))}"
            raise InputError(f"{path}:{number}: {twice} is there twice; ids must be unique")
        seen.add(name)
        records.append(record)
    if not records:
        raise InputError(f"{path}: the file is empty{advice}")
    return records


def read_answers(paths: list[str]) -> dict[str, str]:
    """id -> reference answer from gold files. Raises InputError for an answer that is null, and if two disagree."""
    gold: dict[str, str] = {}
    for path in paths:
        for record in read(path, ["id", "answer"], "python -m data.make_tiny problems"):
            name, answer = record["id"], record["answer"]
            if answer is None:
                raise InputError(f"{path}: {name!r} has no answer (null); remove it or write one")
            if gold.setdefault(name, answer) != answer:
                raise InputError(f"{path}: {name!r} has answer {answer!r}, before it was {gold[name]!r}; rename one id")
    return gold


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The rank, too, because machines that share a disk may share a pid.
    temporary = path.with_name(f".{path.name}.{distributed.rank()}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write one JSON value, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, records: list[dict]) -> None:
    """Write a JSON Lines file, whole or not at all."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_records(path: Path, records: list[dict], args: argparse.Namespace) -> None:
    """Write a JSON Lines file and its args.json, each whole or not at all."""
    write_json(Path(f"{path}.args.json"), describe_run(args))
    write_lines(path, records)


# --------------------------------------------------------------------------- what a run was made with


def describe_run(args: argparse.Namespace, constants: dict | None = None) -> dict:
    """The contents of `<output>.args.json`: resolved arguments, constants that were never flags, package versions, git
    commit."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
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


def hash_file(path: str | Path) -> str:
    """The beginning of a file's SHA-256, to know it again."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def check_arguments(output: Path, arguments: dict, may_change: set[str]) -> None:
    """Raise InputError if `<output>.args.json` differs from these arguments, apart from those that may change on resuming.

    An argument named x_sha256 is the hash of the file given by --x. Constants may be among the arguments: an earlier run may
    have had one of them as a flag. A flag that no longer exists is ignored.
    """
    description = Path(f"{output}.args.json")
    if not (description.exists() and output.exists()):
        return
    run = json.loads(description.read_text())
    earlier = run["arguments"] | run.get("constants", {})
    for name in sorted(arguments.keys() - may_change):
        before = earlier.get(name)
        now = arguments.get(name)
        if before == now:
            continue
        difference = f"made with --{name} {before}, this run has --{name} {now}"
        if name.endswith("_sha256"):
            difference = f"what --{name.removesuffix('_sha256')} holds has changed since"
        raise InputError(f"{output}: {difference}; choose another --out or remove it")


# --------------------------------------------------------------------------- files that runs append to


def take_lock(path: Path, taken: str) -> IO:
    """Lock a file until it is closed or the process ends; InputError, beginning with `taken`, if another has it."""
    file = open(path, "w")  # noqa: SIM115 - it stays open as long as the lock is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{taken}; wait for it or choose another --out") from None
    return file


class RecordFile:
    """An append-only JSON Lines output that a killed run can take up again. Use as a context manager.

    On entry it takes the file's lock (two runs never write to one file), cuts a torn last line, and refuses
    a file made with other arguments, except for those that don't change records (`free`). `done` has the names
    (the id, or several fields) of the records already there, and of each the field `keep`. Under torchrun rank 0
    does all this, and every rank appends whole lines. Nothing but the lock is written before the first record, so
    a run that fails early leaves nothing behind.
    """

    def __init__(
        self,
        path: str | Path,
        args: argparse.Namespace,
        free: tuple[str, ...] = (),
        name: tuple[str, ...] = ("id",),
        keep: str | None = None,
    ):
        self.path, self.free = Path(path), {"out", "limit", "slots", "device", *free}
        self.fields, self.name, self.keep = name, itemgetter(*name), keep
        self.run, self.file = describe_run(args), None
        self.done: dict = {}

    def __enter__(self) -> "RecordFile":
        if distributed.rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = take_lock(Path(f"{self.path}.lock"), f"{self.path}: another run is writing to it")
            if self.path.exists() and self.path.stat().st_size:
                check_arguments(self.path, self.run["arguments"], self.free)
                with open(self.path, "rb+") as file:
                    data = file.read()
                    whole = data.rfind(b"\n") + 1
                    try:
                        json.loads(data[whole:])
                        file.write(b"\n")  # a record that lacks nothing but the end of its line
                    except ValueError:
                        file.truncate(whole)
        if dist.is_initialized():
            dist.barrier()
        if self.path.exists() and self.path.stat().st_size:
            self._note(read(self.path, list(self.fields), unique=self.fields))
        if dist.is_initialized():
            dist.barrier()  # nobody appends before all have read the same
        return self

    def append(self, records: list[dict]) -> None:
        """Append the records whose ids are not there yet, in one write."""
        if self.file is None:
            write_json(Path(f"{self.path}.args.json"), self.run)
            self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        fresh = [r for r in records if self.name(r) not in self.done]
        self._note(fresh)
        data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in fresh).encode()
        while data:
            data = data[os.write(self.file, data) :]

    def _note(self, records: list[dict]) -> None:
        self.done.update((self.name(r), r.get(self.keep)) for r in records)

    def __exit__(self, error: type | None, *_) -> None:
        if self.file is not None:
            os.close(self.file)
        if dist.is_initialized() and error is None:  # a rank that fails must not wait for the others
            dist.barrier()
        if distributed.rank() == 0:
            self.lock.close()


class MetricsFile:
    """metrics.jsonl of a training run, one object a step. Resuming after step `start` cuts off what came later.
    Use as a context manager; only rank 0 writes. It holds the run's lock: two runs never train into one directory."""

    def __init__(self, path: Path, start: int):
        self.path, self.records = path, []
        if start and path.exists():
            lines = path.read_text().split("\n")[:-1]  # a torn last line has no newline
            self.records = [record for record in map(json.loads, lines) if record["step"] <= start]

    def __enter__(self) -> "MetricsFile":
        if distributed.rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            taken = f"{self.path.parent}: another run is training into it"
            self.lock = take_lock(self.path.with_suffix(".lock"), taken)
            temporary = self.path.with_name(f".{self.path.name}")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            temporary.replace(self.path)
            self.file = open(self.path, "a")
        return self

    def append(self, record: dict) -> None:
        """Add one step's numbers."""
        self.records.append(record)
        if distributed.rank() == 0:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def __exit__(self, *_) -> None:
        if distributed.rank() == 0:
            self.file.close()
            self.lock.close()


# --------------------------------------------------------------------------- the command line

# Checkpoints of the tiny world, and what makes them.
MADE_BY = {
    "data/tiny/policy": "-m data.make_tiny",
    "data/tiny/verifier": "-m data.make_tiny",
    "runs/tiny/prm_cot": "train_prm.py",
    "runs/tiny/grpo": "grpo.py",
}


def parse_args(parser: argparse.ArgumentParser, tiny: dict, *needed: str) -> argparse.Namespace:
    """Parse the command line; without the first of the needed flags the tiny world's numbers replace the paper's
    defaults. Raises InputError if another of them is missing."""
    key, args = needed[0], parser.parse_args()
    if getattr(args, key) is None:
        parser.set_defaults(**tiny)
        args = parser.parse_args()
        if "RANK" not in os.environ or os.environ["RANK"] == "0":
            print(f"no --{key}: the tiny world, " + ", ".join(f"{k}={getattr(args, k)}" for k in tiny), flush=True)
    for flag in needed:
        if getattr(args, flag) is None:
            raise InputError(f"--{flag} is missing; it goes with --{key}")
    return args


def check_numbers(args: argparse.Namespace, *flags: str, least: float = 1, most: float = math.inf) -> None:
    """Raise InputError for the first of these flags that has a value outside least..most."""
    for flag in flags:
        value = vars(args).get(flag)
        if value is not None and not least <= value <= most:
            limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise InputError(f"--{flag} {value}: it must be {limits}")
