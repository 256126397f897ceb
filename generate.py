"""Stage I, first half: a generator writes M solutions to every problem (SPARK, arXiv 2512.03244, Sec. 3.1).

    problems.jsonl -> generate.py -> solutions.jsonl       (fields: see "Files" in the README)

    python generate.py                                     # the tiny world, on a CPU, in seconds
    python generate.py --model Qwen/Qwen2.5-14B-Instruct --problems problems.jsonl --out runs/solutions.jsonl
    torchrun --nproc_per_node 8 generate.py --model ... --problems ... --out ...       # sharded by problem

The file introduces what the later stages share, in this order: the solver prompt, the step splitter and its
renderer; record files; the sampler, a batched KV-cache decoder that knows token ids and no text.

What differs from the paper: nothing in the method. The released script talks to an inference server; here the
sampler is part of what is to be read. Answers in the problems file are never opened.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from kernels.logprob import slice_logits
from kernels.transformer import Transformer, load_model, packed_attention

# Used when no --model is given; an explicit flag wins.
TINY = {
    "model": "data/tiny/policy",
    "problems": "data/tiny/problems.jsonl",
    "out": "runs/tiny/solutions.jsonl",
    "max_new_tokens": 160,
    "temperature": 1.0,  # at the paper's 0.7 the tiny generator makes too few mistakes to learn from
    "top_p": 1.0,
    "limit": 150,
    "slots": 256,
}

# --------------------------------------------------------------------------- solutions as text

SOLVE_PROMPT = r"""Solve the problem step by step. Write your reasoning as <think><step>...</step> <step>...</step></think> with one step of reasoning in each <step>, then the final answer as <answer>\boxed{{...}}</answer>, and nothing after it.

Problem: {problem}"""

STEP_HEADING = re.compile(r"(?m)^[ \t]*[#*]*[ \t]*Step[ \t]+\d+[ \t]*[:.)]\**[ \t]*")
ANSWER_LINE = re.compile(r"(?mi)^[ \t]*[#*]*[ \t]*(?:final[ \t]+)?answer[ \t]*:\**[ \t]*(.*)$")


def split_steps(text: str) -> list[str]:
    """The reasoning steps of a solution, in order, without their numbers, tags or the final answer.

    Three layouts: `<step>…</step>` (the policy's format), "Step 1: …" headings (instruct models), and
    paragraphs separated by blank lines (the last resort). Empty steps are dropped.
    """
    steps = re.findall(r"<step>(.*?)</step>", text, flags=re.DOTALL)
    if not steps:
        body = re.sub(r"</?think>|<answer>.*?(</answer>|$)", "", text, flags=re.DOTALL)
        answers = list(ANSWER_LINE.finditer(body))
        if answers:
            body = body[: answers[-1].start()]
        before, *steps = STEP_HEADING.split(body)
        if steps:
            steps[0] = before + steps[0]  # an introduction belongs to the first step
        else:
            steps = re.split(r"\n[ \t]*\n", body)
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


def find_boxes(text: str) -> list[str]:
    r"""The contents of every closed `\boxed{…}`, by position; braces may nest, `\{` and `\}` don't count. O(len)."""
    boxes, open_braces = [], []
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, flags=re.DOTALL):
        token = match.group()
        if token == "{" or token.startswith("\\boxed"):
            open_braces.append((match.end(), token != "{"))
        elif token == "}" and open_braces:
            start, boxed = open_braces.pop()
            if boxed:
                boxes.append((start, text[start : match.start()]))
    return [content for _, content in sorted(boxes)]


def extract_answer(text: str) -> str | None:
    r"""The final answer: the last closed `\boxed{…}`, else the last "Answer: …" line, else None."""
    boxes = find_boxes(text)
    if boxes:
        return boxes[-1].strip()
    lines = [match.group(1).strip() for match in ANSWER_LINE.finditer(text)]
    return lines[-1] if lines and lines[-1] else None


