"""Stage I, first half: a generator writes M solutions per problem (SPARK, arXiv 2512.03244, Sec. 3.1).

    problems.jsonl -> generate.py -> solutions.jsonl       (fields: data/README.md)

    python generate.py                                     # the tiny world, on a CPU, in seconds
    python generate.py --model Qwen/Qwen2.5-14B-Instruct --problems problems.jsonl --out runs/solutions.jsonl
    torchrun --nproc_per_node 8 generate.py --model ... --problems ... --out ...       # sharded by problem

Answers in the problems file are never used. The later stages import the text format, the chat template and the engine,
that is a model with its tokenizer and sampler.
"""

import argparse
import json
import math
import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from data import records
from data.records import COUNT, POSITIVE, SEED, TEMPERATURE, TOP_P
from kernels import distributed
from kernels.distributed import InputError
from kernels.sampler import Sample, Sampler, with_progress
from kernels.transformer import load_model, read_config

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer

# Used when no --model is given; an explicit flag wins.
TINY = {
    "model": "data/tiny/policy",
    "problems": "data/tiny/problems.jsonl",
    "out": "runs/tiny/solutions.jsonl",
    "max_new_tokens": 160,
    "temperature": 1.0,  # at the paper's 0.7 the tiny generator makes too few mistakes to learn from
    "top_p": 1.0,
    "limit": 100,
    "slots": 256,
    "device": "cpu",
}
# A run resumes with other values of these flags, because they don't change records.
MAY_CHANGE_ON_RESUME = {"out", "limit", "slots", "device"}

# --------------------------------------------------------------------------- solutions as text

SOLVE_PROMPT = r"""Solve the problem step by step. Write your reasoning as <think><step>...</step> <step>...</step></think> with one step of reasoning in each <step>, then the final answer as <answer>\boxed{{...}}</answer>, and nothing after it.

Problem: {problem}"""

# The tags of this format. A tokenizer may call some of them special tokens; here they are always text.
TAGS = ("<think>", "</think>", "<step>", "</step>", "<answer>", "</answer>")

