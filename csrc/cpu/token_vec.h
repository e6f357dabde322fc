// Vectors of tokens of any type, and running maxima that know where they were found.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "vec.h"

namespace pairtile {

inline Vec load_floats(const float* from) { return Vec::loadu(from); }
inline Vec load_floats(const at::BFloat16* from) {
  Vec v;
  at::vec::load_fp32_from_bf16(from, v);
  return v;
}
inline Vec load_floats(const at::Half* from) {
  Vec v;
  at::vec::load_fp32_from_fp16(from, v);
  return v;
}

template <typename From, typename To>
void copy_token(const From* from, int64_t width, int64_t depth, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, width * sizeof(To));
  } else {
    int64_t k = 0;
    for (; k + kLanes <= width; k += kLanes) {
      load_floats(from + k).store(to + k);
    }
    for (; k < width; ++k) {
      to[k] = static_cast<To>(static_cast<float>(from[k]));
    }
  }
  std::fill(to + width, to + depth, To(0.0f));
}

// A maximum and the position of the first entry that is it, a float that is a whole number; NaN is larger than all.
struct Largest {
  Vec value, position;

  void raise(Vec v, Vec p) {
#if defined(CPU_CAPABILITY_AVX512)
    const __mmask16 a_number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    const __mmask16 larger = _mm512_mask_cmp_ps_mask(a_number, v, value, _CMP_NLE_UQ);
    value = _mm512_mask_mov_ps(value, larger, v);
    position = _mm512_mask_mov_ps(position, larger, p);
#else
    const Vec kept = (v <= value) | (value != value);
    value = Vec::blendv(v, value, kept);
    position = Vec::blendv(p, position, kept);
#endif
  }

  // The same where entries come in any order.
  void merge(Vec v, Vec p) {
    const Vec kept = ((v <= value) | (value != value)) & ~((v == value) & (p < position));
    value = Vec::blendv(v, value, kept);
    position = Vec::blendv(p, position, kept);
  }
};

}  // namespace pairtile
