"""The repository as a whole: imports, command lines, documented commands, and the data that ships with it."""

import argparse
import ast
import dataclasses
import importlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import evaluate
import generate
import verify
from data import make_sorting, make_tiny, records
from data.results import claims, noise
from generate import SOLVE_PROMPT, render_steps
from kernels import distributed
from kernels.chat import encode_chat
from kernels.distributed import InputError
from train_prm import ORM_PROMPT, PRM_PROMPT, yes_no_ids

import pytest
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "tiny"
STAGES = ["generate", "verify", "train_prm", "evaluate", "grpo"]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("data/**/README.md")), *sorted(ROOT.glob("kernels/**/README.md")),
           ROOT / "data" / "exercises.md"]  # fmt: skip
TREES = {
    path.relative_to(ROOT).with_suffix("").as_posix(): ast.parse(path.read_text())
    for path in [*(ROOT / f"{stage}.py" for stage in STAGES), *ROOT.glob("kernels/*.py"), *ROOT.glob("data/**/*.py")]
}


def read_jsonl(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / name).read_text().splitlines()]


# --------------------------------------------------------------------------- imports

# Each file may import what stands before it, and of other people's packages those beside it (the standard library is
# free).
LADDER = {
    "kernels/__init__": "",
    "kernels/logprob": "torch",
    "kernels/transformer": "torch safetensors",
    "kernels/decode": "torch",
    "kernels/distributed": "torch",
    "kernels/text": "",
    "kernels/chat": "jinja2 huggingface_hub",
    "kernels/sampler": "torch tqdm",
    "data/__init__": "",
    "data/records": "torch",
    "data/grader": "math_verify",
    "data/report": "numpy matplotlib",
    "generate": "torch tqdm transformers",
    "verify": "torch numpy tqdm",
    "train_prm": "torch numpy tqdm",
    "evaluate": "torch numpy tqdm",
    "grpo": "torch numpy tqdm",
    "data/page": "torch jinja2 transformers",  # draws what all stages wrote, and nobody imports it
}
DATA = "torch numpy tqdm tokenizers transformers pyarrow huggingface_hub matplotlib"  # everything else in data/
ALONE = {"data/grader"}  # what its worker would have to import, too, each time that one is started


