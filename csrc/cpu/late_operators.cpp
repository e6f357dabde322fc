// Late interaction as operators: kernels/late_interaction/backends.py documents what they compute and has their autograd.

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "maxsim.h"
#include "soft_pooling.h"

namespace pairtile {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What every operator takes first.
struct Given {
  TokenSets x, y;
  Pairs pairs;

  Given(const Tensor& x_tokens, const Tensor& x_starts, const Tensor& x_lengths, const OptionalTensor& x_keep,
        const Tensor& y_tokens, const Tensor& y_starts, const Tensor& y_lengths, const OptionalTensor& y_keep,
        int64_t candidates)
      : x(make_token_sets(x_tokens, x_starts, x_lengths, x_keep, "x")),
        y(make_token_sets(y_tokens, y_starts, y_lengths, y_keep, "y")),
        pairs(make_pairs(x, y, candidates)) {}

  Tensor scores() const { return at::empty({pairs.n, pairs.columns()}, x.tokens.options().dtype(at::kFloat)); }
  // Shape of what is kept for the sake of x's tokens, or y's.
  std::vector<int64_t> kept(bool by_x, int64_t depth) const {
    const int64_t blocks = by_x ? pairs.columns() : (pairs.candidates == 0 ? pairs.n : 1);
    return {depth, blocks, by_x ? x.rows() : y.rows()};
  }
};

Tensor no_choices(at::IntArrayRef shape) { return at::full(shape, -1, at::TensorOptions().dtype(at::kInt)); }

std::vector<Tensor> joined(std::vector<Tensor> scores, const std::vector<Tensor>& kept) {
  scores.insert(scores.end(), kept.begin(), kept.end());
  return scores;
}

// Scores, then, if they are kept, choices.
std::vector<Tensor> max_scores(const Tensor& x, const Tensor& x_starts, const Tensor& x_lengths,
                               const OptionalTensor& x_keep, const Tensor& y, const Tensor& y_starts,
                               const Tensor& y_lengths, const OptionalTensor& y_keep, int64_t candidates, bool rows,
                               bool cols, int64_t budget, bool keep) {
  const Given given(x, x_starts, x_lengths, x_keep, y, y_starts, y_lengths, y_keep, candidates);
  MaxResults results;
  std::vector<Tensor> scores, kept;
  auto ask = [&](bool by_x, Tensor& of_side, Tensor& choices) {
    scores.push_back(of_side = given.scores());
    if (keep) {
      kept.push_back(choices = no_choices(given.kept(by_x, 1)));
    }
  };
  if (rows) {
    ask(true, results.rows, results.row_choices);
  }
  if (cols) {
    ask(false, results.cols, results.col_choices);
  }
  max_forward({given.x, given.y, given.pairs, budget}, results);
  return joined(std::move(scores), kept);
}

// A column of the projection is a set of one token: the maxima [samples, columns], and the choices.
std::tuple<Tensor, Tensor> project_max(const Tensor& hidden, const Tensor& starts, const Tensor& lengths,
                                       const OptionalTensor& keep, const Tensor& weight, int64_t budget) {
  const auto longs = at::TensorOptions().dtype(at::kLong);
  const int64_t columns = weight.size(0);
  const Given given(weight, at::arange(columns, longs), at::ones({columns}, longs), {}, hidden, starts, lengths, keep, 0);
  const Tensor values = at::empty({given.pairs.m, columns}, at::TensorOptions().dtype(at::kFloat));
  MaxResults results;
  results.rows = values.t();
  results.row_choices = no_choices(given.kept(true, 1));
  max_forward({given.x, given.y, given.pairs, budget}, results);
  return {values, results.row_choices.squeeze(0)};
}

// Upstream gradients of a side and what its forward kept; both undefined if it was not asked for.
std::pair<Tensor, Tensor> known_side(const Given& given, bool by_x, const OptionalTensor& upstream,
                                     const OptionalTensor& kept, int64_t depth, at::ScalarType type) {
  if (!upstream.has_value()) {
    return {};
  }
  const std::vector<int64_t> shape = given.kept(by_x, depth);
  TORCH_CHECK(kept.has_value() && kept->sizes() == shape && kept->scalar_type() == type,
              "late interaction: expected what the forward kept, ", type, " ", at::IntArrayRef(shape));
  TORCH_CHECK(upstream->dim() == 2 && upstream->size(0) == given.pairs.n && upstream->size(1) == given.pairs.columns(),
              "late interaction: expected upstream gradients [", given.pairs.n, ", ", given.pairs.columns(), "], got ",
              upstream->sizes());
  return {upstream->to(at::kFloat), kept->contiguous()};
}

Tensor gradient_of(const TokenSets& sets, const OptionalTensor& given) {
  TORCH_CHECK(!given.has_value() || (given->scalar_type() == at::kFloat && given->is_contiguous() &&
                                     given->sizes() == sets.tokens.sizes()),
              "late interaction: expected a contiguous float32 gradient ", sets.tokens.sizes());
  return given.value_or(Tensor());
}

// Adds to the gradients that are given.
void max_scores_backward(const Tensor& x, const Tensor& x_starts, const Tensor& x_lengths, const OptionalTensor& x_keep,
                         const Tensor& y, const Tensor& y_starts, const Tensor& y_lengths, const OptionalTensor& y_keep,
                         int64_t candidates, const OptionalTensor& rows, const OptionalTensor& row_choices,
                         const OptionalTensor& cols, const OptionalTensor& col_choices, OptionalTensor dx,
                         OptionalTensor dy) {
  const Given given(x, x_starts, x_lengths, x_keep, y, y_starts, y_lengths, y_keep, candidates);
  MaxGradients gradients;
  std::tie(gradients.rows, gradients.row_choices) = known_side(given, true, rows, row_choices, 1, at::kInt);
  std::tie(gradients.cols, gradients.col_choices) = known_side(given, false, cols, col_choices, 1, at::kInt);
  gradients.x = gradient_of(given.x, dx);
  gradients.y = gradient_of(given.y, dy);
  max_backward({given.x, given.y, given.pairs, 0}, gradients);
}

// Scores, then, if they are kept, the statistics of each side.
std::vector<Tensor> soft_scores(const Tensor& x, const Tensor& x_starts, const Tensor& x_lengths,
                                const OptionalTensor& x_keep, const Tensor& y, const Tensor& y_starts,
                                const Tensor& y_lengths, const OptionalTensor& y_keep, int64_t candidates, bool rows,
                                bool cols, int64_t budget, bool keep, bool softmax, double temperature) {
  const Given given(x, x_starts, x_lengths, x_keep, y, y_starts, y_lengths, y_keep, candidates);
  const SoftTask task{given.x, given.y, given.pairs, softmax, temperature, budget};
  std::vector<Tensor> scores, kept;
  for (const bool by_x : {true, false}) {
    if (by_x ? rows : cols) {
      Tensor of_side = given.scores(), statistics;
      if (keep) {
        kept.push_back(statistics = at::zeros(given.kept(by_x, softmax ? 2 : 1), of_side.options()));
      }
      soft_forward(task, by_x, of_side, statistics);
      scores.push_back(of_side);
    }
  }
  return joined(std::move(scores), kept);
}

// Adds to the gradients that are given.
void soft_scores_backward(const Tensor& x, const Tensor& x_starts, const Tensor& x_lengths,
                          const OptionalTensor& x_keep, const Tensor& y, const Tensor& y_starts,
                          const Tensor& y_lengths, const OptionalTensor& y_keep, int64_t candidates,
                          const OptionalTensor& rows, const OptionalTensor& row_statistics, const OptionalTensor& cols,
                          const OptionalTensor& col_statistics, OptionalTensor dx, OptionalTensor dy, int64_t budget,
                          bool softmax, double temperature) {
  const Given given(x, x_starts, x_lengths, x_keep, y, y_starts, y_lengths, y_keep, candidates);
  const SoftTask task{given.x, given.y, given.pairs, softmax, temperature, budget};
  SoftSide of_x, of_y;
  std::tie(of_x.upstream, of_x.kept) = known_side(given, true, rows, row_statistics, softmax ? 2 : 1, at::kFloat);
  std::tie(of_y.upstream, of_y.kept) = known_side(given, false, cols, col_statistics, softmax ? 2 : 1, at::kFloat);
  if (Tensor gradient = gradient_of(given.x, dx); gradient.defined()) {
    soft_backward(task, true, of_x, of_y, gradient);
  }
  if (Tensor gradient = gradient_of(given.y, dy); gradient.defined()) {
    soft_backward(task, false, of_y, of_x, gradient);
  }
}

}  // namespace
}  // namespace pairtile

