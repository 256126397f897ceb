"""How a stage ends, devices, signals, ranks that fail together, and checkpoints that are damaged or not ours."""

import io
import os
import pickle
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import generate
from data import records
from kernels import distributed, sampler
from kernels.distributed import InputError, RunError
from kernels.transformer import load_model

import pytest
import torch
from test_generate import PROCESSES, ROOT

TINY = ROOT / "data" / "tiny"

# --------------------------------------------------------------------------- how a stage ends


def fail(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    "error, line",
    [
        (InputError("--x 1: no"), "--x 1: no"),
        (RunError("two\nlines"), "two lines"),
        (InputError("an id \x1b]0;title\x07 of\tsomebody"), r"an id \x1b]0;title\x07 of\tsomebody"),
        (KeyboardInterrupt(), "interrupted; what was saved before is intact, and the same command resumes"),
        (MemoryError(), "out of memory; free some, or use smaller files; the same command resumes"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nmore"),
            "CUDA out of memory. lower --slots (rows of the KV cache",
        ),
        (BrokenPipeError(32, "Broken pipe"), "[Errno 32] Broken pipe; what was saved before is intact"),
    ],
)
def test_expected_ends_are_one_line(capsys, error, line):
    """Guards: a traceback for Ctrl-C or memory; a second line; escape sequences of a file that reach the terminal."""
    with pytest.raises(SystemExit) as end:
        distributed.run_stage(fail(error))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}") and said.count("\n") == 1


@pytest.mark.parametrize("bug", [KeyError("steps"), AttributeError("x"), RuntimeError("shape"), AssertionError()])
def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path, bug):
    """Guards: a blanket handler, which makes an error of ours look like one of the user's."""
    monkeypatch.setattr(records, "read", lambda *_, **__: fail(bug)())
    flags = ["--model", TINY / "policy", "--problems", TINY / "problems.jsonl", "--out", tmp_path / "o.jsonl"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags), "--device", "cpu"])
    with pytest.raises(type(bug)) as raised:
        distributed.run_stage(generate.main)
    assert raised.value is bug


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_utf8(monkeypatch, encoding):
    """Guards: UnicodeEncodeError at the first printed sample; text lost that the terminal knows."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    distributed.run_stage(lambda: distributed.log("a · 漢 🙂"))
    known = "a · " if encoding != "ascii" else r"a \xb7 "
    assert written.getvalue() == (known + r"\u6f22 \U0001f642" + "\n").encode(encoding)


def test_a_clock_that_stands_still(monkeypatch):
    """Guards: ZeroDivisionError where a clock is frozen, or too coarse for a batch."""
    assert distributed.per_second(5, 0.0) == 0.0 and distributed.per_second(5, 2.0) == 2.5
    monkeypatch.setattr(time, "perf_counter", lambda: 7.0)
    monkeypatch.setattr(time, "time", lambda: 7.0)
    model = load_model(TINY / "policy")
    stream = iter([(0, ["a"]), (1, ["b"])])
    assert len(list(sampler.with_progress(stream, sampler.Sampler(model, 2), "x", 2, 1))) == 2


# --------------------------------------------------------------------------- devices, processes, signals


@pytest.mark.parametrize(
    "name", ["mps", "xpu", "meta", "cpu:3", "cuda:99", "cuda:300", "cuda:-1", "gpu", "", "CPU", "hpu"]
)
def test_devices_that_there_are_not(monkeypatch, name):
    """Guards: a traceback, or "fetch the file again", for a device that this program can't use."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=f"--device {name}: no such device; use cpu"):
        distributed.init_distributed(name)


def test_devices_that_there_are(monkeypatch):
    """Guards: cpu refused under another name; a GPU of another rank; ranks that go on without those that have none."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert distributed.find_device("cpu") == distributed.find_device("cpu:0") == torch.device("cpu")
    assert distributed.find_device("cuda") == torch.device("cuda", 0)
    assert distributed.find_device("cuda:3") == torch.device("cuda", 3)
    with pytest.raises(InputError, match="5 GPUs are needed, and there are 4"):
        distributed.find_device("cuda:4")
    variables = {name: "0" for name in distributed.TORCHRUN_VARIABLES}
    for name, value in (variables | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    assert distributed.find_device("cuda") == torch.device("cuda", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match="8 GPUs are needed, and there are 4; start fewer processes"):
        distributed.find_device("cuda")


def test_a_world_size_without_torchrun(monkeypatch):
    """Guards: a traceback where a scheduler has set some of torchrun's variables; several of them that each think they
    were the only one."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "3")
    assert distributed.init_distributed("cpu") == torch.device("cpu") and distributed.world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match=r"WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set; start .* torchrun"
    ):
        distributed.init_distributed("cpu")


