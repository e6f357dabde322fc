// Operands of the tile products, in the layouts of product.h, from row-major features of any type.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace pairtile {

// Width of features as an operand: bfloat16 is multiplied in pairs.
template <typename T>
constexpr int64_t padded_depth(int64_t depth) {
  return std::is_same_v<T, float> ? depth : (depth + 1) / 2 * 2;
}

// Products are cut along k, so that a strip of an operand B stays in the second-level cache.
constexpr int64_t kDepth = 512;

template <typename To, typename From>
void convert_row(const From* from, To* to, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    to[k] = static_cast<To>(static_cast<float>(from[k]));
  }
}

// 16 x 16 blocks by registers, the edges one by one.
inline void transpose(const float* from, int64_t ld_from, int64_t rows, int64_t cols, float* to, int64_t ld_to) {
  const int64_t whole_rows = rows / 16 * 16, whole_cols = cols / 16 * 16;
  for (int64_t r = 0; r < whole_rows; r += 16) {
    for (int64_t c = 0; c < whole_cols; c += 16) {
      at::vec::transpose_mxn<float, 16, 16>(from + r * ld_from + c, ld_from, to + c * ld_to + r, ld_to);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_cols : 0; c < cols; ++c) {
      to[c * ld_to + r] = from[r * ld_from + c];
    }
  }
}

// Rows of features, ld_from apart, as the operand A of the scores: [rows, ld], zero from `count` to ld.
template <typename To, typename From>
void copy_rows(const From* from, int64_t rows, int64_t count, int64_t ld, int64_t ld_from, To* to) {
  for (int64_t r = 0; r < rows; ++r) {
    convert_row(from + r * ld_from, to + r * ld, count);
    std::fill(to + r * ld + count, to + (r + 1) * ld, To(0.0f));
  }
}

// Operands B are packed in strips of 64 columns, one behind the other, so that a product reads memory as it lies.
constexpr int64_t kStrip = 64;

// Features y [rows, d], ld apart, as a strip of the operand B of x y^T: [d][width], width <= 64, zero behind `rows`.
template <typename From>
void pack_transposed(const From* y, int64_t rows, int64_t d, int64_t ld, float* to, int64_t width) {
  constexpr int64_t kStep = 64;
  float strip[16 * kStep];
  for (int64_t r = 0; r < width; r += 16) {
    const int64_t real = std::clamp<int64_t>(rows - r, 0, 16);
    for (int64_t k = 0; k < d; k += kStep) {
      const int64_t depth = std::min(kStep, d - k);
      if constexpr (std::is_same_v<From, float>) {
        if (real == 16) {
          transpose(y + r * ld + k, ld, 16, depth, to + k * width + r, width);
          continue;
        }
      }
      for (int64_t i = 0; i < 16; ++i) {
        if (i < real) {
          convert_row(y + (r + i) * ld + k, strip + i * kStep, depth);
        } else {
          std::fill_n(strip + i * kStep, depth, 0.0f);
        }
      }
      transpose(strip, kStep, 16, depth, to + k * width + r, width);
    }
  }
}

// The same for bfloat16, in pairs along d: [d / 2][width][2]. A pair is moved as the 32 bits of a float.
inline void pack_transposed(const at::BFloat16* y, int64_t rows, int64_t d, int64_t ld, at::BFloat16* to,
                            int64_t width) {
  const int64_t pairs = padded_depth<at::BFloat16>(d) / 2;
  float* out = reinterpret_cast<float*>(to);
  constexpr int64_t kStep = 64;
  float strip[16 * kStep];
  for (int64_t r = 0; r < width; r += 16) {
    const int64_t real = std::clamp<int64_t>(rows - r, 0, 16);
    for (int64_t k = 0; k < pairs; k += kStep) {
      const int64_t depth = std::min(kStep, pairs - k);
      const int64_t bytes = std::min(2 * depth, d - 2 * k) * static_cast<int64_t>(sizeof(at::BFloat16));
      std::memset(strip, 0, sizeof(strip));
      for (int64_t i = 0; i < real; ++i) {
        std::memcpy(strip + i * kStep, y + (r + i) * ld + 2 * k, bytes);
      }
      transpose(strip, kStep, 16, depth, out + k * width + r, width);
    }
  }
}