def encode_chat(tokenizer, user: str) -> list[int]:
    """Token ids of one user turn and the opening of the assistant's, by the tokenizer's own chat template."""
    messages = [{"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


# --------------------------------------------------------------------------- record files and processes


class InputError(Exception):
    """Bad input: the message names the thing, the value and what to do; `run_stage` turns it into exit status 2."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main; an InputError becomes one line on stderr and exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def read_records(path: str | Path, fields: list[str], made_by: str = "") -> list[dict]:
    """All records of a JSON Lines file. Raises InputError for a missing or empty file, for a line that is not
    an object with these fields (with its number), and for a repeated id."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file" + (f"; make it with: {made_by}" if made_by else ""))
    records, seen = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON ({error.msg}); fix or remove the line") from None
        missing = [f for f in fields if not isinstance(record, dict) or f not in record]
        if missing:
            raise InputError(f"{path}:{number}: no field {missing[0]!r}; every line needs {', '.join(fields)}")
        if "id" in fields and record["id"] in seen:
            raise InputError(f"{path}:{number}: id {record['id']!r} is there twice; ids must be unique")
        seen.add(record.get("id"))
        records.append(record)
    if not records:
        raise InputError(f"{path}: the file is empty" + (f"; make it with: {made_by}" if made_by else ""))
    return records


def write_json(path: Path, value: object) -> None:
    """Write JSON under a temporary name, then rename: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_records(path: Path, records: list[dict], args: argparse.Namespace) -> None:
    """Write a JSON Lines file and its args.json, each whole or not at all."""
    write_json(path.with_name(path.name + ".args.json"), describe_run(args))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def describe_run(args: argparse.Namespace) -> dict:
    """What `<output>.args.json` holds: resolved arguments, package versions, git commit."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"arguments": vars(args), "versions": packages, "commit": commit or None}


def check_arguments(output: Path, run: dict, free: set[str]) -> None:
    """Raise InputError if `<output>.args.json` has other arguments than this run, except for the `free` ones."""
    earlier = output.with_name(output.name + ".args.json")
    if not earlier.exists():
        return
    old, new = json.loads(earlier.read_text())["arguments"], run["arguments"]
    for name in sorted((old.keys() | new.keys()) - free):
        if old.get(name) != new.get(name):
            raise InputError(
                f"{output}: made with --{name} {old.get(name)}, this run has --{name} {new.get(name)}; "
                "choose another --out or remove it"
            )


class RecordFile:
    """An append-only JSON Lines output that a killed run can take up again. Use as a context manager.

    On entry it takes the file's lock (two runs never write to one file), cuts a torn last line, and refuses
    a file made with other arguments, except for those that don't change records (`free`). `done` has the ids
    already there. Under torchrun rank 0 does all this, and every rank appends whole lines.
    """

    def __init__(self, path: str | Path, args: argparse.Namespace, free: tuple[str, ...] = ()):
        self.path, self.free = Path(path), {"out", "limit", "slots", "device", *free}
        self.run = describe_run(args)
        self.done: set[str] = set()

    def __enter__(self) -> "RecordFile":
        if rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path.with_name(self.path.name + ".lock"), "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path}: another run is writing to it; wait for it or choose another --out") from None
            if self.path.exists() and self.path.stat().st_size:
                check_arguments(self.path, self.run, self.free)
                with open(self.path, "rb+") as file:
                    data = file.read()
                    file.truncate(data.rfind(b"\n") + 1)
            write_json(self.path.with_name(self.path.name + ".args.json"), self.run)
        if dist.is_initialized():
            dist.barrier()
        if self.path.exists() and self.path.stat().st_size:
            self.done = {record["id"] for record in read_records(self.path, ["id"])}
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        return self

    def append(self, records: list[dict]) -> None:
        """Append the records whose ids are not there yet, in one write."""
        fresh = [r for r in records if r["id"] not in self.done]
        self.done.update(r["id"] for r in fresh)
        data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in fresh).encode()
        while data:
            data = data[os.write(self.file, data) :]

    def __exit__(self, *_) -> None:
        os.close(self.file)
        if dist.is_initialized():
            dist.barrier()
        if rank() == 0:
            self.lock.close()


def start_processes(device: str | None = None) -> torch.device:
    """Join the process group if torchrun started us; returns this process's device."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def rank() -> int:
    """This process's number among those torchrun started; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes torchrun started; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def log(*values: object) -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        print(*values, flush=True)