TORCH_LIBRARY_FRAGMENT(pairtile, m) {
  const std::string sets =
      "Tensor x, Tensor x_starts, Tensor x_lengths, Tensor? x_keep, Tensor y, Tensor y_starts, Tensor y_lengths, "
      "Tensor? y_keep, int candidates";
  const std::string asked = ", bool rows, bool cols, int budget, bool keep";
  const std::string gradients =
      ", Tensor? rows, Tensor? row_kept, Tensor? cols, Tensor? col_kept, Tensor(a!)? dx, Tensor(b!)? dy";
  const std::string soft = ", bool softmax, float temperature";
  auto define = [&](const std::string& schema) { m.def(torch::schema(schema.c_str())); };
  define("max_scores(" + sets + asked + ") -> Tensor[]");
  define("max_scores_backward(" + sets + gradients + ") -> ()");
  define("soft_scores(" + sets + asked + soft + ") -> Tensor[]");
  define("soft_scores_backward(" + sets + gradients + ", int budget" + soft + ") -> ()");
  m.def(
      "project_max_forward(Tensor hidden, Tensor starts, Tensor lengths, Tensor? keep, Tensor weight, int budget) -> "
      "(Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pairtile, CPU, m) {
  m.impl("max_scores", &pairtile::max_scores);
  m.impl("max_scores_backward", &pairtile::max_scores_backward);
  m.impl("soft_scores", &pairtile::soft_scores);
  m.impl("soft_scores_backward", &pairtile::soft_scores_backward);
  m.impl("project_max_forward", &pairtile::project_max);
}
