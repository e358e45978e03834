# Sourced by the recipes of the paper's three models, which set name, model, tensor_parallel, model_changes, gate,
# demo_coef and official_coef. What differs from the published code: README, "Deviations".
# METHOD     hpt | luffy (the demonstration is the eighth of its group: rollout.n=7) | srft (LUFFY's group and entropy-
#            weighted imitation) | prefix_rft | chord_mu (stream: STREAM_FILE, else TRAIN_FILE) | relift | grpo (verl's
#            own; this package takes no part) | sft (demonstrations only, token mean; rollout.n=1) | sft_then_grpo
# OFFICIAL=1 hpt, luffy and srft as the published code computes them
# Settings   as published: 128 questions, 8 rollouts at T = 1, prompt 1,024, response 8,192, mini-batch 64, constant lr
#            5e-6 (luffy to relift 1e-6), 500 steps, AdamW, weight decay 0.01, gradient clip 1.0, entropy 0.001, no KL
# Data       TRAIN_FILE (made if missing): Elliott/Openr1-Math-46k-8192. VAL_FILES: a Hydra list, by default of what
#            verl-hpt data eval-set outputs/eval --suffix '' aime24.json amc23.json math-500.json
#            makes of files with keys prompt and answer
# Others     MODEL_PATH (folder or hub name), OUT (outputs/NAME-METHOD), STEPS (500), SFT_STEPS (500); further arguments
#            go to verl, of both stages where there are two. A stopped run goes on from its last checkpoint.
# Tried      sft_then_grpo whole, then evaluate.sh: two steps a stage, a two-layer model, on a CPU. Not yet on GPUs.
# shellcheck shell=bash disable=SC2154

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
METHOD=${METHOD:-hpt} OFFICIAL=${OFFICIAL:-0} tag=
case $METHOD in
  hpt | luffy | srft | prefix_rft | chord_mu | relift | grpo | sft | sft_then_grpo) ;;
  *)
    echo "error: METHOD=$METHOD; choose hpt, luffy, srft, prefix_rft, chord_mu, relift, grpo, sft or sft_then_grpo." >&2
    exit 2 ;;
esac
if [ "$OFFICIAL" = 1 ]; then
  tag=-official
  case $METHOD in
    hpt | luffy | srft) ;;
    *) echo "error: OFFICIAL=1 METHOD=$METHOD: there is published code for hpt, luffy and srft only." >&2; exit 2 ;;
  esac
fi
out=$(realpath -m "${OUT:-$repo/outputs/$name-$METHOD$tag}")
train_file=$(realpath -m "${TRAIN_FILE:-$repo/outputs/data/openr1-math-46k.parquet}")
sets=$repo/outputs/eval
val_files=${VAL_FILES:-[$sets/aime24.parquet,$sets/amc23.parquet,$sets/math-500.parquet]}
if [ -z "${VAL_FILES:-}" ] && [ ! -f "$sets/math-500.parquet" ]; then
  echo "error: no validation files in $sets. Make them with verl-hpt data eval-set (recipes/math.sh) or set VAL_FILES." >&2
  exit 2
fi

if [ ! -f "$train_file" ]; then
  mkdir -p "$(dirname "$train_file")"
  verl-hpt data convert Elliott/Openr1-Math-46k-8192 "$train_file" --drop-system
fi
python "$repo/recipes/local_model.py" "${MODEL_PATH:-$model}" "$out/model" "${model_changes[@]}"

