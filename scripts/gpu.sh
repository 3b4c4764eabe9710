#!/usr/bin/env bash
# What losswatch does on a GPU, in under ten minutes: its tests, the README's command, half
# precision, speed. Leaves one Markdown table, outputs/gpu/report.md, and a log of each part.
#   scripts/gpu.sh
# Exit status: 0; 1 if there is no GPU, or if a part failed or reached its time limit.
set -uo pipefail
cd "$(dirname "$0")/.."

machine=$(python -W ignore -c "
import os, sys, torch
if not torch.cuda.is_available():
    sys.exit('gpu.sh: PyTorch sees no GPU; it needs one, its driver and a PyTorch built for CUDA')
print(f'{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}')
") || exit 1

out=outputs/gpu
report=$out/report.md
mkdir -p "$out"
printf '%s\n\n| part | what | result |\n| --- | --- | --- |\n' "$machine" >"$report"
trap 'exit 130' INT
failed=0

# part SECONDS NAME COMMAND... runs a command with a time limit. Lines of its output that begin with
# "|" are rows of the table, and so are tests that failed.
part() {
    local limit=$1 name=$2 log=$out/$2.log begin=$SECONDS status last result
    shift 2
    echo "$name, at most $limit s" >&2
    # With --foreground Ctrl-C reaches the command, too. SIGINT lets pytest say how far it came.
    timeout --foreground --signal=INT --kill-after=10 "$limit" "$@" >"$log" 2>&1 </dev/null
    status=$?
    last=$(tail -n 1 "$log" | tr '|' '/')
    last=${last##/*} # a row says nothing more
    case $status in
    0) result=done ;;
    124 | 137) result="stopped at its limit" ;;
    *) result=failed ;;
    esac
    if [ "$status" -ne 0 ]; then failed=1; fi
    {
        grep '^|' "$log"
        tr '|' '/' <"$log" | sed -nE "s#^(FAILED|ERROR) (.*)#| $name | \1 | \2 |#p"
        echo "| $name | the whole part | $result after $((SECONDS - begin)) s${last:+: $last} |"
    } >>"$report"
}

part 180 tests python -m pytest -m gpu -q
part 45 six python scripts/benchmark.py gpu six
part 60 precision python scripts/benchmark.py gpu precision
part 80 speed python scripts/benchmark.py gpu speed
part 80 grid python scripts/benchmark.py gpu grid
part 45 watch python scripts/benchmark.py gpu watch
part $((580 - SECONDS)) compiled python scripts/benchmark.py gpu compiled # has what time is left

cat "$report"
exit "$failed"
