#!/usr/bin/env bash
# The grid of the paper's main table for a model: dense, 20 % and 50 %, each with and without LoRA post-training.
#
#   bash script/paper_tables.sh [MODEL] [flags of hf_prune.py]
#
# Without MODEL it takes the embedded SmolLM2-135M-Instruct. What is finished is not done again, so a stopped run goes on with
# the same command. The other steps get their flags from the environment:
#   NAME=...     prefix of what is written to prune_log/, tune_log/ and eval_log/ [the model's name]
#   TRAIN="..."  flags of post_training.py      EVALUATE="..."  flags of python -m slimllm evaluate
#   TUNE=0       without the post-trained rows
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install packages -r requirement.txt -e .
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    model="$1"
    shift
    name="${NAME:-$(basename "$model")}"
    amounts=("--pruning_ratio 0.25" "--pruning_ratio 0.55") # the paper's
else
    install_embedded_model
    model="$(embedded_model)"
    name="${NAME:-smollm2}"
    amounts=("--target_sparsity 0.2" "--target_sparsity 0.5")
fi
read -ra train <<< "${TRAIN:-}"
read -ra evaluate <<< "${EVALUATE:-}"
python=.venv/bin/python
results=()

evaluated() { # RESULT MODEL [--adapter DIR]
    local result="eval_log/$name/$1.json"
    shift
    "$python" -m slimllm evaluate "$@" --output "$result" "${evaluate[@]}"
    results+=("$result")
}

evaluated dense "$model"
for i in 0 1; do
    read -ra amount <<< "${amounts[$i]}"
    run="${name}_$((i ? 50 : 20))"
    if [ ! -f "prune_log/$run/pruning.json" ]; then
        "$python" hf_prune.py --base_model "$model" "${amount[@]}" --save_ckpt_log_name "$run" --eval_data none "$@"
    fi
    evaluated "$run" "prune_log/$run"
    if [ "${TUNE:-1}" = 1 ]; then
        if [ ! -f "tune_log/$run/post_training.json" ]; then
            resume=()
            if compgen -G "tune_log/$run/checkpoint-*" > /dev/null; then resume=(--resume_from_checkpoint last); fi
            "$python" post_training.py --prune_model "prune_log/$run" --output_dir "tune_log/$run" --extra_val_dataset none "${resume[@]}" "${train[@]}"
        fi
        evaluated "${run}_tuned" "prune_log/$run" --adapter "tune_log/$run/adapter"
    fi
done
echo
"$python" -m slimllm report "${results[@]}" --output "eval_log/$name"
echo
echo "the table as Markdown, LaTeX and JSON: eval_log/$name/"
