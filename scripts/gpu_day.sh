#!/usr/bin/env bash
# The first minutes on a GPU: does it work, how fast is it, which variant is best.
#
#   scripts/gpu_day.sh prepare          on a machine with nvcc and a network, GPU or not: wheels and variants
#   scripts/gpu_day.sh first OUT        there: build, smoke tests, variants, benchmarks
#   scripts/gpu_day.sh second OUT       there, after it: the best variant's tests, sanitizers and benchmarks
#   scripts/gpu_day.sh plan             the steps of both, each with its limit in seconds
#   python scripts/gpu_day.py merge OUT…    afterwards, anywhere: results, README's rows, a verdict a target
#
# `prepare` leaves what has to be carried in build/gpu_day. The machine needs Python 3.12, torch with CUDA, triton, cmake,
# ninja and pytest with xdist, and no network; nvcc for its CUDA, and compute-sanitizer and ncu where they can be had.
# Every step runs, whatever became of those before it; the limits of both calls add up to less than ten minutes. OUT gets
# report.txt with an outcome a step, results.json, variants.jsonl, ncu.csv and logs.tar.gz. The exit status is 1 if a step
# failed; a tool that the machine refuses is no failure, and the report says so. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
work=build/gpu_day                # what `prepare` has made
best_file=build/gpu_day_best      # what the first call says to the second
base_python=${PYTHON:-python3}
python=build/gpu_day_venv/bin/python
nvcc_flags=(-std=c++17 -O3 -fmad=false --expt-relaxed-constexpr -diag-suppress 128 -cudart static -I csrc)
# Name and -D options: what csrc/cuda/tuning.h leaves open.
variants=(
  "as-it-is"
  "two-blocks -DFO_BLOCKS=2"
  "four-blocks -DFO_BLOCKS=4 -DFO_KB_IN_FLIGHT=32"
  "32-KB -DFO_KB_IN_FLIGHT=32"
  "96-KB -DFO_BLOCKS=2 -DFO_KB_IN_FLIGHT=96"
  "cached -DFO_STREAMING=0"
  "long-tiles -DFO_TILE=2048"
)

# Steps ------------------------------------------------------------------------------------------------------------

plan="" mode=alone
failed=()

say() { printf '%s\n' "$*" | tee -a "$out/report.txt"; }

# step NAME LIMIT COMMAND…: its output in OUT/logs/NAME.log, its status and last line in the report.
step() {
  local name=$1 limit=$2 status began=$SECONDS log=$out/logs/$1.log
  shift 2
  if [[ -n $plan ]]; then
    printf '%s\t%s\t%s\t%s\n' "$mode" "$limit" "$name" "${*//$'\n'/ }"
    return 0
  fi
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1
  status=$?
  say "$name: status $status after $((SECONDS - began)) s: $(grep -v '^$' "$log" | tail -n 1 | cut -c 1-300)"
  [[ $status == 0 ]] || echo "$name" >>"$out/logs/failed"
  return $status
}

# beside STEP…: runs it beside what follows; `together` waits for all of them.
beside() { if [[ -n $plan ]]; then mode=beside "$@"; else "$@" & fi; }
together() { wait; }

machine() {
  step "machine-$1" 10 bash -c '
    nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.sm,clocks.mem,clocks_event_reasons.active,temperature.gpu,power.draw --format=csv
    "$0" -c "import sys, torch, triton; print(sys.version, torch.__version__, torch.version.cuda, triton.__version__)"
    nvcc --version | tail -n 1; git rev-parse --short HEAD 2>/dev/null || echo no git' "$base_python"
}

