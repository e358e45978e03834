#!/usr/bin/env bash
# The paper's weak start: Llama-3.1-8B, a base model without a chat template. The gate is wider: a question stays with
# its demonstration until more than 2 of its 8 rollouts are right.
#
#   METHOD=hpt bash recipes/llama3.1_8b.sh                # hpt | luffy | srft | grpo | sft | sft_then_grpo
#
# Hardware   8 GPUs of 80 GB, one node
# Time       not measured by us
# Versions   composed and validated in CI against verl 0.9.1; not yet run on GPUs by us
# Expect     The paper's figures (arXiv 2509.04419, one run each; the same average as for Qwen), none of them ours:
#            SFT 5.9 · GRPO 9.6 · LUFFY 13.2 · HPT 18.2. The paper has none for SRFT and SFT→GRPO.
# Needs      access to meta-llama/Llama-3.1-8B on the Hugging Face hub, or MODEL_PATH
# More       methods, settings, data: recipes/math.sh; what differs from the published code: README, "Deviations"
set -euo pipefail
name=llama3.1_8b model=meta-llama/Llama-3.1-8B tensor_parallel=2
# The published script's prompt ("Question: … Answer: Let's think step by step."), written as a chat template.
model_changes=(--chat-template "$(dirname "${BASH_SOURCE[0]}")/llama_question_answer.jinja")
gate=0.25 demo_coef=0.1 official_coef=16
# shellcheck source=recipes/math.sh
source "$(dirname "${BASH_SOURCE[0]}")/math.sh"
