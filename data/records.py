"""The files that stages read and write: JSON Lines, `args.json`, fingerprints, the metrics file; and the command line.

Here belong: reading records with their types; appending so that a killed run can be resumed, and no two runs write to
one file; files that are replaced as a whole; recording how a file was made; flags, with the tiny world's defaults.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import IO

from kernels import distributed
from kernels.distributed import InputError

# --------------------------------------------------------------------------- records


def read_name(value: object) -> str | None:
    """Ids and answers, which other programs may write as numbers; null stays None."""
    if value is None:
        return None
    return str(value)


def read_string(value: object) -> str:
    """A string; ValueError says what it must be."""
    if not isinstance(value, str):
        raise ValueError("a string")
    return value


def read_strings(value: object) -> list[str]:
    """A list of strings; ValueError says what it must be."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of strings")
    return value


# How the value of a field is read, whichever file it comes from. Other fields are taken as they are.
FIELD_TYPES = {
    "id": read_name,
    "problem_id": read_name,
    "solution_id": read_name,
    "answer": read_name,
    "problem": read_string,
    "steps": read_strings,
}


def read(path: str | Path, fields: list[str], made_by: str = "", unique: tuple[str, ...] = ("id",)) -> list[dict]:
    """All records of a JSON Lines file, each with at least these fields, of the types in FIELD_TYPES.

    made_by: the command that creates such a file, for the message. unique: the fields that identify a record. Raises
    InputError for a missing or empty file, and, with its number, for a line that is not such a record or repeats one.
    """
    advice = f"; create it with: {made_by}" if made_by else ""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file{advice}")
    has_key = set(unique) <= set(fields)
    records = []
    seen = set()
    for place, record in read_lines(Path(path)):
        check_record(record, fields, place)
        key = tuple(record.get(field) for field in unique)
        if has_key and key in seen:
            repeated = f"{', '.join(unique)} {', '.join(map(repr, key))}"
            raise InputError(f"{place}: {repeated} appears twice; ids must be unique")
        seen.add(key)
        records.append(record)
    if not records:
        raise InputError(f"{path}: the file is empty{advice}")
    return records


def read_lines(path: Path) -> Iterator[tuple[str, object]]:
    """("path:number", value) of each line that is not blank; InputError for one that is not JSON."""
    # Not splitlines(): it also splits at U+2028 and the like, which JSON allows inside strings.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
            if b"\\u" in line:  # a lone surrogate is legal JSON but can't be encoded as UTF-8
                json.dumps(value, ensure_ascii=False).encode()
        except ValueError as error:
            raise InputError(f"{place}: not JSON ({error}); fix or remove the line") from None
        yield place, value


def check_record(record: object, fields: list[str], place: str) -> None:
    """Convert the record's values to the types of FIELD_TYPES. Raises InputError, beginning with `place`, if one of
    `fields` is missing or of another type; a field that wasn't asked for may be anything."""
    if not isinstance(record, dict):
        record = {}  # a value that is no object has none of the fields
    for field in fields:
        if field not in record:
            raise InputError(f"{place}: no field {field!r}; every line needs {', '.join(fields)}")
    for field, read_value in FIELD_TYPES.items():
        if field not in record:
            continue
        try:
            record[field] = read_value(record[field])
        except ValueError as error:
            if field in fields:
                raise InputError(f"{place}: {field} must be {error}, not {str(record[field])[:60]}") from None


