#include "errors.h"

#include <cstdarg>
#include <cstdio>

#include "sparse_cpu.h"

namespace spc {
namespace {
thread_local char message[256] = "";
}

std::int32_t fail(std::int32_t code, const char* format, ...) {
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return code;
}

}  // namespace spc

extern "C" const char* spc_last_error(void) { return spc::message; }
