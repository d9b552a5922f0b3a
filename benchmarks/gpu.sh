#!/usr/bin/env bash
# All that wants a GPU, in eight minutes on one H100 or H200, with a table at the end whatever fails:
#   benchmarks/gpu.sh               results under runs/benchmarks, or under $OUT where that is set
#   benchmarks/gpu.sh --pretend     the same script on a CPU, tiny, in about two minutes: does it run?
# Needs Python 3.12, torch and transformers, and pydantic, which is in neither: wheels in the folder .whl are installed
# into a temporary folder without a network. pytest, scipy, peft, trl, datasets are used where they are.
set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export CUBLAS_WORKSPACE_CONFIG=:4096:8 HF_HUB_OFFLINE=1
if ls .whl/*.whl >/dev/null 2>&1; then
  site=$(mktemp -d) && trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl && PYTHONPATH=$PYTHONPATH:$site
fi
"$python" -m benchmarks.gpu "$@"