@pytest.mark.parametrize("rank, size", [("x", "1"), ("", ""), ("-1", "2"), ("2", "2"), ("0", "0"), ("0", "two")])
def test_ranks_that_are_no_ranks(monkeypatch, capsys, rank, size):
    """Guards: status 2 without a line, and a process that waits for ever."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        distributed.run_stage(lambda: distributed.init_distributed("cpu"))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"error: RANK is '{rank}'") and said.count("\n") == 1


ENDS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]


@pytest.fixture
def handlers():
    """The handlers as they were, after the test."""
    before = {number: signal.getsignal(number) for number in ENDS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_that_end_a_training(monkeypatch, handlers):
    """Guards: a scheduler's warning that kills the run in its step; `nohup` overruled; a step that only kill -9 ends; one
    Ctrl-C that torchrun doubles and that ends the step."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    noted = distributed.stop_on_signal()
    for number in ENDS:
        signal.raise_signal(number)
    assert noted == ENDS
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    for name in distributed.TORCHRUN_VARIABLES:
        monkeypatch.setenv(name, "0")
    signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    noted = distributed.stop_on_signal()
    signal.raise_signal(signal.SIGHUP)
    assert noted == []


def test_a_terminal_that_has_gone(monkeypatch, handlers):
    """Guards: SIGHUP because the terminal was closed, and the note about it fails, or the next line that is printed."""
    monkeypatch.setattr(os, "write", lambda *_: fail(OSError(5, "Input/output error"))())
    copied = []
    monkeypatch.setattr(os, "dup2", lambda _, target: copied.append(target))
    noted = distributed.stop_on_signal()
    signal.raise_signal(signal.SIGHUP)
    assert noted == [signal.SIGHUP] and copied == [1, 2]


def fail_as_rank(rank: int, where: str, port: str) -> None:
    """Rank 1 finds an error while rank 0 waits for it."""
    os.dup2(os.open(f"{where}/{rank}", os.O_WRONLY | os.O_CREAT), 2)
    variables = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(variables)

    def main() -> None:
        distributed.init_distributed("cpu")
        if rank == 1:
            raise InputError("x.jsonl:7: not JSON")
        distributed.barrier()
        distributed.max_over_ranks(1.0)

    distributed.run_stage(main)


def test_ranks_say_one_line_together(tmp_path):
    """Guards: an error that each rank prints, or gloo's traceback in those that waited for the one that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    lives = [PROCESSES.Process(target=fail_as_rank, args=(rank, str(tmp_path), port)) for rank in (0, 1)]
    for life in lives:
        life.start()
    for life in lives:
        life.join(120)
    assert [life.exitcode for life in lives] == [2, 2]
    said = (tmp_path / "0").read_text() + (tmp_path / "1").read_text()
    assert [line for line in said.splitlines() if "rror" in line] == ["error: x.jsonl:7: not JSON"]


# --------------------------------------------------------------------------- checkpoints


class Code:
    """What a pickle of it runs when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def start():
    """A model and its optimizer before the first step."""
    model = load_model(TINY / "policy")
    return model, torch.optim.AdamW(model.parameters())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints of step 3 and of step 12."""
    directory = tmp_path_factory.mktemp("checkpoints")
    model, optimizer = start()
    for step in (3, 12):
        with torch.no_grad():
            model.head.fill_(step)
        distributed.save_checkpoint(directory, step, model, optimizer)
    return directory


def rewrite(change, name: str = "*.distcp"):
    """A damage that replaces the bytes of a checkpoint's file."""

    def damage(path: Path, planted: Path) -> None:
        (file,) = path.glob(name)
        file.write_bytes(change(file.read_bytes(), planted))

    return damage


