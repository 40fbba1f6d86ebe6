// Pages from the system; from malloc where a sanitizer is to see their ends.
#include "pages.h"

#include <cstdlib>
#include <new>

#include <sys/mman.h>

namespace spc {
namespace {

constexpr std::size_t kPage = 4096;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
void* take(std::size_t bytes) { return std::aligned_alloc(kPage, bytes); }
void give_back(void* memory, std::size_t) { std::free(memory); }
#else
void* take(std::size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}
void give_back(void* memory, std::size_t bytes) { munmap(memory, bytes); }
#endif

}  // namespace

void Pages::reserve(std::size_t bytes) {
    if (memory_ && bytes <= size_) return;
    reset();
    const std::size_t rounded = (bytes + kPage) / kPage * kPage;
    memory_ = static_cast<char*>(take(rounded));
    if (!memory_) throw std::bad_alloc();
    size_ = rounded;
}

void Pages::reset() {
    if (memory_) give_back(memory_, size_);
    memory_ = nullptr;
    size_ = 0;
}

}  // namespace spc
