"""Stage III interrupted: kills, torn checkpoints, signals, another number of processes, overflow, a full disk.

Whatever happens, the same command goes on, and ends where the run would have ended that nobody interrupted.
"""

import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path

import evaluate
import grpo
from data import records, report
from generate import SOLVE_PROMPT, format_valid, open_engine
from kernels import distributed
from kernels.chat import render_chat
from kernels.transformer import load_model
from train_prm import Judge, score_solutions

import pytest
import torch
from safetensors.torch import load_file
from test_generate import PROCESSES, _run_script
from test_train_prm import TINY, make_model, read_metrics, write_jsonl
from transformers import AutoTokenizer

STEPS = 8
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
FEW = 20  # resamples of a bootstrap: two thousand would take most of the time of so small a run

# --------------------------------------------------------------------------- runs, in this process and in others


def train(monkeypatch, *flags: object) -> int:
    """The exit status of `python grpo.py flags`, in this process."""
    monkeypatch.setattr(sys, "argv", ["grpo.py", *map(str, flags)])
    try:
        distributed.run_stage(grpo.main)
    except SystemExit as stop:
        return stop.code
    return 0


def _live(flags, where, touches, moment, delay, largest_file, environment) -> None:
    out = flags[flags.index("--out") + 1]

    def touched(event: str, details: tuple) -> None:
        removal = event == "os.remove"  # rmtree names files relative to their directory
        if removal or (event in ("open", "os.mkdir", "os.rename", "os.rmdir") and str(details[0]).startswith(out)):
            touches.value += 1
            if touches.value == moment and not delay:
                os.kill(os.getpid(), signal.SIGKILL)
            elif touches.value == moment:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    evaluate.RESAMPLES = FEW
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.addaudithook(touched)
    _run_script("grpo.py", flags, str(where / "stdout"), str(where / "stderr"))


class Life:
    """One life of a run, `python grpo.py flags` in a process of its own; its output goes to files in a directory.

    It counts how often the run touches a file under --out (opens, renames, removes it): between two touches nothing
    changes on the disk but what is being written. At the touch number `moment` it dies by `kill -9`, before the touch
    or `delay` seconds after it. No file may become larger than `largest_file`.
    """

    def __init__(self, where, *flags, moment=0, delay=0.0, largest_file=resource.RLIM_INFINITY, environment=()):
        where.mkdir(exist_ok=True)
        self.where, self.count = where, PROCESSES.RawValue("i", 0)
        arguments = ([str(flag) for flag in flags], where, self.count, moment, delay, largest_file, dict(environment))
        self.process = PROCESSES.Process(target=_live, args=arguments)
        self.process.start()

    def end(self) -> int:
        """Its exit status, -9 if it was killed."""
        self.process.join(300)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode

    def said(self, name: str) -> str:
        """What it wrote to `stdout` or `stderr`."""
        return (self.where / name).read_text()


def whole_steps(out: Path) -> list[str]:
    """What lies in a run's training/."""
    return sorted(path.name for path in (out / "training").iterdir())


def fresh(whole: Path):
    """The model that a run began with, and a new optimizer."""
    model = load_model(whole.parent / "model")
    return model, torch.optim.AdamW(model.parameters())


def assert_same(out: Path, whole: Path) -> None:
    """Equal metrics but for times, bitwise equal weights, and nothing left behind."""
    assert read_metrics(out) == read_metrics(whole)
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {path.name for path in out.rglob(".*")} == {".metadata"}
    assert whole_steps(out) == whole_steps(whole)