# In these patterns each run of blanks is matched by exactly one character class; overlapping classes backtrack
# quadratically.
# "<step>2 + 3 = 5</step>" and "<step id=1>2 + 3 = 5</step>". (?:(?!<step\b).)*? is text in which no other <step> opens,
# so of nested tags the innermost pair matches.
STEP_TAG = re.compile(r"<step(?:\s[^<>]*)?>((?:(?!<step\b).)*?)</step>", re.DOTALL)
# "<answer>5</answer>", or cut off
ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
# "Step 2: ", "**Step 2:** ", "Step #2) ", "> Step 2 of 3 - ", "### Step 2" alone on its line, and the "Step 2" of
# "Step 2 (add): ", whose title belongs to the text. "Step 2.1: " is part of a step, and "Step 2.5 m" is a number.
STEP_HEADING = re.compile(
    r"""^[ \t#*_>`•+-]* Step [ \t*_\#№-]* (\d+) (?:[ \t]*(?:of|/)[ \t]*\d+)?
    (?: [ \t*_]* (?:[:：)）\]、]|[.．](?!\d)) [*_]* [ \t]*
      | [ \t]+ [–—-] [ \t]+
      | (?= [ \t]* \([^()\n]*\) [ \t*_]* [:：] )
      | [ \t*_\#\r]* $ )""",
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
# "Answer: 5", "**Final answer:** 5", "- Answer: 5", and "### Answer" alone on its line
ANSWER_LINE = re.compile(
    r"^[ \t#*_>`•+-]*(?:final[ \t]+)?answer[ \t*_#\r]*(?:[:：](.*))?$", re.MULTILINE | re.IGNORECASE
)
BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
# "---" below a blank line, where it isn't part of a long addition
RULE = re.compile(r"(\A|\n[^\S\n]*\n)[ \t]*([-*_])(?:[ \t]*\2){2,}[ \t]*(?=\n|\Z)")
# "**" or "__" at the beginning or the end of a word, but not in 2**3
EMPHASIS = re.compile(r"(?<!\S)(?:\*\*|__)(?=\S)|(?<=\S)(?:\*\*|__)(?=[\s.,;:!?]|$)")


def tagged_steps(text: str) -> list[str]:
    """The contents of the step tags that aren't empty; none if the tags are only mentioned, "<step>...</step>"."""
    steps = [step.strip() for step in STEP_TAG.findall(text)]
    if all(step.strip(".…") == "" for step in steps):
        return []
    return [step for step in steps if step]


def split_thoughts(text: str) -> tuple[str, str]:
    """(what a reasoning generator thought, the solution that it wrote then).

    A thought begins with `<think>`, or with the text where the chat template has opened it, and ends with `</think>`,
    or with the text where it was cut off: then it is nothing but drafts. Not a thought is what stands before a bare
    `<answer>`: a policy that reasons inside `<think>` without `<step>` tags has no other steps.
    """
    if "</think>" in text.partition("<think>")[0]:
        text = "<think>" + text
    thoughts, solution = "", ""
    for part in text.split("</think>"):
        before, _, thought = part.partition("<think>")
        solution += before
        thoughts += thought
    if "<answer>" in solution and not ANSWER_TAG.sub("", solution).strip():
        return "", text
    return thoughts, solution


def find_answer_line(text: str) -> re.Match | None:
    """The last match of `ANSWER_LINE`. A heading at the top with several lines below it doesn't count: it introduces
    the solution."""
    top = len(text) - len(text.lstrip())
    last = None
    for match in ANSWER_LINE.finditer(text):
        introduces = match.start() <= top and not read_value(match.group(1)) and "\n" in text[match.end() :].strip()
        if not introduces:
            last = match
    return last


def read_value(rest_of_line: str | None) -> str:
    """What an answer line says: "**5**." -> "5."."""
    value = EMPHASIS.sub("", rest_of_line or "").strip("*_` \t\r")
    if value.endswith((".", ",", ";")):  # "*5*." is "5*." by now
        return value[:-1].rstrip("*_` ") + value[-1]
    return value


def cut_answer(text: str) -> str:
    """The text without its answer: the last answer line with the rest of its paragraph or, if the line is only a
    heading, with all that follows. Steps that follow stay."""
    line = find_answer_line(text)
    if line is None:
        return text
    end = len(text)
    stops = [STEP_HEADING.search(text, line.end())]
    if read_value(line.group(1)):
        stops.append(BLANK_LINE.search(text, line.end()))
    for stop in stops:
        if stop is not None:
            end = min(end, stop.start())
    return text[: line.start()] + text[end:]


def split_steps(text: str) -> list[str]:
    """The reasoning steps of a solution, in order, without the final answer.

    Three layouts: `<step>…</step>` (the policy's format; contents kept verbatim), "Step 1: …" headings (instruct
    models; headings removed), and paragraphs separated by blank lines (the fallback, and before a first heading that is
    not Step 1). Empty steps are dropped, and so are the thoughts of a reasoning generator, see `split_thoughts`.

    Headings are read in English, as the prompts are. A sub-step ("Step 2.1:") stays in its step. A blank line separates
    paragraphs wherever it stands, in display mathematics or code, too: nothing is lost by that, and an environment that
    is never closed can't swallow the other steps. A `<step>` that is never closed opens a paragraph.
    """
    tagged = tagged_steps(text)
    if tagged:
        return tagged

    # No steps in tags. What is left of tags are mentions, and some that don't close.
    _, body = split_thoughts(text)
    body = ANSWER_TAG.sub("", STEP_TAG.sub("", body))
    body = re.sub(r"<step\b[^<>]*>", "\n\n", body)
    body = re.sub("|".join(TAGS), "", body)
    body = re.sub(r"\r\n?", "\n", body)
    body = cut_answer(RULE.sub(r"\1", body))

    # "Now. Step 1: a Step 2: b" is split into "Now. ", "1", "a ", "2", "b".
    before, *rest = STEP_HEADING.split(body)
    numbers = rest[0::2]
    steps = rest[1::2]
    starts_at_step_1 = bool(numbers) and numbers[0].lstrip("0０") in ("1", "１")  # int() refuses thousands of digits
    if starts_at_step_1:
        steps[0] = before + steps[0]  # an introduction belongs to the first step
    else:
        steps = BLANK_LINE.split(before) + steps
    return [step.strip() for step in steps if step.strip()]


def render_steps(steps: list[str], answer: str | None = None) -> str:
    """The numbered layout that every verifier and reward-model prompt uses: "Step 1: …" lines, then "Answer: …". A step
    that begins with a number of its own keeps it ("Step 1: Step 1: …"), because other steps may refer to it."""
    lines = [f"Step {k}: {step}" for k, step in enumerate(steps, 1)]
    if answer is not None:
        lines.append(f"Answer: {answer}")
    return "\n".join(lines)


def render_response(steps: list[str], answer: str) -> str:
    """The policy's format, which `SOLVE_PROMPT` asks for; `split_steps` and `extract_answer` undo it."""
    reasoning = " ".join(f"<step>{step}</step>" for step in steps)
    return f"<think>{reasoning}</think><answer>\\boxed{{{answer}}}</answer>"


def find_boxes(text: str) -> list[tuple[int, int]]:
    r"""(start, end) of the contents of each closed `\boxed{…}`, by start. Braces nest; `\{` and `\}` don't count."""
    boxes = []
    open_braces = []  # for each: where its contents start, and whether it belongs to a box
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, flags=re.DOTALL):
        token = match.group()
        if token.startswith("\\boxed"):
            open_braces.append((match.end(), True))
        elif token == "{":
            open_braces.append((match.end(), False))
        elif token == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box:
                boxes.append((start, match.start()))
    return sorted(boxes)  # by start: a box inside another one was closed first


