# shellcheck shell=bash
# What your cluster needs, said once: sourced by every script before anything else. srun hands exported
# variables on to every node.

# Your cluster's modules and settings come here, before the virtual environment: what is loaded later is found first.
# Modules use variables that are not set.
set +u
# module load python/3.12 cuda/12.8
set -u

refuse() {
  echo "error: $1" >&2
  exit 2
}

# Where sbatch was told to hand on little (--export=NONE, on some clusters the default), srun would hand on as little.
export SLURM_EXPORT_ENV=ALL

# The virtual environment, on a file system that all nodes share.
venv=${FMRL_VENV:-$SLURM_SUBMIT_DIR/.venv}
[[ -x $venv/bin/accelerate-launch ]] ||
  refuse "no virtual environment in $venv; run make setup in $SLURM_SUBMIT_DIR, or set FMRL_VENV"
export PATH=$venv/bin:$PATH

# One process for each GPU that the job has on a node, one where it has none.
if [[ ! ${FMRL_PROCESSES_PER_NODE:-} ]]; then
  gpus=${SLURM_GPUS_ON_NODE:-0}
  export FMRL_PROCESSES_PER_NODE=$((gpus ? gpus : 1)) FMRL_GPUS_PER_NODE=$gpus # of the first node; all must have as many
fi
[[ $FMRL_PROCESSES_PER_NODE =~ ^[1-9][0-9]*$ ]] ||
  refuse "FMRL_PROCESSES_PER_NODE is '$FMRL_PROCESSES_PER_NODE'; expected a number of at least 1"

# One launcher on each node, whatever sbatch was told of tasks.
# shellcheck disable=SC2034 # for srun, in the scripts
launchers=(--nodes="${SLURM_JOB_NUM_NODES:-1}" --ntasks="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1)

[[ ! ${FMRL_DEEPSPEED:-} || -f $FMRL_DEEPSPEED ]] ||
  refuse "FMRL_DEEPSPEED is $FMRL_DEEPSPEED, which is no file in $PWD; expected one such as launch/deepspeed/zero2.json"

# gloo and NCCL look for the network between the nodes themselves; where they take another, FMRL_INTERFACE names it.
if [[ -n ${FMRL_INTERFACE:-} ]]; then
  export GLOO_SOCKET_IFNAME=$FMRL_INTERFACE NCCL_SOCKET_IFNAME=$FMRL_INTERFACE
fi

# srun no longer takes this from sbatch by itself (since SLURM 22.05): all processes of a node would share one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# This job alone, also as a task of an array: one of them has the number of the whole array.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# To be called when a step is over. SLURM ends a job that it preempts when its grace time is over, and submits it again; one
# that ends by itself before that would count as failed (launchers that are preempted end with an error), or as completed.
await_preemption() {
  if scontrol --oneliner show job "$job" | grep ' PreemptTime=2' >/dev/null; then # not --quiet: it reads to the end
    echo "waiting for SLURM to submit job $job again"
    sleep 900 || true
    exit 143
  fi
}
