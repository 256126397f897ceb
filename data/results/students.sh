#!/usr/bin/env bash
# What does a reward model learn from its labels that it didn't know before? On the tiny world, three seeds: 8,000 solutions, 8
# verifications of each, four ways to labels, and from each a PRM-CoT that starts from a model that calls every step correct.
#
#   bash data/results/students.sh               # runs/students/<seed>/..., then data/results/students.jsonl and the table
#   python -m data.results.students             # the table from data/results/students.jsonl
#
# About forty minutes a seed on one core; SEEDS="0 1" limits it; what is there isn't made again. The verifier makes the
# labels, as everywhere; only the student differs from that of methods.sh, which starts from data/tiny/base.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

[[ -f runs/students/start/model.safetensors ]] || python -m data.results.students --make runs/students/start
for seed in ${SEEDS:-0 1 2}; do
  out=runs/students/$seed
  python generate.py --seed "$seed" --limit 1000 --out "$out/solutions.jsonl"
  judge=(python verify.py --seed "$seed" --solutions "$out/solutions.jsonl" --out "$out/verify")
  for method in single outcome_consistency step_consistency; do
    "${judge[@]}" --method $method --num_verifications 8
  done
  "${judge[@]}" --method reference_guided --answers data/tiny/gold.jsonl --num_verifications 1
  python evaluate.py labels --seed "$seed" --verifications "$out/verify/verifications.jsonl" \
    --labels "$out"/verify/labels_*.jsonl --out "$out/labels.json"
  for method in single outcome_consistency step_consistency reference_guided; do
    [[ -f "$out/$method.jsonl" ]] && continue
    python train_prm.py --seed "$seed" --model runs/students/start --labels "$out/verify/labels_$method.jsonl" \
      --lr 1e-3 --epochs 1 --batch_size 32 --save_every 500 --out "$out/$method"
    python evaluate.py processbench --seed "$seed" --model "$out/$method" --data data/tiny/processbench.jsonl \
      --max_new_tokens 200 --slots 256 --out "$out/$method.jsonl"
  done
done
python -m data.results.students --collect
