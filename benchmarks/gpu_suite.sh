#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most 8 minutes: gates first, then the benchmarks and their records.
#
#   MPMAE_COMMIT=$(python benchmarks/record.py)       where git is; printed once, carried to the GPU machine
#   MPMAE_COMMIT=... OUT=folder benchmarks/gpu_suite.sh
#   benchmarks/gpu_suite.sh --no-record               figures in the log alone, for instance from a dirty tree
#   benchmarks/gpu_suite.sh --dry-run                 no GPU: each part on a CPU with tiny sizes
#
# Needs python3 with torch, Triton, numpy, pytest, cuda-bindings and NVRTC, and CUDA's tools; no network, no installation.
# PYTHON: the interpreter (python3). OUT: where log, test report and records go (runs/gpu-suite). SUITE_SECONDS: the budget (460).
# Status: 0 when every gate is green, 1 when one is red (what was measured then lies in OUT/red, not in OUT/records),
# 2 when nothing could run. Goals that are missed are figures, no gates.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

dry=0 record=1
for argument in "$@"; do
  case $argument in
    --dry-run) dry=1 record=0 ;;
    --no-record) record=0 ;;
    *)
      echo "gpu_suite.sh: unknown argument $argument; known: --dry-run, --no-record" >&2
      exit 2
      ;;
  esac
done
python=${PYTHON:-python3}
out=${OUT:-runs/gpu-suite}
budget=${SUITE_SECONDS:-460}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
log=$out/suite.log
: >"$log"
SECONDS=0

