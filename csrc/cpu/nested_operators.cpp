// nested_cross_entropy_sum as operators: kernels/contrastive/nested.py documents them and has their autograd.

#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include "nested.h"

namespace pairtile {
namespace {

using at::Tensor;

NestedProblem make_nested(const Tensor& x, const Tensor& y, double scale, at::IntArrayRef ends,
                          at::ArrayRef<double> weights, double row_weight, double col_weight, int64_t offset,
                          bool normalize, int64_t budget) {
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) && !ends.empty() && ends.back() == x.size(1),
              "nested_cross_entropy_sum: x ", x.sizes(), ", y ", y.sizes(), ", ends ", ends);
  TORCH_CHECK(x.scalar_type() == at::kFloat && y.scalar_type() == at::kFloat && weights.size() == ends.size(),
              "nested_cross_entropy_sum: expected float32 features and a weight for each width");
  for (size_t k = 0; k < ends.size(); ++k) {
    TORCH_CHECK(ends[k] > (k == 0 ? 0 : ends[k - 1]), "nested_cross_entropy_sum: widths have to ascend: ", ends);
  }
  return {x.contiguous(), y.contiguous(), ends.vec(), weights.vec(), scale,
          row_weight,     col_weight,     offset,     normalize,     budget};
}

std::vector<Tensor> forward(const Tensor& x, const Tensor& y, double scale, at::IntArrayRef ends,
                            at::ArrayRef<double> weights, double row_weight, double col_weight, int64_t offset,
                            bool normalize, int64_t budget, bool keep) {
  const NestedProblem problem =
      make_nested(x, y, scale, ends, weights, row_weight, col_weight, offset, normalize, budget);
  const NestedState state = nested_forward(problem, keep);
  return {at::scalar_tensor(state.value, x.options()), state.rows, state.cols, state.own, state.kept};
}

std::vector<Tensor> backward(const Tensor& x, const Tensor& y, double scale, at::IntArrayRef ends,
                             at::ArrayRef<double> weights, double row_weight, double col_weight, int64_t offset,
                             bool normalize, int64_t budget, const Tensor& rows, const Tensor& cols, const Tensor& own,
                             const Tensor& kept, double upstream) {
  const NestedProblem problem =
      make_nested(x, y, scale, ends, weights, row_weight, col_weight, offset, normalize, budget);
  const NestedGradients gradients = nested_backward(problem, {0, rows, cols, own, kept}, upstream);
  return {gradients.x, gradients.y, at::scalar_tensor(gradients.scale, x.options())};
}

}  // namespace
}  // namespace pairtile

TORCH_LIBRARY_FRAGMENT(pairtile, m) {
  m.def(
      "nested_cross_entropy_forward(Tensor x, Tensor y, float scale, int[] ends, float[] weights, float row_weight, "
      "float col_weight, int offset, bool normalize, int budget, bool keep) -> Tensor[]");
  m.def(
      "nested_cross_entropy_backward(Tensor x, Tensor y, float scale, int[] ends, float[] weights, float row_weight, "
      "float col_weight, int offset, bool normalize, int budget, Tensor rows, Tensor cols, Tensor own, Tensor kept, "
      "float upstream) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(pairtile, CPU, m) {
  m.impl("nested_cross_entropy_forward", &pairtile::forward);
  m.impl("nested_cross_entropy_backward", &pairtile::backward);
}
