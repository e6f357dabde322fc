// Memory that is written before it is read.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pairtile {

// at::empty, in huge pages where the system gives them on request: of fresh memory every small page would fault once.
inline at::Tensor empty_in_huge_pages(at::IntArrayRef sizes, at::TensorOptions options) {
  at::Tensor tensor = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + tensor.nbytes()) / kHugePage * kHugePage;
  if (last > first) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
  }
#endif
  return tensor;
}

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) { reserve(count); }
  void reserve(int64_t count) {
    if (count > count_) {
      tensor_ = empty_in_huge_pages({count * static_cast<int64_t>(sizeof(T))}, at::TensorOptions().dtype(at::kByte));
      count_ = count;
    }
  }
  T* data() { return count_ == 0 ? nullptr : reinterpret_cast<T*>(tensor_.mutable_data_ptr()); }

 private:
  at::Tensor tensor_;
  int64_t count_ = 0;
};

}  // namespace pairtile
