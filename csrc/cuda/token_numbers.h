// Tokens' numbers as float32 and back, rounded to nearest.
#pragma once

#include "host_device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pairtile {

PAIRTILE_HOST_DEVICE float to_float(float value) { return value; }

template <class T>
PAIRTILE_HOST_DEVICE T rounded(float value);

template <>
PAIRTILE_HOST_DEVICE float rounded<float>(float value) {
  return value;
}

#ifdef __CUDACC__
PAIRTILE_HOST_DEVICE float to_float(__half value) { return __half2float(value); }
PAIRTILE_HOST_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <>
PAIRTILE_HOST_DEVICE __half rounded<__half>(float value) {
  return __float2half_rn(value);
}
template <>
PAIRTILE_HOST_DEVICE __nv_bfloat16 rounded<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
#endif

}  // namespace pairtile