def parse_args(parser: argparse.ArgumentParser, tiny: dict, key: str = "model") -> argparse.Namespace:
    """Parse the command line; without `--<key>` the tiny world's numbers replace the paper's defaults."""
    args = parser.parse_args()
    if getattr(args, key) is None:
        parser.set_defaults(**tiny)
        args = parser.parse_args()
        if "RANK" not in os.environ or os.environ["RANK"] == "0":
            print(f"no --{key}: the tiny world, " + ", ".join(f"{k}={getattr(args, k)}" for k in tiny), flush=True)
    return args


def find_model(name: str, flag: str = "--model") -> Path:
    """The directory of a model given as a directory or as a hub name (then downloaded or found in the hub's cache)."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (HFValidationError, OSError) as error:  # hub and network errors are OSErrors
        reason = str(error).splitlines()[0]
        raise InputError(f"{flag} {name}: neither a directory nor a hub model that can be loaded ({reason})") from None


def open_model(name: str, device: torch.device, dtype: torch.dtype, flag: str = "--model"):
    """(model, tokenizer, stop ids) of a Hugging Face directory or hub name; InputError if it can't be used."""
    path = find_model(name, flag)
    try:
        model = load_model(path, device, dtype)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{flag} {name}: {error}") from None
    tokenizer, stops = open_tokenizer(path, flag)
    return model, tokenizer, stops


