/* SPDX-License-Identifier: Apache-2.0
 *
 * Whole kernels of the sm_80 kind: the correct ones are right and give the same bits whatever the
 * order of threads and copies; each injected bug is caught.
 */
#include "check.h"
#include "toy_sm80.cuh"

#include <math.h>
#include <memory>
#include <vector>

using namespace toy80;

namespace {

constexpr int SEEDS = 8;
constexpr int MANY_SEEDS = 60 / EMU_TEST_THIN;
const char *const DELIVERY[] = {"lazy", "random", "eager"};

/* Aligned sizes hide errors of masks: 50 queries, 150 keys. */
struct attention {
    int seqlen_q, seqlen_k, head_dim;
    std::vector<uint16_t> q, k, v;
    std::vector<double> expected;

    attention(int seqlen_q, int seqlen_k, int head_dim)
        : seqlen_q(seqlen_q), seqlen_k(seqlen_k), head_dim(head_dim) {
        emu_test::rng r(1);
        fill(q, seqlen_q, r);
        fill(k, seqlen_k, r);
        fill(v, seqlen_k, r);
        solve();
    }

    void fill(std::vector<uint16_t> &rows, int count, emu_test::rng &r) const {
        rows.resize(static_cast<size_t>(count * head_dim));
        for (uint16_t &x : rows) x = emu::float_to_bf16(r.uniform(-2, 2));
    }

    double dot(int i, int j) const {
        double sum = 0;
        for (int d = 0; d < head_dim; d++)
            sum +=
                static_cast<double>(emu::bf16_to_float(q[static_cast<size_t>(i * head_dim + d)])) *
                emu::bf16_to_float(k[static_cast<size_t>(j * head_dim + d)]);
        return sum;
    }

    void solve() {
        expected.assign(q.size(), 0);
        for (int i = 0; i < seqlen_q; i++) {
            std::vector<double> p(static_cast<size_t>(seqlen_k));
            double sum = 0;
            for (int j = 0; j < seqlen_k; j++)
                sum += p[static_cast<size_t>(j)] = exp(dot(i, j) / sqrt(head_dim));
            for (int j = 0; j < seqlen_k; j++)
                for (int d = 0; d < head_dim; d++)
                    expected[static_cast<size_t>(i * head_dim + d)] +=
                        p[static_cast<size_t>(j)] / sum *
                        emu::bf16_to_float(v[static_cast<size_t>(j * head_dim + d)]);
        }
    }

    template <class C> const char *run(std::vector<float> &out) const {
        out.assign(q.size(), NAN);
        const problem x = {q.data(),
                           k.data(),
                           v.data(),
                           out.data(),
                           seqlen_q,
                           seqlen_k,
                           static_cast<float>(1.4426950408889634 / sqrt(head_dim))};
        return emu::launch("toy_attend", (seqlen_q + C::M - 1) / C::M, C::THREADS, sizeof(plan<C>),
                           [&] { toy_attend<C>(x); });
    }

    /* P is rounded to bf16, 2^-9 of each term; |v| <= 2. */
    bool right(const std::vector<float> &out) const {
        for (size_t i = 0; i < out.size(); i++)
            if (!(fabs(out[i] - expected[i]) <= 2 * 0x1p-9 * 2)) return false;
        return true;
    }
};

template <bug b> using small = config<2, 64, 64, b>;

/* ---- injected bugs --------------------------------------------------------------------------- */
/* In how many of the seeds the bug is seen, as an error or as wrong numbers. */
template <bug b> int caught(const attention &x, int delivery, std::string &error) {
    int count = 0;
    for (int seed = 0; seed < SEEDS; seed++) {
        pbs_emu_set(static_cast<uint64_t>(seed), delivery);
        std::vector<float> out;
        const char *said = x.run<small<b>>(out);
        if (said) error = said;
        count += said || !x.right(out);
    }
    return count;
}

/* EAGER lets every copy arrive at once, so it cannot show that nobody waits for one. */
template <bug b> void check_caught(const char *name, bool seen_in_eager, const char *words) {
    const attention x(50, 150, 64);
    for (int delivery = 0; delivery < 3; delivery++) {
        std::string error;
        const int count = caught<b>(x, delivery, error);
        if (delivery == emu::EAGER && !seen_in_eager)
            CHECK(count == 0, "%s, eager: seen in %d of %d seeds", name, count, SEEDS);
        else
            CHECK(count == SEEDS, "%s, %s: seen in %d of %d seeds", name, DELIVERY[delivery], count,
                  SEEDS);
        if (delivery == emu::LAZY)
            CHECK(error.find(words) != std::string::npos, "%s: \"%s\" expected, got: %s", name,
                  words, error.c_str());
    }
}

} // namespace

