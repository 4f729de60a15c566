/* SPDX-License-Identifier: Apache-2.0
 *
 * A whole kernel of the sm_90a kind: the correct one is right and gives the same bits whatever the
 * order of threads and copies; each injected bug is caught, most by name.
 */
#include "check.h"
#include "float16.h"
#include "toy_sm90.cuh"

#include "pbs/pbs.h"

#include <math.h>
#include <vector>

using namespace toy90;

namespace {

constexpr int SEEDS = EMU_TEST_THIN > 1 ? 1 : 8;
constexpr int MANY_SEEDS = EMU_TEST_THIN > 1 ? 3 : 20;
const char *const DELIVERY[] = {"lazy", "random", "eager"};

/* [heads, len, head_dim], rows in chunks as wide as the swizzle. */
template <int D> tensor_map map_of(const uint16_t *base, int heads, int len, int box_rows) {
    constexpr int chunk = tile<D>::CHUNK;
    const tensor_shape shape = {base,
                                4,
                                {chunk, len, D / chunk, heads, 1},
                                {0, 2 * D, 2 * chunk, 2 * D * len, 0},
                                {chunk, box_rows, D / chunk, 1, 1},
                                tile<D>::MODE};
    tensor_map map;
    const pbs_status status = make_tensor_map(&map, shape);
    CHECK(status == PBS_OK, "make_tensor_map: %s", pbs_last_error());
    return map;
}

template <int D> struct attention {
    int heads, len_q, len_k;
    std::vector<uint16_t> q, k, v;
    std::vector<double> expected, tolerance;

    attention(int heads, int len_q, int len_k) : heads(heads), len_q(len_q), len_k(len_k) {
        emu_test::rng r(1);
        fill(q, len_q, r);
        fill(k, len_k, r);
        fill(v, len_k, r);
        expected.resize(q.size());
        tolerance.resize(q.size());
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < len_q; i++) solve(h, i);
    }

    void fill(std::vector<uint16_t> &rows, int len, emu_test::rng &r) const {
        rows.resize(static_cast<size_t>(heads * len * D));
        for (uint16_t &x : rows) x = emu::float_to_bf16(r.uniform(-2, 2));
    }

    static double scale() { return 1 / sqrt(D); }

    /* One row in fp64. P is rounded to bf16 (2^-9 of each term), and so is the result. */
    void solve(int head, int i) {
        const uint16_t *row = &q[static_cast<size_t>((head * len_q + i) * D)];
        std::vector<double> p(static_cast<size_t>(len_k)), out(D), sizes(D);
        double sum = 0;
        for (int j = 0; j < len_k; j++) {
            const uint16_t *key = &k[static_cast<size_t>((head * len_k + j) * D)];
            float s = 0;
            for (int d = 0; d < D; d++)
                s += emu::bf16_to_float(row[d]) * emu::bf16_to_float(key[d]);
            sum += p[static_cast<size_t>(j)] = exp(static_cast<double>(s) * scale());
        }
        for (int j = 0; j < len_k; j++)
            for (int d = 0; d < D; d++) {
                const double x =
                    p[static_cast<size_t>(j)] / sum *
                    emu::bf16_to_float(v[static_cast<size_t>((head * len_k + j) * D + d)]);
                out[static_cast<size_t>(d)] += x;
                sizes[static_cast<size_t>(d)] += fabs(x);
            }
        for (int d = 0; d < D; d++) {
            const size_t at = static_cast<size_t>((head * len_q + i) * D + d);
            expected[at] = out[static_cast<size_t>(d)];
            tolerance[at] = 0x1p-8 * (sizes[static_cast<size_t>(d)] + fabs(expected[at]));
        }
    }

    /* blocks: persistent ones. */
    template <int bug> const char *run(std::vector<uint16_t> &out, int blocks) const {
        constexpr int n = tile<D>::BLOCK_N;
        out.assign(q.size(), 0x7fff);
        const tensor_map maps[4] = {
            map_of<D>(q.data(), heads, len_q, GROUP_ROWS), map_of<D>(k.data(), heads, len_k, n),
            map_of<D>(v.data(), heads, len_k, n), map_of<D>(out.data(), heads, len_q, GROUP_ROWS)};
        const params p = {heads, len_q, len_k, (len_q + BLOCK_M - 1) / BLOCK_M,
                          static_cast<float>(scale() * 1.4426950408889634)};
        return emu::launch("toy_attend", blocks, THREADS, sizeof(smem_plan<D>),
                           [&] { toy_attend<D, bug>(maps[0], maps[1], maps[2], maps[3], p); });
    }

    bool right(const std::vector<uint16_t> &out) const {
        for (size_t i = 0; i < out.size(); i++)
            if (!(fabs(emu::bf16_to_float(out[i]) - expected[i]) <= tolerance[i])) return false;
        return true;
    }
};

template <int D> void check_correct(int heads, int len_q, int len_k, int seeds) {
    const attention<D> x(heads, len_q, len_k);
    std::vector<uint16_t> first, out;
    for (int seed = 0; seed < seeds; seed++)
        for (int delivery = 0; delivery < 3; delivery++) {
            pbs_emu_set(static_cast<uint64_t>(seed), delivery);
            CHECK_RUNS(x.template run<CORRECT>(out, 1 + seed % 2));
            if (first.empty()) first = out;
            CHECK(x.right(out), "D %d, %d x %d: wrong numbers", D, len_q, len_k);
            CHECK(first == out, "D %d, %d x %d, seed %d, %s: other bits", D, len_q, len_k, seed,
                  DELIVERY[delivery]);
        }
}

