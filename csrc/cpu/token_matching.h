// Matchings of token merging: kernels/token_merging/similarity.py documents what they compute.
#pragma once

#include <algorithm>

#include "token_batch.h"

namespace pairtile {

// Which rows of y a row i of x may choose. As in similarity.py.
enum class Partners : int64_t { kAll = 0, kOthers = 1, kLater = 2 };

// One bool for each token; null: all count.
struct Keep {
  const bool* data = nullptr;
  int64_t sample_stride = 0;

  const bool* sample(int64_t b) const { return data == nullptr ? nullptr : data + b * sample_stride; }
};

// The largest product of each row of x and the first row of y that has it, [B, Na] each; -inf and 0 where there is
// none.
void find_partners(const TokenBatch& x, const TokenBatch& y, bool normalize, Keep x_keep, Keep y_keep,
                   Partners partners, float* best, int64_t* index);

// The mean of f(<x_i, x_j>) over j, [B, N]; f(s) = s - margin where that is not negative, else alpha expm1(s - margin).
void find_energies(const TokenBatch& x, float margin, float alpha, float* energies);

// ToMe's matching of r tokens at even positions into those at odd ones.
struct Bipartite {
  int64_t r;
  int64_t protected_count;
  bool class_token, distill_token;

  bool barred(int64_t token) const {
    return token < protected_count || (class_token && token == 0) || (distill_token && token == 1);
  }
  // Tokens that stay in front, and whether the unmerged ones at even positions keep their order.
  int64_t front() const { return std::max<int64_t>(protected_count, distill_token ? 2 : 0); }
  bool ordered() const { return class_token || protected_count > 0; }
};

// kept [B, N - r], sources [B, r], places [B, r]; similarity is the cosine.
void match_bipartite(const TokenBatch& metric, const Bipartite& matching, int64_t* kept, int64_t* sources,
                     int64_t* places);

}  // namespace pairtile
