// The kernels of this folder as functions: they launch on a stream, wait for nothing, and return what CUDA says.
#pragma once

#include <cuda_runtime_api.h>

#include "token_moves.h"
#include "token_selection.h"

namespace pairtile {

enum class TokenType { kFloat, kHalf, kBFloat16 };

// Of each sample, [batch, ...] one behind another; at most kMostSelectionTokens tokens.
cudaError_t launch_select_pairs(const Bipartite& matching, int batch, const SelectionSample& first,
                                cudaStream_t stream);

// Of at most 2^31 - 1 rows. What is of type void is of tokens of `type`.
cudaError_t launch_combine_tokens(const CombineProblem<void>& problem, TokenType type, cudaStream_t stream);
cudaError_t launch_spread_tokens(const SpreadProblem<void>& problem, TokenType type, cudaStream_t stream);

}  // namespace pairtile
