#!/usr/bin/env bash
# SFT, then GRPO from it, then evaluation of both: three jobs, each if the one before succeeded.
#
#   slurm/pipeline.sh [--dry-run] [SBATCH OPTION...] [-- SFT FLAG... [-- GRPO FLAG... [-- EVAL FLAG...]]]
#   slurm/pipeline.sh --account=abc --time=08:00:00 -- --steps 1200 -- --steps 400 --group-size 32
#   slurm/pipeline.sh --array=0-9%4                 ten seeds, four at a time, each its own chain
#
# The run folders are $RUN_DIR/sft and $RUN_DIR/grpo (with --array: /seed-N in each), by default in
# runs/pipeline-DATE; the evaluation lies in that of grpo. --dry-run prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry_run=0 array=0 stage=options
options=() sft_flags=() grpo_flags=() eval_flags=()
for argument in "$@"; do
    case $stage:$argument in
        options:--) stage=sft ;;
        sft:--) stage=grpo ;;
        grpo:--) stage=evaluate ;;
        options:-h | options:--help)
            sed -n '2,/^set/s/^# \{0,1\}//p' slurm/pipeline.sh
            exit 0
            ;;
        options:--dry-run) dry_run=1 ;;
        options:--save[-_]dir* | sft:--save[-_]dir* | grpo:--save[-_]dir*)
            echo "error: set RUN_DIR=... before $0 instead of --save-dir" >&2
            exit 2
            ;;
        options:*)
            case $argument in --array* | -a*) array=1 ;; esac
            options+=("$argument")
            ;;
        sft:*) sft_flags+=("$argument") ;;
        grpo:*) grpo_flags+=("$argument") ;;
        evaluate:*) eval_flags+=("$argument") ;;
    esac
done

base=${RUN_DIR:-$PWD/runs/pipeline-$(date +%Y%m%d-%H%M%S)}
after=afterok log=logs/%x-%j.out
if ((array)); then after=aftercorr log=logs/%x-%A_%a.out; fi # each task after its own predecessor
export SFT_RUN=$base/sft GRPO_RUN=$base/grpo

submit() { # submit STAGE RUN_DIR [OPTION...] -- FLAG...: sets `id`
    local stage=$1 folder=$2 own=()
    shift 2
    while [[ $1 != -- ]]; do
        own+=("$1")
        shift
    done
    shift
    own=(sbatch --parsable --export=ALL --output="$log" "${options[@]}" "${own[@]}" "slurm/$stage.sbatch" "$@")
    if ((dry_run)); then
        id="<$stage>"
        printf '%q ' env RUN_DIR="$folder" SFT_RUN="$SFT_RUN" GRPO_RUN="$GRPO_RUN" "${own[@]}"
        echo
        return
    fi
    id=$(RUN_DIR=$folder "${own[@]}")
    id=${id%%;*} # a federation adds the cluster's name
    printf '%-8s %s\n' "$stage" "$id"
}

mkdir -p logs
submit sft "$SFT_RUN" -- "${sft_flags[@]}"
submit grpo "$GRPO_RUN" --dependency="$after:$id" --kill-on-invalid-dep=yes -- "${grpo_flags[@]}"
submit evaluate "$GRPO_RUN" --dependency="$after:$id" --kill-on-invalid-dep=yes -- "${eval_flags[@]}"
((dry_run)) || echo "in $base"
