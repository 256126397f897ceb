"""The paper's ledger (data/results/paper.md and the commands in data/results/paper/): its rows, its arithmetic, and,
marked slow, every command on small stand-ins. The commands are what bash makes of the shell files, with `python` and
`torchrun` replaced by functions that write their arguments down."""

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import grpo
import verify
from data import prepare
from data.results import paper
from generate import SOLVE_PROMPT, open_tokenizer
from kernels.chat import encode_chat
from kernels.sampler import slots_that_fit
from kernels.transformer import Config, Transformer, save_model
from tests.bench_memory import GIB, H100, H200, LIBRARIES, MODELS, grpo_memory, kept_per_token, parameters

import pytest
import torch
from test_generate import PROCESSES
from test_prepare import FILES as SETS
from test_prepare import SHARED as PUBLIC
from test_project import anchor
from test_real_tokenizers import SHARED, copy_tokenizer
from test_train_prm import make_label, write_jsonl
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "data" / "results" / "paper"
FILES = ["data", "stage1", "stage2", "processbench", "grpo", "benchmarks", "hacking"]
METHODS = list(paper.METHODS)
BENCHMARKS = ["math500", "aime24", "aime25", "amc23", "olympiadbench", "minerva"]
PREPARED = [f"data.prepare {name}" for name in ["skywork", *BENCHMARKS, "processbench"]]  # downloads
POLICIES = ["orm", "prm", "prm_cot", "step_augmented", "step_augmented_prm", "selective_advantage", "selective_half"]
POLICIES += ["global_step", "majority", "random", "rlvr"]
RUNS = "runs/paper"

# --------------------------------------------------------------------------- the commands, as bash runs them

STUBS = r"""
record() {
  printf '%s\t' "$0" "${BASH_LINENO[${#BASH_LINENO[@]} - 2]}" "$@" >> "$RECORD"
  printf '\n' >> "$RECORD"
}
python() { record python "$@"; }
torchrun() { record torchrun "$@"; }
"""


class Command(NamedTuple):
    """A command of a shell file: processes is the number that torchrun starts, 0 without it."""

    file: str
    line: int
    processes: int
    script: str  # grpo.py, or data.audit after -m
    words: list[str]  # behind it

    @property
    def name(self) -> str:
        """grpo, evaluate processbench, data.audit."""
        more = self.words[:1] if self.script in ("evaluate.py", "data.prepare") else []
        return " ".join([self.script.removesuffix(".py"), *more])

    @property
    def flags(self) -> dict[str, list[str]]:
        """flag -> its values; of a flag that is given twice, the last, as argparse has it."""
        found: dict[str, list[str]] = {}
        flag = None
        for word in self.words:
            if word.startswith("--"):
                flag = word
                found[flag] = []
            elif flag:
                found[flag].append(word)
        return found

    def number(self, flag: str) -> int:
        return int(self.flags[flag][0])


def record_commands(tree: Path, file: str) -> list[Command]:
    """The commands of a shell file, run by bash in a tree of directories that has copies of the shell files."""
    shutil.copytree(PAPER, tree / "data/results/paper", dirs_exist_ok=True)
    (tree / "stubs.sh").write_text(STUBS)
    for name in [*METHODS, "policy"]:  # which training would make
        (tree / RUNS / name).mkdir(parents=True, exist_ok=True)
    output = tree / f"{file}.txt"
    output.write_text("")
    environment = os.environ | {"BASH_ENV": str(tree / "stubs.sh"), "RECORD": str(output)}
    environment.pop("METHODS", None)
    script = tree / f"data/results/paper/{file}.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    commands = []
    for record in output.read_text().splitlines():
        _, line, program, *words = record.removesuffix("\t").split("\t")
        processes = 0
        if program == "torchrun":
            assert words[0] == "--nproc_per_node"
            processes = int(words[1])
            words = words[2:]
        if words[0] == "-m":
            words = words[1:]
        commands.append(Command(file, int(line), processes, words[0], words[1:]))
    return commands


