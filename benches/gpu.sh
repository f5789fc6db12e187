#!/usr/bin/env bash
# All work that needs a GPU: the kernels' tests, then the benchmarks. Results go to $OUT, or to
# benches/results/. The benchmarks are stopped after 7 minutes at the latest.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benches/results}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

python -m pytest -q -p no:cacheprovider tests/gpu 2>&1 | tee "$out/gpu-tests.txt"
tests=${PIPESTATUS[0]}
timeout 240 python -m corda_kernels bench covariance --device cuda --tokens 16384 \
    --dims 576,1536,4096,8192,14336 --dtypes bfloat16,float32 \
    --json "$out/gpu-covariance.json" 2>&1 | tee "$out/gpu-covariance.txt"
bench=${PIPESTATUS[0]}
timeout 180 python -m corda_kernels.bench.batched_svd --device cuda \
    --json "$out/gpu-batched-svd.json" 2>&1 | tee "$out/gpu-batched-svd.txt"
svd=${PIPESTATUS[0]}
exit $((tests | bench | svd))
