// Selection: one block sorts the similarities of one sample in registers and shared memory.

#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>

#include "launch.h"

namespace pairtile {
namespace {

template <int kThreads_, int kItems_>
class CubBlock {
 public:
  static constexpr int kThreads = kThreads_, kItems = kItems_;
  using Thread = SelectionThread<kThreads, kItems>;
  using Sort = cub::BlockRadixSort<uint32_t, kThreads, kItems, int>;
  using Scan = cub::BlockScan<int, kThreads>;

  struct Shared {
    union {
      typename Sort::TempStorage sort;
      typename Scan::TempStorage scan;
    };
    bool merged[kThreads * kItems];
  };

  __device__ explicit CubBlock(Shared& shared) : merged(shared.merged), shared_(shared) {
    thread_.index = static_cast<int>(threadIdx.x);
  }

  template <class F>
  __device__ void each(F&& f) {
    f(thread_);
    __syncthreads();
  }
  __device__ void sort() {
    Sort(shared_.sort).SortBlockedToStriped(thread_.keys, thread_.positions);
    __syncthreads();
  }
  __device__ void exclusive_sum() { Scan(shared_.scan).ExclusiveSum(thread_.count, thread_.count); }

  bool* const merged;

 private:
  Thread thread_;
  Shared& shared_;
};

template <int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads) select_pairs_kernel(Bipartite matching, SelectionSample first) {
  using Block = CubBlock<kThreads, kItems>;
  __shared__ typename Block::Shared shared;
  Block block(shared);
  select_pairs(block, matching, first.of_batch(matching, blockIdx.x));
}

}  // namespace

cudaError_t launch_select_pairs(const Bipartite& matching, int batch, const SelectionSample& first,
                                cudaStream_t stream) {
  const bool found = with_selection_size(matching.even(), [&](auto size) {
    using Size = decltype(size);
    select_pairs_kernel<Size::kThreads, Size::kItems><<<batch, Size::kThreads, 0, stream>>>(matching, first);
  });
  return found ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace pairtile
