"""Stage II: training examples, the packed loss, FSDP2 and checkpoints, on a random model of two layers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import train_prm
from data import records
from generate import Engine, format_valid, render_response, render_steps
from kernels import distributed
from kernels.chat import encode_chat, escape_special_tokens, render_chat
from kernels.distributed import InputError, RunError
from kernels.transformer import Config, Transformer, load_model, save_model
from train_prm import REWARD_MODELS, step_end_positions, yes_no_ids

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "tiny"
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip


def make_model(path: Path, seed: int = 0) -> Path:
    """A random model with the tiny world's tokenizer; returns its directory."""
    torch.manual_seed(seed)
    model = Transformer(Config.from_dict({**SHAPE, "vocab_size": len(AutoTokenizer.from_pretrained(TINY))}))
    torch.nn.init.normal_(model.head, std=0.3)  # logits far enough from uniform that temperature matters
    save_model(model, path, TINY)
    return path


def make_label(i: int, **changes) -> dict:
    """Label i: 2 to 4 steps, the last of them wrong for every third i."""
    steps = [f"{i}+{k}={i + k}" for k in range(1, 3 + i % 3)]
    step_labels = [True] * (len(steps) - 1) + [i % 3 != 0]
    judged = zip(steps, step_labels, strict=True)
    sections = [
        f"## Step {k}: add\n{s}\n**This step is {'correct' if c else 'incorrect'}.**"
        for k, (s, c) in enumerate(judged, 1)
    ]
    verdict = f"**Verification: Is the answer correct (Yes/No)? {'Yes' if i % 3 else 'No'}**"
    label = {
        "id": f"t{i}/0",
        "problem": f"Mia has {i} pens. How many now?",
        "steps": steps,
        "answer": str(i + len(steps)),
    }
    label |= {
        "step_labels": step_labels,
        "outcome": i % 3 != 0,
        "text": "\n".join([*sections, verdict]),
        "dropped": None,
    }
    return label | changes


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_metrics(out: Path) -> list[dict]:
    """metrics.jsonl without the keys that measure time."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith("time/")} for record in records]


def run_main(monkeypatch, stage, *flags: object) -> None:
    """The stage's main with these flags, in this process."""
    monkeypatch.setattr(sys, "argv", [stage.__name__, *map(str, flags)])
    stage.main()


