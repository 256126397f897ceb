"""Stage I, first half: a generator writes M solutions to every problem (SPARK, arXiv 2512.03244, Sec. 3.1).

    problems.jsonl -> generate.py -> solutions.jsonl       (fields: see "Files" in the README)

    python generate.py                                     # the tiny world, on a CPU, in seconds
    python generate.py --model Qwen/Qwen2.5-14B-Instruct --problems problems.jsonl --out runs/solutions.jsonl
    torchrun --nproc_per_node 8 generate.py --model ... --problems ... --out ...       # sharded by problem

The file introduces what the later stages share, in this order: the solver prompt, the step splitter and its
renderer; the chat template; the engine, a model that can be asked.

What differs from the paper: nothing in the method. The released script talks to an inference server; here the
sampler, kernels/sampler.py, is part of what is to be read. Answers in the problems file are never opened.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import records
from kernels import distributed
from kernels.distributed import InputError
from kernels.sampler import Sample, Sampler, with_progress
from kernels.transformer import Config, load_model, read_config

import torch
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

# One class per run of blanks and marks: two that overlap would make a line of blanks take quadratic time.
STEP_TAG = re.compile(r"<step>((?:(?!<step>).)*?)</step>", re.DOTALL)
STEP_HEADING = re.compile(r"(?mi)^[ \t#*]*Step[ \t]+\d+[ \t*]*[:.)]\**[ \t]*")
ANSWER_LINE = re.compile(r"(?mi)^[ \t#*]*(?:final[ \t]+)?answer[ \t*]*:(.*)$")


def split_steps(text: str) -> list[str]:
    """The reasoning steps of a solution, in order, without the final answer.

    Three layouts: `<step>…</step>` (the policy's format; what is inside stays), "Step 1: …" headings (instruct models;
    they go), and paragraphs separated by blank lines (the last resort; also before a first heading that isn't Step 1).
    Empty steps are dropped.
    """
    steps = STEP_TAG.findall(text)
    if not steps:
        body = re.sub(r"</?think>|<answer>.*?(</answer>|$)|\r(?=\n)", "", text, flags=re.DOTALL)
        answers = list(ANSWER_LINE.finditer(body))
        if answers:
            body = body[: answers[-1].start()]
        first = STEP_HEADING.search(body)
        before, *steps = STEP_HEADING.split(body)
        if first and re.search(r"\d+", first.group()).group().lstrip("0") == "1":
            steps[0] = before + steps[0]  # an introduction belongs to the first step
        else:
            steps = [*re.split(r"\n[ \t]*\n", before), *steps]
    return [step.strip() for step in steps if step.strip()]


def render_steps(steps: list[str], answer: str | None = None) -> str:
    """The numbered layout that every verifier and reward-model prompt uses: "Step 1: …" lines, then "Answer: …"."""
    lines = [f"Step {k}: {step}" for k, step in enumerate(steps, 1)]
    if answer is not None:
        lines.append(f"Answer: {answer}")
    return "\n".join(lines)


def render_response(steps: list[str], answer: str) -> str:
    """The policy's format, which `SOLVE_PROMPT` asks for; `split_steps` and `extract_answer` undo it."""
    inner = " ".join(f"<step>{step}</step>" for step in steps)
    return f"<think>{inner}</think><answer>\\boxed{{{answer}}}</answer>"


def find_boxes(text: str) -> list[tuple[int, int]]:
    r"""(start, end) of what each closed `\boxed{…}` holds, in order; braces nest, `\{` and `\}` don't count. O(len)."""
    boxes, open_braces = [], []
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, flags=re.DOTALL):
        token = match.group()
        if token == "{" or token.startswith("\\boxed"):
            open_braces.append((match.end(), token != "{"))
        elif token == "}" and open_braces:
            start, boxed = open_braces.pop()
            if boxed:
                boxes.append((start, match.start()))
    return sorted(boxes)


def unwrap_boxes(text: str) -> str:
    r"""The text with what each closed `\boxed{…}` holds in its place."""
    while boxes := find_boxes(text):
        start, end = boxes[-1]
        text = text[: text.rindex("\\boxed", 0, start)] + text[start:end] + text[end + 1 :]
    return text


def extract_answer(text: str) -> str | None:
    r"""The final answer: the last closed `\boxed{…}`, else the last "Answer: …" line, else None."""
    if boxes := find_boxes(text):
        return text[slice(*boxes[-1])].strip() or None
    lines = [match.group(1).strip("* \t\r") for match in ANSWER_LINE.finditer(text)]
    return lines[-1] or None if lines else None


