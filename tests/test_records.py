"""Record files: types, whose an output is, locks, resuming, fingerprints, and memory."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import tracemalloc
from argparse import Namespace
from pathlib import Path

import grpo
import train_prm
import verify
from data import records
from kernels.distributed import InputError

import pytest
from test_train_prm import make_label, make_model, run_main

ROOT = Path(__file__).parents[1]


def write(path: str | Path, lines: list) -> str:
    """Write values as JSON Lines; returns the path."""
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


SOLUTION = {"id": "p/0", "problem": "P?", "steps": ["a", "b"], "answer": "3", "sample": 0}
LABEL = {**SOLUTION, "step_labels": [True, False], "outcome": False, "text": "T", "votes": [[1, 0], [0, 1]]}
LABEL |= {"dropped": None, "ties": 0, "method": "single"}
VERIFICATION = {"id": "p/0/0", "solution_id": "p/0", "sample": 0, "text": "T", "step_verdicts": [True, False]}
VERIFICATION |= {"verdict": False, "tokens": 5, "solution_sha256": "x"}
CRITIQUE = {"id": "p/0", "method": "hybrid", "round": 1, "critique": "C", "merged": "M", "tokens": 3}
CURVE = {"panel": "P", "curve": "C", "x": [1, 2], "y": [1, 2.5]}
ROLLOUT = {"problem_id": "p", "text": "T", "ids": [1], "finish": "stop", "valid": True, "reward": 1.0}
ROLLOUT |= {"advantage": 0.0, "judgement": {"text": "J", "verdict": None}}
RESULT = {"benchmark": "b", "subset": "all", "metric": "f1", "value": 0.5, "n": 3, "interval": [0.4, 0.6]}
RESULT |= {"settings": {"model": "m"}, "seconds": 1.5, "tokens": 3}
SAMPLED = {"finish": "stop", "model": "m", **SOLUTION, "problem_id": "p", "text": "T", "tokens": 3}

# (a valid record, a field, values that are refused)
WRONG_TYPES = [
    (LABEL, "outcome", ["No", "false", 1, -1, None, [], "+"]),
    (LABEL, "step_labels", [[1, -1], ["+", "-"], ["correct", "incorrect"], [True], [], None, 5, [True, None], [1, 0]]),
    (LABEL, "text", [None, 5, []]),
    (LABEL, "id", [None, True, [], {}, "", float("nan")]),
    (LABEL, "votes", [[[1, 0]], [1, 2], None, [[1, "0"], [0, 1]], [[1], [0]], [[1, 0, 2], [0, 1, 2]]]),
    (LABEL, "dropped", [5, [], True]),
    (LABEL, "ties", [None, "3", -1]),
    (LABEL, "answer", [[5, 7], {"value": 5}, True, float("nan"), float("inf")]),
    (LABEL, "problem", [None, "", " \n", 5]),
    (LABEL, "steps", [None, "ab", [["a"]], 5, [None]]),
    (VERIFICATION, "verdict", [5, -1, 1, "No", "+", [], {}]),
    (VERIFICATION, "step_verdicts", [[1, -1], ["+", "-"], [7, 7], 5, True, float("nan"), ["correct", "x"]]),
    (VERIFICATION, "text", [None, 5]),
    (VERIFICATION, "sample", [None, "3", [], -1, 0.5, True]),
    (VERIFICATION, "tokens", [None, "3", float("nan")]),
    (VERIFICATION, "solution_sha256", [[], 5]),
    (CRITIQUE, "round", [None, "3", []]),
    (CRITIQUE, "method", [[], None]),
    (CRITIQUE, "merged", [5, True, {}]),
    (CURVE, "x", [None, ["1", 2], [1], [True, 2]]),
    (CURVE, "y", [None, [1], [1, None], [1, 1e308], [1, -(10**400)]]),
    (ROLLOUT, "reward", [None, "1", True, 1e308, 10**400]),
    (ROLLOUT, "ids", [None, "1", ["a"]]),
    (ROLLOUT, "judgement", [5, {}, {"text": 5, "verdict": None}]),
    (SAMPLED, "sample", [None, "3"]),
    (SAMPLED, "tokens", ["3", 2**53, 1e300]),
    (RESULT, "settings", [None, "x", {}, {"model": None}]),
    (RESULT, "value", ["x", None]),
    (RESULT, "subset", [[], None]),
    (RESULT, "metric", [None]),
    (RESULT, "interval", ["x", [1], [1, 2, 3], 5]),
]


@pytest.mark.parametrize("record, field, values", WRONG_TYPES)
def test_a_field_of_another_type_is_refused(tmp_path, record, field, values):
    """Guards: labels and votes taken by their truth value ("No" and -1 are true), lists of another length, an id that
    is null becoming "None", and tracebacks."""
    path = write(tmp_path / "in.jsonl", [record])
    assert records.read(path, list(record)) == [record]
    for value in values:
        write(path, [record | {field: value}])
        with pytest.raises(InputError, match=r"in.jsonl:1: .*" + field):
            records.read(path, list(record))


def test_what_other_programs_write(tmp_path):
    """Guards: answers that are numbers graded as 1e-05; counts written as floats; a dropped label that is refused for
    what it lacks; a refusal that doesn't say how to convert a public data set."""
    answers = [1e-05, 1e20, -1e-07, 7, 0.5, "x", None]
    path = write(tmp_path / "in.jsonl", [{"id": i, "answer": a, "sample": 1.0} for i, a in enumerate(answers)])
    found = records.read(path, ["id", "answer", "sample"])
    assert [r["answer"] for r in found] == ["0.00001", "1" + "0" * 20, "-0.0000001", "7", "0.5", "x", None]
    assert {type(r["sample"]) for r in found} == {int}
    dropped = {"step_labels": None, "outcome": None, "text": None, "votes": [], "dropped": "no_votes"}
    write(path, [LABEL | dropped])
    assert records.read(path, list(LABEL))[0]["text"] is None
    for label in ({"step_labels": [1, -1]}, {"step_labels": ["+", "-"]}, {"outcome": -1}):
        write(path, [LABEL | label])
        with pytest.raises(InputError, match=r"convert PRM800K's 1 or Math-Shepherd's \+ to true, and -1 or - to"):
            records.read(path, list(LABEL))