def torchrun(script: str, *flags: object) -> None:
    """A stage on two gloo ranks; `timeout` ends them all if a collective hangs, which subprocess's own would not."""
    command = ["timeout", "500", sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc_per_node", "2", ROOT / script, *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# --------------------------------------------------------------------------- examples and batches


def test_targets_are_found_by_position():
    """Guards: an end-of-turn token masked because it equals the padding token; prompt tokens trained on."""
    end = 2  # the padding token as well, and it occurs in a prompt and inside a response
    ids, lengths, targets = train_prm.pack(
        [train_prm.targets_after_prompt([end, 5, end], [7, end]), train_prm.targets_after_prompt([4], [end])],
        torch.device("cpu"),
    )
    assert ids.tolist() == [end, 5, end, 7, end, 4, end] and lengths.tolist() == [5, 2]
    assert targets.tolist() == [-1, -1, 7, end, -1, end, -1]


def test_examples_of_each_kind():
    """Guards: a kind trained on another kind's prompt or on text its own parser rejects; thinking left in the target;
    dropped or wrong solutions becoming examples; the end-of-turn token missing; a policy taught a format that GRPO
    gives nothing for."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    right, wrong = make_label(1), make_label(3)
    drafts = "<think>**This step is incorrect.**</think>\n\n" + right["text"]
    labels = [
        right,
        wrong,
        make_label(4, text=drafts),
        make_label(5, dropped="no_match", text=None),
        make_label(7, answer=None),
    ]
    for kind in ("orm", "prm", "prm_cot"):
        model = REWARD_MODELS[kind]
        sequences, counts = train_prm.encode_labels(kind, labels, tokenizer, tokenizer.eos_token_id, 1000)
        kept = [labels[i] for i in (0, 1, 2, 4)]
        assert counts == {"dropped": 1, "unused": 0, "too_long": 0}
        for (ids, targets), label in zip(sequences, kept, strict=True):
            start = targets.count(-1)
            assert targets == [-1] * (start - 1) + ids[start:] + [-1]
            shown = model.prompt.format(
                problem=label["problem"], solution=render_steps(label["steps"], label["answer"])
            )
            assert ids[:start] == encode_chat(tokenizer, shown)
            assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[start:-1]
            parsed = model.parse(tokenizer.decode(ids[start:-1]), len(label["steps"]))
            assert parsed.verdict is label["outcome"]
            assert parsed.step_verdicts == (None if kind == "orm" else label["step_labels"])
    assert train_prm.training_texts("orm", right)[1] == "Yes" and train_prm.training_texts("orm", wrong)[1] == "No"
    assert train_prm.training_texts("prm_cot", labels[2])[1] == right["text"]
    sequences, counts = train_prm.encode_labels("policy", labels, tokenizer, tokenizer.eos_token_id, 1000)
    responses = [tokenizer.decode(targets[targets.count(-1) - 1 : -2]) for _, targets in sequences]
    assert responses == [render_response(label["steps"], label["answer"]) for label in (right, labels[2])]
    assert counts == {"dropped": 1, "unused": 2, "too_long": 0}  # unused: judged wrong, and without an answer
    boxed = make_label(1, steps=["1+1=2", r"so it is $\boxed{\frac{4}{2}}$"], answer=r"\frac{4}{2}")
    _, response = train_prm.training_texts("policy", boxed)
    assert response == render_response(["1+1=2", r"so it is $\frac{4}{2}$"], r"\frac{4}{2}")
    assert format_valid(response, "strict") and all(format_valid(text, "strict") for text in responses)
    assert train_prm.training_texts("policy", make_label(1, steps=["a <answer> in", "b"])) is None
    longest = max(len(ids) for ids, _ in sequences)
    assert train_prm.encode_labels("policy", labels, tokenizer, 0, longest - 1)[1]["too_long"] > 0


def test_the_discriminative_prm_is_trained_where_it_is_read():
    """Guards: labels on the wrong tokens, the outcome among the steps, other tokens trained on."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    label = {**make_label(3), "step_labels": [True, False], "outcome": False}
    label["steps"] = label["steps"][:2]
    ((ids, targets),) = train_prm.encode_labels("disc_prm", [label], tokenizer, tokenizer.eos_token_id, 1000)[0]
    yes, no = yes_no_ids(tokenizer)
    marked, ends = step_end_positions(tokenizer, label)
    assert ids == marked and [targets[end] for end in ends] == [yes, no, no]
    assert len(targets) == len(ids) and targets.count(-1) == len(ids) - 3


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize("opening", ["", "<think>", "<think>\n", "<think>\n\n</think>\n\n"])
def test_what_a_model_is_trained_to_say_parses_as_it_is_decoded(opening, is_special):
    """Guards: targets inside the thought that a chat template opens, which no parser reads; a policy that is taught a
    second <think>."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    if is_special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n" + opening)
    assert render_chat(tokenizer, "").endswith(f"assistant\n{opening}")
    engine = Engine(None, tokenizer, [])
    for label in (make_label(1), make_label(3, text="<think>drafts</think>\n" + make_label(3)["text"])):
        for kind in ("orm", "prm", "prm_cot"):
            ids, targets = train_prm.encode_example(kind, label, tokenizer, tokenizer.eos_token_id)
            start = targets.count(-1)
            text = engine.text(ids[start:], ids[:start])
            parsed = REWARD_MODELS[kind].parse(text, len(label["steps"]))
            assert parsed.verdict is label["outcome"], (kind, text)
            assert parsed.step_verdicts == (None if kind == "orm" else label["step_labels"])
    ids, targets = train_prm.encode_example("policy", make_label(1), tokenizer, tokenizer.eos_token_id)
    start = targets.count(-1)
    assert format_valid(engine.text(ids[start:], ids[:start]), "strict")


def test_tags_that_steps_brought_along_are_not_taught():
    """Guards: policy examples of nested tags, for which GRPO gives nothing under `strict`."""
    for steps, kept in (
        (["<step>2+3=5", "<step>10"], ["2+3=5", "10"]),
        (['<step id="1">2+3=5</step>'], ["2+3=5"]),
        (["<think>2+3=5", "</step>", "10</think>"], ["2+3=5", "10"]),
        (["2 < 3 <steps> 4"], ["2 < 3 <steps> 4"]),
        (["<Step>a</Step>", "<steps>b</steps>"], ["a", "b"]),
    ):
        _, response = train_prm.training_texts("policy", make_label(1, steps=steps))
        assert response == render_response(kept, make_label(1)["answer"]) and format_valid(response, "strict")
    for steps in (["<step>", "</step>"], ["a </answer>"], ["..."]):
        assert train_prm.training_texts("policy", make_label(1, steps=steps)) is None


def test_steps_end_where_their_prefixes_do():
    """Guards: an end of a step that is found otherwise than by rendering the steps up to it, which takes quadratic time:
    10,000 steps took 27 s; boxes, too."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    solution = {
        "problem": "Step 1: a\nP",
        "steps": ["a\nb", "<|im_end|>", "\nc <|im_start|>\r\n\n", "d"],
        "answer": "1\n2",
    }
    for answer in ("1\n2", None):
        ids, ends = step_end_positions(tokenizer, solution | {"answer": answer})
        for k, end in enumerate(ends[:-1], 1):
            shown = escape_special_tokens(tokenizer, render_steps(solution["steps"][:k]))
            before, after = tokenizer.decode(ids[:end]), tokenizer.decode(ids[: end + 1])
            assert len(before.partition("Solution: ")[2]) < len(shown) <= len(after.partition("Solution: ")[2])
    many = {"problem": "P", "steps": ["1+1=2"] * 10_000, "answer": "2"}
    boxed = make_label(1, steps=[r"\boxed{1} " * 10_000])
    started = time.process_time()
    step_end_positions(tokenizer, many)
    train_prm.write_policy_target(boxed)
    assert time.process_time() - started < 3


