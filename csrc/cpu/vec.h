// Vectors of the host's width, and the few functions of a score that every reduction is made of.
#pragma once

// ATen's vector headers take the width from these names, which only torch's own build sets.
#if !defined(CPU_CAPABILITY)
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#else
#define CPU_CAPABILITY DEFAULT
#define CPU_CAPABILITY_DEFAULT
#endif
#endif

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <limits>

namespace pairtile {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

inline float sum_lanes(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, v);
}
inline float max_lanes(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, v);
}

// exp to about 3e-7 relative; exactly 0 below -87.3, so also at -inf; a NaN does not survive it.
inline Vec exp(Vec v) { return v.exp_u20(); }

// Both are functions of u = exp(-|v|), which neither overflows nor cancels.
struct SoftplusSigmoid {
  Vec softplus, sigmoid;
};

// log1p(u) for u in [0, 1]: 2 atanh(t) at t = u / (2 + u) <= 1/3, whose series is cut at 2e-9.
inline Vec log1p_unit(Vec u) {
  const Vec t = u / (Vec(2.0f) + u);
  const Vec q = t * t;
  Vec p(1.0f / 15);
  for (float c : {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f}) {
    p = at::vec::fmadd(p, q, Vec(c));
  }
  return (t + t) * p;
}

inline Vec softplus(Vec v) { return at::vec::maximum(v, Vec(0.0f)) + log1p_unit(exp(v.abs().neg())); }

inline Vec sigmoid(Vec v) {
  const Vec u = exp(v.abs().neg());
  const Vec r = Vec(1.0f) / (Vec(1.0f) + u);
  return Vec::blendv(u * r, r, v >= Vec(0.0f));
}

inline SoftplusSigmoid softplus_sigmoid(Vec v) {
  const Vec u = exp(v.abs().neg());
  const Vec r = Vec(1.0f) / (Vec(1.0f) + u);
  return {at::vec::maximum(v, Vec(0.0f)) + log1p_unit(u), Vec::blendv(u * r, r, v >= Vec(0.0f))};
}

}  // namespace pairtile
