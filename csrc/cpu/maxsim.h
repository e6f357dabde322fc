// The maximum of each token's similarities with another set's tokens, and the sums of these maxima over a set.
//
// A tile is the product of rows of y with columns of x, so the maximum over the tokens of y_j is one of whole vectors
// from row to row, and what does not count among the rows of y is passed over.
#pragma once

#include <ATen/core/Tensor.h>

#include "token_sets.h"

namespace pairtile {

struct MaxTask {
  TokenSets x, y;
  Pairs pairs;
  int64_t budget;
};

// What is asked for is defined. Choices are positions in a set, -1 from the start.
struct MaxResults {
  at::Tensor rows, cols;                // float [n, columns], any strides
  at::Tensor row_choices, col_choices;  // int32 [blocks, rows of x], [blocks, rows of y]
};

void max_forward(const MaxTask& task, MaxResults& results);

// The gradients of the tokens, float, to which those of `task` are added. Upstream gradients are float [n, columns];
// what is undefined is not wanted or not given.
struct MaxGradients {
  at::Tensor rows, cols;  // upstream
  at::Tensor row_choices, col_choices;
  at::Tensor x, y;
};

void max_backward(const MaxTask& task, const MaxGradients& gradients);

}  // namespace pairtile
