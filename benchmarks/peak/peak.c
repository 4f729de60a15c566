/* SPDX-License-Identifier: Apache-2.0
 *
 * What one core can do at best: register-only loops, no memory. benchmarks/peak/__init__.py
 * compiles this file with the machine's own C compiler and runs it on as many threads as the
 * benchmark, before and after every sample.
 *
 *   unit            instruction            FLOP per instruction      accumulators
 *   PEAK_C          whatever cc makes of a multiply-add loop   32 floats
 *   PEAK_AVX2       vfmadd231ps ymm        16                        12
 *   PEAK_AVX512     vfmadd231ps zmm        32                        24
 *   PEAK_BF16_DOT   vdpbf16ps zmm          64                        24
 *   PEAK_BF16_AMX   tdpbf16ps              16384                      4
 *
 * peak_clock() gives the core's clock, so that times can be said in cycles.
 *
 * The operands are random-looking: with zeros some cores draw less power and clock higher. The sums
 * stop growing near 2^24, which costs nothing.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>
#include <time.h>

enum { PEAK_C, PEAK_AVX2, PEAK_AVX512, PEAK_BF16_DOT, PEAK_BF16_AMX, PEAK_UNITS };

static const char *const unit_names[PEAK_UNITS] = {"fma-c", "fma-avx2", "fma-avx512", "bf16-dot",
                                                   "bf16-amx"};

/* [0, 512) is read, sums go behind it. Through a volatile pointer, so that no loop is folded. */
static float operands[1024];
static float *volatile operands_at = operands;

