#!/usr/bin/env bash
# The whole table: every algorithm x task x set x seed, on this machine or as a Slurm array.
#
#   ./benchmark.sh --dry-run                                   # what would be run, one command per line
#   ./benchmark.sh --quick --tasks walker-walk --datasets expert --seeds 2 --jobs 2    # small runs on two CPU cores
#   ./benchmark.sh --algos drq_bc,cql --tasks walker-walk --datasets medium,expert --seeds 3 --gpus 2 --jobs 4
#   ./benchmark.sh --algos drq_bc --tag alpha1 -- --bc-alpha 1 # words after -- go to every run
#   ./benchmark.sh --slurm --slurm-args '--partition=gpu --gres=gpu:1 --time=4:00:00' --stage-dir '$TMPDIR'
#
#   --algos LIST       files in algos/ without .py, yours too; default: all
#   --tasks LIST       default: walker-walk,cheetah-run,humanoid-walk
#   --datasets LIST    default: random,mixed,medium,medexp,expert; or folders of sets
#   --seeds N or LIST  6: seeds 0 to 5 (the default); 3,4: these two
#   --source, --tag, --quick    as in every algorithm
#   --jobs N           runs at a time; default: one per GPU, one without. Under --slurm: array tasks at a time
#   --gpus N or LIST   GPUs to use, jobs in turn; default: all there are
#   --stage-dir DIR    copy the set there first (on each node; '$TMPDIR' in single quotes is looked up there)
#   --slurm            submit instead of running: one job that makes the sets, then an array that waits for it
#   --slurm-args ARGS  for both jobs, as given to sbatch
#   --dry-run          print the commands, with where each run stands, and stop
#
# Finished runs are left alone and stopped ones continue: call it again after an interruption. Ctrl-C stops every run
# with a checkpoint. The log of a run is beside its folder, <folder>.log. At the end report.py writes report/ (of all
# runs there are). The status is 1 if a run failed.
set -euo pipefail
shopt -s extglob
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
here="$root/$(basename "${BASH_SOURCE[0]}")"
cd "$root"

fail() { echo "error: $*" >&2; exit 2; }
words() { tr ', ' '\n\n' <<<"$1" | grep -v '^$' | tr '\n' ' '; } # a list, separated by commas or spaces

report=(--out report) algos='' tasks='' datasets='' seeds=6 jobs='' gpus='' stage_dir='' slurm='' slurm_args='' dry_run='' row='' extra=()
while (($#)); do
  case $1 in
    --algos | --tasks | --datasets | --seeds | --jobs | --gpus | --stage-dir | --slurm-args | --source | --tag | --row)
      (($# >= 2)) || fail "$1 needs a value"
      case $1 in --source | --tag) extra+=("$1" "$2") ;; *) name=${1#--} && printf -v "${name//-/_}" %s "$2" ;; esac
      shift 2 ;;
    --slurm | --dry-run) name=${1#--} && printf -v "${name//-/_}" yes && shift ;;
    --quick) extra+=("$1") && shift ;;
    --) shift && extra+=("$@") && break ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$here" && exit 0 ;;
    *) fail "$1: unknown; --help lists what there is, and flags of the algorithms go behind --" ;;
  esac
done

log_end() { tr '\r' '\n' <"$1" | grep -v '^$' | tail -n 5 | sed 's/^/        /'; }

# ---- one row ----

# The fields of a line of benchmarks/rows.py.
read_row() { IFS=$'\x1f' read -r state run set make command <<<"$1"; }

# Runs a row to its end; what it prints goes to <run>.log. Its status is the run's.
run_row() {
  read_row "$1"
  mkdir -p "$(dirname "$run")"
  if [[ -n $stage_dir && -d $set ]]; then
    local data_dir
    data_dir=$(python benchmarks/rows.py --stage "$set" "$(eval echo "$stage_dir")" 2>>"$run.log" | tail -n 1) || return
    command+=" --data-dir $(printf %q "$data_dir")"
  fi
  (eval "exec $command") >>"$run.log" 2>&1 &
  child=$!
  local status=0
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child" && status=0 || status=$?; done # a signal ends wait, not the run
  child=''
  return "$status"
}