def read_answers(paths: list[str]) -> dict[str, str]:
    """id -> reference answer from gold files. Raises InputError for an answer that is null, and if two disagree."""
    gold: dict[str, str] = {}
    for path in paths:
        for record in read(path, ["id", "answer"], "python -m data.make_tiny problems"):
            name = record["id"]
            answer = record["answer"]
            if answer is None:
                raise InputError(f"{path}: {name!r} has no answer (null); remove it or write one")
            if name in gold and gold[name] != answer:
                answers = f"{gold[name]!r} and {answer!r}"
                raise InputError(f"{path}: {name!r} has two different answers, {answers}; rename one id")
            gold[name] = answer
    return gold


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the rank, because pids are not unique across machines.
    temporary = path.with_name(f".{path.name}.{distributed.rank()}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write one JSON value, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def to_lines(records: list[dict]) -> str:
    """The records as JSON Lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_lines(path: Path, records: list[dict]) -> None:
    """Write a JSON Lines file, whole or not at all."""
    write_text(path, to_lines(records))


def write_records(path: Path, records: list[dict], args: argparse.Namespace) -> None:
    """Write a JSON Lines file and its args.json, each whole or not at all."""
    write_json(Path(f"{path}.args.json"), describe_run(args))
    write_lines(path, records)


# --------------------------------------------------------------------------- how a file was made


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
    """First 16 hex digits of the file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def check_arguments(output: Path, arguments: dict, may_change: set[str]) -> None:
    """Raise InputError if `<output>.args.json` differs from these arguments, apart from those that may change.

    An argument named x_sha256 is the hash of the file given by --x. Constants may be among the arguments: an earlier
    run may have had one of them as a flag. A flag that no longer exists is ignored.
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
            difference = f"the contents of --{name.removesuffix('_sha256')} have changed"
        raise InputError(f"{output}: {difference}; choose another --out or remove it")


# --------------------------------------------------------------------------- files that runs append to


def take_lock(path: Path, refusal: str) -> IO:
    """Lock a file until it is closed or the process ends. If another run has it, raises InputError with `refusal`."""
    file = open(path, "w")  # noqa: SIM115 - it stays open as long as the lock is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{refusal}; wait for it or choose another --out") from None
    return file


class RecordFile:
    """An append-only JSON Lines output that a killed run can resume. Use as a context manager.

        with RecordFile("out.jsonl", args, MAY_CHANGE_ON_RESUME, remembered_field="problem") as output:
            if "p0/0" not in output.done:
                output.append([{"id": "p0/0", "problem": "1 + 1", ...}])

    may_change: the names of arguments that may differ from those of the run that made the file, as they don't change
    records. key_fields: what identifies a record. After entry, `done` maps the keys of the records already there, each
    an id, or a tuple if there are several key fields, to their remembered field (None without one).

    Under torchrun rank 0 locks, checks and repairs the file; every rank reads it and appends whole lines. Only the lock
    is written before the first record, so a run that fails early leaves nothing behind.
    """

    def __init__(
        self,
        path: str | Path,
        args: argparse.Namespace,
        may_change: set[str],
        key_fields: tuple[str, ...] = ("id",),
        remembered_field: str | None = None,
    ):
        self.path = Path(path)
        self.run = describe_run(args)
        self.may_change = may_change
        self.key_fields = key_fields
        self.key_of = itemgetter(*key_fields)  # a function: record -> its key
        self.remembered_field = remembered_field
        self.done: dict = {}
        self.file: int | None = None  # its descriptor, once a record has been appended

    def __enter__(self) -> "RecordFile":
        # 1. One rank makes sure that the file can be continued.
        if distributed.rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = take_lock(Path(f"{self.path}.lock"), f"{self.path}: another run is writing to it")
            if self._has_content():
                check_arguments(self.path, self.run["arguments"], self.may_change)
                self._repair_last_line()
        distributed.barrier()

        # 2. Every rank reads what is there, before any rank appends to it.
        if self._has_content():
            self._remember(read(self.path, list(self.key_fields), unique=self.key_fields))
        distributed.barrier()
        return self

    def append(self, records: list[dict]) -> None:
        """Append the records whose keys are not there yet."""
        if self.file is None:
            write_json(Path(f"{self.path}.args.json"), self.run)
            self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        new = [record for record in records if self.key_of(record) not in self.done]
        self._remember(new)
        # One system call for all of them, because another rank may append at the same time.
        data = to_lines(new).encode()
        while data:
            written = os.write(self.file, data)
            data = data[written:]  # normally none; if the disk is full, the next call raises

    def __exit__(self, error: type | None, *_) -> None:
        if self.file is not None:
            os.close(self.file)
        if error is None:  # a rank that fails must not wait for the others
            distributed.barrier()
        if distributed.rank() == 0:
            self.lock.close()

    def _has_content(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0

    def _repair_last_line(self) -> None:
        """A killed run may leave a last line without its newline: end it if the record is complete, else cut it off."""
        with open(self.path, "rb+") as file:
            data = file.read()
            start = data.rfind(b"\n") + 1
            last_line = data[start:]
            if not last_line:
                return
            try:
                json.loads(last_line)
            except ValueError:
                file.truncate(start)
            else:
                file.write(b"\n")

    def _remember(self, records: list[dict]) -> None:
        for record in records:
            self.done[self.key_of(record)] = record.get(self.remembered_field)


class MetricsFile:
    """metrics.jsonl of a training run, one record per step. Use as a context manager.

    Resuming after step `start` drops the records of later steps, which will be trained again. Under torchrun every rank
    has `records`, and rank 0 writes. It also locks the file: two runs never train into one directory.
    """

    def __init__(self, path: Path, start: int):
        self.path = path
        self.start = start
        self.records: list[dict] = []

    def __enter__(self) -> "MetricsFile":
        if distributed.rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            refusal = f"{self.path.parent}: another run is training into it"
            self.lock = take_lock(self.path.with_suffix(".lock"), refusal)
        if self.start > 0 and self.path.exists():
            *lines, _torn = self.path.read_text().split("\n")  # after the last newline: a torn line, or nothing
            for line in lines:
                record = json.loads(line)
                if record["step"] <= self.start:
                    self.records.append(record)
        if distributed.rank() == 0:
            # Under the lock a fixed temporary name will do, and the next run replaces what a killed one has left.
            temporary = self.path.with_name(f".{self.path.name}")
            temporary.write_text(to_lines(self.records))
            temporary.replace(self.path)
            self.file = open(self.path, "a")
        return self

    def append(self, record: dict) -> None:
        """Add the numbers of one step."""
        self.records.append(record)
        if distributed.rank() == 0:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def __exit__(self, *_) -> None:
        if distributed.rank() == 0:
            self.file.close()
            self.lock.close()


# --------------------------------------------------------------------------- the command line

LARGEST = 1e30  # for numbers that have to be finite, and need no other bound

# Checkpoints of the tiny world, and the scripts that create them.
MADE_BY = {
    "data/tiny/policy": "-m data.make_tiny",
    "data/tiny/verifier": "-m data.make_tiny",
    "runs/tiny/prm_cot": "train_prm.py",
    "runs/tiny/grpo": "grpo.py",
}


def new_parser(description: str | None = None) -> argparse.ArgumentParser:
    """A parser that takes no abbreviated flags, as each new flag would change what they mean."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,  # `parse_flags` reports them
    )


