// Which kernels this processor runs. CMake defines ZOO_X86 or ZOO_ARM where their files were compiled.

#include <stdexcept>
#include <string>

#if defined(ZOO_ARM) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace zoo {

void Activations::gather(int begin, int end) {
    for (int p = begin; p < end; ++p) {
        const size_t first = size_t(p) * capacity + tokens;
        int count = 0;
        for (int t = 0; t < tokens; ++t) {
            if (!has_extra[size_t(t) * pairs + p]) continue;
            if (t != count) {
                const size_t to = first + count, from = first + t;
                for (int i = 0; i < PAIR; ++i) {
                    integers[to * PAIR + i] = integers[from * PAIR + i];
                    biased[to * PAIR + i] = biased[from * PAIR + i];
                }
                scale[to] = scale[from];
                sum[to] = sum[from];
                token[to] = token[from];
            }
            ++count;
        }
        extras[p] = count;
    }
}

#ifdef ZOO_X86
static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("popcnt");
}

static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2");
}
#endif

#ifdef ZOO_ARM
static bool has_dot_product() {
#ifdef __linux__
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // Apple's all have it
#endif
}
#endif

static const Kernels *find(const std::string &name) {
    if (name == "scalar") return &scalar_kernels;
#ifdef ZOO_X86
    if (name == "avx2") return has_avx2() ? &avx2_kernels : nullptr;
    if (name == "avx512") return has_avx512() ? &avx512_kernels : nullptr;
#endif
#ifdef ZOO_ARM
    if (name == "neon") return has_dot_product() ? &neon_kernels : nullptr;
#endif
    return nullptr;
}

const char *best_isa() {
    for (const char *name : {"avx512", "avx2", "neon"})
        if (find(name)) return name;
    return "scalar";
}

const Kernels &kernels(const char *name) {
    const Kernels *found = find(name && *name ? name : best_isa());
    if (!found) throw std::invalid_argument(std::string("this processor cannot run the kernels '") + name + "'");
    return *found;
}

}  // namespace zoo
