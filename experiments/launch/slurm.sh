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
# Start, in the repository's root, with the flags of dialog_jax train; options of sbatch replace those above:
#
#   sbatch --nodes=4 experiments/launch/slurm.sh --config=experiments/chitchat.py --output_dir=runs/chitchat \
#       --config.rows=32 --config.gradient_accumulation=1
#
# Set      nodes, GPUs a node (twice: as many tasks as GPUs), the time, and what your cluster asks for (--partition,
#          --account). rows must be a multiple of mesh.data * mesh.fsdp, which is all GPUs unless you say otherwise.
# Needs    the repository, .venv (`scripts/setup_environment.sh cuda`; PYTHON names another interpreter), model, data
#          and output_dir on a file system that all nodes share. Prepared data are kept in output_dir.
# Tasks    one a GPU: JAX, which finds the others by Slurm's variables, gives task i of a node the i-th of the GPUs that
#          it sees. So every task must see all GPUs of its node: no --gpus-per-task, no --gpu-bind.
# Stop     scancel --signal=TERM JOB saves and ends; scancel JOB leaves a few seconds for that, by the cluster's KillWait.
# Resume   by itself: two minutes before its time is up, the job saves and queues itself again, with the same flags;
#          Slurm requeues it after the failure of a node. By hand: the same sbatch command.
#
# Not run on a cluster by us. tests/experiments/launch_test.py runs this script with stand-ins for srun and scontrol.
set -euo pipefail

if [[ ! -f dialog_jax/__main__.py ]]; then
  echo "slurm.sh: $PWD has no dialog_jax/__main__.py. Call sbatch in the root of the repository." >&2
  exit 2
fi

# One task that fails ends the others, which would wait for it forever.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "${PYTHON:-.venv/bin/python}" -m dialog_jax train --distributed "$@" &
step=$!

# USR1 comes from --signal above, and to this shell alone. It is not TERM, so that a cancelled job is not requeued.
time_is_up=
trap 'time_is_up=yes; kill -TERM "$step"' USR1

code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # the trap ends a wait early
  code=0
  wait "$step" || code=$?
done

# A run that was just finished as its time came finds nothing to do, and is not queued a third time.
if [[ $time_is_up ]]; then
  echo "slurm.sh: the time is up; queueing job $SLURM_JOB_ID again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
