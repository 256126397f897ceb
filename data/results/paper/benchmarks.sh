#!/usr/bin/env bash
# The six benchmarks (the main table of RL): the policies of grpo.sh, their start, and its base. After grpo.sh.
#
#   bash data/results/paper/benchmarks.sh   # into runs/paper/benchmarks.jsonl
source "$(dirname "$0")/settings.sh"

models=("$policy" "$runs/policy"
  "$runs/grpo/orm" "$runs/grpo/prm" "$runs/grpo/prm_cot"
  "$runs/grpo/step_augmented" "$runs/grpo/selective_advantage" "$runs/grpo/global_step"
  "$runs/grpo/step_augmented_prm" "$runs/grpo/selective_half"
  "$runs/grpo/majority" "$runs/grpo/random" "$runs/grpo/rlvr") # differences are to the last one
problems=(data/benchmarks/math500.jsonl data/benchmarks/aime24.jsonl data/benchmarks/aime25.jsonl
  data/benchmarks/amc23.jsonl data/benchmarks/olympiadbench.jsonl data/benchmarks/minerva.jsonl)
gold=(data/benchmarks/gold/math500.jsonl data/benchmarks/gold/aime24.jsonl data/benchmarks/gold/aime25.jsonl
  data/benchmarks/gold/amc23.jsonl data/benchmarks/gold/olympiadbench.jsonl data/benchmarks/gold/minerva.jsonl)

# A greedy solution per problem, as in most cells of the paper (which follows from their fractions). ours: 16 samples
# beside it, since AMC23's cells are averages over at least 8; and 2,048 tokens, because Qwen2.5-Math's context of 4,096
# has no space for many more beside the longest problem.
# tokens: 13 models x 1,547 problems x 17 solutions x 2,048 = 700,184,576 by 7B; at most 2.3 hours on 8 H200
stage evaluate.py benchmark --model "${models[@]}" --problems "${problems[@]}" --gold "${gold[@]}" \
  --greedy --num_samples 16 --temperature 1 --top_p 1 --max_new_tokens 2048 --out "$runs/benchmarks.jsonl"