def imports(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """(module, names) of every import, at whatever depth; a name computed at run time is not found."""
    found = [(alias.name, []) for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in froms), "a relative import"
    return found + [(node.module, [alias.name for alias in node.names]) for node in froms]


@pytest.mark.parametrize("name", TREES)
def test_import_ladder(name):
    """Guards: a file that reaches upwards, or for somebody else's training or sampling engine; a new file in
    kernels/."""
    files = list(LADDER)
    if name in LADDER:
        before = [] if name in ALONE else files[: files.index(name)]
    else:
        assert name.startswith("data/"), f"{name} has no place on the ladder"
        before = [file for file in (*files, *TREES) if file != "data/page"]
    ours = {file.replace("/", ".").removesuffix(".__init__") for file in TREES}
    allowed = {file.replace("/", ".").removesuffix(".__init__") for file in before}
    packages = set(LADDER.get(name, DATA).split()) | sys.stdlib_module_names
    for module, names in imports(TREES[name]):
        if module.split(".")[0] in {file.split(".")[0] for file in ours}:
            found = {f"{module}.{part}" for part in names} & ours or {module}  # from kernels import sampler
            assert found <= allowed, f"{name} imports {found - allowed}"
        else:
            assert module.split(".")[0] in packages, f"{name} imports {module}"
        if module.split(".")[0] == "transformers":
            assert module == "transformers" and names == ["AutoTokenizer"], f"{name} imports {names} from {module}"
    calls = [ast.unparse(node.func) for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert not [call for call in calls if re.search(r"__import__|import_module|run_path|^exec$|^eval$", call)]


PUBLIC = {  # names that other people's scripts import, and from where
    "generate": "split_steps render_steps extract_answer Sampler",
    "kernels.transformer": "load_model",
    "kernels.logprob": "token_logprobs",
    "verify": "parse_verification outcome_consistency step_consistency",
    "grpo": "format_valid group_advantages selective_advantage global_step_advantage loss_weights grpo_loss",
    "evaluate": "grade processbench_f1",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_stay(name):
    """Guards: a public name that was moved to another file and can't be imported from its old place any more."""
    module = importlib.import_module(name)
    assert all(callable(getattr(module, public)) for public in PUBLIC[name].split())


PROBE = """
import contextlib, io, json, runpy, sys, torch, transformers  # these two may look at devices when they are imported
sys.path.insert(0, {root!r})
def touched(*_): raise SystemExit("a device was touched")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = touched
for stage in {stages}: __import__(stage)
print(sorted({{"matplotlib", "math_verify", "pyarrow"}} & set(sys.modules)), torch.distributed.is_initialized())
for command in {commands}:
    stage, *more = command.split()
    sys.argv, text = [stage, *more, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path({root!r} + "/" + stage + ".py", run_name="__main__")
    except SystemExit as end:
        print(json.dumps([command, end.code, text.getvalue()]))
"""
COMMANDS = ["generate", "verify", "train_prm", "grpo", "evaluate"]
COMMANDS += [f"evaluate {name}" for name in ("processbench", "benchmark", "labels", "plot", "show")]


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> list[str]:
    """What importing every stage prints, then the --help of every command; in a directory without data or models."""
    empty = tmp_path_factory.mktemp("empty")
    program = PROBE.format(stages=STAGES, commands=COMMANDS, root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", program], cwd=empty, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not list(empty.iterdir()), done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def helps(probe) -> dict[str, str]:
    return {command: text for command, _, text in map(json.loads, probe[1:])}


def test_import_and_help_have_no_effects(probe):
    """Guards: a stage that prints, parses or takes a device when it is imported, drags in the plotting or grading
    library, or loads a model for --help."""
    assert probe[0] == "[] False"
    results = [json.loads(line) for line in probe[1:]]
    assert [(command, code) for command, code, _ in results] == [(command, 0) for command in COMMANDS]
    assert all(text.startswith("usage: ") and "--help" in text for *_, text in results)


WAITS = """
import os, sys
sys.path.insert(0, {root!r})
class Watch:
    def find_spec(name, *_):
        if name == "torch":
            print(os.environ["OMP_WAIT_POLICY"], flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch)
import {stage}
"""


@pytest.mark.parametrize("stage", STAGES)
def test_waiting_threads_sleep(stage):
    """Guards: a stage that imports torch before OMP_WAIT_POLICY is set, which comes too late; a user's value
    overruled."""
    for given, expected in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        program = [sys.executable, "-c", WAITS.format(root=str(ROOT), stage=stage)]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{expected}\n"


# --------------------------------------------------------------------------- flags and documented commands


def flags_of(tree: ast.AST) -> set[str]:
    """Flags that a piece of code defines, without their dashes."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "add_argument"]
    names = [call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)]
    return {name[2:] for name in names if name.startswith("--")}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "evaluate"])
def test_every_flag_is_read(command):
    """Guards: a flag that does nothing: args.<flag> must stand in the command's function or in one that it leads to."""
    stage, *more = command.split()
    main = evaluate.COMMANDS[more[0]].__name__ if more else "main"
    parts = {node.name: node for node in TREES[stage].body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in TREES[stage].body:  # a table of functions leads to all of them
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            parts[node.targets[0].id] = node
    reached, waiting = {}, [main]
    while waiting:
        name = waiting.pop()
        reached[name] = list(ast.walk(parts[name]))
        names = {node.id for node in reached[name] if isinstance(node, ast.Name)}
        waiting += [other for other in names if other in parts and other not in reached]
    flags = set().union(*(flags_of(parts[name]) for name in reached))
    attributes = [node for nodes in reached.values() for node in nodes if isinstance(node, ast.Attribute)]
    read = {node.attr for node in attributes if getattr(node.value, "id", "") == "args"}
    assert ("out" in flags) == (command != "evaluate show") and all(re.fullmatch(r"[a-z0-9_]+", flag) for flag in flags)
    assert flags <= read, f"never read: {sorted(flags - read)}"


def parser_of(monkeypatch, command: str) -> argparse.ArgumentParser:
    """The parser of a command, as it is when the command line is read."""
    stage, *more = command.split()
    parsers = []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [stage, *more])
        patch.setattr(records, "parse_flags", lambda parser: parsers.append(parser) or sys.exit())
        with pytest.raises(SystemExit):
            importlib.import_module(stage).main()
    return parsers[0]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "evaluate"])
def test_numbers_have_a_finite_range(monkeypatch, command):
    """Guards: a number that turns training round (--tis_cap -1, --clip_low nan), makes every token equally likely
    (--temperature inf), ends in numpy's traceback (--seed -1) or has no end (a count of 1e20)."""
    parser = parser_of(monkeypatch, command)
    declared = {action.dest: action for action in parser._actions if action.option_strings}
    for name, action in declared.items():
        if action.choices or action.type is None:
            assert action.choices or not isinstance(action.default, int | float) or action.nargs == 0, name
            continue
        values = ["nan", "inf", "-inf", "-1", "-0.5", "1e40", "1e400", "9" * 5000, "", "x", "1,5", "None"]
        if action.type.__qualname__.startswith("integer"):
            values += ["1e20", "100000000000000000000", "1.5", "0x10"]
        for value in values:
            monkeypatch.setattr(sys, "argv", [command.split()[0], *command.split()[1:], f"--{name}={value}"])
            with pytest.raises(InputError, match=rf"^--{name} {value}: it must be .*\d.*; see --help$"):
                records.parse_flags(parser)
        assert action.default is None or action.type(str(action.default)) == action.default


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num", "1"], "--num 1: no such flag (none can be abbreviated); see --help"),
        (["--temp=1"], "--temp=1: no such flag (none can be abbreviated); see --help"),
        (["--seed"], "--seed expected one argument; see --help"),
        (["--temperature", "0.0001"], "--temperature 0.0001: it must be 0 or from 0.001 to 100; see --help"),
        (["--num_samples", "0"], "--num_samples 0: it must be at least 1 and at most 100000; see --help"),
        (["--top_p", "1.01"], "--top_p 1.01: it must be from 1e-06 to 1; see --help"),
        (["--out", "caf\udce9.jsonl"], r"caf\udce9.jsonl: not UTF-8; rename the file"),
        (["surplus"], "surplus: no such flag (none can be abbreviated); see --help"),
    ],
)
def test_wrong_flags_are_one_line(monkeypatch, capsys, flags, message):
    """Guards: an abbreviation that changes its meaning with the next flag; a page of usage in the place of a line."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
    with pytest.raises(SystemExit) as end:
        distributed.run_stage(generate.main)
    assert (end.value.code, *capsys.readouterr()) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("evaluate", "evaluate plot")])
def test_the_tiny_world_from_another_directory(monkeypatch, tmp_path, capsys, command):
    """Guards: advice to make files, for 42 minutes, that are there, only not in this directory."""
    stage, *more = command.split()
    module = importlib.import_module(stage)
    tiny = module.TINY[more[0]] if more else module.TINY
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [stage, *more])
    with pytest.raises(SystemExit) as end:
        distributed.run_stage(module.main)
    shipped = any("data/tiny" in str(value) for value in tiny.values())
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert (f"not here, but in {ROOT}; run this command there: cd {ROOT}" in said) or not shipped
    assert not list(tmp_path.iterdir())


def documented_commands(text: str) -> list[list[str]]:
    """The words of every command of a text that runs Python; a backslash continues a line, # begins a comment."""
    lines = [line.split("#")[0] for line in text.replace("\\\n", " ").splitlines()]
    commands = [command.strip().removeprefix("do ") for line in lines for command in re.split(r";|&&|\|", line)]
    return [
        shlex.split(command)
        for command in commands
        if re.match(r"(\$ )?(\w+=\S+ )*(python3?|torchrun|bash|stage) ", command)
    ]


