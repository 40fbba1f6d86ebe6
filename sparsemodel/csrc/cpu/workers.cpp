#include "workers.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "pages.h"
#include "sparse_cpu.h"

namespace spc {
namespace {

constexpr int kMaxThreads = 256;
constexpr double kOperationsPerThread = 400e3;  // about ten microseconds of fused multiply-adds
constexpr int kSpins = 2000;

inline void pause() {
#if defined(SPC_X86)
    __builtin_ia32_pause();
#endif
}

struct Job {
    void (*body)(void*, std::int64_t);
    void* context;
    std::int64_t items;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> out_of_memory{false};

    void work() {
        try {
            for (std::int64_t item = next++; item < items; item = next++) body(context, item);
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
            next = items;
        }
    }
};

thread_local bool inside = false;  // this thread is at work in a job

struct Scratch {
    Pages slots[static_cast<int>(Slot::count)];

    void release() {
        for (Pages& slot : slots) slot.reset();
    }
};

thread_local Scratch mine;
thread_local std::uint64_t released = 0;
std::atomic<std::uint64_t> release_epoch{0};

// What a worker does with a job, its old scratch memory freed first if that was asked for.
void serve_job(Job* job) {
    if (released != release_epoch.load()) {
        released = release_epoch.load();
        mine.release();
    }
    job->work();
}

// An OpenMP runtime that is in the process already, torch's for one. Its workers spin for
// milliseconds after each of its regions and would keep ours off the processors, so the work is
// given to them. (GCC's entry point, which LLVM's runtime offers too.) Team sizes stay those of
// the host: another size would end and start threads; a worker too many has no ticket.
using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
bool forked = false;  // OpenMP's workers do not live on in a child; ours start anew

Region host_region() {
    static const auto found = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return forked ? nullptr : found;
}

struct Team {
    Job* job;
    int threads;
    const Scratch* caller;
    std::atomic<int> tickets{0};
};

void run_in_host(Region region, Job* job, int threads) {
    Team team{job, threads, &mine, {0}};
    region(
        [](void* data) {
            auto* given = static_cast<Team*>(data);
            if (given->tickets++ >= given->threads) return;
            inside = true;
            // The caller has scratch memory in use, whatever was asked for since its last job.
            if (given->caller == &mine)
                given->job->work();
            else
                serve_job(given->job);
            inside = false;
        },
        &team, 0, 0);
    if (job->out_of_memory) throw std::bad_alloc();
}

class Pool {
public:
    void run(Job& job, int threads) {
        const int helpers = std::min(threads - 1, grow(threads - 1));
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            wanted_ = helpers;
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        inside = true;
        job.work();
        inside = false;
        // A helper that has not woken by now is not waited for: it finds no job.
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = nullptr;
        }
        for (int spins = 0; spins < kSpins && active_.load(std::memory_order_acquire); ++spins)
            pause();
        if (active_.load(std::memory_order_acquire)) {
            std::unique_lock<std::mutex> lock(mutex_);
            done_.wait(lock, [this] { return active_.load() == 0; });
        }
        if (job.out_of_memory) throw std::bad_alloc();
    }

    std::mutex& owner() { return owner_; }

private:
    // Starts workers up to `wanted`; how many there are. A machine without threads has none.
    int grow(int wanted) {
        while (static_cast<int>(num_workers_) < wanted) {
            try {
                std::thread(&Pool::serve, this, num_workers_).detach();
            } catch (const std::system_error&) {
                break;
            }
            ++num_workers_;
        }
        return num_workers_;
    }

    void serve(int index) {
        inside = true;
        released = release_epoch.load();
        std::uint64_t seen = 0;
        for (;;) {
            for (int spins = 0;
                 spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins)
                pause();
            Job* job = nullptr;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
                seen = generation_.load();
                if (job_ && index < wanted_) {
                    job = job_;
                    ++active_;
                }
            }
            if (!job) continue;
            serve_job(job);
            {
                std::lock_guard<std::mutex> lock(mutex_);
                --active_;
            }
            done_.notify_one();
        }
    }

    std::mutex owner_;  // held by the thread whose job runs
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::atomic<std::uint64_t> generation_{0};
    std::atomic<int> active_{0};  // workers inside job_
    Job* job_ = nullptr;
    int wanted_ = 0;
    int num_workers_ = 0;
};

// Never destroyed: workers may still wait in it when the process ends. A forked child has no
// workers, so it starts with a new pool.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
    static const bool once = [] {
        the_pool = new Pool;
        return true;
    }();
    (void)once;
    return *the_pool.load();
}

// In a child of fork OpenMP's workers and ours are gone. Watched from the loading of the library
// on: the host may have started its workers before our first call.
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] {
    forked = true;
    if (the_pool.load()) the_pool = new Pool;
});

}  // namespace

void parallel_raw(std::int64_t items, int threads, void (*body)(void*, std::int64_t),
                  void* context) {
    if (threads > items) threads = static_cast<int>(items);
    if (threads > kMaxThreads) threads = kMaxThreads;
    if (threads > 1 && !inside) {
        Job job;
        job.body = body;
        job.context = context;
        job.items = items;
        if (const Region region = host_region()) {
            run_in_host(region, &job, threads);
            return;
        }
        Pool& workers = pool();
        std::unique_lock<std::mutex> lock(workers.owner(), std::try_to_lock);
        if (lock.owns_lock()) {
            workers.run(job, threads);
            return;
        }
    }
    for (std::int64_t item = 0; item < items; ++item) body(context, item);
}

int worthwhile_threads(int threads, double operations) {
    const double worth = operations / kOperationsPerThread;
    return worth < threads ? (worth < 1.0 ? 1 : static_cast<int>(worth)) : threads;
}

void* scratch(Slot slot, std::size_t bytes) {
    Pages& pages = mine.slots[static_cast<int>(slot)];
    pages.reserve(bytes);
    return pages.get();
}

}  // namespace spc

extern "C" void spc_release_scratch(void) {
    ++spc::release_epoch;  // each worker frees its own before its next job
    spc::mine.release();
}
