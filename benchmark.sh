#!/usr/bin/env bash
# The whole table: every algorithm x task x set x seed, on this machine or as a Slurm array. `./benchmark.sh --help`
# lists the flags, benchmarks/run_all.py is the program.
python -c "import filelock, tyro" 2> /dev/null ||
  { echo "error: no python with the packages of requirements.txt; activate the README's environment" >&2; exit 1; }
exec python "$(dirname "$(readlink -f "$0")")/benchmarks/run_all.py" "$@"