FENCED = re.compile(r"^```\w*\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def code_of(readme: str) -> str:
    """The fenced blocks of a README, then each code span on a line of its own; a span may be wrapped in the source."""
    spans = re.findall(r"`([^`]+)`", FENCED.sub("", readme))
    return "\n".join([*FENCED.findall(readme), *(" ".join(span.split()) for span in spans)])


def documents() -> dict[str, str]:
    """The texts whose commands are checked: the docstring of each script, the shell loops (in which `stage` is python),
    and the code in every README."""
    scripts = [*STAGES, "data/page", *(name for name in TREES if name not in LADDER)]
    texts = {name: ast.get_docstring(TREES[name]) or "" for name in scripts}
    texts |= {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob("data/**/*.sh")}
    return texts | {path.relative_to(ROOT).as_posix(): code_of(path.read_text()) for path in READMES}


@pytest.mark.parametrize("name", documents())
def test_documented_commands_exist(helps, name):
    """Guards: a README or docstring whose commands name files, evaluations or flags that don't exist."""
    commands = documented_commands(documents()[name])
    assert commands
    for words in commands:
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), " ".join(words)
            continue
        place = next((i for i, word in enumerate(words) if word.endswith(".py") or words[i - 1] == "-m"), None)
        if place is None and "$@" in words:
            continue  # the body of `stage`
        assert place is not None, " ".join(words)
        script, rest = words[place], words[place + 1 :]
        if not script.endswith(".py"):
            if not script.startswith(("data.", "tests.", *STAGES)):
                continue  # pytest, venv, pip
            script = script.replace(".", "/") + ".py"
        assert (ROOT / script).is_file(), " ".join(words)
        command = script.removesuffix(".py")
        if command == "evaluate" and rest and not rest[0].startswith("-"):
            command = f"evaluate {rest[0]}"
            assert command in helps, " ".join(words)
        flags = set(re.findall(r'"(--\w+)"', (ROOT / script).read_text()))
        if command in helps:
            flags = set(re.findall(r"--\w+", helps[command].partition("\n\n")[0]))  # of the usage
        used = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert used <= flags | {"--help"}, f"{sorted(used - flags)} in: {' '.join(words)}"


