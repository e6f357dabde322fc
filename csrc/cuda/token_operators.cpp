// The kernels as operators on tensors: kernels/token_merging/similarity.py and combine.py document what they compute.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "launch.h"

namespace pairtile {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

TokenType token_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return TokenType::kFloat;
    case at::kHalf:
      return TokenType::kHalf;
    case at::kBFloat16:
      return TokenType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "x: expected tokens of float32, float16 or bfloat16, got ", x.scalar_type());
  }
}

int checked_int(int64_t number, const char* name) {
  TORCH_CHECK_VALUE(number >= 0 && number <= std::numeric_limits<int>::max(), name, "=", number,
                    ": expected a number from 0 to 2^31 - 1");
  return static_cast<int>(number);
}

// Rows of channels that lie side by side; copied where they do not.
Tensor with_rows(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x: expected tokens [batch, tokens, channels], got ", x.sizes());
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : x.contiguous();
}

Tokens<void> tokens_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), checked_int(x.size(1), "tokens")};
}

Tensor indices(const Tensor& given, const Tensor& x, const char* name) {
  const bool fits = given.scalar_type() == at::kLong && given.dim() == 2 && given.size(0) == x.size(0);
  TORCH_CHECK_VALUE(fits && given.device() == x.device(), name, ": expected int64 indices of ", x.size(0),
                    " samples on ", x.device(), ", got ", given.scalar_type(), " ", given.sizes(), " on ",
                    given.device());
  return given.contiguous();
}

Tensor numbers(const OptionalTensor& given, const Tensor& x, int64_t count, const char* name) {
  if (!given.has_value()) {
    return {};
  }
  TORCH_CHECK_VALUE(given->sizes() == at::IntArrayRef({x.size(0), count}) && given->device() == x.device(), name,
                    ": expected a number for each of [", x.size(0), ", ", count, "] on ", x.device(), ", got ",
                    given->sizes(), " on ", given->device());
  return given->to(at::kFloat).contiguous();
}

Numbers data_of(const Tensor& numbers) {
  return {numbers.defined() ? numbers.const_data_ptr<float>() : nullptr};
}

std::tuple<Tensor, Tensor, Tensor> select(const Tensor& best, const Tensor& partner, int64_t tokens, int64_t r,
                                          int64_t protected_count, bool class_token, bool distill_token) {
  TORCH_CHECK_VALUE(tokens >= 0 && tokens <= kMostSelectionTokens, "select_pairs: expected at most ",
                    kMostSelectionTokens, " tokens, got ", tokens);
  TORCH_CHECK_VALUE(best.scalar_type() == at::kFloat && best.dim() == 2 && best.size(1) == (tokens + 1) / 2,
                    "best: expected a float32 similarity for each of ", (tokens + 1) / 2, " tokens, got ",
                    best.scalar_type(), " ", best.sizes());
  const Tensor similarity = best.contiguous(), choice = indices(partner, best, "partner");
  TORCH_CHECK_VALUE(choice.sizes() == best.sizes(), "partner: expected one for each of ", best.sizes(), ", got ",
                    choice.sizes());
  TORCH_CHECK_VALUE(r >= 0 && r <= tokens / 2, "select_pairs: r=", r, " of ", tokens, " tokens");
  const Bipartite matching{static_cast<int>(tokens), static_cast<int>(r), checked_int(protected_count, "protected"),
                           class_token, distill_token};
  TORCH_CHECK_VALUE(matching.front() <= tokens - r, "select_pairs: ", matching.front(), " tokens in front of ",
                    tokens - r);
  const int batch = checked_int(best.size(0), "batch");
  const c10::cuda::CUDAGuard guard(best.device());
  const auto options = choice.options();
  const Tensor kept = at::empty({batch, tokens - r}, options);
  const Tensor sources = at::empty({batch, r}, options), places = at::empty({batch, r}, options);
  if (batch > 0 && tokens > 0) {
    const SelectionSample first{similarity.const_data_ptr<float>(), choice.const_data_ptr<int64_t>(),
                                kept.mutable_data_ptr<int64_t>(), sources.mutable_data_ptr<int64_t>(),
                                places.mutable_data_ptr<int64_t>()};
    C10_CUDA_CHECK(launch_select_pairs(matching, batch, first, c10::cuda::getCurrentCUDAStream()));
  }
  return {kept, sources, places};
}

