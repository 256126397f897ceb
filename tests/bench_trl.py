"""Seconds of one GRPO step on a CPU: ours against TRL's `GRPOTrainer`, and how ours grows with the size of the step.

    pip install trl==1.16.0          # only for this
    python -m tests.bench_trl        # about four minutes on two free cores; --repeats 15 for a steadier ratio

Both train data/tiny/policy in fp32 on the same eight prompts with eight answers each: temperature 1 without truncation,
the same reward, advantages in units of the group's std, clip 0.2, a k3 penalty towards the initial policy, the loss a
mean over tokens, one AdamW update a batch, gradients clipped to norm 1. Two workloads: long-tailed answer lengths
(64 quantiles of a log-normal distribution, the longest 400), the usual case; and answers of 100 tokens each, where
nothing can be saved by raggedness.

The lengths are forced on both. For us every answer is a prompt of its own with a limit of its own, and nothing stops it
earlier. In TRL a logits processor, one `masked_fill` a token, forbids the end token until an answer is due, and then
everything else. Steps are whole ones, from prompts to new weights, metrics included: ours is that of `grpo.train`,
TRL's lies between its trainer's `on_step_begin` and `on_step_end`. They take turns in one process with the same
threads, after one of each to warm up; the ratio is the median over the pairs.

TRL's settings are those that suit it here: all 64 answers in one batch, neither gradient checkpointing nor bf16 (its
defaults), no log entries, checkpoints or progress bar. `use_bias_correction_kl` is off, because it makes another loss;
the rest is at its default, such as the fused AdamW.
"""

import argparse
import math
import random
import statistics
import tempfile
import time
import warnings
from argparse import Namespace
from statistics import NormalDist

from data import records
from generate import SOLVE_PROMPT, Engine, open_model
from grpo import MAX_GRAD_NORM, group_advantages, rollout_metrics, sample_rollouts, spread_advantages, update_policy
from kernels import distributed
from kernels.chat import render_chat
from kernels.sampler import Sampler
from kernels.transformer import load_model

import torch
import transformers

POLICY, PROBLEMS = "data/tiny/policy", "data/tiny/problems.jsonl"
ROLLOUTS, GROUP, TOKENS, LONGEST = 64, 8, 100, 400
LR, KL_COEF, CLIP = 1e-6, 0.04, 0.2
# Our step with other rollouts, answer lengths and group sizes; each varies alone.
GROWTH = {"rollouts": (16, 32, 64, 128, 256), "tokens": (25, 50, 200, 400), "group": (2, 4, 16, 32)}


def long_tailed() -> list[int]:
    """64 lengths in a random order: the quantiles of a log-normal distribution, scaled so that the longest is 400."""
    quantiles = [NormalDist().inv_cdf((i + 0.5) / ROLLOUTS) for i in range(ROLLOUTS)]
    lengths = [round(LONGEST * math.exp(0.8 * (z - quantiles[-1]))) for z in quantiles]
    random.Random(0).shuffle(lengths)
    return lengths


def first_prompts(tokenizer, n: int) -> list[str]:
    """The first n problems as the policy sees them."""
    return [render_chat(tokenizer, SOLVE_PROMPT.format(problem=p["problem"])) for p in records.read(PROBLEMS, [])[:n]]


def share_of_ones(completions: list[str], **_) -> list[float]:
    """The reward: something that a text has more or less of. The arguments are as TRL wants them."""
    return [text.count("1") / max(len(text), 1) for text in completions]


class ForcedSampler(Sampler):
    """A sampler whose i-th answer has lengths[i] tokens. It still runs each prompt once for all its answers."""

    def __init__(self, model, lengths: list[int]):
        super().__init__(model, slots=128)
        self.lengths = lengths

    def sample(self, prompts, *, keys, num_samples, max_new_tokens, stop_ids, **settings):
        rows = [prompt for prompt in prompts for _ in range(num_samples)]
        names = [f"{key}/{k}" for key in keys for k in range(num_samples)]
        samples = super().sample(rows, keys=names, max_new_tokens=self.lengths, stop_ids=[], **settings)
        samples = [sample for (sample,) in samples]
        return [samples[i : i + num_samples] for i in range(0, len(samples), num_samples)]