def write_inputs(root: Path) -> None:
    """A handful of everything that a command reads, but for the models."""
    labels = [make_label(i) for i in range(4)]
    problems = [{"id": f"t{i}", "problem": label["problem"]} for i, label in enumerate(labels)]
    labels.append(make_label(0, id="t0/1", answer="9"))  # so that a problem has a right answer and a wrong one
    solutions = [{**label, "problem_id": label["id"].split("/")[0]} for label in labels]
    verifications = [
        {"id": f"{x['id']}/{j}", "solution_id": x["id"], "sample": j, "text": x["text"], "tokens": 40}
        for x in labels
        for j in range(2)
    ]
    verdicts = {x["id"]: {"step_verdicts": x["step_labels"], "verdict": x["outcome"]} for x in labels}
    verifications = [{**v, **verdicts[v["solution_id"]], "finish": "stop"} for v in verifications]
    cases = []
    for x in labels:
        wrong = -1 if x["outcome"] else len(x["steps"]) - 1
        cases.append({"id": x["id"], "problem": x["problem"], "steps": x["steps"], "label": wrong,
                      "generator": "g", "final_answer_correct": x["outcome"]})  # fmt: skip
    rollouts = []
    for x in labels[:4]:
        text = f"<think><step>{x['steps'][0]}</step></think><answer>\\boxed{{{x['answer']}}}</answer>"
        rollouts.append({"problem_id": x["id"].split("/")[0], "text": text, "reward": 1.0})
    metrics = [{"step": step, "reward/mean": 0.5, "heldout/accuracy": 0.5, "response/steps": 3} for step in (1, 2)]

    files = {f"data/train/{name}.jsonl": problems for name in ("skywork", "clean", "problems", "labelled", "rl")}
    files["data/train/gold/skywork.jsonl"] = [{"id": f"t{i}", "answer": "9"} for i in range(4)]
    for name in BENCHMARKS:
        files[f"data/benchmarks/{name}.jsonl"] = [
            {"id": f"{name}/{i}", "problem": f"What is {i} + {i}?"} for i in range(2)
        ]
        files[f"data/benchmarks/gold/{name}.jsonl"] = [{"id": f"{name}/{i}", "answer": "9"} for i in range(2)]
    for name in ("gsm8k", "math", "olympiadbench", "omnimath"):
        files[f"data/benchmarks/processbench/{name}.jsonl"] = cases
    files[f"{RUNS}/solutions.jsonl"] = solutions
    files[f"{RUNS}/verify/verifications.jsonl"] = verifications
    for method in METHODS:
        files[f"{RUNS}/verify/labels_{method}.jsonl"] = [{**x, "method": method} for x in labels]
    for run in [*(f"grpo/{name}" for name in POLICIES), "hacking/appending", "hacking/reduction_selective",
                "hacking/reduction_global"]:  # fmt: skip
        files[f"{RUNS}/{run}/metrics.jsonl"] = metrics
    files[f"{RUNS}/hacking/appending/rollouts/step_0000010.jsonl"] = rollouts
    for path, records in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(root / path, records)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with all inputs."""
    root = tmp_path_factory.mktemp("world")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def commands(world) -> list[Command]:
    """All commands of all files."""
    found = [command for file in FILES for command in record_commands(world, file)]
    write_inputs(world)  # data.sh has written over some
    return found


# --------------------------------------------------------------------------- the page


def test_the_page_is_what_the_rows_give():
    """Guards: a table that is older than the rows of the studies. `python -m data.results.paper` writes it anew."""
    assert paper.ledger() == (PAPER.parent / "paper.md").read_text()


def test_the_page_leads_somewhere():
    """Guards: a row whose command is in no file, a footnote without a text, a text that no row refers to, links."""
    text = (PAPER.parent / "paper.md").read_text()
    settings = (PAPER / "settings.sh").read_text()
    rows = re.findall(r"`(\w+\.sh)`((?: `[^`]+`)+)", text)
    assert len(rows) > 40
    for file, code in rows:
        for part in re.findall(r"`([^`]+)`", code):
            assert part.removeprefix("METHODS=") in (PAPER / file).read_text() + settings, f"{file}: {part}"
    body, _, footnotes = text.partition("## What is not published")
    assert set(re.findall(r"\[\^(\w+)\]", body)) == set(re.findall(r"^\[\^(\w+)\]:", footnotes, re.M))
    for target, section in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", text):
        linked = PAPER.parent / target
        assert linked.exists(), target
        assert not section or section in map(anchor, re.findall(r"^#+ (.*)", linked.read_text(), re.M)), section


def test_numbers_of_an_earlier_world_are_marked(monkeypatch):
    """Guards: numbers of a world that is gone beside numbers of the present one, as if they could be compared."""
    page = "# Results\n\n## The claims\n\nMade on the earlier world.\n\n## Which reward\n\nNew.\n"
    marked = {study: paper.from_earlier_world(study, page) for study in paper.SECTIONS}
    assert marked == {"claims": True, "methods": False, "rewards": False, "hacking": False}
    assert paper.from_earlier_world("hacking", page.replace("# Results\n", "# Results\n\nAll of the earlier world.\n"))
    for title in paper.SECTIONS.values():
        assert f"\n## {title}\n" in (PAPER.parent / "README.md").read_text()


# --------------------------------------------------------------------------- the numbers of the commands

HYPERPARAMETERS = {  # command -> the paper's or the released code's; what is "ours" in the files is not here
    "generate": {"--num_samples": "8", "--temperature": "0.7", "--top_p": "0.95", "--max_new_tokens": "8192"},
    "verify": {"--temperature": "0.8", "--top_p": "0.95", "--max_new_tokens": "8192"},
    "grpo": {
        "--limit": "17000", "--batch_size": "256", "--group_size": "16", "--updates": "1", "--steps": "300",
        "--max_prompt_tokens": "2048", "--max_new_tokens": "2048", "--temperature": "1", "--lr": "1e-6",
        "--kl_coef": "0.001", "--clip_low": "0.2", "--clip_high": "0.2", "--prm_max_new_tokens": "4096",
        "--prm_votes": "1", "--heldout_every": "10", "--heldout_temperature": "0", "--save_every": "50",
    },
}  # fmt: skip
CONTEXTS = {"Qwen/Qwen2.5-14B-Instruct": 32_768, "Qwen/Qwen3-32B": 40_960, "Qwen/Qwen2.5-Math-7B": 4_096}
RECORDS = {  # of the full-scale files
    "data/train/labelled.jsonl": 8_000, f"{RUNS}/solutions.jsonl": 64_000, "processbench": 3_400,
    "math500": 500, "aime24": 30, "aime25": 30, "amc23": 40, "olympiadbench": 675, "minerva": 272,
}  # fmt: skip
RATE = 10_410  # tokens per second of a 7B model on an H200


def test_the_papers_numbers_are_in_the_commands(commands):
    """Guards: a hyperparameter of the paper that a command lost or changed; a batch that ranks can't share equally."""
    for command in commands:
        for flag, value in HYPERPARAMETERS.get(command.name, {}).items():
            assert command.flags[flag] == [value], f"{command.file}.sh:{command.line}: {flag}"
        if "--batch_size" in command.flags:
            assert command.number("--batch_size") % command.processes == 0
    assert {c.processes for c in commands} == {0, 8}
    assert {c.flags["--critique_temperature"][0] for c in commands if "--critique_temperature" in c.flags} == {"0"}
    bounded = [c for c in commands if c.file == "grpo" and "--min_steps" in c.flags]
    bounds = {(c.flags["--reward"][0], c.number("--min_steps"), c.number("--max_steps")) for c in bounded}
    assert bounds == {("selective_advantage", 4, 20), ("global_step", 3, 20)}


