// A batch of tokens [B, N, C] where it lies: samples and tokens at any distance, channels side by side.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace pairtile {

struct TokenBatch {
  at::Tensor tokens;  // owns the memory
  int64_t batch, count, width;
  int64_t sample_stride, stride;  // in numbers

  at::ScalarType type() const { return tokens.scalar_type(); }
  template <typename T>
  const T* sample(int64_t b) const {
    return tokens.const_data_ptr<T>() + b * sample_stride;
  }
};

// float32, float16 or bfloat16; copied only where channels are apart, or tokens overlap.
TokenBatch make_token_batch(const at::Tensor& tokens, const char* name);

// Calls body(a number of the tokens' type).
template <typename Body>
void with_token_type(at::ScalarType type, const Body& body) {
  if (type == at::kFloat) {
    body(float{});
  } else if (type == at::kHalf) {
    body(at::Half{});
  } else {
    body(at::BFloat16{});
  }
}

}  // namespace pairtile
