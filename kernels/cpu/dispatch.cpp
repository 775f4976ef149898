// The choice of a path at run time.
#include "dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace lopro {
namespace {

struct Choice {
  const char* name;
  Path path;
  bool (*available)();
};

const Choice choices[] = {
#if defined(__x86_64__)
    {"avx512", Path::avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vnni");
     }},
    {"avx2", Path::avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", Path::portable, [] { return true; }},
};

const Choice* find(const char* name) {
  for (const Choice& choice : choices)
    if ((!name || !std::strcmp(name, choice.name)) && choice.available()) return &choice;
  return nullptr;
}

const Choice* first() {
  const char* wanted = std::getenv("LOPRO_FX_CPU_ISA");
  if (wanted && *wanted) {
    if (const Choice* choice = find(wanted)) return choice;
    std::fprintf(stderr, "lopro_fx: LOPRO_FX_CPU_ISA=%s is not a path of this processor; it is ignored\n", wanted);
  }
  return find(nullptr);
}

const Choice*& current() {
  static const Choice* choice = first();
  return choice;
}

}  // namespace

Path path() { return current()->path; }

}  // namespace lopro

extern "C" __attribute__((visibility("default"))) const char* lopro_cpu_path() { return lopro::current()->name; }

// Returns false and changes nothing if this processor can't run it.
extern "C" __attribute__((visibility("default"))) bool lopro_cpu_set_path(const char* name) {
  const lopro::Choice* choice = lopro::find(name);
  if (choice) lopro::current() = choice;
  return choice != nullptr;
}
