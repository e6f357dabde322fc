// Where tokens are written to, whole and once.
#pragma once

#include <cstring>

#include "operands.h"
#include "token_vec.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace pairtile {

// Tokens [rows, width], side by side. What exceeds the caches goes past them: a line that is overwritten need not be
// read first, which is a third of the traffic of a copy.
template <typename T>
class TokenOutput {
 public:
  TokenOutput(void* data, int64_t rows, int64_t width) : data_(static_cast<T*>(data)), width_(width) {
#if defined(__SSE2__)
    constexpr int64_t kCaches = int64_t{32} << 20;
    const int64_t bytes = width * sizeof(T);
    past_caches_ = rows * bytes > kCaches && bytes % kLine == 0 && reinterpret_cast<uintptr_t>(data) % kLine == 0;
#endif
  }

  void copy(int64_t row, const T* from) const {
    T* to = data_ + row * width_;
    if (!past_caches_) {
      std::memcpy(to, from, width_ * sizeof(T));
      return;
    }
    for (int64_t c = 0; c < width_; c += kLine / sizeof(T)) {
      stream_line(from + c, to + c);
    }
  }

  // width / kLanes calls for a row, from its beginning on; the last of fewer numbers.
  void put(int64_t row, int64_t c, Vec v, int64_t count) const {
    T* to = data_ + row * width_ + c;
    if constexpr (std::is_same_v<T, float>) {
      if (!past_caches_) {
        v.store(to, count);
        return;
      }
    }
    alignas(kLine) float lanes[kLanes];
    alignas(kLine) T rounded[kLanes];
    v.store(lanes);
    convert_row(lanes, rounded, count);
    if (past_caches_) {
      stream<sizeof(rounded)>(rounded, to);
    } else {
      std::memcpy(to, rounded, count * sizeof(T));
    }
  }

  // Ends what one thread writes: others see it from here on.
  void finish() const {
#if defined(__SSE2__)
    if (past_caches_) {
      _mm_sfence();
    }
#endif
  }

 private:
  static constexpr int64_t kLine = 64;

  template <int64_t bytes>
  static void stream(const T* from, T* to) {
#if defined(__SSE2__)
    for (int64_t k = 0; k < bytes; k += 16) {
      const auto* part = reinterpret_cast<const __m128i*>(reinterpret_cast<const char*>(from) + k);
      _mm_stream_si128(reinterpret_cast<__m128i*>(reinterpret_cast<char*>(to) + k), _mm_loadu_si128(part));
    }
#endif
  }
  static void stream_line(const T* from, T* to) { stream<kLine>(from, to); }

  T* data_;
  int64_t width_;
  bool past_caches_ = false;
};

}  // namespace pairtile