/* ---- injected bugs --------------------------------------------------------------------------- */
/* In how many of the seeds the bug is seen, as an error or as wrong numbers. */
template <int bug> int caught(const attention<128> &x, int delivery, std::string &error) {
    int count = 0;
    for (int seed = 0; seed < SEEDS; seed++) {
        pbs_emu_set(static_cast<uint64_t>(seed), delivery);
        std::vector<uint16_t> out;
        const char *said = x.run<bug>(out, 1);
        if (said) error = said;
        count += said || !x.right(out);
    }
    return count;
}

/* least: seeds of 8 in LAZY, RANDOM, EAGER. words: of the error, in LAZY; "": wrong numbers. */
template <int bug>
void check_caught(const char *name, int lazy, int random, int eager, const char *words) {
    static const attention<128> x(1, 200, 299);
    const int least[] = {lazy, random, eager};
    for (int delivery = 0; delivery < 3; delivery++) {
        std::string error;
        const int count = caught<bug>(x, delivery, error);
        CHECK(count >= least[delivery] * SEEDS / 8, "%s, %s: seen in %d of %d seeds", name,
              DELIVERY[delivery], count, SEEDS);
        if (delivery == emu::LAZY && count)
            CHECK(*words ? error.find(words) != std::string::npos : error.empty(),
                  "%s: \"%s\" expected, got: %s", name, words, error.c_str());
    }
}

} // namespace

EMU_TEST(sm90_attend) {
    check_correct<128>(1, 200, 300, MANY_SEEDS);
    check_correct<128>(2, 1, 1, MANY_SEEDS);
    check_correct<128>(1, 127, 129, MANY_SEEDS);
    check_correct<128>(2, 128, 128, MANY_SEEDS / 2);
    check_correct<128>(1, 129, 513, MANY_SEEDS / 2);
}

/* 96: the narrower swizzle; 256: half as many keys a step. */
EMU_TEST(sm90_attend_head_dims) {
    check_correct<64>(2, 130, 257, (MANY_SEEDS + 3) / 4);
    check_correct<96>(2, 130, 257, (MANY_SEEDS + 3) / 4);
    check_correct<256>(1, 130, 257, (MANY_SEEDS + 3) / 4);
}

EMU_TEST(sm90_attend_bugs) {
#define CAUGHT(bug, ...) check_caught<bug>(#bug, __VA_ARGS__)
    CAUGHT(NO_FIRST_K_WAIT, 8, 1, 0, "a bulk copy of thread 0 is under way to it");
    CAUGHT(HALF_THE_BYTES, 8, 8, 8, "0 of 1 arrivals missing, -16384 bytes");
    CAUGHT(P_REWRITTEN, 8, 8, 8, "was changed while the wgmma that reads it is in flight");
    CAUGHT(NO_STORE_WAIT, 8, 8, 8, "which a bulk store has yet to read");
#if EMU_TEST_THIN == 1 /* each is a kernel to compile */
    CAUGHT(NO_V_WAIT, 8, 1, 0, "a bulk copy of thread 0 is under way to it");
    CAUGHT(PRODUCER_PHASE_0, 8, 8, 8, "2 of 2 arrivals missing");
    CAUGHT(CONSUMER_PHASE_1, 8, 8, 8, "a bulk copy of thread 0 is under way to it");
    CAUGHT(NO_EMPTY_WAIT, 8, 8, 8, "an arrival beyond the count");
    CAUGHT(NO_BARRIER_AFTER_INIT, 4, 4, 4, "is not initialised");
    CAUGHT(WRONG_SWIZZLE, 8, 8, 8, "whose swizzle does not start on 512 bytes");
    CAUGHT(STRIDES_SWAPPED, 8, 8, 8, "");
    CAUGHT(NOT_TRANSPOSED, 8, 8, 8, "");
    CAUGHT(WRONG_MASK_COLUMN, 8, 8, 8, "");
    CAUGHT(NO_WGMMA_WAIT, 8, 8, 8, "was touched while a wgmma on it is in flight");
    CAUGHT(NO_WGMMA_FENCE, 8, 8, 8, "without a wgmma.fence");
    CAUGHT(O_SCALED_EARLY, 8, 8, 8, "");
    CAUGHT(V_RELEASED_EARLY, 8, 2, 1, "wgmma");
    CAUGHT(WRONG_STMATRIX_LANES, 8, 8, 8, "");
    CAUGHT(OUT_NOT_SWIZZLED, 8, 8, 8, "");
    CAUGHT(NO_PROXY_FENCE, 8, 8, 8, "without fence.proxy.async");
    CAUGHT(NO_BARRIER_BEFORE_STORE, 8, 8, 8, "bulk");
    CAUGHT(TOO_MANY_REGISTERS, 8, 8, 8, "setmaxnreg.inc (to 232, has 168;");
#endif
#undef CAUGHT
}
