// cross_entropy_sum and sigmoid_sum: whole losses as operators, documented in kernels/contrastive/sums.py.

#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <array>

#include "autograd.h"
#include "losses.h"
#include "memory.h"

namespace pairtile {
namespace {

Tensor scalar(double value) { return at::scalar_tensor(value, at::TensorOptions().dtype(at::kFloat)); }

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
}

TORCH_LIBRARY_IMPL(pairtile, CPU, m) {
  m.impl("cross_entropy_sum_forward", &cross_entropy_forward);
  m.impl("cross_entropy_sum_backward", &cross_entropy_backward);
  m.impl("sigmoid_sum_forward", &sigmoid_forward);
}

// Composite: they are made of the operators above, on whatever tensors those take.
TORCH_LIBRARY_IMPL(pairtile, CompositeImplicitAutograd, m) {
  m.impl("cross_entropy_sum", &cross_entropy_sum);
  m.impl("sigmoid_sum", &sigmoid_sum);
}

}  // namespace pairtile