def make_step(lengths: list[int], group_size: int = GROUP):
    """A function that makes one whole step of ours, as `grpo.train` does, and returns seconds of (sampling, all of
    it)."""
    device = torch.device("cpu")
    model, tokenizer, stop_ids = open_model(POLICY, device, torch.float32)
    reference = load_model(POLICY, device).requires_grad_(False)
    model = distributed.prepare_training(model, checkpointing=False)
    engine = Engine(ForcedSampler(model, lengths), tokenizer, stop_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    texts = first_prompts(tokenizer, len(lengths) // group_size)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    problems = [{"id": str(i), "problem": "", "place": i, "prompt": prompt} for i, prompt in enumerate(ids)]
    args = Namespace(
        group_size=group_size, temperature=1.0, max_new_tokens=max(lengths), reward="random", seed=0, updates=1,
        micro_tokens=16_384, loss_norm="token", clip_low=CLIP, clip_high=CLIP, kl_coef=KL_COEF, tis_cap=0.0,
        max_gap=0.1, lr=LR, selective_discount=0.0,
    )  # fmt: skip

    def step() -> tuple[float, float]:
        args.seed += 1
        started = time.perf_counter()
        rollouts = sample_rollouts(engine, problems, args, 0)
        sampled = time.perf_counter()
        for r, reward in zip(rollouts, share_of_ones([r.text for r in rollouts]), strict=True):
            r.reward = reward
        advantages = group_advantages(torch.tensor([r.reward for r in rollouts]), group_size)
        of_tokens = spread_advantages(rollouts, advantages, args)
        update_policy(model, optimizer, reference, rollouts, of_tokens, args)
        rollout_metrics(rollouts, advantages, group_size, "prm_cot")
        ended = time.perf_counter()
        assert [len(r.ids) for r in rollouts] == lengths
        return sampled - started, ended - started

    return step


class ForcedLengths(transformers.LogitsProcessor):
    """Row i ends with its token number lengths[i]: then the end token is all there is, before it there is none."""

    def __init__(self, lengths: list[int], prompt_tokens: int, end: int, vocabulary: int):
        self.last = torch.tensor(lengths)[:, None] + prompt_tokens - 1  # (B, 1)
        self.is_end = torch.arange(vocabulary) == end  # (V,)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill((self.last == input_ids.shape[1]) != self.is_end, -torch.inf)  # (B, V)


def make_trainer(lengths: list[int], steps: int, directory: str):
    """(a GRPOTrainer for so many steps, the list to which it appends the seconds of each step's sampling)."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = transformers.AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(POLICY, padding_side="left")
    sampling, generate = [], model.generate

    def forced(input_ids, **settings):
        started = time.perf_counter()
        schedule = ForcedLengths(lengths, input_ids.shape[1], tokenizer.eos_token_id, model.config.vocab_size)
        out = generate(input_ids, logits_processor=transformers.LogitsProcessorList([schedule]), **settings)
        sampling.append(time.perf_counter() - started)
        return out

    def reward(completions, completion_ids, **_):
        assert [len(ids) for ids in completion_ids] == lengths
        return share_of_ones(completions)

    model.generate = forced
    config = GRPOConfig(
        output_dir=directory, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        logging_strategy="no", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        max_steps=steps, per_device_train_batch_size=len(lengths), num_generations=GROUP, shuffle_dataset=False,
        max_completion_length=max(lengths), temperature=1.0, beta=KL_COEF, use_bias_correction_kl=False, epsilon=CLIP,
        loss_type="dapo", learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM,
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": first_prompts(tokenizer, len(lengths) // GROUP)})
    return GRPOTrainer(model, reward, config, dataset, processing_class=tokenizer), sampling


def compare(lengths: list[int], repeats: int) -> list[tuple[float, ...]]:
    """Steps of both in turn, the first of each to warm up; (sampling, all) of ours and of TRL's for each repeat."""
    step, seconds = make_step(lengths), []

    class TakeTurns(transformers.TrainerCallback):
        """Times a step of TRL's and makes one of ours behind it."""

        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            theirs = time.perf_counter() - self.started
            seconds.append((*step(), sampling[-1], theirs))

    with tempfile.TemporaryDirectory() as directory:
        trainer, sampling = make_trainer(lengths, repeats + 1, directory)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(TakeTurns())
        trainer.train()
    return seconds[1:]


def print_comparison(title: str, lengths: list[int], repeats: int) -> None:
    """Medians of both sides, and the median of the ratio with the smallest and the largest."""
    sizes = f"{len(lengths)} answers of {statistics.mean(lengths):.0f} tokens on average, at most {max(lengths)}"
    print(f"\n{title}: {sizes}; medians of {repeats} steps")
    runs = compare(lengths, repeats)
    medians = [statistics.median(column) for column in zip(*runs, strict=True)]
    for name, sampling, whole in (("ours", *medians[:2]), ("TRL", *medians[2:])):
        print(f"{name:>6}: {whole:6.2f} s, of which sampling {sampling:.2f} s")
    ratios = sorted(theirs / ours for _, ours, _, theirs in runs)
    print(f" ratio: {statistics.median(ratios):6.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def print_growth(repeats: int) -> None:
    """Our step, all answers of one length, with one of its sizes changed at a time."""
    print(f"\nour step, medians of {repeats}:\n{'rollouts':>8} {'tokens':>7} {'group':>6} {'step':>8} {'sampling':>9}")
    for name, values in GROWTH.items():
        for value in values:
            size = {"rollouts": ROLLOUTS, "tokens": TOKENS, "group": GROUP, name: value}
            step = make_step([size["tokens"]] * size["rollouts"], size["group"])
            runs = [step() for _ in range(repeats + 1)][1:]
            sampling, whole = (statistics.median(column) for column in zip(*runs, strict=True))
            sizes = f"{size['rollouts']:8} {size['tokens']:7} {size['group']:6}"
            print(f"{sizes} {whole:6.2f} s {sampling:7.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="steps of each side, after the one to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import trl

    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl))
    print(f"{versions}; {args.threads} thread(s), fp32, {POLICY}, {ROLLOUTS // GROUP} prompts x {GROUP} answers")
    print_comparison("long-tailed lengths", long_tailed(), args.repeats)
    print_comparison("equal lengths", [TOKENS] * ROLLOUTS, args.repeats)
    print_growth(min(args.repeats, 3))


if __name__ == "__main__":
    main()