# Flags that no README and no study uses, each with the reason why it is there.
UNUSED_FLAGS = {
    "--tis_cap": "corrects for a sampler in bf16, whose log-probs differ from the trainer's",
    "--eval_fraction": "one's own labels may be too few to hold a share of them out",
}


def test_every_flag_is_used(helps):
    """Guards: flags that nobody needs. One is worth its lines if a README or a study uses it, or for a reason above."""
    loops = "\n".join(path.read_text() for path in ROOT.glob("data/**/*.sh"))
    code = "\n".join([code_of(path.read_text()) for path in READMES] + [re.sub(r"#.*", "", loops)])
    used = set(re.findall(r"--\w+", code))
    flags = {flag for text in helps.values() for flag in re.findall(r"--\w+", text.partition("\n\n")[0])}
    assert flags - used == set(UNUSED_FLAGS) and len(UNUSED_FLAGS) <= 8


def anchor(heading: str) -> str:
    """The name that GitHub gives a heading: lower case, without punctuation, a hyphen for each blank."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", READMES, ids=[path.relative_to(ROOT).as_posix() for path in READMES])
def test_documents_lead_somewhere(path):
    """Guards: a link to a file or to a section, or a file or a function that a README names, that has been renamed or
    is gone."""
    text = FENCED.sub("", path.read_text())
    for target, section in re.findall(r"\]\(([^):#]*)#?([^):#]*)\)", text):
        assert (path.parent / target).exists(), target
        if section:
            linked = FENCED.sub("", (path.parent / target if target else path).read_text())
            assert section in map(anchor, re.findall(r"^#+ (.*)", linked, re.M)), f"{target}#{section}"
    for script in re.findall(r"`([\w/.]+\.(?:py|sh|cu))`", text):
        assert (ROOT / script).is_file() or (path.parent / script).is_file(), script
    for script, names in named_places(text):
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(def |class )?{name}\b", (ROOT / script).read_text(), re.M), f"{script}: {name}"


def named_places(text: str) -> list[tuple[str, str]]:
    """Every `path.py`: `name`, `name` of a text, as (path, names)."""
    return re.findall(r"`([\w/]+\.py)`:\s+((?:`\w+`(?:,\s+)?)+)", text)


def test_documents_name_functions():
    """Guards: a check of names that finds none, since the READMEs write them in another form."""
    assert len([place for path in READMES for place in named_places(path.read_text())]) > 20


def test_readme_is_short():
    """Guards: a front page that isn't read to its end, or can't be copied from a narrow window."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_top_level_holds_nothing_else():
    """Guards: a sixth stage, a utils.py, a stray output."""
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    allowed = {f"{stage}.py" for stage in STAGES} | {"kernels", "data", "tests", "requirements.txt"}
    allowed |= {"README.md", "LICENSE", "pyproject.toml", ".gitignore", ".gitattributes", ".ci"}
    assert {file.split("/")[0] for file in files if (ROOT / file).exists()} <= allowed
    assert not [file for file in files if Path(file).name in ("utils.py", "common.py", "helpers.py")]