@pytest.mark.parametrize("kind", train_prm.KINDS)
def test_labels_that_do_not_fit_their_solution_are_refused(world, monkeypatch, tmp_path, kind):
    """Guards: targets made from truth values ("No", -1, "+"), from lists of another length than the steps, or from null;
    a label refused for a field that its kind isn't trained on."""
    _, flags = world
    labels = tmp_path / "labels.jsonl"
    flags = [*flags, "--labels", labels, "--kind", kind, "--out", tmp_path / "out"]
    unsound = {
        "step_labels": ([True], [], [True] * 4, [1, 1, -1], ["+", "+", "-"], ["correct"] * 3, 5, None),
        "outcome": ("No", "incorrect", -1, 1, "+", [], None),
        "text": (5, [], None),
    }
    for field, values in unsound.items():
        for value in values:
            write_jsonl(labels, [make_label(0), make_label(1, **{field: value})])
            if field in train_prm.SOURCES[kind]:
                with pytest.raises(InputError, match=rf"labels.jsonl:2: .*{field}"):
                    run_main(monkeypatch, train_prm, *flags)
    nothing = {"step_labels": None, "outcome": None, "text": None}
    needed = {field: make_label(1)[field] for field in train_prm.SOURCES[kind]}
    write_jsonl(labels, [make_label(1, **nothing | needed), make_label(2, **nothing, dropped="no_votes")])
    run_main(monkeypatch, train_prm, *flags, "--epochs", 1, "--eval_fraction", 0)


def test_evaluation_problems_are_not_trained_on():
    """Guards: solutions of one problem on both sides of the split."""
    labels = [make_label(i % 10, id=f"{i}") for i in range(40)]
    training, evaluation = train_prm.split_by_problem(labels, 0.3)
    assert len(training) + len(evaluation) == 40 and len(evaluation) == 12
    assert not {x["problem"] for x in training} & {x["problem"] for x in evaluation}


def test_a_batch_is_shared_out_as_its_picture_says(monkeypatch):
    """Guards: an example that two ranks have or none; a micro-batch too large; ranks with other numbers of
    micro-batches."""
    lengths = [5, 2, 9, 4, 3]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "max_over_ranks", lambda value: 2)
    for rank, groups in ((0, [[1, 3], [2]]), (1, [[4, 0], []])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert train_prm.split_micro_batches(lengths, 8) == groups
    assert train_prm.group_by_length({0: 9, 1: 2, 2: 4}, 8) == [[1, 2], [0]]


def test_loss_and_gradient_do_not_depend_on_the_split(tmp_path):
    """Guards: means of micro-batch means; the last micro-batch logged as the loss; targets shifted by one."""
    model = load_model(make_model(tmp_path / "model"))
    responses = [([3 + i] * (2 + i % 2), list(range(10 * i, 12 * i + 2))) for i in range(1, 7)]
    sequences = [train_prm.targets_after_prompt(*pair) for pair in responses]
    nll = []
    for prompt, response in responses:
        ids, start = prompt + response, len(prompt)
        logits = model(torch.tensor([ids]))[0] @ model.head.T
        nll.append(-logits[start - 1 : -1].log_softmax(-1)[range(len(ids) - start), ids[start:]])
    wanted = torch.cat(nll).mean()
    wanted.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    for micro_tokens in (1, 30, 10**6):
        model.zero_grad()
        loss = train_prm.sft_batch_loss(model, sequences, micro_tokens, train=True)
        assert loss == pytest.approx(wanted.item(), abs=1e-6)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, gradient[name], atol=1e-6, rtol=1e-4, msg=f"{name}, {micro_tokens}")
    assert train_prm.sft_batch_loss(model, sequences, 30, train=False) == pytest.approx(wanted.item(), abs=1e-6)


