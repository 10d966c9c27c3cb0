// Runs a GPU function on the host: every thread of a threadgroup is a thread of its own.
//
// Threads run freely between barriers, so ThreadSanitizer sees a race or a missing barrier as the
// GPU would; buffers have their exact size, so AddressSanitizer sees a step beyond the end.
#pragma once

#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace host {

constexpr int LANES = 32;

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "host: %s\n", reason);
  std::_Exit(3);
}

// A barrier that knows when it can never open, because a thread has returned without it.
class Barrier {
 public:
  explicit Barrier(int members) : members_(members) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (++waiting_ == members_) {
      open();
      return;
    }
    check();
    const int turn = turn_;
    opened_.wait(lock, [&] { return turn != turn_; });
  }

  void leave() {
    std::lock_guard<std::mutex> lock(mutex_);
    ++gone_;
    check();
    if (gone_ == members_) gone_ = 0;
  }

 private:
  void open() {
    waiting_ = 0;
    ++turn_;
    opened_.notify_all();
  }

  void check() {
    if (waiting_ && gone_) fail("a barrier that not every thread reaches");
  }

  const int members_;
  int waiting_ = 0, gone_ = 0, turn_ = 0;
  std::mutex mutex_;
  std::condition_variable opened_;
};

struct Simdgroup {
  explicit Simdgroup(int lanes) : lanes(lanes), barrier(lanes) {}

  const int lanes;
  Barrier barrier;
  float slot[LANES];
};

// Where a thread is.
struct Thread {
  unsigned group, groups, index, threads;
  Simdgroup* simdgroup;
  Barrier* barrier;

  int lane() const { return index % LANES; }

  // Each lane's value, seen by all lanes of the simdgroup.
  template <typename F>
  float exchange(float value, F&& read) {
    simdgroup->slot[lane()] = value;
    simdgroup->barrier.wait();
    const float found = read(simdgroup->slot, simdgroup->lanes);
    simdgroup->barrier.wait();
    return found;
  }

  float sum(float value) {
    return exchange(value, [](const float* slot, int lanes) {
      float total = 0;
      for (int lane = 0; lane < lanes; ++lane) total += slot[lane];
      return total;
    });
  }

  float shuffle_xor(float value, int mask) {
    const int from = lane() ^ mask;
    return exchange(value, [from](const float* slot, int lanes) {
      if (from >= lanes) fail("a shuffle from a lane that does not exist");
      return slot[from];
    });
  }
};

inline thread_local Thread* self = nullptr;

// Converts to whatever pointer the function takes.
struct Buffer {
  void* data;

  template <typename T>
  operator T*() const {
    return static_cast<T*>(data);
  }
};

template <typename T>
T by_value(const Buffer& buffer) {
  return *static_cast<const T*>(buffer.data);
}

using Function = void (*)(const Buffer*, const Thread&);

// Groups run one after the other, as a device with one core might run them.
inline void run(Function function, const Buffer* buffers, unsigned grid, unsigned threads) {
  const unsigned groups = (grid + threads - 1) / threads;
  for (unsigned group = 0; group < groups; ++group) {
    const unsigned first = group * threads;
    const unsigned count = grid - first < threads ? grid - first : threads;
    Barrier barrier(count);
    std::vector<std::unique_ptr<Simdgroup>> simdgroups;
    for (unsigned i = 0; i < count; i += LANES) {
      const unsigned left = count - i;
      simdgroups.push_back(std::make_unique<Simdgroup>(left < LANES ? left : LANES));
    }
    std::vector<std::thread> running;
    for (unsigned i = 0; i < count; ++i) {
      running.emplace_back([&, i] {
        Thread thread{group, groups, i, threads, simdgroups[i / LANES].get(), &barrier};
        self = &thread;
        function(buffers, thread);
        thread.simdgroup->barrier.leave();
        barrier.leave();
      });
    }
    for (std::thread& thread : running) thread.join();
  }
}

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The 16-bit types round to nearest, ties to even. They only convert: arithmetic in them would be
// a mistake, and does not compile.
struct bfloat {
  uint16_t word;