static double now(int cpu_time) {
    struct timespec t;
    clock_gettime(cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* A portable loop: 32 independent chains, for the compiler to put into vectors. */
static double run_c(int64_t rounds) {
    float acc[32], factor[32];
    const float *x = operands_at;
    for (int i = 0; i < 32; i++) {
        acc[i] = x[i];
        factor[i] = 0.5f * x[32 + i]; /* below 1, so the chains converge */
    }
    for (int64_t r = 0; r < rounds; r++)
        for (int i = 0; i < 32; i++) acc[i] = acc[i] * factor[i] + x[64 + i];
    memcpy(operands_at + 960, acc, sizeof acc);
    return (double)rounds * 32 * 2;
}

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REPEAT12(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11)
#define REPEAT24(op)                                                                               \
    REPEAT12(op) op(12) op(13) op(14) op(15) op(16) op(17) op(18) op(19) op(20) op(21) op(22) op(23)

/* The empty asm keeps an accumulator in its register and the loop as written. */
#define KEEP(reg) __asm__ volatile("" : "+v"(reg))

__attribute__((target("avx2,fma"))) static double run_avx2(int64_t rounds) {
    const float *x = operands_at;
    const __m256 a = _mm256_loadu_ps(x), b = _mm256_loadu_ps(x + 8);
#define DECLARE(i) __m256 acc##i = _mm256_loadu_ps(x + 8 * i);
#define STEP(i)                                                                                    \
    acc##i = _mm256_fmadd_ps(a, b, acc##i);                                                        \
    KEEP(acc##i);
#define SUM(i) a0 = _mm256_add_ps(a0, acc##i);
    REPEAT12(DECLARE)
    for (int64_t r = 0; r < rounds; r++) { REPEAT12(STEP) }
    __m256 a0 = _mm256_setzero_ps();
    REPEAT12(SUM)
#undef DECLARE
#undef STEP
#undef SUM
    _mm256_storeu_ps(operands_at + 512, a0);
    return (double)rounds * 12 * 16;
}

__attribute__((target("avx512f"))) static double run_avx512(int64_t rounds) {
    const float *x = operands_at;
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
#define DECLARE(i) __m512 acc##i = _mm512_loadu_ps(x + 16 * i);
#define STEP(i)                                                                                    \
    acc##i = _mm512_fmadd_ps(a, b, acc##i);                                                        \
    KEEP(acc##i);
#define SUM(i) a0 = _mm512_add_ps(a0, acc##i);
    REPEAT24(DECLARE)
    for (int64_t r = 0; r < rounds; r++) { REPEAT24(STEP) }
    __m512 a0 = _mm512_setzero_ps();
    REPEAT24(SUM)
#undef DECLARE
#undef SUM
#undef STEP
    _mm512_storeu_ps(operands_at + 512, a0);
    return (double)rounds * 24 * 32;
}

__attribute__((target("avx512f,avx512bf16"))) static double run_bf16_dot(int64_t rounds) {
    const float *x = operands_at;
    /* inline asm: the types of the intrinsic differ between compilers, the instruction does not */
    __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 16);
#define DECLARE(i) __m512 acc##i = _mm512_loadu_ps(x + 16 * i);
#define STEP(i) __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(acc##i) : "v"(a), "v"(b));
#define SUM(i) a0 = _mm512_add_ps(a0, acc##i);
    REPEAT24(DECLARE)
    for (int64_t r = 0; r < rounds; r++) { REPEAT24(STEP) }
    __m512 a0 = _mm512_setzero_ps();
    REPEAT24(SUM)
#undef DECLARE
#undef STEP
#undef SUM
    _mm512_storeu_ps(operands_at + 512, a0);
    return (double)rounds * 24 * 64;
}

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t column_bytes[16];
    uint8_t rows[16];
};

/* Tiles 0..3 accumulate, 4 and 5 hold the first factor, 6 and 7 the second: the 2 x 2 pattern. */
static double run_bf16_amx(int64_t rounds) {
    struct tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.column_bytes[i] = 64;
        config.rows[i] = 16;
    }
    const void *x = operands_at;
    const int64_t stride = 64;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
    __asm__ volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\t"
                     "tileloadd (%0,%1,1), %%tmm4\n\ttileloadd (%0,%1,1), %%tmm5\n\t"
                     "tileloadd (%0,%1,1), %%tmm6\n\ttileloadd (%0,%1,1), %%tmm7" ::"r"(x),
                     "r"(stride)
                     : "memory");
    for (int64_t r = 0; r < rounds; r++)
        __asm__ volatile("tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
                         "tdpbf16ps %tmm6, %tmm5, %tmm2\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
    __asm__ volatile("tilerelease");
    return (double)rounds * 4 * 16384;
}

/* A chain of multiplications, 3 cycles each on every x86-64 core of the last ten years. (Additions
 * will not do: some cores fold a chain of them when they rename registers.) */
static const double chain_cycles = 3;
static void run_chain(int links) {
    uint64_t x = 3;
    for (int i = 0; i < links; i += 8)
        __asm__ volatile("imul %0, %0\n\timul %0, %0\n\timul %0, %0\n\timul %0, %0\n\t"
                         "imul %0, %0\n\timul %0, %0\n\timul %0, %0\n\timul %0, %0"
                         : "+r"(x));
}

static uint64_t xgetbv0(void) {
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return ((uint64_t)hi << 32) | lo;
}

/* AMX state has to be asked for once per process (Linux: ARCH_REQ_XCOMP_PERM, tile data = 18). */
static int amx_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

int peak_has(int unit) {
    uint32_t a, b, c, d, a1 = 0, b7 = 0, d7 = 0, unused;
    if (unit == PEAK_C) return 1;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return 0; /* OSXSAVE */
    const uint64_t saved = xgetbv0();
    if (__get_cpuid_count(7, 0, &unused, &b7, &unused, &d7))
        __get_cpuid_count(7, 1, &a1, &unused, &unused, &unused);
    const int avx2 = (c & (1u << 12)) && (b7 & (1u << 5)) && (saved & 0x6) == 0x6;
    const int avx512 = avx2 && (b7 & (1u << 16)) && (saved & 0xe6) == 0xe6;
    switch (unit) {
    case PEAK_AVX2: return avx2;
    case PEAK_AVX512: return avx512;
    case PEAK_BF16_DOT: return avx512 && (a1 & (1u << 5));
    case PEAK_BF16_AMX:
        return (d7 & (1u << 22)) && (d7 & (1u << 24)) && (saved & 0x60000) == 0x60000 &&
               amx_allowed();
    default: return 0;
    }
}

static double run(int unit, int64_t rounds) {
    switch (unit) {
    case PEAK_AVX2: return run_avx2(rounds);
    case PEAK_AVX512: return run_avx512(rounds);
    case PEAK_BF16_DOT: return run_bf16_dot(rounds);
    case PEAK_BF16_AMX: return run_bf16_amx(rounds);
    default: return run_c(rounds);
    }
}
#else
static const double chain_cycles = 0; /* not known: no clock */
static void run_chain(int links) { (void)links; }
int peak_has(int unit) { return unit == PEAK_C; }
static double run(int unit, int64_t rounds) {
    (void)unit;
    return run_c(rounds);
}
#endif

const char *peak_name(int unit) {
    return unit >= 0 && unit < PEAK_UNITS ? unit_names[unit] : NULL;
}

void peak_init(void) {
    uint32_t state = 12345; /* operands in (-2, -1] or [1, 2), never denormal, also as bf16 pairs */
    for (int i = 0; i < (int)(sizeof operands / sizeof operands[0]); i++) {
        state = state * 1664525u + 1013904223u;
        uint32_t bits = 0x3f803f80u | (state & 0x807f007fu);
        memcpy(&operands[i], &bits, 4);
    }
}

/* GHz of the calling thread's core, 0 if not known: the median of three chains of about 3 us. */
double peak_clock(void) {
    enum { LINKS = 4000 };
    double t[3];
    for (int i = 0; i < 3; i++) {
        const double begin = now(0);
        run_chain(LINKS);
        t[i] = now(0) - begin;
    }
    const double low = t[0] < t[1] ? t[0] : t[1], high = t[0] < t[1] ? t[1] : t[0];
    const double middle = t[2] < low ? low : t[2] > high ? high : t[2];
    return chain_cycles * LINKS / middle * 1e-9;
}

/* GFLOP/s of this thread over about ms milliseconds of one unit, by the wall or by its CPU time. */
double peak_run(int unit, double ms, int cpu_time) {
    double flop = 0, begin = now(cpu_time), end = begin;
    while (end - begin < 1e-3 * ms) {
        flop += run(unit, unit == PEAK_BF16_AMX ? 500 : 20000);
        end = now(cpu_time);
    }
    return flop / (end - begin) * 1e-9;
}
