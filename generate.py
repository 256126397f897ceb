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
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import records
from data.records import COUNT, POSITIVE, SEED, TEMPERATURE, TOP_P
from kernels import distributed
from kernels.distributed import InputError
from kernels.sampler import Sample, Sampler, with_progress
from kernels.transformer import load_model, read_config

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

# "<step>2 + 3 = 5</step>". (?:(?!<step>).)*? is text in which no other <step> opens, so of nested tags the innermost
# pair matches.
STEP_TAG = re.compile(r"<step>((?:(?!<step>).)*?)</step>", re.DOTALL)
# "## Step 2: " and "**Step 2:** ". Here and below each run of blanks is matched by exactly one character class;
# overlapping classes backtrack quadratically.
STEP_HEADING = re.compile(r"(?mi)^[ \t#*]*Step[ \t]+(\d+)[ \t*]*[:.)]\**[ \t]*")
# "Answer: 5" and "**Final answer:** 5"
ANSWER_LINE = re.compile(r"(?mi)^[ \t#*]*(?:final[ \t]+)?answer[ \t*]*:(.*)$")


def split_steps(text: str) -> list[str]:
    """The reasoning steps of a solution, in order, without the final answer.

    Three layouts: `<step>…</step>` (the policy's format; contents kept verbatim), "Step 1: …" headings (instruct
    models; headings removed), and paragraphs separated by blank lines (the fallback, and before a first heading that is
    not Step 1). Empty steps are dropped.
    """
    steps = STEP_TAG.findall(text)
    if not steps:
        body = re.sub(r"</?think>|<answer>.*?(</answer>|$)|\r(?=\n)", "", text, flags=re.DOTALL)
        answer_lines = list(ANSWER_LINE.finditer(body))
        if answer_lines:
            body = body[: answer_lines[-1].start()]

        # "Now. Step 1: a Step 2: b" is split into "Now. ", "1", "a ", "2", "b".
        before, *rest = STEP_HEADING.split(body)
        numbers = rest[0::2]
        steps = rest[1::2]
        starts_at_step_1 = bool(numbers) and numbers[0].lstrip("0") == "1"  # not int(): it refuses thousands of digits
        if starts_at_step_1:
            steps[0] = before + steps[0]  # an introduction belongs to the first step
        else:
            paragraphs = re.split(r"\n[ \t]*\n", before)
            steps = paragraphs + steps
    return [step.strip() for step in steps if step.strip()]


def render_steps(steps: list[str], answer: str | None = None) -> str:
    """The numbered layout that every verifier and reward-model prompt uses: "Step 1: …" lines, then "Answer: …"."""
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
    r"""The final answer: the last closed `\boxed{…}`, else the last "Answer: …" line; None if missing or empty."""
    boxes = find_boxes(text)
    if boxes:
        start, end = boxes[-1]
        return text[start:end].strip() or None
    answers = ANSWER_LINE.findall(text)
    if answers:
        return answers[-1].strip("* \t\r") or None
    return None


def count_empty_boxes(response: str) -> int:
    """How many closed boxes hold nothing."""
    return sum(not response[start:end].strip() for start, end in find_boxes(response))


def has_layout_line(step: str) -> bool:
    """Whether a line of a step begins as a line of `render_steps` does: "Step 3:" or "Answer:"."""
    return bool(STEP_HEADING.search(step) or ANSWER_LINE.search(step))


def hidden_text(response: str) -> str:
    """What a judge isn't shown of a response: where there are step tags, the text outside of steps and answer."""
    if not STEP_TAG.search(response):
        return ""
    outside = re.sub(r"<answer>.*?</answer>", "", STEP_TAG.sub("", response), flags=re.DOTALL)
    return re.sub(r"</?(?:think|step|answer)>", "", outside).strip()


