#!/usr/bin/env bash
# Real questions and worked solutions through the whole path, on a CPU: converted, tokenised as rollouts are, graded by
# GSM8K's own `####` answer, trained on for some steps. It shows that the path holds; so small a model learns none.
#
#   bash recipes/gsm8k_cpu.sh FILE.jsonl   # keys question and answer, as GSM8K's train.jsonl -> outputs/gsm8k_cpu
#
# Hardware   no GPU; 2 cores, 24 GiB of memory
# Time       about 5 minutes when .venv is there
# Versions   as recipes/quickstart.sh
# Expect     every question on its demonstration (no rollout of random weights solves one), demonstration NLL falling
#            from 5.6 nats a byte; accuracy 0
# Settings   STEPS (default 4), PYTHON; further arguments go to verl as overrides.
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
  echo "usage: bash recipes/gsm8k_cpu.sh FILE.jsonl [verl overrides]${1:+ (no such file: $1)}" >&2
  exit 2
fi
file=$(realpath "$1")
shift
# shellcheck source=recipes/cpu_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/cpu_env.sh"
cd "$repo"

steps=${STEPS:-4} run=outputs/gsm8k_cpu
cpu_install
cpu_environment
mkdir -p "$run/data"
verl-hpt data convert "$file" "$run/data/train.parquet" --data-source openai/gsm8k --val "$run/data/val.parquet"
# One token a byte: GSM8K's longest question has 991 bytes, its longest solution 1,228.
python "$repo/recipes/quickstart_task.py" model "$run/model" --max-length 2560

python "$repo/recipes/quickstart_task.py" run "$run" --steps "$steps" --every 1 -- \
  python -m verl.trainer.main_ppo "${cpu_args[@]}" algorithm.adv_estimator=hpt \
  data.train_files="$repo/$run/data/train.parquet" data.val_files="$repo/$run/data/val.parquet" data.val_max_samples=8 \
  data.train_batch_size=16 data.max_prompt_length=1152 data.max_response_length=1280 data.filter_overlong_prompts=True \
  actor_rollout_ref.model.path="$repo/$run/model" actor_rollout_ref.actor.optim.lr=1e-3 \
  actor_rollout_ref.actor.ppo_mini_batch_size=8 actor_rollout_ref.rollout.n=2 \
  reward.custom_reward_function.path="$repo/verl_hpt/reward.py" \
  trainer.logger='[console,file]' trainer.project_name=verl-hpt trainer.experiment_name=gsm8k_cpu \
  trainer.total_training_steps="$steps" trainer.total_epochs=1 trainer.save_freq=-1 \
  trainer.val_before_train=True trainer.test_freq="$steps" "$@"

echo
verl-hpt report "$run"
