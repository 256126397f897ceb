"""Make the tiny world: word problems, a tokenizer, and three checkpoints of one to two million parameters.

    python -m data.make_tiny            # everything, into data/tiny/; the same command resumes a run that was stopped
    python -m data.make_tiny problems   # the problem sets and their gold file only, in seconds
    python -m data.make_tiny tokenizer  # the tokenizer only: needed again when a prompt changes
    python -m data.make_tiny --world hard --device cuda  # a harder one of 14 million parameters, into runs/hard/

A problem starts from a number and changes it three to five times, always within 0..99 (in the harder world four to
eight times, within 0..999, in more words, and with numbers that don't matter in between). It has one canonical
solution, one equation a step, and that makes exact gold labels possible: a step is correct if it is the canonical step
of its position and everything before it is correct (errors propagate).

There are three disjoint sets: a pool for making the checkpoints (never written, remade from the seed),
`problems.jsonl` for Stages I to III, `heldout.jsonl` for measuring. `gold.jsonl` has the answers of the last
two: for measuring, and for the methods and rewards that say that they read answers.

The checkpoints are made in five phases; `runs/make_tiny/` keeps what is done.

1. The solver learns to solve, until it errs on hardly any problem.
2. The policy is the solver made unsure: it imitates its own samples at a high temperature, right or wrong, as long as
   they are equations in the required format. What it does wrong later is its own doing, and what it knew is still
   there for reinforcement learning to bring out. (A solver stopped half-way through its training errs as often, but in
   another way: it does not know better, and GRPO gained little from it.)
3. The verifier goes on from the solver with every prompt that Stage I sends: verify, verify with the expected answer,
   critique, merge. It writes out what it expects at each step before it judges, so the four layers of a policy
   suffice. Most of what it learns to judge was written by the policy, with gold labels: the mistakes of `corrupt` are
   of other kinds, and taught by these alone a verifier misses half of the policy's results that are off by ten. Then
   it is made unsure in the same way, so that its votes differ. It stands for a large model that judges well because
   of all that it has read; the stages themselves never read an answer.
4. The base is what reward models start from. A PRM, an ORM and a discriminative PRM judge in one pass: each result has
   to be recomputed and compared inside the layers. That takes three things. Depth: a mark must be made some layers
   before it is read off elsewhere. Marks: within a question, the end of each step predicts whether the step is correct,
   so that the error shows where it stands. Reading: the tokens of right solutions are predicted one by one, as in any
   pre-training, so that the expected number is there when the written one is met. A PRM-CoT writes that number out,
   and needs turns of its own to learn it. The solutions are the verifier's. In the last steps the base learns, as a
   PRM, to overlook the errors of every second solution, while the marks stay right. So it becomes lenient, as language
   models that judge are: it knows more than it says, and Stage II has something to teach.
5. The tiny ProcessBench is made of the policy's own solutions.

The tokenizer gives one token to each digit, to each tag and marker of the formats, and to the fixed instruction
of each prompt: for a million parameters an instruction is only the name of a task.
"""

import argparse
import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import verify
from data import records
from data.records import gold_labels
from evaluate import first_error
from generate import SOLVE_PROMPT, Engine, format_valid, open_model, render_response, render_steps
from kernels import distributed
from kernels.chat import encode_to_ends, escape_special_tokens, render_chat
from kernels.distributed import InputError
from kernels.sampler import Sampler
from kernels.text import extract_answer, split_steps
from kernels.transformer import Config, Transformer, save_model
from train_prm import ORM_PROMPT, PRM_PROMPT, Example, pack, targets_after_prompt, write_prm_target, yes_no_ids

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

SEED = 20251203
POOL, TRAIN, HELDOUT = 60_000, 1_000, 600  # problems in the three sets
CASES = 200  # of the tiny ProcessBench with an error, and as many without
PARTS = ["problems", "tokenizer", "policy", "verifier", "base", "processbench"]
ARCHITECTURE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
TURNS = ["verify", "solve", "prm_cot", "reference", "prm", "orm", "critique", "merge"]  # that the stages send

