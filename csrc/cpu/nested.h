// The cross-entropies of nested similarities: S^l_ij = f^l_i g^l_j <x_i, y_j> over the first ends[l] features of both.
//
// A tile's product for one width is that of the width before plus the features between, so all widths together cost one
// product of the widest. Likewise in the backward: the features between two widths belong to all wider similarities,
// whose weights are added up before they are multiplied.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace pairtile {

struct NestedProblem {
  at::Tensor x, y;             // [n, d] and [m, d], float, contiguous
  std::vector<int64_t> ends;   // ascending; the last one is d
  std::vector<double> weights;  // of each width
  double scale, row_weight, col_weight;
  int64_t offset;  // row i belongs to column i + offset
  bool normalize;  // each prefix to length 1
  int64_t budget;

  int64_t n() const { return x.size(0); }
  int64_t m() const { return y.size(0); }
  int64_t d() const { return x.size(1); }
  int64_t levels() const { return static_cast<int64_t>(ends.size()); }
};

// What the backward needs of the forward: of each width the sums of exp(S) over the others, and the pairs' own scores.
struct NestedState {
  double value = 0;
  at::Tensor rows, cols, own;  // [levels, n], [levels, m], [levels, n], double
  at::Tensor kept;             // products of the first chunks of rows
};

struct NestedGradients {
  at::Tensor x, y;  // float
  double scale = 0;
};

// exp(S) has to stay in float's range: |S| <= 50 is the caller's affair.
NestedState nested_forward(const NestedProblem& problem, bool keep);
NestedGradients nested_backward(const NestedProblem& problem, const NestedState& state, double upstream);

}  // namespace pairtile
