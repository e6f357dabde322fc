// Tokens as operands of the tile products: those of x packed as columns (B), those of y as rows (A).
#pragma once

#include <algorithm>
#include <vector>

#include "memory.h"
#include "operands.h"
#include "parallel.h"
#include "token_sets.h"
#include "token_vec.h"

namespace pairtile {

// A set's columns in its panel. Those behind `count` repeat its first token.
struct Segment {
  int64_t set, begin, count, end;
};

// Columns of some whole sets; a product takes a strip of 64 of them.
struct Panel {
  int64_t first, last;         // segments
  int64_t column, columns;     // the first one among all panels' columns, and how many; multiples of 16
};

template <typename To>
class TokenPanels {
 public:
  // `aligned`: every set begins at a multiple of 16 columns. `apart`: every set has a panel of its own.
  TokenPanels(const TokenSets& sets, bool aligned, bool apart)
      : sets_(sets), aligned_(aligned), apart_(apart), depth_(padded_depth<To>(sets.width())) {
    // Beside a chunk of the other side, a panel should stay in the second-level cache.
    constexpr int64_t kPanelBytes = int64_t{256} << 10;
    widest_ = std::clamp<int64_t>(kPanelBytes / (std::max<int64_t>(depth_, 1) * sizeof(To)), kStrip, 512) / kStrip * kStrip;
  }

  // Packs sets from `set` on until their columns take `bytes`, at least one set. Returns the first one left.
  template <typename From>
  int64_t pack(int64_t set, int64_t bytes) {
    segments_.clear();
    panels_.clear();
    token_.clear();
    const int64_t most = std::max<int64_t>(1, bytes / (std::max<int64_t>(depth_, 1) * sizeof(To)));
    for (; set < sets_.count(); ++set) {
      const int64_t count = count_of(set), width = aligned_ ? round_up(count, 16) : count;
      const int64_t in_panel = panels_.empty() ? 0 : columns_in_last();
      if (panels_.empty() || apart_ || in_panel + width > widest_) {
        finish_last();
        if (!panels_.empty() && static_cast<int64_t>(token_.size()) + width > most) {
          break;
        }
        panels_.push_back({static_cast<int64_t>(segments_.size()), 0, static_cast<int64_t>(token_.size()), 0});
      }
      append(set, count, width);
    }
    finish_last();
    pack_strips<From>();
    return set;
  }

  const std::vector<Panel>& panels() const { return panels_; }
  const Segment& segment(int64_t s) const { return segments_[s]; }
  // The row of the matrix of tokens that a panel's column holds.
  const int64_t* tokens(const Panel& panel) const { return token_.data() + panel.column; }
  // The strip from `column` on: [depth][width], in pairs for bfloat16.
  const To* strip(const Panel& panel, int64_t column) const { return data_ + (panel.column + column) * depth_; }
  static int64_t strip_width(const Panel& panel, int64_t column) { return std::min(kStrip, panel.columns - column); }

 private:
  int64_t columns_in_last() const { return static_cast<int64_t>(token_.size()) - panels_.back().column; }

  int64_t count_of(int64_t set) const {
    const bool* keep = sets_.kept();
    const int64_t start = sets_.start(set), length = sets_.length(set);
    return keep == nullptr ? length : std::count(keep + start, keep + start + length, true);
  }

  void append(int64_t set, int64_t count, int64_t width) {
    const bool* keep = sets_.kept();
    const int64_t start = sets_.start(set), begin = columns_in_last();
    const size_t first = token_.size();
    for (int64_t row = start; row < start + sets_.length(set); ++row) {
      if (keep == nullptr || keep[row]) {
        token_.push_back(row);
      }
    }
    if (width > count) {
      token_.resize(first + width, token_[first]);
    }
    segments_.push_back({set, begin, count, begin + width});
  }

  void finish_last() {
    if (!panels_.empty() && panels_.back().last == 0) {
      Panel& panel = panels_.back();
      panel.last = segments_.size();
      panel.columns = round_up(columns_in_last(), 16);
      token_.resize(panel.column + panel.columns, -1);
    }
  }

  template <typename From>
  void pack_strips() {
    buffer_.reserve(token_.size() * depth_);
    data_ = buffer_.data();
    std::vector<std::pair<int64_t, int64_t>> strips;
    for (const Panel& panel : panels_) {
      for (int64_t c = 0; c < panel.columns; c += kStrip) {
        strips.emplace_back(panel.column + c, strip_width(panel, c));
      }
    }
    const From* from = sets_.tokens.template const_data_ptr<From>();
    const int64_t width = sets_.width();
    std::vector<Buffer<To>> gathered(at::get_num_threads());
    for_each_task(strips.size(), [&](int64_t task, int64_t worker) {
      const auto [column, columns] = strips[task];
      gathered[worker].reserve(kStrip * depth_);
      To* rows = gathered[worker].data();
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t token = token_[column + c];
        if (token < 0) {
          std::fill_n(rows + c * depth_, depth_, To(0.0f));
        } else {
          copy_token(from + token * width, width, depth_, rows + c * depth_);
        }
      }
      pack_transposed(rows, columns, depth_, depth_, data_ + column * depth_, columns);
    });
  }

  const TokenSets& sets_;
  const bool aligned_, apart_;
  const int64_t depth_;
  int64_t widest_;
  std::vector<Segment> segments_;
  std::vector<Panel> panels_;
  std::vector<int64_t> token_;
  Buffer<To> buffer_;
  To* data_ = nullptr;
};

// Chunks of a batch's tokens as the operand A: as they lie in memory where their type and width allow it.
template <typename From, typename To>
class TokenRows {
 public:
  explicit TokenRows(const TokenSets& sets)
      : tokens_(sets.tokens.template const_data_ptr<From>()), width_(sets.width()), depth_(padded_depth<To>(width_)) {}

  const To* operator()(const Chunk& chunk, Buffer<To>& copy) const {
    const From* from = tokens_ + chunk.begin * width_;
    if constexpr (std::is_same_v<From, To>) {
      if (depth_ == width_) {
        return from;
      }
    }
    copy.reserve(kChunkRows * depth_);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      copy_token(from + r * width_, width_, depth_, copy.data() + r * depth_);
    }
    return copy.data();
  }

  int64_t depth() const { return depth_; }

 private:
  const From* tokens_;
  const int64_t width_, depth_;
};

// Calls body(a number of the tokens' type, one of the operands' type).
template <typename Body>
void with_types(at::ScalarType type, const Body& body) {
  if (type == at::kFloat) {
    body(float{}, float{});
  } else if (type == at::kHalf) {
    body(at::Half{}, float{});
  } else if (multiplies_bfloat16()) {
    body(at::BFloat16{}, at::BFloat16{});
  } else {
    body(at::BFloat16{}, float{});
  }
}

// The products of a chunk with a strip, [rows][width].
template <typename To>
void multiply(const To* rows, int64_t count, int64_t depth, const To* strip, int64_t width, float* products) {
  for (int64_t k = 0; k < std::max<int64_t>(depth, 1); k += kDepth) {
    product(count, width, std::min(kDepth, depth - k), rows + k, depth, strip + k * width, width, products, width, k > 0);
  }
}

}  // namespace pairtile