def format_valid(response: str, constraints: str = "paper", finished: bool = True) -> bool:
    r"""V, whether a response has the required format. The constraints:

    none: always.
    paper: exactly one closed `\boxed{…}`; one `<answer>` and then one `</answer>`, with only white space after it.
    strict: also one `<think>` with at least one `<step>`, no nested tags, no text outside the tags, the box inside the
        answer, and finished, that is, the response ended by itself and not at the length limit.

    finished counts under strict only: the paper's constraints are about the text.
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
    first_text, *rest = re.split(r"(</?(?:think|step|answer)>)", response)
    tags = rest[0::2]
    texts = rest[1::2]  # the text that follows each tag
    if not re.fullmatch(r"<think>(<step></step>)+</think><answer></answer>", "".join(tags)):
        return False
    outside = first_text
    for tag, text in zip(tags, texts, strict=True):
        if tag not in ("<step>", "<answer>"):
            outside += text
    if outside.strip():
        return False
    return finished and len(find_boxes(answer)) == 1


# --------------------------------------------------------------------------- the chat template


def escape_special_tokens(tokenizer, text: str) -> str:
    """Insert a space into any special token spelled out in the text: a solution that spells `<|im_end|>` must not end
    its judge's prompt and begin the verdict."""
    tokens = list(tokenizer.all_special_tokens)  # only bos, eos, pad and the like; chat markers are just added tokens
    tokens += [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in dict.fromkeys(tokens):  # each once, in this order
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def render_chat(tokenizer, user: str) -> str:
    """One user turn and the opening of the assistant's, by the tokenizer's own chat template."""
    messages = [{"role": "user", "content": escape_special_tokens(tokenizer, user)}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_chat(tokenizer, user: str) -> list[int]:
    """Token ids of `render_chat`."""
    return tokenizer(render_chat(tokenizer, user), add_special_tokens=False).input_ids


# --------------------------------------------------------------------------- the engine


def find_model(name: str, flag: str = "--model") -> Path:
    """The directory of a model given as a directory, or as a hub name (downloaded, or found in the hub's cache). Raises
    InputError, naming the flag, if there is no such model."""
    if Path(name).is_dir():
        return Path(name)
    if name in records.MADE_BY:
        raise InputError(f"{flag} {name}: no such directory; create it with: python {records.MADE_BY[name]}")
    from huggingface_hub import snapshot_download  # here, because it takes a while to import
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (HFValidationError, OSError) as error:  # hub and network errors are OSErrors
        reason = str(error).splitlines()[0]
        raise InputError(f"{flag} {name}: neither a directory nor a hub model that can be loaded ({reason})") from None


def open_model(name: str, device: torch.device, dtype: torch.dtype, flag: str = "--model"):
    """(model, tokenizer, stop ids) of a Hugging Face directory or hub name. Raises InputError if it can't be used."""
    path = find_model(name, flag)
    try:
        model = load_model(path, device, dtype)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{flag} {name}: {error}") from None
    tokenizer, stop_ids = open_tokenizer(path, flag)
    # Embeddings are padded to more rows than there are tokens; the rows beyond them must not be sampled.
    model.vocabulary = min(model.vocabulary, max(tokenizer.get_vocab().values()) + 1)
    return model, tokenizer, stop_ids


def open_tokenizer(path: Path, flag: str = "--model"):
    """(tokenizer, stop ids) of a model's directory. A sample ends at any of the stop ids: the tokenizer's
    end-of-sequence token and those of generation_config.json. Raises InputError without a chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: no tokenizer that can be loaded ({str(error).splitlines()[0]})") from None
    if not tokenizer.chat_template:
        raise InputError(f"{flag} {path}: its tokenizer has no chat template; use an instruct model")
    stop_ids = {tokenizer.eos_token_id}
    config = path / "generation_config.json"
    if config.is_file():
        listed = json.loads(config.read_text()).get("eos_token_id")
        if isinstance(listed, list):
            stop_ids.update(listed)
        else:
            stop_ids.add(listed)
    stop_ids.discard(None)
    return tokenizer, sorted(stop_ids)


def output_limit(prompt_tokens: int, max_new_tokens: int, context: int) -> int | None:
    """How many tokens the output of a prompt may have; None if it isn't to be sampled."""
    left = context - prompt_tokens
    if left < max(1, max_new_tokens / 8):
        return None
    return min(left, max_new_tokens)


def fit_prompts(
    tokenizer, context: int, turns: list[str], max_new_tokens: int, name: str
) -> tuple[list[list[int]], list[int | None]]:
    """(token ids, `output_limit`) of a prompt for each user turn. Raises InputError, beginning with the name of them
    all, if all are too long."""
    prompts = [encode_chat(tokenizer, turn) for turn in turns]
    limits = [output_limit(len(prompt), max_new_tokens, context) for prompt in prompts]
    if limits.count(None) == len(limits):
        raise InputError(f"{name}: no prompt leaves an eighth of --max_new_tokens {max_new_tokens} in the model's "
                         f"context of {context}; lower it")  # fmt: skip
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

    def text(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


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
    must have remembered_field="problem". Under torchrun the ranks share the problems, and each appends its own.
    """
    incomplete = find_incomplete(problems, output, args.num_samples)
    prompts = [engine.encode(SOLVE_PROMPT.format(problem=problem["problem"])) for problem in incomplete]
    stream = sample_from_queue(
        engine,
        prompts,
        "generate",
        f"solutions of {output.path}",  # a benchmark fills several files in one run
        keys=[problem["id"] for problem in incomplete],
        num_samples=args.num_samples,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    for i, samples in stream:
        problem = incomplete[i]
        solutions = []
        for k, sample in enumerate(samples):
            text = engine.text(sample.ids)
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
