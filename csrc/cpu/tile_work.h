// What a sweep does with one tile of cosines: take it into the statistics (forward), or turn it into weights (backward).
// Nothing here depends on the type of the features.
#pragma once

#include <optional>
#include <vector>

#include "memory.h"
#include "problem.h"
#include "sweep.h"
#include "tile.h"

namespace pairtile {

// How a plan is served: in one pass with one exponential for each pair (`uniform`: nearly every loss), or reduction by
// reduction on masked copies of the tile.
struct Mode {
  Mode(const Problem& problem, const Plan& plan);
  bool uniform;
  Bounds bounds;                   // known for uniform plans
  std::optional<Partner> special;  // uniform: the pair of a row that is left out, or positive
};

// What one thread needs beside a tile.
struct TileScratch {
  TileScratch(const Tiles& tiles, const Mode& mode)
      : lanes(tiles.rows * kLanes), columns(2 * tiles.cols), general(mode.uniform ? 0 : 3 * tiles.rows * tiles.cols) {}
  Buffer<float> lanes, columns, general;
  Removed removed;
};

// One reduction of the plan during a forward.
struct Running {
  const Reduction* reduction;
  std::vector<float> maximum;  // log-sum-exp: the shift so far
  std::vector<double> sum;     // relative to it
  int64_t slot = -1;           // of a dense column reduction: which of the partial results is its own
};

// Forward. Rows are owned by a thread and run on; of columns each chunk gives partial results, merged in order: `cols`
// maxima, then as many sums, those of slot k at partial + k * stride.
class Reducer {
 public:
  Reducer(const Problem& problem, const Plan& plan, const Tiles& tiles, const Mode& mode);

  std::vector<Running>& running() { return running_; }
  int64_t slots() const { return slots_; }
  void reduce(Tile& tile, float* partial, int64_t stride, TileScratch& scratch);
  void merge(Running& running, const float* partial, int64_t column, int64_t count) const;
  // Statistics of rows begin : end and of all columns.
  std::vector<Statistics> statistics(int64_t begin, int64_t end) const;

 private:
  void reduce_uniform(Tile& tile, float* partial, TileScratch& scratch);
  void reduce_general(const Tile& cosines, float* partial, int64_t stride, TileScratch& scratch);
  void reduce_rows(const Tile& masked, Running& running) const;
  void reduce_columns(const Tile& masked, const Running& running, float* maxima) const;

  const Problem& problem_;
  const Plan& plan_;
  const Tiles& tiles_;
  const Mode& mode_;
  std::vector<Running> running_;
  int64_t slots_ = 0;
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
  void weigh_general(const Tile& cosines, float* out, TileScratch& scratch) const;
  void add_weights(const Tile& masked, const Reduction& reduction, const Upstream& upstream, const float* sign,
                   float* out, TileScratch& scratch) const;
  void add_pair_weights(const Tile& tile, const Reduction& reduction, const Upstream& upstream, float* out) const;

  const Problem& problem_;
  const Plan& plan_;
  const Tiles& tiles_;
  const Mode& mode_;
  const std::vector<Upstream>& upstream_;
};

// Takes the special pairs that lie in the tile out of it.
void remove_special(const Mode& mode, Tile& tile, Removed& removed);

// softplus(-S) of a positive that was taken out, and d/dS of it, -sigmoid(-S).
struct PositiveTerm {
  double loss;
  float weight;
};
PositiveTerm positive_term(const Removed::Pair& pair, const float* scale, const float* offset);

}  // namespace pairtile