# --------------------------------------------------------------------------- the tiny world


def test_problem_sets_are_disjoint_and_reproducible():
    """Guards: held-out problems that a checkpoint was trained on; files that their script doesn't make; answers in a
    file that a reference-free stage reads."""
    pool, train, heldout = make_tiny.make_sets(make_tiny.WORLDS["tiny"])
    sets = [{re.sub(r"\W+", " ", p.text.lower()).strip() for p in problems} for problems in (pool, train, heldout)]
    assert [len(s) for s in sets] == [make_tiny.POOL, make_tiny.TRAIN, make_tiny.HELDOUT]
    assert len(set.union(*sets)) == sum(map(len, sets))
    gold = read_jsonl("gold.jsonl")
    for name, problems in (("problems", train), ("heldout", heldout)):
        records = read_jsonl(f"{name}.jsonl")
        assert [r["problem"] for r in records] == [p.text for p in problems]
        assert all(r.keys() == {"id", "problem", "source"} for r in records)
        answers = {r["id"]: r["answer"] for r in gold}
        assert [answers.pop(r["id"]) for r in records] == [p.answer for p in problems]
        gold = [r for r in gold if r["id"] in answers]
    assert not gold


def solve(problem: str) -> list[str]:
    """The equations of a word problem, read off its sentences without the generator's tables."""
    total, steps = None, []
    for sentence in problem.split(". "):
        if re.search(r"years old|past noon|steps away|cousins", sentence):
            continue
        number = int(n.group()) if (n := re.search(r"\d+", sentence)) else None
        if total is None:
            total = number
        elif not sentence.startswith("How many"):
            if re.search(r"doubles|as many again|for two|adds another", sentence):
                sign, number, after = "*", 2, total * 2
            elif re.search(r"triples|three times|for three", sentence):
                sign, number, after = "*", 3, total * 3
            elif re.search(r"[Hh]alf|Every second", sentence):
                sign, number, after = "/", 2, total / 2
            elif re.search(r"loses|gives|sells|taken away|break|runs off|throws", sentence):
                sign, after = "-", total - number
            else:
                assert re.search(r"buys|finds|brings|added|picks up|arrives|wins", sentence), sentence
                sign, after = "+", total + number
            assert after == int(after)
            steps.append(f"{total}{sign}{number}={int(after)}")
            total = int(after)
    return steps


def test_gold_answers_are_right():
    """Guards: a gold file that disagrees with its own problems; every accuracy on the tiny world stands on it."""
    problems = {r["id"]: r["problem"] for name in ("problems", "heldout") for r in read_jsonl(f"{name}.jsonl")}
    for record in read_jsonl("gold.jsonl"):
        steps = solve(problems[record["id"]])
        assert list(record["steps"]) == steps, record["id"]
        assert record["answer"] == steps[-1].split("=")[1] and 0 <= int(record["answer"]) <= 99


def test_harder_world(tmp_path, monkeypatch):
    """Guards: a harder world that can't be made: problems that its own equations don't solve, a tokenizer or a context
    too small for it, a model that doesn't take a training step."""
    world = dataclasses.replace(make_tiny.WORLDS["hard"], directory=tmp_path)
    pool, train, heldout = make_tiny.make_sets(world, pool=2000)
    problems = pool + train + heldout
    assert len({p.text for p in problems}) == len(problems)
    for problem in problems:
        assert list(problem.steps) == solve(problem.text) and 4 <= len(problem.steps) <= 8, problem.text
        assert 0 <= int(problem.answer) <= 999
    assert max(int(p.answer) for p in problems) > 900 and any("cousins" in p.text for p in problems)
    make_tiny.make_tokenizer(world)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) <= 1024 and len(tokenizer("471").input_ids) == 3
    rng = random.Random(0)
    for task in make_tiny.TURNS:
        turns = [make_tiny.make_example(task, problem, rng) for problem in train[:200]]
        assert max(len(tokenizer(answer).input_ids) for _, answer in turns) < world.max_new_tokens
        assert max(len(encode_chat(tokenizer, user)) for user, _ in turns) + world.max_new_tokens < 2048
    model = make_tiny.new_model(len(tokenizer), world.architecture)
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 30e6
    monkeypatch.setattr(make_tiny, "BATCH", 2)
    before = model.head.clone()
    make_tiny.train(
        model, make_tiny.draw_from(make_tiny.make_example, make_tiny.VERIFIER_TASKS, train), 1, tokenizer, seed=0
    )
    assert not torch.equal(before, model.head)


