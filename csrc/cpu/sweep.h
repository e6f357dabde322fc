// The two sweeps over the tiles of S: forward (results) and backward (gradients). See typed_sweep.h for how.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <vector>

#include "problem.h"

namespace pairtile {

// What a dense reduction knows of each owner: a log-sum-exp is shift + log(sum), other sums are sum.
struct Statistics {
  std::vector<double> shift, sum;
  std::vector<double> mean;    // under a softmax: the expectation; sum and shift are those of the softmax
  at::Tensor scores, indices;  // the largest [owners, k]
};

// How the gradient of a loss enters: d loss / d (result of a reduction), one for each owner.
struct Upstream {
  // Under a softmax: gradient / sum, so that the weight is coefficient * exp(S - shift).
  std::vector<float> coefficient;
  std::vector<float> shift;            // of what has an exponent
  std::vector<float> mean, mean_rest;  // of an expectation: their sum, to more digits than a float has
};

struct Gradients {
  at::Tensor x, y;                         // of the features' type; undefined where not needed
  std::vector<double> scale, row, col;     // d/d scale_i, sum_j G_ij, sum_i G_ij; empty where not needed
};

struct Needed {
  bool x = true, y = true, scale = true, row_sums = false, col_sums = false;
};

// Turns the statistics of the rows begin : end, now known, into what the backward of these rows needs.
using UpstreamOf = std::function<void(int64_t begin, int64_t end, const std::vector<Statistics>& of_these_rows,
                                      std::vector<Upstream>& upstream)>;

class Sweep {
 public:
  virtual ~Sweep() = default;

  // Statistics of all dense reductions, in the plan's order (empty ones for pair scores). The tiles of the first
  // `kept_chunks` chunks that the backward reads stay behind in `kept`.
  virtual std::vector<Statistics> forward(float* kept, int64_t kept_chunks) = 0;

  // Whether one exponential for each pair serves the whole plan.
  virtual bool uniform() const = 0;

  // Whether the backward subtracts a reduction's shift before it exponentiates. Where scores are small it does not.
  virtual bool shifted(size_t reduction) const = 0;

  // Gradients, from one Upstream for each reduction of the plan. If `losses` is given (uniform softplus plans), the
  // sum of the terms of each row is added to it on the way, so that no forward is needed.
  virtual Gradients backward(const std::vector<Upstream>& upstream, Needed needed, const float* kept,
                             int64_t kept_chunks, std::vector<double>* losses = nullptr) = 0;

  // Both together, as below, of any plan and size.
  virtual Gradients forward_backward(Needed needed, const UpstreamOf& upstream_of) = 0;
};

// `in_one_go`: for forward_backward.
std::unique_ptr<Sweep> make_sweep(const Problem& problem, const Plan& plan, bool in_one_go = false);

// Forward and backward together, for plans whose dense reductions are of rows alone. 6 n m d FLOPs. The fastest sweep
// (one_go.h), or where that does not serve the plan, TypedSweep.
Gradients forward_backward(const Problem& problem, const Plan& plan, Needed needed, const UpstreamOf& upstream_of);

// S at each row's partner in float64, -inf where there is none; the gradient of a well aligned batch hangs on it.
std::vector<double> pair_scores(const Problem& problem, const Partner& partner);

// The gradients of a plan in which nothing but the pairs' own scores has one.
Gradients pair_gradients(const Problem& problem, const Plan& plan, const std::vector<Upstream>& upstream,
                         Needed needed);

}  // namespace pairtile