def test_each_row_has_its_command(commands):
    """Guards: a method, a kind of reward model or a reward that no command makes; two commands with one output."""
    voting = {c.flags["--method"][0]: c.number("--num_verifications") for c in commands if c.name == "verify"}
    assert set(voting) == set(verify.METHODS) == set(METHODS)
    votes = {"outcome_consistency", "step_consistency", "hybrid", "hybrid_outcome"}
    assert voting == {method: 16 if method in votes else 1 for method in METHODS}
    rewards = {c.flags["--reward"][0] for c in commands if c.name == "grpo"}
    assert rewards == set(grpo.REWARDS) - {"self_certainty"}  # which isn't the paper's
    for name in ("train_prm", "evaluate processbench"):
        made = {(c.flags["--out"][0].split("/")[2], c.flags["--kind"][0]) for c in commands if c.name == name}
        assert made - {("policy", "policy")} == {(method, kind) for method in METHODS for kind in paper.KINDS}
    outputs = [c.flags["--out"][0] for c in commands if c.name != "verify" and c.file != "data"]
    assert len(set(outputs)) == len(outputs)


def test_each_input_is_some_commands_output(commands):
    """Guards: a file that reads what no file before it writes."""
    there = {"data/train/gold/skywork.jsonl"}
    for c in commands:
        if c.name in PREPARED:
            folder, name = c.flags["--out"][0], c.words[0]
            subsets = ("gsm8k", "math", "olympiadbench", "omnimath") if name == "processbench" else ()
            there |= {f"{folder}/{name}.jsonl", f"{folder}/gold/{name}.jsonl"}
            there |= {f"{folder}/{name}/{subset}.jsonl" for subset in subsets}
            continue
        for flag, values in c.flags.items():
            for value in values:
                if flag == "--out":
                    continue
                if flag in ("--model", "--prm", "--policy") and not value.startswith("runs/"):
                    assert value in CONTEXTS
                elif re.search(r"\.jsonl$|^runs/", value):
                    assert value in there or any(value.startswith(f"{path}/") for path in there), f"{c.file}: {value}"
        there |= set(c.flags["--out"])
        if c.file == "data":  # shuf, head and tail
            there |= {f"data/train/{name}.jsonl" for name in ("problems", "labelled", "rl")}


