// Error codes with a message, kept for the calling thread.
#pragma once

#include <cstdint>

namespace spc {

// Keeps the message for spc_last_error and returns `code`.
__attribute__((format(printf, 2, 3))) std::int32_t fail(std::int32_t code, const char* format, ...);

}  // namespace spc