def unwrap_boxes(text: str) -> str:
    r"""Replace each closed `\boxed{x}` by x."""
    wrappers = []  # (start, end) of each `\boxed{` and of its closing brace: (0, 7) and (8, 9) in `\boxed{7}`
    for start, end in find_boxes(text):
        wrappers.append((text.rindex("\\boxed", 0, start), start))
        wrappers.append((end, end + 1))
    kept = []
    position = 0
    for start, end in sorted(wrappers):
        kept.append(text[position:start])
        position = end
    kept.append(text[position:])
    return "".join(kept)


def extract_answer(text: str) -> str | None:
    r"""The final answer: the last closed `\boxed{…}`, else the contents of the last `<answer>` tag, else the last
    "Answer: …" line or the line below such a heading; None if missing or empty. Thoughts aren't read.

    The last box counts even if it is empty or only mentioned: an answer that can be chosen isn't final. TeX's `\boxed 73`
    boxes a single digit, `\\boxed{73}` is a line break and a word, and "#### 73" is a heading: none of them is read.
    """
    if not tagged_steps(text):
        _, text = split_thoughts(text)
    boxes = find_boxes(text)
    if boxes:
        start, end = boxes[-1]
        return text[start:end].strip() or None
    tags = [match.group(1).strip(" \t\r\n.…") for match in ANSWER_TAG.finditer(text)]
    if tags and "\\boxed" not in tags[-1]:  # a box without its closing brace isn't an answer
        return tags[-1] or None
    line = find_answer_line(text)
    if line is None:
        return None
    value = read_value(line.group(1))
    if not value:
        below = text[line.end() :].lstrip().partition("\n")[0]
        if not STEP_HEADING.match(below):
            value = read_value(below)
    return value or None


# Commands and characters that set nothing: spaces of TeX, and commands around text.
INVISIBLE = re.compile(
    r"\\(?:text|math|mbox|hbox|fbox|boxed|operatorname|quad|qquad|[hv]?phantom)[a-z]*|\\[,;:! ]|[{}$~]"
)


def count_empty_boxes(response: str) -> int:
    r"""How many closed boxes show nothing, as `\boxed{}`, `\boxed{\text{ }}`, or one with a zero-width space. Under
    `paper` such a response is valid, as in the paper."""
    count = 0
    for start, end in find_boxes(response):
        visible = INVISIBLE.sub("", response[start:end])
        # Categories C and Z: control and format characters, separators.
        count += all(unicodedata.category(character)[0] in "CZ" for character in visible)
    return count


