// Soft maxima of each token's similarities with another set's tokens, and their sums over a set.
//
// With L = temperature * log sum_q exp(s_q / temperature), a log-sum-exp pools to L, and a softmax to the mean of the
// s_q under p_q = exp((s_q - L) / temperature). The derivatives by s_q are p_q and p_q (1 + (s_q - mean) / temperature).
// Differences of similarities are taken before they are divided: of the largest one, exp(0) = 1 is exact.
#pragma once

#include <ATen/core/Tensor.h>

#include "token_sets.h"

namespace pairtile {

struct SoftTask {
  TokenSets x, y;
  Pairs pairs;
  bool softmax;  // else log-sum-exp
  double temperature;
  int64_t budget;

  const TokenSets& own(bool by_x) const { return by_x ? x : y; }
  const TokenSets& others(bool by_x) const { return by_x ? y : x; }
};

// Scores of one side, float [n, columns]; and, where `kept` is defined, [1, blocks, own rows] of L, or [2, ...] of L
// and the mean.
void soft_forward(const SoftTask& task, bool by_x, at::Tensor& scores, at::Tensor& kept);

// What is known of one side: upstream gradients and what its forward kept; undefined if it was not asked for.
struct SoftSide {
  at::Tensor upstream, kept;
};

// Adds the gradient of the own tokens to `gradient`, float. It comes from what the own tokens pool and from what the
// others' tokens do.
void soft_backward(const SoftTask& task, bool by_x, const SoftSide& own, const SoftSide& others, at::Tensor& gradient);

}  // namespace pairtile