@pytest.mark.parametrize(
    "content, message",
    [(b"[" * 100_000, "not JSON"), (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"), ("{}".encode("utf-16"), "not JSON")],
)
def test_lines_that_break_the_json_parser(tmp_path, content, message):
    """Guards: a RecursionError's traceback."""
    (tmp_path / "in.jsonl").write_bytes(content + b"\n")
    with pytest.raises(InputError, match=f"in.jsonl:1: .*{message}"):
        records.read(tmp_path / "in.jsonl", ["id"])


def test_a_pipe_is_refused_with_a_reason(tmp_path):
    """Guards: "no such file" for what is there, but can be read only once."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a plain file; it is read more than once"):
        records.read(tmp_path / "pipe", ["id"])


# --------------------------------------------------------------------------- whose is an output?


def open_solutions(path: Path, **given) -> records.RecordFile:
    args = Namespace(**{"problems": "none", "num_samples": 2, "seed": 0, "out": str(path), **given})
    return records.RecordFile(path, args, {"out"}, ("id",), "problem", ("problem", "sample", "text"))


FOREIGN = [
    (b"my notes, no newline", "not an output of this command"),
    (b"\\documentclass{article}\n\\begin{document}", "not JSON"),
    (b"id,problem\n1,a", "not JSON"),
    (b"\x00\x01\x02\nPK", "not JSON"),
    (b'{"id": "a", "problem": "b"}\n{"id": "c", "pro', "no field 'sample'"),
    (b'{"id": "a", "answer": "5"}\n', "no field 'problem'"),
    (b'{"id": "a", "problem": "b", "sample": 0, "text": "c", "tokens": "5"}\n', "tokens must be a whole number"),
    (b"42", "not an output of this command"),
    (b"42\n", "no field 'id'"),
]


@pytest.mark.parametrize("content, message", FOREIGN)
def test_a_foreign_output_stays_as_it_is(tmp_path, content, message):
    """Guards: the last line of somebody's notes cut off as torn, and records appended to their data."""
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{message}.*choose another --out"), open_solutions(path):
        pass
    assert path.read_bytes() == content and not Path(f"{path}.args.json").exists()
    with pytest.raises(InputError, match=r"no args\.json says that this program made it"):  # results, labels
        records.write_records(path, [], Namespace(out=str(path), seed=0))
    assert path.read_bytes() == content


def test_an_output_that_is_an_input_or_another_stages(tmp_path):
    """Guards: problems, gold files and solutions replaced by results or appended to, also behind a link or in a list;
    another stage's or another command's output overwritten."""
    path = write(tmp_path / "a.jsonl", [SAMPLED])
    (tmp_path / "link.jsonl").symlink_to(path)
    before = Path(path).read_bytes()
    for given in ({"problems": str(path)}, {"gold": ["none", str(path)]}, {"data": str(tmp_path / "link.jsonl")}):
        with pytest.raises(InputError, match=rf"is --{next(iter(given))} itself"), open_solutions(path, **given):
            pass
        with pytest.raises(InputError, match="itself, which would be overwritten"):
            records.check_output(path, Namespace(**given), signature=b"")
    records.write_args(Path(path), Namespace(problems="p", num_samples=2, seed=0))
    for args in (Namespace(command="processbench", num_samples=4), Namespace(num_verifications=4), Namespace(policy="x")):
        with pytest.raises(InputError, match=r"was written by generate.py; choose another --out"):
            records.write_records(Path(path), [], args)
    assert Path(path).read_bytes() == before
    results = tmp_path / "results.jsonl"
    records.write_records(results, [CURVE], Namespace(command="processbench", limit=1))
    records.write_records(results, [CURVE], Namespace(command="processbench", limit=2))  # one's own is replaced
    with pytest.raises(InputError, match="was written by processbench"):
        records.write_records(results, [], Namespace(command="benchmark", limit=2))


def test_an_output_that_is_no_file_or_a_link(tmp_path):
    """Guards: a pipe or a device replaced by a file, or waited for; a link to a file that is to come, which is refused
    when the results are written."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with pytest.raises(InputError, match="not a plain file"), open_solutions(tmp_path / name):
            pass
        with pytest.raises(InputError, match="not a plain file"):
            records.check_output(tmp_path / name, Namespace(), signature=b"")
    (tmp_path / "link").symlink_to(tmp_path / "to come")
    for _ in range(2):
        records.write_records(tmp_path / "link", [SOLUTION], Namespace(command="benchmark"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "to come.args.json").exists()


@pytest.mark.parametrize("rows", [[], [{"settings": {}}], [{"settings": None}], [{"interval": "x"}], [{"subset": []}]])
def test_damaged_results_of_a_killed_run(tmp_path, rows):
    """Guards: tracebacks."""
    path = tmp_path / "results.jsonl"
    records.ResultsFile(path, Namespace(seed=0), []).add([RESULT | row for row in rows or [{}]])
    with pytest.raises(InputError, match=r"results.jsonl:1: ") if rows else contextlib.nullcontext():
        assert records.ResultsFile(path, Namespace(seed=0), []).earlier == {("m", "b", "all"): [RESULT]}


@pytest.mark.parametrize("history", [None, "abc", 5, [5], [[]], [["x"]], [["x", "y"]], [[None, "y"]]])
def test_damaged_history_of_a_reward_model(history):
    """Guards: a traceback."""
    with pytest.raises(InputError, match=r"pairs .step, fingerprint.; restore the file"):
        records.note_model(history, 20, "a")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[object]]:
    """A directory with a model, labels, and a run of train_prm.py; and that run's flags."""
    root = tmp_path_factory.mktemp("trained")
    make_model(root / "model")
    labels = write(root / "labels.jsonl", [make_label(i) for i in range(6)])
    flags = ["--model", root / "model", "--labels", labels, "--kind", "orm", "--epochs", 1, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        run_main(patch, train_prm, *flags, "--out", root / "run")
    return root, flags


def snapshot(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_model_directories_and_runs_of_others_are_refused(tmp_path, trained, monkeypatch):
    """Guards: a reward model overwritten by the policy, or its training state loaded into it; a model directory of
    somebody's filled with ours; verify.py writing into a run."""
    root, flags = trained
    before = snapshot(root)
    policy = ["--policy", root / "model", "--problems", ROOT / "data/tiny/problems.jsonl", "--device", "cpu"]
    shutil.copytree(root / "model", tmp_path / "model")
    judge = [*policy, "--prm", root / "run", "--prm_kind", "orm", "--out"]
    solutions = write(tmp_path / "solutions.jsonl", [SOLUTION])
    judged = ["--model", root / "model", "--solutions", solutions, "--device", "cpu", "--out"]
    for stage, arguments, message in (
        (grpo, [*judge, root / "run"], "is --prm itself"),
        (grpo, [*judge, tmp_path / "model"], "has a config.json, and no args.json says"),
        (train_prm, [*flags, "--out", tmp_path / "model"], "has a config.json, and no args.json says"),
        (verify, [*judged, root / "run"], r"was written by train_prm.py; choose another --out"),
        (verify, [*judged, tmp_path / "model"], "has a config.json"),
    ):
        with pytest.raises(InputError, match=message):
            run_main(monkeypatch, stage, *arguments)
    shutil.copytree(root / "run", tmp_path / "run")
    with pytest.raises(InputError, match=r"was written by train_prm.py"):
        run_main(monkeypatch, grpo, *judge, tmp_path / "run")
    assert snapshot(root) == before and snapshot(tmp_path / "model") == snapshot(root / "model")


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("prm", {"step_labels": [1, -1], "outcome": -1}, "step_labels must be a list of true and false, not"),
        ("prm", {"step_labels": [True]}, "1 step_labels for 2 steps"),
        ("prm", {"step_labels": []}, "0 step_labels for 2 steps"),
        ("prm", {"step_labels": None}, "step_labels must be a list of true and false, not None"),
        ("orm", {"outcome": "No"}, "outcome must be true or false, not No"),
        ("orm", {"outcome": "incorrect", "step_labels": ["correct", "incorrect"]}, ".*must be .*true"),
        ("orm", {"id": None}, "id must be a string or a number, not None"),
        ("prm_cot", {"text": None}, 'text must be a string, not None; null is for labels .* "dropped" must then give'),
    ],
)
def test_wrong_labels_are_never_trained(tmp_path, trained, monkeypatch, kind, change, message):
    """Guards: PRM800K's and Math-Shepherd's marks, or "No", trained as Correct and Yes; as many lines as there are
    labels, for other numbers of steps."""
    labels = write(tmp_path / "labels.jsonl", [make_label(3), make_label(0) | change])
    flags = [*trained[1], "--labels", labels, "--kind", kind, "--out", tmp_path / "out"]
    with pytest.raises(InputError, match=rf"labels.jsonl:2: {message}"):
        run_main(monkeypatch, train_prm, *flags)
    assert not list((tmp_path / "out").glob("*.json"))


def test_solutions_without_steps(tmp_path, monkeypatch):
    """Guards: "verifications.jsonl: no such file; create it with verify.py" by verify.py."""
    solutions = write(tmp_path / "solutions.jsonl", [SOLUTION | {"steps": []}])
    with pytest.raises(InputError, match="no solution has steps"):
        run_main(monkeypatch, verify, "--model", "none", "--solutions", solutions, "--out", tmp_path / "out")


@pytest.mark.parametrize("change", [{"verdict": 5}, {"step_verdicts": [7, -3]}, {"text": None}, {"sample": "3"}])
def test_wrong_verifications_never_vote(tmp_path, trained, monkeypatch, change):
    """Guards: a verdict of 5 that counts as five votes; text that is null in a label; types found after sampling."""
    solutions = write(tmp_path / "solutions.jsonl", [SOLUTION])
    path = write(tmp_path / "verifications.jsonl", [VERIFICATION | change])
    before = Path(path).read_bytes()
    flags = ["--model", trained[0] / "model", "--solutions", solutions, "--device", "cpu", "--num_verifications", 2]
    with pytest.raises(InputError, match=rf"verifications.jsonl:1: {next(iter(change))} must be"):
        run_main(monkeypatch, verify, *flags, "--out", tmp_path)
    assert Path(path).read_bytes() == before


def test_verifications_of_other_solutions_are_found_first(tmp_path, monkeypatch):
    """Guards: step verdicts for another number of steps that are found after hours of sampling, or not at all."""
    flags = ["--model", "none", "--solutions", write(tmp_path / "solutions.jsonl", [SOLUTION]), "--out", tmp_path]
    foreign = {"step_verdicts": [True], "solution_sha256": None}
    for change, message in ((foreign, "1 step_verdicts for the 2 steps"), ({}, "p/0 was another solution when it was")):
        write(tmp_path / "verifications.jsonl", [VERIFICATION | change])
        with pytest.raises(InputError, match=message):
            run_main(monkeypatch, verify, *flags)


def test_ids_without_a_slash(tmp_path):
    """Guards: all solutions of all problems taken for those of one, whose interval has no width."""
    assert [records.problem_of(name) for name in ("a/b/0", "a/0", "a", "b")] == ["a/b", "a", "a", "b"]
    answers = write(tmp_path / "answers.jsonl", [{"id": "a", "answer": 3}])
    assert records.read_references(answers, [{"id": "a"}]) == {"a": "3"}


def test_the_args_json_of_a_run(tmp_path, trained, monkeypatch):
    """Guards: a renamed run that resumes with other settings; an older run, whose args.json lies beside its directory,
    resumed unchecked; other weights behind --model taken without a word; args.json rewritten by a run that is refused;
    a damaged args.json as a traceback."""
    root, flags = trained
    run = tmp_path / "renamed"
    shutil.copytree(root / "run", run)
    resume = [*flags, "--out", run]
    with pytest.raises(InputError, match=r"made with --lr 1e-05, this run has --lr 0.1"):
        run_main(monkeypatch, train_prm, *resume, "--lr", 0.1)
    (run / "args.json").rename(f"{run}.args.json")  # as older runs have it
    with pytest.raises(InputError, match=r"made with --lr 1e-05, this run has --lr 0.1"):
        run_main(monkeypatch, train_prm, *resume, "--lr", 0.1)
    run_main(monkeypatch, train_prm, *resume)
    written = (run / "args.json").read_bytes()
    with open(run / "metrics.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is training into it"):
            run_main(monkeypatch, train_prm, *resume, "--micro_tokens", 777)
    assert (run / "args.json").read_bytes() == written
    shutil.copytree(root / "model", tmp_path / "model")
    made_with = json.loads(written)
    made_with["arguments"]["model_sha256"] = "another"
    (run / "args.json").write_text(json.dumps(made_with))
    with pytest.raises(InputError, match="the contents of --model have changed"):
        run_main(monkeypatch, train_prm, *resume)
    for damaged in (b"", b"{", b"[]", b"\xff", b'{"arguments": 5}', b'{"arguments": {}, "constants": null}', b"null"):
        (run / "args.json").write_bytes(damaged)
        with pytest.raises(InputError, match=r"args.json: not "):
            run_main(monkeypatch, train_prm, *resume)


# --------------------------------------------------------------------------- locks, links, fingerprints


def test_disks_without_locks_and_links(tmp_path, monkeypatch, capsys):
    """Guards: a run that can't start on Lustre; two runs into one file, one of them through a link; a link replaced by
    a file; somebody's .lock file emptied."""
    path, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)
    Path(f"{path}.lock").write_text("theirs")
    with open_solutions(path) as output:
        with pytest.raises(InputError, match="another run is writing to it"), open_solutions(link):
            pass
        output.append([SAMPLED])
    assert Path(f"{path}.lock").read_text() == "theirs"
    with open_solutions(link) as output:
        assert list(output.done) == ["p/0"]
    records.write_lines(link, [SAMPLED, SAMPLED])
    assert link.is_symlink() and len(path.read_text().splitlines()) == 2

    def no_locks(*_) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with open_solutions(tmp_path / "other.jsonl") as output:
        output.append([SAMPLED])
    assert capsys.readouterr().err.count("no lock on this file system (Function not implemented)") == 1


def test_records_of_another_model_or_prompt(tmp_path):
    """Guards: a file of two models' or two prompts' records; an older run, which has no fingerprints, refused."""
    path = tmp_path / "out.jsonl"
    with open_solutions(path) as output:
        output.append([SAMPLED])
    with open_solutions(path) as output:  # the args.json has no fingerprints
        output.check_made_with(model_sha256="a", prompt_sha256="b")
        output.append([SAMPLED | {"id": "p/1"}])
    with open_solutions(path) as output:
        output.check_made_with(model_sha256="a", prompt_sha256="b")
        with pytest.raises(InputError, match="the contents of --model have changed"):
            output.check_made_with(model_sha256="c", prompt_sha256="b")
        with pytest.raises(InputError, match="made with another prompt"):
            output.check_made_with(model_sha256="a", prompt_sha256="c")


def test_a_model_directorys_fingerprint(tmp_path):
    """Guards: weights, a tokenizer or a template that change unnoticed; and what says nothing about the model, such as
    a run's args.json, taken for a change."""
    path = make_model(tmp_path / "model")
    first = records.hash_model(path)
    (path / "args.json").write_text("{}")
    assert records.hash_model(path) == first
    found = {first}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        with open(path / name, "a") as file:
            file.write(" ")
        found.add(records.hash_model(path))
    with open(path / "model.safetensors", "wb") as file:
        file.truncate(64 << 20)  # sparse
    found.add(records.hash_model(path))
    with open(path / "model.safetensors", "rb+") as file:  # one layer in the middle was trained
        file.seek(30 << 20)
        file.write(b"x" * (2 << 20))
    found.add(records.hash_model(path))
    assert len(found) == 8


def test_a_changed_tree_is_marked(tmp_path, monkeypatch):
    """Guards: an args.json with a commit that isn't the code that ran."""
    (tmp_path / "data").mkdir()
    file = tmp_path / "data/records.py"
    file.write_text("a")
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(records, "__file__", str(file))
    commit = records.describe_run(Namespace())["commit"]
    (tmp_path / "untracked").write_text("runs are no code")
    assert records.describe_run(Namespace())["commit"] == commit and len(commit) == 40
    file.write_text("b")
    assert records.describe_run(Namespace())["commit"] == f"{commit}-dirty"


# --------------------------------------------------------------------------- metrics, memory


@pytest.mark.parametrize("line", [b'{"step": 1', b'{"step": "1"}', b"\xff\xfe", b'{"step": 1, "a/b": null}', b"[]", b'{"step": 1, "a/b": 1e308}'])
def test_damaged_metrics(tmp_path, line):
    """Guards: tracebacks from a metrics.jsonl with a damaged line in the middle."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a/b": 0.5}\n' + line + b'\n{"step": 2}\n{"st')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: "), records.MetricsFile(path, 2):
        pass
    path.write_bytes(b'{"step": 1, "a/b": NaN}\n{"step": 2}\n{"st')
    with records.MetricsFile(path, 1) as metrics:
        assert [record["step"] for record in metrics.records] == [1]


def test_memory_of_many_records(tmp_path):
    """Guards: record files that are held in memory, whole or as records, at 3.3 times their size: a restart of the
    paper's Stage I would not fit. 1,600 verifications of 8 KB, of 100 solutions."""
    solutions = [SOLUTION | {"id": f"p/{i}"} for i in range(100)]
    path = tmp_path / "verifications.jsonl"
    with open(path, "w") as file:
        for i in range(1600):
            name = {"id": f"p/{i // 16}/{i % 16}", "solution_id": f"p/{i // 16}", "sample": i % 16}
            name |= {"solution_sha256": verify.hash_solution(solutions[i // 16])}
            file.write(json.dumps(VERIFICATION | name | {"text": "x" * 7000 + f" {i}"}) + "\n")
    tracemalloc.start()
    try:
        output = records.RecordFile(path, Namespace(seed=0), set(), ("solution_id", "sample"), "solution_sha256")
        with output:
            keys = ([(f"p/{i}", j) for j in range(17)] for i in range(100))
            assert len(output.done) == 1600 and output.find_missing(keys) == list(range(100))
        verifications = verify.read_verifications(path, solutions)
        labels = verify.label_solutions(solutions, verifications, verify.step_consistency, seed=0)
        args = Namespace(out=str(tmp_path), method="step_consistency")
        verify.write_labels(args, solutions, labels, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.1 * path.stat().st_size
    texts = [label["text"] for label in records.read(verify.labels_path(args), ["id", "text"])]
    assert all(int(text.split()[1]) // 16 == i for i, text in enumerate(texts))  # each of its own solution


def test_verifications_of_another_engine(tmp_path):
    """Guards: a file with only solution_id, sample and text refused, or its texts not parsed; a vote that counts
    twice."""
    text = "## Step 1: a\n**This step is correct.**\n## Step 2: b\n**This step is incorrect.**\n"
    text += "**Verification: Is the answer correct (Yes/No)? No**"
    path = write(tmp_path / "v.jsonl", [{"solution_id": "p/0", "sample": j, "text": text} for j in range(2)])
    found = verify.read_verifications(path, [SOLUTION])
    assert [(v["step_verdicts"], v["verdict"], v["sample"]) for v in found] == [([True, False], False, j) for j in (0, 1)]
    with pytest.raises(InputError, match="verification p/0/0 appears twice"):
        verify.label_solutions([SOLUTION], [found[0], found[0]], verify.single, 0)
    with pytest.raises(InputError, match=r"3 step_verdicts for the 2 steps"):
        wrong = VERIFICATION | {"step_verdicts": [True] * 3}
        verify.label_solutions([SOLUTION], [wrong], verify.single, 0)
