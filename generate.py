"""Stage I, first half: a generator writes M solutions per problem (SPARK, arXiv 2512.03244, Sec. 3.1).

    problems.jsonl -> generate.py -> solutions.jsonl       (fields: data/README.md)

    python generate.py                                     # the tiny world, on a CPU, in seconds
    python generate.py --model Qwen/Qwen2.5-14B-Instruct --problems problems.jsonl --out runs/solutions.jsonl
    torchrun --nproc_per_node 8 generate.py --model ... --problems ... --out ...       # sharded by problem

Answers in the problems file are never used. The later stages import the text format and the engine, that is a model
with its tokenizer and sampler.
"""

import argparse
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import records
from data.records import COUNT, POSITIVE, SEED, TEMPERATURE, TOP_P, WHOLE
from kernels import distributed
from kernels.chat import check_tokenizer, decode, encode_chat, find_model, find_stop_ids, opens_thought
from kernels.distributed import InputError
from kernels.sampler import Sample, Sampler, with_progress
from kernels.text import TAGS, count_empty_boxes, extract_answer, find_boxes, has_layout_line, split_steps
from kernels.transformer import load_model, open_weights, read_config, weight_files

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
    "limit": 75,
    "slots": 256,
    "device": "cpu",
}
# A run resumes with other values of these flags, because they don't change records.
MAY_CHANGE_ON_RESUME = {"out", "limit", "slots", "device"}

# --------------------------------------------------------------------------- solutions as text

SOLVE_PROMPT = r"""Solve the problem step by step. Write your reasoning as <think><step>...</step> <step>...</step></think> with one step of reasoning in each <step>, then the final answer as <answer>\boxed{{...}}</answer>, and nothing after it.

Problem: {problem}"""


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


# --------------------------------------------------------------------------- the engine


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


def fit_prompts(
    tokenizer,
    context: int,
    turns: list[str],
    max_new_tokens: int,
    name: str,
    resumed: bool = False,
    thinking: bool = True,
) -> tuple[list[list[int]], list[int | None]]:
    """(token ids, `output_limit`) of a prompt for each user turn; says how many are left out, and how many get a lower
    limit. Raises InputError, beginning with the name of them all, if all are left out, unless a run is resumed that has
    sampled others before."""
    prompts = [encode_chat(tokenizer, turn, thinking) for turn in turns]
    limits = [output_limit(len(prompt), max_new_tokens, context) for prompt in prompts]
    too_long = limits.count(None)
    shortened = sum(limit is not None and limit < max_new_tokens for limit in limits)
    if limits and too_long == len(limits) and not resumed:
        raise InputError(f"{name}: no prompt leaves an eighth of --max_new_tokens {max_new_tokens} in the model's "
                         "context; lower it")  # fmt: skip
    if too_long or shortened:
        distributed.log(f"{name}: of {len(limits)} prompts, {too_long} are too long for the model's context and left "
                        f"out, {shortened} leave less than --max_new_tokens {max_new_tokens}")  # fmt: skip
    return prompts, limits


def open_tokenizer(path: Path, flag: str = "--model"):
    """(tokenizer, stop ids) of a model's directory. Raises InputError if they can't be used. Code that came with the
    tokenizer doesn't run, and sequences of any length are encoded without a warning."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, model_max_length=sys.maxsize)
    except Exception as error:  # the tokenizers library raises just that for a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{flag} {path}: no tokenizer that can be loaded ({reason})") from None
    check_tokenizer(tokenizer, path, flag)
    return tokenizer, find_stop_ids(tokenizer, path, flag)


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


def check_model(name: str, flag: str = "--model") -> tuple[Any, int]:
    """(tokenizer, context) of a model that is loaded later. Raises InputError if there is no such model, or if its
    directory lacks something."""
    path = find_model(name, flag)
    tokenizer, _ = open_tokenizer(path, flag)
    if not any(path.glob("*.safetensors")):
        raise InputError(f"{flag} {name}: no weights (*.safetensors); fetch it again")
    try:
        config = read_config(path)
        for file in weight_files(path):
            with open_weights(file):  # only its header is read
                pass
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{flag} {name}: {error}") from None
    return tokenizer, config.max_positions


@dataclass
class Engine:
    """A model with its tokenizer and sampler: it encodes prompts, samples outputs and decodes them."""

    sampler: Sampler
    tokenizer: Any  # from transformers, with a chat template
    stop_ids: list[int]
    thinking: bool = True  # False: a chat template that makes the model think is told not to

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its output may have together."""
        return self.sampler.model.config.max_positions

    def encode(self, user: str) -> list[int]:
        """Token ids of one user turn and the opening of the assistant's."""
        return encode_chat(self.tokenizer, user, self.thinking)

    def sample(self, prompts: list[list[int]], **settings) -> list[list[Sample]]:
        """`Sampler.sample`, each sample ending at one of the model's stop ids."""
        return self.sampler.sample(prompts, stop_ids=self.stop_ids, **settings)

    def stream(self, prompts: list[list[int]], **settings) -> Iterator[tuple[int, list[Sample]]]:
        """`Sampler.stream`, each sample ending at one of the model's stop ids."""
        return self.sampler.stream(prompts, stop_ids=self.stop_ids, **settings)

    def output_limit(self, prompt: list[int], max_new_tokens: int) -> int | None:
        """`output_limit` of a prompt in this model's context."""
        return output_limit(len(prompt), max_new_tokens, self.context)

    def fit_prompts(
        self, turns: list[str], max_new_tokens: int, name: str, resumed: bool = False
    ) -> tuple[list[list[int]], list[int | None]]:
        """`fit_prompts` of this model."""
        return fit_prompts(self.tokenizer, self.context, turns, max_new_tokens, name, resumed, self.thinking)

    def fit_problems(self, problems: list[dict], max_new_tokens: int, name: str, resumed: bool = False) -> list[dict]:
        """The problems that can be sampled by `fit_prompts`, each with its `prompt` (token ids) and its `limit` of new
        tokens."""
        turns = [SOLVE_PROMPT.format(problem=problem["problem"]) for problem in problems]
        prompts, limits = self.fit_prompts(turns, max_new_tokens, name, resumed)
        fitting = []
        for problem, prompt, limit in zip(problems, prompts, limits, strict=True):
            if limit is not None:
                fitting.append(problem | {"prompt": prompt, "limit": limit})
        return fitting

    def text(self, ids: list[int], prompt: list[int] | None = None) -> str:
        """The text of token ids, without special tokens. Given their prompt, with the `<think>` that may stand at its
        end: without it, a thought that is cut off would pass for the solution."""
        text = decode(self.tokenizer, ids)
        if prompt is not None and opens_thought(self.tokenizer, prompt):
            text = "<think>" + text
        return text


