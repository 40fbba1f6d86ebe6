// Which instruction set is used: the widest that the processor has, or the one asked for.
#include <atomic>
#include <cstring>

#include "errors.h"
#include "kernels.h"
#include "sparse_cpu.h"

namespace spc {

#if defined(SPC_X86)
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#elif defined(SPC_ARM)
namespace neon {
extern const Kernels table;
}
#endif
namespace scalar {
extern const Kernels table;
}

namespace {

struct Choice {
    const Kernels* table;
    bool usable;
};

// Widest first; the last runs everywhere.
constexpr int kChoices = 3;

int choices(Choice (&list)[kChoices]) {
    int n = 0;
#if defined(SPC_X86)
    __builtin_cpu_init();
    // Also false where the operating system does not save the wide registers.
    list[n++] = {&avx512::table, __builtin_cpu_supports("avx512f") != 0};
    list[n++] = {&avx2::table,
                 __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0};
#elif defined(SPC_ARM)
    list[n++] = {&neon::table, true};
#endif
    list[n++] = {&scalar::table, true};
    return n;
}

const Kernels* best() {
    Choice list[kChoices];
    choices(list);
    for (const Choice& choice : list)
        if (choice.usable) return choice.table;
    return &scalar::table;
}

std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> table{best()};
    return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

}  // namespace spc

extern "C" int32_t spc_abi_version(void) { return SPC_ABI_VERSION; }

extern "C" const char* spc_isa(void) { return spc::kernels().name; }

extern "C" int32_t spc_set_isa(const char* name) {
    if (!name) return spc::fail(SPC_NULL_POINTER, "spc_set_isa: name is null");
    if (std::strcmp(name, "best") == 0) {
        spc::current() = spc::best();
        return SPC_OK;
    }
    spc::Choice list[spc::kChoices];
    const int n = spc::choices(list);
    for (int i = 0; i < n; ++i) {
        if (std::strcmp(list[i].table->name, name) != 0) continue;
        if (!list[i].usable)
            return spc::fail(SPC_UNSUPPORTED, "this processor has no %s; use \"best\"", name);
        spc::current() = list[i].table;
        return SPC_OK;
    }
    return spc::fail(SPC_UNSUPPORTED, "no instruction set \"%s\" in this build; use \"best\"", name);
}
