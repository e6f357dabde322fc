// Batches of token sets, and which pairs of them have a score (kernels/late_interaction/token_sets.py).
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace pairtile {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Set i is the rows start(i) : start(i) + length(i) of the matrix of tokens, without those that keep leaves out.
struct TokenSets {
  at::Tensor tokens;           // [rows, width], contiguous
  at::Tensor starts, lengths;  // int64, contiguous
  at::Tensor keep;             // bool [rows], contiguous; undefined if all rows count

  int64_t count() const { return starts.size(0); }
  int64_t rows() const { return tokens.size(0); }
  int64_t width() const { return tokens.size(1); }
  int64_t start(int64_t set) const { return starts.const_data_ptr<int64_t>()[set]; }
  int64_t length(int64_t set) const { return lengths.const_data_ptr<int64_t>()[set]; }
  const bool* kept() const { return keep.defined() ? keep.const_data_ptr<bool>() : nullptr; }
  // Rows of a set on average, at least 1.
  int64_t usual_length() const { return std::max<int64_t>(1, rows() / std::max<int64_t>(1, count())); }
};

TokenSets make_token_sets(const at::Tensor& tokens, const at::Tensor& starts, const at::Tensor& lengths,
                          const std::optional<at::Tensor>& keep, const char* name);

// All pairs (x_i, y_j), or with candidates those whose y_j belongs to x_i: j / candidates = i.
struct Pairs {
  int64_t n, m;
  int64_t candidates;  // 0 for all pairs

  int64_t columns() const { return candidates == 0 ? m : candidates; }
  // Column of the score of (x_i, y_j) in row i.
  int64_t column(int64_t i, int64_t j) const { return candidates == 0 ? j : j - i * candidates; }
  Range of_x(int64_t i) const { return candidates == 0 ? Range{0, m} : Range{i * candidates, (i + 1) * candidates}; }
  Range of_y(int64_t j) const { return candidates == 0 ? Range{0, n} : Range{j / candidates, j / candidates + 1}; }
  // Where what is kept of a pair lies: the block [rows of x] of its rows, and the block [rows of y] of its columns.
  int64_t row_block(int64_t i, int64_t j) const { return column(i, j); }
  int64_t col_block(int64_t i) const { return candidates == 0 ? i : 0; }
};

// The pairs as one of the two batches sees them: its own sets, and of each the sets of the other batch that it meets.
struct Side {
  Pairs pairs;
  bool by_x;  // own sets are x's

  int64_t own_sets() const { return by_x ? pairs.n : pairs.m; }
  // How many sets each set meets.
  int64_t partners() const { return by_x ? pairs.columns() : (pairs.candidates == 0 ? pairs.n : 1); }
  Range partners(int64_t own) const { return by_x ? pairs.of_x(own) : pairs.of_y(own); }
  int64_t row(int64_t own, int64_t other) const { return by_x ? own : other; }
  int64_t column(int64_t own, int64_t other) const { return by_x ? pairs.column(own, other) : pairs.column(other, own); }
  // Where what is kept of a pair for the sake of the own tokens lies, and what is kept for the others'.
  int64_t own_block(int64_t own, int64_t other) const {
    return by_x ? pairs.row_block(own, other) : pairs.col_block(other);
  }
  int64_t other_block(int64_t own, int64_t other) const {
    return by_x ? pairs.col_block(own) : pairs.row_block(other, own);
  }
};

Pairs make_pairs(const TokenSets& x, const TokenSets& y, int64_t candidates);

constexpr int64_t kChunkRows = 64;

// Rows of a set that are multiplied together: from a row that counts to a row that counts.
struct Chunk {
  int64_t begin, rows;  // of the matrix of tokens; rows is 0 behind the last chunk
  int counted;
  int32_t row[kChunkRows];  // those that count, from `begin` on
};

// The chunk from `row` on of a set that ends before `end`. Rows that do not count are skipped where they are many.
inline Chunk next_chunk(const bool* keep, int64_t row, int64_t end) {
  while (keep != nullptr && row < end && !keep[row]) {
    ++row;
  }
  Chunk chunk{row, 0, 0, {}};
  for (int64_t r = row; r < std::min(row + kChunkRows, end); ++r) {
    if (keep == nullptr || keep[r]) {
      chunk.row[chunk.counted++] = static_cast<int32_t>(r - row);
      chunk.rows = r - row + 1;
    }
  }
  return chunk;
}

// Scores, or upstream gradients of scores, [n, columns] with any strides.
template <typename T>
struct ScoreMatrix {
  T* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;

  explicit operator bool() const { return data != nullptr; }
  T& at(int64_t row, int64_t column) const { return data[row * row_stride + column * column_stride]; }
};

inline ScoreMatrix<float> scores_of(at::Tensor& tensor) {
  return tensor.defined() ? ScoreMatrix<float>{tensor.mutable_data_ptr<float>(), tensor.stride(0), tensor.stride(1)}
                          : ScoreMatrix<float>{};
}
inline ScoreMatrix<const float> upstream_of(const at::Tensor& tensor) {
  return tensor.defined() ? ScoreMatrix<const float>{tensor.const_data_ptr<float>(), tensor.stride(0), tensor.stride(1)}
                          : ScoreMatrix<const float>{};
}

// Blocks of successive sets that together have at most so many rows, or one set; at least `parts` blocks if there are as
// many sets.
inline std::vector<Range> blocks_of(const TokenSets& sets, int64_t most_rows, int64_t parts) {
  const int64_t most_sets = std::max<int64_t>(1, sets.count() / std::max<int64_t>(1, parts));
  std::vector<Range> blocks;
  int64_t rows = 0;
  for (int64_t set = 0; set < sets.count(); ++set) {
    if (blocks.empty() || rows + sets.length(set) > most_rows || blocks.back().size() >= most_sets) {
      blocks.push_back({set, set});
      rows = 0;
    }
    rows += sets.length(set);
    blocks.back().end = set + 1;
  }
  return blocks;
}

}  // namespace pairtile
