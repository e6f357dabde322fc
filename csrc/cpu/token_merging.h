// Tokens to their new places, and back: kernels/token_merging/combine.py documents what they compute.
#pragma once

#include "token_batch.h"

namespace pairtile {

// Of each sample: the token that each new place holds, and the places of the tokens that are merged into them.
struct Moves {
  const int64_t *kept, *sources, *places;  // [B, count], [B, merged], [B, merged]
  int64_t count, merged;
};

// Factors of tokens [B, N], divisors of places [B, S]; null: 1.
struct Shares {
  const float *factors, *divisors;
};

// out [B, count, C], of the type of x: the sums of factor * token over the tokens of a place, over its divisor.
void combine_tokens(const TokenBatch& x, const Moves& moves, Shares shares, void* out);

// out [B, tokens, C]: factor * x at the token's place over its divisor.
void spread_tokens(const TokenBatch& x, const int64_t* place_of, int64_t tokens, Shares shares, void* out);

}  // namespace pairtile