@pytest.fixture(scope="module", autouse=True)
def as_found():
    """One thread and few resamples, as the runs in other processes have; afterwards all is as before, signals too."""
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in SIGNALS}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "RESAMPLES", FEW)
        yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(flags, directory, touches) of a run of 8 steps on a random model that nobody interrupted."""
    root = tmp_path_factory.mktemp("resume")
    for name, count in (("problems", 5), ("heldout", 3)):
        lines = (TINY / f"{name}.jsonl").read_text().splitlines()[:count]
        write_jsonl(root / f"{name}.jsonl", [json.loads(line) for line in lines])
    flags = ["--policy", make_model(root / "model"), "--problems", root / "problems.jsonl", "--gold"]
    flags += [TINY / "gold.jsonl", "--heldout", root / "heldout.jsonl", "--heldout_every", 2, "--reward", "random"]
    flags += ["--format_constraints", "none", "--batch_size", 2, "--group_size", 3, "--max_new_tokens", 8]
    flags += ["--lr", 1e-3, "--kl_coef", 0.1, "--save_every", 1, "--device", "cpu", "--steps", STEPS]
    life = Life(root / "output", *flags, "--out", root / "whole")
    assert life.end() == 0, life.said("stderr")
    assert [record["step"] for record in read_metrics(root / "whole")] == list(range(STEPS + 1))
    return flags, root / "whole", life.count.value


@pytest.fixture(scope="module")
def judged(world, tmp_path_factory):
    """Flags of a run with the tiny policy, which the base of the reward models judges as an ORM: as a PRM it is lenient
    and gives all responses the same reward."""
    changes = ["--policy", TINY / "policy", "--reward", "process_aware", "--prm", TINY / "base", "--group_size", 2]
    changes += ["--prm_kind", "orm"]
    changes += ["--format_constraints", "paper", "--max_new_tokens", 120, "--prm_max_new_tokens", 200, "--seed", 3]
    return [*world[0], *changes, "--steps", 2]


# --------------------------------------------------------------------------- kills and torn checkpoints


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_and_restart_gives_the_same_run(tmp_path, world, kills):
    """Guards: a step, a coin or a held-out measurement lost, doubled or drawn otherwise after a kill; metrics of steps
    that were lost; a kill while saving, exporting or clearing up that costs a checkpoint or leaves files behind."""
    flags, whole, touches = world
    out, rng, killed = tmp_path / "out", random.Random(kills), 0
    for _ in range(kills):  # from the first touch on, and so that the lives together go through the whole run
        moment = rng.randint(1, int(touches * min(0.5, 7 / kills)))
        delay = rng.choice([0, rng.uniform(0, 0.2)])
        life = Life(tmp_path / "output", *flags, "--out", out, moment=moment, delay=delay)
        assert life.end() in (0, -9), life.said("stderr")  # a late life may have less to do than it was given
        killed += life.process.exitcode == -9
    assert killed > kills / 2
    last = Life(tmp_path / "output", *flags, "--out", out)
    assert last.end() == 0, last.said("stderr")
    assert_same(out, whole)


@pytest.mark.slow
def test_kill_and_restart_with_a_reward_model(tmp_path, judged):
    """Guards: judgements that depend on what was judged before the kill."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    life = Life(tmp_path / "output", *judged, "--out", whole)
    assert life.end() == 0, life.said("stderr")
    assert any(metrics["reward/std"] for metrics in read_metrics(whole)[1:])  # otherwise no judgement would matter
    for moment in (3, 19, 30):
        assert Life(tmp_path / "output", *judged, "--out", out, moment=moment).end() == -9
    assert Life(tmp_path / "output", *judged, "--out", out).end() == 0
    assert_same(out, whole)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torn_checkpoints_never_cost_a_whole_one(world, tmp_path):
    """Guards: a torn checkpoint that is loaded, or that counts as one of the newest so that whole ones are removed; the
    gigabytes that a kill while saving leaves, at a step that is never saved again."""
    model, optimizer = fresh(world[1])
    distributed.save_checkpoint(tmp_path, 5, model, optimizer)
    distributed.save_checkpoint(tmp_path, 6, model, optimizer)
    for name in ("step_0000008", "step_0000009", ".step_0000007"):
        shutil.copytree(tmp_path / "step_0000006", tmp_path / name)
        (tmp_path / name / ".metadata").unlink()
    assert distributed.load_checkpoint(tmp_path, *fresh(world[1])) == 6
    with torch.no_grad():
        model.head.add_(1.0)
    distributed.save_checkpoint(tmp_path, 7, model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000006", "step_0000007"]
    other, optimizer = fresh(world[1])
    assert distributed.load_checkpoint(tmp_path, other, optimizer) == 7 and torch.equal(other.head, model.head)


# --------------------------------------------------------------------------- processes and signals


def start_ranks(ranks: int, where: Path, *flags: object) -> list[Life]:
    """What torchrun does on one machine: a process for each rank, which find each other by these variables."""
    if ranks == 1:
        return [Life(where / "0", *flags)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    each = [common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]
    return [Life(where / str(i), *flags, environment=variables) for i, variables in enumerate(each)]


def test_another_number_of_processes_goes_on(world, tmp_path):
    """Guards: a checkpoint, or an optimizer in it, that only as many processes can read as wrote it; problems or coins
    that depend on their number. One process begins, two go on, one ends it."""
    flags, whole, _ = world
    flags = [*flags, "--out", tmp_path / "out", "--save_every", 2]
    for ranks, before, steps in ((1, 0, 2), (2, 2, 6), (1, 6, STEPS)):
        lives = start_ranks(ranks, tmp_path, *flags, "--steps", steps)
        assert [life.end() for life in lives] == [0] * ranks, lives[0].said("stderr")
        assert (f", resumed after step {before}\n" in lives[0].said("stdout")) == (before > 0)
    for one, two in zip(read_metrics(whole), read_metrics(tmp_path / "out"), strict=True):
        assert one == pytest.approx(two, abs=1e-4), one["step"]


def test_held_out_reward_is_what_the_judge_says(judged, tmp_path):
    """Guards: a distance between reward and accuracy, the sign of a gamed reward, that isn't one: responses of other
    problems judged, or some of them twice or by no rank."""
    flags = [*judged, "--steps", 1, "--out", tmp_path / "out", "--heldout_temperature", 1]
    lives = start_ranks(2, tmp_path, *flags)
    assert [life.end() for life in lives] == [0, 0], lives[0].said("stderr")
    heldout = records.read(judged[judged.index("--heldout") + 1], ["id", "problem"])
    gold = {r["id"]: r["answer"] for r in records.read(TINY / "gold.jsonl", ["id", "answer"])}
    policy, prm = [open_engine(str(TINY / name), torch.device("cpu"), 16) for name in ("policy", "base")]
    settings = {"num_samples": 1, "temperature": 1.0, "max_new_tokens": 120, "seed": 3}
    result = evaluate.heldout_accuracy(policy, heldout, gold, **settings)
    texts = [sample["text"] for (sample,) in result.samples]
    shown = [grpo.shown_solution(text) for text in texts]
    asked = [{**p, "steps": steps, "answer": answer} for p, (steps, answer) in zip(heldout, shown, strict=True)]
    scored = score_solutions(Judge(prm, "orm", max_new_tokens=200), asked)
    rewards = [format_valid(text) and s.verdict is True for text, s in zip(texts, scored, strict=True)]
    first = read_metrics(tmp_path / "out")[0]
    assert first["heldout/reward"] == pytest.approx(sum(rewards) / 3) and sum(rewards) > 0
    assert first["heldout/reward_minus_accuracy"] == pytest.approx(sum(rewards) / 3 - result.accuracy)


def test_signals_save_and_stop(world, tmp_path, monkeypatch, capsys):
    """Guards: a step thrown away by SIGTERM or Ctrl-C, a stop that looks like success, other numbers after it."""
    flags, whole, _ = world
    flags = [*flags, "--out", tmp_path / "out", "--save_every", 100]
    planned, real = {2: signal.SIGTERM, 4: signal.SIGINT}, grpo.batch_for_step

    def batch_for_step(step, *rest):  # called when a step begins
        if step in planned:
            signal.raise_signal(planned.pop(step))
        return real(step, *rest)

    monkeypatch.setattr(grpo, "batch_for_step", batch_for_step)
    for step in (3, 5):
        assert train(monkeypatch, *flags) == 143
        assert f"stopped by a signal after step {step} and saved" in capsys.readouterr().out
        assert whole_steps(tmp_path / "out")[-1] == f"step_{step:07d}"
        assert [record["step"] for record in read_metrics(tmp_path / "out")] == list(range(step + 1))
    assert train(monkeypatch, *flags, "--save_every", 1) == 0
    assert_same(tmp_path / "out", whole)


# --------------------------------------------------------------------------- what goes wrong inside


def test_failures_leave_the_last_checkpoint(world, tmp_path, monkeypatch, capsys):
    """Guards: a loss that isn't a number reaching weights or checkpoint; a traceback for a full disk, wherever it shows
    (safetensors and torch wrap the error, each otherwise); half a file in the place of a whole one."""
    flags, whole, _ = world
    flags = [*flags, "--out", tmp_path / "out", "--save_every", 2]
    assert train(monkeypatch, *flags, "--steps", 2) == 0
    exported = (tmp_path / "out" / "model.safetensors").read_bytes()
    real = grpo.grpo_loss
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "grpo_loss", lambda *a, **kw: (real(*a, **kw)[0] * math.nan, real(*a, **kw)[1]))
        capsys.readouterr()
        assert train(patch, *flags) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: the gradient's norm is nan; stopped, the last checkpoint is intact; ")
    assert message.endswith("start again with a lower --lr and another --out")
    sizes = [path.stat().st_size for path in (whole / "model.safetensors", *whole.rglob("*.distcp"))]
    for size, problem in ((sizes[0], "File too large"), (sizes[1], "step_0000004: can't be written")):
        life = Life(tmp_path / "output", *flags, largest_file=size - 1)
        assert life.end() == 2
        message = life.said("stderr").splitlines()[-1]
        assert message.startswith("error: ") and problem in message and "is intact, and the same command" in message
        assert distributed.load_checkpoint(tmp_path / "out" / "training", *fresh(whole)) == 2
    # What resumes is written first, so the copy is still that of step 2, as a whole.
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == exported
    assert load_file(tmp_path / "out" / "model.safetensors")
    assert train(monkeypatch, *flags, "--save_every", 1) == 0
    assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize("file, content", [("config.json", "{"), ("config.json", "{}"), ("model.safetensors", "{")])
def test_a_damaged_policy_is_one_line(world, tmp_path, monkeypatch, capsys, file, content):
    """Guards: a traceback from the copy of the policy that the KL term needs, which was opened without a check."""
    flags, whole, _ = world
    policy = shutil.copytree(whole.parent / "model", tmp_path / "policy")
    (policy / file).write_text(content)
    assert train(monkeypatch, *flags, "--policy", policy, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: --policy {policy}") and (file in message or "architecture" in message)


def test_weights_that_overflow_are_named(world, tmp_path, monkeypatch, capsys):
    """Guards: an index error in the sampler, or nonsense sampled from logits that are NaN, after a step too large."""
    assert train(monkeypatch, *world[0], "--out", tmp_path / "out", "--lr", 1e30) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and "log-probs are NaN" in message and "lower --lr" in message
    assert whole_steps(tmp_path / "out") == ["step_0000001"]


def test_a_reward_model_that_talks_garbage_is_named(world, tmp_path, monkeypatch, capsys):
    """Guards: 300 steps without a reward, and nothing said but a number among others."""
    model = world[1].parent / "model"
    flags = [*world[0], "--out", tmp_path / "out", "--reward", "process_aware", "--prm", model, "--steps", 1]
    assert train(monkeypatch, *flags, "--prm_max_new_tokens", 8) == 0
    assert "warning: step 1: not one of 6 judgements has a verdict" in capsys.readouterr().out
    (record,) = read_metrics(tmp_path / "out")[1:]
    assert record["reward/unparsed"] == 1 and record["reward/mean"] == 0


def test_rollouts_are_dumped(judged, tmp_path, monkeypatch, capsys):
    """Guards: text that isn't that of the trained tokens; a prompt, a reward, an advantage or a judgement of another
    response; advantages of tokens that aren't those of the update."""
    flags = [*judged, "--reward", "global_step", "--min_steps", 1, "--prm_kind", "prm"]
    flags += ["--temperature", 1.5, "--out", tmp_path / "out"]
    assert train(monkeypatch, *flags, "--dump_rollouts") == 0
    assert "warning" not in capsys.readouterr().out
    files = sorted((tmp_path / "out" / "rollouts").iterdir())
    assert [path.name for path in files] == ["step_0000001.jsonl", "step_0000002.jsonl"]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    problems = {p["id"]: p["problem"] for p in records.read(TINY / "problems.jsonl", ["id", "problem"])}
    spread = 0
    for path, metrics in zip(files, read_metrics(tmp_path / "out")[1:], strict=True):
        responses = [json.loads(line) for line in path.read_text().splitlines()]
        assert [r["problem_id"] for r in responses[::2]] == [r["problem_id"] for r in responses[1::2]]
        for r in responses:
            assert r.keys() == {
                "problem_id", "prompt", "text", "ids", "finish", "valid", "reward", "advantage", "token_advantages",
                "judgement",
            }  # fmt: skip
            assert r["prompt"] == render_chat(tokenizer, SOLVE_PROMPT.format(problem=problems[r["problem_id"]]))
            assert tokenizer.decode(r["ids"], skip_special_tokens=True) == r["text"]
            assert (r["ids"][-1] == tokenizer.eos_token_id) == (r["finish"] == "stop")
            assert (r["judgement"] is not None) == r["valid"] == format_valid(r["text"])
            assert r["reward"] == float(r["valid"] and r["judgement"]["verdict"] is True)
        assert sum(r["reward"] for r in responses) / len(responses) == pytest.approx(metrics["reward/mean"])
        advantages = grpo.group_advantages(torch.tensor([r["reward"] for r in responses]), 2)
        assert [r["advantage"] for r in responses] == pytest.approx(advantages.tolist())
        for r in responses:  # 0.8 A behind the last step, where A_step has ended; A without judged steps
            of_steps = bool(r["judgement"] and r["judgement"]["step_verdicts"])
            assert len(r["token_advantages"]) == len(r["ids"])
            assert r["token_advantages"][-1] == pytest.approx(r["advantage"] * (0.8 if of_steps else 1))
            spread += of_steps and r["advantage"] != 0
    assert spread
    problem_id = responses[0]["problem_id"]
    label = {"id": f"{problem_id}/0", "problem": "How many?", "steps": ["1+1=2", "2+2=5"], "answer": "5"}
    label |= {"method": "step_consistency", "step_labels": [True, False], "outcome": False, "text": "The text."}
    write_jsonl(tmp_path / "labels.jsonl", [label | {"votes": [[3, 0], [1, 2]], "dropped": None}])
    flags = ["--labels", tmp_path / "labels.jsonl", "--rollouts", tmp_path / "out" / "rollouts"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "show", problem_id, *map(str, flags)])
    capsys.readouterr()
    evaluate.main()
    shown = capsys.readouterr().out
    assert shown.startswith("How many?\n\n--- ") and "Step 2: 2+2=5   [1 correct, 2 incorrect]" in shown
    assert "The text." in shown and "GRPO step 2\n" in shown
    for r in responses[:2]:
        assert report.printable(r["text"]) in shown
        assert f"reward {r['reward']:.2f}, advantage {r['advantage']:+.2f}" in shown
