// What lets one source be compiled by nvcc for a GPU and by any C++ compiler for a CPU, where tests run it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PAIRTILE_HOST_DEVICE __host__ __device__ __forceinline__
// Bodies of kernels: they call what exists on the device alone.
#define PAIRTILE_DEVICE __device__ __forceinline__
#define PAIRTILE_UNROLL _Pragma("unroll")
#else
#define PAIRTILE_HOST_DEVICE inline
#define PAIRTILE_DEVICE inline
#define PAIRTILE_UNROLL
#endif

namespace pairtile {

PAIRTILE_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace pairtile
