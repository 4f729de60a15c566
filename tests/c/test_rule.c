/* SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/convert.h"
#include "harness.h"

/* Every fp16 and bf16 value survives a round trip; values between two round to the nearer one. */
void test_convert(void) {
    for (uint32_t h = 0; h < 65536; h++) {
        float a = pbs_bf16_to_fp32((uint16_t)h), b = pbs_fp16_to_fp32((uint16_t)h);
        CHECK(a != a || pbs_fp32_to_bf16(a) == h, "bf16 %x", h);
        CHECK(b != b || pbs_fp32_to_fp16(b) == h, "fp16 %x", h);
        if (a != a) CHECK(isnan(pbs_bf16_to_fp32(pbs_fp32_to_bf16(a))), "bf16 NaN %x", h);
        if (b != b) CHECK(isnan(pbs_fp16_to_fp32(pbs_fp32_to_fp16(b))), "fp16 NaN %x", h);
    }
    for (uint32_t h = 0; h < 0x7bff; h++) { /* halfway points go to the even neighbour */
        float low = pbs_fp16_to_fp32((uint16_t)h), high = pbs_fp16_to_fp32((uint16_t)(h + 1));
        float middle = low + (high - low) / 2;
        CHECK(pbs_fp32_to_fp16(middle) == h + (h & 1), "fp16 middle %x", h);
        CHECK(pbs_fp32_to_fp16(nextafterf(middle, high)) == h + 1, "fp16 above %x", h);
        CHECK(pbs_fp32_to_fp16(nextafterf(middle, low)) == h, "fp16 below %x", h);
    }
    CHECK(pbs_fp32_to_fp16(65520.0f) == 0x7c00, "fp16 overflow");
    CHECK(pbs_fp32_to_bf16(INFINITY) == 0x7f80, "bf16 infinity");
}

enum { COLS = 70, WORDS = 3 };

static int kept(const uint32_t *bits, int n) { return (int)(bits[n / 32] >> (n % 32) & 1); }

static pbs_strip strip_of(float *log_mass, uint32_t *eligible) {
    pbs_strip strip = {1, COLS, log_mass, COLS, eligible, WORDS};
    return strip;
}

/* PREFIX against the brute force, on masses with many exact ties. */
static void test_prefix(void) {
    rng r = {7};
    uint32_t bits[WORDS], before[WORDS] = {0}, eligible[WORDS] = {~0u, ~0u, 63}, scratch[2 * COLS];
    float log_mass[COLS];
    double mass[COLS];
    unsigned char expected[COLS];
    const float taus[] = {-1.0f, 0.0f, 0.1f, 0.5f, 0.9f, 0.99f, 0.99999999f, 1.0f, 7.0f};
    for (int trial = 0; trial < 60; trial++) {
        for (int n = 0; n < COLS; n++) {
            log_mass[n] = (float)rng_below(&r, 6) - 3.0f; /* unnormalised: only shares count */
            mass[n] = exp((double)log_mass[n]);
        }
        pbs_strip strip = strip_of(log_mass, eligible);
        memset(before, 0, sizeof before);
        for (size_t t = 0; t < sizeof taus / sizeof *taus; t++) {
            int32_t count, sum = 0;
            RUN(pbs_apply_rule(PBS_RULE_PREFIX, taus[t], &strip, bits, &count, scratch));
            brute_prefix(mass, COLS, (double)taus[t], expected);
            for (int n = 0; n < COLS; n++) {
                sum += kept(bits, n);
                CHECK(kept(bits, n) == expected[n], "prefix tau %g block %d", (double)taus[t], n);
            }
            CHECK(count == sum, "count %d, bits %d", count, sum);
            for (int w = 0; w < WORDS; w++) /* more tau never removes a block */
                CHECK((before[w] & ~bits[w]) == 0, "tau %g lost a block", (double)taus[t]);
            memcpy(before, bits, sizeof bits);
        }
    }
}

static void test_other_rules(void) {
    rng r = {8};
    uint32_t bits[WORDS], eligible[WORDS] = {0xfffffff0u, 0x0f0f0f0fu, 0}, scratch[2 * COLS];
    float log_mass[COLS], max = -INFINITY;
    int32_t count;
    for (int n = 0; n < COLS; n++) log_mass[n] = rng_uniform(&r, -8.0f, 0.0f);
    for (int n = 0; n < COLS; n++)
        if (kept(eligible, n)) max = fmaxf(max, log_mass[n]);
    pbs_strip strip = strip_of(log_mass, eligible);
    RUN(pbs_apply_rule(PBS_RULE_RELATIVE, 0.1f, &strip, bits, &count, scratch));
    for (int n = 0; n < COLS; n++)
        CHECK(kept(bits, n) == (kept(eligible, n) && expf(log_mass[n] - max) >= 0.1f),
              "relative %d", n);
    RUN(pbs_apply_rule(PBS_RULE_ABSOLUTE, 0.05f, &strip, bits, &count, scratch));
    for (int n = 0; n < COLS; n++)
        CHECK(kept(bits, n) == (kept(eligible, n) && expf(log_mass[n]) >= 0.05f), "absolute %d", n);
    RUN(pbs_apply_rule(PBS_RULE_BUDGET, 4.5f, &strip, bits, &count, scratch));
    CHECK(count == 5, "budget of ceil(4.5) gives %d", count);
    for (int n = 0; n < COLS; n++)
        for (int i = 0; i < COLS; i++)
            CHECK(!kept(bits, n) || kept(bits, i) || !kept(eligible, i) ||
                      log_mass[n] >= log_mass[i],
                  "budget keeps %d, not %d", n, i);
    RUN(pbs_apply_rule(PBS_RULE_BUDGET, 1e9f, &strip, bits, &count, scratch));
    CHECK(count == 28 + 16, "a large budget keeps all, not %d", count);
    log_mass[5] = NAN; /* a row that is not a number is not thinned out */
    RUN(pbs_apply_rule(PBS_RULE_PREFIX, 0.1f, &strip, bits, &count, scratch));
    CHECK(count == 28 + 16, "NaN keeps all, not %d", count);
    for (int n = 0; n < COLS; n++) log_mass[n] = -INFINITY;
    RUN(pbs_apply_rule(PBS_RULE_PREFIX, 0.9f, &strip, bits, &count, scratch));
    CHECK(count == 0, "no mass, nothing kept, not %d", count);
}

void test_rule(void) {
    test_prefix();
    test_other_rules();
}
