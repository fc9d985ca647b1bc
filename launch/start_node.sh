#!/usr/bin/env bash
# One node's launcher: srun starts this once on every node of a job, as `start_node.sh MODULE [ARGUMENTS …]`.
set -euo pipefail

nodes=$SLURM_JOB_NUM_NODES
processes=$((nodes * FMRL_PROCESSES_PER_NODE))
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Every node works out the same port, and jobs that share a node hardly ever the same; below the ports that the kernel
# gives to outgoing connections.
port=$((20000 + SLURM_JOB_ID % 10000))

options=(--num_machines "$nodes" --num_processes "$processes" --mixed_precision no --dynamo_backend no)
if ((processes > 1)); then
  # The launcher's word for several processes, with or without GPUs; --cpu would start one.
  options+=(--multi_gpu --machine_rank "$SLURM_NODEID" --main_process_ip "$first_node" --main_process_port "$port")
fi
# The launcher would end at the time limit's signal; the trainers have handlers of their own.
trap '' USR1
# Not `accelerate launch`: it imports timm where there is one, and through it a torchvision that may not fit the torch.
exec accelerate-launch "${options[@]}" -m "$@"
