// What becomes of the weights G of a panel's tiles: the gradients of rows and columns. Steps 2 and 3 of typed_sweep.h.
#pragma once

#include "gradients.h"
#include "layout.h"
#include "operands.h"
#include "product.h"
#include "tile.h"

namespace pairtile {

template <typename In, typename Operand>
class PanelGradients {
  static constexpr bool kFloats = std::is_same_v<Operand, float>;
  static constexpr bool kDirect = kFloats && std::is_same_v<In, float>;  // features are operands as they lie
  static constexpr int64_t kPair = kFloats ? 1 : 2;                      // bfloat16 operands B come in pairs of rows
  static constexpr int64_t kOwned = 256;                                 // features of dy that one task adds up,
  static constexpr int64_t kLeanCols = 64;                               // or columns, where features stay as they lie

 public:
  PanelGradients(const Problem& problem, const Tiles& tiles, const Layout& layout, Needed needed)
      : problem_(problem),
        tiles_(tiles),
        layout_(layout),
        needed_(needed),
        n_(problem.n),
        m_(problem.m),
        d_(problem.d),
        x_(problem.x.const_data_ptr<In>()),
        y_(problem.y.const_data_ptr<In>()),
        gradients_(start_gradients(problem, needed)),
        dy_(start_columns(problem, needed, gradients_)) {
    const float* scales = problem.scales();
    one_scale_ = std::all_of(scales, scales + n_, [scales](float scale) { return scale == scales[0]; });
  }

  // A panel's chunks are first : last, and its blocks come some at a time.
  void start_panel(int64_t first, int64_t last) {
    first_ = first;
    last_ = last;
    const int64_t panel_cols = layout_.panel_blocks * tiles_.cols;
    weights_.reserve(panel_cols * chunks() * tiles_.rows);
    column_sums_.reserve(needed_.col_sums ? chunks() * panel_cols : 0);
    weighted_ = weighted_rows();
    if (needed_.y && !layout_.lean) {
      pack_chunks();
    }
  }

  void start_blocks(int64_t block, int64_t end) {
    block_ = block;
    end_ = end;
    if (weighs_y() && !layout_.lean) {
      pack_blocks();
    }
  }

  // Where a tile's weights are best written: float ones where step 3 reads them. Null: anywhere.
  float* place_of(int64_t chunk, int64_t block) {
    return kFloats && !layout_.lean ? reinterpret_cast<float*>(shared_tile(block - block_, chunk - first_)) : nullptr;
  }

  // Takes the weights of a tile; `rounded` is room for them.
  void add(const Tile& tile, int64_t chunk, int64_t block, Buffer<Operand>& rounded) {
    const int64_t panel_cols = layout_.panel_blocks * tiles_.cols;
    add_sums(tile, column_sums_.data() + (chunk - first_) * panel_cols + (block - block_) * tiles_.cols);
    if (weighs_y()) {
      float* to = weighted_ + (chunk - first_) * tiles_.rows * d_;
      if (layout_.lean) {
        add_weighted_lean(tile, to, block > 0);
      } else {
        add_weighted(tile, straight_.data() + (block - block_) * tiles_.cols * d_, to, block > 0, rounded);
      }
    }
    if (needed_.y) {
      scale_rows(tile);
      share_weights(tile, block - block_, chunk - first_);
    }
  }

  void finish_blocks() {
    if (needed_.y && layout_.lean) {
      add_to_columns_lean();
    } else if (needed_.y) {
      add_to_columns();
    }
    merge_column_sums();
  }

  void finish_panel() { finish_rows(); }

  Gradients finish() {
    finish_columns();
    return std::move(gradients_);
  }

 private:
  bool weighs_y() const { return needed_.x || needed_.scale; }
  int64_t chunks() const { return last_ - first_; }

  // y of the blocks as the operand B of G y, into `straight_`.
  void pack_blocks() {
    straight_.reserve(layout_.panel_blocks * tiles_.cols * d_);
    layout_.run(end_ - block_, [&](int64_t task, int64_t) {
      pack_straight(y_ + (block_ + task) * tiles_.cols * d_, tiles_.cols_of(block_ + task, m_), d_, d_,
                    straight_.data() + task * tiles_.cols * d_);
    });
  }

  // x^T of the chunks, the operand A of x^T G, into `turned_`.
  void pack_chunks() {
    turned_.reserve(chunks() * tiles_.rows * d_);
    layout_.run(chunks(), [&](int64_t task, int64_t) {
      pack_turned(x_ + (first_ + task) * tiles_.rows * d_, tiles_.rows_of(first_ + task, n_), d_,
                  turned_.data() + task * tiles_.rows * d_, tiles_.rows, tiles_.rows);
    });
  }