EMU_TEST(toy_attend) {
    for (const int seqlen_k : {1, 63, 64, 129, 150}) {
        const attention x(50, seqlen_k, 64);
        std::vector<float> first, out;
        for (int seed = 0; seed < MANY_SEEDS; seed++)
            for (int delivery = 0; delivery < 3; delivery++) {
                pbs_emu_set(static_cast<uint64_t>(seed), delivery);
                CHECK_RUNS(x.run<small<CORRECT>>(out));
                if (first.empty()) first = out;
                CHECK(x.right(out), "%d keys: wrong numbers", seqlen_k);
                CHECK(memcmp(first.data(), out.data(), 4 * out.size()) == 0,
                      "%d keys, seed %d, %s: other bits", seqlen_k, seed, DELIVERY[delivery]);
            }
    }
}

EMU_TEST(toy_attend_bugs) {
    check_caught<NO_K_WAIT>("NO_K_WAIT", false, "a cp.async of thread");
    check_caught<NO_V_WAIT>("NO_V_WAIT", true,
                            "a cp.async of thread"); /* none waits for the last V */
    check_caught<NO_BARRIER_AFTER_K>("NO_BARRIER_AFTER_K", true, "");
    check_caught<NO_BARRIER_BEFORE_PV>("NO_BARRIER_BEFORE_PV", true, "");
    check_caught<K_LOADED_EARLY>("K_LOADED_EARLY", true, "");
    check_caught<SWIZZLE_ON_ONE_SIDE>("SWIZZLE_ON_ONE_SIDE", true, "");
    check_caught<WRONG_MASK_COLUMN>("WRONG_MASK_COLUMN", true, "");
    check_caught<BARRIER_IN_SOME_WARPS>("BARRIER_IN_SOME_WARPS", true, "");
    check_caught<SHUFFLE_IN_SOME_LANES>(
        "SHUFFLE_IN_SOME_LANES", true,
        "lanes 16-31: __syncthreads (barrier 0: 32 of 64 threads have arrived)");
    check_caught<LDMATRIX_BEYOND>("LDMATRIX_BEYOND", true, "outside the block's");
}

/* ---- rank by counting ------------------------------------------------------------------------ */
namespace {

template <int missing> bool ranks(int seed, int delivery) {
    constexpr int N = 200;
    emu_test::rng r(7);
    std::vector<int> in(N), out(N);
    for (int &x : in) x = static_cast<int>(r.below(50));
    pbs_emu_set(static_cast<uint64_t>(seed), delivery);
    if (emu::launch("rank_values", 1, N, sizeof(rank_plan),
                    [&] { rank_values<missing>(in.data(), out.data()); }))
        return false;
    for (int i = 1; i < N; i++)
        if (out[static_cast<size_t>(i)] > out[static_cast<size_t>(i - 1)]) return false;
    return true;
}

} // namespace

EMU_TEST(rank_by_counting) {
    for (int delivery = 0; delivery < 3; delivery++) {
        int right[4] = {};
        for (int seed = 0; seed < 20; seed++) {
            right[0] += ranks<0>(seed, delivery);
            right[1] += ranks<1>(seed, delivery);
            right[2] += ranks<2>(seed, delivery);
            right[3] += ranks<3>(seed, delivery);
        }
        CHECK(right[0] == 20, "%s: %d of 20 seeds", DELIVERY[delivery], right[0]);
        for (int missing = 1; missing < 4; missing++)
            CHECK(right[missing] == 0, "%s: barrier %d missing, right in %d of 20 seeds",
                  DELIVERY[delivery], missing, right[missing]);
    }
}
