#!/usr/bin/env bash
#SBATCH --job-name=dialog_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#
# Trains on GPUs of one or many nodes of a Slurm cluster.
#
# Start in the root of the repository with the flags of dialog_jax train; options of sbatch override those above:
#
#   sbatch --nodes=4 experiments/launch/slurm.sh --config=experiments/chitchat.py --output_dir=runs/chitchat \
#       --config.rows=32 --config.gradient_accumulation=1
#
# Set      nodes, GPUs per node (twice: one task per GPU), time, and what your cluster requires (--partition,
#          --account). rows must be a multiple of mesh.data * mesh.fsdp, by default the number of all GPUs.
# Needs    the repository, .venv (`scripts/setup_environment.sh cuda`; PYTHON names another interpreter), model, data
#          and output_dir on a file system that all nodes share. Prepared data are kept in output_dir.
# Tasks    one per GPU. JAX finds the other tasks through Slurm's variables and assigns the i-th visible GPU to task i
#          of a node, so every task must see all GPUs of its node: no --gpus-per-task, no --gpu-bind.
# Stop     scancel --signal=TERM JOB saves and exits; scancel JOB leaves a few seconds for that, the cluster's KillWait.
# Resume   automatic: two minutes before its time limit, the job saves and requeues itself with the same flags; Slurm
#          requeues it after the failure of a node. To resume manually, use the same sbatch command.
#
# Not tested on a cluster. tests/experiments/launch_test.py runs this script with stand-ins for srun and scontrol.
set -euo pipefail

if [[ ! -f dialog_jax/__main__.py ]]; then
  echo "slurm.sh: $PWD has no dialog_jax/__main__.py. Call sbatch in the root of the repository." >&2
  exit 2
fi

# A task that fails ends the others, which would otherwise wait for it forever.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "${PYTHON:-.venv/bin/python}" -m dialog_jax train --distributed "$@" &
step=$!

# --signal above sends USR1 to this shell only. It is not TERM, so that a cancelled job is not requeued.
time_limit_reached=
trap 'time_limit_reached=yes; kill -TERM "$step"' USR1

code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # the trap interrupts wait
  code=0
  wait "$step" || code=$?
done

# A run that finishes at its time limit is requeued once, finds nothing to do, and is not requeued again.
if [[ $time_limit_reached ]]; then
  echo "slurm.sh: time limit reached; requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