def test_a_restart_does_what_is_left(tmp_path):
    """Guards: a loop that trains or judges again what is done, above all where training/ has been removed since."""
    for file, stamp in (("stage2", "trained"), ("processbench", "judged")):
        first = record_commands(tmp_path, file)
        assert len(first) == 3 * len(METHODS) + (file == "stage2")
        assert record_commands(tmp_path, file) == []
        (tmp_path / RUNS / "single" / stamp).unlink()
        assert record_commands(tmp_path, file) == first[:3]


def test_each_policy_is_measured(commands):
    """Guards: a policy that grpo.sh trains and no benchmark sees."""
    (benchmark,) = (c for c in commands if c.name == "evaluate benchmark")
    trained = [c.flags["--out"][0] for c in commands if c.file == "grpo" and c.name == "grpo"]
    assert {path for path in benchmark.flags["--model"] if "/grpo/" in path} == set(trained)
    assert set(trained) == {f"{RUNS}/grpo/{name}" for name in POLICIES}


def most_tokens(command: Command, verified: dict[tuple, int]) -> list[int]:
    """What a command samples at most: solutions, judgements, held-out. verified: (out, reads answers) -> verifications
    of each solution that are there; this command's are added."""
    flags, number = command.flags, command.number
    if command.name == "generate":
        return [RECORDS[flags["--problems"][0]] * number("--num_samples") * number("--max_new_tokens")]
    if command.name == "verify":
        solutions = RECORDS[flags["--solutions"][0]] * number("--max_new_tokens")
        place = (flags["--out"][0], "--answers" in flags)
        missing = max(0, number("--num_verifications") - verified.get(place, 0))
        verified[place] = verified.get(place, 0) + missing
        calls = 2 * number("--critique_rounds") if "--critique_rounds" in flags else 0
        return [solutions * (missing + calls)] if missing + calls else []
    if command.name == "evaluate processbench":
        return [RECORDS["processbench"] * number("--votes") * number("--max_new_tokens")]
    if command.name == "evaluate benchmark":
        problems = sum(RECORDS[Path(path).stem] for path in flags["--problems"])
        samples = number("--num_samples") + ("--greedy" in flags)
        return [len(flags["--model"]) * problems * samples * number("--max_new_tokens")]
    if command.name == "grpo":
        responses = number("--steps") * number("--batch_size") * number("--group_size")
        times = number("--steps") // number("--heldout_every") + 1
        problems = sum(RECORDS[Path(path).stem] for path in flags["--heldout"])
        judgement = number("--prm_votes") * number("--prm_max_new_tokens") if "--prm" in flags else 0
        judged = [responses * judgement] if judgement else []
        heldout = times * problems * (number("--max_new_tokens") + judgement)
        return [responses * number("--max_new_tokens"), *judged, heldout]
    if command.name == "data.audit":
        audited = int(HYPERPARAMETERS["grpo"]["--steps"]) // number("--every") * number("--responses")
        return [audited * number("--num_verifications") * number("--max_new_tokens")]
    return []


def tokens_comment(command: Command) -> str:
    """The comment on tokens that stands nearest above a command."""
    lines = (PAPER / f"{command.file}.sh").read_text().splitlines()
    start = max(i for i in range(command.line) if re.match(r" *# tokens", lines[i]))
    end = next(i for i in range(start, len(lines)) if not lines[i].strip().startswith("#"))
    return "\n".join(lines[start:end])


def test_the_tokens_are_what_the_flags_give(commands):
    """Guards: a cost that was worked out for other flags, a wrong product, and hours of another rate."""
    assert f"| {RATE:,} |" in (PAPER.parent / "README.md").read_text()
    verified: dict[tuple, int] = {}
    for command in commands:
        comment = tokens_comment(command)
        stated = [int(number.replace(",", "")) for number in re.findall(r" = ([\d,]*\d)", comment)]
        assert stated == most_tokens(command, verified), f"{command.file}.sh:{command.line}"
        assert stated or "tokens: none" in comment
        for terms, product in re.findall(r"(\d[^:;\n]*) = ([\d,]*\d)", comment):
            arithmetic = re.sub(r"[a-wyzA-Z]+", "", terms).replace(",", "").replace("x", "*")
            assert re.fullmatch(r"[\d*+() ]+", arithmetic) and eval(arithmetic) == int(product.replace(",", ""))
        for product, hours in re.findall(r" = ([\d,]*\d)[^=\n]*at most ([\d.]+) hours on 8 H200", comment):
            seconds = int(product.replace(",", "")) / RATE / command.processes
            assert f"{seconds / 3600:.1f}" == hours
            assert "7B" in comment


