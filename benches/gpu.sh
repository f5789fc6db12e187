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
timeout 150 python -m corda_kernels bench covariance --device cuda --tokens 16384 \
    --dims 576,1536,4096,8192,14336 --dtypes bfloat16,float32 \
    --json "$out/gpu-covariance.json" 2>&1 | tee "$out/gpu-covariance.txt"
status=$((tests | PIPESTATUS[0]))
svd() { # NAME SECONDS ARGUMENTS
    timeout "$2" python -m corda_kernels bench svd --device cuda "${@:3}" \
        --json "$out/gpu-$1.json" 2>&1 | tee "$out/gpu-$1.txt"
    status=$((status | PIPESTATUS[0]))
}
# All layers of LLaMA-2-7B first, then against the others, whose full SVDs take their time.
svd svd-llama2-7b 120 --cases llama2-7b --methods ours
svd svd-batched 60 --cases batched
svd svd 90 --cases smollm2-block,4096x4096
exit $status
