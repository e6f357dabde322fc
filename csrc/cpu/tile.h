// What is done with a tile of scores while it is in cache: sums of it, and its weights d(results) / dS.
//
// A tile holds cosines c_ij, row by row; S_ij = scale_i c_ij + offset_i is made on the way. Its width is padded to
// 16, and behind its columns it holds -inf, which every pass turns into an exact 0.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace pairtile {

struct Tile {
  float* data;
  int64_t ld;           // padded width
  int64_t row0, rows;   // rows row0 : row0 + rows of S
  int64_t col0, cols;
  float* row(int64_t r) const { return data + r * ld; }
};

// Calls strip(number of vectors, column) over the padded width, four vectors at a time.
template <typename Strip>
inline void for_each_strip(int64_t width, const Strip& strip) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= width; c += 4 * kLanes) {
    strip(std::integral_constant<int, 4>{}, c);
  }
  for (; c < width; c += kLanes) {
    strip(std::integral_constant<int, 1>{}, c);
  }
}

// Lane-wise partial sums of the rows of a tile, reduced once at its end.
class RowSums {
 public:
  explicit RowSums(float* storage, int64_t rows) : lanes_(storage), rows_(rows) {
    std::fill_n(lanes_, rows * kLanes, 0.0f);
  }
  void add(int64_t r, Vec v) { (Vec::loadu(lanes_ + r * kLanes) + v).store(lanes_ + r * kLanes); }
  void add_to(double* sums) const {
    for (int64_t r = 0; r < rows_; ++r) {
      sums[r] += sum_lanes(Vec::loadu(lanes_ + r * kLanes));
    }
  }

 private:
  float* lanes_;
  int64_t rows_;
};

template <int vectors>
inline Vec sum_of(const Vec (&v)[vectors]) {
  if constexpr (vectors == 4) {
    return (v[0] + v[1]) + (v[2] + v[3]);
  } else {
    return v[0];
  }
}

// Sums of f(S) along rows (lane-wise, into row_sums) and columns (col_sums, overwritten); either may be absent.
template <bool by_row, bool by_col, typename Function>
void sum_tile(const Tile& tile, const float* scale, const float* offset, RowSums* row_sums, float* col_sums,
              const Function& f) {
  for_each_strip(tile.ld, [&](auto count, int64_t c) {
    constexpr int vectors = decltype(count)::value;
    Vec columns[vectors];
    for (int v = 0; v < vectors; ++v) {
      columns[v] = Vec(0.0f);
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const Vec a(scale[r]), b(offset[r]);
      Vec value[vectors];
      for (int v = 0; v < vectors; ++v) {
        value[v] = f(at::vec::fmadd(a, Vec::loadu(tile.row(r) + c + v * kLanes), b));
        if constexpr (by_col) {
          columns[v] = columns[v] + value[v];
        }
      }
      if constexpr (by_row) {
        row_sums->add(r, sum_of(value));
      }
    }
    if constexpr (by_col) {
      for (int v = 0; v < vectors; ++v) {
        columns[v].store(col_sums + c + v * kLanes);
      }
    }
  });
}

// out = f(r, S) * (row_factor + col_factor); the factors of an axis may be absent, or those of both.
template <bool by_row, bool by_col, typename Function>
void weigh_tile(const Tile& tile, const float* scale, const float* offset, const float* row_factor,
                const float* col_factor, float* out, const Function& f) {
  for_each_strip(tile.ld, [&](auto count, int64_t c) {
    constexpr int vectors = decltype(count)::value;
    Vec columns[vectors];
    for (int v = 0; v < vectors; ++v) {
      columns[v] = by_col ? Vec::loadu(col_factor + c + v * kLanes) : Vec(0.0f);
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const Vec a(scale[r]), b(offset[r]), row(by_row ? row_factor[r] : 0.0f);
      for (int v = 0; v < vectors; ++v) {
        const Vec score = at::vec::fmadd(a, Vec::loadu(tile.row(r) + c + v * kLanes), b);
        Vec value = f(r, score);
        if constexpr (by_row || by_col) {
          value = value * (by_row && by_col ? row + columns[v] : (by_row ? row : columns[v]));
        }
        value.store(out + r * tile.ld + c + v * kLanes);
      }
    }
  });
}

// Takes pairs out of a tile by a score of -inf, and puts them back: the tile may be needed again.
class Removed {
 public:
  void remove(Tile& tile, int64_t r, int64_t c) {
    float* where = tile.row(r) + c;
    taken_.push_back({where, *where, r, c});
    *where = -kInfinity;
  }
  void restore() {
    for (const Pair& pair : taken_) {
      *pair.where = pair.cosine;
    }
    taken_.clear();
  }
  void forget() { taken_.clear(); }

  struct Pair {
    float* where;
    float cosine;
    int64_t r, c;
  };
  const std::vector<Pair>& pairs() const { return taken_; }

 private:
  std::vector<Pair> taken_;
};

inline void fill_padding(const Tile& tile) {
  if (tile.ld == tile.cols) {
    return;
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    std::fill(tile.row(r) + tile.cols, tile.row(r) + tile.ld, -kInfinity);
  }
}

}  // namespace pairtile