stop_child() { stopping=yes && [[ -z ${child:-} ]] || kill -TERM "$child" 2>/dev/null || true; }

if [[ -n $row ]]; then # a task of the Slurm array
  stopping='' child=''
  trap stop_child TERM
  trap 'requeue=yes; stop_child' USR1 # two minutes are left: a checkpoint, and the same job once more
  run_row "$row" && status=0 || status=$?
  case $status in
    0) echo "finished $run" ;;
    130 | 143) echo "stopped $run" && [[ -z ${requeue:-} ]] || scontrol requeue "$SLURM_JOB_ID" ;;
    *) echo "failed $run" && log_end "$run.log" ;;
  esac
  exit "$status"
fi

# ---- all rows ----

for ((i = 0; i + 1 < ${#extra[@]}; i++)); do # the report looks where the runs are
  [[ ${extra[i]} != --runs-dir ]] || report+=(--runs-dir "${extra[i + 1]}")
done
[[ $seeds == +([0-9]) ]] && seeds=$(seq 0 $((seeds - 1)))
flags=(--seeds $(words "${seeds//$'\n'/ }"))
for name in algos tasks datasets; do [[ -z ${!name} ]] || flags+=("--$name" $(words "${!name}")); done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python benchmarks/rows.py "${flags[@]}" -- ${extra[@]+"${extra[@]}"} >"$work/rows"
count=0 rows=() skipped=() before=0 sets=()
while IFS= read -r line; do
  count=$((count + 1))
  read_row "$line"
  case $state in
    finished) before=$((before + 1)) ;;
    impossible*) skipped+=("$command: ${state#impossible: }") ;;
    *)
      rows+=("$line")
      [[ -z $make ]] || sets+=("$make") ;;
  esac
done <"$work/rows"
((${#sets[@]} == 0)) || printf '%s\n' "${sets[@]}" | awk '!seen[$0]++' >"$work/sets"
touch "$work/sets"

if [[ -n $dry_run ]]; then
  cat "$work/sets"
  while IFS= read -r line; do
    read_row "$line"
    case $state in new) echo "$command" ;; impossible*) echo "# $command  # $state" ;; *) echo "$command  # $state" ;; esac
  done <"$work/rows"
  exit
fi

