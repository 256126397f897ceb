#!/usr/bin/env bash
# Stage III (Section 4): GRPO by reward, and its curves (Figures 4 to 7). After stage2.sh.
#
#   bash data/results/paper/grpo.sh     # into runs/paper/grpo/<name>; heldout/accuracy is the mean of three benchmarks
#
# The reward models are those of step consistency. Each GPU needs 119 GiB, which is worked out, not measured.
source "$(dirname "$0")/settings.sh"

# tokens, of each run with a judge:
#   sampled by 7B:  300 steps x 256 problems x 16 responses x 2,048 = 2,516,582,400; at most 8.4 hours on 8 H200
#   judged by 14B:  300 steps x 256 problems x 16 responses x 4,096 = 5,033,164,800; no rate measured
#   held-out:       31 times x 560 problems x (2,048 + 4,096) = 106,659,840
#   and 300 updates of 7B, for which no rate is measured either
orm=(--prm "$runs/step_consistency/orm" --prm_kind orm)
prm=(--prm "$runs/step_consistency/prm" --prm_kind prm)
prm_cot=(--prm "$runs/step_consistency/prm_cot" --prm_kind prm_cot)
stage grpo.py "${grpo[@]}" "${orm[@]}" --reward process_aware --out "$runs/grpo/orm"
stage grpo.py "${grpo[@]}" "${prm[@]}" --reward process_aware --out "$runs/grpo/prm"
stage grpo.py "${grpo[@]}" "${prm_cot[@]}" --reward process_aware --out "$runs/grpo/prm_cot"
stage grpo.py "${grpo[@]}" "${prm_cot[@]}" --reward step_augmented --out "$runs/grpo/step_augmented"
stage grpo.py "${grpo[@]}" "${prm_cot[@]}" --reward selective_advantage --min_steps 4 --max_steps 20 \
  --out "$runs/grpo/selective_advantage"
stage grpo.py "${grpo[@]}" "${prm_cot[@]}" --reward global_step --min_steps 3 --max_steps 20 \
  --out "$runs/grpo/global_step"
# In the released code only: what selective_advantage sets to 0 is halved; and a PRM rewards the steps.
stage grpo.py "${grpo[@]}" "${prm_cot[@]}" --reward selective_advantage --min_steps 4 --max_steps 20 \
  --selective_discount 0.5 --out "$runs/grpo/selective_half"
stage grpo.py "${grpo[@]}" "${prm[@]}" --reward step_augmented --out "$runs/grpo/step_augmented_prm"

# tokens, of each run without a judge:
#   sampled by 7B:  300 steps x 256 problems x 16 responses x 2,048 = 2,516,582,400; at most 8.4 hours on 8 H200
#   held-out:       31 times x 560 problems x 2,048 = 35,553,280
#   and 300 updates of 7B, for which no rate is measured
# Only rlvr reads the answers of the problems that it trains on.
stage grpo.py "${grpo[@]}" --reward rlvr --gold "${heldout_gold[@]}" data/train/gold/skywork.jsonl \
  --out "$runs/grpo/rlvr"
stage grpo.py "${grpo[@]}" --reward majority --out "$runs/grpo/majority"
stage grpo.py "${grpo[@]}" --reward random --out "$runs/grpo/random"

# tokens: none
python evaluate.py plot --runs "$runs"/grpo/* --keys reward/mean heldout/accuracy response/steps --out "$runs/grpo.png"
