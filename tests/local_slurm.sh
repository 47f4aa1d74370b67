#!/usr/bin/env bash
# local_slurm.sh - a throw-away Slurm cluster on this one machine, for tests.
#
#   local_slurm.sh up [NODES]            start a cluster of NODES virtual nodes (1 to 16, default 1);
#                                        installs Slurm from Debian's packages if it is missing
#   local_slurm.sh down                  end its jobs, stop its daemons, remove all it wrote
#   local_slurm.sh status                exit 0: up, 1: partly up, 3: down
#   local_slurm.sh env                   print the line that points sbatch, srun, squeue ... at it
#   local_slurm.sh run [NODES] -- CMD    up, CMD, down; CMD's exit status
#   local_slurm.sh wait JOBID [SECONDS]  until the job (or the whole array) has ended; exit 0 if
#                                        it completed, 1 if not, 124 if it is still there
#   local_slurm.sh logs                  print the end of each daemon's log
#
# Use it from a shell:
#   tests/local_slurm.sh up 2 && eval "$(tests/local_slurm.sh env)"
#   job=$(sbatch --parsable slurm/some.sbatch) && tests/local_slurm.sh wait "$job" 120
#   tests/local_slurm.sh down
#
# Every virtual node (n1, n2, ...) is a slurmd of its own, with its own port and, where the kernel
# allows it, its own hostname. The nodes share this machine's files, processes and the address
# 127.0.0.1, which is all that the daemons listen on. Nodes claim more cores, memory and GPUs than
# the machine has, so that scripts written for a real cluster are accepted as they are: nothing is
# pinned or limited, and the GPUs are names only (a job that asks for some sees
# CUDA_VISIBLE_DEVICES set). There is no accounting database, so no sacct: "scontrol show job"
# knows ended jobs for an hour, and $LOCAL_SLURM_DIR/jobcomp.log has a line for each.
#
# Times differ from a real cluster's where that makes tests shorter: a requeued job starts again
# after about 10 s (ordinarily 2 min). What outlives SIGTERM gets SIGKILL after 30 s, as ordinarily:
# with less, a slow machine kills a script that would wrongly requeue. Time limits are whole
# minutes, as everywhere, and --signal can come up to a minute early; for a quick test send the
# signal yourself: scancel --batch --signal=USR1 JOBID.
# "sbatch --wait" looks at its job ever more rarely (2, 8, 32 s): "local_slurm.sh wait" is quicker.
#
# Needs root: it installs packages and, while it is up, has the node names in /etc/hosts.
# "up" on a cluster that is up as asked does nothing; otherwise it starts the cluster anew, and
# jobs of the one before are ended. The packages stay installed after "down".
#
# Settings, by environment variable:
#   LOCAL_SLURM_DIR         where everything is kept               (/tmp/local_slurm)
#   LOCAL_SLURM_PORT        first of NODES+1 ports on 127.0.0.1    (17800)
#   LOCAL_SLURM_CPUS        cores each node claims                 (64)
#   LOCAL_SLURM_MEM_MB      memory each node claims                (1000000)
#   LOCAL_SLURM_GPUS        GPUs each node claims, 0 to 16         (8)
#   LOCAL_SLURM_PREFIX      nodes are PREFIX1, PREFIX2, ...        (n)
#   LOCAL_SLURM_FEATURES    features, for --constraint             (none)
#   LOCAL_SLURM_PARTITIONS  partitions, the first is the default   (debug,gpu)
#                           a job may preempt those in partitions before its own, with 60 s of grace
#   LOCAL_SLURM_WAIT        seconds that starting it may take      (60)
# shellcheck disable=SC2015,SC2016,SC2086,SC2128,SC2178,SC2251
set -euo pipefail

DIR=${LOCAL_SLURM_DIR:-/tmp/local_slurm}
PORT=${LOCAL_SLURM_PORT:-17800}
CPUS=${LOCAL_SLURM_CPUS:-64}
MEM_MB=${LOCAL_SLURM_MEM_MB:-1000000}
GPUS=${LOCAL_SLURM_GPUS:-8}
PREFIX=${LOCAL_SLURM_PREFIX:-n}
FEATURES=${LOCAL_SLURM_FEATURES:-}
PARTITIONS=${LOCAL_SLURM_PARTITIONS:-debug,gpu}
WAIT=${LOCAL_SLURM_WAIT:-60}
MAX_NODES=16

