#!/usr/bin/env bash
# avg@K and pass@K of a model on evaluation sets, with verl's own validation.
#
#   verl-hpt data eval-set outputs/eval --suffix '' aime24.json math-500.json   # once; keys prompt, answer
#   bash recipes/evaluate.sh MODEL               # a Hugging Face folder or name, or a checkpoint …/global_step_N
#   K=32 bash recipes/evaluate.sh MODEL 'data.val_files=[/…/outputs/eval/aime24.parquet]'
#
# Hardware   GPUS of any kind that hold the model (default 8)
# Time       not measured by us
# Versions   composed and validated in CI against verl 0.9.1; run on a CPU with a two-layer model, not yet on GPUs
# Expect     avg@K and exact pass@k of every set (`verl-hpt report OUT` prints them again), from all answers and
#            scores in OUT/answers; verl's best@K in OUT/metrics.jsonl draws with replacement and is lower
# Prompts    --suffix '' where the chat template itself asks for \boxed{} (Qwen2.5-Math's, recipes/llama3.1_8b.sh's)
# Settings   K (default 8), EVAL_DIR (outputs/eval), OUT (outputs/evaluate/NAME), GPUS (8); T = 0.6 and
#            top-p 0.95 as in the published scripts' validation; further arguments go to verl as overrides
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: bash recipes/evaluate.sh MODEL [verl overrides]" >&2
  exit 2
fi
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
model=${1%/} k=${K:-8} sets=$(realpath -m "${EVAL_DIR:-$repo/outputs/eval}")
shift
shopt -s nullglob
files=("$sets"/*.parquet)
if [ ${#files[@]} -eq 0 ]; then
  echo "error: no parquet file in $sets; make them with verl-hpt data eval-set (see the header) or set EVAL_DIR." >&2
  exit 2
fi
if [ -d "$model/actor" ]; then  # a checkpoint of verl's: merge its shards once
  model=$(realpath "$model")
  if [ ! -d "$model/merged" ]; then
    python -m verl.model_merger merge --backend fsdp --local_dir "$model/actor" --target_dir "$model/merged.part"
    mv "$model/merged.part" "$model/merged"
  fi
  run_name=$(basename "$(dirname "$(dirname "$model")")")-$(basename "$model")
  model=$model/merged
else
  run_name=$(basename "$model")
  if [ -d "$model" ]; then model=$(realpath "$model"); fi
fi
out=$(realpath -m "${OUT:-$repo/outputs/evaluate/$run_name}")
mkdir -p "$out"

# verl builds its trainer for an evaluation too and wants a training file: it gets the first set and takes no step.
VERL_FILE_LOGGER_PATH=$out/metrics.jsonl python -m verl.trainer.main_ppo \
  algorithm.adv_estimator=grpo trainer.val_only=True trainer.val_before_train=True trainer.resume_mode=disable \
  data.train_files="${files[0]}" data.val_files="[$(IFS=,; echo "${files[*]}")]" data.train_batch_size=8 \
  data.max_prompt_length=2048 data.max_response_length=8192 data.truncation=error \
  actor_rollout_ref.model.path="$model" actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.fsdp_config.strategy=fsdp2 actor_rollout_ref.actor.ppo_mini_batch_size=8 \
  actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 actor_rollout_ref.rollout.gpu_memory_utilization=0.7 \
  actor_rollout_ref.rollout.max_model_len=10240 actor_rollout_ref.rollout.val_kwargs.do_sample=True \
  actor_rollout_ref.rollout.val_kwargs.n="$k" actor_rollout_ref.rollout.val_kwargs.temperature=0.6 \
  actor_rollout_ref.rollout.val_kwargs.top_p=0.95 \
  reward.custom_reward_function.path="$repo/verl_hpt/reward.py" \
  reward.custom_reward_function.name=score_and_source \
  trainer.nnodes=1 trainer.n_gpus_per_node="${GPUS:-8}" trainer.logger='[console,file]' trainer.project_name=verl-hpt \
  trainer.experiment_name="$run_name" trainer.default_local_dir="$out/checkpoints" \
  trainer.validation_data_dir="$out/answers" "$@"

echo
verl-hpt report "$out"
