// Rows of a weight as words of 16 places.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace spc {

inline std::int64_t words_of(std::int64_t row_length) {
    return (row_length + kBlockFloats - 1) / kBlockFloats;
}

// Checks what the functions on rows have in common.
std::int32_t check_rows(const char* where, std::int64_t rows, std::int64_t row_length,
                        const std::int32_t* row_ptr, std::int32_t threads);

}  // namespace spc
