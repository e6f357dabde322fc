#include "autograd.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace pairtile {
namespace {

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

}  // namespace

Tensor to_tensor(const std::vector<double>& values, at::ScalarType type) {
  Tensor tensor = at::empty({static_cast<int64_t>(values.size())}, at::TensorOptions().dtype(at::kDouble));
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<double>());
  return tensor.to(type);
}

Tensor to_tensor(const Statistics& known) {
  const int64_t owners = static_cast<int64_t>(known.sum.size());
  Tensor all = at::empty({known.mean.empty() ? 2 : 3, owners}, at::TensorOptions().dtype(at::kDouble));
  double* data = all.mutable_data_ptr<double>();
  for (const std::vector<double>* each : {&known.shift, &known.sum, &known.mean}) {
    data = std::copy(each->begin(), each->end(), data);
  }
  return all;
}

Statistics to_statistics(const Tensor& all) {
  const Tensor whole = all.contiguous();
  const double* data = whole.const_data_ptr<double>();
  const int64_t length = whole.size(1);
  Statistics known{{data, data + length}, {data + length, data + 2 * length}, {}, {}, {}};
  known.mean.assign(data + 2 * length, data + whole.numel());
  return known;
}

std::vector<float> to_floats(const Tensor& tensor) {
  const Tensor whole = tensor.to(at::kFloat).contiguous();
  return {whole.const_data_ptr<float>(), whole.const_data_ptr<float>() + whole.numel()};
}

Tensor scale_gradient(const std::vector<double>& rows, const Tensor& scale) {
  const Tensor all = to_tensor(rows, at::kDouble);
  return (scale.numel() == 1 && scale.dim() == 0 ? all.sum() : (scale.numel() == all.numel() ? all : all.sum()))
      .reshape(scale.sizes())
      .to(scale.scalar_type());
}

Tensor none() { return at::empty({0}, at::TensorOptions().dtype(at::kFloat)); }
Tensor or_none(const Tensor& tensor) { return tensor.defined() ? tensor : none(); }

OptionalTensor optional_of(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

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

std::vector<bool> wanted_of(const AutogradContext* ctx, const variable_list& saved, size_t count) {
  std::vector<bool> wanted(count);
  size_t edge = 0;
  for (size_t k = 0; k < count; ++k) {
    wanted[k] = saved[k].defined() && ctx->needs_input_grad(edge);
    edge += saved[k].defined();
  }
  return wanted;
}

}  // namespace pairtile
