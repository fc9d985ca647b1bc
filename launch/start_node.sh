#!/usr/bin/env bash
# One node's launcher: srun starts this once on every node of a job, as `start_node.sh MODULE [ARGUMENTS …]`.
set -euo pipefail

# environment.sh sets FMRL_GPUS_PER_NODE unless the number of processes was given. In an exclusive job that requested no
# GPUs, a step has none, though the job has.
gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus != 0 && gpus != ${FMRL_GPUS_PER_NODE:-gpus})); then
  echo "error: $SLURMD_NODENAME has $gpus GPU(s) in this job, the first node $FMRL_GPUS_PER_NODE;" \
    "expected the same number on each: use --gpus-per-node, or set FMRL_PROCESSES_PER_NODE" >&2
  sleep 1 # srun ends the step when the first task fails, and loses what that has just written
  exit 2
fi

nodes=$SLURM_JOB_NUM_NODES
processes=$((nodes * FMRL_PROCESSES_PER_NODE))
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Every node computes the same port; jobs that share a node almost never do. It is below the ports that the kernel uses for
# outgoing connections.
port=$((20000 + SLURM_JOB_ID % 10000))

# The time limit's signal would end the launcher; the trainers have handlers of their own.
trap '' USR1
if ((processes == 1)) && [[ ! ${FMRL_DEEPSPEED:-} ]]; then
  # Without a launcher, which would pass on no signal. It would set these.
  export ACCELERATE_MIXED_PRECISION=no OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  exec python -m "$@"
fi

options=(--num_machines "$nodes" --num_processes "$processes" --mixed_precision no --dynamo_backend no)
meet=(--machine_rank "$SLURM_NODEID" --main_process_ip "$first_node" --main_process_port "$port")
if [[ ${FMRL_DEEPSPEED:-} ]]; then
  # "standard" is PyTorch's launcher, as without DeepSpeed; the others connect to the nodes by ssh.
  options+=(--use_deepspeed --deepspeed_config_file "$FMRL_DEEPSPEED" --deepspeed_multinode_launcher standard "${meet[@]}")
else
  # The launcher's option for several processes, with or without GPUs; --cpu would start one.
  options+=(--multi_gpu "${meet[@]}")
fi
# Not `accelerate launch`: it imports timm if installed, and with it a torchvision that may not match PyTorch.
exec accelerate-launch "${options[@]}" -m "$@"
