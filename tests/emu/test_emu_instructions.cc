/* SPDX-License-Identifier: Apache-2.0
 *
 * Each sm_80 instruction alone: what it computes, from matrices and the layouts that ptx.cuh
 * states, and what it refuses.
 */
#include "check.h"
#include "cuda/ptx.cuh"

#include <math.h>
#include <vector>

namespace {

using namespace pbs;

constexpr int SEEDS = 8;

struct buffer {
    alignas(1024) uint16_t element[64][32]; /* 64 bytes a row */
    uint32_t word[64];
};

/* One warp, every seed and delivery; the first error, or NULL. */
template <class F> std::string launch(size_t shared, F &&kernel, int threads = 32) {
    for (int seed = 0; seed < SEEDS; seed++)
        for (int delivery = 0; delivery < 3; delivery++) {
            pbs_emu_set(static_cast<uint64_t>(seed), delivery);
            if (const char *error = emu::launch("test", 2, threads, shared, kernel)) return error;
        }
    return "no error";
}

template <class F> void runs(const char *name, F &&kernel, int threads = 32) {
    const std::string said = launch(sizeof(buffer), kernel, threads);
    CHECK(said == "no error", "%s: %s", name, said.c_str());
}

template <class F> void fails(const char *words, F &&kernel, int threads = 32) {
    const std::string said = launch(sizeof(buffer), kernel, threads);
    CHECK(said.find(words) != std::string::npos, "\"%s\" expected, got: %s", words, said.c_str());
}

int lane() { return static_cast<int>(threadIdx.x) % 32; }

} // namespace

/* ---- ldmatrix -------------------------------------------------------------------------------- */
EMU_TEST(ldmatrix) {
    uint32_t got[32][4], got_trans[32][4];
    runs("ldmatrix", [&] {
        PBS_SHARED(buffer, shared);
        for (int c = 0; c < 32; c++) {
            shared.element[lane()][c] = static_cast<uint16_t>(lane() * 100 + c);
            shared.element[lane() + 32][c] = 0;
        }
        __syncthreads();
        /* Matrix m: rows 8 m ... 8 m + 7, columns 8 m ... 8 m + 7. */
        const uint32_t row = ptx::shared_address(&shared.element[lane()][lane() / 8 * 8]);
        ptx::ldmatrix_x4(got[lane()], row);
        ptx::ldmatrix_x4_trans(got_trans[lane()], row);
    });
    for (int t = 0; t < 32; t++)
        for (int m = 0; m < 4; m++)
            for (int half = 0; half < 2; half++) {
                const uint32_t expected = (8 * m + t / 4) * 100 + 8 * m + 2 * (t % 4) + half;
                const uint32_t turned = (8 * m + 2 * (t % 4) + half) * 100 + 8 * m + t / 4;
                CHECK((got[t][m] >> 16 * half & 0xffff) == expected, "lane %d, word %d", t, m);
                CHECK((got_trans[t][m] >> 16 * half & 0xffff) == turned, "trans: lane %d, word %d",
                      t, m);
            }
}

EMU_TEST(ldmatrix_refuses) {
    const auto load_at = [](uint32_t offset, int odd_lane) {
        return [=] {
            PBS_SHARED(buffer, shared);
            uint32_t r[4], row = ptx::shared_address(&shared);
            if (lane() == odd_lane) row += offset;
            ptx::ldmatrix_x4(r, row);
        };
    };
    fails("outside the block's", load_at(sizeof(buffer), 31));
    fails("outside the block's", load_at(0u - 16, 3));
    fails("lane 7): ldmatrix: shared address", load_at(8, 7));
    fails("lanes ffff0000 of the warp have ended or never were", load_at(0, 0), 48);
    fails("ends while lanes", [] {
        PBS_SHARED(buffer, shared);
        uint32_t r[4];
        if (lane() < 31) ptx::ldmatrix_x4(r, ptx::shared_address(&shared));
    });
}