def has_layout_line(step: str) -> bool:
    """Whether a line of a step begins as a line of `render_steps` does: "Step 3:" or "Answer:". The judge would take it
    for one. Lines end wherever a reader may see them end, at a carriage return or U+2028, too."""
    for line in step.splitlines():
        words = re.sub(r"^\W+", "", line)
        if STEP_HEADING.match(words) or ANSWER_LINE.match(words):
            return True
    return False


def hidden_text(response: str) -> str:
    """What a judge isn't shown of a response: where there are step tags, the text outside of steps and answer, else the
    thoughts."""
    if not tagged_steps(response):
        thoughts, _ = split_thoughts(response)
        return thoughts.strip()
    outside = ANSWER_TAG.sub("", STEP_TAG.sub("", response))
    return re.sub("|".join(TAGS), "", outside).strip()


def format_valid(response: str, constraints: str = "paper", finished: bool = True) -> bool:
    r"""V, whether a response has the required format. The constraints:

    none: always.
    paper: exactly one closed `\boxed{…}`; one `<answer>` and then one `</answer>`, with only white space after it.
    strict: also one `<think>` with at least one `<step>`, no nested tags, no text outside the tags, the box inside the
        answer and not empty, no step with a line that the judge would take for its own layout (`has_layout_line`), and
        finished, that is, the response ended by itself and not at the length limit.

    finished counts under strict only: the paper's constraints are about the text. A `<think>` that the chat template
    writes belongs to the response: `Engine.text` puts it there.
    """
    if constraints == "none":
        return True
    if len(find_boxes(response)) != 1:
        return False
    if response.count("<answer>") != 1 or response.count("</answer>") != 1:
        return False
    _, _, rest = response.partition("<answer>")
    answer, closing_tag, after = rest.partition("</answer>")
    if not closing_tag or after.strip():  # without a closing tag here, it stands before the opening one
        return False
    if constraints == "paper":
        return True

    # strict. Split at the tags: text, tag, text, tag, ..., text.
    outside, *rest = re.split("(" + "|".join(TAGS) + ")", response)
    tags = rest[0::2]
    texts = rest[1::2]  # the text that follows each tag
    if not re.fullmatch(r"<think>(<step></step>)+</think><answer></answer>", "".join(tags)):
        return False
    for tag, text in zip(tags, texts, strict=True):
        if tag == "<step>":
            if has_layout_line(text):
                return False
        elif tag != "<answer>":
            outside += text
    if outside.strip():
        return False
    return finished and len(find_boxes(answer)) == 1 and count_empty_boxes(answer) == 0


# --------------------------------------------------------------------------- the chat template


@cache  # GRPO decodes every response many times
def special_tokens(tokenizer) -> dict[str, int]:
    """token -> id of the tokens that control a model and aren't text; `TAGS` are always text."""
    # These are only bos, eos, pad and the like; chat markers are just added tokens.
    tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            tokens[token.content] = i
    return {token: i for token, i in tokens.items() if token and token not in TAGS}


def escape_special_tokens(tokenizer, text: str) -> str:
    """Insert a space into any special token spelled out in the text: a solution that spells `<|im_end|>` must not end
    its judge's prompt and begin the verdict."""
    for token in special_tokens(tokenizer):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def decode(tokenizer, ids: list[int]) -> str:
    """The text of token ids, without special tokens. `TAGS` stay even where the tokenizer calls them special: without
    its tags, a thought would pass for a solution or a judgement."""
    special = set(special_tokens(tokenizer).values())
    return tokenizer.decode([i for i in ids if i not in special])


# A chat template is a program that came with the model: what it may raise.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
# The day that a template is told. With today's, a run resumed tomorrow would sample from other prompts, and a reward
# model would be asked in another way than it was trained.
TODAY = datetime(2024, 7, 26)  # as in Llama's templates
FORMATS = "".join(f"|replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in "aAbBcdHIjmMpSUwWxXyY")
FIXED_DATE = "{% macro strftime_now(format) %}{{ format" + FORMATS + " }}{% endmacro %}{{ '' }}"


def apply_template(tokenizer, messages: list[dict], **settings) -> str:
    """The messages as text, by the tokenizer's own chat template. Raises InputError if the template fails."""
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = FIXED_DATE + template
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **settings)
    except TEMPLATE_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{tokenizer.name_or_path}: its chat template fails ({reason}); mend it, or use another "
                         "model") from None  # fmt: skip