SELF=${BASH_SOURCE[0]}
CONF=$DIR/slurm.conf
MARK=$DIR/.local_slurm                 # says that DIR is ours to delete
HOSTS_MARK="# local_slurm $DIR"
CLUSTER=localtest$(printf '%s' "$DIR" | cksum | tr -dc '0-9' | cut -c1-6)
PATH=$PATH:/usr/sbin:/sbin
unset ${!SLURM_@} ${!SBATCH_@}         # whatever cluster or job the caller is in must not be touched

say()    { printf 'local_slurm: %s\n' "$*"; }
die()    { printf 'local_slurm: %s\n' "$*" >&2; exit 1; }
usage()  { sed -n '3,12p' "$SELF" | sed 's/^# \{0,1\}//' >&2; exit 2; }
slurm()  { SLURM_CONF=$CONF timeout 20 "$@"; }        # a Slurm client, on this cluster only
now_ms() { date +%s%3N; }

# ------------------------------------------------------------------ processes, each by its pid

# The daemons (and the shepherds of their job steps) carry LOCAL_SLURM_OWNER in their environment,
# job processes the cluster's name. So a pid read from a file, which the system may have given to
# something else since, is never taken for ours.
ours() {
    [[ -r /proc/$1/environ ]] || return 1
    grep -qzxF -e "LOCAL_SLURM_OWNER=$DIR" -e "SLURM_CLUSTER_NAME=$CLUSTER" "/proc/$1/environ" 2>/dev/null
}
alive() {                              # a zombie has ended, whoever has yet to reap it
    local state
    state=$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null) || return 1
    [[ -n $state && $state != Z && $state != X ]]
}
pid_of() {                             # pid_of FILE: the pid in it, if that is a living process of ours
    local pid
    pid=$(tr -dc '0-9' 2>/dev/null < "$1") || return 1
    [[ -n $pid ]] && ours "$pid" && alive "$pid" && printf '%s\n' "$pid"
}
stop_pids() {                          # SIGTERM to all of them, SIGKILL to those there after 5 s
    local pid i left
    for pid in "$@"; do kill -TERM "$pid" 2>/dev/null || true; done
    for ((i = 0; i < 50; i++)); do
        left=
        for pid in "$@"; do if alive "$pid"; then left=1; fi; done
        [[ -n $left ]] || return 0
        sleep 0.1
    done
    for pid in "$@"; do if ours "$pid"; then kill -KILL "$pid" 2>/dev/null || true; fi; done
    sleep 0.2
}
leftovers() {                          # all living processes of ours
    local env pid
    for env in /proc/[0-9]*/environ; do
        pid=${env#/proc/}; pid=${pid%/environ}
        if [[ $pid != "$$" && $pid != "$BASHPID" ]] && ours "$pid" && alive "$pid"; then
            printf '%s\n' "$pid"
        fi
    done
}
node_names() { if [[ -r $DIR/nodes ]]; then cat "$DIR/nodes"; fi; }
pid_files() {                          # in the order to stop them
    local n
    for n in $(node_names); do printf '%s\n' "$DIR/run/slurmd.$n.pid"; done
    printf '%s\n' "$DIR/run/slurmctld.pid" "$DIR/run/munged.pid"
}

# ------------------------------------------------------------------ install

installed() {
    local c
    for c in slurmctld slurmd srun sbatch munged; do command -v "$c" > /dev/null || return 1; done
}
install_packages() {
    installed && return 0
    command -v apt-get > /dev/null || die "Slurm is not installed, and there is no apt-get here"
    say "installing slurm-wlm and munge"
    local rc=0 log policy=/usr/sbin/policy-rc.d made_policy=
    log=$(mktemp)
    if [[ ! -e $policy ]]; then        # the packages' own, system-wide services must not start
        printf '#!/bin/sh\nexit 101\n' > "$policy"; chmod 755 "$policy"; made_policy=1
    fi
    { apt-get update -q &&
      DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends slurm-wlm munge
    } > "$log" 2>&1 < /dev/null 9>&- || rc=$?
    [[ -z $made_policy ]] || rm -f "$policy"
    if ((rc)); then tail -n 20 "$log" >&2; rm -f "$log"; die "the packages could not be installed"; fi
    rm -f "$log"
    hash -r
    installed || die "the packages are installed, but not all of Slurm's programs are there"
}

# ------------------------------------------------------------------ configuration

on_loopback() { [[ $(getent ahostsv4 "$1" 2>/dev/null | awk 'NR == 1 { print $1 }') == 127.0.0.1 ]]; }
hosts_remove() {
    grep -qF "$HOSTS_MARK" /etc/hosts 2>/dev/null || return 0
    local rest
    rest=$(grep -vF "$HOSTS_MARK" /etc/hosts; printf x)
    printf '%s' "${rest%x}" > /etc/hosts      # in place: where it is a mount, it cannot be renamed over
}
# Slurm's programs listen on, and are called back at, the address of their hostname: the nodes'
# names and this machine's own must be 127.0.0.1. Our lines come first, as the first one counts.
hosts_add() {
    hosts_remove
    local old host self
    self=$(uname -n)
    old=$(cat /etc/hosts 2>/dev/null; printf x)
    {
        printf '127.0.0.1 %s %s\n' "$*" "$HOSTS_MARK"
        on_loopback "$self" || printf '127.0.0.1 %s %s\n' "$self" "$HOSTS_MARK"
        printf '%s' "${old%x}"
    } > "$DIR/hosts"
    cat "$DIR/hosts" > /etc/hosts || die "/etc/hosts cannot be written"
    for host in "$@" "$self"; do
        on_loopback "$host" || die "'$host' is not 127.0.0.1, in spite of its line in /etc/hosts"
    done
}

settings() { printf '%s\n' "$1 $PORT $CPUS $MEM_MB $GPUS $PREFIX $PARTITIONS $FEATURES"; }

write_config() {                       # write_config NODE...
    local n i=0 p tier=0 gres='' first=YES host
    host=$(uname -n)
    if [[ -e $DIR && ! -e $MARK && -n $(ls -A "$DIR") ]]; then
        die "$DIR is there and is not a cluster of this script: not touched"
    fi
    mkdir -p "$DIR"
    : > "$MARK"
    mkdir -p "$DIR"/{run,log,state,spool,gpu}
    for n in "$@"; do mkdir -p "$DIR/spool/$n"; done
    chmod 755 "$DIR" "$DIR"/{run,log,state,spool,gpu}
    printf '%s\n' "$@" > "$DIR/nodes"
    settings $# > "$DIR/settings"
    (umask 077; head -c 1024 /dev/urandom > "$DIR/munge.key")
    : > "$DIR/gres.conf"
    : > "$DIR/jobcomp.log"
    {
        cat <<END
ClusterName=$CLUSTER
SlurmctldHost=${host%%.*}(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
# cred_expire is also how long a requeued job waits before it starts again
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
# no cgroups, no pinning, no accounting database
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/jobcomp.log
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# the nodes have the sizes written below, whatever the machine has
SlurmdParameters=config_overrides
ReturnToService=2
# quick turns: schedule at once, end what ignores SIGTERM soon, keep ended jobs in view
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,bf_continue
KillWait=30
MinJobAge=3600
InactiveLimit=0
CompleteWait=0
UnkillableStepTimeout=30
SlurmctldTimeout=120
SlurmdTimeout=120
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
END
        if ((GPUS)); then echo "GresTypes=gpu"; gres=" Gres=gpu:$GPUS"; fi
        for n in "$@"; do
            i=$((i + 1))
            echo "NodeName=$n NodeHostname=$n NodeAddr=127.0.0.1 Port=$((PORT + i)) CPUs=$CPUS" \
                 "Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1" \
                 "RealMemory=$MEM_MB$gres${FEATURES:+ Feature=$FEATURES} State=UNKNOWN"
        done
        for p in ${PARTITIONS//,/ }; do
            tier=$((tier + 1))
            echo "PartitionName=$p Nodes=ALL Default=$first MaxTime=INFINITE DefaultTime=60 State=UP" \
                 "PriorityTier=$tier GraceTime=60"
            first=NO
        done
    } > "$CONF"
    if ((GPUS)); then                  # device files for the GPUs, each of them another /dev/null
        echo "Name=gpu File=$DIR/gpu/[0-$((GPUS - 1))]" > "$DIR/gres.conf"
        for ((i = 0; i < GPUS; i++)); do
            mknod "$DIR/gpu/$i" c 1 3 2>/dev/null || echo "Name=gpu Count=$GPUS" > "$DIR/gres.conf"
        done
    fi
}

# ------------------------------------------------------------------ up, down, status ...

start_daemon() {                       # start_daemon NAME CMD...: CMD puts itself in the background
    local name=$1; shift
    env -i PATH="$PATH" LANG=C.UTF-8 HOME=/root LOCAL_SLURM_OWNER="$DIR" SLURM_CONF="$CONF" \
        "$@" >> "$DIR/log/$name.out" 2>&1 < /dev/null 9>&- || die "$name did not start"
}

healthy() {                            # healthy NODES: every daemon lives, every node can work
    local f up
    for f in $(pid_files); do pid_of "$f" > /dev/null || return 1; done
    up=$(slurm sinfo -h -N -p "${PARTITIONS%%,*}" -o '%t' 2>/dev/null |
         grep -cE '^(idle|mix|alloc|comp|plnd)$') || return 1
    [[ $up -eq $1 ]]
}

failed_up() {
    local rc=$?
    trap - EXIT INT TERM
    show_logs >&2
    down quiet
    ((rc)) || rc=1
    exit "$rc"
}

up() {
    local want=${1:-} have t0 t1 i names=() uts=()
    have=$(node_names | wc -l)
    want=${want:-$((have ? have : 1))}
    [[ $want =~ ^[1-9][0-9]?$ ]] && ((want <= MAX_NODES)) || die "NODES must be 1 to $MAX_NODES, not '$want'"
    [[ $GPUS =~ ^[0-9]+$ ]] && ((GPUS <= 16)) || die "LOCAL_SLURM_GPUS must be 0 to 16, not '$GPUS'"
    t0=$(now_ms)
    if [[ -r $DIR/settings && $(< "$DIR/settings") == "$(settings "$want")" ]] && healthy "$want"; then
        say "already up, $want node(s)"
        return 0
    fi
    install_packages
    down quiet
    for ((i = 1; i <= want; i++)); do names+=("$PREFIX$i"); done
    for ((i = 0; i <= want; i++)); do
        if (exec 3<> "/dev/tcp/127.0.0.1/$((PORT + i))") 2>/dev/null; then
            die "port $((PORT + i)) is in use: set LOCAL_SLURM_PORT"
        fi
    done
    write_config "${names[@]}"
    trap failed_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    hosts_add "${names[@]}"
    start_daemon munged munged --key-file="$DIR/munge.key" --socket="$DIR/run/munge.socket" \
        --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" \
        --seed-file="$DIR/run/munged.seed" --num-threads=2
    start_daemon slurmctld slurmctld -c -f "$CONF"
    if unshare --uts true 2>/dev/null; then uts=(unshare --uts sh -c 'hostname "$0" && exec "$@"'); fi
    for i in "${names[@]}"; do
        if ((${#uts[@]})); then
            start_daemon "slurmd.$i" "${uts[@]}" "$i" slurmd -f "$CONF" -N "$i"
        else
            start_daemon "slurmd.$i" slurmd -f "$CONF" -N "$i"
        fi
    done
    t1=$(now_ms)
    until healthy "$want"; do
        (($(now_ms) - t1 < WAIT * 1000)) || die "not ready after $WAIT s"
        sleep 0.2
    done
    trap - EXIT INT TERM
    say "up, $want node(s), in $(($(now_ms) - t0)) ms; now: eval \"\$($SELF env)\""
}

down() {
    local f pid i pids=()
    if [[ -e $MARK ]]; then
        if [[ -r $CONF ]] && pid_of "$DIR/run/slurmctld.pid" > /dev/null; then
            slurm scancel --user=root 2>/dev/null || true    # the ordinary end first
            for ((i = 0; i < 100; i++)); do
                [[ -n $(slurm squeue -h 2>/dev/null) ]] || break
                sleep 0.1
            done
        fi
        for f in $(pid_files); do
            if pid=$(pid_of "$f"); then pids+=("$pid"); fi
        done
        if ((${#pids[@]})); then stop_pids "${pids[@]}"; fi
    fi
    for ((i = 0; i < 3; i++)); do      # then what outlived it
        mapfile -t pids < <(leftovers)
        ((${#pids[@]})) || break
        stop_pids "${pids[@]}"
    done
    pids=$(leftovers | tr '\n' ' ')
    [[ -z $pids ]] || die "processes of the cluster are still there: $pids"
    hosts_remove
    if [[ -e $MARK ]]; then rm -rf -- "$DIR"; fi
    [[ ${1:-} == quiet ]] || say "down"
}

status() {
    local f name pid want
    if [[ ! -e $MARK && -z $(leftovers) ]]; then say "down"; return 3; fi
    want=$(node_names | wc -l)
    for f in $(pid_files); do
        name=${f##*/}
        if pid=$(pid_of "$f"); then say "${name%.pid} runs, pid $pid"; else say "${name%.pid} does not run"; fi
    done
    slurm sinfo -N -o '%10N %8t %5c %8m %10G %P' 2>&1 || true
    slurm squeue 2>&1 || true
    if healthy "$want"; then say "up, $want node(s)"; return 0; fi
    say "partly up"
    return 1
}

show_logs() {
    local f
    for f in "$DIR"/log/*; do
        if [[ -s $f ]]; then printf '== %s\n' "${f##*/}"; tail -n 15 "$f"; fi
    done
}

need_up() { [[ -r $CONF ]] || die "the cluster is down"; }

wait_job() {                           # wait_job JOBID [SECONDS]
    [[ ${1:-} =~ ^[0-9]+$ ]] || usage
    need_up
    local end=$(($(now_ms) + ${2:-600} * 1000)) states
    while :; do
        states=$(slurm scontrol -o show job "$1" 2>&1) || die "$states"
        states=$(sed -nE 's/^JobId=([0-9]+).* JobState=([A-Z_]+).* ExitCode=([0-9]+:[0-9]+).*/\1 \2 \3/p' <<< "$states")
        if ! grep -qvE ' (COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|PREEMPTED|OUT_OF_MEMORY|DEADLINE|BOOT_FAIL) ' <<< "$states"; then
            printf '%s\n' "$states"
            ! grep -qv ' COMPLETED ' <<< "$states"
            return
        fi
        if (($(now_ms) > end)); then printf '%s\n' "$states"; return 124; fi
        sleep 0.3
    done
}

run_in() {                             # run_in [NODES] -- CMD...
    local nodes='' rc=0 cmd
    if [[ ${1:-} != -- ]]; then nodes=${1:-}; shift || usage; fi
    [[ ${1:-} == -- && $# -ge 2 ]] || usage
    shift
    up "$nodes" >&2
    trap 'rc=$?; trap - EXIT; down quiet; exit $rc' EXIT
    SLURM_CONF=$CONF "$@" <&0 9>&- &
    cmd=$!
    trap 'kill -TERM "$cmd" 2>/dev/null; exit 130' INT       # CMD in the background, so that a
    trap 'kill -TERM "$cmd" 2>/dev/null; exit 143' TERM      # signal is acted upon at once
    wait "$cmd" || rc=$?
    exit "$rc"
}

main() {
    local cmd=${1:-}
    if (($#)); then shift; fi
    case $cmd in
        up|down|run)
            [[ $(id -u) -eq 0 ]] || die "needs root"
            exec 9< "$SELF"            # one at a time; the lock ends with this process
            flock -w 600 9 || die "another local_slurm.sh is at work"
            ;;
    esac
    case $cmd in
        up) up "$@" ;;
        down) down ;;
        status) status ;;
        env) need_up; printf 'export SLURM_CONF=%q\n' "$CONF" ;;
        run) run_in "$@" ;;
        wait) wait_job "$@" ;;
        logs) show_logs ;;
        *) usage ;;
    esac
}
main "$@"
