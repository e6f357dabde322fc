// similarity_reduce as an operator, documented in kernels/contrastive/operator.py: how tensors become a problem and a
// plan, and back.

#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "autograd.h"
#include "memory.h"
#include "product.h"

namespace pairtile {
namespace {

// Scores of the own pairs of rows, or columns, -inf where there is none.
std::vector<double> own_scores(const Problem& problem, const Reduction& reduction) {
  const Partner& partner = reduction.positive[0].partner;
  const std::vector<double> scores = pair_scores(problem, partner);
  if (reduction.by_row) {
    return scores;
  }
  std::vector<double> of_columns(problem.m, -std::numeric_limits<double>::infinity());
  for (int64_t i = 0; i < problem.n; ++i) {
    const int64_t j = partner.column_of(i);
    if (j >= 0 && j < problem.m) {
      of_columns[j] = scores[i];
    }
  }
  return of_columns;
}

std::vector<Tensor> results_of(const Problem& problem, const Reduction& reduction, const Statistics& known) {
  switch (reduction.kind) {
    case Kind::kPairScore:
      return {to_tensor(own_scores(problem, reduction), at::kFloat)};
    case Kind::kLogSumExp: {
      std::vector<double> results(known.sum.size());
      for (size_t i = 0; i < results.size(); ++i) {
        results[i] = std::log(known.sum[i]) + known.shift[i];  // log(0) = -inf
      }
      return {to_tensor(results, at::kFloat)};
    }
    case Kind::kSoftmaxMean:
      return {to_tensor(known.mean, at::kFloat)};
    case Kind::kChosen:
      return {known.scores, known.indices};
    default:
      return {to_tensor(known.sum, at::kFloat)};
  }
}

int64_t stored_floats(const Tiles& tiles, int64_t matrices) { return matrices * tiles.chunk_floats(); }

// Results, then as many statistics ([2, owners] of a log-sum-exp, [3, owners] of an expectation, [2, 0] else), then the
// kept tiles.
std::vector<Tensor> reduce_forward(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& bias,
                                   const OptionalTensor& row_bias, const OptionalTensor& col_bias,
                                   at::IntArrayRef numbers, at::ArrayRef<double> factors, at::TensorList metadata,
                                   int64_t budget, bool keep) {
  Problem problem = make_problem(x, y, scale, bias, row_bias, col_bias, budget);
  const Plan plan = decode_plan(numbers, factors, metadata, problem);
  const Tiles tiles(problem);
  const int64_t matrices = plan.matrices(problem, /*backward=*/true).size();
  const int64_t chunks = keep ? kept_chunks(problem, tiles, matrices) : 0;
  Tensor kept = empty_in_huge_pages({chunks * stored_floats(tiles, matrices)}, at::TensorOptions().dtype(at::kFloat));
  std::vector<Statistics> known(plan.reductions.size());
  if (plan.first_dense() != nullptr) {
    known = make_sweep(problem, plan)->forward(kept.mutable_data_ptr<float>(), chunks);
  }
  std::vector<Tensor> outputs, statistics;
  for (size_t k = 0; k < plan.reductions.size(); ++k) {
    const Reduction& reduction = plan.reductions[k];
    const std::vector<Tensor> results = results_of(problem, reduction, known[k]);
    outputs.insert(outputs.end(), results.begin(), results.end());
    statistics.push_back(to_tensor(reduction.has_exponent() ? known[k] : Statistics{}));
    if (results.size() > 1) {
      statistics.push_back(to_tensor(Statistics{}));
    }
  }
  outputs.insert(outputs.end(), statistics.begin(), statistics.end());
  outputs.push_back(kept);
  return outputs;
}

// What the backward needs of one reduction. Statistics may be of more pairs than this problem has, and so have a shift
// that its backward does not subtract (`shifted`): the coefficient then holds it.
Upstream upstream_of(const Reduction& reduction, const Tensor& gradient, const Tensor& statistics, bool shifted) {
  Upstream upstream;
  upstream.coefficient = to_floats(gradient);
  if (reduction.has_exponent()) {
    const Statistics known = to_statistics(statistics);
    upstream.shift.assign(known.shift.begin(), known.shift.end());
    for (const double mean : known.mean) {
      upstream.mean.push_back(static_cast<float>(mean));
      upstream.mean_rest.push_back(std::isfinite(mean) ? static_cast<float>(mean - upstream.mean.back()) : 0.0f);
    }
    for (size_t i = 0; i < known.sum.size(); ++i) {
      float& coefficient = upstream.coefficient[i];
      const double sum = shifted || known.shift[i] == 0 ? known.sum[i] : known.sum[i] * std::exp(known.shift[i]);
      // Scores that need no shift are near 0: an owner whose largest of all is far below has no allowed pair among them.
      const bool elsewhere = !shifted && known.shift[i] < 0;
      coefficient = known.sum[i] == 0 || elsewhere ? 0.0f : static_cast<float>(coefficient / sum);
    }
  }
  return upstream;
}

// Gradients of x, y, scale, bias, row_bias and col_bias; empty where not needed.
std::vector<Tensor> reduce_backward(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& bias,
                                    const OptionalTensor& row_bias, const OptionalTensor& col_bias,
                                    at::IntArrayRef numbers, at::ArrayRef<double> factors, at::TensorList metadata,
                                    int64_t budget, at::TensorList statistics, const Tensor& kept, at::TensorList grads, std::array<bool, 6> wanted) {
  Problem problem = make_problem(x, y, scale, bias, row_bias, col_bias, budget);
  const Plan plan = decode_plan(numbers, factors, metadata, problem);
  const std::unique_ptr<Sweep> sweep = plan.weighs() ? make_sweep(problem, plan) : nullptr;
  std::vector<Upstream> upstream;
  size_t result = 0;
  for (size_t k = 0; k < plan.reductions.size(); ++k) {
    const Reduction& reduction = plan.reductions[k];
    const bool has_gradient = reduction.weighs() || !reduction.dense();
    const bool shifted = has_gradient && reduction.has_exponent() && sweep != nullptr && sweep->shifted(k);
    upstream.push_back(has_gradient ? upstream_of(reduction, grads[result], statistics[result], shifted) : Upstream());
    result += reduction.kind == Kind::kChosen ? 2 : 1;
  }
  const Needed needed{wanted[0], wanted[1], wanted[2], wanted[3] || wanted[4], wanted[5]};
  const int64_t matrices = plan.matrices(problem, /*backward=*/true).size();
  const int64_t chunks = kept.numel() / std::max<int64_t>(stored_floats(Tiles(problem), matrices), 1);
  const Gradients gradients =
      sweep != nullptr ? sweep->backward(upstream, needed, kept.const_data_ptr<float>(), chunks)
                       : pair_gradients(problem, plan, upstream, needed);
  auto sums = [](const std::vector<double>& values, const OptionalTensor& like) {
    const Tensor all = to_tensor(values, at::kDouble);
    return (like->numel() == all.numel() && like->dim() > 0 ? all : all.sum()).reshape(like->sizes()).to(like->scalar_type());
  };
  return {or_none(gradients.x),
          or_none(gradients.y),
          wanted[2] ? scale_gradient(gradients.scale, scale) : none(),
          wanted[3] ? to_tensor(gradients.row, at::kDouble).sum().reshape(bias->sizes()).to(bias->scalar_type()) : none(),
          wanted[4] ? sums(gradients.row, row_bias) : none(),
          wanted[5] ? sums(gradients.col, col_bias) : none()};
}

struct SimilarityReduce : torch::autograd::Function<SimilarityReduce> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const Tensor& scale,
                               const OptionalTensor& bias, const OptionalTensor& row_bias,
                               const OptionalTensor& col_bias, at::IntArrayRef plan, at::ArrayRef<double> factors,
                               at::TensorList metadata, int64_t budget, bool keep) {
    PAIRTILE_OPERATION(reduce_forward, "pairtile::similarity_reduce_forward");
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list outputs =
        operation.call(x, y, scale, bias, row_bias, col_bias, plan, factors, metadata, budget, keep);
    const size_t count = (outputs.size() - 1) / 2;
    variable_list saved{x, y, scale, bias.value_or(Tensor()), row_bias.value_or(Tensor()), col_bias.value_or(Tensor())};
    saved.insert(saved.end(), outputs.begin() + count, outputs.end());
    saved.insert(saved.end(), metadata.begin(), metadata.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["plan"] = plan.vec();
    ctx->saved_data["factors"] = factors.vec();
    ctx->saved_data["budget"] = budget;
    ctx->saved_data["count"] = static_cast<int64_t>(count);
    outputs.resize(count);
    const std::vector<bool> differentiable = differentiable_results(plan);
    variable_list constant;
    for (size_t k = 0; k < count; ++k) {
      if (!differentiable[k]) {
        constant.push_back(outputs[k]);
      }
    }
    ctx->mark_non_differentiable(constant);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    PAIRTILE_OPERATION(reduce_backward, "pairtile::similarity_reduce_backward");
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<bool> wanted = wanted_of(ctx, saved, 6);
    const auto statistics = saved.begin() + 6, kept = statistics + ctx->saved_data["count"].toInt();
    variable_list gradients;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      std::array<bool, 6> six;
      std::copy(wanted.begin(), wanted.end(), six.begin());
      gradients = operation.call(saved[0], saved[1], saved[2], optional_of(saved[3]), optional_of(saved[4]),
                                 optional_of(saved[5]), ctx->saved_data["plan"].toIntVector(),
                                 ctx->saved_data["factors"].toDoubleVector(),
                                 variable_list(kept + 1, saved.end()), ctx->saved_data["budget"].toInt(),
                                 variable_list(statistics, kept), *kept, grads, six);
    }
    for (size_t k = 0; k < 6; ++k) {
      gradients[k] = wanted[k] ? gradients[k] : Tensor();
    }
    variable_list inputs(saved.begin(), saved.begin() + 6);
    inputs.insert(inputs.end(), grads.begin(), grads.end());
    gradients = refuse_second(std::move(gradients), inputs);
    // The tensors of the metadata count one by one; plan, factors, budget and keep have none either.
    gradients.resize(6 + 2 + (saved.end() - kept - 1) + 2);
    return gradients;
  }
};

