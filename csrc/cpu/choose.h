// The k largest scores of each owner, kept sorted while the tiles go by.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <mutex>
#include <vector>

#include "band.h"

namespace pairtile {

// The largest come first, among equals the lowest index, and a NaN counts as larger than any number. This order is
// total, so what is chosen does not depend on the order in which threads bring the pairs. Rows belong to one thread at
// a time; the columns of a block are locked.
class Chooser {
 public:
  Chooser(const Reduction& reduction, int64_t owners, int64_t partners, int64_t block);

  void choose(Band& band, int64_t excluded);

  // [owners, k]: float, -inf where pairs are fewer, and int64, -1 there.
  at::Tensor scores, indices;

 private:
  void choose_of_rows(const Band& band, const float* scores, const float* mask);
  void choose_of_columns(const Band& band, const float* scores, const float* mask);
  void insert(int64_t owner, float score, int64_t index);

  const Reduction* reduction_;
  int64_t k_, held_;         // of which so many can be filled
  float* values_;
  int64_t* places_;
  std::vector<float> bars_;  // of each owner: what a pair must reach
  std::unique_ptr<std::mutex[]> locks_;
  int64_t block_;
};

}  // namespace pairtile
