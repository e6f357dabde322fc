// The product of two tiles, C (+)= A B, on one thread.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <string>

namespace pairtile {

// A [m, k] row by row. B [k, n]: float row by row; bfloat16 in pairs along k, [k/2][n][2], k even, ldb in pairs.
// C [m, n] float, row by row; `add` keeps what C holds. The bits of an
// entry of C do not depend on m and n; they do on how a long k is cut into several calls.
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool add);
void product(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb,
             float* c, int64_t ldc, bool add);

// Whether bfloat16 tiles can be multiplied as they are; otherwise they are converted to float first.
bool multiplies_bfloat16();

// Whether torch's brgemm multiplies float or bfloat16 tiles here, in words.
std::string describe_brgemm(at::ScalarType type);

// Gives back what a thread's matrix unit holds (AMX); cheap elsewhere.
void release_product();

// Use the portable kernel even where torch offers brgemm (tests run both). Returns the previous setting.
bool use_portable_product(bool portable);

}  // namespace pairtile