/* ---- mma ------------------------------------------------------------------------------------- */
namespace {

/* c += a b on random matrices against fp64, element by element where ptx.cuh says they lie. */
template <class T> void check_mma(const char *name) {
    float a[16][16], b[16][8], c[16][8], got[32][4];
    emu_test::rng r(5);
    const auto number = [&] {
        return ptx::to_float<T>(static_cast<uint16_t>(ptx::pack<T>(r.uniform(-1, 1), 0)));
    };
    for (auto &row : a)
        for (float &x : row) x = number();
    for (auto &row : b)
        for (float &x : row) x = number();
    for (auto &row : c)
        for (float &x : row) x = r.uniform(-1, 1);
    runs(name, [&] {
        const int g = lane() / 4, q = lane() % 4;
        uint32_t wa[4], wb[2];
        float acc[4];
        for (int i = 0; i < 4; i++) {
            const float *at = &a[g + 8 * (i % 2)][2 * q + 8 * (i / 2)];
            wa[i] = ptx::pack<T>(at[0], at[1]);
            acc[i] = c[g + 8 * (i / 2)][2 * q + i % 2];
        }
        for (int i = 0; i < 2; i++)
            wb[i] = ptx::pack<T>(b[2 * q + 8 * i][g], b[2 * q + 8 * i + 1][g]);
        ptx::mma_m16n8k16<T>(acc, wa, wb[0], wb[1]);
        for (int i = 0; i < 4; i++) got[lane()][i] = acc[i];
    });
    for (int t = 0; t < 32; t++)
        for (int i = 0; i < 4; i++) {
            const int row = t / 4 + 8 * (i / 2), column = 2 * (t % 4) + i % 2;
            double sum = c[row][column], magnitude = fabs(sum);
            for (int k = 0; k < 16; k++) {
                sum += static_cast<double>(a[row][k]) * b[k][column];
                magnitude += fabs(static_cast<double>(a[row][k]) * b[k][column]);
            }
            CHECK(fabs(got[t][i] - sum) <= 0x1p-20 * magnitude, "%s: row %d, column %d: %g, not %g",
                  name, row, column, static_cast<double>(got[t][i]), sum);
        }
}

} // namespace

EMU_TEST(mma) {
    check_mma<bf16>("mma bf16");
    check_mma<fp16>("mma fp16");
    fails("divergence: ", [] {
        float c[4] = {};
        const uint32_t a[4] = {};
        if (lane() % 2)
            ptx::mma_m16n8k16<bf16>(c, a, 0, 0);
        else
            ptx::mma_m16n8k16<fp16>(c, a, 0, 0);
    });
}

/* ---- cp.async -------------------------------------------------------------------------------- */
EMU_TEST(cp_async) {
    std::vector<uint32_t> from(256);
    for (size_t i = 0; i < from.size(); i++) from[i] = static_cast<uint32_t>(i) + 1;
    bool good = true;
    runs("cp.async", [&] {
        PBS_SHARED(buffer, shared);
        uint32_t *to = reinterpret_cast<uint32_t *>(shared.element[lane()]);
        for (unsigned i = 0; i < 4; i++) {
            /* Nothing is read for the third: its source may be anywhere. */
            const void *source = i == 2 ? reinterpret_cast<const void *>(16) : &from[4 * i];
            ptx::cp_async_16(ptx::shared_address(to + 4 * i), source, i == 2 ? 0 : 16);
            ptx::cp_async_commit();
        }
        ptx::cp_async_wait<3>();
        good &= to[0] == 1 && to[3] == 4;
        ptx::cp_async_wait<1>();
        good &= to[4] == 5 && to[8] == 0 && to[11] == 0;
        ptx::cp_async_wait<0>();
        good &= to[12] == 13 && to[15] == 16;
        ptx::cp_async_commit(); /* an empty group */
        ptx::cp_async_wait<0>();
    });
    CHECK(good, "cp.async: wrong bytes after a wait");
}

/* LAZY: each thread's copies are seen after its own wait, not before. */
EMU_TEST(cp_async_arrives_late) {
    alignas(16) const uint32_t from[4] = {1, 2, 3, 4};
    int early = 0;
    pbs_emu_set(0, emu::LAZY);
    CHECK_RUNS(emu::launch("test", 1, 1, sizeof(buffer), [&] {
        PBS_SHARED(buffer, shared);
        float x;
        ptx::cp_async_16(ptx::shared_address(shared.word), from, 16);
        ptx::cp_async_commit();
        early += shared.word[0] != 0xFFFDFFFDu;
        memcpy(&x, shared.word, 4);
        early += !isnan(x) + !isnan(ptx::to_float<fp16>(static_cast<uint16_t>(shared.word[0])));
        ptx::cp_async_16(ptx::shared_address(shared.word + 4), from, 16);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
        early += shared.word[0] != 1;
        early += shared.word[4] != 0xFFFDFFFDu; /* the later group is still under way */
        ptx::cp_async_wait<0>();
        early += shared.word[4] != 1;
    }));
    CHECK(early == 0, "%d", early);
}