# Training: the share of each task among the sequences, and the number of steps.
VERIFIER_TASKS = {"verify": 0.6, "solve": 0.16, "reference": 0.1, "critique": 0.07, "merge": 0.07}
BASE_TASKS = {"prm": 0.36, "prm_cot": 0.18, "orm": 0.10, "mark": 0.10, "read": 0.10, "solve": 0.16}
MARK_WEIGHT, READ_WEIGHT = 0.7, 0.5  # of a target inside the question; a token of the answer has weight 1
OWN_SHARE, RIGHT_SHARE = 0.7, 0.4  # of the solutions that verifier and base judge: written by the policy, and right
OWN_PROBLEMS, OWN_SAMPLES = 4_000, 4  # of the pool that the policy solves for them, and how often each
SOLVER_STEPS, VERIFIER_STEPS, BASE_STEPS = 500, 450, 1800
LENIENT_STEPS, OVERLOOKED = 150, 0.5  # the base's last, and the share of wrong solutions that a PRM calls right there
HOT = {"policy": 1.75, "verifier": 1.65}  # temperature of the samples that make a model unsure
HOT_SAMPLES, HOT_STEPS, HOT_RATE = 14_000, 220, 0.25  # the rate is relative to those below
BATCH, MUON_RATE, ADAMW_RATE = 64, 0.02, 3e-3
SAVE_EVERY = 50  # steps
# Right or wrong, what the policy imitates looks like this: garbled equations are mistakes that teach a judge nothing.
OPERATION = r"\d+[-+*/]\d+=\d+"
SOLUTION = rf"<think>(<step>{OPERATION}</step> ?)+</think><answer>\\boxed\{{\d+\}}</answer>"

# --------------------------------------------------------------------------- problems

NAMES = {
    "Mia": "She", "Leo": "He", "Anna": "She", "Omar": "He", "Rosa": "She", "Ivan": "He", "Lily": "She",
    "Hugo": "He", "Nora": "She", "Paul": "He", "Zoe": "She", "Amir": "He",
}  # fmt: skip
THINGS = ["apples", "shells", "coins", "cards", "stamps", "books", "beads", "pens", "nuts", "stones"]
SENTENCES = {
    "+": ["{pro} buys {b} more.", "{pro} finds {b} {things}.", "{friend} brings {b} more.", "Then {b} {things} are added."],
    "-": ["{pro} loses {b} of them.", "{pro} gives {b} to {friend}.", "{pro} sells {b} {things}.", "Then {b} are taken away."],
    "*2": ["Then the number doubles.", "{friend} brings as many again."],
    "*3": ["Then the number triples.", "Soon there are three times as many."],
    "/2": ["{pro} gives half of them to {friend}.", "{pro} sells half of the {things}."],
}  # fmt: skip


MORE_NAMES = {
    "Aisha": "She", "Bruno": "He", "Clara": "She", "Dario": "He", "Elena": "She", "Felix": "He", "Greta": "She",
    "Jonas": "He", "Kemal": "He", "Lucia": "She", "Marta": "She", "Tariq": "He",
}  # fmt: skip
MORE_THINGS = ["marbles", "tickets", "buttons", "leaves", "tiles", "badges", "candles", "feathers", "keys", "ribbons"]
MORE_SENTENCES = {
    "+": ["On the way home {pro_} picks up {b}.", "A parcel with {b} {things} arrives.", "{pro} wins {b} in a game."],
    "-": ["{b} of the {things} break.", "A dog runs off with {b} of them.", "{pro} throws {b} {things} away."],
    "*2": ["{pro} swaps every one for two.", "For each of them {friend} adds another."],
    "*3": ["{pro} trades every one for three."],
    "/2": ["Every second one is lost.", "Half of the {things} go to {friend}."],
}  # fmt: skip
ASIDES = ["{friend} is {b} years old.", "It is {b} minutes past noon.", "The shop is {b} steps away.",
          "{friend} has {b} cousins."]  # fmt: skip


@dataclass(frozen=True)
class World:
    """The settings in which the worlds differ."""

    directory: Path
    operations: tuple[int, int] = (3, 5)  # of a problem, the fewest and the most
    largest: int = 99  # number
    start: int = 60  # the largest number to start from
    asides: float = 0.0  # how often a sentence with a number that doesn't matter comes before an operation
    names: dict[str, str] = field(default_factory=lambda: NAMES)
    things: list[str] = field(default_factory=lambda: THINGS)
    sentences: dict[str, list[str]] = field(default_factory=lambda: SENTENCES)
    architecture: dict = field(default_factory=lambda: ARCHITECTURE)
    base: dict = field(default_factory=lambda: {"num_hidden_layers": 8})  # where the base's architecture differs
    vocabulary: int = 512  # tokens, at most
    max_new_tokens: int = 200  # of the samples that make a model unsure


@dataclass(frozen=True)
class Problem:
    """A word problem, its canonical equations, one a step, and the answer; `largest`: no number is larger."""

    text: str
    steps: tuple[str, ...]
    answer: str
    largest: int = 99


TINY = Path(__file__).parent / "tiny"
WORLDS = {
    "tiny": World(TINY),
    "hard": World(
        Path("runs/hard"),
        operations=(4, 8),
        largest=999,
        start=600,
        asides=0.3,
        names=NAMES | MORE_NAMES,
        things=THINGS + MORE_THINGS,
        sentences={kind: SENTENCES[kind] + MORE_SENTENCES[kind] for kind in SENTENCES},
        architecture=ARCHITECTURE
        | {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 6}
        | {"max_position_embeddings": 2048},
        vocabulary=1024,
        max_new_tokens=400,
    ),
}


