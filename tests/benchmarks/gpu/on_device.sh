#!/usr/bin/env bash
# Runs on the GPU machine: bash tests/benchmarks/gpu/on_device.sh [STEP ...]
# Every step is a process with a limit of its own; what it found lies in $WORK/results and, merged, in $OUT/gpu.json.
# A second call on the same warm machine goes on with the steps that are not done. TOTAL: seconds for all (default 450).
set -u
unset PYTHONDONTWRITEBYTECODE
WORK="${WORK:-${TMPDIR:-/tmp}/gpu-check}"
export WORK OUT="${OUT:-$WORK/out}" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=3
TOTAL="${TOTAL:-450}"
SLOW="${SLOW:-1}"   # every limit times this: for rehearsals on a busy machine
here="$(cd "$(dirname "$0")" && pwd)"
carried="$here/../../../.whl"
[ -e "$carried/images.tar" ] || { echo ".whl is not filled: run tests/benchmarks/gpu/prepare.sh where pip reaches PyPI, and copy .whl here" >&2; exit 1; }
cp -u --remove-destination "$carried"/_resize.abi3.so "$here/../../../features/pixels/" # never written in place: a running process may have it loaded
REHEARSE="${REHEARSE:-}"   # 1: without a GPU, with the packages of the python3 in PATH instead of the wheels
mkdir -p "$OUT" "$WORK/results" "$WORK/done"
log="$OUT/log.txt"
site="$WORK/site"
begun=$SECONDS
if [ "$REHEARSE" != 1 ] && [ ! -e "$site/.whole" ]; then
    rm -rf "$site"
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check --target "$site" "$carried"/*.whl >>"$log" 2>&1 ||
        { echo "pip failed; the wheels are unpacked by hand" | tee -a "$log"; rm -rf "$site"; mkdir -p "$site"; for w in "$carried"/*.whl; do python3 -m zipfile -e "$w" "$site" || exit 1; done; }
    python3 -m compileall -q -j 0 "$site" >/dev/null 2>&1
    touch "$site/.whole"
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
export JAX_COMPILATION_CACHE_DIR="$WORK/jaxcache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
wanted=" $* "

step() {  # NAME SECONDS BACKEND ARGUMENTS...
    local name=$1 limit=$(($2 * SLOW)) backend=$3 left=$((TOTAL - (SECONDS - begun) - 4))
    shift 3
    if [ "$wanted" != "  " ] && [[ "$wanted" != *" $name "* ]]; then return; fi
    if [ -e "$WORK/done/$name" ]; then return; fi
    if [ "$left" -lt 8 ]; then echo "== $name: no time left" | tee -a "$log"; return; fi
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    echo "== $name (at $((SECONDS - begun)) s, at most $limit s)" | tee -a "$log"
    KERAS_BACKEND=$backend timeout -k 3 "$limit" python3 "$here/gpu_kit.py" "$@" 2>&1 | tee -a "$log"
    local rc=${PIPESTATUS[0]}
    if [ "$rc" = 0 ]; then touch "$WORK/done/$name"; else echo "== $name: exit code $rc" | tee -a "$log"; fi
    [ "$REHEARSE" = 1 ] || timeout 10 python3 "$here/gpu_kit.py" summary >/dev/null 2>&1
}

# The order is that of worth: what is cut off by the limit is missed least.
step env 20 torch env
step data 60 torch data --count 12000
step ceilings 30 torch ceilings
step reference 60 torch reference
step decode 60 torch decode --seconds 1.0
step forward-torch-mobilenetv2 50 torch forward --backbone mobilenetv2 --seconds 0.6
step endtoend-torch 80 torch endtoend --count 6000
step stub 40 torch stub
step forward-jax-mobilenetv2 80 jax forward --backbone mobilenetv2 --seconds 0.6
step parity-torch 20 torch parity
step parity-jax 20 jax parity
step variants-torch-mobilenetv2 60 torch variants --backbone mobilenetv2 --seconds 0.6
step forward-torch-vgg16 50 torch forward --backbone vgg16 --seconds 0.6
step commands-torch 120 torch commands --count 6000
step nvjpeg 20 torch nvjpeg
step endtoend-jax 50 jax endtoend --few --count 6000
step bank-torch 30 torch bank
step bank-jax 40 jax bank
step logistic-torch 60 torch logistic
step logistic-jax 60 jax logistic
step ideal 40 torch ideal --seconds 0.6
step forward-jax-vgg16 60 jax forward --backbone vgg16 --seconds 0.6
step memory-torch 30 torch memory
step processes-torch 90 torch processes --count 6000
step commands-jax 150 jax commands --count 6000
XLA_PYTHON_CLIENT_MEM_FRACTION=.08 step memory-jax 40 jax memory
step processes-jax 120 jax processes --count 3000
step variants-torch-vgg16 40 torch variants --backbone vgg16 --seconds 0.6
step compile-torch-mobilenetv2 120 torch variants --backbone mobilenetv2 --seconds 0.6 --compile
CUDA_VISIBLE_DEVICES="" step bank-torch-cpu 40 torch bank
KERAS_BACKEND=torch timeout $((15 * SLOW)) python3 "$here/gpu_kit.py" summary | cut -c1-300 | tee -a "$log"
echo "== done at $((SECONDS - begun)) s; not done: $(sed -nE 's/^([A-Z_]+=[^ ]* )?step ([a-z0-9-]+).*/\2/p' "$here/on_device.sh" | while read -r name; do [ -e "$WORK/done/$name" ] || printf '%s ' "$name"; done)" | tee -a "$log"
cp -r "$WORK/results" "$OUT/" 2>/dev/null; tar -C "$WORK" -czf "$OUT/results.tgz" results && rm -rf "$OUT/results"
exit 0