def render_chat(tokenizer, user: str) -> str:
    """One user turn and the opening of the assistant's, by the tokenizer's own chat template."""
    messages = [{"role": "user", "content": escape_special_tokens(tokenizer, user)}]
    return apply_template(tokenizer, messages, add_generation_prompt=True)


def encode_chat(tokenizer, user: str) -> list[int]:
    """Token ids of `render_chat`."""
    return tokenizer(render_chat(tokenizer, user), add_special_tokens=False).input_ids


def opens_thought(tokenizer, prompt: list[int]) -> bool:
    """Whether the prompt ends with an opening `<think>`. Some chat templates write it."""
    end_of_prompt = tokenizer.decode(prompt[-8:])  # more than <think> and the line breaks after it
    return end_of_prompt.rstrip().endswith("<think>")


def end_of_turn(tokenizer) -> int | None:
    """The special token that the chat template writes behind an assistant's turn; None if it writes none. The models
    that the template was made for end their turns with it, even where it isn't their end-of-sequence token."""
    answer = "Forty-two."
    messages = [{"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": answer}]
    _, found, behind = apply_template(tokenizer, messages).rpartition(answer)
    ids = tokenizer(behind.lstrip(), add_special_tokens=False).input_ids
    if found and ids and ids[0] in special_tokens(tokenizer).values():
        return ids[0]
    return None


# --------------------------------------------------------------------------- the engine


HUB_TIMEOUT = 10  # seconds that the hub has for an answer


def find_model(name: str, flag: str = "--model") -> Path:
    """The directory of a model given as a directory or as a hub name. Raises InputError, naming the flag, if there is
    no such model.

    A name that may be meant as a path never goes to the hub: whoever registers it there would supply the weights.
    """
    if Path(name).is_dir():
        return Path(name)
    if name in records.MADE_BY:
        raise InputError(f"{flag} {name}: no such directory; create it with: python {records.MADE_BY[name]}")
    first, *others = name.split("/")
    if len(others) != 1 or not others[0] or first in ("", ".", "..", "~", "runs", "data") or Path(first).exists():
        raise InputError(f"{flag} {name}: neither a directory nor a hub name (organisation/name)")
    return fetch_model(name, flag)


@cache  # a trainer comes back for the tokenizer files at each save
def fetch_model(name: str, flag: str) -> Path:
    """The directory of a hub model, downloaded or found in the hub's cache."""
    from huggingface_hub import HfApi, snapshot_download  # here, because they take a while to import

    distributed.log(f"{flag} {name}: no such directory, so it is fetched from the Hugging Face hub, or from its cache")
    revision, reason = None, None
    try:
        # snapshot_download would ask for the revision, too, but wait for the answer forever.
        revision = HfApi().model_info(name, timeout=HUB_TIMEOUT).sha
    except Exception as error:  # of the hub, or of whichever HTTP library it uses
        reason = error
    files = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=revision is None, allow_patterns=files))
    except (ValueError, OSError) as error:  # hub and network errors are OSErrors
        reason = f"{reason or error}".splitlines()[0]
        raise InputError(f"{flag} {name}: neither a directory nor a hub model that can be loaded ({reason})") from None


def open_model(name: str, device: torch.device, dtype: torch.dtype, flag: str = "--model"):
    """(model, tokenizer, stop ids) of a Hugging Face directory or hub name. Raises InputError if it can't be used."""
    path = find_model(name, flag)
    tokenizer, stop_ids = open_tokenizer(path, flag)  # first: it takes less time to fail
    try:
        model = load_model(path, device, dtype)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{flag} {name}: {error}") from None
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > model.vocabulary:
        raise InputError(f"{flag} {name}: its tokenizer has {tokens} tokens, its embedding {model.vocabulary}; they "
                         "belong to different models")  # fmt: skip
    model.vocabulary = tokens  # embeddings are padded to more rows than there are tokens; those must not be sampled
    return model, tokenizer, stop_ids


