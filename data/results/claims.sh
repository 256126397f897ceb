#!/usr/bin/env bash
# The claims of the README's results table on the tiny world, over five seeds: about an hour on two cores.
#
#   bash data/results/claims.sh                 # runs/claims/<seed>/..., then data/results/claims.jsonl
#   python -m data.results.claims               # the table from data/results/claims.jsonl
#
# A seed changes the samples of Stage I, the order of training data, and the rollouts; the checkpoints and problems stay.
# The studies are larger than the main job: 100 problems, and 60 steps of GRPO.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

for seed in ${SEEDS:-0 1 2 3 4}; do
  out=runs/claims/$seed
  python generate.py --seed "$seed" --limit 100 --out "$out/solutions.jsonl"
  python verify.py --seed "$seed" --solutions "$out/solutions.jsonl" --out "$out/verify"
  python evaluate.py labels --seed "$seed" --verifications "$out/verify/verifications.jsonl" \
    --labels "$out/verify/labels_step_consistency.jsonl" --out "$out/labels.json"
  python train_prm.py --seed "$seed" --labels "$out/verify/labels_step_consistency.jsonl" --out "$out/prm_cot"
  python evaluate.py processbench --seed "$seed" --model "$out/prm_cot" --out "$out/processbench.jsonl"
  for reward in process_aware rlvr random; do
    python grpo.py --seed "$seed" --steps 60 --heldout_every 10 --prm "$out/prm_cot" --reward "$reward" --out "$out/$reward"
  done
  python evaluate.py benchmark --greedy --seed "$seed" --model "$out/process_aware" "$out/rlvr" "$out/random" data/tiny/policy \
    --out "$out/benchmark.jsonl"
done
python -m data.results.claims --collect
