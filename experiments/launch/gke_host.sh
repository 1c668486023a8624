#!/usr/bin/env bash
# What each host of a JobSet runs: dialog_jax train, with its flags. Started by gke_jobset_tpu.yaml and others.
#
# A pod that is told to end, because its node is drained or taken back, must not end with code 0, though the run has
# saved and did: Kubernetes would take the work for done and start no other pod. So it ends with 143 here, the job
# fails, and the JobSet starts all hosts anew, which go on from the last checkpoint.
set -euo pipefail

"${PYTHON:-python}" -m dialog_jax train --distributed "$@" &
training=$!

told_to_end=
trap 'told_to_end=yes; kill -TERM "$training"' TERM

code=0
wait "$training" || code=$?
while kill -0 "$training" 2>/dev/null; do # the trap ends a wait early
  code=0
  wait "$training" || code=$?
done

if [[ $told_to_end && $code == 0 ]]; then
  code=143
fi
exit "$code"
