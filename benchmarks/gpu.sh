#!/usr/bin/env bash
# Run the tests and benchmarks on an NVIDIA GPU, results in one folder: benchmarks/gpu.sh [options]
#
#   --full        all shapes instead of the quick set, without a time limit
#   --out DIR     folder for the results (default visproj-bench)
#   --set NAME    a set of benchmarks/cases.py; "smoke" also runs on a CPU
#   --tests PATH  tests to run (default tests)
#
# Needs PyTorch and pytest, no network. Prints other missing packages and leaves out their tests.
set -uo pipefail
cd "$(dirname "$0")/.."

wrong() { printf 'error: %s; see --help\n' "$1" >&2 && exit 2; }

set_name=quick minutes=4.5 out=visproj-bench tests=tests
while [ $# -gt 0 ]; do
    case $1 in
    --full) set_name=full minutes= && shift ;;
    --out | --set | --tests)
        [ $# -ge 2 ] || wrong "$1 needs a value"
        case $1 in
        --out) out=$2 ;;
        --set) set_name=$2 ;;
        --tests) tests=$2 ;;
        esac
        shift 2
        ;;
    --help) sed -n '2,9p' "$0" && exit ;;
    *) wrong "unknown option $1" ;;
    esac
done
[ -e "$tests" ] || wrong "no tests at $tests"
python=${PYTHON:-python3}
arguments=(--set "$set_name" --out "$out" ${minutes:+--minutes "$minutes"})
gpu=
if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
    gpu=yes
    arguments+=(--graphs)
fi
# This checks the options before the tests run: --help is read last.
"$python" -m benchmarks.report "${arguments[@]}" --help >/dev/null || exit
mkdir -p "$out" || exit
failed=()

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

# step NAME COMMAND...: write the output to NAME.log; record a failure and go on.
step() {
    local name=$1 && shift
    printf '== %s (%s s)\n' "$name" "$SECONDS"
    if ! "$@" >"$out/$name.log" 2>&1; then
        failed+=("$name")
        tail -n 20 "$out/$name.log"
    fi
}

# Leave out test files that import packages that are not installed.
ignored=()
for package in typer rich matplotlib hypothesis sklearn onnxruntime safetensors xdist; do
    has "$package" && continue
    printf 'without %s\n' "$package"
    while read -r file; do
        ignored+=("--ignore=$file")
    done < <(grep -rlE "^(from|import) $package\b" "$tests")
done
step install "$python" -m pip install -e . --no-deps --no-build-isolation

# Kernels compile on the CPU: one process per core, up to 8, which share the GPU's memory.
cores=$(nproc)
workers=$((cores < 8 ? cores : 8))
parallel=(-o "addopts=--strict-markers --import-mode=importlib")
has xdist && parallel+=(-n "$workers")
# run_tests NAME SECONDS ARGUMENTS...: interrupt pytest after SECONDS, so that it still sums up.
run_tests() {
    local name=$1 seconds=$2 && shift 2
    step "$name" timeout -s INT -k 30 "$seconds" "$python" -m pytest "$tests" "$@" -q \
        "${parallel[@]}" --junitxml "$out/$name.xml" \
        --continue-on-collection-errors ${ignored[@]+"${ignored[@]}"}
    tail -n 5 "$out/$name.log"
}
# Tests that need a GPU come first.
[ -n "$gpu" ] && run_tests gpu-tests 240 -m gpu
run_tests tests 200

printf '== benchmarks, %s set (%s s)\n' "$set_name" "$SECONDS"
"$python" -m benchmarks.report "${arguments[@]}" 2>&1 | tee "$out/benchmarks.log" ||
    failed+=(benchmarks)

printf '== done in %s s: %s\n' "$SECONDS" "$out"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s; see the logs there\n' "${failed[*]}"
    exit 1
fi
