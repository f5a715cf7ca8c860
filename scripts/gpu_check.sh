#!/usr/bin/env bash
# Checks the CUDA backend on this machine's GPU, and leaves a report in a folder:
#
#   scripts/gpu_check.sh OUT            every step
#   scripts/gpu_check.sh OUT build      one of: build, suite, slow, sanitizer, bench
#
# Needs torch with CUDA, pybind11, cmake, ninja, pytest, hypothesis and nvcc; no network. Each step ends within ten
# minutes. PYTHON names the interpreter. The exit status is that of the worst step; where compute-sanitizer cannot
# run, the report says so and the step passes.
set -uo pipefail
out=$(mkdir -p "${1:?usage: gpu_check.sh OUT [STEP]}" && cd "$1" && pwd)
steps=${2:-build suite slow sanitizer bench}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
report=$out/report.txt
worst=0

say() { printf '%s\n' "$*" | tee -a "$report"; }

# run NAME COMMAND…: its output in OUT/NAME.log, its last line and status in the report.
run() {
  local name=$1 began=$SECONDS status
  shift
  timeout 590 "$@" >"$out/$name.log" 2>&1
  status=$?
  say "$name: status $status after $((SECONDS - began)) s: $(tail -n 1 "$out/$name.log")"
  return $status
}

build() {
  local archs
  archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | tr -d . | sort -u | paste -sd ,)
  run build env FUSED_OPTIM_CUDA=ON FUSED_OPTIM_CUDA_ARCHS="$archs" \
    "$python" -m pip install --no-build-isolation --no-deps --no-index --editable .
}

suite() { run suite "$python" -m pytest -q -m "gpu and not slow" tests/test_cuda_gpu.py; }

slow() { run slow "$python" -m pytest -q -m "gpu and slow" tests/test_cuda_gpu.py; }

sanitizer() {
  local checker status=0 refused
  checker=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
  if [[ -z $checker ]]; then
    say "sanitizer: compute-sanitizer is not installed; not run"
    return 0
  fi
  for tool in memcheck racecheck synccheck initcheck; do
    # torch's caching allocator would hide what lies beyond a tensor.
    run "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$checker" --tool "$tool" --error-exitcode 99 \
      --kernel-regex kns=fused_optim "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_cuda_gpu.py \
      -k "(rule_and_dtype and default and AdamW) or same_bits or bucket_views"
    case $? in
      0) ;;
      99) status=1 ;;
      *)
        refused='not supported|Unable to|unable to|denied|Failed to|failed to initialize'
        if grep -qE "$refused" "$out/$tool.log" && ! grep -qE "[1-9][0-9]* failed" "$out/$tool.log"; then
          say "$tool: refused on this machine; not counted"
        else
          status=1
        fi
        ;;
    esac
  done
  return $status
}

bench() {
  run bench "$python" scripts/gpu_bench.py --json "$out/bench.json"
  local status=$?
  cat "$out/bench.log" >>"$report"
  return $status
}

say "$(date -u +%FT%TZ) $(git rev-parse --short HEAD 2>/dev/null || echo 'no git')"
nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader 2>&1 | tee -a "$report"
"$python" -c 'import torch; print("torch", torch.__version__)' 2>&1 | tee -a "$report"
for step in $steps; do
  case $step in
    build | suite | slow | sanitizer | bench) "$step" || worst=1 ;;
    *) say "no step is named $step" && worst=2 ;;
  esac
done
say "$([[ $worst == 0 ]] && echo 'all steps passed' || echo 'some step failed')"
exit $worst
