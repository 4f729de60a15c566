/* SPDX-License-Identifier: Apache-2.0
 *
 * A whole kernel of the sm_90a kind: the correct one is right and gives the same bits whatever the
 * order of threads and copies; each injected bug is caught, most by name.
 */
#include "check.h"
#include "toy_sm90_problem.h"

#include "pbs/pbs.h"

using namespace toy90;

namespace {

constexpr int SEEDS = EMU_TEST_THIN > 1 ? 1 : 8;
constexpr int MANY_SEEDS = EMU_TEST_THIN > 1 ? 3 : 20;
const char *const DELIVERY[] = {"lazy", "random", "eager"};

/* blocks: persistent ones. */
template <int bug, int D>
const char *run(const attention<D> &x, std::vector<uint16_t> &out, int blocks) {
    out.assign(x.q.size(), 0x7fff);
    tensor_map maps[4];
    CHECK(x.make_maps(maps, x.q.data(), x.k.data(), x.v.data(), out.data()), "%s",
          pbs_last_error());
    const params p = x.make_params();
    return emu::launch("toy_attend", blocks, THREADS, sizeof(smem_plan<D>),
                       [&] { toy_attend<D, bug>(maps[0], maps[1], maps[2], maps[3], p); });
}

template <int D> void check_correct(int heads, int len_q, int len_k, int seeds) {
    const attention<D> x(heads, len_q, len_k);
    std::vector<uint16_t> first, out;
    for (int seed = 0; seed < seeds; seed++)
        for (int delivery = 0; delivery < 3; delivery++) {
            pbs_emu_set(static_cast<uint64_t>(seed), delivery);
            CHECK_RUNS(run<CORRECT>(x, out, 1 + seed % 2));
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
        const char *said = run<bug>(x, out, 1);
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