# mpmae without an installation: a folder of links in which kernels/ and shard_tools/ lie where the package has them. It is
# imported as Python starts, since pytest puts the top of the tree, with a mpmae/ that has no kernels, before all else.
mkdir -p "$work/path/mpmae"
ln -s "$PWD"/mpmae/* "$work/path/mpmae/"
ln -s "$PWD/kernels" "$work/path/mpmae/kernels"
ln -s "$PWD/data/shard_tools" "$work/path/mpmae/shard_tools"
echo 'import mpmae' >"$work/path/sitecustomize.py"
export PYTHONPATH="$work/path:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton

if ((dry)); then
  device=(--device cpu) size=(--device cpu --tiny)
  export OMP_NUM_THREADS=1
else
  device=() size=()
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>>"$log" || {
    echo "gpu_suite.sh: $python sees no CUDA GPU through torch; --dry-run needs none" >&2
    exit 2
  }
  if ((record)); then
    "$python" benchmarks/record.py >>"$log" 2>"$work/refused" || {
      cat "$work/refused" >&2
      echo "gpu_suite.sh: nothing was run; --no-record measures without records" >&2
      exit 2
    }
  fi
  nvidia-smi >>"$log" 2>&1
fi

names=() states=() took=() red=()

where() { # kept: where figures go, by the gates so far
  kept=(--records "$out/records")
  if ((${#red[@]})); then
    kept=(--records "$out/red")
    export MPMAE_RED_GATES="${red[*]}"
  fi
  ((record)) || kept=(--no-record)
}

left() { echo $((budget - SECONDS)); }

# gate NAME SECONDS COMMAND...: run, keep the output in the log, note the outcome; 124 is a gate that did not end in time
gate() {
  local name=$1 limit=$2 begun=$SECONDS status
  shift 2
  timeout -k 5 "$limit" "$@" >"$work/$name.log" 2>&1
  status=$?
  note "$name" "$status" $((SECONDS - begun))
}

note() {
  local name=$1 status=$2 state=green
  case $status in
    0) ;;
    124 | 137) state="red: not done in time" ;;
    *) state="red: status $status" ;;
  esac
  [[ $state == green ]] || red+=("$name")
  names+=("$name") states+=("$state") took+=("$3")
  { echo "=== $name: $state"; cat "$work/$name.log"; } >>"$log"
  [[ $state == green ]] || { echo "--- $name, the end of its output"; tail -n 15 "$work/$name.log"; }
}

# The gates run side by side: none of them is timed.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # what else is installed there must not decide
tests=(tests/kernels -o addopts= -o cache_dir="$work/pytest" --junitxml="$out/pytest.xml" -q -rs)
"$python" -c 'import mpmae.shard_codecs, mpmae.shard_format' 2>>"$log" || tests+=(--ignore=tests/kernels/test_unfilter.py)
"$python" -c 'import xdist' 2>>"$log" && ((!dry)) && tests+=(-p xdist -n "$(($(nproc) > 6 ? $(nproc) - 4 : 2))")
if ((dry)); then tests+=(--collect-only); else tests+=(-m 'gpu and not slow'); fi
gate_seconds=$((dry ? 100 : 170))
finish() { # NAME: the outcome of a gate that ran beside the others
  read -r status seconds <"$work/$1.status"
  note "$1" "$status" "$seconds"
}
beside() { # NAME COMMAND...: a gate in the background
  local name=$1 begun=$SECONDS
  shift
  (
    timeout -k 5 "$gate_seconds" "$@" >"$work/$name.log" 2>&1
    echo "$? $((SECONDS - begun))" >"$work/$name.status"
  ) &
}
beside tests "$python" -m pytest "${tests[@]}"
beside step "$python" benchmarks/step_gates.py "${size[@]}"
if ((dry)); then
  beside kernels-once "$python" benchmarks/sanitize.py "${device[@]}"
  gates=(tests step kernels-once)
else
  gates=(tests step)
  sanitizer=(compute-sanitizer --error-exitcode 9 --print-limit 5)
  # Some virtual machines refuse the tool the device: that is no fault of the kernels, but it has to be said.
  if timeout 60 "${sanitizer[@]}" "$python" -c 'import torch; torch.zeros(1, device="cuda")' >>"$log" 2>&1; then
    # without PyTorch's own pool every tensor has bounds of its own
    beside memcheck env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer[@]}" --tool memcheck "$python" benchmarks/sanitize.py
    others=() # the library's kernels, whose hazards are not ours
    for name in nvjet cutlass gemm; do others+=(--kernel-name-exclude "kns=$name"); done
    beside racecheck "${sanitizer[@]}" "${others[@]}" --tool racecheck "$python" benchmarks/sanitize.py
    gates+=(memcheck racecheck)
  else
    echo "gpu_suite.sh: compute-sanitizer does not run here; memcheck and racecheck are not done" | tee -a "$log"
    export MPMAE_NOT_DONE="memcheck racecheck"
  fi
  timeout "$gate_seconds" "$python" benchmarks/gpu_step.py --warm --seconds $((gate_seconds - 30)) >"$work/warm.log" 2>&1 &
fi
wait
for name in "${gates[@]}"; do finish "$name"; done

if ((dry)); then
  kept=() kernel_time=(--seconds 60) multimae_time=() step_time=(--seconds 60)
else
  where
  for_kernels=$((($(left) - 30) * 45 / 100))
  kernel_time=(--seconds "$for_kernels")
fi
gate kernels $((dry ? 100 : for_kernels + 45)) "$python" benchmarks/kernels.py "${size[@]}" "${kernel_time[@]}" "${kept[@]}"
if ((!dry)); then
  where
  for_multimae=$((($(left) - 40) / 4))
  multimae_time=(--device cuda --seconds $((for_multimae / 3))) # the rest goes to compiling
fi
gate multimae-step $((dry ? 100 : for_multimae + 20)) "$python" benchmarks/multimae_step.py "${size[@]}" "${multimae_time[@]}" "${kept[@]}"
if ((!dry)); then
  where
  step_time=(--seconds $(($(left) - 40)))
fi
gate training-step $((dry ? 100 : $(left) - 5)) "$python" benchmarks/gpu_step.py "${size[@]}" "${step_time[@]}" "${kept[@]}"

for name in kernels multimae-step training-step; do
  echo
  sed -n '/^=== summary/,$p' "$work/$name.log" | cut -c 1-140
done
echo
printf '%-16s%8s  %s\n' part seconds outcome
for i in "${!names[@]}"; do
  printf '%-16s%8s  %s\n' "${names[i]}" "${took[i]}" "${states[i]}"
done
echo "all: $SECONDS s; everything is in $out"
((${#red[@]} == 0))
