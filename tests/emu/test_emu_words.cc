/* SPDX-License-Identifier: Apache-2.0
 *
 * The words of the language: indices, warp collectives, barriers, atomics, conversions; and what
 * the machine says to kernels that misuse them.
 */
#include "check.h"
#include "cuda/ptx.cuh"

#include <math.h>
#include <stdexcept>
#include <vector>

namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int SEEDS = 8;

/* A launch without shared memory under one seed. */
template <class F> const char *run(int seed, int64_t blocks, int threads, F &&kernel) {
    pbs_emu_set(static_cast<uint64_t>(seed), emu::LAZY);
    return emu::launch("test", blocks, threads, 0, kernel);
}

/* The value that each lane gets from f, over all seeds, is expected(lane). */
template <class F, class E> void each_lane(const char *name, F &&f, E &&expected) {
    for (int seed = 0; seed < SEEDS; seed++) {
        std::vector<int64_t> got(32);
        CHECK_RUNS(run(seed, 1, 32, [&] {
            const int lane = static_cast<int>(threadIdx.x);
            got[static_cast<size_t>(lane)] = static_cast<int64_t>(f(lane));
        }));
        for (int lane = 0; lane < 32; lane++)
            CHECK(got[static_cast<size_t>(lane)] == static_cast<int64_t>(expected(lane)),
                  "%s: lane %d has %lld", name, lane,
                  static_cast<long long>(got[static_cast<size_t>(lane)]));
    }
}

} // namespace

EMU_TEST(indices) {
    for (int seed = 0; seed < SEEDS; seed++) {
        std::vector<int> count(7 * 70);
        CHECK_RUNS(run(seed, 7, 70, [&] {
            count[blockIdx.x * blockDim.x + threadIdx.x] +=
                gridDim.x == 7 && blockDim.x == 70 && threadIdx.y == 0 && gridDim.y == 1;
        }));
        for (const int n : count) CHECK(n == 1, "an index ran %d times", n);
    }
}

EMU_TEST(shuffles) {
    each_lane(
        "xor", [](int l) { return __shfl_xor_sync(ALL, l, 5); }, [](int l) { return l ^ 5; });
    each_lane(
        "xor, width 8", [](int l) { return __shfl_xor_sync(ALL, l, 8, 8); },
        [](int l) { return l & 8 ? l ^ 8 : l; }); /* only to lower segments */
    each_lane(
        "up", [](int l) { return __shfl_up_sync(ALL, l, 3); },
        [](int l) { return l < 3 ? l : l - 3; });
    each_lane(
        "up, width 4", [](int l) { return __shfl_up_sync(ALL, l, 1, 4); },
        [](int l) { return l % 4 ? l - 1 : l; });
    each_lane(
        "down", [](int l) { return __shfl_down_sync(ALL, l, 30); },
        [](int l) { return l < 2 ? l + 30 : l; });
    each_lane(
        "index", [](int l) { return __shfl_sync(ALL, l, 31 - l); }, [](int l) { return 31 - l; });
    each_lane(
        "index, width 16", [](int l) { return __shfl_sync(ALL, l, 18, 16); },
        [](int l) { return l / 16 * 16 + 2; });
    each_lane(
        "64 bits", [](int l) { return __shfl_sync(ALL, l * 0x100000001ll, 7); },
        [](int) { return 0x700000007ll; });
    each_lane(
        "float", [](int l) { return __shfl_xor_sync(ALL, l + 0.5f, 1) * 2; },
        [](int l) { return (l ^ 1) * 2 + 1; });
    /* Two halves of a warp, each with its own mask, in loops of different length. */
    each_lane(
        "halves",
        [](int l) {
            int x = l;
            for (int i = 0; i < (l < 16 ? 2 : 5); i++)
                x = __shfl_xor_sync(l < 16 ? 0xffffu : 0xffff0000u, x, 1);
            return x;
        },
        [](int l) { return l < 16 ? l : l ^ 1; });
    each_lane(
        "ended lanes give rubbish, not a deadlock",
        [](int l) { return l >= 16 ? 0 : __shfl_xor_sync(ALL, l, 1); },
        [](int l) { return l >= 16 ? 0 : l ^ 1; });
    each_lane(
        "the rubbish", [](int l) { return l >= 16 ? 0u : __shfl_sync(ALL, 1u, 31); },
        [](int l) { return l >= 16 ? 0u : 0xFFFDFFFDu; });
    /* Some lanes meet among themselves before they join the others. */
    each_lane(
        "a part first",
        [](int l) {
            const int other = 31 - l;
            if (l < 16) l = __shfl_xor_sync(0xffffu, l, 1);
            return __shfl_sync(ALL, l, other);
        },
        [](int l) { return l < 16 ? 31 - l : (31 - l) ^ 1; });
}