EMU_TEST(cp_async_refuses) {
    alignas(16) static const uint32_t from[8] = {};
    const auto copy = [](uint32_t offset, const void *source, uint32_t bytes) {
        PBS_SHARED(buffer, shared);
        ptx::cp_async_16(ptx::shared_address(&shared) + offset, source, bytes);
        ptx::cp_async_commit();
    };
    const uint32_t own = 16; /* bytes a thread */
    fails("is not a multiple of 16", [=] { copy(own * threadIdx.x + 8, from, 16); });
    fails("is not a multiple of 16", [=] { copy(own * threadIdx.x, from + 1, 16); });
    fails("outside the block's", [=] { copy(sizeof(buffer), from, 16); });
    fails("of 16 bytes to be read", [=] { copy(own * threadIdx.x, from, 32); });
    fails("that nobody waited for", [=] { copy(own * threadIdx.x, from, 16); });

    /* Two copies to one place, a plain write, a read: each while the copy is under way. EAGER does
     * not see the first two, so they end without a wait, which it does see. */
    fails("cp.async", [=] {
        copy(own * threadIdx.x, from, 16);
        copy(own * threadIdx.x, from, 16);
    });
    pbs_emu_set(0, emu::LAZY);
    CHECK_FAILS(emu::launch("test", 1, 32, sizeof(buffer),
                            [=] {
                                PBS_SHARED(buffer, shared);
                                copy(own * threadIdx.x, from, 16);
                                reinterpret_cast<uint32_t *>(&shared)[4 * threadIdx.x] = 1;
                                ptx::cp_async_wait<0>();
                            }),
                "was written in flight");
    CHECK_FAILS(emu::launch("test", 1, 32, sizeof(buffer),
                            [=] {
                                PBS_SHARED(buffer, shared);
                                uint32_t r[4];
                                copy(own * threadIdx.x, from, 16);
                                ptx::ldmatrix_x4(r, ptx::shared_address(&shared));
                                ptx::cp_async_wait<0>();
                            }),
                "ldmatrix: byte 0 of shared memory: a cp.async of thread 0 is under way");
    CHECK_FAILS(emu::launch("test", 1, 32, sizeof(buffer),
                            [=] {
                                copy(own * threadIdx.x, reinterpret_cast<void *>(4096), 16);
                                ptx::cp_async_wait<0>();
                            }),
                "invalid address");
}

/* ---- bounds of shared memory ----------------------------------------------------------------- */
EMU_TEST(shared_memory) {
    for (const size_t bytes : {size_t(4), size_t(1000), size_t(4096), size_t(5000)}) {
        const auto touch = [=](ptrdiff_t at) {
            return [=] {
                volatile unsigned char *p = static_cast<unsigned char *>(emu::shared_memory(bytes));
                if (threadIdx.x == 5) p[at] = 1;
            };
        };
        CHECK(launch(bytes, touch(0)) == "no error", "%zu bytes, the first", bytes);
        CHECK(launch(bytes, touch(static_cast<ptrdiff_t>(bytes) - 1)) == "no error",
              "%zu bytes, the last", bytes);
        CHECK(launch(bytes, touch(static_cast<ptrdiff_t>(bytes))) != "no error",
              "%zu bytes, one behind", bytes);
        CHECK(launch(bytes, touch(-1)) != "no error", "%zu bytes, one before", bytes);
        CHECK(launch(bytes, touch(20000)) != "no error", "%zu bytes, far behind", bytes);
    }
    fails("takes 9999 bytes", [] { emu::shared_memory(9999); });
    fails("outside the block's shared memory", [] {
        int local = 0;
        ptx::shared_address(&local);
    });
    runs("fresh shared memory is NaN", [] {
        PBS_SHARED(buffer, shared);
        for (const uint32_t &x : shared.word)
            if (x != 0xFFFDFFFDu) __trap();
    });
}