def open_tokenizer(path: Path, flag: str = "--model"):
    """(tokenizer, stop ids) of a model's directory. A sample ends at any of the stop ids: the tokenizer's
    end-of-sequence token, those of config.json and generation_config.json, and what the chat template writes behind an
    assistant's turn.

    Raises InputError without a chat template that can be used (one that takes no notice of add_generation_prompt can),
    without a stop id, and for a tokenizer that doesn't give back a text: one whose file is missing is empty.
    """
    # 1. The tokenizer. Code that came with it doesn't run, and sequences of any length are encoded without a warning.
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, model_max_length=sys.maxsize)
    except Exception as error:  # the tokenizers library raises just that for a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{flag} {path}: no tokenizer that can be loaded ({reason})") from None
    if not tokenizer.chat_template:
        raise InputError(f"{flag} {path}: its tokenizer has no chat template; use an instruct model")
    given = "What is 3 + 4?"
    decoded = decode(tokenizer, tokenizer(given, add_special_tokens=False).input_ids)
    if decoded.strip() != given:
        raise InputError(f"{flag} {path}: its tokenizer makes {decoded!r} of {given!r}; is tokenizer.json missing?")

    # 2. Where samples end.
    render_chat(tokenizer, given)
    stop_ids = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    for name in ("config.json", "generation_config.json"):
        stop_ids |= read_end_tokens(path / name)
    stop_ids.discard(None)
    if not stop_ids:
        raise InputError(f"{flag} {path}: no end token, so no sample would end; set eos_token in tokenizer_config.json")
    return tokenizer, sorted(stop_ids)


def read_end_tokens(path: Path) -> set[int]:
    """The end tokens that a configuration lists; none if there is no such file. Raises InputError if it is damaged."""
    if not path.is_file():
        return set()
    try:
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a JSON object ({error}); fetch the file again") from None
    if listed is None:
        return set()
    if not isinstance(listed, list):
        listed = [listed]
    for token in listed:
        if type(token) is not int:
            raise InputError(f"{path}: eos_token_id must be an integer or a list of integers, not {token!r}")
    return set(listed)


# A prompt that leaves less than this share of the token limit isn't sampled: hardly any output would be whole.
LEAST_SHARE = 1 / 8


def output_limit(prompt_tokens: int, max_new_tokens: int, context: int) -> int | None:
    """The one rule of short contexts: how many tokens the output of a prompt may have; None if it isn't to be sampled.

    With a context of 1,000 tokens and --max_new_tokens 400:

        prompt of 600    400     whole
        prompt of 900    100     shortened to what the context leaves
        prompt of 960    None    too long: 40 are less than an eighth of 400
    """
    left = context - prompt_tokens
    if left < max(1, LEAST_SHARE * max_new_tokens):
        return None
    return min(left, max_new_tokens)


def check_limits(title: str, limits: list[int | None], max_new_tokens: int, resumed: bool = False) -> None:
    """Say how many of some prompts are left out, and how many get a lower limit. Raises InputError if all are left out,
    unless a run is resumed that has sampled others before."""
    too_long = limits.count(None)
    shortened = sum(limit is not None and limit < max_new_tokens for limit in limits)
    if limits and too_long == len(limits) and not resumed:
        raise InputError(f"{title}: no prompt leaves an eighth of --max_new_tokens {max_new_tokens} in the model's "
                         "context; lower it")  # fmt: skip
    if too_long or shortened:
        distributed.log(f"{title}: of {len(limits)} prompts, {too_long} are too long for the model's context and left "
                        f"out, {shortened} leave less than --max_new_tokens {max_new_tokens}")  # fmt: skip


def fit_prompts(
    tokenizer, context: int, turns: list[str], max_new_tokens: int, name: str
) -> tuple[list[list[int]], list[int | None]]:
    """(token ids, `output_limit`) of a prompt for each user turn. Raises InputError, beginning with the name of them
    all, if all are too long."""
    prompts = [encode_chat(tokenizer, turn) for turn in turns]
    limits = [output_limit(len(prompt), max_new_tokens, context) for prompt in prompts]
    check_limits(name, limits, max_new_tokens)
    return prompts, limits