EMU_TEST(votes) {
    each_lane(
        "ballot", [](int l) { return __ballot_sync(ALL, l % 3 == 0); },
        [](int) { return 0x49249249u; });
    each_lane(
        "any", [](int l) { return __any_sync(ALL, l == 9); }, [](int) { return 1; });
    each_lane(
        "none", [](int) { return __any_sync(ALL, 0); }, [](int) { return 0; });
    each_lane(
        "all", [](int) { return __all_sync(ALL, 2); }, [](int) { return 1; });
    each_lane(
        "not all", [](int l) { return __all_sync(ALL, l); }, [](int) { return 0; });
    each_lane(
        "match", [](int l) { return __match_any_sync(ALL, l % 2); },
        [](int l) { return 0x55555555u << l % 2; });
}

EMU_TEST(barriers) {
    for (int seed = 0; seed < SEEDS; seed++) {
        std::vector<int> count(200), any(200), all(200);
        CHECK_RUNS(run(seed, 1, 200, [&] {
            const unsigned i = threadIdx.x;
            count[i] = __syncthreads_count(i % 3 == 0);
            any[i] = __syncthreads_or(i == 150);
            all[i] = __syncthreads_and(i != 150);
            if (i < 20) return; /* the barrier counts those that live */
            __syncthreads();
        }));
        for (size_t i = 0; i < 200; i++)
            CHECK(count[i] == 67 && any[i] == 1 && all[i] == 0, "thread %zu: %d %d %d", i, count[i],
                  any[i], all[i]);
    }
}

EMU_TEST(atomics) {
    int sum = 0, most = -1;
    unsigned bits = 0;
    unsigned long long wide = 0;
    CHECK_RUNS(run(0, 3, 64, [&] {
        const int i = static_cast<int>(threadIdx.x);
        atomicAdd(&sum, i);
        atomicMax(&most, i);
        atomicOr(&bits, 1u << i % 32);
        atomicAdd(&wide, 1ull << 32);
    }));
    CHECK(sum == 3 * 63 * 32 && most == 63 && bits == ALL && wide == 192ull << 32, "%d %d %x", sum,
          most, bits);
    int at = 5;
    CHECK(atomicCAS(&at, 4, 9) == 5 && at == 5 && atomicCAS(&at, 5, 9) == 5 && at == 9, "%d", at);
    CHECK(__clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __brev(1) == 1u << 31 &&
              __popcll(~0ull) == 64 && __umulhi(1u << 31, 6) == 3,
          "bit words");
}

/* ---- 16-bit numbers -------------------------------------------------------------------------- */
namespace {

/* The nearest of all 65536, the even one of two: nothing shared with float16.h but the decoding. */
template <float (*decode)(uint16_t)> struct rounding {
    std::vector<double> value; /* of finite bits, ascending from 0 */

    explicit rounding(int finite, int mantissa_bits) {
        for (int bits = 0; bits < finite; bits++)
            value.push_back(decode(static_cast<uint16_t>(bits)));
        /* What follows the largest: beyond half the way there lies infinity. */
        value.push_back(value.back() + ldexp(1.0, ilogb(value.back()) - mantissa_bits));
    }

    uint16_t nearest(float x) const {
        const uint16_t sign = signbit(x) ? 0x8000 : 0;
        const double size = fabs(static_cast<double>(x));
        size_t low = 0, high = value.size() - 1;
        if (size >= value.back()) return static_cast<uint16_t>(sign | high);
        while (high - low > 1) (value[(low + high) / 2] <= size ? low : high) = (low + high) / 2;
        const double down = size - value[low], up = value[high] - size;
        const size_t bits = down < up || (down == up && low % 2 == 0) ? low : high;
        return static_cast<uint16_t>(sign | bits);
    }
};

template <class R> void check_rounding(const char *name, const R &reference, uint16_t (*f)(float)) {
    emu_test::rng r(3);
    for (int i = 0; i < 200000 / EMU_TEST_THIN; i++) {
        float x = emu::bits_float(r.next());
        if (i % 4 == 0) { /* ties and their neighbours */
            const size_t at = r.below(static_cast<uint32_t>(reference.value.size() - 1));
            x = static_cast<float>((reference.value[at] + reference.value[at + 1]) / 2);
            if (i % 3) x = nextafterf(x, i % 3 == 1 ? 0 : INFINITY);
        }
        const uint16_t expected = isnan(x) ? 0x7fff : reference.nearest(x);
        CHECK(f(x) == expected, "%s: %a gives %04x, not %04x", name, static_cast<double>(x), f(x),
              expected);
    }
}

} // namespace

