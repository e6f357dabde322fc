// What the operators share: tensors from results and back, and the rules of their autograd.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <vector>

#include "sweep.h"

namespace pairtile {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor to_tensor(const std::vector<double>& values, at::ScalarType type);

// [2, owners]: shift and sum; [3, owners] with the mean of an expectation.
Tensor to_tensor(const Statistics& known);
Statistics to_statistics(const Tensor& all);

std::vector<float> to_floats(const Tensor& tensor);

// d/d scale from its rows, in the shape of the scale that was given.
Tensor scale_gradient(const std::vector<double>& rows, const Tensor& scale);

// A result that is not there. Each is a tensor of its own: results of an operator must not alias each other.
Tensor none();
Tensor or_none(const Tensor& tensor);

OptionalTensor optional_of(const Tensor& tensor);

// The six gradients, undefined where absent, refusing to be differentiated once more; `inputs` is all that they are
// functions of.
variable_list refuse_second(variable_list gradients, const variable_list& inputs);

// Which of the first `count` saved inputs want a gradient. Edges are counted over those that exist.
std::vector<bool> wanted_of(const AutogradContext* ctx, const variable_list& saved, size_t count);

// Calls go through the dispatcher, so that torch.compile and others see them.
#define PAIRTILE_OPERATION(function, name)                                                      \
  static const auto operation =                                                                 \
      c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<decltype(function)>()

}  // namespace pairtile
