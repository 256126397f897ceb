# What the files of this folder share: models, directories, the settings of GRPO, and how a stage is started.
#
# The paper's numbers stand as flags in the commands, even where they are the defaults; `ours` marks each choice that
# neither the paper nor its released code makes. `tokens` is what a command samples at most, its limits multiplied;
# most outputs end sooner. Hours follow from these tokens and a measured rate: on an H200 a 7B model samples 10,410
# tokens per second (data/results/README.md, "Speed", workload B). For 14B and 32B no rate is measured.
#
# Each file can be stopped and started again: it resumes. The loops of stage2.sh and processbench.sh leave a file for
# each method that is done, and skip it from then on. benchmarks.sh, once it has ended, measures everything anew.
set -euo pipefail
cd "$(dirname "$0")/../../.."

generator=Qwen/Qwen2.5-14B-Instruct
verifier=Qwen/Qwen3-32B # as the released code; the paper calls it Qwen-3-32B-Instruct
base=Qwen/Qwen2.5-14B-Instruct # of the reward models
policy=Qwen/Qwen2.5-Math-7B
gpus=8 # ours: of 141 GB for the verifier and for GRPO, while 80 GB are enough for the other stages
runs=runs/paper
methods=${METHODS:-single outcome_consistency step_consistency meta_critique hybrid hybrid_outcome reference_guided}

stage() {
  torchrun --nproc_per_node "$gpus" "$@"
}

# GRPO, without --prm, --reward and --out. Measured greedily on three benchmarks every 10 steps.
heldout=(data/benchmarks/aime24.jsonl data/benchmarks/aime25.jsonl data/benchmarks/math500.jsonl)
heldout_gold=(data/benchmarks/gold/aime24.jsonl data/benchmarks/gold/aime25.jsonl data/benchmarks/gold/math500.jsonl)
grpo=(
  --policy "$runs/policy" --problems data/train/rl.jsonl --limit 17000
  --steps 300 --batch_size 256 --updates 1 --group_size 16
  --max_prompt_tokens 2048 --max_new_tokens 2048 --temperature 1
  --lr 1e-6 --kl_coef 0.001 --clip_low 0.2 --clip_high 0.2
  --loss_norm token # as the released code; the paper's formula is `sequence`
  --prm_max_new_tokens 4096 --prm_votes 1
  --heldout "${heldout[@]}" --gold "${heldout_gold[@]}" --heldout_temperature 0 --heldout_every 10
  --save_every 50 --activation_checkpointing
)
