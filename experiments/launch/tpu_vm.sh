#!/usr/bin/env bash
# Trains on a Cloud TPU VM with one or many hosts.
#
#   export TPU=my-tpu ZONE=us-west4-a
#   experiments/launch/tpu_vm.sh setup                  # the committed repository and its environment, on all hosts
#   experiments/launch/tpu_vm.sh run .venv/bin/python scripts/prepare_demo.py        # any command, on all hosts
#   experiments/launch/tpu_vm.sh train --config=experiments/chitchat.py --output_dir=/mnt/shared/runs/chitchat
#   experiments/launch/tpu_vm.sh log                    # output of host 0; Ctrl-C does not stop the training
#   experiments/launch/tpu_vm.sh stop                   # finishes the step and saves
#
# Costs    this script creates and deletes nothing. A TPU VM is billed from its creation until it is deleted:
#            gcloud compute tpus queued-resources create $TPU --node-id=$TPU --zone=$ZONE \
#              --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite     # --spot is cheaper
#            gcloud compute tpus queued-resources delete $TPU --zone=$ZONE --force
# Set      TPU and ZONE; NFS=ADDRESS:/SHARE (such as Filestore's), which `setup` mounts as /mnt/shared. Several hosts
#          need it, because output_dir must be one directory for all of them; one host (up to v5litepod-8) does not.
#          rows must be a multiple of the number of chips, unless mesh.tensor is set.
# Hosts    find each other through the VM's metadata. For several hosts, gcloud needs your key in the SSH agent:
#            ssh-add ~/.ssh/google_compute_engine
# Resume   the same `train` command resumes from the last checkpoint. After a spot TPU was preempted: delete it, create
#          it again, run `setup` and the same `train`; this requires output_dir on NFS.
#
# Not tested on a TPU. tests/experiments/launch_test.py runs this script with a stand-in for gcloud.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

on_hosts() { # WORKER COMMAND
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

# Python 3.12 from uv, since the VM's Python may be older than 3.11.
readonly INSTALL='set -e
mkdir -p dialog_jax
tar -xzf dialog_jax.tar.gz -C dialog_jax
cd dialog_jax
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -x .venv/bin/python ] || ~/.local/bin/uv venv --seed --python 3.12 .venv
.venv/bin/python -m pip install --quiet --editable ".[tpu]"'

setup() {
  local directory
  directory=$(mktemp -d)
  git archive --format=tar.gz --output="$directory/dialog_jax.tar.gz" HEAD
  gcloud compute tpus tpu-vm scp "$directory/dialog_jax.tar.gz" "$TPU:dialog_jax.tar.gz" --zone="$ZONE" --worker=all
  rm -r "$directory"
  on_hosts all "$INSTALL"
  if [[ ${NFS:-} ]]; then
    on_hosts all "set -e
      sudo apt-get install -qq -y nfs-common
      sudo mkdir -p /mnt/shared
      mountpoint -q /mnt/shared || sudo mount -t nfs $(printf %q "$NFS") /mnt/shared
      sudo chmod a+rwx /mnt/shared"
  fi
}

train() {
  local flags
  flags=$(printf ' %q' "$@")
  on_hosts all "cd dialog_jax || exit
    if [ -f train.pid ] && kill -0 \"\$(cat train.pid)\" 2>/dev/null; then
      echo 'a training is running here; stop it first' >&2
      exit 1
    fi
    nohup .venv/bin/python -m dialog_jax train --distributed$flags >>train.log 2>&1 </dev/null &
    echo \$! >train.pid"
}

stop() {
  # shellcheck disable=SC2016 # expanded on the hosts
  on_hosts all 'cd dialog_jax || exit
    pid=$(cat train.pid) || exit
    kill -TERM "$pid" 2>/dev/null || echo "no training is running here"
    while kill -0 "$pid" 2>/dev/null; do sleep 1; done
    tail -n 3 train.log'
}

(($#)) || usage
: "${TPU:?set it to the name of the TPU VM}" "${ZONE:?set it to the zone of the TPU VM}"
command=$1
shift
case $command in
  setup | train | stop) "$command" "$@" ;;
  run) on_hosts all "cd dialog_jax && $(printf '%q ' "$@")" ;;
  log) on_hosts 0 "tail -n 100 -f dialog_jax/train.log" ;;
  *) usage ;;
esac