bool any_requires_grad(std::initializer_list<OptionalTensor> tensors) {
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), [](const OptionalTensor& each) {
           return each.has_value() && each->requires_grad();
         });
}

std::vector<Tensor> similarity_reduce(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& bias,
                                      const OptionalTensor& row_bias, const OptionalTensor& col_bias,
                                      at::IntArrayRef plan, at::ArrayRef<double> factors, at::TensorList metadata,
                                      int64_t budget) {
  const bool keep = any_requires_grad({x, y, scale, bias, row_bias, col_bias});
  return SimilarityReduce::apply(x, y, scale, bias, row_bias, col_bias, plan, factors, metadata, budget, keep);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pairtile, m) {
  m.def(
      "similarity_reduce(Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? row_bias, Tensor? col_bias, "
      "int[] plan, float[] factors, Tensor[] metadata, int budget) -> Tensor[]");
  m.def(
      "similarity_reduce_forward(Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? row_bias, Tensor? col_bias, "
      "int[] plan, float[] factors, Tensor[] metadata, int budget, bool keep) -> Tensor[]");
  m.def(
      "similarity_reduce_backward(Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? row_bias, Tensor? col_bias, "
      "int[] plan, float[] factors, Tensor[] metadata, int budget, Tensor[] statistics, Tensor kept, Tensor[] grads, bool[6] wanted) "
      "-> Tensor[]");
  m.def("use_portable_product(bool portable) -> bool", &use_portable_product);
}

TORCH_LIBRARY_IMPL(pairtile, CPU, m) {
  m.impl("similarity_reduce_forward", &reduce_forward);
  m.impl("similarity_reduce_backward", &reduce_backward);
}

// Composite: it is made of the operators above, on whatever tensors those take.
TORCH_LIBRARY_IMPL(pairtile, CompositeImplicitAutograd, m) {
  m.impl("similarity_reduce", &similarity_reduce);
}

}  // namespace pairtile