def test_what_is_learned_inside_a_question():
    """Guards: a mark on another token than a step's last, a token read that isn't the next one, a mark or a token
    learned outside the solution; positions are found in the text here, not by the tokenizer's offsets."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    yes, no = yes_no_ids(tokenizer)
    solution = render_steps(["4+7=11", "11*2=23"], "23")
    question = PRM_PROMPT.format(problem="4+7=11, then?", solution=solution)
    turn = make_tiny.Turn(question, "Step 1: Correct", solution, labels=(True, False), marked=True)
    (ids, targets), weights = make_tiny.encode_turn(tokenizer, turn)
    marks = {i: target for i, target in enumerate(targets) if weights[i] == make_tiny.MARK_WEIGHT}
    assert list(marks.values()) == [yes, no]
    for i, step in zip(marks, ("4+7=11", "11*2=23"), strict=True):
        assert tokenizer.decode(ids[: i + 1]).endswith(step)
    assert tokenizer.decode(ids).endswith("Step 1: Correct<|im_end|>")
    answered = [target for i, target in enumerate(targets) if target >= 0 and i not in marks]
    assert tokenizer.decode(answered) == "Step 1: Correct<|im_end|>"

    turn = dataclasses.replace(turn, target="", marked=False, read=True)
    (ids, targets), weights = make_tiny.encode_turn(tokenizer, turn)
    read = [i for i, target in enumerate(targets) if target >= 0]
    assert read == list(range(read[0], read[-1] + 1)) and [targets[i] for i in read] == ids[read[0] + 1 : read[-1] + 2]
    assert {weights[i] for i in read} == {make_tiny.READ_WEIGHT}
    assert solution.endswith(tokenizer.decode([targets[i] for i in read])) and len(read) >= len(solution) // 2


def test_making_a_model_resumes(tmp_path, monkeypatch):
    """Guards: a training of hours that begins anew after a stop, or ends elsewhere than an uninterrupted one; progress
    of other settings taken for this one's."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    _, problems, _ = make_tiny.make_sets(make_tiny.WORLDS["tiny"], pool=0)
    draw = make_tiny.draw_from(make_tiny.make_example, {"solve": 1.0}, problems)
    monkeypatch.setattr(make_tiny, "BATCH", 2)
    monkeypatch.setattr(make_tiny, "SAVE_EVERY", 2)
    small = make_tiny.ARCHITECTURE | {"num_hidden_layers": 1}

    def train(progress: Path | None) -> torch.Tensor:
        model = make_tiny.new_model(len(tokenizer), small)
        make_tiny.train(model, draw, 5, tokenizer, seed=0, progress=progress)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = train(None)
    drawn = make_tiny.draw_batch
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_tiny, "draw_batch", lambda *args: drawn(*args) if args[-1] < 3 else stop())
        train(tmp_path / "a.pt")
    assert torch.equal(train(tmp_path / "a.pt"), whole)
    with pytest.raises(InputError, match=r"made with .* remove it"):
        make_tiny.train(make_tiny.new_model(len(tokenizer), small), draw, 6, tokenizer, 0, progress=tmp_path / "a.pt")


def stop() -> None:
    raise KeyboardInterrupt


