// Similarities of one sample's tokens, tile by tile: rows of x are the columns of a strip; all rows of y stream past.
#pragma once

#include <cmath>
#include <vector>

#include "memory.h"
#include "operands.h"
#include "parallel.h"
#include "product.h"
#include "token_batch.h"
#include "token_vec.h"

namespace pairtile {

// To length 1, as F.normalize does it.
inline void normalize_row(float* row, int64_t width) {
  constexpr float kShortest = 1e-12f;
  Vec lanes(0.0f);
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    const Vec v = Vec::loadu(row + k);
    lanes = at::vec::fmadd(v, v, lanes);
  }
  float square = sum_lanes(lanes);
  for (; k < width; ++k) {
    square += row[k] * row[k];
  }
  const float root = std::sqrt(square), length = root < kShortest ? kShortest : root;  // NaN stays
  for (k = 0; k < width; ++k) {
    row[k] /= length;
  }
}

// What one thread needs; a strip of columns stays in the first-level cache beside a tile.
template <typename From>
class TokenTiles {
 public:
  static constexpr int64_t kRows = 64;

  TokenTiles(const TokenBatch& x, const TokenBatch& y, bool normalize)
      : x_(x), y_(y), normalize_(normalize), depth_(x.width) {}

  // All rows of y of a sample, in place where their type allows it.
  void take_rows(int64_t sample) {
    if constexpr (std::is_same_v<From, float>) {
      if (!normalize_) {
        rows_ = y_.sample<float>(sample);
        ld_ = y_.stride;
        return;
      }
    }
    copied_.reserve(y_.count * depth_);
    copy(y_, sample, 0, y_.count, copied_.data());
    rows_ = copied_.data();
    ld_ = depth_;
  }

  // At most kStrip rows of x, from `first` on.
  void take_columns(int64_t sample, int64_t first) {
    columns_ = std::min(kStrip, x_.count - first);
    width_ = round_up(columns_, 16);
    strip_.reserve(kStrip * depth_);
    if (!normalize_) {
      pack_transposed(x_.sample<From>(sample) + first * x_.stride, columns_, depth_, x_.stride, strip_.data(), width_);
      return;
    }
    unit_.reserve(kStrip * depth_);
    copy(x_, sample, first, columns_, unit_.data());
    pack_transposed(unit_.data(), columns_, depth_, depth_, strip_.data(), width_);
  }

  int64_t columns() const { return columns_; }
  int64_t width() const { return width_; }  // columns() and padding, a multiple of 16

  // The products of some rows, at most kRows, with the strip: [rows][width()]. Those of two tokens have the same bits
  // whichever of them is the row.
  float* multiply(int64_t row, int64_t rows) {
    for (int64_t k = 0; k < std::max<int64_t>(depth_, 1); k += kDepth) {
      product(rows, width_, std::min(kDepth, depth_ - k), rows_ + row * ld_ + k, ld_, strip_.data() + k * width_,
              width_, tile_, width_, k > 0);
    }
    return tile_;
  }

 private:
  void copy(const TokenBatch& from, int64_t sample, int64_t first, int64_t rows, float* to) const {
    const From* data = from.sample<From>(sample) + first * from.stride;
    for (int64_t r = 0; r < rows; ++r, data += from.stride, to += depth_) {
      copy_token(data, depth_, depth_, to);
      if (normalize_) {
        normalize_row(to, depth_);
      }
    }
  }

  const TokenBatch &x_, &y_;
  const bool normalize_;
  const int64_t depth_;
  const float* rows_ = nullptr;
  int64_t ld_ = 0, columns_ = 0, width_ = 0;
  Buffer<float> copied_, unit_, strip_;
  alignas(64) float tile_[kRows * kStrip];
};

// body(tiles, sample, first) for each strip of columns; it owns the results of these rows of x.
template <typename From, typename Body>
void for_each_strip(const TokenBatch& x, const TokenBatch& y, bool normalize, const Body& body) {
  const int64_t strips = ceil_div(x.count, kStrip), threads = at::get_num_threads();
  if (x.batch == 0 || strips == 0) {
    return;
  }
  // A few tasks for each thread, from few samples too.
  const int64_t parts = threads == 1 ? 1 : std::clamp<int64_t>(ceil_div(4 * threads, x.batch), 1, strips);
  std::vector<TokenTiles<From>> tiles(std::min(threads, x.batch * parts), TokenTiles<From>(x, y, normalize));
  for_each_task(x.batch * parts, [&](int64_t task, int64_t worker) {
    const int64_t sample = task / parts, part = task % parts;
    TokenTiles<From>& own = tiles[worker];
    own.take_rows(sample);
    for (int64_t strip = part * strips / parts; strip < (part + 1) * strips / parts; ++strip) {
      own.take_columns(sample, strip * kStrip);
      body(own, sample, strip * kStrip);
    }
  });
}

}  // namespace pairtile
