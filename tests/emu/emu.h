/* SPDX-License-Identifier: Apache-2.0
 *
 * CUDA kernels on a CPU, for tests: the words of the language that kernels use, and the launch.
 * Every CUDA thread is a fiber; a launch returns when its grid is done. What the machine does with
 * a kernel that is wrong: machine.h. The instructions: ptx_host.h.
 */
#ifndef EMU_EMU_H
#define EMU_EMU_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "words.h"

/* Options of the launches that follow, of all OS threads: the order in which threads run and the
 * time when copies arrive. Before the first call: PBS_EMU_SEED and PBS_EMU_DELIVERY, else 0. */
extern "C" void pbs_emu_set(uint64_t seed, int delivery);
/* Launches that came to an end, of all OS threads. */
extern "C" int64_t pbs_emu_launches(void);

namespace emu {

/* When asynchronous copies arrive: as late as can be, at a random time, at once. */
enum { LAZY, RANDOM, EAGER };

struct launch_shape {
    const char *name;
    int64_t blocks;
    int threads;
    size_t shared;
    int cluster;  /* blocks of a cluster; they run together */
    int together; /* clusters that run at the same time; 0: as the seed says, 1 to 3 */
    bool overtakes =
        false; /* it may begin before the launches before it are over: see wait_for_launches */
};

/* One grid; NULL, or what went wrong, valid until the next launch of this OS thread. */
const char *launch_grid(const launch_shape &shape, void (*call)(void *), void *kernel);

template <class F> const char *launch(const launch_shape &shape, F &&kernel) {
    auto call = [](void *f) { (*static_cast<decltype(&kernel)>(f))(); };
    return launch_grid(shape, call, const_cast<void *>(static_cast<const void *>(&kernel)));
}

template <class F>
const char *launch(const char *name, int64_t blocks, int threads, size_t shared, F &&kernel) {
    return launch({name, blocks, threads, shared, 1, 0}, static_cast<F &&>(kernel));
}

/* The block's dynamic shared memory, if the launch asked for that many bytes. */
void *shared_memory(size_t bytes);

/* ---- what the words below call --------------------------------------------------------------- */
/* Ends the launch with an error in the calling thread's name. */
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* bar.sync id, threads; threads = 0: all that live. Returns how many of them said yes. */
int barrier_sync(int id, int threads, bool yes);

/* Launches run one after another here, so there is nothing to wait for; but a thread of a launch
 * that overtakes fails if it ends and has never been here. */
void wait_for_launches();

/* Lanes of mask exchange 64 bits: the value of lane `source`. */
enum class shuffle_kind { INDEX, XOR, UP, DOWN };
uint64_t shuffle(shuffle_kind kind, unsigned mask, uint64_t value, int source);
/* The masked lanes' predicates, one bit each. */
enum class ballot_kind { BALLOT, ANY, ALL };
unsigned ballot(ballot_kind kind, unsigned mask, bool yes);
void sync_warp(unsigned mask);
/* Lanes whose value is the caller's. */
unsigned match(unsigned mask, uint64_t value);

/* A shuffle of any 4- or 8-byte value. */
template <class T> T shuffle_value(shuffle_kind kind, unsigned mask, T value, int source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "int, float, 64-bit integers and double");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = shuffle(kind, mask, bits, source);
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class To, class From> To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

/* old = *at; *at = f(old): nothing runs in between, so plain code is atomic. */
template <class T, class F> T exchange(T *at, F &&f) {
    const T old = *at;
    *at = f(old);
    return old;
}

} // namespace emu

/* ---- synchronisation ------------------------------------------------------------------------- */
static inline void __syncthreads() { emu::barrier_sync(0, 0, false); }
static inline int __syncthreads_count(int yes) { return emu::barrier_sync(0, 0, yes != 0); }
static inline int __syncthreads_or(int yes) { return emu::barrier_sync(0, 0, yes != 0) > 0; }
static inline int __syncthreads_and(int yes) { return emu::barrier_sync(0, 0, yes == 0) == 0; }
static inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::sync_warp(mask); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
[[noreturn]] static inline void __trap() { emu::fail("__trap"); }

/* ---- warps ----------------------------------------------------------------------------------- */
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int lane = emu::here->lane;
    const int first = lane & ~(width - 1);
    return emu::shuffle_value(emu::shuffle_kind::INDEX, mask, value,
                              first + (source & (width - 1)));
}

template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    const int lane = emu::here->lane, from = lane ^ lanes;
    const int last = lane | (width - 1);
    return emu::shuffle_value(emu::shuffle_kind::XOR, mask, value, from > last ? lane : from);
}

template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const int lane = emu::here->lane, from = lane - static_cast<int>(by);
    const int first = lane & ~(width - 1);
    return emu::shuffle_value(emu::shuffle_kind::UP, mask, value, from < first ? lane : from);
}

template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const int lane = emu::here->lane, from = lane + static_cast<int>(by);
    const int last = lane | (width - 1);
    return emu::shuffle_value(emu::shuffle_kind::DOWN, mask, value, from > last ? lane : from);
}

static inline unsigned __ballot_sync(unsigned mask, int yes) {
    return emu::ballot(emu::ballot_kind::BALLOT, mask, yes != 0);
}
static inline int __any_sync(unsigned mask, int yes) {
    return emu::ballot(emu::ballot_kind::ANY, mask, yes != 0) != 0;
}
static inline int __all_sync(unsigned mask, int yes) {
    return emu::ballot(emu::ballot_kind::ALL, mask, yes == 0) == 0;
}
template <class T> unsigned __match_any_sync(unsigned mask, T value) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return emu::match(mask, bits);
}
/* The language promises no more than the caller itself. */
static inline unsigned __activemask() { return 1u << emu::here->lane; }

/* ---- atomics on integers --------------------------------------------------------------------- */
template <class T> T atomicAdd(T *at, T v) {
    static_assert(T(0.5f) == T(0), "sums of floats depend on their order");
    return emu::exchange(at, [&](T old) { return T(old + v); });
}
template <class T> T atomicMax(T *at, T v) {
    return emu::exchange(at, [&](T old) { return old > v ? old : v; });
}
template <class T> T atomicMin(T *at, T v) {
    return emu::exchange(at, [&](T old) { return old < v ? old : v; });
}
template <class T> T atomicOr(T *at, T v) {
    return emu::exchange(at, [&](T old) { return T(old | v); });
}
template <class T> T atomicAnd(T *at, T v) {
    return emu::exchange(at, [&](T old) { return T(old & v); });
}
template <class T> T atomicXor(T *at, T v) {
    return emu::exchange(at, [&](T old) { return T(old ^ v); });
}
template <class T> T atomicExch(T *at, T v) {
    return emu::exchange(at, [&](T) { return v; });
}
template <class T> T atomicCAS(T *at, T compare, T v) {
    return emu::exchange(at, [&](T old) { return old == compare ? v : old; });
}

/* ---- arithmetic ------------------------------------------------------------------------------ */
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
static inline int __clzll(long long x) {
    return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

static inline unsigned __float_as_uint(float x) { return emu::bit_cast<unsigned>(x); }
static inline int __float_as_int(float x) { return emu::bit_cast<int>(x); }
static inline float __uint_as_float(unsigned x) { return emu::bit_cast<float>(x); }
static inline float __int_as_float(int x) { return emu::bit_cast<float>(x); }

#define rsqrtf(x) (1.0f / sqrtf(x)) /* glibc 2.42 declares a function of this name */
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

template <class T> T __ldg(const T *at) { return *at; }

#endif /* EMU_EMU_H */
