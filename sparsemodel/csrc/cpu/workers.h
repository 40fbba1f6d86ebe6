// Worker threads: those of the OpenMP runtime that the process has (torch's), else of our own, so
// that none need be installed and no two runtimes spin beside each other. Our own sleep between
// calls after a short wait for the next one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace spc {

// Calls body(context, item) for every item in [0, items), on at most `threads` threads of which
// the caller is one. Items are handed out in rising order. A call from a worker, or while another
// thread uses the workers, runs on its caller alone.
void parallel_raw(std::int64_t items, int threads, void (*body)(void*, std::int64_t),
                  void* context);

template <class Body>
void parallel(std::int64_t items, int threads, Body&& body) {
    parallel_raw(
        items, threads,
        [](void* context, std::int64_t item) {
            (*static_cast<std::remove_reference_t<Body>*>(context))(item);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// How many threads so much work is worth: waking one costs some ten microseconds.
int worthwhile_threads(int threads, double operations);

// Scratch memory of this thread, 64-byte aligned, kept and grown between calls. Slots are
// independent; asking a slot again invalidates what it gave before. Throws std::bad_alloc.
enum class Slot { entries, offsets, packed, staged, partial, runs, targets, gradient, count };
void* scratch(Slot slot, std::size_t bytes);

template <class T>
T* scratch_array(Slot slot, std::int64_t count) {
    return static_cast<T*>(scratch(slot, sizeof(T) * static_cast<std::size_t>(count)));
}

}  // namespace spc
