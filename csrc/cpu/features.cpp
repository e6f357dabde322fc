// What the CPU build finds on this machine: instruction sets, threads, and torch's tile-sized matrix product.
//
// Two answers can differ, and both are reported: what the compiler was allowed to use (-march=native at build
// time, the macros below) and what torch chose at run time (at::get_cpu_capability).

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <string>

#include "product.h"

namespace {

std::string instruction_sets() {
  std::string found;
  auto add = [&found](const char* name) { found += found.empty() ? name : std::string(" ") + name; };
#ifdef __AVX2__
  add("AVX2");
#endif
#ifdef __AVX512F__
  add("AVX512F");
#endif
#ifdef __AVX512BF16__
  add("AVX512_BF16");
#endif
#ifdef __AMX_BF16__
  add("AMX_BF16");
#endif
#ifdef __ARM_NEON
  add("NEON");
#endif
#ifdef __ARM_FEATURE_SVE
  add("SVE");
#endif
#ifdef __ARM_FEATURE_BF16
  add("ARM_BF16");
#endif
  return found.empty() ? "none beyond the baseline" : found;
}

c10::Dict<std::string, std::string> cpu_features() {
  c10::Dict<std::string, std::string> found;
  found.insert("cpu_capability", at::get_cpu_capability());
  found.insert("threads", std::to_string(at::get_num_threads()));
  found.insert("instruction_sets", instruction_sets());
  found.insert("brgemm_float32", pairtile::describe_brgemm(at::kFloat));
  found.insert("brgemm_bfloat16", pairtile::describe_brgemm(at::kBFloat16));
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pairtile, m) {
  m.def("cpu_features() -> Dict(str, str)", &cpu_features);
}
