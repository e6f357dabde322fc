// The general tile: any reductions, rules and weights of S and its teachers. It is worked through band by band, some
// rows at a time, so that all that the reductions share of a band is made once and stays in the nearest caches:
// exponents, their exponentials, and which pairs are left out.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"
#include "problem.h"
#include "tile.h"

namespace pairtile {

constexpr int64_t kBandRows = 16;

// The exponents of one or more softmaxes: pace(matrix).
struct Exponent {
  int64_t matrix;
  Pace pace;
  bool safe;  // exp needs no shift: reductions of rows and columns share one exponential

  bool is_score() const { return pace == Pace(); }
  bool operator==(const Exponent& other) const { return matrix == other.matrix && pace == other.pace; }
};

// Pairs that some rules name, or whose weight is 0.
struct PairSet {
  std::vector<Rule> rules;
  bool by_row;  // whose thresholds, and along which axis the weights lie
  const float* weights;

  bool operator==(const PairSet& other) const;
};

// What reductions have in common.
struct Shared {
  Shared() = default;
  Shared(const Problem& problem, const Plan& plan);

  struct Use {
    int64_t exponent = -1, excluded = -1, positive = -1;
  };
  std::vector<Use> uses;  // of each reduction
  std::vector<Exponent> exponents;
  std::vector<PairSet> sets;

  // Floats of a band's own.
  int64_t band_floats(int64_t cols) const { return kBandRows * cols * (2 * exponents.size() + sets.size() + 3); }
};

// Rows first : first + kBandRows of a tile. What it hands out is made when it is first asked for, row by row, `ld`
// apart. A mask has all bits set where the set has a pair, and behind the columns; a null one, nowhere.
class Band {
 public:
  // `matrices`: the scores of the tile, by matrix; null where nothing reads them.
  Band(const Shared& shared, const Tile& tile, const std::vector<float*>& matrices,
       float* storage, float* columns)
      : shared_(shared),
        tile_(tile),
        matrices_(matrices),
        storage_(storage),
        columns_(columns),
        made_(2 * shared.exponents.size() + shared.sets.size()) {}

  void move_to(int64_t first) {
    first_ = first;
    rows = std::min(kBandRows, tile_.rows - first);
    row0 = tile_.row0 + first;
    std::fill(made_.begin(), made_.end(), Made::kNot);
  }

  int64_t rows = 0, row0 = 0;
  int64_t first() const { return first_; }
  int64_t cols() const { return tile_.cols; }
  int64_t col0() const { return tile_.col0; }
  int64_t ld() const { return tile_.ld; }

  const float* scores(int64_t matrix) const { return matrices_[matrix] + first_ * tile_.ld; }
  const float* values(int64_t exponent);
  const float* exponentials(int64_t exponent);  // of a safe one
  const float* mask(int64_t set);
  float* weights() { return part(made_.size()); }
  float* spare(int64_t which) { return part(made_.size() + 1 + which); }
  float* shifts() { return columns_ + 4 * tile_.ld; }  // one for each row, or column

  // Entries along the tile's columns of a vector of all columns, readable up to the padded width; `slot` is 0, 1, 2 or 3.
  const float* along_columns(const float* all, int64_t slot) const;

 private:
  enum class Made : uint8_t { kNot, kFull, kEmpty };

  float* part(size_t index) { return storage_ + index * kBandRows * tile_.ld; }
  bool touches(const Rule& rule) const;
  void add_rule(const Rule& rule, bool by_row, int32_t* mask) const;
  void add_weightless(const PairSet& set, int32_t* mask) const;

  const Shared& shared_;
  const Tile tile_;
  const std::vector<float*>& matrices_;
  float *storage_, *columns_;
  int64_t first_ = 0;
  std::vector<Made> made_;
};

// Turns a tile of cosines into scores, in place.
void score_tile(const Problem& problem, int64_t matrix, const Tile& tile);

// v, or `instead` where the mask says so.
template <bool masked>
inline Vec unless(const float* mask, int64_t at, Vec v, float instead) {
  if constexpr (masked) {
    return Vec::blendv(v, Vec(instead), Vec::loadu(mask + at));
  } else {
    return v;
  }
}

// body(std::bool_constant) of whether there is a mask, a pointer in general.
template <typename Body>
inline void if_present(const float* pointer, const Body& body) {
  if (pointer != nullptr) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

}  // namespace pairtile