def integer(least: int, most: int = 1_000_000_000) -> Callable[[str], int]:
    """The type of a flag for `add_argument`: a whole number from least to most."""
    limits = f"at least {least} and at most {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: it must be a whole number, {limits}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: it must be {limits}")
        return value

    return parse


def real(least: float, most: float = LARGEST, or_zero: bool = False) -> Callable[[str], float]:
    """The type of a flag for `add_argument`: a number from least to most, or 0; neither infinite nor NaN."""
    limits = f"from {least} to {most}"
    if most == LARGEST:
        limits = f"at least {least} and at most {most}"
    if or_zero:
        limits = f"0 or {limits}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        in_range = least <= value <= most  # NaN is not
        if not (in_range or (or_zero and value == 0)):
            raise argparse.ArgumentTypeError(f"{text}: it must be {limits}")
        return value

    return parse


# Ranges that several flags share.
COUNT = integer(1, 100_000)  # of samples, votes, batches: of more, even the list would take all memory
POSITIVE = integer(1)  # of tokens, or steps between two events
SEED = integer(0, 2**63 - 1)
TEMPERATURE = real(0.001, 100, or_zero=True)  # at 0 the sampler is greedy; logits divided by less overflow
TOP_P = real(1e-6, 1)


def parse_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line. Raises InputError, naming the flag and its value, for one that isn't as declared."""
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


def check_directory(args: argparse.Namespace, inputs: set[str]) -> None:
    """Raise InputError if files of these flags, which begin at the project's root, aren't here but there."""
    root = Path(__file__).parents[1]
    for name in sorted(inputs):
        value = getattr(args, name)
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and not Path(path).exists() and (root / path).exists():
                raise InputError(f"--{name} {path}: not here, but in {root}; run this command there: cd {root}")