environment() {
  step environment 20 bash -c '"$0" -m venv --system-site-packages build/gpu_day_venv &&
    "$1" -m pip install --quiet --no-index --no-deps --find-links "$2/wheels" "$2"/wheels/*.whl && echo installed' \
    "$base_python" "$python" "$work"
}

# build LIMIT [-D…]: the extension for this GPU.
build() {
  local limit=$1
  shift
  step build "$limit" bash -c 'archs=$("$0" -c "import torch; print(\"%d%d\" % torch.cuda.get_device_capability())")
    export FUSED_OPTIM_CUDA=ON FUSED_OPTIM_CUDA_ARCHS="$archs" NVCC_APPEND_FLAGS="$*"
    "$0" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable . && "$0" -m fused_optim' "$python" "$@"
}

run_variants() {
  step variants 70 bash -c 'for variant in "$0"/variants/*; do timeout 12 "$variant" 134217728 9 || echo "$variant: status $?" >&2; done >"$1/variants.jsonl"
    test -s "$1/variants.jsonl" && "$2" scripts/gpu_day.py best "$1/variants.jsonl" >"$3" && cat "$3"' \
    "$work" "$out" "$base_python" "$best_file"
}

# suite NAME LIMIT WORKERS ARGUMENTS…: warnings are shown and not raised, so that all is said.
suite() {
  local name=$1 limit=$2 workers=$3
  shift 3
  step "$name" "$limit" "$python" -m pytest -q -W default -p no:cacheprovider -n "$workers" --dist loadgroup --durations=5 \
    -m "gpu and not slow" "$@"
}

# bench NAME LIMIT ARGUMENTS…
bench() {
  local name=$1 limit=$2
  shift 2
  step "bench-$name" "$limit" "$python" -m bench step --device cuda --rounds 7 --json "$out/logs/$name.json" "$@"
}

benches() {
  bench dense 25 --optimizer AdamW --model dense-1g --dtype float32 --dtype bfloat16 --backend cuda --backend triton --peer torch-fused
  bench models 35 --optimizer AdamW --model llama-3-8b-slice --model vit-b-16 --model rf-detr-nano --dtype float32 \
    --dtype bfloat16 --backend cuda --backend triton --peer torch-fused
  bench norms 25 --optimizer NovoGrad --optimizer SGD --optimizer LARC --model resnet-50 --model bert-large \
    --backend cuda --backend triton --peer timm
  step clip 15 "$python" scripts/gpu_day.py clip "$out/logs/clip.json"
}

# sanitize TOOL LIMIT: torch's caching allocator would hide what lies beyond a tensor.
sanitize() {
  local tool=$1 limit=$2 options=(--kernel-regex kns=fused_optim)
  [[ $tool == initcheck ]] && options=()                       # it must see what torch's kernels write
  [[ $tool == memcheck ]] && options+=(--report-api-errors no) # torch asks what may be answered with an error
  step "$tool" "$limit" "$python" scripts/gpu_day.py sanitize "$tool" "${options[@]}" -- \
    "$python" -m pytest -q -W default -p no:cacheprovider -m gpu tests/backends/test_gpu.py -k "sanitizer and not triton"
}

profile() {
  step profile 10 "$python" -m bench profile --device cuda --model resnet-50 --backend cuda --trace "$out/logs/trace.json"
  step ncu 20 "$python" scripts/gpu_day.py ncu "$out/ncu.csv" "$work/variants/as-it-is" "$work/variants/$(head -n 1 "$best_file" 2>/dev/null | cut -d ' ' -f 1)"
}

prepare() {
  local variant name status=0
  rm -rf "$work"
  mkdir -p "$work/wheels" "$work/variants"
  "$base_python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d "$work/wheels" \
    pybind11 setuptools rich markdown-it-py mdurl pygments timm hypothesis sortedcontainers pytest-timeout pytest-xdist execnet || exit 1
  for variant in "${variants[@]}"; do
    name=${variant%% *}
    # shellcheck disable=SC2086 # the options are words
    nvcc "${nvcc_flags[@]}" -arch="${GPU_DAY_ARCH:-sm_90}" -DVARIANT="\"$variant\"" ${variant#"$name"} \
      scripts/gpu_variants.cu csrc/cuda/apply.cu csrc/cuda/layout.cpp -o "$work/variants/$name" && echo "$variant" || { echo "not built: $variant" >&2; status=1; }
  done
  du -sh "$work"
  return $status
}

first() {
  machine before
  environment
  beside build 80 # on the processors, while the GPU is idle but for the variants
  beside run_variants
  together
  suite smoke 30 8 tests/backends/test_gpu.py tests/backends/test_phases.py -k "(launches or waits or stream or graph or global_norm) and not fresh"
  benches
  profile
  machine after
}

second() {
  local best=""
  [[ -f $best_file ]] && best=$(head -n 1 "$best_file")
  # shellcheck disable=SC2086 # the options are words
  build 60 ${best#"${best%% *}"}
  beside suite cuda 140 4 tests/backends/test_phases.py tests/backends/test_gpu.py -k "not triton"
  beside suite triton 140 8 tests/backends/test_phases.py tests/backends/test_gpu.py -k triton
  for tool in memcheck racecheck synccheck initcheck; do beside sanitize "$tool" 140; done
  together
  benches
  machine after
}

finish() {
  "$base_python" scripts/gpu_day.py gather "$out"
  tar -czf "$out/logs.tar.gz" -C "$out" logs
  if [[ -f $out/logs/failed ]]; then mapfile -t failed < <(sort "$out/logs/failed"); fi
  rm -rf "$out/logs"
  if [[ ${#failed[@]} -gt 0 ]]; then
    say "failed: ${failed[*]}"
    return 1
  fi
  say "passed"
}

# Command line -----------------------------------------------------------------------------------------------------

usage="usage: gpu_day.sh prepare | plan | first OUT | second OUT"
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
case ${1:?$usage} in
  prepare) prepare ;;
  plan)
    plan=yes out=OUT
    first
    echo
    second
    ;;
  first | second)
    out=$(mkdir -p "${2:?$usage}/logs" && cd "$2" && pwd) || exit 2
    say "$(date -u +%FT%TZ) $1"
    "$1"
    finish
    ;;
  *) echo "$usage" >&2 && exit 2 ;;
esac
