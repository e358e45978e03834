#!/usr/bin/env bash
# All tests, on a fresh machine too: makes .venv as the CPU recipes do, checks style and layers, runs pytest.
# Exit status: 0 where every part of the tests passes.
#
#   bash tests/run.sh                       # everything, real trainings included
#   bash tests/run.sh --ignore=tests/e2e    # without the trainings; arguments go to pytest
#
# Hardware   no GPU; 2 cores, 24 GiB of memory
# Data       the tests make their own (tests/made_data.py). The same tests run on the real files, GSM8K and the paper's
#            evaluation sets, where VERL_HPT_TEST_DATA names their folder; a folder that lacks one is an error.
set -euo pipefail
CPU_EXTRAS=dev
# shellcheck source=recipes/cpu_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../recipes/cpu_env.sh"
cd "$repo"
cpu_install
export PATH=$venv/bin:$PATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
ruff check .
ruff format --check .
lint-imports
run_tests() { python -m pytest -q --durations=15 "$@"; }
if [ $# -gt 0 ]; then
  run_tests "$@"
  exit
fi
# Two halves side by side, one a core; then the trainings, which want the machine for themselves.
log=$(mktemp) half='tests/test_[a-f]*.py' status=0
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f "$log"' EXIT
# shellcheck disable=SC2086
run_tests $half >"$log" 2>&1 &
run_tests --ignore=tests/e2e --ignore-glob="$half" || status=$?
wait $! || status=$?
cat "$log"
run_tests tests/e2e || status=$?
exit "$status"