// `totals`, where it is defined, takes the sums of the sizes and is what is divided by.
Tensor combined(const Tensor& given, const Tensor& kept, const Tensor& sources, const Tensor& places,
                const OptionalTensor& factors, const OptionalTensor& sizes, const OptionalTensor& divisors,
                const Tensor& totals) {
  const Tensor x = with_rows(given);
  const Tensor stay = indices(kept, x, "kept"), move = indices(sources, x, "sources");
  const Tensor to = indices(places, x, "places");
  TORCH_CHECK_VALUE(move.sizes() == to.sizes(), "places: expected one for each source ", move.sizes(), ", got ",
                    to.sizes());
  const Tensor factor = numbers(factors, x, x.size(1), "factors"), size = numbers(sizes, x, x.size(1), "sizes");
  const Tensor divisor = numbers(divisors, x, stay.size(1), "divisors");
  const Tensor out = at::empty({x.size(0), stay.size(1), x.size(2)}, x.options());
  const CombineProblem<void> problem{tokens_of(x),
                                     stay.const_data_ptr<int64_t>(),
                                     move.const_data_ptr<int64_t>(),
                                     to.const_data_ptr<int64_t>(),
                                     checked_int(x.size(0), "batch"),
                                     checked_int(stay.size(1), "places"),
                                     checked_int(move.size(1), "sources"),
                                     checked_int(x.size(2), "channels"),
                                     data_of(factor),
                                     data_of(size),
                                     data_of(divisor),
                                     totals.defined() ? totals.mutable_data_ptr<float>() : nullptr,
                                     out.mutable_data_ptr()};
  checked_int(problem.rows(), "rows of the result");
  const c10::cuda::CUDAGuard guard(x.device());
  C10_CUDA_CHECK(launch_combine_tokens(problem, token_type(x), c10::cuda::getCurrentCUDAStream()));
  return out;
}

Tensor combine(const Tensor& x, const Tensor& kept, const Tensor& sources, const Tensor& places,
               const OptionalTensor& factors, const OptionalTensor& divisors) {
  return combined(x, kept, sources, places, factors, {}, divisors, {});
}

std::tuple<Tensor, Tensor> average(const Tensor& x, const Tensor& kept, const Tensor& sources, const Tensor& places,
                                   const OptionalTensor& factors, const OptionalTensor& sizes) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor totals = at::empty(kept.sizes(), kept.options().dtype(at::kFloat));
  return {combined(x, kept, sources, places, factors, sizes, {}, totals), totals};
}

Tensor spread(const Tensor& given, const Tensor& place_of, const OptionalTensor& factors,
              const OptionalTensor& divisors) {
  const Tensor x = with_rows(given), to = indices(place_of, x, "place_of");
  const Tensor factor = numbers(factors, x, to.size(1), "factors");
  const Tensor divisor = numbers(divisors, x, x.size(1), "divisors");
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor out = at::empty({x.size(0), to.size(1), x.size(2)}, x.options());
  const SpreadProblem<void> problem{tokens_of(x),
                                    to.const_data_ptr<int64_t>(),
                                    checked_int(x.size(0), "batch"),
                                    checked_int(to.size(1), "tokens"),
                                    checked_int(x.size(2), "channels"),
                                    data_of(factor),
                                    data_of(divisor),
                                    out.mutable_data_ptr()};
  checked_int(problem.rows(), "rows of the result");
  C10_CUDA_CHECK(launch_spread_tokens(problem, token_type(x), c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace
}  // namespace pairtile

TORCH_LIBRARY_FRAGMENT(pairtile, m) {
  m.def(
      "cuda_select_pairs(Tensor best, Tensor partner, int tokens, int r, int protected_count, bool class_token, "
      "bool distill_token) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_combine_tokens(Tensor x, Tensor kept, Tensor sources, Tensor places, Tensor? factors, Tensor? divisors) -> "
      "Tensor");
  m.def(
      "cuda_average_tokens(Tensor x, Tensor kept, Tensor sources, Tensor places, Tensor? factors, Tensor? sizes) -> "
      "(Tensor, Tensor)");
  m.def("cuda_spread_tokens(Tensor x, Tensor place_of, Tensor? factors, Tensor? divisors) -> Tensor");
}

TORCH_LIBRARY_IMPL(pairtile, CUDA, m) {
  m.impl("cuda_select_pairs", &pairtile::select);
  m.impl("cuda_combine_tokens", &pairtile::combine);
  m.impl("cuda_average_tokens", &pairtile::average);
  m.impl("cuda_spread_tokens", &pairtile::spread);
}