def test_problems_are_split_in_two(tmp_path):
    """Guards: problems that are labelled and trained on, or in neither of the two sets; fewer than the paper has."""
    write_inputs(tmp_path)
    lines = [f'{{"id": "{i}"}}\n' for i in range(25_010)]
    (tmp_path / "data/train/clean.jsonl").write_text("".join(lines))
    record_commands(tmp_path, "data")
    labelled, rl = ((tmp_path / f"data/train/{name}.jsonl").read_text().splitlines(True) for name in ("labelled", "rl"))
    assert len(labelled) == 8_000 and sorted(labelled + rl) == sorted(lines)
    assert labelled != lines[:8_000]


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/qwen-tokenizer is absent")
def test_contexts_are_large_enough(commands, tmp_path):
    """Guards: outputs that are cut off, or problems left out, because prompt and output don't fit into the context."""
    tokenizer, _ = open_tokenizer(copy_tokenizer("qwen2.5", tmp_path))  # but for the system's turn, as long as Math's
    solution = {"problem": "", "steps": [""], "answer": None}
    prompt = 2_048  # no problem of the paper's sets is as long
    for c in commands:
        model = c.flags.get("--model", [""])[0]
        if c.name == "generate":
            assert prompt + c.number("--max_new_tokens") <= CONTEXTS[model]
        elif c.name in ("verify", "data.audit"):  # the solution, the verification and the critique are in the prompt
            solved = 8_192 + (2 * c.number("--max_new_tokens") if "--critique_rounds" in c.flags else 0)
            turn = verify.verification_prompt(solution, c.number("--worked_examples"), "")
            fixed = len(encode_chat(tokenizer, turn)) + len(encode_chat(tokenizer, verify.MERGE_PROMPT))
            assert fixed + prompt + solved + c.number("--max_new_tokens") <= CONTEXTS[model]
        elif c.name == "train_prm":
            assert c.number("--max_length") <= CONTEXTS[model]
        elif c.name == "grpo":
            length = c.number("--max_prompt_tokens") + c.number("--max_new_tokens")
            assert length <= CONTEXTS["Qwen/Qwen2.5-Math-7B"]
            assert length + c.number("--prm_max_new_tokens") <= CONTEXTS["Qwen/Qwen2.5-14B-Instruct"]
        elif c.name == "evaluate processbench":
            assert 8_192 + c.number("--max_new_tokens") <= CONTEXTS["Qwen/Qwen2.5-14B-Instruct"]
    (benchmark,) = (c for c in commands if c.name == "evaluate benchmark")
    longest = 0
    for name in BENCHMARKS:
        problems, _ = prepare.convert(name, prepare.read_rows(PUBLIC / SETS[name][0]))
        assert len(problems) == RECORDS[name]
        turns = [SOLVE_PROMPT.format(problem=problem["problem"]) for problem in problems]
        longest = max(longest, *(len(encode_chat(tokenizer, turn)) for turn in turns))
    assert longest + benchmark.number("--max_new_tokens") <= CONTEXTS["Qwen/Qwen2.5-Math-7B"]


def test_memory_is_enough():
    """Guards: cards that a file names and that are too small; sizes in comments that were worked out for others."""
    text = {file: (PAPER / f"{file}.sh").read_text() for file in [*FILES, "settings"]}
    generator, verifier, policy = (MODELS[name] for name in ("Qwen2.5-14B", "Qwen3-32B", "Qwen2.5-7B"))
    assert "80 GB leave space for two answers at a time beside its 61 GiB of weights" in text["stage1"]
    assert round(2 * parameters(verifier) / GIB) == 61
    assert slots_that_fit(int(H100), 2 * parameters(verifier), verifier, [3_000], [8_192]) == 2
    assert slots_that_fit(int(H200), 2 * parameters(verifier), verifier, [3_000], [8_192]) > 16
    for model, prompt, limit in ((generator, 2_048, 8_192), (generator, 8_192, 4_096), (policy, 2_048, 2_048)):
        assert slots_that_fit(int(H100), 2 * parameters(model), model, [prompt], [limit]) > 8
    taken = grpo_memory(policy, generator, ranks=8, slots=32, prompt=2_048, new_tokens=2_048, judgement=4_096)
    assert f"needs {sum(taken.values()) / GIB:.0f} GiB" in text["grpo"] and sum(taken.values()) < H200
    training = 16 * parameters(generator) / 8 + 2 * 16_384 * kept_per_token(generator, True) + LIBRARIES
    assert training < H100 and "80 GB are enough for the other stages" in text["settings"]
    disk = [round(size * parameters(generator) / 1e9) for size in (12, 4)]
    assert "takes {} GB of disk (<out>/training) and its export {} GB".format(*disk) in text["stage2"]


