// Maxima over rows that are read once from memory: the products stay in registers, and the rows to come are fetched
// while these are multiplied. For few columns, where a tile product would wait for memory.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstring>

#include "vec.h"

namespace pairtile {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kStreamRows = 12;  // times two vectors of columns: 24 accumulators of 32 registers
#else
constexpr int kStreamRows = 6;
#endif

// What is multiplied at once: a number, or a pair of bfloat16.
template <typename T>
struct Step;

template <>
struct Step<float> {
  using Operand = Vec;
  static constexpr bool kExists = true;
  static constexpr int64_t kDepth = 1;
  static Operand broadcast(const float* from) { return Vec(*from); }
  static Operand load(const float* from) { return Vec::loadu(from); }
  static Vec add(Operand a, Operand b, Vec sum) { return at::vec::fmadd(a, b, sum); }
};

template <>
struct Step<at::BFloat16> {
  static constexpr int64_t kDepth = 2;
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  using Operand = __m512bh;
  static constexpr bool kExists = true;
  static Operand broadcast(const at::BFloat16* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Operand load(const at::BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Vec add(Operand a, Operand b, Vec sum) { return _mm512_dpbf16_ps(sum, a, b); }
#else
  static constexpr bool kExists = false;
#endif
};

// values = max(values, rows of A times some columns of B); bit r of `counted` says whether row r takes part.
template <int rows, int vectors, typename T>
inline void stream_block(const T* a, int64_t lda, int64_t depth, const T* b, int64_t width, uint32_t counted,
                         float* values) {
  using S = Step<T>;
  // Far enough ahead to arrive in time, and near enough to stay in the first-level cache.
  const T* ahead = a + 8 * kStreamRows * lda;
  constexpr int64_t kLine = 64 / sizeof(T);
  Vec sum[rows][vectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = Vec(0.0f);
    }
  }
  for (int64_t line = 0; line < depth; line += kLine) {
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      __builtin_prefetch(ahead + r * lda + line, 0, 2);
    }
    const int64_t end = std::min(line + kLine, depth);
#pragma GCC unroll 1
    for (int64_t k = line; k < end; k += S::kDepth) {
      typename S::Operand column[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        column[v] = S::load(b + k * width + v * kLanes * S::kDepth);
      }
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const typename S::Operand element = S::broadcast(a + r * lda + k);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
          sum[r][v] = S::add(element, column[v], sum[r][v]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < vectors; ++v) {
    Vec best = Vec::loadu(values + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      if (counted >> r & 1) {
        best = at::vec::maximum(best, sum[r][v]);
      }
    }
    best.store(values + v * kLanes);
  }
}

template <int rows, typename T>
void stream_rows(const T* a, int64_t lda, int64_t depth, const T* b, int64_t width, uint32_t counted, float* values) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
    stream_block<rows, 2>(a, lda, depth, b + c * Step<T>::kDepth, width, counted, values + c);
  }
  for (; c < width; c += kLanes) {
    stream_block<rows, 1>(a, lda, depth, b + c * Step<T>::kDepth, width, counted, values + c);
  }
}

// values [width] = max(values, A B) over the rows of A [rows, depth] that keep (one bool a row; null: all) lets count.
template <typename T>
void stream_maxima(const T* a, int64_t rows, int64_t depth, const bool* keep, const T* b, int64_t width,
                   float* values) {
  auto counted = [&](int64_t row, int count) {
    uint32_t bits = 0;
    for (int r = 0; r < count; ++r) {
      bits |= static_cast<uint32_t>(keep == nullptr || keep[row + r]) << r;
    }
    return bits;
  };
  for (int64_t row = 0; row < rows; row += kStreamRows) {
    // The last block takes rows of the one before once more, which changes no maximum.
    const int64_t first = std::min(row, std::max<int64_t>(0, rows - kStreamRows));
    if (rows >= kStreamRows) {
      if (const uint32_t bits = counted(first, kStreamRows)) {
        stream_rows<kStreamRows>(a + first * depth, depth, depth, b, width, bits, values);
      }
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (counted(r, 1)) {
        stream_rows<1>(a + r * depth, depth, depth, b, width, 1, values);
      }
    }
  }
}

}  // namespace pairtile