def check_model(name: str, flag: str = "--model") -> tuple[Any, int]:
    """(tokenizer, context) of a model that is loaded later. Raises InputError if there is no such model, or if its
    directory lacks something."""
    path = find_model(name, flag)
    tokenizer, _ = open_tokenizer(path, flag)
    try:
        config = read_config(path)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{flag} {name}: {error}") from None
    if not any(path.glob("*.safetensors")):
        raise InputError(f"{flag} {name}: no weights (*.safetensors); fetch it again")
    return tokenizer, config.max_positions


@dataclass
class Engine:
    """A model with its tokenizer and sampler: it encodes prompts, samples outputs and decodes them."""

    sampler: Sampler
    tokenizer: Any  # from transformers, with a chat template
    stop_ids: list[int]

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its output may have together."""
        return self.sampler.model.config.max_positions

    def encode(self, user: str) -> list[int]:
        """Token ids of one user turn and the opening of the assistant's."""
        return encode_chat(self.tokenizer, user)

    def sample(self, prompts: list[list[int]], **settings) -> list[list[Sample]]:
        """`Sampler.sample`, each sample ending at one of the model's stop ids."""
        return self.sampler.sample(prompts, stop_ids=self.stop_ids, **settings)

    def stream(self, prompts: list[list[int]], **settings) -> Iterator[tuple[int, list[Sample]]]:
        """`Sampler.stream`, each sample ending at one of the model's stop ids."""
        return self.sampler.stream(prompts, stop_ids=self.stop_ids, **settings)

    def output_limit(self, prompt: list[int], max_new_tokens: int) -> int | None:
        """`output_limit` of a prompt in this model's context."""
        return output_limit(len(prompt), max_new_tokens, self.context)

    def text(self, ids: list[int], prompt: list[int] | None = None) -> str:
        """The text of token ids, without special tokens. Given their prompt, with the `<think>` that may stand at its
        end: without it, a thought that is cut off would pass for the solution."""
        text = decode(self.tokenizer, ids)
        if prompt is not None and opens_thought(self.tokenizer, prompt):
            text = "<think>" + text
        return text