# --------------------------------------------------------------------------- the loop and its checkpoints


@pytest.fixture(scope="module", autouse=True)
def signals_as_found():
    """A training sets handlers of its own; here pytest goes on after it."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run that nobody interrupted: 3 epochs of 3 batches, the last one of a single sequence. What is held out is
    unlike the rest, so that the loss on it soon rises again."""
    root = tmp_path_factory.mktemp("sft")
    labels = [make_label(i) for i in range(12)]
    for label in train_prm.split_by_problem(labels, 0.25)[1]:
        label["text"] = "Verdict none"
    labels = write_jsonl(root / "labels.jsonl", labels)
    flags = ["--model", make_model(root / "model"), "--labels", labels, "--epochs", 3, "--batch_size", 4]
    flags += ["--lr", 3e-3, "--eval_fraction", 0.25, "--save_every", 2, "--micro_tokens", 250, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(monkeypatch, train_prm, *flags, "--out", root / "whole")
    return root, flags


def test_export_is_a_hugging_face_directory(world):
    """Guards: weights that transformers can't load or reads otherwise; an export that isn't the model of the best
    evaluation, or that removes the metrics and checkpoints beside it."""
    out = world[0] / "whole"
    ids = torch.tensor([[5, 300, 17, 80, 41]])
    ours = load_model(out)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)
        assert theirs.dtype == torch.float32
        torch.testing.assert_close(ours(ids) @ ours.head.T, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out)
    labels = [json.loads(line) for line in (world[0] / "labels.jsonl").read_text().splitlines()]
    _, held = train_prm.split_by_problem(labels, 0.25)
    sequences, _ = train_prm.encode_labels("prm_cot", held, tokenizer, tokenizer.eos_token_id, 8192)
    losses = [record["eval/loss"] for record in read_metrics(out) if "eval/loss" in record]
    assert len(losses) == 5 and losses[0] > losses[2] == min(losses)
    assert train_prm.sft_batch_loss(ours, sequences, 1000, train=False) == pytest.approx(min(losses), abs=1e-5)
    assert [record["step"] for record in read_metrics(out)] == list(range(1, 10))
    assert [path.name for path in sorted((out / "training").iterdir())] == ["step_0000008", "step_0000009"]


