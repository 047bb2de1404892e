#!/usr/bin/env bash
# Runs a command on a CUDA runtime that computes nothing, see runtime.c. It needs gcc and, in the active environment,
# PyTorch built for CUDA 13.
#
#   tests/nullcuda/run.sh python -m pytest tests/nullcuda
set -euo pipefail
sources=$(cd "$(dirname "$0")" && pwd)

libraries=$(mktemp -d)
trap 'rm -rf "$libraries"' EXIT
headers=$(python -c 'import os, nvidia.cu13 as cuda; print(os.path.join(list(cuda.__path__)[0], "include"))')
# The wheels lack this header of the compiler, nvcc, whose words mean nothing to gcc.
mkdir "$libraries/crt"
for word in __host__ __device__ __global__ __device_builtin__ __cudart_builtin__ __device_builtin_texture_type__ \
  __device_builtin_surface_type__ CUDARTAPI CUDART_CB '__builtin_align__(n) __attribute__((aligned(n)))' \
  '__align__(n) __attribute__((aligned(n)))' '__location__(a)'; do
  echo "#define $word"
done > "$libraries/crt/host_defines.h"
compile=(gcc -std=gnu17 -w -O1 -shared -fPIC -I"$libraries" -I"$headers" "$sources/runtime.c")
"${compile[@]}" -o "$libraries/libnullcuda.so"
# The same as the driver, which Triton and NVRTC open by its name.
"${compile[@]}" -Wl,-soname,libcuda.so.1 -o "$libraries/libcuda.so.1"

export LD_LIBRARY_PATH=$libraries LD_PRELOAD=$libraries/libnullcuda.so OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1  # there is no cuDNN on it
"$@"