  // Both counted from the first of the panel.
  Operand* shared_tile(int64_t block, int64_t chunk) {
    return weights_.data() + (block * chunks() + chunk) * tiles_.cols * tiles_.rows;
  }

  // dy needs scale_i G_ij; where all scales are one, it is multiplied at the end instead.
  void scale_rows(const Tile& weights) {
    for (int64_t r = 0; r < weights.rows && !one_scale_; ++r) {
      const Vec scale(problem_.scales()[weights.row0 + r]);
      for (int64_t c = 0; c < weights.ld; c += kLanes) {
        (Vec::loadu(weights.row(r) + c) * scale).store(weights.row(r) + c);
      }
    }
  }

  // Leaves the weights of a tile for step 3. Float ones were written there already, unless they are to be transposed:
  // a block is then [cols][rows of the panel].
  void share_weights(const Tile& tile, int64_t block, int64_t chunk) {
    if constexpr (kFloats) {
      if (layout_.lean) {
        const int64_t height = chunks() * tiles_.rows;
        transpose(tile.data, tile.ld, tile.rows, tile.cols, shared_tile(block, 0) + chunk * tiles_.rows, height);
      }
    } else {
      pair_weights(tile.data, tile.rows, tile.ld, shared_tile(block, chunk));
    }
  }

  // Where G y of the panel's rows is added up: in dx itself, or apart where that is of another type or not wanted.
  float* weighted_rows() {
    if (!needed_.x && !needed_.scale) {
      return nullptr;
    }
    if (needed_.x && std::is_same_v<In, float>) {
      return reinterpret_cast<float*>(gradients_.x.mutable_data_ptr()) + first_ * tiles_.rows * d_;
    }
    apart_.reserve(chunks() * tiles_.rows * d_);
    return apart_.data();
  }

  void add_sums(const Tile& weights, float* column_sums) {
    if (needed_.row_sums) {
      for (int64_t r = 0; r < weights.rows; ++r) {
        Vec lanes(0.0f);
        for (int64_t c = 0; c < weights.ld; c += kLanes) {
          lanes = lanes + Vec::loadu(weights.row(r) + c);
        }
        gradients_.row[weights.row0 + r] += sum_lanes(lanes);
      }
    }
    if (needed_.col_sums) {
      for (int64_t c = 0; c < weights.ld; c += kLanes) {
        Vec sum(0.0f);
        for (int64_t r = 0; r < weights.rows; ++r) {
          sum = sum + Vec::loadu(weights.row(r) + c);
        }
        sum.store(column_sums + c);
      }
    }
  }

  void merge_column_sums() {
    if (gradients_.col.empty()) {
      return;
    }
    const int64_t begin = block_ * tiles_.cols, count = std::min(end_ * tiles_.cols, m_) - begin;
    for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
      const float* sums = column_sums_.data() + chunk * layout_.panel_blocks * tiles_.cols;
      for (int64_t c = 0; c < count; ++c) {
        gradients_.col[begin + c] += sums[c];
      }
    }
  }

  // weighted [rows, d] (+)= G y.
  void add_weighted(const Tile& tile, const Operand* features, float* weighted, bool add, Buffer<Operand>& rounded) {
    const Operand* weights;
    if constexpr (kFloats) {
      weights = tile.data;
    } else {
      convert_row(tile.data, rounded.data(), tile.rows * tile.ld);
      weights = rounded.data();
    }
    const int64_t depth = padded_depth<Operand>(tile.cols);
    for (int64_t k = 0; k < d_; k += kStrip) {
      const int64_t width = std::min(kStrip, d_ - k);
      product(tile.rows, width, depth, weights, tile.ld, features + k * depth, width, weighted + k, d_, add);
    }
  }

  void add_weighted_lean(const Tile& tile, float* weighted, bool add) {
    if constexpr (kDirect) {
      for (int64_t k = 0; k < d_; k += kDepth) {
        product(tile.rows, std::min(kDepth, d_ - k), tile.cols, tile.data, tile.ld, y_ + tile.col0 * d_ + k, d_,
                weighted + k, d_, add);
      }
    }
  }