def open_engine(name: str, device: torch.device, slots: int | None, flag: str = "--model") -> Engine:
    """Load a Hugging Face directory or hub name, in bf16 on a GPU and in fp32 elsewhere. slots: see `Sampler`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer, stop_ids = open_model(name, device, dtype, flag)
    return Engine(Sampler(model, slots), tokenizer, stop_ids)


# --------------------------------------------------------------------------- Stage I


def find_incomplete(problems: list[dict], output: records.RecordFile, num_samples: int) -> list[dict]:
    """The problems that still lack a solution in `output`, which remembers the problem of each solution. A collective.

    Raises InputError if a solution there was generated from a different problem with the same id.
    """
    for problem in problems:
        for k in range(num_samples):
            # Only rank 0 has read the file, so the others find no reason to object.
            generated_from = output.done.get(f"{problem['id']}/{k}", problem["problem"])
            if generated_from != problem["problem"]:
                raise InputError(
                    f"{output.path}: problem {problem['id']} was generated from a different problem; "
                    "choose another --out or remove it"
                )
    solution_ids = ([f"{problem['id']}/{k}" for k in range(num_samples)] for problem in problems)
    return [problems[i] for i in output.find_missing(solution_ids)]


def sample_from_queue(
    engine: Engine, prompts: list[list[int]], title: str, queue: str, *, num_samples: int, **settings
) -> Iterator[tuple[int, list[Sample]]]:
    """Yield (prompt index, its samples) as they are finished, with a progress bar of this title. The ranks share the
    prompts by a work queue of this name; settings as for `Sampler.stream`."""
    batches = distributed.work_queue(len(prompts), queue)
    stream = engine.stream(prompts, num_samples=num_samples, batches=batches, **settings)
    per_rank = math.ceil(len(prompts) / distributed.world_size())
    return with_progress(stream, engine.sampler, title, per_rank, num_samples)


def generate_solutions(
    engine: Engine, problems: list[dict], output: records.RecordFile, args: argparse.Namespace
) -> None:
    """Sample the solutions that `output` lacks and append them, one problem at a time.

    args: num_samples, temperature, top_p, max_new_tokens, seed, and model, the name to write into the records. `output`
    must have remembered_field="problem". Under torchrun the ranks share the problems, and each appends its own. Problems
    that are too long for the context are left out, see `output_limit`; raises InputError if nothing else is left.
    """
    # 1. The prompts that leave space for a solution.
    incomplete = []
    prompts = []
    limits = []
    for problem in find_incomplete(problems, output, args.num_samples):
        prompt = engine.encode(SOLVE_PROMPT.format(problem=problem["problem"]))
        limit = engine.output_limit(prompt, args.max_new_tokens)
        limits.append(limit)
        if limit is not None:
            incomplete.append(problem)
            prompts.append(prompt)
    check_limits(str(output.path), limits, args.max_new_tokens, resumed=output.was_there)

    # 2. The samples.
    stream = sample_from_queue(
        engine,
        prompts,
        "generate",
        f"solutions of {output.path}",  # a benchmark fills several files in one run
        keys=[problem["id"] for problem in incomplete],
        num_samples=args.num_samples,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=[limit for limit in limits if limit is not None],
        seed=args.seed,
    )
    for i, samples in stream:
        problem = incomplete[i]
        solutions = []
        for k, sample in enumerate(samples):
            text = engine.text(sample.ids, prompts[i])
            solution = {
                "id": f"{problem['id']}/{k}",
                "problem_id": problem["id"],
                "problem": problem["problem"],
                "sample": k,
                "text": text,
                "steps": split_steps(text),
                "answer": extract_answer(text),
                "finish": sample.finish,
                "tokens": len(sample.ids),
                "model": args.model,
                "seed": args.seed,
            }
            solutions.append(solution)
        output.append(solutions)


# --------------------------------------------------------------------------- main


def main() -> None:
    parser = records.new_parser(__doc__)
    parser.add_argument("--model", help="generator: Hugging Face directory or hub name (default: the tiny world)")
    parser.add_argument("--problems", help="JSON Lines file with the fields id and problem")
    parser.add_argument("--out", help="output file (resumed if it exists)")
    parser.add_argument("--num_samples", type=COUNT, default=8, help="M, solutions per problem")
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.7, help="of sampling; 0 is greedy")
    parser.add_argument("--top_p", type=TOP_P, default=0.95, help="probability mass of the nucleus to sample from")
    parser.add_argument("--max_new_tokens", type=POSITIVE, default=8192, help="length limit per solution")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--limit", type=POSITIVE, help="use only the first N problems")
    parser.add_argument("--slots", type=COUNT, help="samples at a time; default: by the GPU's memory, on a CPU 128")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    args = records.parse_args(parser, TINY, "model", "problems", "out")
    device = distributed.init_distributed(args.device)
    problems = records.read(args.problems, ["id", "problem"], "python -m data.make_tiny problems")[: args.limit]
    fields = ("problem", "sample", "text")
    with records.RecordFile(args.out, args, MAY_CHANGE_ON_RESUME, ("id",), "problem", fields) as output:
        if not find_incomplete(problems, output, args.num_samples):
            distributed.log(f"{args.out}: complete, {len(output.done)} solutions")
            return
        model = records.hash_model(find_model(args.model))
        output.check_made_with(model_sha256=model, prompt_sha256=records.hash_text(SOLVE_PROMPT))
        engine = open_engine(args.model, device, args.slots)
        started = time.perf_counter()
        generate_solutions(engine, problems, output, args)
    sampled = distributed.sum_over_ranks(engine.sampler.tokens)[0]
    seconds = distributed.max_over_ranks(time.perf_counter() - started)
    speed = distributed.per_second(sampled, seconds)
    distributed.log(f"{args.out}: {len(problems)} x {args.num_samples} solutions, {speed:,.0f} tokens/s")


if __name__ == "__main__":
    distributed.run_stage(main)