def test_sorting_rule():
    """Guards: a rule that calls something right that isn't, or the other way round: it is the gold of the domain
    without answers. Compared with a replay that knows of numbers only."""
    rng = random.Random(0)
    pool, train, heldout = map(set, make_sorting.make_sets())
    assert len(pool | train | heldout) == len(pool) + len(train) + len(heldout)
    outcomes = Counter()
    for row in rng.sample(sorted(pool), 400):
        for steps in (make_sorting.sort(row), make_sorting.corrupt(row, rng), [*make_sorting.sort(row), "1>1"]):
            numbers, fine = [int(digit) for digit in row], []
            for step in steps:
                before = "".join(map(str, numbers))
                for i in range(1, len(numbers)):
                    if numbers[i] < numbers[i - 1]:
                        numbers[i - 1 : i + 1] = numbers[i], numbers[i - 1]
                        break
                after = "".join(map(str, numbers))
                fine.append(all(fine) and before != after and step == f"{before}>{after}")
            labels, outcome = make_sorting.judge(row, steps)
            assert labels == fine and outcome == (all(fine) and numbers == sorted(numbers)), steps
            problem = make_tiny.Problem("", tuple(make_sorting.sort(row)), "done")
            _, text = make_tiny.make_judgement("verify", problem, steps, "done", labels, outcome, rng)
            expected = re.findall(r"## Step \d+: (.*)", text)
            assert len(expected) == len(steps) and not any(
                own == "none" for own, label in zip(expected, fine, strict=True) if label
            )
            outcomes[outcome] += 1
    assert outcomes == {True: 400, False: 800}
    assert make_sorting.judge("21", []) == ([], False)


def test_turned_labels_say_so():
    """Guards: label noise that the reward model doesn't see, since it learns from the text that goes with a label; a
    label called dropped or changed elsewhere."""
    texts = {True: "correct", False: "incorrect"}
    rng = random.Random(0)
    for steps, outcome in (([True, True, True], True), ([True, False, False], False), ([True, True], False)):
        sections = [f"## Step {k}: 1+1=2\nWritten: 2\n**This step is {texts[y]}.**" for k, y in enumerate(steps, 1)]
        end = f"**Verification: Is the answer correct (Yes/No)? {'Yes' if outcome else 'No'}**"
        label = {"id": "a/0", "steps": ["1+1=2"] * len(steps), "step_labels": steps, "outcome": outcome}
        turned = noise.turn_over(label | {"text": "\n".join([*sections, end])}, rng)
        parsed = verify.parse_verification(turned["text"], len(steps))
        assert turned["outcome"] != outcome and parsed.verdict == turned["outcome"]
        assert parsed.step_verdicts == turned["step_labels"] and turned["steps"] == label["steps"]
        assert all(turned["step_labels"]) == turned["outcome"]
        assert sorted(turned["step_labels"], reverse=True) == turned["step_labels"]  # mistakes propagate


@pytest.mark.parametrize("name", ["claims", "compute", "hacking", "methods", "noise", "rewards", "sorting", "students"])
def test_a_study_without_runs_keeps_its_results(monkeypatch, tmp_path, name):
    """Guards: the files behind the tables emptied by --collect where no run is."""
    study = importlib.import_module(f"data.results.{name}")
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--collect"])
    with pytest.raises(InputError, match=f"no seed in runs/{name} has"):
        study.main()
    assert not list(tmp_path.iterdir())


def test_a_study_with_runs_of_some_seeds(tmp_path):
    """Guards: the rows of other seeds lost, or those of a seed doubled."""
    for name in ("0/a", "0/b", "1/a", "start/c"):
        (tmp_path / name).mkdir(parents=True)
    assert claims.find_seeds(tmp_path, "a", "*b") == ["0"] and claims.find_seeds(tmp_path, "a") == ["0", "1"]
    path = tmp_path / "curves.jsonl"
    claims.replace_seeds(path, [{"seed": seed, "y": y} for seed in (0, 1, 2) for y in (3, 4)])
    rows = claims.replace_seeds(path, [{"seed": 1, "y": 5}])
    assert rows == read_jsonl(path) == [{"seed": seed, "y": y} for seed, y in ((0, 3), (0, 4), (1, 5), (2, 3), (2, 4))]