def open_tokenizer(path: Path, flag: str = "--model"):
    """(tokenizer, stop ids). Stop ids are those of generation_config.json and the tokenizer's own."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise InputError(f"{flag} {path}: its tokenizer has no chat template; use an instruct model")
    stops = {tokenizer.eos_token_id} - {None}
    if (path / "generation_config.json").is_file():
        listed = json.loads((path / "generation_config.json").read_text()).get("eos_token_id", [])
        stops |= set(listed if isinstance(listed, list) else [listed])
    return tokenizer, sorted(stops)


# --------------------------------------------------------------------------- the sampler


@dataclass
class Sample:
    """One sampled continuation: its token ids (a stop token included), the log-probability of each under the
    distribution it was drawn from and under the untruncated one at the same temperature, and why it ended."""

    ids: list[int]
    logprobs: list[float]
    full_logprobs: list[float]
    finish: str  # "stop" or "length"


@dataclass
class Row:
    """A continuation in progress: where it belongs and how far it is."""

    prompt: int
    sample: int
    length: int  # tokens in the cache
    emitted: int = 0


def choose_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int):
    """Draw one token a row by inverting the distribution function at one uniform number a row.

    logits (B, V) fp32, uniform (B,) in [0, 1) -> (tokens (B,), logprobs (B,), full_logprobs (B,)). The nucleus
    is the smallest set of most likely tokens with mass >= top_p; top_k = 0 means no limit. temperature 0 is
    greedy, with log-probabilities at temperature 1. fp64 sums: at V = 152k, fp32 would misplace the tail.
    """
    full = F.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)  # (B, V)
    if temperature == 0:
        tokens = logits.argmax(-1)
        logprobs = full.gather(1, tokens[:, None])[:, 0]
        return tokens, logprobs, logprobs
    if top_p >= 1 and not top_k:
        cdf = full.exp().cumsum(-1, dtype=torch.float64)  # (B, V)
        tokens = torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True)[:, 0]
        tokens = tokens.clamp_max(logits.shape[1] - 1)
        logprobs = full.gather(1, tokens[:, None])[:, 0]
        return tokens, logprobs, logprobs
    V = logits.shape[1]
    window = min(top_k or 64, V)
    while True:  # the nucleus nearly always lies within a small window; widen it when it doesn't
        ranked, order = full.topk(window, dim=-1)  # (B, window), most likely first
        mass = ranked.exp().cumsum(-1, dtype=torch.float64)
        if top_k or window == V or bool((mass[:, -1] >= top_p).all()):
            break
        window = V
    total = mass[:, -1:] if top_k else 1.0
    kept = (mass - ranked.exp()) < top_p * total  # what lies before a kept token is less than top_p
    cdf = torch.where(kept, ranked.exp().double(), 0.0).cumsum(-1)
    place = torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True)
    place = torch.minimum(place, kept.sum(-1, keepdim=True) - 1)
    full_logprobs = ranked.gather(1, place)[:, 0]
    return order.gather(1, place)[:, 0], full_logprobs - cdf[:, -1].log().float(), full_logprobs


class Sampler:
    """Batched sampling with a slot KV cache: per-row lengths, no left padding, refill and compaction.

    Running rows always fill the first n slots. Each decoding step feeds one token a row; rows that finish are
    overwritten by the last ones, and new rows are appended when an eighth of the slots is free. A prompt is
    run once, packed with others, and its keys and values are copied to the slots of all its samples.

    Shapes: n running rows, L layers, K key/value heads, E head size, G query heads per key/value head.
    """

    def __init__(self, model: Transformer, slots: int = 64, prefill_tokens: int = 16_384):
        self.model, self.slots, self.prefill_tokens = model, slots, prefill_tokens
        self.tokens = 0  # sampled so far, by all calls

    def sample(self, prompts: list[list[int]], **settings) -> list[list[Sample]]:
        """num_samples samples of every prompt, in order; the settings are those of `stream`."""
        results: list[list[Sample]] = [[] for _ in prompts]
        for i, samples in self.stream(prompts, **settings):
            results[i] = samples
        return results

    @torch.no_grad()
    def stream(
        self,
        prompts: list[list[int]],
        *,
        keys: list[str],
        num_samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 1024,
        stop_ids: list[int],
        seed: int = 0,
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Yield (prompt index, its samples) as prompts are finished.

        A sample is a function of (seed, key of its prompt, sample index): its uniform numbers come from a
        generator seeded by these three, so neither the number of slots nor the order matters (exactly so on
        CPU in fp32, up to ties within rounding elsewhere). Raises ValueError for a prompt that leaves no room for max_new_tokens in the model's context.
        """
        if len(keys) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(keys)} keys")
        if not prompts:
            return
        longest = max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise ValueError("an empty prompt: there is nothing to continue")
        if longest + max_new_tokens > self.model.config.max_positions:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
                f"{self.model.config.max_positions}"
            )
        state = _Slots(self.model, min(self.slots, len(prompts) * num_samples), longest + max_new_tokens, max_new_tokens)
        stops = torch.tensor(sorted(stop_ids), device=self.model.device)
        queue = deque((p, s) for p in range(len(prompts)) for s in range(num_samples))
        held: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # prompts with samples still in the queue
        finished: dict[int, list[Sample | None]] = {}

        def settle(logits: Tensor, first: int) -> Iterator[tuple[int, list[Sample]]]:
            """Draw the next token of rows first..n-1, then harvest those that end with it."""
            rows = state.rows[first:]
            n = first + len(rows)
            steps = state.emitted[first:n]
            uniform = state.uniform[first:n].gather(1, steps[:, None])[:, 0]  # (n - first,)
            tokens, logprobs, full = choose_tokens(logits, uniform, temperature, top_p, top_k)
            state.tokens[first:n] = tokens
            for buffer, values in ((state.ids, tokens), (state.logprobs, logprobs), (state.full, full)):
                buffer[first:n].scatter_(1, steps[:, None], values[:, None].to(buffer.dtype))
            state.emitted[first:n] += 1
            stopped = torch.isin(tokens, stops).tolist()
            for row in rows:
                row.emitted += 1
            self.tokens += len(rows)
            ended = [i for i, row in enumerate(rows, first) if stopped[i - first] or row.emitted == max_new_tokens]
            for i in ended:
                row = state.rows[i]
                values = [buffer[i, : row.emitted].tolist() for buffer in (state.ids, state.logprobs, state.full)]
                group = finished.setdefault(row.prompt, [None] * num_samples)
                group[row.sample] = Sample(*values, "stop" if stopped[i - first] else "length")
                if None not in group:
                    yield row.prompt, finished.pop(row.prompt)
            state.remove(ended)

        while queue or state.rows:
            free = state.capacity - len(state.rows)
            if queue and (free >= max(1, state.capacity // 8) or not state.rows):
                new = [queue.popleft() for _ in range(min(free, len(queue)))]
                self._prefill(prompts, [p for p, _ in new], held)
                first = len(state.rows)
                logits = state.add(new, prompts, held, [_uniforms(seed, keys[p], s, max_new_tokens) for p, s in new])
                for p in {p for p, _ in new} - {queue[0][0] if queue else None}:
                    del held[p]
                yield from settle(logits, first)
                continue
            yield from settle(state.decode(), 0)

    def _prefill(self, prompts: list[list[int]], wanted: list[int], held: dict) -> None:
        """Run the wanted prompts that aren't held yet, packed, and hold (keys, values, last hidden state) of each."""
        wanted = [p for p in dict.fromkeys(wanted) if p not in held]
        while wanted:
            chunk, tokens = [], 0
            while wanted and (not chunk or tokens + len(prompts[wanted[0]]) <= self.prefill_tokens):
                tokens += len(prompts[wanted[0]])
                chunk.append(wanted.pop(0))
            ids = torch.tensor([t for p in chunk for t in prompts[p]], device=self.model.device)[None]  # (1, N)
            lengths = torch.tensor([len(prompts[p]) for p in chunk], device=self.model.device)  # (S,)
            positions, packed = packed_attention(lengths)
            seen: list[tuple[Tensor, Tensor]] = []

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                seen.append((k[0], v[0]))  # (N, K, E) each
                return packed(layer, q, k, v)

            hidden = self.model(ids, positions, attend)[0]  # (N, D)
            keys, values = (torch.stack(x) for x in zip(*seen, strict=True))  # (L, N, K, E)
            start = 0
            for p in chunk:
                end = start + len(prompts[p])
                held[p] = (keys[:, start:end], values[:, start:end], hidden[end - 1])
                start = end


class _Slots:
    """The KV cache and the per-row state of the rows that are running: always the first len(rows) slots."""

    def __init__(self, model: Transformer, slots: int, length: int, max_new_tokens: int):
        c, device, dtype = model.config, model.device, model.head.dtype
        self.model, self.capacity, self.rows = model, slots, []
        self.keys = torch.zeros(c.num_layers, slots, c.num_kv_heads, length, c.head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)  # (L, slots, K, length, E)
        self.tokens = torch.zeros(slots, device=device, dtype=torch.long)  # the last token of each row
        self.lengths = torch.zeros(slots, device=device, dtype=torch.long)  # tokens in the cache
        self.emitted = torch.zeros(slots, device=device, dtype=torch.long)  # tokens sampled
        self.ids = torch.zeros(slots, max_new_tokens, device=device, dtype=torch.int32)
        self.logprobs = torch.zeros(slots, max_new_tokens, device=device)
        self.full = torch.zeros(slots, max_new_tokens, device=device)
        self.uniform = torch.zeros(slots, max_new_tokens, device=device)

    def add(self, new: list[tuple[int, int]], prompts: list[list[int]], held: dict, uniforms: list[np.ndarray]) -> Tensor:
        """Append rows for these (prompt, sample) pairs; returns the logits of their first token (R, V)."""
        first = len(self.rows)
        for slot, (p, s) in enumerate(new, first):
            keys, values, _ = held[p]
            length = len(prompts[p])
            self.keys[:, slot, :, :length] = keys.transpose(1, 2)
            self.values[:, slot, :, :length] = values.transpose(1, 2)
            self.rows.append(Row(p, s, length))
        here = slice(first, len(self.rows))
        self.lengths[here] = torch.tensor([len(prompts[p]) for p, _ in new])
        self.emitted[here] = 0
        self.uniform[here] = torch.from_numpy(np.stack(uniforms))
        hidden = torch.stack([held[p][2] for p, _ in new])  # (R, D)
        return slice_logits(hidden, self.model.head, 1.0)

    def decode(self) -> Tensor:
        """Feed every row its last token; returns the logits of the next one (n, V)."""
        n = len(self.rows)
        longest = max(row.length for row in self.rows) + 1
        rows, lengths = torch.arange(n, device=self.tokens.device), self.lengths[:n]
        visible = torch.arange(longest, device=rows.device) <= lengths[:, None]  # (n, longest)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, lengths] = k[:, 0]  # (n, K, E)
            values[rows, :, lengths] = v[:, 0]
            # The G query heads of a key/value head become G query rows: each key is read once, not G times.
            q = q.view(n, keys.shape[1], -1, q.shape[-1])  # (n, K, G, E)
            out = F.scaled_dot_product_attention(
                q, keys[:n, :, :longest], values[:n, :, :longest], attn_mask=visible[:, None, None]
            )
            return out.reshape(n, 1, -1, q.shape[-1])  # (n, 1, H, E)

        hidden = self.model(self.tokens[:n, None], lengths[:, None], attend)[:, 0]  # (n, D)
        self.lengths[:n] += 1
        for row in self.rows:
            row.length += 1
        return slice_logits(hidden, self.model.head, 1.0)

    def remove(self, ended: list[int]) -> None:
        """Drop rows: the last running rows move into the holes, so that the first slots stay dense."""
        if not ended:
            return
        gone, n = set(ended), len(self.rows) - len(ended)
        holes = [i for i in ended if i < n]
        movers = [i for i in range(n, len(self.rows)) if i not in gone]
        if holes:
            longest = max(self.rows[i].length for i in movers) + 1
            for cache in (self.keys, self.values):
                cache[:, holes, :, :longest] = cache[:, movers, :, :longest]
            for state in (self.tokens, self.lengths, self.emitted, self.ids, self.logprobs, self.full, self.uniform):
                state[holes] = state[movers]
            for hole, mover in zip(holes, movers, strict=True):
                self.rows[hole] = self.rows[mover]
        del self.rows[n:]


def _uniforms(seed: int, key: str, sample: int, count: int) -> np.ndarray:
    """(count,) fp32 in [0, 1): the random numbers of one sample, a function of its three names alone."""
    digest = hashlib.blake2b(f"{seed}\0{key}\0{sample}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count, np.float32)


def with_progress(stream: Iterator, sampler: Sampler, title: str, prompts: int, num_samples: int) -> Iterator:
    """Pass a sampler's stream through, with a progress bar over samples, tokens/s and the time left."""
    bar = tqdm(total=prompts * num_samples, desc=title, unit="sample", disable=rank() != 0, mininterval=1.0)
    started, before = time.time(), sampler.tokens
    with bar:
        for i, samples in stream:
            bar.set_postfix_str(f"{(sampler.tokens - before) / (time.time() - started):,.0f} tok/s", refresh=False)
            bar.update(len(samples))
            yield i, samples


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
    parser.add_argument("--slots", type=int, default=128, help="rows of the sampler's KV cache")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    args = parse_args(parser, TINY)
    for flag in ("problems", "out"):
        if getattr(args, flag) is None:
            raise InputError(f"--{flag} is missing; it goes with --model")
    device = start_processes(args.device)
    problems = read_records(args.problems, ["id", "problem"], "python -m data.make_tiny problems")[: args.limit]
    with RecordFile(args.out, args) as output:
        ids = [[f"{p['id']}/{k}" for k in range(args.num_samples)] for p in problems]
        mine = range(rank(), len(problems), world_size())
        todo = [problems[i] for i in mine if not output.done.issuperset(ids[i])]
        if not todo:
            log(f"{args.out}: complete, {len(output.done)} solutions")
            return
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, tokenizer, stops = open_model(args.model, device, dtype)
        prompts = [encode_chat(tokenizer, SOLVE_PROMPT.format(problem=p["problem"])) for p in todo]
        for problem, prompt in zip(todo, prompts, strict=True):
            if len(prompt) + args.max_new_tokens > model.config.max_positions:
                raise InputError(
                    f"problem {problem['id']}: its prompt of {len(prompt)} tokens and --max_new_tokens "
                    f"{args.max_new_tokens} exceed the model's context of {model.config.max_positions}; lower the flag"
                )
        sampler = Sampler(model, args.slots)
        stream = sampler.stream(
            prompts,
            keys=[p["id"] for p in todo],
            num_samples=args.num_samples,
            temperature=args.temperature,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
            stop_ids=stops,
            seed=args.seed,
        )
        started = time.time()
        for i, samples in with_progress(stream, sampler, "generate", len(prompts), args.num_samples):
            problem, records = todo[i], []
            for k, sample in enumerate(samples):
                text = tokenizer.decode(sample.ids, skip_special_tokens=True)
                about = {"id": f"{problem['id']}/{k}", "problem_id": problem["id"], "problem": problem["problem"]}
                about |= {"sample": k, "text": text, "steps": split_steps(text), "answer": extract_answer(text)}
                about |= {"finish": sample.finish, "tokens": len(sample.ids), "model": args.model, "seed": args.seed}
                records.append(about)
            output.append(records)
        seconds = time.time() - started
        log(f"{args.out}: {len(output.done)} solutions, {sampler.tokens / seconds:,.0f} tokens/s")


if __name__ == "__main__":
    run_stage(main)
