#!/usr/bin/env bash
# Prunes a model at two settings and prints one table.
#
#   bash script/llama_prune.sh                  the embedded SmolLM2-135M-Instruct, 20 % and 50 % of its decoder: the best recipe, and
#                                               beside it the paper's method
#   bash script/llama_prune.sh MODEL [flags]    a local folder, .gguf file or hub name, the paper's ratios 0.25 and 0.55, by the best recipe;
#                                               --recipe paper for the paper's method
#
# Flags go to hf_prune.py; one that says how much to remove (--smaller, --target_sparsity, ...) makes it a single run.
# NAME=... sets the name under prune_log/.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
name="${NAME:-llama_prune}"
install packages -r requirement.txt -e .

quick=()
case " $* " in
*" --recipe"* | *" --method"* | *" --plan"*) recipes=(given) ;; # as the flags say
*) recipes=(best) ;;
esac
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    model="$1"
    shift
    first=(--pruning_ratio 0.25) second=(--pruning_ratio 0.55) extra=()
else
    install_embedded_model
    model="$(embedded_model)"
    first=(--target_sparsity 0.2) second=(--target_sparsity 0.5) extra=(--eval_limit 32)
    if [ $# -eq 0 ]; then recipes=(best paper) quick=(--num_examples 72); fi # of the 192 samples that best takes: a result in half the time
fi
how() {
    case "$1" in
    given) ;;
    best) echo "--recipe best ${quick[*]:-}" ;;
    *) echo "--recipe $1" ;;
    esac
}

prune() { .venv/bin/python hf_prune.py --base_model "$model" --overwrite "$@"; }

case " $* " in
*" --pruning_ratio"* | *" --plan"* | *" --target_"* | *" --smaller"* | *" --fit"* | *" --help "* | *" -h "* | *" --dry_run "*)
    # shellcheck disable=SC2046
    prune "${extra[@]}" $(how "${recipes[0]}") --save_ckpt_log_name "$name" "$@"
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
    run="$name"
    if [ ${#recipes[@]} -gt 1 ]; then run="${name}_$recipe"; fi
    # shellcheck disable=SC2046
    prune "${extra[@]}" $(how "$recipe") "${first[@]}" --save_ckpt_log_name "${run}_20" "$@"
    same=() # what the first run made, the second need not make again
    case " $* " in
    *" --calibration"*) ;;
    *) same=(--calibration "prune_log/${run}_20/calibration.safetensors") ;;
    esac
    case " $* " in
    *" --price_list"*) ;;
    *) if [ -f "prune_log/${run}_20/price_list.json" ]; then same+=(--price_list "prune_log/${run}_20/price_list.json"); fi ;;
    esac
    # shellcheck disable=SC2046
    prune "${extra[@]}" $(how "$recipe") "${second[@]}" "${same[@]}" --save_ckpt_log_name "${run}_50" "$@"
    runs+=("prune_log/${run}_20" "prune_log/${run}_50")
done
echo
.venv/bin/python -m slimllm report "${runs[@]}"
echo
echo "checkpoints, records, logs, figures and report.html: ${runs[*]/#/$PWD/}"