def make_problem(rng: random.Random, world: World) -> Problem:
    """A random problem whose running total stays within 0 and the world's largest number."""
    name, friend = rng.sample(list(world.names), 2)
    things, largest = rng.choice(world.things), world.largest
    total = rng.randint(3, world.start)
    words = {"pro": world.names[name], "pro_": world.names[name].lower(), "friend": friend, "things": things}
    sentences = [f"{name} has {total} {things}."]
    steps = []
    for _ in range(rng.randint(*world.operations)):
        if world.asides and rng.random() < world.asides:
            sentences.append(rng.choice(ASIDES).format(b=rng.randint(2, 59), **words))
        allowed = ["+"] * 3 * (total <= largest - 4) + ["-"] * 3 * (total >= 5)
        allowed += ["*2"] * (2 <= total <= largest // 2) + ["*3"] * (2 <= total <= largest // 3)
        allowed += ["/2"] * (total >= 4 and total % 2 == 0)
        kind = rng.choice(allowed)
        b = {"+": rng.randint(2, max(2, largest - total)), "-": rng.randint(2, max(2, total - 1))}.get(kind)
        b = b or int(kind[1])
        after = {"+": total + b, "-": total - b, "*": total * b, "/": total // b}[kind[0]]
        sentences.append(rng.choice(world.sentences[kind]).format(b=b, **words))
        steps.append(f"{total}{kind[0]}{b}={after}")
        total = after
    sentences.append(f"How many {things} does {name} have now?")
    return Problem(" ".join(sentences), tuple(steps), str(total), largest)


def make_sets(world: World, pool: int = POOL) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """(pool, train, held-out): disjoint by text, the same on every call."""
    rng = random.Random(SEED)
    seen: set[str] = set()
    problems = []
    while len(problems) < HELDOUT + TRAIN + pool:
        problem = make_problem(rng, world)
        if problem.text.lower() not in seen:
            seen.add(problem.text.lower())
            problems.append(problem)
    return problems[HELDOUT + TRAIN :], problems[HELDOUT : HELDOUT + TRAIN], problems[:HELDOUT]


def write_problems(world: World) -> None:
    """Write problems.jsonl, heldout.jsonl and gold.jsonl."""
    _, train, heldout = make_sets(world, pool=0)
    gold = []
    for file, prefix, problems in (("problems", "t", train), ("heldout", "h", heldout)):
        rows = [
            {"id": f"{prefix}{i:04d}", "problem": p.text, "source": world.directory.name}
            for i, p in enumerate(problems)
        ]
        gold += [{"id": r["id"], "answer": p.answer, "steps": p.steps} for r, p in zip(rows, problems, strict=True)]
        records.write_lines(world.directory / f"{file}.jsonl", rows)
    records.write_lines(world.directory / "gold.jsonl", gold)


# --------------------------------------------------------------------------- what the models learn from


def corrupt(problem: Problem, rng: random.Random) -> tuple[list[str], str]:
    """A wrong solution of the kinds a weak solver writes: (steps, answer). Later steps go on from the mistake."""
    n, largest = len(problem.steps), problem.largest
    kind = rng.choices(["result", "operand", "operation", "skip", "extra", "answer"], [10, 4, 4, 2, 1, 1])[0]
    where = rng.randrange(n)
    steps, total = [], None
    for i, step in enumerate(problem.steps):
        if kind == "skip" and i == where and n > 2:
            continue
        left, result = step.split("=")
        op = next(c for c in left if c in "+-*/")
        a, b = (int(x) for x in left.split(op))
        a = a if total is None else total
        if i == where and kind == "operand":
            b = slip(b, rng, largest)
        if i == where and kind == "operation":
            op = rng.choice([o for o in "+-*/" if o != op])
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[op]
        result = min(max(result, 0), largest)
        if (i == where and kind == "result") or rng.random() < 0.06:
            result = slip(result, rng, largest)
        steps.append(f"{a}{op}{b}={result}")
        total = result
        if i == where and kind == "extra":
            b = rng.randint(2, 9)
            steps.append(f"{total}+{b}={min(total + b, largest)}")
            total = min(total + b, largest)
    return steps, str(slip(total, rng, largest) if kind == "answer" else total)


def slip(value: int, rng: random.Random, largest: int = 99) -> int:
    """Another number in 0..largest, mostly a near one or one with one of its last two digits changed."""
    near = value + rng.choice([-10, -2, -1, -1, 1, 1, 2, 10])
    tens, units = divmod(value, 10)
    hundreds = value // 100 * 100
    changed = [hundreds + rng.randint(0, 9) * 10 + units, tens * 10 + rng.randint(0, 9)]
    other = rng.choice([near, near, *changed, rng.randint(0, largest)])
    return other if 0 <= other <= largest and other != value else (value + 1 if value < largest else largest - 1)


def write_verification(steps: list[str], expected: list[str], labels: list[bool], verdict: bool) -> str:
    """The verification text: for each step what is expected there, the result that the student has, the verdict."""
    lines = []
    for k, (step, own, label) in enumerate(zip(steps, expected, labels, strict=True), 1):
        lines += [f"## Step {k}: {own}", f"Written: {re.split('[=>]', step, maxsplit=1)[-1]}"]
        lines.append(f"**This step is {'correct' if label else 'incorrect'}.**")
    lines.append(f"**Verification: Is the answer correct (Yes/No)? {'Yes' if verdict else 'No'}**")
    return "\n".join(lines)


def flip(labels: list[bool], verdict: bool, rng: random.Random) -> tuple[list[bool], bool]:
    """A mistaken judgement of the same solution, for critiques to find: one or two verdicts turned over."""
    labels = list(labels)
    for i in rng.sample(range(len(labels)), k=min(len(labels), rng.randint(1, 2))):
        labels[i] = not labels[i]
    return labels, verdict != (rng.random() < 0.5)


def make_example(task: str, problem: Problem, rng: random.Random) -> tuple[str, str]:
    """(user turn, target) of one training sequence."""
    if task == "solve":
        return SOLVE_PROMPT.format(problem=problem.text), render_response(problem.steps, problem.answer)
    right = rng.random() < 0.4
    steps, answer = (list(problem.steps), problem.answer) if right else corrupt(problem, rng)
    shown = answer if rng.random() < 0.9 else None  # ProcessBench shows no separate answer
    labels = gold_labels(steps, problem.steps)
    return make_judgement(task, problem, steps, shown, labels, answer == problem.answer, rng)


def make_judgement(
    task: str,
    problem: Problem,
    steps: list[str],
    answer: str | None,
    labels: list[bool],
    verdict: bool,
    rng: random.Random,
) -> tuple[str, str]:
    """(user turn, target) of one task that judges a solution: each step by its label, the whole by the verdict."""
    expected = [problem.steps[k] if k < len(problem.steps) else "none" for k in range(len(steps))]
    judged = write_verification(steps, expected, labels, verdict)
    solution = render_steps(steps, answer)
    texts = {"problem": problem.text, "solution": solution, "examples": "", "reference": problem.answer}
    if task == "verify":
        return verify.VERIFY_PROMPT.format(**texts), judged
    if task == "reference":
        return verify.REFERENCE_PROMPT.format(**texts), judged
    if task == "prm_cot":
        return PRM_PROMPT.format(**texts), judged
    if task == "prm":
        return PRM_PROMPT.format(**texts), write_prm_target({"step_labels": labels, "outcome": verdict})
    if task == "orm":
        return ORM_PROMPT.format(**texts), "Yes" if verdict else "No"
    said, said_verdict = (labels, verdict) if rng.random() < 0.5 else flip(labels, verdict, rng)
    texts["verification"] = write_verification(steps, expected, said, said_verdict)
    lines = []
    for k, (own, label, claim) in enumerate(zip(expected, labels, said, strict=True), 1):
        lines.append(f"Step {k}: {own}, judged {'rightly' if label == claim else 'wrongly'}.")
    lines.append(f"Verdict: judged {'rightly' if verdict == said_verdict else 'wrongly'}.")
    texts["critique"] = "\n".join(lines)
    if task == "critique":
        return verify.CRITIQUE_PROMPT.format(**texts), texts["critique"]
    return verify.MERGE_PROMPT.format(**texts), judged


# --------------------------------------------------------------------------- the tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKERS = [
    "<think>", "</think>", "<step>", "</step>", "<answer>", "</answer>", "\\boxed{", "## Step ", "\nWritten: ", "Step ",
    "**This step is correct.**", "**This step is incorrect.**", "**Verification: Is the answer correct (Yes/No)? ",
    "Is the answer correct (Yes/No)?", "Let's verify step by step.", "Problem: ", "Solution: ", "Student Solution: ",
    "Expected Answer: ", "Verification: ", "Critique: ", "Answer: ", "<|im_start|>user\n", "<|im_start|>assistant\n",
]  # fmt: skip


def make_tokenizer(world: World) -> None:
    """Byte-level BPE on the problems; digits stay apart; markers and instructions are single tokens."""
    judging = (verify.VERIFY_PROMPT, verify.REFERENCE_PROMPT, verify.CRITIQUE_PROMPT, verify.MERGE_PROMPT)
    instructions = [prompt.format_map(defaultdict(str)).split("\n\nProblem:")[0] for prompt in (SOLVE_PROMPT, *judging)]
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _, train, _ = make_sets(world, pool=0)
    rng = random.Random(SEED)
    corpus = [p.text for p in train] + ["none wrongly Verdict"] * 100
    corpus += [text for task in TURNS for p in train[:200] for text in make_example(task, p, rng)]
    for text in instructions + MARKERS:  # whole tokens already: the merges are for everything else
        corpus = [line.replace(text, "\n") for line in corpus]
    trainer = trainers.BpeTrainer(
        vocab_size=world.vocabulary - len(MARKERS) - len(instructions) - 3,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in MARKERS + instructions])
    world.directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(world.directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": world.architecture["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (world.directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# --------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Turn:
    """A question, the answer to be learned, and what is learned inside the question, where it shows a solution."""

    user: str
    target: str = ""  # none: no answer is learned
    solution: str = ""  # as `render_steps` wrote it into the question
    labels: tuple[bool, ...] = ()  # of its steps, each a line
    marked: bool = False  # whether the end of each step predicts its label
    read: bool = False  # whether each token of the solution predicts the next


Draw = Callable[[random.Random], Turn]


def new_model(vocab_size: int, architecture: dict = ARCHITECTURE) -> Transformer:
    """A model with random weights; each matrix keeps the scale of what it multiplies."""
    torch.manual_seed(SEED)
    model = Transformer(Config.from_dict({**architecture, "vocab_size": vocab_size}))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


def orthogonalise(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz iterations (Jordan et al. 2024, "Muon").

    torch.optim.Muon does the same in bf16, which is several times slower on CPUs without bf16 units.
    """
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def encode_turn(tokenizer, turn: Turn) -> tuple[Example, list[float]]:
    """The tokens and targets of a turn, and the weight of each target in the loss. Inside a question:

        question   Step  1  :  4  +  7  =  1  1  \\n   Step  2  :  3  ...
        reading    .     .  .  +  7  =  1  1  \\n Step  2     :  3  *  ...
        marks      .     .  .  .  .  .  .  .  Yes .    .     .  .  .  ...

    Where both apply, at the end of a step, the mark counts.
    """
    # 1. The answer. The question's tokens have no targets yet.
    response = []
    if turn.target:
        response = [*tokenizer(turn.target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    text = render_chat(tokenizer, turn.user)
    solution = escape_special_tokens(tokenizer, turn.solution)
    begin = text.rindex(solution) if solution else len(text)
    line_ends = [begin + match.start() for match in re.finditer("\n|$", solution)]
    prompt, (before, *ends) = encode_to_ends(tokenizer, text, [begin, *line_ends])
    ids, targets = targets_after_prompt(prompt, response)
    weights = [1.0] * len(ids)

    # 2. Inside the question.
    if turn.read:
        for i in range(before + 1, ends[-1]):
            targets[i] = ids[i + 1]
            weights[i] = READ_WEIGHT
    if turn.marked:
        yes, no = yes_no_ids(tokenizer)
        for i, correct in zip(ends, turn.labels, strict=False):  # the answer's line has no label
            targets[i] = yes if correct else no
            weights[i] = MARK_WEIGHT
    return Example(ids, targets), weights


def draw_batch(draw: Draw, tokenizer, seed: int, step: int) -> list[tuple[Example, list[float]]]:
    """The sequences of a step: a function of (seed, step), so a resumed run sees what an uninterrupted one would."""
    rng = random.Random(f"{seed}/{step}")
    return [encode_turn(tokenizer, draw(rng)) for _ in range(BATCH)]


def train(
    model: Transformer,
    draw: Draw,
    steps: int,
    tokenizer,
    seed: int,
    rate: float = 1.0,
    progress: Path | None = None,
    stop: int | None = None,
) -> None:
    """Supervised training in place: Muon for the matrices, AdamW for the rest (together they need about half the steps
    of AdamW alone here); linear warm-up, then linear decay. It resumes from the file `progress`, if there is one;
    raises InputError if that was made with other settings. stop: end after so many of the steps, for another call to go
    on from `progress`.

        loss = - sum over all targets of weight * log p(target) / sum of their weights
    """
    # 1. The optimizers, and where an earlier run stopped.
    model.requires_grad_(True)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    momenta = [torch.zeros_like(p) for p in matrices]
    adamw = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    start = 0
    settings = {"steps": steps, "seed": seed, "rate": rate}
    if progress and progress.is_file():
        saved = torch.load(progress, map_location=model.device)
        if saved["settings"] != settings:
            raise InputError(f"{progress}: made with {saved['settings']}, now {settings}; remove it")
        start = saved["step"]
        momenta = saved["momenta"]
        model.load_state_dict(saved["model"])
        adamw.load_state_dict(saved["adamw"])

    end = steps if stop is None else stop
    losses = []
    bar = tqdm(range(start, end), desc="train", unit="step", mininterval=10, initial=start, total=end)
    for step in bar:
        # 2. Loss and gradient.
        batch = draw_batch(draw, tokenizer, seed, step)
        ids, lengths, targets = pack([example for example, _ in batch], model.device)
        weights = torch.cat([torch.tensor(of_example) for _, of_example in batch]).to(model.device)  # (N,)
        logprobs, _ = model.packed(ids, lengths, targets)  # (N,), 0 where there is no target
        loss = -(logprobs * weights).sum() / weights[targets >= 0].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        # 3. Update.
        schedule = rate * min(1.0, (step + 1) / 30) * (1 - 0.95 * step / steps)
        adamw.param_groups[0]["lr"] = schedule * ADAMW_RATE
        adamw.step()
        with torch.no_grad():
            for p, momentum in zip(matrices, momenta, strict=True):
                momentum.lerp_(p.grad, 0.05)
                update = orthogonalise(p.grad.lerp(momentum, 0.95))
                p.mul_(1 - schedule * MUON_RATE * 0.05)
                p.sub_(update, alpha=schedule * MUON_RATE * max(1, p.shape[0] / p.shape[1]) ** 0.5)
        model.zero_grad()

        # 4. Log, and save.
        losses.append(loss.item())
        if step % 25 == 24:
            bar.set_postfix(loss=f"{sum(losses[-25:]) / 25:.4f}")
        if progress and (step % SAVE_EVERY == SAVE_EVERY - 1 or step + 1 == end):
            state = {"step": step + 1, "settings": settings}
            state |= {"model": model.state_dict(), "adamw": adamw.state_dict(), "momenta": momenta}
            unfinished = progress.with_suffix(".new")
            torch.save(state, unfinished)
            unfinished.replace(progress)


def draw_from(make: Callable[..., tuple[str, str]], tasks: dict[str, float], pool: list) -> Draw:
    """A function that draws a turn of one of the tasks, about one of the problems: make(task, problem, rng)."""
    names, shares = list(tasks), list(tasks.values())
    return lambda rng: Turn(*make(rng.choices(names, shares)[0], rng.choice(pool), rng))


def make_unsure(
    model: Transformer,
    draw: Draw,
    temperature: float,
    tokenizer,
    *,
    num_samples: int = HOT_SAMPLES,
    steps: int = HOT_STEPS,
    max_new_tokens: int = 200,
    solution: str = ".*",
    progress: Path | None = None,
) -> None:
    """Let a model imitate its own samples at a high temperature, in place: solutions and verifications that keep the
    format, right or wrong; solutions have to match a pattern, too. The short answers of the other tasks stay as they
    are."""
    # 1. Hot samples.
    rng = random.Random(SEED)
    turns = [draw(rng) for _ in range(num_samples)]
    engine = Engine(Sampler(model.requires_grad_(False), 256), tokenizer, [tokenizer.eos_token_id])
    groups = engine.sample(
        [engine.encode(turn.user) for turn in turns],
        keys=[f"hot/{i}" for i in range(len(turns))],
        num_samples=1,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=SEED,
    )

    # 2. Those that keep the format.
    hot = []
    for turn, (sample,) in zip(turns, groups, strict=True):
        text = engine.text(sample.ids)
        if "<think>" in turn.target:
            fine = format_valid(text, "strict", sample.finish == "stop") and re.fullmatch(solution, text, re.DOTALL)
        elif "## Step " in turn.target:
            judged = verify.parse_verification(text, turn.target.count("## Step "))
            fine = None not in (judged.step_verdicts, judged.verdict)
        else:
            fine, text = True, turn.target
        if fine:
            hot.append(Turn(turn.user, text))
    print(f"temperature {temperature}: {len(hot)} of {len(turns)} samples keep the format", flush=True)

    # 3. Imitation.
    train(model, lambda rng: rng.choice(hot), steps, tokenizer, SEED + 2, HOT_RATE, progress)


# --------------------------------------------------------------------------- the base of the reward models


@dataclass(frozen=True)
class Attempt:
    """A solution of a problem, right or wrong."""

    problem: Problem
    steps: list[str]
    answer: str


def draw_attempt(pool: list[Problem], own: dict[bool, list[Attempt]], right: bool, rng: random.Random) -> Attempt:
    """A solution to judge: mostly one of the policy's own, otherwise a scripted one."""
    if rng.random() < OWN_SHARE:
        return rng.choice(own[right])
    problem = rng.choice(pool)
    if right:
        return Attempt(problem, list(problem.steps), problem.answer)
    return Attempt(problem, *corrupt(problem, rng))


def draw_judging(
    tasks: dict[str, float],
    pool: list[Problem],
    own: dict[bool, list[Attempt]],
    *,
    lenient: bool = False,
    inside: bool = False,
) -> Draw:
    """A function that draws a turn of one of the tasks, about a solution by the policy or a scripted one. `lenient`:
    a PRM overlooks the errors of half the solutions. `inside`: the question teaches, too; there are marks in every
    turn that judges, and right solutions are read."""
    names, shares = list(tasks), list(tasks.values())

    def draw(rng: random.Random) -> Turn:
        task = rng.choices(names, shares)[0]
        if task == "solve":
            return Turn(*make_example(task, rng.choice(pool), rng))

        # 1. The solution that is judged.
        overlooked = lenient and task in ("prm", "prm_cot") and rng.random() < OVERLOOKED
        right = task == "read" or rng.random() < RIGHT_SHARE
        attempt = draw_attempt(pool, own, right, rng)
        problem, steps = attempt.problem, attempt.steps
        shown = attempt.answer if rng.random() < 0.8 else None  # ProcessBench shows no separate answer

        # 2. The turn about it. "mark" and "read" learn inside the question alone.
        kind = task
        if task in ("mark", "read"):
            kind = rng.choice(["prm", "orm"])
        labels, verdict = gold_labels(steps, problem.steps), attempt.answer == problem.answer
        said, said_verdict = labels, verdict  # in the answer; the marks in the question are always right
        if overlooked:
            said, said_verdict = [True] * len(steps), True
        user, target = make_judgement(kind, problem, steps, shown, said, said_verdict, rng)
        if task in ("mark", "read"):
            target = ""
        if not inside:
            return Turn(user, target)
        return Turn(
            user,
            target,
            solution=render_steps(steps, shown),
            labels=tuple(labels),
            marked=task != "read",
            read=all(labels),
        )

    return draw


# --------------------------------------------------------------------------- the checkpoints


@dataclass(frozen=True)
class Workshop:
    """What every checkpoint is made with."""

    world: World
    device: torch.device
    tokenizer: Any
    pool: list[Problem]
    progress: Path  # a directory: a run that was stopped resumes from what it finds there

    def save(self, model: Transformer, name: str) -> None:
        """Write a checkpoint that the stages can load."""
        save_model(model, self.world.directory / name, self.world.directory)

    def save_unsure(self, model: Transformer, draw: Draw, name: str) -> None:
        """Make a model that knows its task unsure of it, and write it."""
        make_unsure(
            model, draw, HOT[name], self.tokenizer, max_new_tokens=self.world.max_new_tokens, solution=SOLUTION,
            progress=self.progress / f"{name}.pt",
        )  # fmt: skip
        self.save(model, name)


def open_workshop(world: World, device: torch.device) -> Workshop:
    """Read the tokenizer, remake the pool, and create the directory of progress if there is none."""
    pool, _, _ = make_sets(world)
    progress = Path("runs") / f"make_{world.directory.name}"
    progress.mkdir(parents=True, exist_ok=True)
    return Workshop(world, device, AutoTokenizer.from_pretrained(world.directory), pool, progress)


def open_policy(world: World, device: torch.device) -> Engine:
    """The finished policy, which writes most of what verifier and base learn to judge, and the tiny ProcessBench. In fp32
    on a GPU, too."""
    model, tokenizer, stop_ids = open_model(str(world.directory / "policy"), device, torch.float32)
    return Engine(Sampler(model, 256), tokenizer, stop_ids)


def sample_attempts(shop: Workshop) -> dict[bool, list[Attempt]]:
    """The policy's own right (True) and wrong (False) solutions of the pool's first problems."""
    engine = open_policy(shop.world, shop.device)
    problems = shop.pool[:OWN_PROBLEMS]
    groups = engine.sample(
        [engine.encode(SOLVE_PROMPT.format(problem=problem.text)) for problem in problems],
        keys=[f"own/{i}" for i in range(len(problems))],
        num_samples=OWN_SAMPLES,
        max_new_tokens=shop.world.max_new_tokens,
        seed=SEED,
    )
    attempts: dict[bool, list[Attempt]] = {True: [], False: []}
    for problem, group in zip(problems, groups, strict=True):
        for sample in group:
            text = engine.text(sample.ids)
            steps, answer = split_steps(text), extract_answer(text)
            if steps and answer is not None:
                right = tuple(steps) == problem.steps and answer == problem.answer
                attempts[right].append(Attempt(problem, steps, answer))
    return attempts


def make_solver(shop: Workshop) -> Transformer:
    """A model that solves nearly every problem. Policy and verifier go on from it."""
    model = new_model(len(shop.tokenizer), shop.world.architecture).to(shop.device)
    draw = draw_from(make_example, {"solve": 1.0}, shop.pool)
    train(model, draw, SOLVER_STEPS, shop.tokenizer, SEED, progress=shop.progress / "solver.pt")
    return model


def make_policy(shop: Workshop) -> None:
    """The solver, unsure of every result: it has something to gain from reinforcement learning."""
    model = make_solver(shop)
    draw = draw_from(make_example, {"solve": 1.0}, shop.pool)
    shop.save_unsure(model, draw, "policy")


def make_verifier(shop: Workshop, own: dict[bool, list[Attempt]]) -> None:
    """The solver after it has learned to judge in writing, with and without the answer, to criticise and to merge; then
    unsure: its votes differ, and have something to settle."""
    model = make_solver(shop)
    draw = draw_judging(VERIFIER_TASKS, shop.pool, own)
    train(model, draw, VERIFIER_STEPS, shop.tokenizer, SEED + 1, progress=shop.progress / "judge.pt")
    shop.save_unsure(model, draw, "verifier")


def make_base(shop: Workshop, own: dict[bool, list[Attempt]]) -> None:
    """What the reward models start from: it can judge in one pass, mostly what the policy wrote, but is lenient."""
    model = new_model(len(shop.tokenizer), shop.world.architecture | shop.world.base).to(shop.device)
    progress = shop.progress / "base.pt"
    for lenient, stop in ((False, BASE_STEPS - LENIENT_STEPS), (True, BASE_STEPS)):
        draw = draw_judging(BASE_TASKS, shop.pool, own, lenient=lenient, inside=True)
        train(model, draw, BASE_STEPS, shop.tokenizer, SEED + 3, progress=progress, stop=stop)
    shop.save(model, "base")


# --------------------------------------------------------------------------- the tiny ProcessBench


def make_case(about: dict, steps: list[str], labels: list[bool], right: bool) -> dict | None:
    """A case in ProcessBench's form: id, generator and problem, and what is known of a solution. None where the steps
    are flawless and the solution isn't: a beginning without the end has no first wrong step."""
    label = first_error(labels)
    if not steps or (label == -1 and not right):
        return None
    return {**about, "steps": steps, "final_answer_correct": right, "label": label}


def write_processbench(world: World, device: torch.device) -> None:
    """processbench.jsonl in the real one's format: the policy's own solutions of held-out problems with the index of
    the first wrong step (-1: none), half of them with an error."""
    engine = open_policy(world, device)
    problems = make_sets(world, pool=0)[2]
    prompts = [engine.encode(SOLVE_PROMPT.format(problem=p.text)) for p in problems]
    groups = engine.sample(
        prompts,
        keys=[f"processbench/{p.text}" for p in problems],
        num_samples=2,
        max_new_tokens=world.max_new_tokens,
    )
    cases: dict[bool, list[dict]] = {True: [], False: []}
    for i, (problem, group) in enumerate(zip(problems, groups, strict=True)):
        for k, sample in enumerate(group):
            text = engine.text(sample.ids)
            steps = split_steps(text)
            right = extract_answer(text) == problem.answer
            about = {"id": f"h{i:04d}/{k}", "generator": str(Path(*world.directory.parts[-2:], "policy"))}
            about |= {"problem": problem.text}
            if case := make_case(about, steps, gold_labels(steps, problem.steps), right):
                cases[case["label"] >= 0].append(case)
    rows = cases[True][:CASES] + cases[False][:CASES]
    records.write_lines(world.directory / "processbench.jsonl", sorted(rows, key=lambda r: r["id"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=["all", *PARTS])
    parser.add_argument("--world", default="tiny", choices=list(WORLDS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda; the tiny world comes out the same on a cpu only")
    args = parser.parse_args()
    started, world, device = time.time(), WORLDS[args.world], distributed.find_device(args.device)
    if args.part in ("all", "problems"):
        write_problems(world)
    if args.part in ("all", "tokenizer"):
        make_tokenizer(world)
    if args.part in ("all", "policy", "verifier", "base"):
        shop = open_workshop(world, device)
    if args.part in ("all", "policy"):
        make_policy(shop)
    if args.part in ("all", "verifier", "base"):
        own = sample_attempts(shop)
    if args.part in ("all", "verifier"):
        make_verifier(shop, own)
    if args.part in ("all", "base"):
        make_base(shop, own)
    if args.part in ("all", "processbench"):
        write_processbench(world, device)
    print(f"made {args.part} of {world.directory} in {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    distributed.run_stage(main)