@pytest.mark.parametrize("interruption", ["killed while saving", "torn checkpoint", "gradient not a number"])
def test_resume_equals_uninterrupted(world, monkeypatch, tmp_path, interruption):
    """Guards: an optimizer saved but not loaded; a batch seen twice; an unfinished checkpoint taken for a whole one;
    metrics of lost steps left in the file; the best evaluation forgotten; a gradient that isn't a number reaching
    weights or checkpoint."""
    root, flags = world
    out = tmp_path / "out"
    if interruption == "gradient not a number":
        spoilt = iter([False] * 7 + [True])
        real = train_prm.sft_batch_loss

        def sft_batch_loss(model, *rest, train):
            loss = real(model, *rest, train=train)
            if train and next(spoilt):
                model.head.grad[0, 0] = float("nan")
            return loss

        with monkeypatch.context() as patch, pytest.raises(RunError, match=r"gradient.*nan.*checkpoint is intact"):
            patch.setattr(train_prm, "sft_batch_loss", sft_batch_loss)
            run_main(patch, train_prm, *flags, "--out", out)
    else:
        saves = iter([False] * 3 + [True])
        real_save = torch.distributed.checkpoint.save

        def save(*arguments, checkpoint_id, **settings):
            killed = next(saves)
            real_save(*arguments, checkpoint_id=checkpoint_id, **settings)
            if killed:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(torch.distributed.checkpoint, "save", save)
            run_main(patch, train_prm, *flags, "--out", out)
        assert read_metrics(out)[-1]["step"] == 8  # of a step whose checkpoint doesn't exist
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 9, "train/lo')
        if interruption == "torn checkpoint":
            (out / "training" / ".step_0000008").rename(out / "training" / "step_0000008")
            (out / "training" / "step_0000008" / ".metadata").unlink()
    resumed_at = []
    real_batch = train_prm.batch_for_step
    monkeypatch.setattr(
        train_prm, "batch_for_step", lambda step, *rest: resumed_at.append(step) or real_batch(step, *rest)
    )
    run_main(monkeypatch, train_prm, *flags, "--out", out)
    assert resumed_at == [6, 7, 8]
    assert read_metrics(out) == read_metrics(root / "whole")
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, root / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("stopped_in", [3, 6])  # step 4 is evaluated anyway; step 7 is not, and step 6 was the best
def test_a_signal_ends_the_step_and_saves(world, monkeypatch, tmp_path, stopped_in):
    """Guards: up to --save_every steps lost to a scheduler's signal; an unplanned evaluation, which chooses another
    model than the run that nobody interrupted; a step that wasn't evaluated exported in place of the best."""
    root, flags = world
    real = train_prm.batch_for_step

    def batch_for_step(step, *rest):
        if step == stopped_in:
            signal.raise_signal(signal.SIGUSR1)
        return real(step, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train_prm, "batch_for_step", batch_for_step)
        run_main(patch, train_prm, *flags, "--out", tmp_path / "out")
    assert end.value.code == 143 and (tmp_path / "out" / "training" / f"step_{stopped_in + 1:07}").exists()
    run_main(monkeypatch, train_prm, *flags, "--out", tmp_path / "out")
    assert read_metrics(tmp_path / "out") == read_metrics(root / "whole")
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", root / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("eval_fraction", [0.25, 0])
def test_a_copy_that_cannot_be_exported_costs_no_step(world, monkeypatch, tmp_path, eval_fraction):
    """Guards: an export that fails before what resumes is saved; a run that resumes behind its last step, and the best
    model is never written."""
    _, flags = world
    out = tmp_path / "out"
    flags = [*flags, "--eval_fraction", eval_fraction, "--save_every", 100, "--out", out]

    def export(*_) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(distributed, "export", export)
        run_main(patch, train_prm, *flags)
    assert not (out / "model.safetensors").exists()
    run_main(monkeypatch, train_prm, *flags)
    assert (out / "model.safetensors").exists() and len(list((out / "training").iterdir())) == 1


def test_other_arguments_are_refused_on_resume(world, monkeypatch):
    """Guards: a run continued with other numbers or other labels than it was begun with; a ZeroDivisionError."""
    root, flags = world
    with pytest.raises(InputError, match=r"--batch_size 0: it must be at least 1"):
        run_main(monkeypatch, train_prm, *flags, "--out", root / "whole", "--batch_size", 0)
    for flag, value, limits in (("--lr", -1, "at least 0"), ("--eval_fraction", -0.05, "from 0 to 0.9")):
        with pytest.raises(InputError, match=rf"{flag} {value}.*: it must be {limits}"):
            run_main(monkeypatch, train_prm, *flags, "--out", root / "whole", flag, value)
    with pytest.raises(InputError, match=r"--seed 0, this run has --seed 1"):
        run_main(monkeypatch, train_prm, *flags, "--out", root / "whole", "--seed", 1)
    before = (root / "whole" / "metrics.jsonl").read_text()
    run_main(monkeypatch, train_prm, *flags, "--out", root / "whole", "--micro_tokens", 9)  # this may change
    assert (root / "whole" / "metrics.jsonl").read_text() == before
    labels = Path(flags[flags.index("--labels") + 1])
    real = records.hash_file
    monkeypatch.setattr(records, "hash_file", lambda path: real(path) if path != str(labels) else "other")
    with pytest.raises(InputError, match=r"the contents of --labels have changed; choose another --out"):
        run_main(monkeypatch, train_prm, *flags, "--out", root / "whole")