# train DIR METHOD MODEL STEPS [overrides]
train() {
  local dir=$1 method=$2 path=$3 steps=$4 n=8 lr=5e-6 args
  shift 4
  case $method in
    hpt) args=(++hpt.method=hpt "++hpt.demo_coef=$demo_coef" "++hpt.gate.threshold=$gate") ;;
    luffy) n=7 lr=1e-6 args=(++hpt.method=luffy) ;;
    srft) n=7 lr=1e-6 args=(++hpt.method=srft ++hpt.demo_coef=1.0) ;;
    prefix_rft) lr=1e-6 args=(++hpt.method=prefix_rft) ;;
    chord_mu)
      lr=1e-6 args=(++hpt.method=chord_mu "++hpt.stream.files=${STREAM_FILE:-$train_file}" ++hpt.stream.batch=256) ;;
    relift) lr=1e-6 args=(++hpt.method=relift ++hpt.buffer.size=128) ;;
    sft) n=1 args=(++hpt.method=sft ++hpt.demo_coef=1.0) ;;
    grpo) args=() ;;
  esac
  if [ "$OFFICIAL" = 1 ]; then
    args+=(++hpt.gate.finished=false)
    args+=(++hpt.normalization=official actor_rollout_ref.actor.clip_ratio_low=1.0)
    args+=(actor_rollout_ref.actor.clip_ratio_high=1e9 actor_rollout_ref.actor.clip_ratio_c=1e9)
    case $method in
      hpt) args+=("++hpt.demo_coef=$official_coef") ;;
      srft) args+=(++hpt.method=srft_hpt ++hpt.demo_coef=16) ;;
    esac
  fi
  mkdir -p "$dir"
  VERL_FILE_LOGGER_PATH=$dir/metrics.jsonl python -m verl.trainer.main_ppo \
    algorithm.adv_estimator="$([ "$method" = grpo ] && echo grpo || echo hpt)" \
    data.train_files="$train_file" data.val_files="$val_files" data.train_batch_size=128 \
    data.max_prompt_length=1024 data.max_response_length=8192 data.filter_overlong_prompts=True data.truncation=error \
    actor_rollout_ref.model.path="$path" actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.fsdp_config.strategy=fsdp2 \
    actor_rollout_ref.actor.optim.lr="$lr" actor_rollout_ref.actor.optim.lr_scheduler_type=constant \
    actor_rollout_ref.actor.optim.weight_decay=0.01 actor_rollout_ref.actor.grad_clip=1.0 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=18432 \
    actor_rollout_ref.actor.entropy_coeff=0.001 actor_rollout_ref.actor.entropy_from_logits_with_chunking=True \
    actor_rollout_ref.actor.entropy_checkpointing=True actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n="$n" actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.tensor_model_parallel_size="$tensor_parallel" \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.75 actor_rollout_ref.rollout.max_model_len=9216 \
    actor_rollout_ref.rollout.val_kwargs.do_sample=True actor_rollout_ref.rollout.val_kwargs.n=8 \
    actor_rollout_ref.rollout.val_kwargs.temperature=0.6 actor_rollout_ref.rollout.val_kwargs.top_p=0.95 \
    reward.custom_reward_function.path="$repo/verl_hpt/reward.py" \
    trainer.nnodes=1 trainer.n_gpus_per_node=8 trainer.logger='[console,file]' trainer.project_name=verl-hpt \
    trainer.experiment_name="$(basename "$dir")" trainer.default_local_dir="$dir/checkpoints" \
    trainer.total_training_steps="$steps" trainer.save_freq=50 trainer.max_actor_ckpt_to_keep=2 trainer.test_freq=10 \
    "${args[@]}" "$@"
}

steps=${STEPS:-500}
if [ "$METHOD" != sft_then_grpo ]; then
  train "$out" "$METHOD" "$out/model" "$steps" "$@"
else
  start=$out/sft/merged
  if [ ! -d "$start" ]; then
    train "$out/sft" sft "$out/model" "${SFT_STEPS:-500}" "$@"
    last=$out/sft/checkpoints/global_step_$(cat "$out/sft/checkpoints/latest_checkpointed_iteration.txt")
    python -m verl.model_merger merge --backend fsdp --local_dir "$last/actor" --target_dir "$start.part"
    mv "$start.part" "$start"
  fi
  train "$out/grpo" grpo "$start" "$steps" "$@"
fi
