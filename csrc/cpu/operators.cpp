// The operators and their autograd: what torch.ops.pairtile offers. Shapes and meanings are documented in
// kernels/contrastive; here is only how tensors become problems and back.

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "losses.h"
#include "memory.h"
#include "product.h"

namespace pairtile {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor to_tensor(const std::vector<double>& values, at::ScalarType type) {
  Tensor tensor = at::empty({static_cast<int64_t>(values.size())}, at::TensorOptions().dtype(at::kDouble));
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<double>());
  return tensor.to(type);
}

Tensor to_tensor(const Statistics& known) {
  Tensor both = at::empty({2, static_cast<int64_t>(known.sum.size())}, at::TensorOptions().dtype(at::kDouble));
  double* data = both.mutable_data_ptr<double>();
  std::copy(known.shift.begin(), known.shift.end(), data);
  std::copy(known.sum.begin(), known.sum.end(), data + known.sum.size());
  return both;
}

Statistics to_statistics(const Tensor& both) {
  const Tensor whole = both.contiguous();
  const double* data = whole.const_data_ptr<double>();
  const int64_t length = whole.size(1);
  return {{data, data + length}, {data + length, data + 2 * length}};
}

std::vector<float> to_floats(const Tensor& tensor) {
  const Tensor whole = tensor.to(at::kFloat).contiguous();
  return {whole.const_data_ptr<float>(), whole.const_data_ptr<float>() + whole.numel()};
}

Tensor scalar(double value) { return at::scalar_tensor(value, at::TensorOptions().dtype(at::kFloat)); }

// d/d scale from its rows, in the shape of the scale that was given.
Tensor scale_gradient(const std::vector<double>& rows, const Tensor& scale) {
  const Tensor all = to_tensor(rows, at::kDouble);
  return (scale.numel() == 1 && scale.dim() == 0 ? all.sum() : (scale.numel() == all.numel() ? all : all.sum()))
      .reshape(scale.sizes())
      .to(scale.scalar_type());
}

// A result that is not there. Each is a tensor of its own: results of an operator must not alias each other.
Tensor none() { return at::empty({0}, at::TensorOptions().dtype(at::kFloat)); }
Tensor or_none(const Tensor& tensor) { return tensor.defined() ? tensor : none(); }

// Upstream gradients may be scaled after the fact; 1 is the common case, and then nothing is copied. A tensor
// without data (torch.compile traces with such) cannot be asked.
Tensor times(const Tensor& gradient, const Tensor& upstream) {
  const bool readable = upstream.is_cpu() && !upstream.key_set().has(c10::DispatchKey::Python) &&
                        !upstream.key_set().has(c10::DispatchKey::Functionalize);
  if (readable && upstream.item<double>() == 1.0) {
    return gradient;
  }
  return at::mul(gradient, upstream.to(gradient.scalar_type() == at::kDouble ? at::kDouble : at::kFloat))
      .to(gradient.scalar_type());
}

// Gradients that refuse to be differentiated once more, with a reason. `anchor` ties them to what they depend on.
struct DifferentiatedOnce : torch::autograd::Function<DifferentiatedOnce> {
  static variable_list forward(AutogradContext*, const OptionalTensor& x, const OptionalTensor& y,
                               const OptionalTensor& scale, const OptionalTensor& bias, const OptionalTensor& row_bias,
                               const OptionalTensor& col_bias, const Tensor& anchor) {
    variable_list copies;
    for (const OptionalTensor& each : {x, y, scale, bias, row_bias, col_bias}) {
      copies.push_back(each ? each->clone() : anchor.new_empty({0}));
    }
    return copies;
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "this operator cannot be differentiated twice on the cpp backend: take gradients without "
                "create_graph=True, or compute it under use_backend(\"reference\")");
  }
};

