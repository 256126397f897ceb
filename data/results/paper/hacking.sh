#!/usr/bin/env bash
# Reward hacking (Section 4.4): what a policy does where its format is free, or the number of its steps. After grpo.sh,
# whose step_augmented has no ceiling on steps, so that it may inflate them.
#
#   bash data/results/paper/hacking.sh      # into runs/paper/hacking/<name>
#
# The paper names the three patterns; settings, lengths and curves of its runs are not published, so these are ours.
source "$(dirname "$0")/settings.sh"

# --dump_rollouts keeps the responses: some gigabytes per run.
hacking=("${grpo[@]}" --prm "$runs/step_consistency/prm_cot" --prm_kind prm_cot --dump_rollouts)

# tokens, of each run:
#   sampled by 7B:  300 steps x 256 problems x 16 responses x 2,048 = 2,516,582,400; at most 8.4 hours on 8 H200
#   judged by 14B:  300 steps x 256 problems x 16 responses x 4,096 = 5,033,164,800; no rate measured
#   held-out:       31 times x 560 problems x (2,048 + 4,096) = 106,659,840
#   and 300 updates of 7B, for which no rate is measured either
# Solution appending: no format constraints.
stage grpo.py "${hacking[@]}" --reward process_aware --format_constraints none --out "$runs/hacking/appending"
# Step reduction: rewards for steps without a floor.
stage grpo.py "${hacking[@]}" --reward selective_advantage --min_steps 1 --max_steps 1000 \
  --out "$runs/hacking/reduction_selective"
stage grpo.py "${hacking[@]}" --reward global_step --min_steps 1 --max_steps 1000 --out "$runs/hacking/reduction_global"

# ours: would Stage I's verifier, voting without answers, accept what the reward accepted?
# tokens: 30 steps x 64 responses x 16 verifications x 8,192 = 251,658,240 by 32B; no rate measured
stage -m data.audit --rollouts "$runs/hacking/appending/rollouts" --problems data/train/rl.jsonl --model "$verifier" \
  --every 10 --responses 64 --num_verifications 16 --temperature 0.8 --top_p 0.95 --max_new_tokens 8192 \
  --worked_examples 2 --out "$runs/hacking/audit"

# tokens: none
python evaluate.py plot --out "$runs/hacking.png" --runs "$runs/grpo/step_augmented" "$runs/hacking/appending" \
  "$runs/hacking/reduction_selective" "$runs/hacking/reduction_global"