if [[ -n $slurm ]]; then
  ((${#rows[@]})) || { echo "nothing to submit: $before finished, ${#skipped[@]} impossible" && exit; }
  mkdir -p runs/slurm
  after=()
  if [[ -s $work/sets ]]; then
    { echo '#!/usr/bin/env bash' && echo "cd $(printf %q "$root")" && cat "$work/sets"; } >"$work/sets.sh"
    # shellcheck disable=SC2086
    job=$(sbatch --parsable --job-name=cleanpixels-sets --output="runs/slurm/sets-%j.log" $slurm_args "$work/sets.sh")
    after=(--dependency="afterany:${job%%;*}" --kill-on-invalid-dep=yes)
    echo "job $job makes $(wc -l <"$work/sets") sets"
  fi
  { # Slurm keeps a copy of this script, so the list cannot change while the array waits
    echo '#!/usr/bin/env bash' && echo "cd $(printf %q "$root")"
    echo 'row=$(sed -n "${SLURM_ARRAY_TASK_ID}p" <<"ROWS"' && printf '%s\n' "${rows[@]}" && echo 'ROWS' && echo ')'
    echo "exec bash $(printf %q "$here") --row \"\$row\"${stage_dir:+ --stage-dir $(printf %q "$stage_dir")}"
  } >"$work/array.sh"
  # shellcheck disable=SC2086
  job=$(sbatch --parsable --job-name=cleanpixels --array="1-${#rows[@]}${jobs:+%$jobs}" ${after[@]+"${after[@]}"} \
    --requeue --signal=B:USR1@120 --open-mode=append --output="runs/slurm/%A_%a.log" $slurm_args "$work/array.sh")
  echo "array $job: ${#rows[@]} runs ($before were finished, ${#skipped[@]} impossible); squeue shows them," \
    "sacct or runs/slurm/${job%%;*}_*.log how they ended; the same command submits again what is not finished"
  exit
fi

# The sets, one after another: each uses all cores.
while IFS= read -r make <&3; do
  echo "making a set: $make"
  if ! eval "$make" 2>&1 | tee "$work/made"; then
    printf '%s\x1f%s\n' "$make" "$(tr '\r' '\n' <"$work/made" | grep -v '^$' | tail -n 1)" >>"$work/unmade"
  fi
done 3<"$work/sets"
todo=()
for line in ${rows[@]+"${rows[@]}"}; do
  read_row "$line"
  reason=$(awk -F '\x1f' -v make="$make" '$1 == make { print $2 }' "$work/unmade" 2>/dev/null || true)
  if [[ -n $make && -n $reason ]]; then skipped+=("$command: $reason"); else todo+=("$line"); fi
done

# The runs: worker k takes the next row that no other has taken.
ids=()
if [[ $gpus == +([0-9]) ]]; then ids=($(seq 0 $((gpus - 1))))
elif [[ -n $gpus ]]; then ids=($(words "$gpus"))
elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then ids=($(words "$CUDA_VISIBLE_DEVICES"))
elif command -v nvidia-smi >/dev/null; then ids=($(nvidia-smi --query-gpu=index --format=csv,noheader || true)); fi
jobs=${jobs:-$((${#ids[@]} > 1 ? ${#ids[@]} : 1))}
if [[ -z ${OMP_NUM_THREADS:-} && $jobs -gt 1 ]]; then
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=$((cores / jobs > 1 ? cores / jobs : 1)) # else each run takes all cores
fi

worker() {
  local stopping='' child='' status
  trap stop_child TERM
  ((${#ids[@]} == 0)) || export CUDA_VISIBLE_DEVICES=${ids[$1 % ${#ids[@]}]}
  for ((i = 0; i < ${#todo[@]}; i++)); do
    [[ -z $stopping ]] && mkdir "$work/row$i" 2>/dev/null || continue
    run_row "${todo[i]}" && status=0 || status=$?
    case $status in 0) result=finished ;; 130 | 143) result=stopped ;; *) result=failed ;; esac
    echo $result >"$work/row$i/result"
    echo "$(date +%H:%M:%S) $result $run"
  done
}

total=${#todo[@]} pids=() interrupted=''
echo "$total runs, $jobs at a time${ids[*]:+, GPUs ${ids[*]}}; $before finished before"
trap 'interrupted=yes; kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
set -m # a process group each: Ctrl-C reaches this shell alone, which then asks each run for a checkpoint
for ((k = 0; k < jobs; k++)); do worker "$k" & pids+=($!); done
set +m
for pid in "${pids[@]}"; do while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done; done

finished=0 failed=() stopped=0
for ((i = 0; i < total; i++)); do
  read_row "${todo[i]}"
  case $(cat "$work/row$i/result" 2>/dev/null) in
    finished) finished=$((finished + 1)) ;;
    failed) failed+=("$run") ;;
    *) stopped=$((stopped + 1)) ;;
  esac
done
((finished == 0)) || python report.py "${report[@]}"
for reason in ${skipped[@]+"${skipped[@]}"}; do echo "skipped $reason"; done
for run in ${failed[@]+"${failed[@]}"}; do
  echo "failed  $run, the end of $run.log:"
  log_end "$run.log"
done
echo "$finished finished, $before finished before, ${#skipped[@]} skipped, $stopped stopped or not begun, ${#failed[@]} failed"
[[ -z $interrupted ]] || exit 130
((${#failed[@]} == 0))
