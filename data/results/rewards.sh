#!/usr/bin/env bash
# Which reward trains the best policy? Eleven rewards of GRPO on the tiny world, five seeds, after claims.sh, which has
# trained with three of them. And is a vote of several judgements a better reward? About an hour and a quarter a seed on one core.
#
#   bash data/results/rewards.sh                # runs/rewards/<seed>/..., then data/results/rewards*.jsonl, tables, figure
#   python -m data.results.rewards              # the tables from data/results/rewards.jsonl
#
# SEEDS="0 1" limits it; what is there isn't made again. Policy, problems, steps and learning rate are those of claims.sh,
# and so are the labels from which the ORM and the PRM are trained; the checkpoint that counts is the last one.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

for seed in ${SEEDS:-0 1 2 3 4}; do
  claims=runs/claims/$seed
  out=runs/rewards/$seed
  for kind in orm prm; do
    [[ -f $out/$kind/model.safetensors ]] && continue
    python train_prm.py --seed "$seed" --kind $kind --labels "$claims/verify/labels_step_consistency.jsonl" --out "$out/$kind"
  done
  run() {  # name, further flags
    local name=$1
    shift
    [[ -f "$out/$name.jsonl" ]] && return
    python grpo.py --seed "$seed" --steps 60 --heldout_every 10 --out "$out/$name" "$@"
    python evaluate.py benchmark --greedy --seed "$seed" --model "$out/$name" --out "$out/$name.jsonl"
  }
  run process_aware-orm --prm "$out/orm" --prm_kind orm
  run process_aware-prm --prm "$out/prm" --prm_kind prm
  for reward in step_augmented selective_advantage global_step; do
    run $reward --prm "$claims/prm_cot" --reward $reward
  done
  run process_aware-votes4 --prm "$claims/prm_cot" --prm_votes 4
  for votes in 1 2 4 8; do
    python evaluate.py processbench --seed "$seed" --model "$claims/prm_cot" --votes $votes --out "$out/votes-$votes.jsonl"
  done
  run process_aware-votes2 --prm "$claims/prm_cot" --prm_votes 2
  run process_aware-votes8 --prm "$claims/prm_cot" --prm_votes 8
  run majority --reward majority
  run self_certainty --reward self_certainty
done
python -m data.results.rewards --collect
python evaluate.py plot --runs data/results/rewards_curves.jsonl --out data/results/rewards.png
python evaluate.py plot --runs data/results/votes_curves.jsonl --out data/results/votes.png
