#!/usr/bin/env bash
# What each host of a JobSet runs: dialog_jax train, with its flags. Started by gke_jobset_tpu.yaml and others.
#
# A pod that is terminated because its node is drained or preempted must not exit with code 0, although the run has
# saved and exits with 0: Kubernetes would consider the work finished and start no other pod. So this script exits
# with 143, the job fails, and the JobSet restarts all hosts, which resume from the last checkpoint.
set -euo pipefail

"${PYTHON:-python}" -m dialog_jax train --distributed "$@" &
training=$!

terminated=
trap 'terminated=yes; kill -TERM "$training"' TERM

code=0
wait "$training" || code=$?
while kill -0 "$training" 2>/dev/null; do # the trap interrupts wait
  code=0
  wait "$training" || code=$?
done

if [[ $terminated && $code == 0 ]]; then
  code=143
fi
exit "$code"