  // dy of the blocks (+)= G^T x of the chunks; a task owns some columns and some features.
  void add_to_columns_lean() {
    if constexpr (kDirect) {
      const int64_t height = chunks() * tiles_.rows, rows = std::min(height, n_ - first_ * tiles_.rows);
      const int64_t parts = ceil_div(tiles_.cols, kLeanCols), slices = ceil_div(d_, kDepth);
      const int64_t group_rows = layout_.group * tiles_.rows;
      float* dy = dy_.template mutable_data_ptr<float>();
      layout_.run((end_ - block_) * parts * slices, [&](int64_t task, int64_t) {
        const int64_t b = task / (parts * slices), start = task / slices % parts * kLeanCols, k = task % slices * kDepth;
        const int64_t cols = std::min(kLeanCols, tiles_.cols_of(block_ + b, m_) - start);
        for (int64_t r = 0; r < rows && cols > 0; r += group_rows) {
          product(cols, std::min(kDepth, d_ - k), std::min(group_rows, rows - r),
                  shared_tile(b, 0) + start * height + r, height, x_ + (first_ * tiles_.rows + r) * d_ + k, d_,
                  dy + ((block_ + b) * tiles_.cols + start) * d_ + k, d_, first_ > 0 || r > 0);
        }
      });
    }
  }

  // dy^T of the blocks (+)= x^T G of the chunks, in order; a task owns a block and some features. dy^T [d, cols] lies
  // where the block's rows of dy will be.
  void add_to_columns() {
    const int64_t slices = ceil_div(d_, kOwned);
    float* dy = dy_.template mutable_data_ptr<float>();
    layout_.run((end_ - block_) * slices, [&](int64_t task, int64_t) {
      const int64_t b = task / slices, k = task % slices * kOwned, features = std::min(kOwned, d_ - k);
      const int64_t cols = tiles_.cols_of(block_ + b, m_), width = round_up(cols, 16);
      for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
        const int64_t depth = padded_depth<Operand>(tiles_.rows_of(first_ + chunk, n_));
        const Operand* features_of_chunk = turned_.data() + (chunk * d_ + k) * tiles_.rows;
        const Operand* weights = shared_tile(b, chunk);
        float* to = dy + (block_ + b) * tiles_.cols * d_ + k * cols;
        for (int64_t c = 0; c < cols; c += kStrip) {
          product(features, std::min(kStrip, cols - c), depth, features_of_chunk, tiles_.rows, weights + c * kPair, width,
                  to + c, cols, first_ + chunk > 0);
        }
      }
    });
  }

  // Turns each block of dy^T into rows of dy, times the one scale.
  void finish_columns() {
    if (!needed_.y || n_ == 0) {
      return;
    }
    const float* sums = dy_.template const_data_ptr<float>();
    In* dy = gradients_.y.template mutable_data_ptr<In>();
    std::vector<Buffer<float>> copies(layout_.workers());
    layout_.run(tiles_.blocks, [&](int64_t block, int64_t worker) {
      const int64_t start = block * tiles_.cols * d_;
      finish_block(sums + start, tiles_.cols_of(block, m_), d_, !layout_.lean, one_scale_ ? problem_.scales()[0] : 1.0f,
                   copies[worker], dy + start);
    });
  }

  // dx_i = scale_i (G y)_i, and d scale_i = <x_i, (G y)_i>.
  void finish_rows() {
    if (weighted_ == nullptr || tiles_.blocks == 0) {
      return;
    }
    In* dx = needed_.x ? gradients_.x.template mutable_data_ptr<In>() : nullptr;
    layout_.run(chunks(), [&](int64_t task, int64_t) {
      const int64_t begin = (first_ + task) * tiles_.rows, end = std::min(begin + tiles_.rows, n_);
      for (int64_t i = begin; i < end; ++i) {
        const float* row = weighted_ + (i - first_ * tiles_.rows) * d_;
        const float scale = problem_.scales()[i];
        if (needed_.scale) {
          gradients_.scale[i] = dot(x_ + i * d_, row, d_);
        }
        for (int64_t k = 0; dx != nullptr && k < d_; ++k) {
          dx[i * d_ + k] = static_cast<In>(scale * row[k]);
        }
      }
    });
  }

  const Problem& problem_;
  const Tiles& tiles_;
  const Layout& layout_;
  const Needed needed_;
  const int64_t n_, m_, d_;
  const In *x_, *y_;
  Gradients gradients_;
  at::Tensor dy_;                     // float, whatever the features are
  bool one_scale_;                    // all rows have the same
  int64_t first_ = 0, last_ = 0;      // chunks of the panel
  int64_t block_ = 0, end_ = 0;       // blocks of it at hand
  float* weighted_ = nullptr;         // G y of the panel's rows
  // Shared by the threads, a panel at a time.
  Buffer<Operand> straight_;    // y of the panel's blocks
  Buffer<Operand> turned_;      // x^T of the panel's chunks
  Buffer<Operand> weights_;     // G, tile by tile
  Buffer<float> column_sums_;   // of the weights, of each chunk
  Buffer<float> apart_;         // G y
};

}  // namespace pairtile