  bfloat() = default;
  explicit bfloat(float x) {
    const uint32_t w = bits<uint32_t>(x);
    word = std::isnan(x) ? 0x7fc0 : (w + 0x7fff + (w >> 16 & 1)) >> 16;
  }
  explicit operator float() const { return bits<float>(uint32_t(word) << 16); }
};

struct half {
  uint16_t word;

  half() = default;
  explicit half(float x) {
    const uint16_t sign = bits<uint32_t>(x) >> 16 & 0x8000;
    const float size = std::fabs(x);
    int exponent;
    std::frexp(size, &exponent);
    // Spacing of the halves around x; below 2^-14 it no longer shrinks.
    const int shift = (exponent < -13 ? -13 : exponent) - 11;
    const float steps = std::nearbyint(std::ldexp(size, -shift));
    const float rounded = std::ldexp(steps, shift);
    if (std::isnan(x)) {
      word = 0x7e00;
    } else if (rounded >= 65536.0f) {
      word = sign | 0x7c00;
    } else if (rounded < 0x1p-14f) {
      word = sign | uint16_t(std::ldexp(rounded, 24));
    } else {
      const int top = std::ilogb(rounded);
      word = sign | (top + 15) << 10 | uint16_t(std::ldexp(rounded, 10 - top) - 1024);
    }
  }
  explicit operator float() const {
    const int exponent = word >> 10 & 31, fraction = word & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(float(fraction), -24)
                                       : std::ldexp(float(fraction + 1024), exponent - 25);
    return word & 0x8000 ? -size : size;
  }
};

// --- Jobs: a file of launches in, a file of results out ---

template <typename T>
T read(std::FILE* file) {
  T value;
  if (std::fread(&value, sizeof(T), 1, file) != 1) fail("the file of jobs is cut short");
  return value;
}

enum Kind : int32_t { META, DATA, OUTPUT };

// argv: jobs, results. A job is int32s: function, grid, threads, buffers; then of each buffer int32
// kind, int32 offset, int64 size, all in bytes, and its content unless it is an output.
inline int main(int argc, char** argv, const Function* functions) {
  std::FILE* jobs = std::fopen(argv[1], "rb");
  std::FILE* results = std::fopen(argv[2], "wb");
  if (!jobs || !results) fail("cannot open the files of jobs and results");
  for (int32_t left = read<int32_t>(jobs); left > 0; --left) {
    const int32_t function = read<int32_t>(jobs), grid = read<int32_t>(jobs);
    const int32_t threads = read<int32_t>(jobs), count = read<int32_t>(jobs);
    struct Memory {
      Kind kind;
      int64_t offset, size;
      std::unique_ptr<char[]> bytes, poison;
    };
    std::vector<Memory> memory;
    std::vector<Buffer> buffers, poisoned;
    for (int i = 0; i < count; ++i) {
      const Kind kind = Kind(read<int32_t>(jobs));
      const int64_t offset = read<int32_t>(jobs), size = read<int64_t>(jobs);
      // All bits set is a NaN in every type: what is not written, or read unwritten, shows.
      Memory m{kind, offset, size, std::make_unique<char[]>(size), std::make_unique<char[]>(size)};
      std::memset(m.bytes.get(), 0xff, size);
      std::memset(m.poison.get(), 0xff, size);
      if (kind != OUTPUT && std::fread(m.bytes.get(), 1, size, jobs) != size_t(size)) {
        fail("the file of jobs is cut short");
      }
      buffers.push_back({m.bytes.get() + offset});
      poisoned.push_back({(kind == META ? m.bytes : m.poison).get() + offset});
      memory.push_back(std::move(m));
    }
    // A first run on NaNs leaves threadgroup memory as a GPU may: full of another's values.
    run(functions[function], poisoned.data(), grid < threads ? grid : threads, threads);
    run(functions[function], buffers.data(), grid, threads);
    for (const Memory& m : memory) {
      if (m.kind == OUTPUT) std::fwrite(m.bytes.get(), 1, m.size, results);
    }
  }
  return std::fclose(results);
}

}  // namespace host
