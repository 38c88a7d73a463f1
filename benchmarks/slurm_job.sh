#!/usr/bin/env bash
# A job of benchmark.sh --slurm. Each argument is a command line. A task of an array runs the one with its number, any
# other job all of them. Two minutes before the time limit USR1 comes: what runs is stopped, the job queued once more.
[[ -z ${SLURM_ARRAY_TASK_ID-} ]] || set -- "${@:SLURM_ARRAY_TASK_ID:1}"
job=$SLURM_JOB_ID again='' status=0
[[ -z ${SLURM_ARRAY_JOB_ID-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID   # $SLURM_JOB_ID may mean all
trap 'kill -TERM "$child"' TERM
trap 'again=yes; kill -TERM "$child"' USR1
for line in "$@"; do
  echo "$line"
  eval "exec $line" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2> /dev/null; do wait "$child"; code=$?; done   # a signal ended the wait, the command goes on
  ((code == 0)) || status=$code
  if [[ -n $again ]]; then
    scontrol requeue "$job"
    break
  fi
done
exit "$status"
