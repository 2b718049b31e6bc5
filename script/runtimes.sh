#!/usr/bin/env bash
# What it costs that a runtime must hold the pruned model, and how fast each runs it: bash script/runtimes.sh [MODEL] [flags of hf_prune.py]
#
# Prunes for each --runtime at 20 % and 50 %, prints one table; proves that llama.cpp and vLLM compute the same models, and measures
# how fast they do, dense against pruned. Without MODEL it takes the embedded SmolLM2-135M-Instruct. What is finished is not done again.
#   NAME=...   prefix of what is written to prune_log/ [runtimes]      VLLM=0   without vLLM and its environment of 2 GB
#   VLLM_PYTHON=...   interpreter of an environment that has vLLM [.vllm/bin/python, made by script/vllm.sh]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install packages -r requirement.txt -e .
install llama_cpp "$(grep ^xllamacpp tests/requirement.txt)"
choose_model "$@"
set -- "${flags[@]}"
name="${NAME:-runtimes}"
python=.venv/bin/python
runs=()

prune() { # RUN flags...
    local run="${name}_$1"
    shift
    [ -f "prune_log/$run/pruning.json" ] || "$python" hf_prune.py --base_model "$model" --save_ckpt_log_name "$run" "$@"
}

for share in 20 50; do
    for runtime in any gguf vllm transformers; do
        prune "${runtime}_$share" --recovery least_squares --target_sparsity "0.$share" --runtime "$runtime" "$@"
        runs+=("prune_log/${name}_${runtime}_$share")
    done
done
prune dense --target_sparsity 0 --recovery none --runtime transformers --eval_data none

for run in dense gguf_20 gguf_50; do
    folder="prune_log/${name}_$run"
    for type in f16 q8_0; do
        [ -f "$folder/${name}_$run-$type.gguf" ] || "$python" -m slimllm export-gguf "$folder" --outtype "$type"
    done
    "$python" -m slimllm verify "$folder" "$folder"/*-f16.gguf "$folder"/*-q8_0.gguf
done
for type in f16 q8_0; do
    "$python" -m slimllm llama-cpp-speed prune_log/"$name"_{dense,gguf_20,gguf_50}/*-"$type".gguf
done
if [ "${VLLM:-1}" = 1 ]; then
    [ -n "${VLLM_PYTHON:-}" ] || bash script/vllm.sh
    vllm="${VLLM_PYTHON:-.vllm/bin/python}"
    for run in any_20 any_50 vllm_20 vllm_50 transformers_20 transformers_50; do
        "$python" -m slimllm verify "prune_log/${name}_$run" --vllm "$vllm"
    done
    "$python" -m slimllm vllm-speed prune_log/"$name"_{dense,any_20,any_50,vllm_20,vllm_50,transformers_20,transformers_50} --vllm "$vllm"
fi
echo
"$python" -m slimllm report "${runs[@]}"