EMU_TEST(rounding_to_16_bits) {
    CHECK(emu::fp16_to_float(0x3c00) == 1 && emu::fp16_to_float(0xc001) == -2 - 0x1p-9f &&
              emu::fp16_to_float(1) == 0x1p-24f && emu::fp16_to_float(0x7bff) == 65504 &&
              emu::fp16_to_float(0xfc00) == -INFINITY && isnan(emu::fp16_to_float(0x7e00)),
          "fp16");
    CHECK(emu::bf16_to_float(0x3f80) == 1 && emu::bf16_to_float(0xc040) == -3, "bf16");
    check_rounding("fp16", rounding<emu::fp16_to_float>(0x7c00, 10), emu::float_to_fp16);
    check_rounding("bf16", rounding<emu::bf16_to_float>(0x7f80, 7), emu::float_to_bf16);
    CHECK(pbs::ptx::pack<pbs::bf16>(1, -2) == 0xc0003f80u, "the first is the low half");
    CHECK(pbs::ptx::ex2(-INFINITY) == 0 && pbs::ptx::ex2(3) == 8 && pbs::ptx::ex2(-140) == 0 &&
              pbs::ptx::lg2(8) == 3 && pbs::ptx::lg2(0) == -INFINITY,
          "ex2, lg2");
}

/* ---- kernels that misuse them ---------------------------------------------------------------- */
EMU_TEST(divergence) {
    for (int seed = 0; seed < SEEDS; seed++) {
        CHECK_FAILS(run(seed, 1, 32,
                        [] {
                            if (threadIdx.x < 16)
                                __shfl_xor_sync(ALL, 0, 1);
                            else
                                __ballot_sync(ALL, 1);
                        }),
                    "divergence: ");
        CHECK_FAILS(run(seed, 1, 32, [] { __syncwarp(threadIdx.x < 16 ? 0x1ffffu : ALL); }),
                    "divergence: ");
        CHECK_FAILS(run(seed, 1, 32, [] { __syncwarp(1); }), "not in its own mask");
    }
}

EMU_TEST(deadlocks) {
    for (int seed = 0; seed < SEEDS; seed++) {
        const std::string said = emu_test::said(run(seed, 1, 96, [] {
            if (threadIdx.x < 64) __syncthreads();
            if (threadIdx.x >= 80) __shfl_sync(ALL, 1, 0);
            if (threadIdx.x >= 64) __syncthreads();
            if (threadIdx.x == 64) __syncthreads();
        }));
        CHECK(said.find("deadlock") != std::string::npos &&
                  said.find("warp 1 lanes 0-31: __syncthreads (barrier 0: 80 of 96 threads") !=
                      std::string::npos &&
                  said.find("warp 2 lanes 16-31: __shfl_sync (mask ffffffff, arrived ffff0000)") !=
                      std::string::npos,
              "got: %s", said.c_str());
    }
}

/* More than any stack holds, and no tail call. */
static int recurse(int depth) {
    volatile int x = depth;
    return depth ? recurse(depth - 1) + x : x;
}

EMU_TEST(broken_kernels) {
    CHECK_FAILS(run(0, 1, 64, [] { throw std::runtime_error("thrown on purpose"); }),
                "exception: thrown on purpose");
    CHECK_FAILS(run(0, 1, 64, [] { throw 1; }), "exception");
    volatile int zero = 0;
    CHECK_FAILS(run(0, 1, 64, [&] { zero = 700 / zero; }), "division by zero");
    volatile uintptr_t nowhere = 64;
    CHECK_FAILS(run(0, 1, 64, [&] { *reinterpret_cast<volatile int *>(nowhere) = 1; }),
                "invalid address");
    CHECK_FAILS(run(0, 1, 64, [] { __trap(); }), "__trap");
    CHECK_FAILS(run(0, 1, 64, [] { recurse(1 << 20); }), "stack is full");
    CHECK_FAILS(run(0, 1, 1025, [] {}), "threads 1025");
    CHECK_FAILS(run(0, 1ll << 31, 32, [] {}), "blocks 2147483648");
    CHECK_FAILS(emu::launch("test", 1, 32, 228 << 10, [] {}), "shared memory");
    CHECK_RUNS(run(0, 1, 64, [] { __syncthreads(); })); /* the machine is whole after all these */
}
