// The shift of a running softmax: its largest exponent so far (arXiv:1805.02867).
#pragma once

#include <cmath>

#include "vec.h"

namespace pairtile {

// 0 where the maximum is infinite, so that exp(v - shift) is 0 or inf there, never NaN.
inline float finite(float maximum) { return std::isinf(maximum) ? 0.0f : maximum; }
inline Vec finite(Vec maximum) { return Vec::blendv(maximum, Vec(0.0f), maximum.abs() == Vec(kInfinity)); }

// A NaN is the largest.
inline float larger(float a, float b) { return std::isnan(b) || b > a ? b : a; }

// What a sum relative to the maximum `before` is multiplied by to be relative to `after`.
inline double rescale(float before, float after) {
  return before == after || before == -kInfinity ? 1.0 : std::exp(static_cast<double>(finite(before)) - finite(after));
}

}  // namespace pairtile
