# shellcheck shell=bash
# What your cluster needs, said once: sourced by every script before anything else. srun hands exported
# variables on to every node. If Python or CUDA come as modules on your cluster, load them at the end of this file.

refuse() {
  echo "error: $1" >&2
  exit 2
}

# The virtual environment, on a file system that all nodes share.
venv=${FMRL_VENV:-$SLURM_SUBMIT_DIR/.venv}
[[ -x $venv/bin/accelerate-launch ]] ||
  refuse "no virtual environment in $venv; run make setup in $SLURM_SUBMIT_DIR, or set FMRL_VENV"
export PATH=$venv/bin:$PATH

# One process for each GPU that the job has on a node, one where it has none.
processes=${SLURM_GPUS_ON_NODE:-0}
[[ $processes != 0 ]] || processes=1
export FMRL_PROCESSES_PER_NODE=${FMRL_PROCESSES_PER_NODE:-$processes}
[[ $FMRL_PROCESSES_PER_NODE =~ ^[1-9][0-9]*$ ]] ||
  refuse "FMRL_PROCESSES_PER_NODE is '$FMRL_PROCESSES_PER_NODE'; expected a number of at least 1"

# gloo and NCCL look for the network between the nodes themselves; where they take another, FMRL_INTERFACE names it.
if [[ -n ${FMRL_INTERFACE:-} ]]; then
  export GLOO_SOCKET_IFNAME=$FMRL_INTERFACE NCCL_SOCKET_IFNAME=$FMRL_INTERFACE
fi

# srun no longer takes this from sbatch by itself (since SLURM 22.05): all processes of a node would share one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
