#!/usr/bin/env bash
# Everything that is owed on a GPU, in under eight minutes: correctness, then timings alone.
#
#   bash benchmarks/gpu_all.sh [--small]
#
# Each part has a time limit and files of its own, so that a hang or a failure costs that part
# alone. On a GPU the limits add up to 478 seconds, those of the first three, which run side by
# side, counted once. The exit code is 1 where a part failed. --small reduces every part; without a
# GPU a part then runs on the CPU, or says in a line why it cannot.
#
# OUT     where results go (./gpu_results)        PYTHON  the interpreter (python3)
# DATA    a folder of parquet such as CIFAR-10's  COMMIT  of the source, where there is no git
set -u
cd "$(dirname "$0")/.." || exit 1
small=""
case "${1:-}" in
  "") ;;
  --small) small=yes ;;
  *) echo "usage: bash benchmarks/gpu_all.sh [--small]" >&2; exit 2 ;;
esac
python=${PYTHON:-python3} out=${OUT:-gpu_results} failed=0
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
: >"$out/summary.txt"

tell() { echo "$*" | tee -a "$out/summary.txt"; }

# limited NAME SECONDS COMMAND...: output in NAME.out and NAME.err, one line in the summary.
limited() {
  local name=$1 seconds=$2 began=$SECONDS code
  shift 2
  timeout -k 5 "$seconds" "$@" >"$out/$name.out" 2>"$out/$name.err"
  code=$?
  case $code in
    0) tell "$name: done in $((SECONDS - began)) s" ;;
    124 | 137) tell "$name: FAILED, cut off after $seconds s"; return 1 ;;
    *) tell "$name: FAILED, exit code $code: $(tail -n 1 "$out/$name.err" "$out/$name.out" |
      grep -v '^==>' | grep . | head -n 1 | cut -c1-200)"; return 1 ;;
  esac
}

# part NAME SECONDS OBSTACLE COMMAND...: runs unless there is an obstacle.
part() {
  if [ -n "$3" ]; then
    tell "$1: not run, $3"
  else
    limited "$1" "$2" "${@:4}" || failed=1
  fi
}

# missing MODULE: "" where Python finds it, else what is missing.
missing() {
  "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)" ||
    echo "there is no module $1"
}

machine=$("$python" -c 'import torch
assert torch.cuda.is_available()
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")' \
  2>/dev/null) && no_gpu="" device=cuda || { no_gpu="no GPU" machine="no GPU" device=cpu; }
tell "$machine, commit ${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}"

# 1. Correctness: the tests and the sanitizers side by side.
pytest=("$python" -m pytest -W default -p no:cacheprovider --tb=short)
sanitizer=$(command -v compute-sanitizer || true)
no_sanitizer=$no_gpu
[ -n "$sanitizer" ] || no_sanitizer="there is no compute-sanitizer"
jobs=()
OMP_NUM_THREADS=1 part tests 160 "" "${pytest[@]}" tests/gpu -n "$([ -n "$small" ] && echo 0 || echo 5)" -rfE &
jobs+=($!)
part memcheck 160 "$no_sanitizer" "$sanitizer" --tool memcheck --error-exitcode 1 --report-api-errors no \
  "${pytest[@]}" tests/gpu/test_gpu_arrays.py tests/gpu/test_gpu_loss.py -n 0 &
jobs+=($!)
part racecheck 160 "$no_sanitizer" "$sanitizer" --tool racecheck --error-exitcode 1 \
  "${pytest[@]}" tests/gpu/test_gpu_linear.py tests/gpu/test_gpu_loss.py -n 0 \
  -k "norms_of_sequences or loss" &
jobs+=($!)
for job in "${jobs[@]}"; do wait "$job"; done
grep -q FAILED "$out/summary.txt" && failed=1  # which the parts beside this shell could not set

# 2. Timings, nothing beside them.
quick=${small:+--quick}
part kernels 70 "$no_gpu" "$python" -m benchmarks.cuda_kernels --json $quick
part choice 30 "$no_gpu" "$python" -m benchmarks.gpu_choice $quick
part structured 40 "$no_gpu" "$python" -m benchmarks.cuda_structured --json $quick
step=$(missing benchmarks.gpu_step)
part step 60 "${no_gpu:-$step}" "$python" -m benchmarks.gpu_step
no_run=$(missing flwr) no_scores=$(missing sklearn)
[ -n "$no_gpu" ] && [ -z "$small" ] && no_run=$no_gpu no_scores=$no_gpu
part scores $([ -n "$no_gpu" ] && echo 120 || echo 28) "$no_scores" \
  "$python" -m benchmarks.gpu_scores --json --device $device $quick ${DATA:+--data "$DATA"}
if [ -n "$small" ]; then
  rounds=(--quick --rounds 2 --engines inline --clients 2 --images 200) limit=240
else
  rounds=(--rounds 3 --engines inline,batched --repeats 1) limit=90
fi
part simulation $limit "$no_run" "$python" -m benchmarks.gpu_simulation --json --device $device \
  "${rounds[@]}" ${DATA:+--data "$DATA"}

tell "files in $out"
exit $failed