# --------------------------------------------------------------------------- every command on stand-ins

SCALED = {  # what is made smaller, and to what; every other flag stays
    "--limit": "4", "--num_samples": "2", "--num_verifications": "2", "--batch_size": "4", "--group_size": "2",
    "--steps": "1", "--max_new_tokens": "12", "--prm_max_new_tokens": "12",
}  # fmt: skip
RANKS = 2
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
         "tie_word_embeddings": False}  # fmt: skip
STAND_INS = {  # hub name -> (architecture, tokenizer, rows of the embedding, what it always says)
    "Qwen/Qwen2.5-14B-Instruct": ("Qwen2ForCausalLM", "qwen2.5", 152_064, ["Yes"]),
    "Qwen/Qwen3-32B": ("Qwen3ForCausalLM", "qwen3", 151_936, None),
    # The second "answer" in two tokens and the last ">" by itself, so that each token has one successor.
    "Qwen/Qwen2.5-Math-7B": ("Qwen2ForCausalLM", "qwen2.5", 152_064,
                             ["So", "<", "answer", ">\\", "boxed", "{", "9", "}</", "ans", "wer", ">"]),
}  # fmt: skip


def say(network: Transformer, ids: list[int]) -> None:
    """Make a network of one layer write these tokens, each of which stands there once, whatever is before the first:
    attention and MLP add nothing, token i of the list embeds as unit vector i, and the head knows its successor."""
    assert len(set(ids)) == len(ids) <= network.head.shape[1]
    for name, parameter in network.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
            torch.nn.init.zeros_(parameter)
        if name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
    with torch.no_grad():
        for i, (token, successor) in enumerate(pairwise(ids)):
            network.model["embed_tokens"].weight[token, i] = 1
            network.head[successor, i] = 50


def write_models(world: Path) -> str:
    """Stand-ins of the same architectures and contexts under the hub's names, and links to them where commands expect
    trained models. With Qwen's tokenizers if they are at hand; returns which. The verifier has random weights; the
    policy writes a valid response, and the reward model "Yes", so that there is something to judge and to reward."""
    torch.manual_seed(0)
    for name, (architecture, tokenizer, rows, pieces) in STAND_INS.items():
        path = world / name
        path.mkdir(parents=True)
        source = copy_tokenizer(tokenizer, path) if SHARED.exists() else ROOT / "data/tiny"
        shape = {**SHAPE, "architectures": [architecture], "model_type": architecture[:5].lower()}
        shape |= {"vocab_size": rows if SHARED.exists() else 512, "max_position_embeddings": CONTEXTS[name]}
        network = Transformer(Config.from_dict(shape))
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        if pieces:
            tokenizer, stops = open_tokenizer(source)
            if not SHARED.exists():
                pieces = ["".join(pieces).strip()]  # of which the tiny world's tokenizer makes different tokens
            said = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
            say(network, [encode_chat(tokenizer, "?")[-1], *said, stops[0]])
        save_model(network, path, source)
    for trained in [f"{method}/{kind}" for method in METHODS for kind in paper.KINDS]:
        link_files(world / "Qwen/Qwen2.5-14B-Instruct", world / RUNS / trained)
    for trained in ["policy", *(f"grpo/{name}" for name in POLICIES)]:
        link_files(world / "Qwen/Qwen2.5-Math-7B", world / RUNS / trained)
    return "Qwen's tokenizers" if SHARED.exists() else "the tiny world's tokenizer: ../shared is absent"


