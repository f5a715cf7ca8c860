#!/usr/bin/env bash
# Checks the CUDA backend on this machine's GPU, and leaves a report in a folder:
#
#   scripts/gpu_check.sh OUT            every step
#   scripts/gpu_check.sh OUT build      one or more of: build, tests, sanitizer, bench, triton, checks
#
# build       the extension, for this GPU
# tests       the cuda backend's
# sanitizer   compute-sanitizer's memcheck and racecheck on a few of them
# bench       AdamW beside torch's fused one, NovoGrad and LARC beside timm's, with the share of a copy's bandwidth
# triton      the triton backend's tests
# checks      compute-sanitizer's synccheck and initcheck
#
# Needs torch with CUDA, setuptools, pybind11, cmake, ninja, pytest, pytest-timeout, hypothesis and nvcc; for the bench
# rich and timm; no network. Every step runs, whatever became of those before it, and none takes more than five minutes.
# A step's output is in OUT/STEP.log as it is written, its outcome in OUT/report.txt. PYTHON names the interpreter. The
# exit status is 1 if a step failed; where compute-sanitizer cannot run, the report says so and the step passes.
set -uo pipefail
usage="usage: gpu_check.sh OUT [build] [tests] [sanitizer] [bench] [triton] [checks]"
out=$(mkdir -p "${1:?$usage}" && cd "$1" && pwd) || exit 2
shift
[[ $# -gt 0 ]] || set -- build tests sanitizer bench triton checks
for step in "$@"; do
  case $step in
    build | tests | sanitizer | bench | triton | checks) ;;
    *) echo "no step is named $step; $usage" >&2 && exit 2 ;;
  esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
report=$out/report.txt

say() { printf '%s\n' "$*" | tee -a "$report"; }

# run SECONDS LOG NAME COMMAND…: its output in OUT/LOG.log, its status and last line in the report.
run() {
  local limit=$1 log=$out/$2.log name=$3 began=$SECONDS status
  shift 3
  printf '== %s: %s\n' "$name" "$*" >>"$log"
  timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1
  status=$?
  say "$name: status $status after $((SECONDS - began)) s: $(tail -n 1 "$log" | cut -c 1-300)"
  return $status
}

build() {
  local archs
  archs=$("$python" -c 'import torch; print(*{"%d%d" % torch.cuda.get_device_capability(d) for d in range(torch.cuda.device_count())}, sep=",")')
  run 240 build build env FUSED_OPTIM_CUDA=ON FUSED_OPTIM_CUDA_ARCHS="${FUSED_OPTIM_CUDA_ARCHS:-$archs}" \
    "$python" -m pip install --disable-pip-version-check --verbose \
    --no-build-isolation --no-deps --no-index --editable .
}

# Warnings are shown and not raised: a first run on another torch is to say everything that it can.
suite() { run "$1" "$2" "$2" "$python" -m pytest -v -W default -p no:cacheprovider --durations=10 -m gpu tests/backends/test_phases.py tests/backends/test_gpu.py -k "$3"; }

tests() { suite 240 tests 'not triton'; }
triton() { suite 300 triton 'triton'; }
sanitizer() { sanitize sanitizer memcheck racecheck; }
checks() { sanitize checks synccheck initcheck; }

# sanitize LOG TOOL…
sanitize() {
  local checker log=$1 status=0 code refused='not supported|unable to|denied|failed to initialize|insufficient'
  shift
  checker=$(command -v compute-sanitizer || find /usr/local/cuda*/bin -name compute-sanitizer 2>/dev/null | head -n 1)
  if [[ -z $checker ]]; then
    say "$log: compute-sanitizer is not installed; not run"
    return 0
  fi
  for tool in "$@"; do
    # initcheck must see what torch's kernels write, or all of it would be unwritten; its findings in torch's own
    # kernels do not count.
    local options=(--kernel-regex kns=fused_optim)
    [[ $tool == initcheck ]] && options=()
    [[ $tool == memcheck ]] && options+=(--report-api-errors no) # torch asks the driver what it may answer with an error
    : >"$out/$tool.part"
    # torch's caching allocator would hide what lies beyond a tensor.
    run 120 "$log" "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$checker" --tool "$tool" --error-exitcode 99 "${options[@]}" --log-file "$out/$tool.part" \
      "$python" -m pytest -q -W default -p no:cacheprovider -m gpu tests/backends/test_gpu.py -k 'sanitizer and not triton'
    code=$?
    cat "$out/$tool.part" >>"$out/$log.log"
    if [[ $code == 0 ]]; then
      :
    elif [[ $code == 99 && $tool == initcheck ]] && ! grep -q fused_optim "$out/$tool.part"; then
      say "$tool: findings in kernels of others only"
    elif [[ $code != 99 ]] && grep -qiE "$refused" "$out/$tool.part"; then
      say "$tool: refused on this machine; not counted: $(grep -iE "$refused" "$out/$tool.part" | head -n 1)"
    else
      say "$tool: failed; $(grep -c '^=========' "$out/$tool.part") lines of findings in $log.log"
      status=1
    fi
    rm -f "$out/$tool.part"
  done
  return $status
}

bench() {
  local status=0 step=("$python" -m bench step --device cuda --dtype float32 --rounds 7)
  run 120 bench AdamW "${step[@]}" --json "$out/cuda-adamw.json" --optimizer AdamW --model llama-3-8b-slice \
    --model vit-b-16 --model rf-detr-nano --peer torch-fused || status=1
  run 120 bench norms "${step[@]}" --json "$out/cuda-norms.json" --optimizer NovoGrad --optimizer LARC \
    --model resnet-50 --model quartznet-15x5 --model bert-large --peer timm || status=1
  grep -v '^==' "$out/bench.log" >>"$report"
  return $status
}

command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
say "$(date -u +%FT%TZ) $(git rev-parse --short HEAD 2>/dev/null || echo 'no git')"
nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader 2>&1 | tee -a "$report"
"$python" -c '
import importlib.metadata as metadata, sys
print("Python", sys.version.split()[0])
for name in ("torch", "triton", "setuptools", "pybind11", "cmake", "pytest", "hypothesis", "timm"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
' 2>&1 | tee -a "$report"
nvcc --version 2>&1 | tail -n 2 | tee -a "$report"
failed=()
for step in "$@"; do
  rm -f "$out/$step.log"
  "$step" || failed+=("$step")
done
if [[ ${#failed[@]} -gt 0 ]]; then
  say "failed: ${failed[*]}"
  exit 1
fi
say "passed: $*"
