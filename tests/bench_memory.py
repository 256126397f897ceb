"""What fits: the memory tables of kernels/README.md, worked out from the models' shapes. Nothing is allocated.

    python -m tests.bench_memory              # slots by card and command, GRPO by number of GPUs, recipes for one GPU
    python -m tests.bench_memory --packing    # how many tokens of an update are spared by packing whole groups

Measured on one H200: a 14B model took 130.6 of 139.8 GiB with the slots that `slots_that_fit` gave it (tests/gpu.py).
"""

import argparse
import math
import random
from functools import partial

import grpo
from kernels.sampler import MOST_SLOTS, PREFILL_TOKENS, slots_that_fit
from kernels.transformer import Config, Transformer

import torch

GIB = 2**30
H100, H200 = 79.1 * GIB, 139.8 * GIB  # free on an empty card
RTX = 23.5 * GIB  # a card of 24 GB
LIBRARIES = 1.5 * GIB  # CUDA context, NCCL, workspaces of cuBLAS


def qwen(family: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied=False) -> Config:
    """A configuration of the Qwen2 or Qwen3 family, as in its config.json."""
    return Config.from_dict(
        {
            "architectures": [f"{family}ForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 64 if hidden == 896 else 128,
            "vocab_size": vocab,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": tied,
        }
    )


MODELS = {
    "Qwen2.5-0.5B": qwen("Qwen2", 896, 4864, 24, 14, 2, 151936, tied=True),
    "Qwen2.5-1.5B": qwen("Qwen2", 1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen2.5-3B": qwen("Qwen2", 2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen2.5-7B": qwen("Qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen2.5-14B": qwen("Qwen2", 5120, 13824, 48, 40, 8, 152064),
    "Qwen3-32B": qwen("Qwen3", 5120, 25600, 64, 64, 8, 151936),
}
# command, model, longest prompt, new tokens
SAMPLING = [
    ("generate.py", "Qwen2.5-14B", 1000, 8192),
    ("verify.py", "Qwen3-32B", 3000, 8192),
    ("the same, a cut solution among them", "Qwen3-32B", 9000, 8192),
    ("evaluate.py processbench", "Qwen2.5-14B", 4000, 4096),
    ("evaluate.py benchmark", "Qwen2.5-7B", 1000, 3072),
]


def parameters(config: Config) -> int:
    """How many a model has; a tied head counts once."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def kept_per_token(c: Config, checkpointing: bool) -> int:
    """Numbers that autograd keeps of a token for the backward pass, without the log-probs, which have a workspace.

    At a norm four of the hidden size; queries, keys and values for all heads, and the attention's output twice; four of
    the MLP's width. Recomputing keeps only the input of each layer, and all of this for one layer at a time.
    """
    norm = 4 * c.hidden_size
    heads = c.num_heads * c.head_dim
    layer = 2 * norm + 5 * heads + 4 * c.intermediate_size
    if checkpointing:
        return norm + layer + c.num_layers * c.hidden_size
    return norm + c.num_layers * layer


def cache_bytes(c: Config, slots: int, longest: int, size: int = 2) -> int:
    """Keys and values of so many slots, and of the prompts that have just been run, twice while they are put
    together."""
    tokens = slots * min(longest, c.max_positions) + 2 * PREFILL_TOKENS
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * tokens * size


def grpo_memory(
    policy: Config,
    judge: Config | None,
    *,
    ranks: int,
    slots: int,
    prompt: int,
    new_tokens: int,
    judgement: int,
    micro_tokens: int = 16384,
    reference: bool = True,
    checkpointing: bool = True,
) -> dict[str, float]:
    """Bytes that GRPO takes on each of so many GPUs, by what takes them.

    Shared out over the ranks: fp32 weights, gradients and AdamW's two moments, and the frozen reference. On every rank:
    the sampler's copy, the reward model, and a KV cache, the larger of two (the policy's is freed before the reward
    model's is made). Left out: a few gathered layers, the libraries, fragments, and the start, where all fp32 weights
    are on each rank for a moment.
    """
    count = parameters(policy)
    shared = 4 + (2 if reference else 0)
    caches = [cache_bytes(policy, slots, prompt + new_tokens)]
    if judge is not None:
        caches.append(cache_bytes(judge, slots, prompt + new_tokens + judgement))  # the response is in its prompt
    return {
        "weights": shared * count / ranks + 2 * count,
        "gradients and optimizer": 12 * count / ranks,
        "activations": micro_tokens * kept_per_token(policy, checkpointing) * 2,
        "KV cache": max(caches),
        "reward model": 2 * parameters(judge) if judge is not None else 0,
    }


def sampling_table() -> None:
    """Slots of each full-scale command by card."""
    print("| command, model | weights | prompt + answer | a slot | H100 | H200 |\n|---|---|---|---|---|---|")
    for command, name, prompt, new_tokens in SAMPLING:
        c = MODELS[name]
        weights = 2 * parameters(c)
        slot = cache_bytes(c, 1, prompt + new_tokens) - cache_bytes(c, 0, 0)
        fit = [slots_that_fit(int(card), weights, c, [prompt], [new_tokens]) for card in (H100, H200)]
        numbers = f"{weights / GIB:.1f} GiB | {prompt:,} + {new_tokens:,} | {slot / GIB:.2f} GiB | {fit[0]} | {fit[1]}"
        print(f"| {command}, {name} | {numbers} |")


def grpo_table() -> None:
    """The paper's GRPO on 8 and on 64 GPUs."""
    plan = partial(
        grpo_memory, MODELS["Qwen2.5-7B"], MODELS["Qwen2.5-14B"], prompt=2048, new_tokens=2048, judgement=4096
    )
    columns = [plan(ranks=8, slots=32), plan(ranks=64, slots=8)]
    print("\n| on each GPU | 8 GPUs, 32 slots | 64 GPUs, 8 slots |\n|---|---|---|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name] / GIB:.1f} GiB" for column in columns) + " |")
    print("| sum | " + " | ".join(f"{sum(column.values()) / GIB:.0f} GiB" for column in columns) + " |")


def recipe(card: float, policy: str, judge: str, prompt: int, new_tokens: int, judgement: int) -> None:
    """GRPO of a policy with a judge on one GPU: what it takes, and how many slots are left for each of the two."""
    p, j = MODELS[policy], MODELS[judge]
    taken = grpo_memory(
        p, j, ranks=1, slots=0, prompt=prompt, new_tokens=new_tokens, judgement=judgement, micro_tokens=8192
    )
    resident = sum(taken[name] for name in ("weights", "gradients and optimizer", "reward model"))
    print(f"\n{policy} as the policy, {judge} as the judge, a card of {card / GIB:.1f} GiB, {prompt} + {new_tokens} tokens, "
          f"judgements of {judgement}")  # fmt: skip
    print(f"  models and optimizer {resident / GIB:.1f} GiB, activations of 8,192 tokens {taken['activations'] / GIB:.1f} GiB")
    left = card - resident - taken["activations"] - LIBRARIES
    print(f"  in an update {left / GIB:.1f} GiB are left")
    for role, c, longest, new in (("policy", p, prompt, new_tokens), ("judge", j, prompt + new_tokens, judgement)):
        slots = min(MOST_SLOTS, slots_that_fit(int(card - resident), 0, c, [longest], [new]))
        print(f"  slots of the {role}: {slots}")
    for name in sorted({policy, judge}):
        training = 16 * parameters(MODELS[name])
        training += 8192 * kept_per_token(MODELS[name], True) * 2 + LIBRARIES
        fits = "fits" if training < card else "doesn't fit"
        print(f"  fine-tuning {name}, 8,192 tokens at a time: {training / GIB:.1f} GiB, which {fits}")


def packing_table() -> None:
    """Tokens of an update at 256 x 16, packed with each prompt once per micro-batch, against all of them.

    Lengths are drawn: prompts of 60 to 400 tokens, responses log-normal around a median, of at most 2,048 tokens.
    """
    rng = random.Random(0)
    print("\n| 256 x 16 responses, 16,384 tokens at a time | ranks | prompts' share | spared by length | by group |")
    print("|---|---|---|---|---|")
    for median in (150, 400, 800):
        rollouts = []
        for i in range(256):
            prompt = [i] * rng.randint(60, 400)
            for _ in range(16):
                length = min(2048, max(8, int(rng.lognormvariate(math.log(median), 0.6))))
                rollouts.append(grpo.Rollout("", prompt, [0] * length, [], "", ""))
        everything = sum(len(r.prompt) + len(r.ids) for r in rollouts)
        prompts = sum(len(r.prompt) for r in rollouts) / everything
        for ranks in (1, 8):
            spared = []
            for split in (by_length, by_group):
                packed = sum(packed_tokens(batch) for rank in range(ranks) for batch in split(rollouts, rank, ranks))
                spared.append(f"{1 - packed / everything:.1%}")
            print(f"| responses of {median} tokens in the median | {ranks} | {prompts:.0%} | {spared[0]} | {spared[1]} |")


def packed_tokens(batch: list[grpo.Rollout]) -> int:
    """Tokens of a micro-batch, in which each prompt stands once, but for its last token."""
    prompts = {tuple(r.prompt) for r in batch}
    return sum(len(r.ids) for r in batch) + sum(len(prompt) - 1 for prompt in prompts)


def by_length(rollouts: list[grpo.Rollout], rank: int, ranks: int) -> list[list[grpo.Rollout]]:
    """For comparison: responses dealt out and put together by length, whatever their prompt."""
    order = sorted(rollouts, key=lambda r: len(r.prompt) + len(r.ids))[rank::ranks]
    batches, tokens = [[]], 0
    for r in order:
        if tokens + len(r.prompt) + len(r.ids) > 16384:
            batches.append([])
            tokens = 0
        batches[-1].append(r)
        tokens += len(r.prompt) + len(r.ids)
    return batches


def by_group(rollouts: list[grpo.Rollout], rank: int, ranks: int) -> list[list[grpo.Rollout]]:
    """What a rank of grpo.py makes of them."""
    return grpo.fill_micro_batches(grpo.deal_groups(rollouts, rank, ranks), 16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packing", action="store_true", help="the table of packed tokens only")
    args = parser.parse_args()
    if args.packing:
        packing_table()
        return
    sampling_table()
    grpo_table()
    recipe(H100, "Qwen2.5-1.5B", "Qwen2.5-7B", 1024, 2048, 2048)
    recipe(H100, "Qwen2.5-1.5B", "Qwen2.5-3B", 1024, 2048, 2048)
    recipe(RTX, "Qwen2.5-0.5B", "Qwen2.5-1.5B", 512, 1024, 1024)
    recipe(RTX, "Qwen2.5-0.5B", "Qwen2.5-0.5B", 512, 1024, 1024)


if __name__ == "__main__":
    main()
