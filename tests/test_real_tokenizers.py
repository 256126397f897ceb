"""The prompts through the authentic Qwen2.5 and Qwen3 tokenizers; skipped where ../shared is absent."""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

from generate import SOLVE_PROMPT, open_tokenizer, render_response, render_steps
from kernels.chat import encode_chat, escape_special_tokens
from kernels.transformer import Config, Transformer, save_model
from train_prm import ORM_PROMPT, PRM_PROMPT, step_end_positions, yes_no_ids
from verify import critique_prompt, verification_prompt

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
SHARED = ROOT / "../shared/data/qwen-tokenizer"
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/qwen-tokenizer is absent")

TEXT_TOKENS = 151_643  # ids from here on are added tokens
END, IM_START, IM_END, THINK, END_THINK = 151_643, 151_644, 151_645, 151_667, 151_668
# What the template puts before the user's turn: Qwen2.5 inserts a system message of its own.
OPENING = {
    "qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n",
    "qwen3": "",
}
SOLUTION = {
    "problem": "Find $\\sum_{k=1}^{2024} \\frac{1}{k(k+1)}$ to 12 digits, then 3,141,592 × 10⁻⁶. 求 $x$ 的值。",
    "steps": [
        "Each term telescopes: \\[\\frac{1}{k(k+1)} = \\frac1k - \\frac1{k+1}.\\]",
        "So the sum is $1 - \\frac{1}{2025}$.\n\nThat is 0.999506172839…",
        "因此答案是 $\\frac{2024}{2025}$。😀",
    ],
    "answer": "\\frac{2024}{2025}",
}
VERIFICATION = "## Step 1: The terms\nRight: 1/2 = 1 - 1/2.\n**This step is correct.**"
RENDERED = {"problem": SOLUTION["problem"], "solution": render_steps(SOLUTION["steps"], SOLUTION["answer"])}
TURNS = {
    "solve": SOLVE_PROMPT.format(problem=SOLUTION["problem"]),
    "verify": verification_prompt(SOLUTION, 2),
    "verify, bare": verification_prompt(SOLUTION, 0),
    "verify, guided": verification_prompt(SOLUTION, 2, "2024/2025"),
    "critique": critique_prompt(SOLUTION, f"<think>1 + 1 = 3?</think>{VERIFICATION}"),
    "merge": critique_prompt(SOLUTION, VERIFICATION, "Section 1 judged rightly: 2 - 1 = 1."),
    "orm": ORM_PROMPT.format(**RENDERED),
    "prm": PRM_PROMPT.format(**RENDERED),
}


def copy_tokenizer(name: str, path: Path) -> Path:
    """Make a directory that AutoTokenizer loads; returns it."""
    path.mkdir(exist_ok=True)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(SHARED / file, path)
    shutil.copy(SHARED / f"{name}_tokenizer_config.json", path / "tokenizer_config.json")
    return path


@pytest.fixture(scope="module", params=OPENING)
def qwen(request, tmp_path_factory):
    """(name, tokenizer), opened by the stages' own function."""
    path = copy_tokenizer(request.param, tmp_path_factory.mktemp(request.param))
    tokenizer, stops = open_tokenizer(path)
    assert stops == [IM_END]
    return request.param, tokenizer


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
def test_a_prompt_is_the_template_around_the_turn(qwen, turn):
    """Guards: a template's tokens spelled out in letters or put there twice, a turn that is cut, trimmed or changed, a
    generation prompt left out, and thinking tags that Qwen3 was trained to see as one token each."""
    name, tokenizer = qwen
    ids = encode_chat(tokenizer, turn)
    opening = OPENING[name]
    assert tokenizer.decode(ids) == f"{opening}<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
    tags = [THINK, END_THINK] if name == "qwen3" and "<think>" in turn else []
    system = [IM_START, IM_END] if opening else []
    assert [i for i in ids if i >= TEXT_TOKENS] == [*system, IM_START, *tags, IM_END, IM_START]


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
def test_each_digit_is_a_token(qwen, turn):
    """Guards: a tokenizer put together without its own pre-tokenizer, so that 2024 becomes tokens which the model never
    saw in that place."""
    _, tokenizer = qwen
    ids = encode_chat(tokenizer, turn)
    pieces = [piece for piece in map(tokenizer.decode, ids) if any("0" <= c <= "9" for c in piece)]
    assert "".join(pieces) == "".join(c for c in tokenizer.decode(ids) if "0" <= c <= "9")
    assert {len(piece) for piece in pieces} == {1}


def test_responses_come_back_as_text(qwen):
    """Guards: thinking tags dropped with the special tokens, so that no response has the format, and thinking is
    parsed as if it were the verdict; an end of turn that stays in the text."""
    _, tokenizer = qwen
    text = render_response(SOLUTION["steps"], SOLUTION["answer"])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode([*ids, IM_END, END], skip_special_tokens=True) == text