def open_engine(
    name: str, device: torch.device, slots: int | None, flag: str = "--model", thinking: bool = True
) -> Engine:
    """Load a Hugging Face directory or hub name, in bf16 on a GPU and in fp32 elsewhere. slots: see `Sampler`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer, stop_ids = open_model(name, device, dtype, flag)
    if not thinking and "enable_thinking" not in tokenizer.get_chat_template():
        distributed.log(f"{flag} {name}: its chat template has no enable_thinking, so --no_thinking changes nothing")
    return Engine(Sampler(model, slots), tokenizer, stop_ids, thinking)


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
    engine: Engine, prompts: list[list[int]], title: str, queue: str, *, num_samples: int | list[int], **settings
) -> Iterator[tuple[int, list[Sample]]]:
    """Yield (prompt index, its samples) as they are finished, with a progress bar of this title. The ranks share the
    prompts by a work queue of this name; settings as for `Sampler.stream`."""
    batches = distributed.work_queue(len(prompts), queue)
    stream = engine.stream(prompts, num_samples=num_samples, batches=batches, **settings)
    per_rank = math.ceil(len(prompts) / distributed.world_size())
    of_each = max(num_samples, default=0) if isinstance(num_samples, list) else num_samples
    return with_progress(stream, engine.sampler, title, per_rank, of_each)


def generate_solutions(
    engine: Engine, problems: list[dict], output: records.RecordFile, args: argparse.Namespace, top_k: int = 0
) -> None:
    """Sample the solutions that `output` lacks and append them, one problem at a time. top_k: see `choose_tokens`.

    args: num_samples, temperature, top_p, max_new_tokens, seed, and model, the name to write into the records. `output`
    must have remembered_field="problem". Under torchrun the ranks share the problems, and each appends its own.
    Problems that are too long for the context are left out, see `output_limit`; raises InputError if nothing else is
    left.
    """
    # 1. The prompts that leave space for a solution.
    incomplete = find_incomplete(problems, output, args.num_samples)
    fitting = engine.fit_problems(incomplete, args.max_new_tokens, str(output.path), resumed=output.was_there)

    # 2. The samples.
    stream = sample_from_queue(
        engine,
        [problem["prompt"] for problem in fitting],
        "generate",
        f"solutions of {output.path}",  # a benchmark fills several files in one run
        keys=[problem["id"] for problem in fitting],
        num_samples=args.num_samples,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=top_k,
        max_new_tokens=[problem["limit"] for problem in fitting],
        seed=args.seed,
    )
    for place, samples in stream:
        problem = fitting[place]
        solutions = []
        for k, sample in enumerate(samples):
            text = engine.text(sample.ids, problem["prompt"])
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
    parser.add_argument("--top_k", type=WHOLE, default=0, help="sample from the k likeliest tokens; 0: from all")
    parser.add_argument("--no_thinking", action="store_true", help="turn off thinking in a chat template that has it")
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
        engine = open_engine(args.model, device, args.slots, thinking=not args.no_thinking)
        started = time.perf_counter()
        generate_solutions(engine, problems, output, args, args.top_k)
    sampled = distributed.sum_over_ranks(engine.sampler.tokens)[0]
    seconds = distributed.max_over_ranks(time.perf_counter() - started)
    speed = distributed.per_second(sampled, seconds)
    distributed.log(f"{args.out}: {len(problems)} x {args.num_samples} solutions, {speed:,.0f} tokens/s")


if __name__ == "__main__":
    distributed.run_stage(main)
