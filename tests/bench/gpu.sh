#!/usr/bin/env bash
# All that this project claims about a GPU, measured in under ten minutes: one JSON file and one table.
#   tests/bench/gpu.sh [OUT.json]      on a machine without a GPU the same, small, on the CPU
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python3 tests/bench/gpu.py "$@"