def format_valid(response: str, constraints: str = "paper", finished: bool = True) -> bool:
    r"""V: does a response keep the format? Everything a policy could gain by breaking it is checked here.

    none: always. paper: exactly one closed `\boxed{…}`, one `<answer>` and then one `</answer>`, and only white space
    after it. strict: also the box inside the answer, one `<think>` with at least one `<step>`, nothing outside the
    tags, no nested tags, and not cut off by the length limit (finished).
    """
    if constraints == "none":
        return True
    if len(find_boxes(response)) != 1 or response.count("<answer>") != 1 or response.count("</answer>") != 1:
        return False
    _, _, rest = response.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    if not closed or after.strip():
        return False
    if constraints == "paper":
        return True
    pieces = re.split(r"(</?(?:think|step|answer)>)", response)
    texts, tags = pieces[::2], pieces[1::2]  # texts[i] stands before tags[i]
    well_formed = re.fullmatch(r"<think>(<step></step>)+</think><answer></answer>", "".join(tags)) is not None
    inside = {"<step>", "<answer>"}
    outside = [texts[0]] + [text for tag, text in zip(tags, texts[1:], strict=True) if tag not in inside]
    return finished and well_formed and not any(t.strip() for t in outside) and len(find_boxes(answer)) == 1


def escape_special_tokens(tokenizer, text: str) -> str:
    """The text, with control tokens that it spells out broken up by a space: a solution that spells `<|im_end|>` must
    not end its judge's prompt and begin the verdict."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]):  # the former has only those with a role
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def render_chat(tokenizer, user: str) -> str:
    """One user turn and the opening of the assistant's, by the tokenizer's own chat template."""
    messages = [{"role": "user", "content": escape_special_tokens(tokenizer, user)}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_chat(tokenizer, user: str) -> list[int]:
    """Token ids of `render_chat`."""
    return tokenizer(render_chat(tokenizer, user), add_special_tokens=False).input_ids


# --------------------------------------------------------------------------- models


def find_model(name: str, flag: str = "--model") -> Path:
    """The directory of a model given as a directory or as a hub name (then downloaded or found in the hub's cache)."""
    if Path(name).is_dir():
        return Path(name)
    if name in records.MADE_BY:
        raise InputError(f"{flag} {name}: no such directory; create it with: python {records.MADE_BY[name]}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (HFValidationError, OSError) as error:  # hub and network errors are OSErrors
        reason = str(error).splitlines()[0]
        raise InputError(f"{flag} {name}: neither a directory nor a hub model that can be loaded ({reason})") from None


def open_config(name: str, flag: str = "--model") -> Config:
    """The configuration of a Hugging Face directory or hub name; InputError if there is none that we support."""
    path = find_model(name, flag)
    try:
        return read_config(path)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{flag} {name}: {error}") from None


def open_model(name: str, device: torch.device, dtype: torch.dtype, flag: str = "--model"):
    """(model, tokenizer, stop ids) of a Hugging Face directory or hub name; InputError if it can't be used."""
    path = find_model(name, flag)
    try:
        model = load_model(path, device, dtype)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{flag} {name}: {error}") from None
    tokenizer, stop_ids = open_tokenizer(path, flag)
    # Embeddings are padded to more rows than there are tokens, and an id without a token would vanish in the text.
    model.vocabulary = min(model.vocabulary, max(tokenizer.get_vocab().values()) + 1)
    return model, tokenizer, stop_ids


def open_tokenizer(path: Path, flag: str = "--model"):
    """(tokenizer, stop ids). Stop ids are those of generation_config.json and the tokenizer's own."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: no tokenizer that can be loaded ({str(error).splitlines()[0]})") from None
    if not tokenizer.chat_template:
        raise InputError(f"{flag} {path}: its tokenizer has no chat template; use an instruct model")
    stop_ids = {tokenizer.eos_token_id}
    if (path / "generation_config.json").is_file():
        listed = json.loads((path / "generation_config.json").read_text()).get("eos_token_id", [])
        stop_ids |= set(listed if isinstance(listed, list) else [listed])
    return tokenizer, sorted(stop_ids - {None})


@dataclass
class Engine:
    """A model that can be asked: text goes in as token ids, samples come out, and become text again."""

    sampler: Sampler
    tokenizer: Any  # of transformers, with a chat template
    stop_ids: list[int]

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self.sampler.model.config.max_positions

    def encode(self, user: str) -> list[int]:
        """Token ids of one user turn and the opening of the assistant's."""
        return encode_chat(self.tokenizer, user)

    def sample(self, prompts: list[list[int]], **settings) -> list[list[Sample]]:
        """`Sampler.sample` up to one of the model's stop ids."""
        return self.sampler.sample(prompts, stop_ids=self.stop_ids, **settings)

    def stream(self, prompts: list[list[int]], **settings) -> Iterator[tuple[int, list[Sample]]]:
        """`Sampler.stream` up to one of the model's stop ids."""
        return self.sampler.stream(prompts, stop_ids=self.stop_ids, **settings)

    def text(self, sample: Sample | list[int]) -> str:
        """The text of a sample, or of token ids, without special tokens."""
        ids = sample.ids if isinstance(sample, Sample) else sample
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def open_engine(name: str, device: torch.device, slots: int | None, flag: str = "--model") -> Engine:
    """The engine of a Hugging Face directory or hub name, in bf16 on a GPU, in fp32 elsewhere."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer, stop_ids = open_model(name, device, dtype, flag)
    return Engine(Sampler(model, slots), tokenizer, stop_ids)


# --------------------------------------------------------------------------- solutions


def find_incomplete(problems: list[dict], output: records.RecordFile, num_samples: int) -> list[dict]:
    """The problems that still lack a solution in `output`, which remembers each solution's problem. Raises InputError
    if a solution there was generated from a different problem of the same id."""
    incomplete = []
    for problem in problems:
        complete = True
        for k in range(num_samples):
            name = f"{problem['id']}/{k}"
            if name not in output.done:
                complete = False
            elif output.done[name] != problem["problem"]:
                raise InputError(f"{output.path}: problem {problem['id']} was generated from a different problem; "
                                 "choose another --out or remove it")  # fmt: skip
        if not complete:
            incomplete.append(problem)
    return incomplete


def generate_solutions(engine: Engine, problems: list[dict], output: records.RecordFile, args) -> None:
    """Sample the solutions that `output` lacks and append them, a problem at a time; under torchrun, every rank its share.

    args: num_samples, temperature, top_p, max_new_tokens, seed and model (its name, for the records). `output` must
    remember the field "problem" of its records.
    """
    incomplete = find_incomplete(problems, output, args.num_samples)
    prompts = [engine.encode(SOLVE_PROMPT.format(problem=problem["problem"])) for problem in incomplete]
    stream = engine.stream(
        prompts,
        keys=[problem["id"] for problem in incomplete],
        num_samples=args.num_samples,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        batches=distributed.work_queue(len(prompts), f"solutions of {output.path}"),
    )
    per_rank = math.ceil(len(prompts) / distributed.world_size())
    for i, samples in with_progress(stream, engine.sampler, "generate", per_rank, args.num_samples):
        problem = incomplete[i]
        solutions = []
        for k, sample in enumerate(samples):
            text = engine.text(sample)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="generator: a Hugging Face directory or hub name; none: the tiny world")
    parser.add_argument("--problems", help="JSON Lines with id and problem")
    parser.add_argument("--out", help="solutions.jsonl to write or to go on with")
    parser.add_argument("--num_samples", type=int, default=8, help="M, solutions per problem")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--max_new_tokens", type=int, default=8192, help="per solution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use the first so many problems only")
    parser.add_argument("--slots", type=int, help="answers sampled at once; default: by the GPU's memory, on a CPU 128")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    args = records.parse_args(parser, TINY, "model", "problems", "out")
    records.check_numbers(args, "num_samples", "max_new_tokens", "limit", "slots")
    device = distributed.init_distributed(args.device)
    problems = records.read(args.problems, ["id", "problem"], "python -m data.make_tiny problems")[: args.limit]
    with records.RecordFile(args.out, args, MAY_CHANGE_ON_RESUME, remembered_field="problem") as output:
        if not find_incomplete(problems, output, args.num_samples):
            distributed.log(f"{args.out}: complete, {len(output.done)} solutions")
            return
        engine = open_engine(args.model, device, args.slots)
        started = time.time()
        generate_solutions(engine, problems, output, args)
    speed = engine.sampler.tokens * distributed.world_size() / (time.time() - started)
    distributed.log(f"{args.out}: {len(problems)} x {args.num_samples} solutions, {speed:,.0f} tokens/s")


if __name__ == "__main__":
    distributed.run_stage(main)