PIECES = [
    "a",
    "12",
    ".",
    "。",
    "中文",
    "😀",
    "👨‍👩‍👧",
    "e\u0301",
    "\u0301",
    "क्ष",
    "\\frac{1}{2}",
    "$",
    " ",
    "\n",
    "\r\n",
    "\t",
]
PIECES += ["\u2028", "Step 2: ", "Answer: ", "</think>", "<|im_start|>"]


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), min_size=1, max_size=4), st.booleans())
@example(SOLUTION["steps"], True)
@example(["line 1.\n\n- line 2\n", "Step 2: a\nStep 3: b", "end…\n\n"], False)
@example(["", " ", "\n"], False)
@example(["cafe\u0301", "\u0301e", "e\u0301"], True)  # Qwen's tokenizers compose e and its accent
@settings(deadline=None, max_examples=100, database=None)
def test_a_step_is_read_off_at_its_last_token(qwen, steps, answered):
    """Guards: a discriminative PRM that judges a step before its last character, half-way through a character of
    several tokens, or after the next step has begun; offsets of the text before normalisation used after it; and a
    prompt encoded otherwise than the other stages do."""
    _, tokenizer = qwen
    answer = "7" if answered else None
    ids, ends = step_end_positions(tokenizer, {"problem": "P?", "steps": steps, "answer": answer})
    assert ids == encode_chat(tokenizer, PRM_PROMPT.format(problem="P?", solution=render_steps(steps, answer)))
    assert len(ends) == len(steps) + 1 and ends[-1] == len(ids) - 1
    head, middle, _ = tokenizer.decode(ids).partition("Student Solution: ")
    for k, end in enumerate(ends[:-1], 1):
        wanted = unicodedata.normalize("NFC", head + middle + escape_special_tokens(tokenizer, render_steps(steps[:k])))
        seen = tokenizer.decode(ids[: end + 1])
        # A full stop and the newlines after it are one token, which is the step's last.
        assert seen.startswith(wanted) and not seen[len(wanted) :].strip()
        assert not tokenizer.decode(ids[:end]).startswith(wanted)


def test_a_step_ends_with_the_newline_that_its_full_stop_swallows(qwen):
    """Guards: the test above passing on tokenizers that never merge across the end of a step; and a Yes or No of
    several tokens, of which the first says little."""
    _, tokenizer = qwen
    ids, ends = step_end_positions(tokenizer, {"problem": "P?", "steps": ["It is 1.", "So 2", "3 😀."], "answer": None})
    assert [tokenizer.decode(ids[end]) for end in ends] == [".\n", "2", ".\n\n", "\n"]
    assert [tokenizer.decode(token) for token in yes_no_ids(tokenizer)] == ["Yes", "No"]


SNAPSHOT = {
    "qwen2.5": (808, "d49e517841bba965166c6bbec376be6352e8764028c749fe4d5958154aef933e"),
    "qwen3": (787, "edfe77e8c052ab3a2d0f8d654b562005478c6bf025ca27021b707596b5c7b24a"),
}


def test_the_verification_prompt_is_the_one_on_record(qwen):
    """Guards: a prompt, worked example, template or tokenizer that changes by accident: verifications made before and
    after would vote together. After a change on purpose, copy the new length and sha256 from the failure."""
    name, tokenizer = qwen
    ids = encode_chat(tokenizer, verification_prompt(SOLUTION, 2))
    seen = len(ids), hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()
    assert seen == SNAPSHOT[name], f"now {seen}"


@pytest.mark.slow
def test_a_model_of_half_a_billion_weights_goes_through_the_stages(tmp_path):
    """Guards: a second copy of the weights or the whole logits in memory: Qwen2.5-0.5B's shape and tokenizer with
    random weights through generate, verify (N = 2) and one SFT step in less than 10 GB."""
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151_936,
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
        "hidden_act": "silu",
    }  # fmt: skip
    torch.manual_seed(0)
    network = Transformer(Config.from_dict(config))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model = copy_tokenizer("qwen2.5", tmp_path / "model")
    save_model(network, model, model)
    del network
    problem = {"id": "p", "problem": "What is 1 + 1?"}
    solution = {"id": "p/0", "problem": problem["problem"], "steps": ["1 + 1 = 2"], "answer": "2"}
    label = {**solution, "step_labels": [True], "outcome": True, "text": "Right.", "dropped": None}
    for name, record in (("problems", problem), ("solutions", solution), ("labels", label)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    for stage, source, *flags in (
        ("generate", "problems", "--num_samples", 2, "--max_new_tokens", 16),
        ("verify", "solutions", "--num_verifications", 2, "--max_new_tokens", 16),
        ("train_prm", "labels", "--epochs", 1, "--eval_fraction", 0),
    ):
        words = [sys.executable, ROOT / f"{stage}.py", "--model", model, "--device", "cpu", *flags]
        words += [f"--{source}", tmp_path / f"{source}.jsonl", "--out", tmp_path / stage]
        subprocess.run(list(map(str, words)), cwd=tmp_path, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 10e6  # kB, of the largest of them
