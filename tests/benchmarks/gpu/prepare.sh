#!/usr/bin/env bash
# Fill .whl (ignored by git) with what the GPU machine lacks: wheels, photographs of both classes, MobileNetV2's weights, and
# the compiled resizing, which git ignores: without it the processors there would resize at half the speed.
#   bash tests/benchmarks/gpu/prepare.sh [IMAGES_PER_CLASS]      needs pip, and BOTTLENECK_ASSETS
# REHEARSE=1: without the wheels, for a rehearsal with packages that are installed.
set -euo pipefail
each="${1:-250}"
assets="${BOTTLENECK_ASSETS:?name the folder that holds images and weights}"
assets="$(cd "$assets" && pwd)"
cd "$(dirname "$0")/../../.."
rm -rf .whl/*.whl .whl/images.tar .whl/*.h5 .whl/*.so
mkdir -p .whl
cp features/pixels/_resize.abi3.so .whl/ || { echo "the compiled resizing is missing: make setup" >&2; exit 1; }
# Pure ones and those for CPython 3.12 on x86-64. Versions that go together (pydantic pins pydantic-core exactly).
[ "${REHEARSE:-}" = 1 ] || python3 -m pip download -q --disable-pip-version-check --no-deps --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 --platform manylinux2010_x86_64 \
    --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 -d .whl \
    --only-binary=:all: keras==3.15.1 namex optree pydantic==2.14.4 pydantic-core==2.50.5 annotated-types typing-inspection typing-extensions \
    skops==0.16.0 prettytable wcwidth filelock typer annotated-doc simplejpeg pillow==13.0.0 \
    dask==2026.8.0 distributed==2026.8.0 locket partd tblib zict tornado toolz cloudpickle click fsspec sortedcontainers msgpack psutil 2>&1 | { grep -v "is ignored: it is neither" || true; }
cp "$assets/weights/mobilenet_v2_1.0_224_no_top.weights.h5" .whl/mobilenetv2.weights.h5
# Every k-th photograph of both classes.
list="$(mktemp)"
( cd "$assets/images/cats_and_dogs_filtered/train" && for c in cats dogs; do ls "$c"/*.jpg | sort | awk -v n="$each" '{a[NR]=$0} END {for (i=0;i<n;i++) print a[int(i*NR/n)+1]}'; done ) >"$list"
tar -C "$assets/images/cats_and_dogs_filtered/train" -cf .whl/images.tar -T "$list"
rm -f "$list"
total=$(( $(du -sb .whl | cut -f1) + $(git ls-files -z | xargs -0 du -cb | tail -1 | cut -f1) ))
echo "$(find .whl -type f -name '*.whl' | wc -l) wheels; images $(du -k .whl/images.tar | cut -f1) KiB; MobileNetV2 $(du -k .whl/mobilenetv2.weights.h5 | cut -f1) KiB"
echo "travels: $((total / 1024)) KiB of 65536"
[ "$total" -lt $((63 * 1024 * 1024)) ] || { echo "too much: fewer images" >&2; exit 1; }
