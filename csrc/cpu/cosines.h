// Tiles of <x_i, y_j>, for features of one type multiplied as operands of another.
#pragma once

#include "layout.h"
#include "memory.h"
#include "operands.h"
#include "problem.h"
#include "product.h"
#include "tile.h"

namespace pairtile {

template <typename In, typename Operand>
class Cosines {
  static constexpr int64_t kWholeRows = 4096;  // features up to this width are converted whole

 public:
  Cosines(const at::Tensor& x, const at::Tensor& y, const Tiles& tiles)
      : tiles_(tiles),
        n_(x.size(0)),
        m_(y.size(0)),
        d_(x.size(1)),
        depth_(padded_depth<Operand>(d_)),
        x_(x.const_data_ptr<In>()),
        y_(y.const_data_ptr<In>()) {}

  int64_t depth() const { return depth_; }

  // What one thread needs to convert rows.
  int64_t row_room() const { return rows_are_operands() ? 0 : tiles_.rows * std::min(depth_, kWholeRows); }

  // y^T of the blocks first : last, each [depth][width], for the tiles to come; `most` such blocks are held at a time.
  void pack_columns(int64_t first, int64_t last, int64_t most, const Layout& layout) {
    const int64_t strips = ceil_div(tiles_.cols, kStrip);
    columns_.reserve(most * tiles_.cols * depth_);
    Operand* to = columns_.data();
    layout.run((last - first) * strips, [&](int64_t task, int64_t) {
      const int64_t block = first + task / strips, start = task % strips * kStrip;
      const int64_t cols = tiles_.cols_of(block, m_), width = round_up(cols, 16) - start;
      if (width > 0) {
        const int64_t rows = std::clamp<int64_t>(cols - start, 0, kStrip);
        pack_transposed(y_ + (block * tiles_.cols + start) * d_, rows, d_, d_,
                        to + ((block - first) * tiles_.cols + start) * depth_, std::min(kStrip, width));
      }
    });
  }

  // A chunk's rows as an operand; null if they are converted by parts.
  const Operand* rows_of(int64_t chunk, Buffer<Operand>& room) const {
    const In* from = x_ + chunk * tiles_.rows * d_;
    if constexpr (std::is_same_v<In, Operand>) {
      if (rows_are_operands()) {
        return from;
      }
    }
    if (by_parts()) {
      return nullptr;
    }
    copy_rows(from, tiles_.rows_of(chunk, n_), d_, depth_, d_, room.data());
    return room.data();
  }

  // Fills a tile, whose block is packed as number `block`.
  void multiply(const Tile& tile, int64_t block, const Operand* rows, Buffer<Operand>& room) {
    const Operand* columns = columns_.data() + block * tiles_.cols * depth_;
    for (int64_t k = 0; k == 0 || k < depth_; k += kDepth) {
      const int64_t depth = std::min(kDepth, depth_ - k);
      const Operand* a = rows + k;
      if (by_parts()) {
        copy_rows(x_ + tile.row0 * d_ + k, tile.rows, std::min(depth, d_ - k), kDepth, d_, room.data());
        a = room.data();
      }
      for (int64_t c = 0; c < tile.ld; c += kStrip) {
        const int64_t width = std::min(kStrip, tile.ld - c);
        product(tile.rows, width, depth, a, by_parts() ? kDepth : depth_, columns + c * depth_ + k * width, width,
                tile.data + c, tile.ld, k > 0);
      }
    }
  }

 private:
  // Rows of x are the operand A of the scores in place: of its type, and of an even width where pairs are multiplied.
  bool rows_are_operands() const { return std::is_same_v<In, Operand> && depth_ == d_; }

  // Rows that have to be converted, and are so wide that this happens part by part.
  bool by_parts() const { return !rows_are_operands() && depth_ > kWholeRows; }

  const Tiles& tiles_;
  const int64_t n_, m_, d_, depth_;
  const In *x_, *y_;
  Buffer<Operand> columns_;  // y^T of some blocks
};

}  // namespace pairtile
