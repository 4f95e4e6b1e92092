#!/bin/sh
# The tests of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, then the threaded ones under
# ThreadSanitizer.
# Everything is built and run in a temporary copy; PYTHON names the interpreter, CXX (gcc or clang) the compiler.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
compiler=${CXX:-c++}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy"
cd "$copy"

# check <name> <library> <flags> <pytest arguments...>
check() {
  name=$1 flags=$3
  # With the C++ library, so that the sanitizer finds the exceptions' functions when it starts.
  libraries="$("$compiler" -print-file-name="$2") $("$compiler" -print-file-name=libstdc++.so.6)"
  shift 3
  echo "== $name"
  rm -rf build
  SOFTCLIP_CPU_FLAGS="-g -O1 -fno-omit-frame-pointer $flags" "$python" setup.py -q build_ext --inplace
  # PyTorch is not instrumented: its own allocations at exit are not leaks of ours, its OpenMP threads not our races.
  LD_PRELOAD=$libraries OMP_NUM_THREADS=1 \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS="halt_on_error=1 report_signal_unsafe=0" \
    "$python" -m pytest -q -p no:cacheprovider --timeout 1200 "$@"
}

check "AddressSanitizer and UndefinedBehaviorSanitizer" libasan.so \
  "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined" \
  tests/backends/test_cpu.py tests/backends/test_cpu_kept.py tests/backends/test_cpu_process.py \
  -k "not cannot_be_had"  # it limits the address space, which the sanitizer needs
check "ThreadSanitizer" libtsan.so "-fsanitize=thread" tests/backends/test_cpu.py tests/backends/test_cpu_kept.py \
  -k "threads_change or more_threads or float32_against or a_backward_takes"
