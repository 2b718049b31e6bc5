#!/usr/bin/env bash
# SlimLLM beside other pruning methods, its own recipes and the quantized dense model: bash script/compare.sh [MODEL] [flags]
#
# Without MODEL it takes the embedded SmolLM2-135M-Instruct. The flags are those of `python -m slimllm compare --help`.
# A stopped run goes on with the same command. TUNE=FILE.json also distils, at 20 % and 50 %, and trains the outcome with LoRA on these
# instructions:
#   TUNE=alpaca.json CALIBRATION=books/ bash script/compare.sh
#   CALIBRATION=...   what --calibration is for all of it       TRAIN="..."   flags of post_training.py
#   NAME=...          prefix of what that writes to prune_log/ and tune_log/ [the model's name and the seed]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install packages -r requirement.txt -e .
choose_model "$@"
set -- "${flags[@]}"
python=.venv/bin/python
read -ra train <<< "${TRAIN:-}"
calibration=()
if [ -n "${CALIBRATION:-}" ]; then calibration=(--calibration "$CALIBRATION"); fi
also=()
if [ -n "${TUNE:-}" ]; then
    seed="$(sed -nE 's/.* --seed[ =]([0-9]+).*/\1/p' <<< " $*")"
    seed="${seed:-42}" # the default of all programs
    name="$(basename "$model" .gguf)"
    tokens=("${calibration[@]}")
    for share in 20 50; do
        run="${NAME:-compare_${name}_seed$seed}_distilled_$share"
        if [ ! -f "prune_log/$run/pruning.json" ]; then
            "$python" hf_prune.py --base_model "$model" --recipe distilled --target_sparsity "0.$share" --eval_data none \
                --seed "$seed" --save_ckpt_log_name "$run" "${tokens[@]}"
        fi
        tokens=(--calibration "prune_log/$run/calibration.safetensors") # what the model wrote once, it need not write again
        if [ ! -f "tune_log/$run/merged/pruning.json" ]; then
            "$python" post_training.py --prune_model "prune_log/$run" --data_path "$TUNE" --merge --extra_val_dataset none \
                --overwrite "${train[@]}"
        fi
        also+=("distilled and LoRA, $share %=tune_log/$run/merged")
    done
fi
[ ${#also[@]} -eq 0 ] || also=(--also "${also[@]}")
exec "$python" -m slimllm compare --base_model "$model" "${calibration[@]}" "${also[@]}" "$@"
