#!/usr/bin/env bash
# The whole table: every algorithm x task x set x seed, on this machine or as a Slurm array. `./benchmark.sh --help`
# lists the flags, benchmarks/run_all.py is the program.
exec python "$(dirname "${BASH_SOURCE[0]}")/benchmarks/run_all.py" "$@"
