// A strip of x holds a running maximum for each column, and the row of y that it was found in, while y streams past.

#include "token_matching.h"
#include "token_tiles.h"

namespace pairtile {
namespace {

constexpr int64_t kTileRows = TokenTiles<float>::kRows;

struct Running {
  alignas(64) float value[kStrip], position[kStrip];

  Running() {
    std::fill_n(value, kStrip, -kInfinity);
    std::fill_n(position, kStrip, 0.0f);
  }
};

// Raises the maxima of `vectors` columns by the rows of a tile that count.
template <int vectors>
void raise(const float* tile, int64_t width, int64_t row, int64_t rows, const bool* keep, float* value,
           float* position) {
  Largest best[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    best[v] = {Vec::loadu(value + v * kLanes), Vec::loadu(position + v * kLanes)};
  }
  for (int64_t r = row; r < row + rows; ++r, tile += width) {
    if (keep != nullptr && !keep[r]) {
      continue;
    }
    const Vec at(static_cast<float>(r));
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      best[v].raise(Vec::loadu(tile + v * kLanes), at);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    best[v].value.store(value + v * kLanes);
    best[v].position.store(position + v * kLanes);
  }
}

// Columns are the rows first : first + columns of x: bars those that a row of y may not serve.
void bar(float* tile, int64_t width, int64_t columns, int64_t first, int64_t row, int64_t rows, Partners partners) {
  const int64_t end = std::min(row + rows, first + columns);
  for (int64_t r = std::max(row, first); r < end && partners != Partners::kAll; ++r) {
    float* own = tile + (r - row) * width + r - first;
    std::fill_n(own, partners == Partners::kOthers ? 1 : columns - (r - first), -kInfinity);
  }
}

template <typename From>
void find(const TokenBatch& x, const TokenBatch& y, bool normalize, Keep x_keep, Keep y_keep, Partners partners,
          float* best, int64_t* index) {
  for_each_strip<From>(x, y, normalize, [&](TokenTiles<From>& tiles, int64_t sample, int64_t first) {
    Running running;
    const bool *keep = y_keep.sample(sample), *counts = x_keep.sample(sample);
    const int64_t width = tiles.width();
    for (int64_t row = partners == Partners::kLater ? first : 0; row < y.count; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, y.count - row);
      float* tile = tiles.multiply(row, rows);
      bar(tile, width, tiles.columns(), first, row, rows, partners);
      int64_t c = 0;
      for (; c + 4 * kLanes <= width; c += 4 * kLanes) {
        raise<4>(tile + c, width, row, rows, keep, running.value + c, running.position + c);
      }
      for (; c < width; c += kLanes) {
        raise<1>(tile + c, width, row, rows, keep, running.value + c, running.position + c);
      }
    }
    for (int64_t c = 0; c < tiles.columns(); ++c) {
      const int64_t i = first + c;
      const bool none = counts != nullptr && !counts[i];
      best[sample * x.count + i] = none ? -kInfinity : running.value[c];
      index[sample * x.count + i] = none ? 0 : static_cast<int64_t>(running.position[c]);
    }
  });
}

}  // namespace

void find_partners(const TokenBatch& x, const TokenBatch& y, bool normalize, Keep x_keep, Keep y_keep,
                   Partners partners, float* best, int64_t* index) {
  with_token_type(x.type(), [&](auto from) {
    find<decltype(from)>(x, y, normalize, x_keep, y_keep, partners, best, index);
  });
}

}  // namespace pairtile
