// How the gradients of features begin and end: the tensors, and what is done with a finished sum.
#pragma once

#include <ATen/ops/zeros.h>

#include "memory.h"
#include "operands.h"
#include "sweep.h"

namespace pairtile {

template <typename T>
double dot(const T* a, const float* b, int64_t count) {
  double lanes[8] = {};
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) {
    for (int64_t l = 0; l < 8; ++l) {
      lanes[l] += static_cast<double>(static_cast<float>(a[k + l])) * b[k + l];
    }
  }
  double sum = 0;
  for (; k < count; ++k) {
    sum += static_cast<double>(static_cast<float>(a[k])) * b[k];
  }
  for (double lane : lanes) {
    sum += lane;
  }
  return sum;
}

// Features' gradients, not filled unless S is empty, and zeros for the rest.
inline Gradients start_gradients(const Problem& problem, Needed needed) {
  Gradients gradients;
  const bool nothing = problem.n == 0 || problem.m == 0;
  auto make = [&](int64_t length) {
    const at::TensorOptions options = problem.x.options();
    return nothing ? at::zeros({length, problem.d}, options) : empty_in_huge_pages({length, problem.d}, options);
  };
  if (needed.x) {
    gradients.x = make(problem.n);
  }
  if (needed.y) {
    gradients.y = make(problem.m);
  }
  gradients.scale.assign(needed.scale ? problem.n : 0, 0.0);
  gradients.row.assign(needed.row_sums ? problem.n : 0, 0.0);
  gradients.col.assign(needed.col_sums ? problem.m : 0, 0.0);
  return gradients;
}

// Where dy is added up: in float, whatever the features are; in its own place if they are float.
inline at::Tensor start_columns(const Problem& problem, Needed needed, const Gradients& gradients) {
  if (!needed.y || gradients.y.scalar_type() == at::kFloat) {
    return gradients.y;
  }
  return empty_in_huge_pages({problem.m, problem.d}, problem.x.options().dtype(at::kFloat));
}

// A block of dy, times `scale`, from its sums, [cols, d], or [d, cols] and then turned; `copy` is room for that.
template <typename In>
void finish_block(const float* sums, int64_t cols, int64_t d, bool transposed, float scale, Buffer<float>& copy,
                  In* dy) {
  if (transposed) {
    copy.reserve(cols * d);
    transpose(sums, cols, d, cols, copy.data(), d);
    sums = copy.data();
  }
  for (int64_t k = 0; k < cols * d; ++k) {
    dy[k] = static_cast<In>(scale * sums[k]);
  }
}

}  // namespace pairtile
