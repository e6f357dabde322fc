#include "token_batch.h"

#include <c10/util/Exception.h>

namespace pairtile {

TokenBatch make_token_batch(const at::Tensor& tokens, const char* name) {
  const at::ScalarType type = tokens.scalar_type();
  TORCH_CHECK(tokens.dim() == 3 && (type == at::kFloat || type == at::kHalf || type == at::kBFloat16), name,
              ": expected float32, float16 or bfloat16 tokens [batch, tokens, channels], got ", type, " ",
              tokens.sizes());
  // Positions are carried as floats in the vectors that find a maximum.
  constexpr int64_t kMost = int64_t{1} << 24;
  TORCH_CHECK(tokens.size(1) < kMost, name, ": ", tokens.size(1), " tokens; the C++ kernels take fewer than ", kMost,
              ", use_backend(\"torch\") takes more");
  const int64_t width = tokens.size(2);
  const bool in_rows =
      (width <= 1 || tokens.stride(2) == 1) && (tokens.size(1) <= 1 || tokens.stride(1) >= width);
  TokenBatch batch;
  batch.tokens = in_rows ? tokens : tokens.clone(at::MemoryFormat::Contiguous);
  batch.batch = tokens.size(0);
  batch.count = tokens.size(1);
  batch.width = width;
  batch.sample_stride = batch.tokens.stride(0);
  batch.stride = batch.count > 1 ? batch.tokens.stride(1) : width;
  return batch;
}

}  // namespace pairtile
