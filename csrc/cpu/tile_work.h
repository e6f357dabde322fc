// What a sweep does with one tile: take it into the statistics (forward), or turn it into weights (backward). A uniform
// plan does so with cosines, any other with scores (band.h). Nothing here depends on the type of the features.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "band.h"
#include "choose.h"
#include "memory.h"
#include "problem.h"
#include "sweep.h"
#include "tile.h"

namespace pairtile {

// How a plan is served: in one pass with one exponential for each pair (`uniform`: the plain losses), or reduction by
// reduction, which share what they can.
struct Mode {
  Mode(const Problem& problem, const Plan& plan);
  bool uniform;
  Bounds bounds;                   // known for uniform plans
  std::optional<Partner> special;  // uniform: the pair of a row that is left out, or positive
  Shared shared;                   // unless uniform
};

// What one thread needs beside a tile.
struct TileScratch {
  TileScratch(const Tiles& tiles, const Mode& mode)
      : lanes(tiles.rows * kLanes),
        columns(5 * std::max(tiles.cols, kBandRows)),
        band(mode.uniform ? 0 : mode.shared.band_floats(tiles.cols)) {}
  Buffer<float> lanes, columns, band;
  Removed removed;
  std::vector<float*> matrices;  // the scores of the tile, by matrix; unless uniform
};

// One reduction of the plan during a forward.
struct Running {
  const Reduction* reduction;
  Shared::Use use;
  std::vector<float> maximum;     // under a softmax: the shift so far
  std::vector<double> sum;        // relative to it
  std::vector<double> weighted;   // expectation: the sum of what is averaged, relative to it
  std::unique_ptr<Chooser> chooser;
  int64_t slot = -1;  // of a column reduction with sums: which of the partial results is its own

  bool safe(const Mode& mode) const { return mode.uniform || mode.shared.exponents[use.exponent].safe; }
};

// Partial results of a tile's columns: maxima and sums, or, of an expectation, its two sums in float64.
struct Partial {
  Partial(float* data, int64_t cols)
      : maxima(data),
        sums(data + cols),
        exact_sums(reinterpret_cast<double*>(data + cols)),
        weighted(reinterpret_cast<double*>(data + 3 * cols)) {}
  float *maxima, *sums;
  double *exact_sums, *weighted;
};

// Forward. Rows are owned by a thread and run on; of columns each chunk gives partial results, merged in order: those of
// slot k begin at partial + k * stride.
class Reducer {
 public:
  Reducer(const Problem& problem, const Plan& plan, const Tiles& tiles, const Mode& mode);

  std::vector<Running>& running() { return running_; }
  int64_t slots() const { return slots_; }
  int64_t partials() const { return partials_; }  // floats that a slot takes for each column
  void reduce(Tile& tile, float* partial, int64_t stride, TileScratch& scratch);
  void merge(Running& running, float* partial, int64_t column, int64_t count) const;
  // Statistics of rows begin : end and of all columns.
  std::vector<Statistics> statistics(int64_t begin, int64_t end) const;

 private:
  void reduce_uniform(Tile& tile, float* partial, TileScratch& scratch);
  void reduce_bands(const Tile& tile, float* partial, int64_t stride, TileScratch& scratch);

  const Problem& problem_;
  const Plan& plan_;
  const Tiles& tiles_;
  const Mode& mode_;
  std::vector<Running> running_;
  int64_t slots_ = 0, partials_ = 2;
};

// Backward: G = d(results . upstream gradients) / dS.
class Weigher {
 public:
  Weigher(const Problem& problem, const Plan& plan, const Tiles& tiles, const Mode& mode,
          const std::vector<Upstream>& upstream)
      : problem_(problem), plan_(plan), tiles_(tiles), mode_(mode), upstream_(upstream) {}

  // Writes the weights to `out`, which may be the tile itself. `losses`, if given, gets the terms of each row added.
  void weigh(Tile& tile, float* out, std::vector<double>* losses, TileScratch& scratch) const;

 private:
  void weigh_uniform(Tile& tile, float* out, std::vector<double>* losses, TileScratch& scratch) const;
  void weigh_bands(const Tile& tile, float* out, TileScratch& scratch) const;
  void add_pair_weights(const Tile& tile, const Reduction& reduction, const Upstream& upstream, float* out) const;

  const Problem& problem_;
  const Plan& plan_;
  const Tiles& tiles_;
  const Mode& mode_;
  const std::vector<Upstream>& upstream_;
};

// One band of a tile, into the statistics of one reduction; `partial` is of the columns.
void reduce_band(Band& band, const Mode& mode, Running& running, Partial partial);

// One band of a tile: adds the weights of one reduction to those of the band.
void weigh_band(Band& band, const Mode& mode, const Reduction& reduction, const Shared::Use& use,
                const Upstream& upstream);

// Takes the special pairs that lie in the tile out of it.
void remove_special(const Mode& mode, Tile& tile, Removed& removed);

// softplus(-S) of a positive that was taken out, and d/dS of it, -sigmoid(-S).
struct PositiveTerm {
  double loss;
  float weight;
};
PositiveTerm positive_term(const Removed::Pair& pair, const float* scale, const float* offset);

}  // namespace pairtile
