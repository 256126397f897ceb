"""Votes that stop when they are settled (verify.py --stop), and the audit of rewards by a vote (data/audit.py)."""

import json
import shutil
import sys
from pathlib import Path

import verify
from data import audit, records
from kernels.distributed import InputError

import pytest
from test_generate import ROOT
from test_train_prm import torchrun

FLAGS = ["--model", ROOT / "data/tiny/verifier", "--num_verifications", 8, "--max_new_tokens", 160,
         "--worked_examples", 0, "--device", "cpu"]  # fmt: skip


def run(monkeypatch, main, *arguments: object) -> None:
    """`python script arguments`, in this process."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    main()


def read(path: Path) -> list[dict]:
    """The records of a file, sorted, because they come as they are finished."""
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda record: record["id"])


@pytest.fixture(scope="module")
def solutions(tmp_path_factory) -> Path:
    """16 solutions of the tiny world, half of them wrong; one has no steps."""
    path = tmp_path_factory.mktemp("stop") / "solutions.jsonl"
    cases = [json.loads(line) for line in (ROOT / "data/tiny/processbench.jsonl").read_text().splitlines()[::25]][:16]
    lines = [
        {"id": f"q{i}/0", "problem": case["problem"], "steps": case["steps"] if i else [], "answer": "1"}
        for i, case in enumerate(cases)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def outputs(solutions, tmp_path_factory) -> Path:
    """A directory with runs of all votes and of both rules."""
    path = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for stop in ("all", "settled", "lead"):
            arguments = ["--solutions", solutions, "--out", path / stop, "--stop", stop, "--slots", 256]
            run(monkeypatch, verify.main, *FLAGS, *arguments)
    return path


def test_settled_votes_give_the_labels_of_all(outputs):
    """Guards: a stop that changes a label; votes after the stop that are kept; samples that are not those of the run
    without stops; a prompt that is run once more than needed and written twice."""
    labels = {stop: read(outputs / stop / "labels_step_consistency.jsonl") for stop in ("all", "settled")}
    for one, other in zip(labels["all"], labels["settled"], strict=True):
        assert (one["id"], one["step_labels"], one["outcome"]) == (other["id"], other["step_labels"], other["outcome"])
    every = {record["id"]: record for record in read(outputs / "all/verifications.jsonl")}
    kept = read(outputs / "settled/verifications.jsonl")
    assert all(every[record["id"]] == record for record in kept)
    votes: dict[str, list] = {}
    for record in sorted(kept, key=lambda record: record["sample"]):
        votes.setdefault(record["solution_id"], []).append(verify.vote_of(record))
    for so_far in votes.values():
        assert verify.fewest_to_settle(so_far, 8) == 0 and verify.fewest_to_settle(so_far[:-1], 8) > 0
    assert len(votes) == 15 and 4 * 15 <= len(kept) < 0.85 * len(every)


def test_lead_looks_at_even_numbers(outputs):
    """Guards: a rule that looks after each vote, and then stops at the first streak."""
    kept = read(outputs / "lead/verifications.jsonl")
    counts = [sum(record["solution_id"] == f"q{i}/0" for record in kept) for i in range(1, 16)]
    assert set(counts) <= {4, 6, 8} and 4 in counts


def test_records_depend_on_neither_slots_nor_kills(outputs, solutions, tmp_path, monkeypatch):
    """Guards: votes that end in another order and leave other records; a resumed run that counts a settled solution as
    unfinished, or an unfinished one as settled, or begins its votes again."""
    expected = read(outputs / "settled/verifications.jsonl")
    arguments = ["--solutions", solutions, "--stop", "settled"]
    for slots in (8, 32):  # `expected` is of 256
        run(monkeypatch, verify.main, *FLAGS, *arguments, "--out", tmp_path / str(slots), "--slots", slots)
        assert read(tmp_path / f"{slots}/verifications.jsonl") == expected

    lines = (outputs / "settled/verifications.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (30, len(lines)):
        out = tmp_path / f"killed{kept}"
        shutil.copytree(outputs / "settled", out)
        (out / "verifications.jsonl").write_bytes(b"".join(lines[:kept]) + lines[0][:40] * (kept < len(lines)))
        run(monkeypatch, verify.main, *FLAGS, *arguments, "--out", out, "--slots", 64)
        assert read(out / "verifications.jsonl") == expected


def test_other_methods_refuse_a_file_of_stopped_votes(outputs, solutions, monkeypatch):
    """Guards: labels by another rule from votes that stopped when step_consistency was sure."""
    arguments = ["--solutions", solutions, "--out", outputs / "settled"]
    with pytest.raises(InputError, match="--stop"):
        run(monkeypatch, verify.main, *FLAGS, *arguments, "--method", "outcome_consistency")
    with pytest.raises(InputError, match="--stop settled decides by the votes of --method step_consistency"):
        run(monkeypatch, verify.main, *FLAGS, *arguments, "--method", "outcome_consistency", "--stop", "settled")


@pytest.mark.slow
def test_two_ranks_stop_as_one(outputs, solutions, tmp_path):
    """Guards: a rank that knows only its own votes, and goes on with other solutions than the other rank."""
    torchrun("verify.py", *FLAGS, "--solutions", solutions, "--stop", "settled", "--out", tmp_path, "--slots", 8)
    assert read(tmp_path / "verifications.jsonl") == read(outputs / "settled/verifications.jsonl")


# --------------------------------------------------------------------------- the audit


def rollout(problem_id: str, reward: float) -> dict:
    text = r"<think><step>1+1=2</step></think><answer>\boxed{2}</answer>"
    return {"problem_id": problem_id, "text": text, "reward": reward}


def test_accepted_responses_are_sampled():
    """Guards: responses without a reward among them; numbers that count only the accepted ones; a sample that depends on
    which other steps are audited, or on their order."""
    rollouts = [rollout("a", 0), rollout("b", 1), rollout("a", 1), rollout("a", 0.4)]
    problems = {"a": "A", "b": "B"}
    found = audit.accepted_solutions(10, rollouts, problems, count=9, seed=0)
    assert sorted(s["id"] for s in found) == ["step 10/a/1", "step 10/a/2", "step 10/b/0"]
    assert {(s["problem_id"], s["problem"], tuple(s["steps"]), s["answer"]) for s in found} == {
        ("a", "A", ("1+1=2",), "2"),
        ("b", "B", ("1+1=2",), "2"),
    }
    many = [rollout("a", 1)] * 50
    draws = [[s["id"] for s in audit.accepted_solutions(s, many, problems, 5, seed=0)] for s in (1, 1, 2)]
    assert draws[0] == draws[1] and draws[0] != [name.replace("step 2", "step 1") for name in draws[2]]


def test_agreement_by_hand():
    """Guards: responses without votes that count as disagreement; an interval over responses, where those of a problem
    stand and fall together."""
    label = {
        True: verify.Label([True, True], True, "", [], None),
        False: verify.Label([True, False], False, "", [], None),
    }
    solutions = [{"problem_id": name} for name in "aabbc"]
    numbers = audit.agreement(solutions, [label[True], label[True], label[False], label[False], verify.NO_VOTES], 0)
    assert numbers["audit/sampled"] == 5 and numbers["audit/voted"] == 4
    assert numbers["audit/agreement"] == 0.5 and numbers["audit/step_agreement"] == 0.75
    assert numbers["audit/agreement_low"] == 0 and numbers["audit/agreement_high"] == 1
    assert audit.agreement(solutions[:1], [verify.NO_VOTES], 0) == {"audit/sampled": 1, "audit/voted": 0}


def test_audit_command(tmp_path, monkeypatch, capsys):
    """Guards: a step that is left out; an audit that samples again when it is resumed; a bad input that isn't one line."""
    case = json.loads((ROOT / "data/tiny/processbench.jsonl").read_text().splitlines()[0])
    steps = "".join(f"<step>{step}</step>" for step in case["steps"])
    response = {"problem_id": "p", "text": rf"<think>{steps}</think><answer>\boxed{{1}}</answer>", "reward": 1.0}
    (tmp_path / "rollouts").mkdir()
    for step in (1, 2, 3, 4):
        records.write_lines(tmp_path / f"rollouts/step_{step:07d}.jsonl", [response] * step)
    records.write_lines(tmp_path / "problems.jsonl", [{"id": "p", "problem": case["problem"]}])
    arguments = ["--rollouts", tmp_path / "rollouts", "--problems", tmp_path / "problems.jsonl", *FLAGS]
    arguments += ["--out", tmp_path / "audit", "--every", 2, "--responses", 3]
    run(monkeypatch, audit.main, *arguments)
    lines = [json.loads(line) for line in (tmp_path / "audit/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["audit/accepted"], line["audit/sampled"]) for line in lines] == [(2, 2, 2), (4, 4, 3)]
    verifications = (tmp_path / "audit/verifications.jsonl").read_bytes()
    assert verifications.count(b"\n") == 5 * 8
    monkeypatch.setattr(audit, "open_engine", lambda *_: pytest.fail("sampled again"))
    run(monkeypatch, audit.main, *arguments)
    assert (tmp_path / "audit/verifications.jsonl").read_bytes() == verifications
    with pytest.raises(InputError, match=r"no step_.* that --every 9 divides"):
        run(monkeypatch, audit.main, *arguments, "--every", 9)
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo/metrics.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"has a metrics\.jsonl"):
        run(monkeypatch, audit.main, *arguments, "--out", tmp_path / "grpo")
    (tmp_path / "rollouts/step_one.jsonl").touch()
    with pytest.raises(InputError, match=r"step_one.jsonl: not named by its step"):
        run(monkeypatch, audit.main, *arguments)
