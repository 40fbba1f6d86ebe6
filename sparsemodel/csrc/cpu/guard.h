// What every exported function does first and last.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <new>

#include "errors.h"
#include "sparse_cpu.h"

namespace spc {

inline std::int32_t check_threads(std::int32_t threads, const char* where) {
    return threads >= 1 ? SPC_OK
                        : fail(SPC_BAD_ARGUMENT, "%s: expected threads >= 1, got %d", where, threads);
}

// Fails where a pointer that must be there is null.
inline std::int32_t check_pointers(const char* where, std::initializer_list<const void*> pointers) {
    int place = 0;
    for (const void* pointer : pointers) {
        ++place;
        if (!pointer)
            return fail(SPC_NULL_POINTER, "%s: required array number %d is null", where, place);
    }
    return SPC_OK;
}

// Runs body(), which returns a status; no exception leaves the library.
template <class Body>
std::int32_t guarded(const char* where, Body&& body) {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return fail(SPC_NO_MEMORY, "%s: out of memory", where);
    }
}

}  // namespace spc
