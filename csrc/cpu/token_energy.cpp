// Every energy is added up over the rows in one order, so that equal tokens have equal energies: the symmetry of the
// similarities, which would save half of the products, is left alone.

#include "token_matching.h"
#include "token_tiles.h"

namespace pairtile {
namespace {

// exp(v) - 1 for v <= 0 to the last bits, where exp(v) - 1 would cancel: 2^n expm1(rest) + (2^n - 1).
inline Vec expm1_of_negative(Vec v) {
  v = at::vec::clamp(v, Vec(-87.0f), Vec(0.0f));
  const Vec n = (v * Vec(1.44269504f)).round();
  // ln 2 in two parts, of which the first has so few digits that n times it is exact.
  const Vec r = at::vec::fmadd(n, Vec(-1.42860677e-6f), at::vec::fmadd(n, Vec(-0.693145752f), v));
  Vec p(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f}) {
    p = at::vec::fmadd(p, r, Vec(c));
  }
  constexpr float kExponent = 1 << 23;
  const auto bits = at::vec::convert_to_int_of_same_size((n + Vec(127.0f)) * Vec(kExponent));
  const Vec power = at::vec::cast<float, int32_t>(bits);
  return at::vec::fmadd(power, p * r, power - Vec(1.0f));
}

// Adds f of a tile's rows to the sums of its columns.
void add_gains(const float* tile, int64_t width, int64_t rows, float margin, float alpha, double* sums) {
  const Vec zero(0.0f), shift(margin), slope(alpha);
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec sum(0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec v = Vec::loadu(tile + r * width + c) - shift;
      sum = sum + Vec::blendv(slope * expm1_of_negative(v), v, v >= zero);
    }
    alignas(64) float of_tile[kLanes];
    sum.store(of_tile);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[c + lane] += of_tile[lane];
    }
  }
}

template <typename From>
void find(const TokenBatch& x, float margin, float alpha, float* energies) {
  constexpr int64_t kRows = TokenTiles<From>::kRows;
  for_each_strip<From>(x, x, false, [&](TokenTiles<From>& tiles, int64_t sample, int64_t first) {
    double sums[kStrip] = {};
    for (int64_t row = 0; row < x.count; row += kRows) {
      const int64_t rows = std::min(kRows, x.count - row);
      add_gains(tiles.multiply(row, rows), tiles.width(), rows, margin, alpha, sums);
    }
    for (int64_t c = 0; c < tiles.columns(); ++c) {
      energies[sample * x.count + first + c] = static_cast<float>(sums[c] / static_cast<double>(x.count));
    }
  });
}

}  // namespace

void find_energies(const TokenBatch& x, float margin, float alpha, float* energies) {
  with_token_type(x.type(), [&](auto from) { find<decltype(from)>(x, margin, alpha, energies); });
}

}  // namespace pairtile
