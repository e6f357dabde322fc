#include "losses.h"

#include <cmath>
#include <numeric>

namespace pairtile {
namespace {

Rule rule_of(const Partner& partner) {
  Rule rule;
  rule.code = partner.targets == nullptr ? RuleCode::kDiagonal : RuleCode::kTarget;
  rule.partner = partner;
  return rule;
}

double log_sum_exp(const Statistics& known, int64_t i) {
  return known.sum[i] == 0 ? -std::numeric_limits<double>::infinity() : known.shift[i] + std::log(known.sum[i]);
}

double softplus(double v) { return std::max(v, 0.0) + std::log1p(std::exp(-std::abs(v))); }
double sigmoid(double v) { return v >= 0 ? 1 / (1 + std::exp(-v)) : std::exp(v) / (1 + std::exp(v)); }

// The term of one owner. 0 * own is 0, or NaN where the partner's score is infinite, which softplus could hide.
double term(double others, double own) { return softplus(others - own) + 0 * own; }

bool has_partner(const Problem& problem, const Partner& partner, int64_t row) {
  const int64_t column = partner.column_of(row);
  return column >= 0 && column < problem.m;
}

// Coefficients of one owner: of its log-sum-exp over the others, and of its own score.
struct OwnerGradient {
  float others, own;
};

OwnerGradient owner_gradient(const Statistics& known, int64_t i, double own, double weight) {
  const double p = weight * sigmoid(log_sum_exp(known, i) - own);
  return {static_cast<float>(known.sum[i] == 0 ? 0 : p / known.sum[i]), static_cast<float>(-p)};
}

}  // namespace

Plan cross_entropy_plan(const CrossEntropy& loss) {
  Plan plan;
  const Rule own = rule_of(loss.partner);
  for (const bool by_row : {true, false}) {
    if (by_row || loss.col_weight != 0) {
      Reduction others;
      others.by_row = by_row;
      others.kind = Kind::kLogSumExp;
      others.exclude = {own};
      plan.reductions.push_back(others);
    }
  }
  Reduction pair;
  pair.by_row = true;
  pair.kind = Kind::kPairScore;
  pair.positive = {own};
  plan.reductions.push_back(pair);
  return plan;
}

double cross_entropy_value(const Problem& problem, const CrossEntropy& loss, const CrossEntropyState& state) {
  double rows = 0, cols = 0;
  for (int64_t i = 0; i < problem.n; ++i) {
    if (has_partner(problem, loss.partner, i)) {
      rows += term(log_sum_exp(state.rows, i), state.own[i]);
      if (loss.col_weight != 0) {
        cols += term(log_sum_exp(state.cols, loss.partner.column_of(i)), state.own[i]);
      }
    }
  }
  return loss.row_weight * rows + (loss.col_weight != 0 ? loss.col_weight * cols : 0);
}

void cross_entropy_upstream(const Problem& problem, const CrossEntropy& loss, const CrossEntropyState& state,
                            double upstream, std::vector<Upstream>& out) {
  const bool both = loss.col_weight != 0;
  out.assign(both ? 3 : 2, Upstream{});
  Upstream &rows = out[0], &own = out.back();
  rows.coefficient.assign(problem.n, 0.0f);
  rows.shift.assign(state.rows.shift.begin(), state.rows.shift.end());
  own.coefficient.assign(problem.n, 0.0f);
  if (both) {
    out[1].coefficient.assign(problem.m, 0.0f);
    out[1].shift.assign(state.cols.shift.begin(), state.cols.shift.end());
  }
  for (int64_t i = 0; i < problem.n; ++i) {
    if (!has_partner(problem, loss.partner, i)) {
      continue;
    }
    const OwnerGradient of_row = owner_gradient(state.rows, i, state.own[i], upstream * loss.row_weight);
    rows.coefficient[i] = of_row.others;
    own.coefficient[i] = of_row.own;
    if (both) {
      const int64_t j = loss.partner.column_of(i);
      const OwnerGradient of_col = owner_gradient(state.cols, j, state.own[i], upstream * loss.col_weight);
      out[1].coefficient[j] = of_col.others;
      own.coefficient[i] += of_col.own;
    }
  }
}

double cross_entropy_in_one_go(const Problem& problem, const CrossEntropy& loss, Needed needed, Gradients& gradients) {
  const Plan plan = cross_entropy_plan(loss);
  const std::vector<double> own = pair_scores(problem, loss.partner);
  double value = 0;
  gradients = forward_backward(
      problem, plan, needed, [&](int64_t begin, int64_t end, const std::vector<Statistics>& known, std::vector<Upstream>& upstream) {
        for (int64_t i = begin; i < end; ++i) {
          OwnerGradient gradient{0, 0};
          if (has_partner(problem, loss.partner, i)) {
            value += term(log_sum_exp(known[0], i - begin), own[i]);
            gradient = owner_gradient(known[0], i - begin, own[i], loss.row_weight);
          }
          upstream[0].coefficient[i] = gradient.others;
          upstream[0].shift[i] = static_cast<float>(known[0].shift[i - begin]);
          upstream[1].coefficient[i] = gradient.own;
        }
      });
  return loss.row_weight * value;
}

Plan sigmoid_plan(const Partner& positive) {
  Plan plan;
  Reduction sum;
  sum.by_row = true;
  sum.kind = Kind::kSoftplusSum;
  sum.positive = {rule_of(positive)};
  plan.reductions.push_back(sum);
  return plan;
}

double sigmoid_value(const Problem& problem, const Partner& positive, double weight) {
  const Plan plan = sigmoid_plan(positive);
  const std::vector<Statistics> known = make_sweep(problem, plan)->forward(nullptr, 0);
  return weight * std::accumulate(known[0].sum.begin(), known[0].sum.end(), 0.0);
}

double sigmoid_in_one_go(const Problem& problem, const Partner& positive, double weight, Needed needed,
                         Gradients& gradients) {
  const Plan plan = sigmoid_plan(positive);
  std::unique_ptr<Sweep> sweep = make_sweep(problem, plan);
  std::vector<Upstream> upstream(1);
  upstream[0].coefficient.assign(problem.n, static_cast<float>(weight));
  std::vector<double> losses(problem.n, 0.0);
  if (sweep->uniform()) {
    gradients = sweep->backward(upstream, needed, nullptr, 0, &losses);
  } else {
    losses = sweep->forward(nullptr, 0)[0].sum;
    gradients = sweep->backward(upstream, needed, nullptr, 0);
  }
  return weight * std::accumulate(losses.begin(), losses.end(), 0.0);
}

}  // namespace pairtile