OptionalTensor optional_of(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// The six gradients, undefined where absent; `inputs` is all that they are functions of.
variable_list refuse_second(variable_list gradients, const variable_list& inputs) {
  if (!at::GradMode::is_enabled()) {
    return gradients;
  }
  variable_list ends;
  for (const Tensor& each : inputs) {
    if (each.defined() && each.is_floating_point()) {
      ends.push_back(each.reshape({-1}).narrow(0, 0, 0).to(at::kFloat));
    }
  }
  const variable_list refusing = DifferentiatedOnce::apply(
      optional_of(gradients[0]), optional_of(gradients[1]), optional_of(gradients[2]), optional_of(gradients[3]),
      optional_of(gradients[4]), optional_of(gradients[5]), at::cat(ends));
  for (size_t k = 0; k < 6; ++k) {
    gradients[k] = gradients[k].defined() ? refusing[k] : Tensor();
  }
  return gradients;
}

// ---- similarity_reduce ------------------------------------------------------------------------------------------

// Results, then statistics [2, owners] of each reduction (empty for pair scores), then the kept cosines.
std::vector<Tensor> reduce_forward(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& bias,
                                   const OptionalTensor& row_bias, const OptionalTensor& col_bias,
                                   at::IntArrayRef numbers, at::ArrayRef<double> factors, at::TensorList metadata,
                                   int64_t budget, bool keep) {
  const Problem problem = make_problem(x, y, scale, bias, row_bias, col_bias, budget);
  const Plan plan = decode_plan(numbers, factors, metadata, problem.n, problem.m);
  const Tiles tiles(problem);
  const bool dense = plan.first_dense() != nullptr;
  const int64_t chunks = keep && dense ? kept_chunks(problem, tiles) : 0;
  Tensor kept = empty_in_huge_pages({chunks * tiles.chunk_floats()}, at::TensorOptions().dtype(at::kFloat));
  std::vector<Statistics> known(plan.reductions.size());
  if (dense) {
    known = make_sweep(problem, plan)->forward(kept.mutable_data_ptr<float>(), chunks);
  }
  std::vector<Tensor> outputs, statistics;
  for (size_t k = 0; k < plan.reductions.size(); ++k) {
    const Reduction& reduction = plan.reductions[k];
    if (reduction.kind == Kind::kPairScore) {
      std::vector<double> scores = pair_scores(problem, reduction.positive[0].partner);
      if (!reduction.by_row) {
        std::vector<double> of_columns(problem.m, -std::numeric_limits<double>::infinity());
        for (int64_t i = 0; i < problem.n; ++i) {
          const int64_t j = reduction.positive[0].partner.column_of(i);
          if (j >= 0 && j < problem.m) {
            of_columns[j] = scores[i];
          }
        }
        scores = std::move(of_columns);
      }
      outputs.push_back(to_tensor(scores, at::kFloat));
    } else if (reduction.kind == Kind::kSoftplusSum) {
      outputs.push_back(to_tensor(known[k].sum, at::kFloat));
    } else {
      std::vector<double> results(known[k].sum.size());
      for (size_t i = 0; i < results.size(); ++i) {
        results[i] = std::log(known[k].sum[i]) + known[k].shift[i];  // log(0) = -inf
      }
      outputs.push_back(to_tensor(results, at::kFloat));
    }
    statistics.push_back(to_tensor(known[k]));
  }
  outputs.insert(outputs.end(), statistics.begin(), statistics.end());
  outputs.push_back(kept);
  return outputs;
}

// Gradients of x, y, scale, bias, row_bias and col_bias; empty where not needed.
std::vector<Tensor> reduce_backward(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& bias,
                                    const OptionalTensor& row_bias, const OptionalTensor& col_bias,
                                    at::IntArrayRef numbers, at::ArrayRef<double> factors, at::TensorList metadata,
                                    int64_t budget,
                                    at::TensorList statistics, const Tensor& kept,
                                    at::TensorList grads, std::array<bool, 6> wanted) {
  const Problem problem = make_problem(x, y, scale, bias, row_bias, col_bias, budget);
  const Plan plan = decode_plan(numbers, factors, metadata, problem.n, problem.m);
  std::vector<Upstream> upstream(plan.reductions.size());
  for (size_t k = 0; k < upstream.size(); ++k) {
    upstream[k].coefficient = to_floats(grads[k]);
    if (plan.reductions[k].kind == Kind::kLogSumExp) {
      const Statistics known = to_statistics(statistics[k]);
      upstream[k].shift.assign(known.shift.begin(), known.shift.end());
      for (size_t i = 0; i < known.sum.size(); ++i) {
        float& coefficient = upstream[k].coefficient[i];
        coefficient = known.sum[i] == 0 ? 0.0f : static_cast<float>(coefficient / known.sum[i]);
      }
    }
  }
  const Needed needed{wanted[0], wanted[1], wanted[2], wanted[3] || wanted[4], wanted[5]};
  const int64_t chunks = kept.numel() / Tiles(problem).chunk_floats();
  const Gradients gradients =
      make_sweep(problem, plan)->backward(upstream, needed, kept.const_data_ptr<float>(), chunks);
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

// Calls go through the dispatcher, so that torch.compile and others see them.
#define PAIRTILE_OPERATION(function, name)                                                      \
  static const auto operation =                                                                 \
      c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<decltype(function)>()

// Which of the first `count` saved inputs want a gradient. Edges are counted over those that exist.
std::vector<bool> wanted_of(const AutogradContext* ctx, const variable_list& saved, size_t count) {
  std::vector<bool> wanted(count);
  size_t edge = 0;
  for (size_t k = 0; k < count; ++k) {
    wanted[k] = saved[k].defined() && ctx->needs_input_grad(edge);
    edge += saved[k].defined();
  }
  return wanted;
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

// ---- cross_entropy_sum ------------------------------------------------------------------------------------------

CrossEntropy make_cross_entropy(const Problem& problem, const OptionalTensor& targets, int64_t offset,
                                double row_weight, double col_weight) {
  TORCH_CHECK(!targets || col_weight == 0, "cross_entropy_sum: targets belong to rows; col_weight=", col_weight,
              " needs the diagonal");
  TORCH_CHECK(!targets || (targets->scalar_type() == at::kLong && targets->is_contiguous() &&
                           targets->numel() == problem.n),
              "cross_entropy_sum: targets must be contiguous int64, one for each row of x");
  return {{offset, targets ? targets->const_data_ptr<int64_t>() : nullptr}, row_weight, col_weight};
}

// One-directional with gradients wanted: {value, dx, dy, dscale}. Otherwise {value, row statistics, column
// statistics, own scores, kept cosines}, the last four empty where no gradient is wanted.
std::vector<Tensor> cross_entropy_forward(const Tensor& x, const Tensor& y, const Tensor& scale,
                                          const OptionalTensor& targets, int64_t offset, double row_weight,
                                          double col_weight, int64_t budget, std::array<bool, 3> wanted) {
  const Problem problem = make_problem(x, y, scale, std::nullopt, std::nullopt, std::nullopt, budget);
  const CrossEntropy loss = make_cross_entropy(problem, targets, offset, row_weight, col_weight);
  const bool any = wanted[0] || wanted[1] || wanted[2];
  if (any && col_weight == 0) {
    Gradients gradients;
    const double value = cross_entropy_in_one_go(problem, loss, {wanted[0], wanted[1], wanted[2]}, gradients);
    return {scalar(value), or_none(gradients.x), or_none(gradients.y),
            wanted[2] ? scale_gradient(gradients.scale, scale) : none()};
  }
  const Plan plan = cross_entropy_plan(loss);
  const Tiles tiles(problem);
  const int64_t chunks = any ? kept_chunks(problem, tiles) : 0;
  Tensor kept = empty_in_huge_pages({chunks * tiles.chunk_floats()}, at::TensorOptions().dtype(at::kFloat));
  std::vector<Statistics> known = make_sweep(problem, plan)->forward(kept.mutable_data_ptr<float>(), chunks);
  CrossEntropyState state{std::move(known[0]), std::move(known[1]), pair_scores(problem, loss.partner)};
  const Tensor value = scalar(cross_entropy_value(problem, loss, state));
  if (!any) {
    return {value, none(), none(), none(), none()};
  }
  return {value, to_tensor(state.rows), to_tensor(state.cols), to_tensor(state.own, at::kDouble), kept};
}

std::vector<Tensor> cross_entropy_backward(const Tensor& x, const Tensor& y, const Tensor& scale, int64_t offset,
                                           double row_weight, double col_weight, int64_t budget, const Tensor& rows,
                                           const Tensor& cols, const Tensor& own, const Tensor& kept,
                                           const Tensor& grad, std::array<bool, 3> wanted) {
  const Problem problem = make_problem(x, y, scale, std::nullopt, std::nullopt, std::nullopt, budget);
  const CrossEntropy loss = make_cross_entropy(problem, std::nullopt, offset, row_weight, col_weight);
  const double* scores = own.const_data_ptr<double>();
  const CrossEntropyState state{to_statistics(rows), to_statistics(cols), {scores, scores + own.numel()}};
  std::vector<Upstream> upstream;
  cross_entropy_upstream(problem, loss, state, grad.item<double>(), upstream);
  const Plan plan = cross_entropy_plan(loss);
  const int64_t chunks = kept.numel() / Tiles(problem).chunk_floats();
  const Gradients gradients = make_sweep(problem, plan)->backward(upstream, {wanted[0], wanted[1], wanted[2]},
                                                                  kept.const_data_ptr<float>(), chunks);
  return {or_none(gradients.x), or_none(gradients.y),
          wanted[2] ? scale_gradient(gradients.scale, scale) : none()};
}

// Gradients that the forward computed, times the upstream scalar.
variable_list scaled(const variable_list& saved, size_t first, const std::vector<bool>& wanted, const Tensor& grad) {
  variable_list gradients(wanted.size());
  for (size_t k = 0; k < wanted.size(); ++k) {
    if (wanted[k]) {
      gradients[k] = times(saved[first + k], grad);
    }
  }
  return gradients;
}

struct CrossEntropySum : torch::autograd::Function<CrossEntropySum> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const Tensor& scale,
                        const OptionalTensor& targets, int64_t offset, double row_weight, double col_weight,
                        int64_t budget, std::array<bool, 3> wanted) {
    PAIRTILE_OPERATION(cross_entropy_forward, "pairtile::cross_entropy_sum_forward");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list outputs =
        operation.call(x, y, scale, targets, offset, row_weight, col_weight, budget, wanted);
    variable_list saved{x, y, scale};
    saved.insert(saved.end(), outputs.begin() + 1, outputs.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["offset"] = offset;
    ctx->saved_data["row_weight"] = row_weight;
    ctx->saved_data["col_weight"] = col_weight;
    ctx->saved_data["budget"] = budget;
    return outputs[0];
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    PAIRTILE_OPERATION(cross_entropy_backward, "pairtile::cross_entropy_sum_backward");
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<bool> wanted = wanted_of(ctx, saved, 3);
    variable_list gradients;
    if (saved.size() == 6) {
      at::AutoDispatchBelowADInplaceOrView guard;
      gradients = scaled(saved, 3, wanted, grads[0]);
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;
      gradients = operation.call(saved[0], saved[1], saved[2], ctx->saved_data["offset"].toInt(),
                                 ctx->saved_data["row_weight"].toDouble(), ctx->saved_data["col_weight"].toDouble(),
                                 ctx->saved_data["budget"].toInt(), saved[3], saved[4], saved[5], saved[6], grads[0],
                                 {wanted[0], wanted[1], wanted[2]});
      for (size_t k = 0; k < 3; ++k) {
        gradients[k] = wanted[k] ? gradients[k] : Tensor();
      }
    }
    gradients.resize(6);
    gradients = refuse_second(std::move(gradients), {saved[0], saved[1], saved[2], grads[0]});
    gradients.resize(9);
    return gradients;
  }
};

Tensor cross_entropy_sum(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& targets,
                         int64_t offset, double row_weight, double col_weight, int64_t budget) {
  if (row_weight == 0 && col_weight != 0 && !targets && scale.numel() == 1) {
    return cross_entropy_sum(y, x, scale, std::nullopt, -offset, col_weight, 0, budget);
  }
  const bool graph = at::GradMode::is_enabled();
  return CrossEntropySum::apply(
      x, y, scale, targets, offset, row_weight, col_weight, budget,
      std::array<bool, 3>{graph && x.requires_grad(), graph && y.requires_grad(), graph && scale.requires_grad()});
}

// ---- sigmoid_sum ------------------------------------------------------------------------------------------------

// {value, dx, dy, dscale, dbias}, the gradients empty where not wanted.
std::vector<Tensor> sigmoid_forward(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& bias,
                                    int64_t offset, double weight, int64_t budget, std::array<bool, 4> wanted) {
  const Problem problem = make_problem(x, y, scale, bias, std::nullopt, std::nullopt, budget);
  const Partner positive{offset, nullptr};
  if (!(wanted[0] || wanted[1] || wanted[2] || wanted[3])) {
    return {scalar(sigmoid_value(problem, positive, weight)), none(), none(), none(), none()};
  }
  Gradients gradients;
  const double value = sigmoid_in_one_go(problem, positive, weight, {wanted[0], wanted[1], wanted[2], wanted[3]}, gradients);
  return {scalar(value), or_none(gradients.x), or_none(gradients.y),
          wanted[2] ? scale_gradient(gradients.scale, scale) : none(),
          wanted[3] ? to_tensor(gradients.row, at::kDouble).sum().reshape(bias->sizes()).to(bias->scalar_type()) : none()};
}

struct SigmoidSum : torch::autograd::Function<SigmoidSum> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const Tensor& scale,
                        const OptionalTensor& bias, int64_t offset, double weight, int64_t budget,
                        std::array<bool, 4> wanted) {
    PAIRTILE_OPERATION(sigmoid_forward, "pairtile::sigmoid_sum_forward");
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list outputs = operation.call(x, y, scale, bias, offset, weight, budget, wanted);
    variable_list saved{x, y, scale, bias.value_or(Tensor())};
    saved.insert(saved.end(), outputs.begin() + 1, outputs.end());
    ctx->save_for_backward(saved);
    return outputs[0];
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list gradients;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      gradients = scaled(saved, 4, wanted_of(ctx, saved, 4), grads[0]);
    }
    gradients.resize(6);
    gradients = refuse_second(std::move(gradients), {saved[0], saved[1], saved[2], saved[3], grads[0]});
    gradients.resize(8);
    return gradients;
  }
};

