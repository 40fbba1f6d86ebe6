// Memory of whole pages that goes back to the system when it is freed: malloc would keep blocks of
// such sizes, the more the larger those freed before.
#pragma once

#include <cstddef>

namespace spc {

class Pages {
public:
    Pages() = default;
    ~Pages() { reset(); }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;

    // At least so many bytes, aligned to pages, their contents undefined; nothing is done if there
    // are as many already. Throws std::bad_alloc, and then holds none.
    void reserve(std::size_t bytes);
    void reset();

    char* get() const { return memory_; }
    std::size_t size() const { return size_; }

private:
    char* memory_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace spc
