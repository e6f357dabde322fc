// Batches of token sets, and which pairs of them have a score (kernels/late_interaction/token_sets.py).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

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

Pairs make_pairs(const TokenSets& x, const TokenSets& y, int64_t candidates);

// Rows of a set that are multiplied together: from a row that counts to a row that counts.
struct Chunk {
  int64_t begin, rows;  // of the matrix of tokens; rows is 0 behind the last chunk
  int counted;
  int32_t row[64];  // those that count, from `begin` on
};

constexpr int64_t kChunkRows = 64;

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

}  // namespace pairtile