def link_files(source: Path, target: Path) -> None:
    """Link each file of a directory."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        (target / file.name).symlink_to(file)


def scale_down(command: Command) -> tuple[list[str], list[str]]:
    """(the words of a command with smaller numbers, what was made smaller)."""
    words = list(command.words)
    changed = []
    for i, flag in enumerate(words[:-1]):
        if flag in SCALED and int(words[i + 1]) > int(SCALED[flag]):
            changed.append(f"{flag} {words[i + 1]} -> {SCALED[flag]}")
            words[i + 1] = SCALED[flag]
    if command.processes:
        changed.append(f"processes {command.processes} -> {RANKS}")
    return words, changed


def link_inputs(command: Command, world: Path, where: Path) -> None:
    """What a command reads, and nothing else, in the directory where it will run."""
    for flag, values in command.flags.items():
        for value in values:
            if flag != "--out" and (world / value).exists():
                (where / value).parent.mkdir(parents=True, exist_ok=True)
                if not (where / value).exists():
                    (where / value).symlink_to(world / value)
    if "--critique_rounds" in command.flags:  # random weights verify nothing, so there would be nothing to criticise
        path = f"{command.flags['--out'][0]}/verifications.jsonl"
        (where / path).parent.mkdir(parents=True)
        shutil.copy(world / path, where / path)


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def run_in_fork(script: str, words: list[str], where: Path, environment: dict[str, str]) -> None:
    """What `python script words` does, in the process that calls it; ends it."""
    status = 1
    try:
        signal.alarm(900)  # a collective may hang
        output = os.open(where / f"output{environment.get('RANK', '')}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(where)
        os.environ.update(environment)
        sys.argv = [script, *words]
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = 0 if end.code is None else int(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_all(jobs: list[tuple], models: list[Path]) -> None:
    """Run jobs (script, words, directory, processes) one after another, each in forks of this process, which has
    imported everything and has loaded each tokenizer once. Exit statuses are appended to status.txt."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    load = AutoTokenizer.from_pretrained
    loaded = {str(path.resolve()): load(path, trust_remote_code=False, model_max_length=sys.maxsize) for path in models}

    def from_pretrained(path, **settings):
        file = next(Path(path).glob("*.safetensors")).resolve()
        return loaded.get(str(file.parent)) or load(path, **settings)

    AutoTokenizer.from_pretrained = from_pretrained
    for script, words, where, processes in jobs:
        ranks = [{}]
        if processes:
            common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        children = []
        for environment in ranks:
            child = os.fork()
            if child == 0:
                run_in_fork(script, words, where, environment)
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        with open(where / "status.txt", "a") as file:
            print(*statuses, file=file)


@pytest.mark.slow
def test_every_command_runs(commands, world, tmp_path, capsys):
    """Guards: a command of the ledger that a reader could not run: flags that don't go together, an input in another
    form than the stage before writes it, two ranks that part ways."""
    tokenizers = write_models(world)
    jobs = []
    lines = [f"stand-ins, {tokenizers}, {RANKS} ranks for torchrun"]
    for i, command in enumerate(commands):
        if command.name in PREPARED:
            continue  # see the next test
        where = tmp_path / str(i)
        where.mkdir()
        link_inputs(command, world, where)
        words, changed = scale_down(command)
        lines.append(f"{command.file}.sh:{command.line} {command.name}: {', '.join(changed) or 'nothing scaled'}")
        jobs.append((command.script, words, where, RANKS if command.processes else 0))
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    process = PROCESSES.Process(target=run_all, args=(jobs, [world / name for name in STAND_INS]))
    process.start()
    process.join(3_000)
    process.kill()
    failures = []
    for script, words, where, processes in jobs:
        status = where / "status.txt"
        if not status.exists() or set(status.read_text().split()) != {"0"}:
            said = "\n".join(path.read_text()[-2_000:] for path in sorted(where.glob("output*.txt")))
            failures.append(f"{script} {' '.join(words)} ({processes})\n{said}")
            continue
        out = where / words[words.index("--out") + 1]
        assert out.exists(), f"{script} {' '.join(words)}"
        if script == "grpo.py":
            first, last = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            assert first["heldout/accuracy"] == last["format/valid"] == 1, out  # so it was judged, or graded
            assert last["reward/mean"] == 1 or out.name not in ("orm", "rlvr", "majority"), out
            assert (last["reward/unparsed"] < 1) == (out.name == "orm" or "--prm" not in words), (
                out
            )  # "Yes" is no PRM's
    assert not failures, f"{len(failures)} of {len(jobs)} failed:\n\n" + "\n\n".join(failures)