@pytest.mark.parametrize(
    "main, flags, message",
    [
        (noise.main, ["--turn", "500"], "--turn 500: it must be at least 0 and at most 100"),
        (noise.main, ["--turn", "-5"], "--turn -5: it must be"),
        (noise.main, ["--turn", "5", "--labels", "labels"], "--turn needs --labels and --out"),
        (noise.main, ["--turn", "5", "--labels", "labels", "--out", "labels"], "is --labels itself"),
        (make_sorting.main, ["check", "--solutions", "solutions", "--out", "solutions"], "is --solutions itself"),
        (make_sorting.main, ["check", "--solutions", "solutions", "--out", "x", "--cases", "solutions"], "itself"),
        (make_tiny.main, ["--device", "foo"], "--device foo: no such device"),
    ],
)
def test_wrong_flags_of_studies_are_one_line(monkeypatch, tmp_path, main, flags, message):
    """Guards: tracebacks, and inputs that are overwritten."""
    label = {"id": "p/0", "problem": make_sorting.TEXT.format(row="312"), "steps": ["312>132"], "answer": "done"}
    label |= {"text": "T", "step_labels": [True], "outcome": True, "dropped": "no_match", "model": "m"}
    for name in ("labels", "solutions"):
        (tmp_path / name).write_text(json.dumps(label) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    with pytest.raises(InputError, match=message):
        main()
    assert (tmp_path / "labels").read_text() == (tmp_path / "solutions").read_text() == json.dumps(label) + "\n"


def test_sorting_gold(tmp_path):
    """Guards: gold that scores a policy's solutions by something else than the rule, or in a form that ProcessBench's
    measure can't read."""
    rows = {"right": ["312>132", "132>123"], "short": ["312>132"], "wrong": ["312>321", "321>231"]}
    solutions = [{"id": f"h/{name}", "problem": make_sorting.TEXT.format(row="312"), "steps": steps, "answer": "done"}
                 for name, steps in rows.items()]  # fmt: skip
    solutions.append({**solutions[0], "id": "h/undone", "answer": None})
    path = tmp_path / "solutions.jsonl"
    path.write_text("".join(json.dumps(s | {"model": "m"}) + "\n" for s in solutions))
    make_sorting.check(str(path), str(tmp_path / "gold.jsonl"), str(tmp_path / "cases.jsonl"))
    gold = evaluate.read_gold(str(tmp_path / "gold.jsonl"), solutions)
    assert gold == {"h/right": ([True, True], True), "h/short": ([True], False), "h/wrong": ([False, False], False),
                    "h/undone": ([True, True], False)}  # fmt: skip
    assert [(c["id"], c["label"]) for c in evaluate.read_cases(str(tmp_path / "cases.jsonl"))] == [
        ("h/right", -1),
        ("h/wrong", 0),
    ]


def test_tokenizer_fits_the_prompts():
    """Guards: a prompt that was edited after the tokenizer was made: its instruction would fall into hundreds of
    tokens that the tiny models have never seen."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) <= 512
    assert all(len(tokenizer(f"{digit}").input_ids) == 1 for digit in range(10))
    assert len(tokenizer("4719").input_ids) == 4
    texts = {
        "problem": read_jsonl("heldout.jsonl")[0]["problem"],
        "solution": "Step 1: 4+7=11\nAnswer: 11",
        "examples": "",
    }
    texts |= {"reference": "11", "verification": "## Step 1: add", "critique": "Step 1: 4+7=11, judged rightly."}
    prompts = [SOLVE_PROMPT, verify.VERIFY_PROMPT, verify.REFERENCE_PROMPT, verify.CRITIQUE_PROMPT, verify.MERGE_PROMPT]
    fixed = [prompt.format(**texts).split("\n\nProblem: ")[0] for prompt in prompts]
    prompts += [ORM_PROMPT, PRM_PROMPT]
    fixed += [prompt.format(**texts).split("\n\n")[-1] for prompt in prompts[-2:]]
    for prompt, instruction in zip(prompts, fixed, strict=True):
        ids = encode_chat(tokenizer, prompt.format(**texts))
        assert tokenizer(instruction).input_ids == [token := tokenizer.convert_tokens_to_ids(instruction)]
        assert token != tokenizer.unk_token_id and ids.count(token) == 1
        assert prompt.format(**texts) in tokenizer.decode(ids)
    for text in (
        make_tiny.render_response(["4+7=11"], "11"),
        "**This step is correct.**",
        "## Step 3: double\n11*2=22",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_checkpoints_are_small():
    """Guards: a repository that outgrows a quick clone."""
    checkpoints = {path.parent for path in TINY.rglob("*.safetensors")}
    if not checkpoints:
        pytest.skip("the tiny checkpoints aren't there")
    assert {path.name for path in checkpoints} == {"policy", "verifier", "base"}
    assert sum(file.stat().st_size for path in checkpoints for file in path.iterdir()) <= 20_000_000
