# shellcheck shell=bash
# What your cluster needs: every script sources this file before anything else. srun passes exported variables on to
# every node.

# Put your cluster's modules and settings here, before the virtual environment: what is loaded later is found first.
# Modules use unset variables.
set +u
# module load python/3.12 cuda/12.8
set -u

refuse() {
  echo "error: $1" >&2
  exit 2
}

[[ $SLURM_SUBMIT_DIR -ef $PWD ]] ||
  echo "submitted in $SLURM_SUBMIT_DIR; this job runs in $PWD, and relative paths start there" >&2

# SLURM and lists of processes show every argument.
for argument in "$@"; do
  [[ ! $argument =~ ://.*[@?#] ]] ||
    refuse "an argument holds a URL with credentials, which SLURM has recorded: replace them, leave them out of the URL, and \
give them by the environment or by a file (docs/cluster.md, Credentials)"
done

# If sbatch passes on few variables (--export=NONE, the default of some clusters), srun would do the same.
export SLURM_EXPORT_ENV=ALL

# The virtual environment, on a file system that all nodes share.
venv=${FMRL_VENV:-$PWD/.venv}
[[ -x $venv/bin/accelerate-launch ]] ||
  refuse "no virtual environment in $venv; run make setup in $PWD, or set FMRL_VENV"
export PATH=$venv/bin:$PATH

# One process for each GPU that the job has on a node; one process if it has none.
if [[ ! ${FMRL_PROCESSES_PER_NODE:-} ]]; then
  gpus=${SLURM_GPUS_ON_NODE:-0}
  # FMRL_GPUS_PER_NODE: those of the first node; start_node.sh checks the others.
  export FMRL_PROCESSES_PER_NODE=$((gpus ? gpus : 1)) FMRL_GPUS_PER_NODE=$gpus
fi
[[ $FMRL_PROCESSES_PER_NODE =~ ^[1-9][0-9]*$ ]] ||
  refuse "FMRL_PROCESSES_PER_NODE is '$FMRL_PROCESSES_PER_NODE'; expected a number of at least 1"

# One launcher on each node, whatever number of tasks sbatch was given.
# shellcheck disable=SC2034 # srun uses it, in the scripts
launchers=(--nodes="${SLURM_JOB_NUM_NODES:-1}" --ntasks="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1)

[[ ! ${FMRL_DEEPSPEED:-} || -f $FMRL_DEEPSPEED ]] ||
  refuse "FMRL_DEEPSPEED is $FMRL_DEEPSPEED, which is not a file in $PWD; expected one such as launch/deepspeed/zero2.json"

# gloo and NCCL choose the network between the nodes themselves; if they choose the wrong one, set FMRL_INTERFACE.
if [[ -n ${FMRL_INTERFACE:-} ]]; then
  export GLOO_SOCKET_IFNAME=$FMRL_INTERFACE NCCL_SOCKET_IFNAME=$FMRL_INTERFACE
fi

# Since SLURM 22.05, srun does not take this from sbatch: without it, all processes of a node would share one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# This job alone. In an array, one task has the same SLURM_JOB_ID as the whole array.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# Called when a step has ended. SLURM ends a preempted job after its grace time and requeues it. If the job ended by itself
# before that, it would count as failed (preempted launchers end with an error) or as completed.
await_preemption() {
  if scontrol --oneliner show job "$job" | grep ' PreemptTime=2' >/dev/null; then # not --quiet: it reads to the end
    echo "waiting for SLURM to requeue job $job"
    sleep 900 || true
    exit 143
  fi
}

# submit_join SCRIPT [ARGUMENTS …]: the job that joins the parts of this array, with the options of sbatch in join_options.
# A requeued task finds the job that it submitted when it first started: it is in the queue, waiting for this array.
submit_join() {
  local name=$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID-join joining log options
  joining=$(squeue --noheader --name="$name" --format=%A)
  if [[ ! $joining ]]; then
    log=$(scontrol show job "$job" | sed -n 's/^ *StdOut=//p')
    options=(--parsable --dependency="afterok:$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes --job-name="$name")
    # shellcheck disable=SC2154 # the script sets it
    options+=(--output="$(dirname "$log")/slurm-%x.out" --nodes=1 "${join_options[@]}")
    options+=(--partition="$SLURM_JOB_PARTITION" ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"})
    options+=(${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} ${SLURM_JOB_RESERVATION:+--reservation="$SLURM_JOB_RESERVATION"})
    # The join takes no options from the array's variables: only FMRL_… and the path to SLURM's configuration are passed on.
    for variable in "${!SLURM_@}" "${!SBATCH_@}"; do
      [[ $variable == SLURM_CONF* ]] || unset "$variable"
    done
    joining=$(sbatch "${options[@]}" "$@") ||
      refuse "sbatch rejected the job that joins (above); set FMRL_CHAIN=1 and submit it yourself after the array"
  fi
  echo "job ${joining%%;*} joins the parts when all tasks have succeeded"
}
