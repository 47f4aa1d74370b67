# shellcheck shell=bash
# Sourced by the batch scripts, which set `root`: the site's environment, the rendezvous of the
# ranks, and for the trainers: stop before the time limit, requeue, resume.
#
# Read from the environment, all optional:
#   MINIGRPO_ROOT    the checkout; default where sbatch was called. Elsewhere give sbatch also
#                    --output=FOLDER/%x-%j.out, or the job dies without a word for want of logs/
#   MINIGRPO_ENV     a script to source first; default slurm/env.sh, made from env.sh.example
#   RUN_DIR          run folder of a trainer; default runs/NAME-JOBID, which a requeue finds again.
#                    An array puts one folder a task in it, seed-TASKID, and that is the seed
#   NPROC_PER_NODE   ranks a node; default one a GPU, or one
#   MAX_REQUEUES     restarts, by preemption or failure of a node as well, after which a job that
#                    stops before its time limit fails; default 20
#   MASTER_PORT      default made of the job id, as two jobs may share a node

cd "${root:?the batch script sets it}" || exit
env_file=${MINIGRPO_ENV:-$root/slurm/env.sh}
if [[ -r $env_file ]]; then
    trap 'echo "error: $env_file failed at: $BASH_COMMAND" >&2' ERR
    set +u # conda reads unset variables
    # shellcheck source=/dev/null
    source "$env_file"
    set -u
    trap - ERR
elif [[ -n ${MINIGRPO_ENV:-} ]]; then
    echo "error: MINIGRPO_ENV must be a readable script, got $MINIGRPO_ENV" >&2
    exit 2
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${nodes[0]:?no node list}
port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
nproc=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
((nproc > 0)) || nproc=1 # without GPUs Slurm may say 0 of them
cpus=$SLURM_CPUS_ON_NODE
counts=${SLURM_JOB_CPUS_PER_NODE:-$cpus} # as 64(x2),48: with --exclusive nodes may differ
for count in ${counts//,/ }; do
    count=${count%%'('*}
    cpus=$((count < cpus ? count : cpus))
done
threads=$((cpus / nproc))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
if ((threads == 0)); then
    echo "warning: $nproc ranks share $cpus CPU(s): sbatch --cpus-per-gpu=8" >&2
fi
# After SIGTERM torchrun would kill ranks that are still saving after 30 s, whatever Slurm grants.
# torch 2.11 does in any case.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# srun takes options from the environment. After sbatch --export=NONE the ranks would get none of it,
# PATH included. What is left of a job in which sbatch was called, and the batch scripts'
# --gpus-per-node=1 beside --gres=gpu:4 or --exclusive, would give them less than the job has, or
# fail it. So they are told: one task a node, with all that the job has there.
unset SLURM_CPU_BIND SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_GPUS SLURM_GPUS_PER_NODE \
    SLURM_GPUS_PER_TASK SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE SLURM_NTASKS_PER_GPU \
    SLURM_TRES_PER_TASK
export SLURM_EXPORT_ENV=ALL SRUN_CPUS_PER_TASK=$cpus
((${SLURM_GPUS_ON_NODE:-0} == 0)) || export SLURM_GPUS_PER_NODE=$SLURM_GPUS_ON_NODE

id=$SLURM_JOB_ID member='' seed=() # of an array: this task's folder below the others', and its flag
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    # shellcheck disable=SC2034 # the batch scripts read it
    member=/seed-$SLURM_ARRAY_TASK_ID seed=(--seed "$SLURM_ARRAY_TASK_ID")
    id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # the job's own may stand for the whole array
fi

ranks() { # ranks SCRIPT FLAG...: run it on every rank; LAUNCH_PREFIX, say of a container, is env.sh's
    # Ranks meet at the address that torchrun has for its own node; left alone it takes the full
    # name of the host, which may be localhost. bash runs on each node, where the name is known.
    # The others would wait 60 s for the head, which may be slow to begin, but 600 s for each other.
    # shellcheck disable=SC2016
    srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        ${LAUNCH_PREFIX[@]+"${LAUNCH_PREFIX[@]}"} \
        bash -c 'PET_LOCAL_ADDR=${PET_LOCAL_ADDR:-$SLURMD_NODENAME} exec "$@"' ranks torchrun \
        --nnodes="$SLURM_NNODES" --nproc-per-node="$nproc" --rdzv-backend=c10d \
        --rdzv-endpoint="$head_node:$port" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
        --rdzv-conf=read_timeout=600 "$@"
}

is_preempted() { # in the grace of a preemption; a job that was cancelled is no longer running
    local shown
    shown=$(SLURM_TIME_FORMAT=standard scontrol show job "$id") || return
    [[ $shown == *" JobState=RUNNING "*" PreemptTime="[0-9]* ]]
}

requeue() { # requeue this job, which ends this script
    trap - USR1 TERM
    for _ in {1..8}; do # slurmctld may be restarting: two minutes, which the lead must have
        if scontrol requeue "$id"; then
            sleep 60
            break
        fi
        sleep 15
    done
}

launch() { # launch TRAINER FLAG...: run it to its end, or save, requeue this job and go on there
    local again=0 asked='' flag pid rc=0 status written
    for flag in "$@"; do
        case $flag in --save[-_]dir | --save[-_]dir=*)
            echo "error: set RUN_DIR=... before sbatch instead of --save-dir" >&2
            exit 2
            ;;
        esac
    done
    export RUN_DIR=${RUN_DIR:-$root/runs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}$member
    export STOP_FILE=$RUN_DIR/STOP.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    mkdir -p "$RUN_DIR"
    rm -f "$RUN_DIR/STOP.$SLURM_JOB_ID".* # a stale one would lie, as would an old STATUS
    written=$(stat -c %y "$RUN_DIR/STATUS" 2> /dev/null || true)
    echo "job $id, restart ${SLURM_RESTART_COUNT:-0}: ${nodes[*]}, $nproc rank(s) each, in $RUN_DIR"

    # shellcheck disable=SC2317,SC2329 # the traps call it
    on_stop() {
        again=1 asked=$1
        : > "$STOP_FILE"
        echo "SIG$1 with $(squeue -h -j "$SLURM_JOB_ID" -o %L || true) left: saving"
    }
    trap 'on_stop USR1' USR1
    trap 'on_stop TERM' TERM
    ranks "$@" &
    pid=$!
    while :; do # a trapped signal ends `wait`, not srun
        again=0
        wait "$pid" && rc=0 || rc=$?
        ((again)) || break
    done
    # Rank 0 may be on another node; NFS looks again at what it knows when it is opened, folder first.
    ls "$RUN_DIR" > /dev/null || true
    status=$(cat "$RUN_DIR/STATUS" 2> /dev/null || true)
    [[ $(stat -c %y "$RUN_DIR/STATUS" 2> /dev/null || true) != "$written" ]] || status=old
    # The only way to release afterok. After SIGTERM in the last step torchrun fails all the same.
    [[ $status != finished ]] || exit 0
    # In the grace of a preemption the ranks alone get SIGTERM, and torchrun fails after it, though
    # they saved. Slurm requeues only a job that is still there when the grace ends. Any other
    # SIGTERM is scancel, or a preemption without grace, after which Slurm requeues by itself.
    if is_preempted || { ((rc == 0)) && [[ $status == stopped && $asked != TERM ]] &&
        ((${SLURM_RESTART_COUNT:-0} < ${MAX_REQUEUES:-20})); }; then
        requeue
    fi
    exit $((rc > 0 ? rc : 1)) # a bug must not loop
}
