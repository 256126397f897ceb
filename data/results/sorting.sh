#!/usr/bin/env bash
# A domain without an answer to check (data/make_sorting.py), by the same five stages: labels, reward model, GRPO with
# other format constraints and two other rewards, and what the policies do on held-out problems.
#
#   bash data/results/sorting.sh                # runs/sorting/<seed>/..., then data/results/sorting.jsonl and the tables
#   python -m data.results.sorting              # the tables from data/results/sorting.jsonl
#
# About half an hour for the three checkpoints and forty minutes a seed on one core. SEEDS="0 1" limits it; what is
# there isn't made again. Gold is written by the rule of the domain, for measuring; no stage up to GRPO reads it.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

world=runs/sorting
[[ -f $world/problems.jsonl ]] || python -m data.make_sorting problems
for part in policy verifier blind; do
  [[ -f $world/$part/model.safetensors ]] || python -m data.make_sorting $part
done

for seed in ${SEEDS:-0 1 2}; do
  out=$world/$seed
  solve() {  # model, problems, where to; further flags
    local model=$1 problems=$2 where=$3
    shift 3
    python generate.py --seed "$seed" --model "$model" --problems "$problems" --out "$where.jsonl" --temperature 1 --top_p 1 \
      --max_new_tokens 160 --slots 256 "$@"
    python -m data.make_sorting check --solutions "$where.jsonl" --out "$where.gold.jsonl" --cases "$where.cases.jsonl"
  }
  judge() {  # a verifier: its labels, and the PRM-CoT that learns from them
    local verifier=$1
    local to=$out/$verifier
    [[ -f $to/processbench.jsonl ]] && return
    python verify.py --seed "$seed" --model "$world/$verifier" --solutions "$out/solutions.jsonl" --out "$to/verify" \
      --max_new_tokens 200 --worked_examples 0 --slots 256
    python evaluate.py labels --seed "$seed" --verifications "$to/verify/verifications.jsonl" \
      --labels "$to/verify/labels_step_consistency.jsonl" --gold "$out/solutions.gold.jsonl" --out "$to/labels.json"
    python train_prm.py --seed "$seed" --model "$world/$verifier" --labels "$to/verify/labels_step_consistency.jsonl" \
      --out "$to/prm_cot" --lr 2e-4 --epochs 3 --batch_size 32 --save_every 50
    python evaluate.py processbench --seed "$seed" --model "$to/prm_cot" --data "$out/start.cases.jsonl" \
      --max_new_tokens 260 --slots 256 --out "$to/processbench.jsonl"
  }
  run() {  # name, whose PRM-CoT, further flags
    local name=$1 verifier=$2
    shift 2
    [[ -f "$out/$name.gold.jsonl" ]] && return
    python grpo.py --seed "$seed" --policy $world/policy --prm "$out/$verifier/prm_cot" --problems $world/problems.jsonl \
      --out "$out/$name" --steps 40 --batch_size 16 --group_size 8 --lr 1.5e-4 --max_new_tokens 160 \
      --prm_max_new_tokens 260 --slots 128 --sample_every 1000 "$@"
    solve "$out/$name" $world/heldout.jsonl "$out/$name" --num_samples 4
  }
  solve $world/policy $world/problems.jsonl "$out/solutions" --limit 100
  solve $world/policy $world/heldout.jsonl "$out/start" --num_samples 4
  judge verifier
  judge blind
  for verifier in verifier blind; do
    for constraints in none paper strict; do
      run $verifier-$constraints $verifier --format_constraints $constraints
    done
  done
  run majority verifier --reward majority
  run random verifier --reward random
  [[ -f $out/rescored.json ]] || python -m data.results.sorting --rescore --seed "$seed"
done
python -m data.results.sorting --collect