Tensor sigmoid_sum(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& bias, int64_t offset,
                   double weight, int64_t budget) {
  const bool graph = at::GradMode::is_enabled();
  return SigmoidSum::apply(x, y, scale, bias, offset, weight, budget,
                           std::array<bool, 4>{graph && x.requires_grad(), graph && y.requires_grad(),
                                               graph && scale.requires_grad(),
                                               graph && bias.has_value() && bias->requires_grad()});
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
  m.def(
      "cross_entropy_sum(Tensor x, Tensor y, Tensor scale, Tensor? targets, int offset, float row_weight, "
      "float col_weight, int budget) -> Tensor");
  m.def(
      "cross_entropy_sum_forward(Tensor x, Tensor y, Tensor scale, Tensor? targets, int offset, float row_weight, "
      "float col_weight, int budget, bool[3] wanted) -> Tensor[]");
  m.def(
      "cross_entropy_sum_backward(Tensor x, Tensor y, Tensor scale, int offset, float row_weight, float col_weight, "
      "int budget, Tensor rows, Tensor cols, Tensor own, Tensor kept, Tensor grad, bool[3] wanted) -> Tensor[]");
  m.def(
      "sigmoid_sum(Tensor x, Tensor y, Tensor scale, Tensor? bias, int offset, float weight, int budget) -> Tensor");
  m.def(
      "sigmoid_sum_forward(Tensor x, Tensor y, Tensor scale, Tensor? bias, int offset, float weight, int budget, "
      "bool[4] wanted) -> Tensor[]");
  m.def("use_portable_product(bool portable) -> bool", &use_portable_product);
}

TORCH_LIBRARY_IMPL(pairtile, CPU, m) {
  m.impl("similarity_reduce_forward", &reduce_forward);
  m.impl("similarity_reduce_backward", &reduce_backward);
  m.impl("cross_entropy_sum_forward", &cross_entropy_forward);
  m.impl("cross_entropy_sum_backward", &cross_entropy_backward);
  m.impl("sigmoid_sum_forward", &sigmoid_forward);
}

// Composite: they are made of the operators above, on whatever tensors those take.
TORCH_LIBRARY_IMPL(pairtile, CompositeImplicitAutograd, m) {
  m.impl("similarity_reduce", &similarity_reduce);
  m.impl("cross_entropy_sum", &cross_entropy_sum);
  m.impl("sigmoid_sum", &sigmoid_sum);
}

}  // namespace pairtile
