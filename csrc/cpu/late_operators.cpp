// Late interaction as operators: kernels/late_interaction/backends.py documents what they compute and has their autograd.

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include "maxsim.h"

namespace pairtile {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor choices(const Tensor& like, int64_t blocks, int64_t rows) {
  return at::full({1, blocks, rows}, -1, like.options().dtype(at::kInt));
}

// Scores, then, if they are kept, choices.
std::vector<Tensor> max_scores(const Tensor& x, const Tensor& x_starts, const Tensor& x_lengths,
                               const OptionalTensor& x_keep, const Tensor& y, const Tensor& y_starts,
                               const Tensor& y_lengths, const OptionalTensor& y_keep, int64_t candidates, bool rows,
                               bool cols, int64_t budget, bool keep) {
  MaxTask task{make_token_sets(x, x_starts, x_lengths, x_keep, "x"),
               make_token_sets(y, y_starts, y_lengths, y_keep, "y"), {}, budget};
  task.pairs = make_pairs(task.x, task.y, candidates);
  const auto options = x.options().dtype(at::kFloat);
  const int64_t columns = task.pairs.columns();
  MaxResults results;
  std::vector<Tensor> scores, kept;
  if (rows) {
    scores.push_back(results.rows = at::empty({task.pairs.n, columns}, options));
    if (keep) {
      kept.push_back(results.row_choices = choices(x, columns, task.x.rows()));
    }
  }
  if (cols) {
    scores.push_back(results.cols = at::empty({task.pairs.n, columns}, options));
    if (keep) {
      kept.push_back(results.col_choices = choices(y, candidates == 0 ? task.pairs.n : 1, task.y.rows()));
    }
  }
  max_forward(task, results);
  scores.insert(scores.end(), kept.begin(), kept.end());
  return scores;
}

// Adds to the gradients that are given. A side has choices where it has an upstream gradient.
void max_scores_backward(const Tensor& x, const Tensor& x_starts, const Tensor& x_lengths, const OptionalTensor& x_keep,
                         const Tensor& y, const Tensor& y_starts, const Tensor& y_lengths, const OptionalTensor& y_keep,
                         int64_t candidates, const OptionalTensor& rows, const OptionalTensor& row_choices,
                         const OptionalTensor& cols, const OptionalTensor& col_choices, OptionalTensor dx,
                         OptionalTensor dy) {
  MaxTask task{make_token_sets(x, x_starts, x_lengths, x_keep, "x"),
               make_token_sets(y, y_starts, y_lengths, y_keep, "y"), {}, 0};
  task.pairs = make_pairs(task.x, task.y, candidates);
  const int64_t columns = task.pairs.columns();
  MaxGradients gradients;
  if (rows.has_value()) {
    TORCH_CHECK(row_choices.has_value() && row_choices->numel() == columns * task.x.rows(),
                "max_scores_backward: expected choices for ", columns, " sets and ", task.x.rows(), " tokens of x");
    gradients.rows = rows->to(at::kFloat);
    gradients.row_choices = row_choices->contiguous();
  }
  if (cols.has_value()) {
    TORCH_CHECK(col_choices.has_value() && col_choices->numel() == (candidates == 0 ? task.pairs.n : 1) * task.y.rows(),
                "max_scores_backward: expected choices for the tokens of y");
    gradients.cols = cols->to(at::kFloat);
    gradients.col_choices = col_choices->contiguous();
  }
  for (const auto& [given, sets, gradient] :
       {std::tie(dx, task.x, gradients.x), std::tie(dy, task.y, gradients.y)}) {
    if (given.has_value()) {
      TORCH_CHECK(given->scalar_type() == at::kFloat && given->is_contiguous() && given->sizes() == sets.tokens.sizes(),
                  "max_scores_backward: expected a contiguous float32 gradient ", sets.tokens.sizes());
      gradient = *given;
    }
  }
  max_backward(task, gradients);
}

}  // namespace
}  // namespace pairtile

TORCH_LIBRARY_FRAGMENT(pairtile, m) {
  m.def(
      "max_scores(Tensor x, Tensor x_starts, Tensor x_lengths, Tensor? x_keep, Tensor y, Tensor y_starts, "
      "Tensor y_lengths, Tensor? y_keep, int candidates, bool rows, bool cols, int budget, bool keep) -> Tensor[]");
  m.def(
      "max_scores_backward(Tensor x, Tensor x_starts, Tensor x_lengths, Tensor? x_keep, Tensor y, Tensor y_starts, "
      "Tensor y_lengths, Tensor? y_keep, int candidates, Tensor? rows, Tensor? row_choices, Tensor? cols, "
      "Tensor? col_choices, Tensor(a!)? dx, Tensor(b!)? dy) -> ()");
}

TORCH_LIBRARY_IMPL(pairtile, CPU, m) {
  m.impl("max_scores", &pairtile::max_scores);
  m.impl("max_scores_backward", &pairtile::max_scores_backward);
}
