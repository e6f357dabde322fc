// Two ways to multiply tiles: torch's brgemm (oneDNN's micro-kernels, compiled at run time for this CPU), and a
// register-tiled loop over at::vec for machines or versions of torch without it.

#include "product.h"

#include <algorithm>
#include <atomic>
#include <exception>

#include "vec.h"

// An internal interface of ATen: used where the header declares it and build.py found the symbol exported.
#if defined(PAIRTILE_BRGEMM) && __has_include(<ATen/native/CPUBlas.h>)
#include <ATen/native/CPUBlas.h>
#endif
#if defined(CPUBLAS_BRGEMM_F32F32F32) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
#define PAIRTILE_HAS_BRGEMM 1
#else
#define PAIRTILE_HAS_BRGEMM 0
#endif

namespace pairtile {
namespace {

std::atomic<bool> portable_chosen{false};

#if PAIRTILE_HAS_BRGEMM
// A CPU may refuse a type, and says so by an exception at the first call.
template <typename T>
bool brgemm_works() {
  static const bool works = [] {
    T a[4] = {T(1), T(2), T(3), T(4)};
    T b[4] = {T(1), T(1), T(1), T(1)};
    float c[4] = {0, 0, 0, 0};
    try {
      at::native::cpublas::brgemm(2, 2, 2, 2, 2, 2, false, a, b, c);
      at::native::cpublas::brgemm_release();
    } catch (const std::exception&) {
      return false;
    }
    return c[0] == 3 && c[3] == 7;
  }();
  return works;
}
#endif

bool use_brgemm() {
#if PAIRTILE_HAS_BRGEMM
  return !portable_chosen.load(std::memory_order_relaxed) && brgemm_works<float>();
#else
  return false;
#endif
}

// Registers hold kRows x kVectors accumulators, one row of B and one element of A: 29 of AVX-512's 32, 15 of 16 else.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = 6, kVectors = 4;
#else
constexpr int kRows = 6, kVectors = 2;
#endif

template <int rows, int vectors>
inline void micro_kernel(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                         bool add, int64_t last) {
  Vec sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int64_t count = v == vectors - 1 ? last : kLanes;
      sum[r][v] = add ? Vec::loadu(c + r * ldc + v * kLanes, count) : Vec(0.0f);
    }
  }
  for (int64_t p = 0; p < k; ++p) {
    Vec row[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const float* from = b + p * ldb + v * kLanes;
      row[v] = v == vectors - 1 && last < kLanes ? Vec::loadu(from, last) : Vec::loadu(from);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec element(a[r * lda + p]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sum[r][v] = at::vec::fmadd(element, row[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sum[r][v].store(c + r * ldc + v * kLanes, v == vectors - 1 ? last : kLanes);
    }
  }
}

template <int vectors>
void strip(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
           bool add, int64_t last) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) {
    micro_kernel<kRows, vectors>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add, last);
  }
  for (; i < m; ++i) {
    micro_kernel<1, vectors>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add, last);
  }
}

void portable_product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                      float* c, int64_t ldc, bool add) {
  constexpr int64_t kDepth = 256;  // of B, such that a strip of it stays in the first-level cache
  for (int64_t p = 0; p < std::max<int64_t>(k, 1); p += kDepth) {
    const int64_t depth = std::min(kDepth, k - p);
    const bool adds = add || p > 0;
    int64_t j = 0;
    for (; j + kVectors * kLanes <= n; j += kVectors * kLanes) {
      strip<kVectors>(m, depth, a + p, lda, b + p * ldb + j, ldb, c + j, ldc, adds, kLanes);
    }
    for (; j < n; j += kLanes) {
      const int64_t last = std::min(kLanes, n - j);
      strip<1>(m, depth, a + p, lda, b + p * ldb + j, ldb, c + j, ldc, adds, last);
    }
  }
}

}  // namespace

bool multiplies_bfloat16() {
#if PAIRTILE_HAS_BRGEMM
  return use_brgemm() && brgemm_works<at::BFloat16>();
#else
  return false;
#endif
}

void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool add) {
#if PAIRTILE_HAS_BRGEMM
  if (use_brgemm() && k > 0) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/false);
    return;
  }
#endif
  portable_product(m, n, k, a, lda, b, ldb, c, ldc, add);
}

void product(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb,
             float* c, int64_t ldc, bool add) {
#if PAIRTILE_HAS_BRGEMM
  if (k > 0) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/true);
    return;
  }
#endif
  for (int64_t i = 0; i < m && !add; ++i) {
    std::fill_n(c + i * ldc, n, 0.0f);  // k = 0: nothing else reaches this point without brgemm
  }
}

void release_product() {
#if PAIRTILE_HAS_BRGEMM
  if (use_brgemm()) {
    at::native::cpublas::brgemm_release();
  }
#endif
}

std::string describe_brgemm(at::ScalarType type) {
#if PAIRTILE_HAS_BRGEMM
  const bool works = type == at::kBFloat16 ? brgemm_works<at::BFloat16>() : brgemm_works<float>();
  return works ? "works" : "refused by this CPU, or wrong on it";
#else
  return "not in this torch";
#endif
}

bool use_portable_product(bool portable) { return portable_chosen.exchange(portable); }

}  // namespace pairtile