def outside(path: Path, _) -> None:
    """Tensors of another directory."""
    with open(path / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    for index, stored in metadata.storage_data.items():
        metadata.storage_data[index] = type(stored)("../other/" + stored.relative_path, stored.offset, stored.length)
    shutil.copytree(path, path.parent / "other")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def hidden_code(path: Path, planted: Path) -> None:
    """Code in the place of the learning rate."""
    with open(path / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    code = io.BytesIO()
    torch.save(Code(planted), code)
    (index,) = [index for index in metadata.storage_data if index.fqn.endswith("param_groups.0.lr")]
    stored = metadata.storage_data[index]
    (path / "code").write_bytes(code.getvalue())
    metadata.storage_data[index] = type(stored)("code", 0, len(code.getvalue()))
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


DAMAGES = {
    "half a file": rewrite(lambda data, _: data[: len(data) // 2]),
    "an empty file": rewrite(lambda *_: b""),
    "its end": rewrite(lambda data, _: data[:-2000]),
    "no file": lambda path, _: next(path.glob("*.distcp")).unlink(),
    "half metadata": rewrite(lambda data, _: data[:100], ".metadata"),
    "empty metadata": rewrite(lambda *_: b"", ".metadata"),
    "text": rewrite(lambda *_: b"metadata", ".metadata"),
    "another pickle": rewrite(lambda *_: pickle.dumps({"a": 1}), ".metadata"),
    "code": rewrite(lambda _, planted: pickle.dumps(Code(planted)), ".metadata"),
    "code that is named": rewrite(lambda *_: b"cos\nsystem\n(S'true'\ntR.", ".metadata"),
    "hidden code": hidden_code,
    "another directory": outside,
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back(saved, tmp_path, capsys, damage):
    """Guards: a traceback, although the checkpoint before is whole; code in a pickle that is run; weights that are partly
    of the damaged one."""
    directory = shutil.copytree(saved, tmp_path / "training")
    DAMAGES[damage](directory / "step_0000012", tmp_path / "ran")
    model, optimizer = start()
    assert distributed.load_checkpoint(directory, model, optimizer) == 3
    assert (model.head == 3).all() and not (tmp_path / "ran").exists()
    said = capsys.readouterr().out
    assert "step_0000012 is damaged (" in said and said.count("\n") == 1
    shutil.rmtree(directory / "step_0000003")
    with pytest.raises(InputError, match="no checkpoint can be read, step_0000012 is damaged"):
        distributed.load_checkpoint(directory, *start())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_directories_that_look_like_checkpoints(saved, tmp_path):
    """Guards: a ValueError for somebody's step_xyz, or its removal; step_9 taken for the newest of 9 and 12."""
    directory = shutil.copytree(saved, tmp_path / "training")
    for name in ("step_xyz", "step_", "step_12_old", "step_-1", "step_99999999x"):
        (directory / name).mkdir()
        (directory / name / ".metadata").write_text("")
    shutil.move(directory / "step_0000003", directory / "step_9")
    (directory / "step_0000000").write_text("a file")
    (directory / ".step_old").write_text("another")
    model, optimizer = start()
    assert distributed.load_checkpoint(directory, model, optimizer) == 12
    distributed.save_checkpoint(directory, 13, model, optimizer)
    assert [path.name for path in distributed.complete_checkpoints(directory)] == ["step_0000012", "step_0000013"]
    assert (directory / "step_xyz").exists() and not (directory / "step_9").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_ctrl_c_while_a_checkpoint_is_read_or_written(saved, tmp_path, monkeypatch):
    """Guards: PyTorch wraps Ctrl-C like any error, so it counted as a damaged checkpoint, or as a full disk."""
    from torch.distributed.checkpoint import filesystem

    monkeypatch.setattr(filesystem.FileSystemReader, "read_data", lambda *_: fail(KeyboardInterrupt())())
    with pytest.raises(KeyboardInterrupt):
        distributed.load_checkpoint(saved, *start())
    monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", lambda *_: fail(KeyboardInterrupt())())
    with pytest.raises(KeyboardInterrupt):
        distributed.save_checkpoint(tmp_path, 1, *start())