@pytest.mark.slow
def test_methods_share_their_verifications(commands, world, tmp_path):
    """Guards: calls of verify.py that can't follow one another in one --out, as those of stage1.sh do; verifications
    that are sampled again, or not at all; a method whose labels the comparison at the end doesn't find."""
    if not (world / "Qwen").exists():
        write_models(world)
    for path in ("Qwen/Qwen3-32B", "data/train/gold/skywork.jsonl", f"{RUNS}/solutions.jsonl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).symlink_to(world / path)
    # Random weights verify nothing: the first verification of each solution is there, so that labels have votes and
    # critics a text, and the second is missing.
    out = tmp_path / RUNS / "verify"
    out.mkdir()
    there = [json.loads(line) for line in (world / RUNS / "verify/verifications.jsonl").read_text().splitlines()]
    first = [record for record in there if record["sample"] == 0]
    write_jsonl(out / "verifications.jsonl", first)
    calls = [c for c in commands if c.file == "stage1" and c.name in ("verify", "evaluate labels")]
    assert [c.name for c in calls] == ["verify"] * len(METHODS) + ["evaluate labels"]
    jobs = [(c.script, scale_down(c)[0], tmp_path, RANKS if c.processes else 0) for c in calls]
    process = PROCESSES.Process(target=run_all, args=(jobs, [world / "Qwen/Qwen3-32B"]))
    process.start()
    process.join(1_200)
    process.kill()
    said = "\n".join(path.read_text()[-3_000:] for path in sorted(tmp_path.glob("output*.txt")))
    assert (tmp_path / "status.txt").read_text() == "0 0\n" * len(METHODS) + "0\n", said

    def read(path: Path) -> list[dict]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    solutions = {record["id"] for record in read(tmp_path / RUNS / "solutions.jsonl")}
    verified = [(r["solution_id"], r["sample"]) for r in read(out / "verifications.jsonl")]
    assert len(verified) == len(set(verified)) and set(verified) == {(s, j) for s in solutions for j in (0, 1)}
    assert {r["solution_id"] for r in read(out / "verifications_reference.jsonl")} == solutions
    criticised = {(r["method"], r["id"]) for r in read(out / "critiques.jsonl")}
    assert criticised == {(name, s) for name in ("meta_critique", "hybrid", "hybrid_outcome") for s in solutions}
    for method in METHODS:
        assert {record["id"] for record in read(out / f"labels_{method}.jsonl")} == solutions
    compared = {row["method"] for row in json.loads((tmp_path / RUNS / "labels.json").read_text())["rows"]}
    assert {f"{method} (file)" for method in METHODS} <= compared


@pytest.mark.slow
def test_every_set_is_prepared(commands, monkeypatch, tmp_path):
    """Guards: a set that data.sh asks for and prepare.py doesn't know. The download is replaced by two rows."""
    row = {"problem": "What is 1 + 1?", "answer": "2", "final_answer": ["2"], "generator": "g", "steps": ["1 + 1 = 2"],
           "final_answer_correct": True, "label": -1}  # fmt: skip
    skywork = {"prompt": [{"role": "user", "content": "1 + 1?"}], "reward_model": {"ground_truth": '["2"]'}}
    asked = []

    def find_file(source, given):
        asked.append(source.hub)
        rows = [skywork if source.hub.startswith("Skywork") else row] * 2
        return write_jsonl(tmp_path / "rows.jsonl", rows)

    monkeypatch.setattr(prepare, "find_file", find_file)
    monkeypatch.setattr(prepare, "KNOWN", [(name, ".jsonl", 2, None) for name in prepare.SOURCES])
    monkeypatch.chdir(tmp_path)
    prepared = [c for c in commands if c.name in PREPARED]
    assert len(prepared) == 8
    for command in prepared:
        monkeypatch.setattr(sys, "argv", [command.script, *command.words])
        prepare.main()
        name, (out,) = command.words[0], command.flags["--out"]
        for path in [f"{name}.jsonl", f"gold/{name}.jsonl"] if name != "processbench" else ["processbench/math.jsonl"]:
            assert len((tmp_path / out / path).read_text().splitlines()) == 2
    assert len(asked) == 7 + 4


@pytest.mark.slow
def test_torchrun_runs_a_module(world, tmp_path):
    """Guards: what torchrun itself makes of a command, here of one with -m, which the tests above only imitate."""
    if not (world / "Qwen").exists():
        write_models(world)
    (command,) = (c for c in record_commands(world, "hacking") if c.name == "data.audit")
    link_inputs(command, world, tmp_path)
    words, _ = scale_down(command)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS), "-m"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["timeout", "300", *run, command.script, *words], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / RUNS / "hacking/audit/metrics.jsonl").exists()
    assert json.loads((tmp_path / RUNS / "hacking/audit/metrics.jsonl").read_text())["audit/sampled"] == 4