// Features y [rows, d], ld apart, as the operand B of G y, strip by strip: [d / 64][rows][64] in float, the last one
// narrower.
template <typename From>
void pack_straight(const From* y, int64_t rows, int64_t d, int64_t ld, float* to) {
  for (int64_t k = 0; k < d; k += kStrip) {
    const int64_t width = std::min(kStrip, d - k);
    for (int64_t r = 0; r < rows; ++r) {
      convert_row(y + r * ld + k, to + k * rows + r * width, width);
    }
  }
}

// Two rows of 16-bit numbers as one row of pairs.
inline void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* to, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    to[k] = even[k] | static_cast<uint32_t>(odd[k]) << 16;
  }
}

// In bfloat16, pairs along the rows: [d / 64][rows / 2][64][2], zero behind `rows`.
inline void pack_straight(const at::BFloat16* y, int64_t rows, int64_t d, int64_t ld, at::BFloat16* to) {
  static constexpr uint16_t kZeros[kStrip] = {};
  const uint16_t* from = reinterpret_cast<const uint16_t*>(y);
  uint32_t* out = reinterpret_cast<uint32_t*>(to);
  const int64_t pairs = (rows + 1) / 2;
  for (int64_t k = 0; k < d; k += kStrip) {
    const int64_t width = std::min(kStrip, d - k);
    for (int64_t p = 0; p < pairs; ++p) {
      const uint16_t* even = from + 2 * p * ld + k;
      interleave(even, 2 * p + 1 < rows ? even + ld : kZeros, out + k * pairs + p * width, width);
    }
  }
}

// x [rows, d] transposed: the operand A of x^T G, [d][ld], zero behind `rows` up to `padded`.
template <typename To, typename From>
void pack_turned(const From* x, int64_t rows, int64_t d, To* to, int64_t ld, int64_t padded) {
  float block[16 * 16], turned[16 * 16];
  for (int64_t r = 0; r < padded; r += 16) {
    const int64_t real = std::clamp<int64_t>(rows - r, 0, 16);
    for (int64_t k = 0; k < d; k += 16) {
      const int64_t depth = std::min<int64_t>(16, d - k);
      for (int64_t i = 0; i < 16; ++i) {
        if (i < real) {
          convert_row(x + (r + i) * d + k, block + i * 16, depth);
        } else {
          std::fill_n(block + i * 16, 16, 0.0f);
        }
      }
      at::vec::transpose_mxn<float, 16, 16>(block, 16, turned, 16);
      for (int64_t i = 0; i < depth; ++i) {
        convert_row(turned + i * 16, to + (k + i) * ld + r, 16);
      }
    }
  }
}

// Weights of a tile, rounded, as the operand B of x^T G: [rows / 2][ld][2], zero behind `rows`.
inline void pair_weights(const float* g, int64_t rows, int64_t ld, at::BFloat16* to) {
  uint32_t* out = reinterpret_cast<uint32_t*>(to);
  constexpr int64_t kPart = 64;
  at::BFloat16 even[kPart], odd[kPart];
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t c = 0; c < ld; c += kPart) {
      const int64_t count = std::min(kPart, ld - c);
      convert_row(g + r * ld + c, even, count);
      if (r + 1 < rows) {
        convert_row(g + (r + 1) * ld + c, odd, count);
      } else {
        std::fill_n(odd, count, at::BFloat16(0.0f));
      }
      interleave(reinterpret_cast<uint16_t*>(even), reinterpret_cast<uint16_t*>(odd), out + r / 2 * ld + c, count);
    }
  }
}

}  // namespace pairtile