def test_constants_that_were_flags_are_compared_on_resume(world, monkeypatch):
    """Guards: a run begun with another warm-up that goes on with the constant; a run refused because a flag is gone;
    constants missing in args.json."""
    root, flags = world
    path = root / "whole/args.json"
    written = path.read_text()
    now = json.loads(written)
    assert now["constants"] == {"warmup": 0.03, "weight_decay": 0.0, "max_grad_norm": 1.0}
    before = {name: value for name, value in now.items() if name != "constants"}
    try:
        path.write_text(json.dumps(before | {"arguments": now["arguments"] | now["constants"] | {"gone": 1}}))
        run_main(monkeypatch, train_prm, *flags, "--out", root / "whole")
        path.write_text(json.dumps(before | {"arguments": now["arguments"] | now["constants"] | {"warmup": 0.1}}))
        with pytest.raises(InputError, match=r"made with --warmup 0.1, this run has --warmup 0.03"):
            run_main(monkeypatch, train_prm, *flags, "--out", root / "whole")
    finally:
        path.write_text(written)


@pytest.mark.parametrize("eval_fraction", [0.25, 0])
def test_a_run_that_diverged_in_its_last_step_says_so(world, monkeypatch, tmp_path, eval_fraction):
    """Guards: "done", status 0, an evaluation that is nan, and no model, or one of no use."""
    _, flags = world
    out = tmp_path / "out"
    changes = ["--lr", 1e30, "--epochs", 1, "--batch_size", 12, "--eval_fraction", eval_fraction, "--out", out]
    with pytest.raises(RunError, match=r"evaluation loss is (nan|inf); .* lower --lr"):
        run_main(monkeypatch, train_prm, *flags, *changes)
    assert not (out / "model.safetensors").exists() and not (out / "training").exists()


def test_an_example_longer_than_the_context_is_left_out(world, monkeypatch, tmp_path):
    """Guards: training at positions that the model doesn't have, because --max_length alone was looked at; an input that
    is overwritten."""
    root, flags = world
    model = shutil.copytree(root / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    with pytest.raises(InputError, match=r"no usable label for --kind prm .*'too_long': 9"):
        run_main(monkeypatch, train_prm, *flags, "--model", model, "--kind", "prm", "--out", tmp_path / "out")
    (tmp_path / "link").symlink_to(model)
    for name in (f"{model}/", tmp_path / "link", tmp_path / "model" / ".." / "model"):
        with pytest.raises(InputError, match="is --model itself, which would be overwritten"):
            run_main(monkeypatch, train_prm, *flags, "--model", model, "--out", name)


def test_two_ranks_train_as_one(world):
    """Guards: a token count per rank, an averaged gradient, sharded weights in the export, a rank without sequences
    that misses a collective (the last batch has one sequence, and the ranks' micro-batches differ in number),
    recomputed activations that differ."""
    root, flags = world
    torchrun("train_prm.py", *flags, "--out", root / "ranks", "--activation_checkpointing")
    for one, two in zip(read_metrics(root / "whole"), read_metrics(root / "ranks"), strict=True):
        assert one == pytest.approx(two, abs=1e-5), one["step"]
    one, two = (load_file(root / name / "model.safetensors") for name in ("whole", "ranks"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], atol=1e-4, rtol=0, msg=name)


def test_ranks_of_a_cpu_stay_on_the_cpu(world, monkeypatch):
    """Guards: FSDP choosing its device by what PyTorch was built for, so that ranks on the CPU end with CUDA's error
    (or meet on one GPU) wherever pip has installed a CUDA build, as it does on Linux."""
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)  # a single one isn't sharded
    model = train_prm.open_model(str(world[0] / "model"), torch.device("cpu"), torch.float32)[0]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = distributed.prepare_training(model, False)
        assert {p.device_mesh.device_type for p in sharded.parameters()} == {"cpu"}
    finally:
        torch.distributed.destroy_process_group()


def test_small_steps_change_the_weights(world, monkeypatch, tmp_path):
    """Guards: weights trained in bf16, of which a step of 1e-6 changes one in fifty."""
    root, flags = world
    changes = ["--lr", 1e-6, "--epochs", 1, "--batch_size", 12, "--out", tmp_path / "out"]
    run_main(monkeypatch, train_prm, *flags, *changes)
    before, after = (load_file(path / "model.safetensors") for path in (root / "model", tmp_path / "out"))
    changed = sum((before[name] != after[name]).sum().item() for name in before)
    assert changed > 0.95 * sum(weight.numel() for weight in before.values())
