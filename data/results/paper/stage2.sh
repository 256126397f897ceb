#!/usr/bin/env bash
# Stage II (Section 3.2): ORM, PRM and PRM-CoT from the labels of each method, and the policy's format. After stage1.sh.
#
#   bash data/results/paper/stage2.sh                               # into runs/paper/<method>/<kind>, runs/paper/policy
#   METHODS=step_consistency bash data/results/paper/stage2.sh      # of one method
#
# A 14B model's checkpoint takes 177 GB of disk (<out>/training) and its export 59 GB. Remove training/ only when the
# method has its file `trained`: until then a restart resumes from it.
# tokens: none
source "$(dirname "$0")/settings.sh"

# ours: all of these; the paper's are not published. 5 % of the problems are held out, and the best checkpoint is kept.
train=(--model "$base" --lr 1e-5 --epochs 2 --batch_size 64 --max_length 8192 --activation_checkpointing)

for method in $methods; do
  [[ -f "$runs/$method/trained" ]] && continue
  labels=$runs/verify/labels_$method.jsonl
  stage train_prm.py "${train[@]}" --kind orm --labels "$labels" --out "$runs/$method/orm"
  stage train_prm.py "${train[@]}" --kind prm --labels "$labels" --out "$runs/$method/prm"
  stage train_prm.py "${train[@]}" --kind prm_cot --labels "$labels" --out "$runs/$method/prm_cot"
  touch "$runs/$method/trained"
done

# Learning rate, epochs, batch and length are RL-Tango's. That the paper follows its recipe is deduced: two epochs of
# 90 % of 113,450 solutions in batches of 64 are 3,190 steps, the number in the name of the release's checkpoint. ours:
# the solutions, which are those that the vote accepts, not 113,000 by Llama-3.1-70B-Instruct; and the chat template.
[[ -f "$runs/policy/trained" ]] && exit
stage train_prm.py --kind policy --model "$policy" --labels "$runs/verify/labels_step_consistency.jsonl" \
  --lr 5e-6 --epochs 2 --batch_size 64 --max_length 4096 --activation_checkpointing --out "$runs/policy"
touch "$runs/policy/trained"
