// Whole losses: a scalar and its gradients, from the sweeps.
#pragma once

#include <optional>
#include <vector>

#include "sweep.h"

namespace pairtile {

struct CrossEntropy {
  Partner partner;
  double row_weight, col_weight;
};

// What the backward of a two-directional cross-entropy needs of its forward.
struct CrossEntropyState {
  Statistics rows, cols;
  std::vector<double> own;  // score of each row's partner
};

Plan cross_entropy_plan(const CrossEntropy& loss);

// weight * sum over rows (columns) with a partner of softplus(LSE over the others - S of the partner).
double cross_entropy_value(const Problem& problem, const CrossEntropy& loss, const CrossEntropyState& state);

// d value / d (results of cross_entropy_plan's reductions), times `upstream`.
void cross_entropy_upstream(const Problem& problem, const CrossEntropy& loss, const CrossEntropyState& state,
                            double upstream, std::vector<Upstream>& out);

// One-directional: value and gradients in one sweep.
double cross_entropy_in_one_go(const Problem& problem, const CrossEntropy& loss, Needed needed, Gradients& gradients);

Plan sigmoid_plan(const Partner& positive);
double sigmoid_value(const Problem& problem, const Partner& positive, double weight);
double sigmoid_in_one_go(const Problem& problem, const Partner& positive, double weight, Needed needed,
                         Gradients& gradients);

}  // namespace pairtile
