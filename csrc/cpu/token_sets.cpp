#include "token_sets.h"

#include <c10/util/Exception.h>

namespace pairtile {

TokenSets make_token_sets(const at::Tensor& tokens, const at::Tensor& starts, const at::Tensor& lengths,
                          const std::optional<at::Tensor>& keep, const char* name) {
  TORCH_CHECK(tokens.dim() == 2 && (tokens.scalar_type() == at::kFloat || tokens.scalar_type() == at::kHalf ||
                                    tokens.scalar_type() == at::kBFloat16),
              name, ": expected float32, float16 or bfloat16 tokens [rows, features], got ", tokens.scalar_type(), " ",
              tokens.sizes());
  TORCH_CHECK(starts.scalar_type() == at::kLong && lengths.scalar_type() == at::kLong && starts.dim() == 1 &&
                  starts.sizes() == lengths.sizes(),
              name, ": expected int64 starts and lengths, one of each for a set");
  TORCH_CHECK(!keep.has_value() || (keep->scalar_type() == at::kBool && keep->dim() == 1 &&
                                    keep->size(0) == tokens.size(0)),
              name, ": expected keep as bool [", tokens.size(0), "]");
  TokenSets sets{tokens.contiguous(), starts.contiguous(), lengths.contiguous(),
                 keep.has_value() ? keep->contiguous() : at::Tensor()};
  // Positions in a set are carried as floats in the vectors that find a maximum.
  constexpr int64_t kLongest = int64_t{1} << 24;
  for (int64_t i = 0; i < sets.count(); ++i) {
    const int64_t start = sets.start(i), length = sets.length(i);
    TORCH_CHECK(start >= 0 && length >= 0 && length <= sets.rows() - start, name, ": set ", i, " has the rows ", start,
                " to ", start + length, " of ", sets.rows(), " tokens");
    TORCH_CHECK(length < kLongest, name, ": set ", i, " has ", length, " tokens; the C++ kernels take fewer than ",
                kLongest, ", use_backend(\"torch\") takes more");
  }
  return sets;
}

Pairs make_pairs(const TokenSets& x, const TokenSets& y, int64_t candidates) {
  TORCH_CHECK(x.width() == y.width() && x.tokens.scalar_type() == y.tokens.scalar_type(),
              "late interaction: tokens of one width and dtype, got ", x.tokens.scalar_type(), " ", x.tokens.sizes(),
              " and ", y.tokens.scalar_type(), " ", y.tokens.sizes());
  TORCH_CHECK(candidates >= 0 && (candidates == 0 || y.count() == x.count() * candidates), "late interaction: ",
              candidates, " candidates for each of ", x.count(), " sets, got ", y.count());
  return {x.count(), y.count(), candidates};
}

}  // namespace pairtile
