/* SPDX-License-Identifier: Apache-2.0
 *
 * Does a GPU do what the emulation believes? One tiny kernel per function of ptx*.cuh
 * (tests/emu/ptx_cases*.h). Compiled twice:
 *
 *   under the emulation   test_ptx_emu FILE    runs all cases in many orders, which must agree, and
 *                                              writes the results
 *   by nvcc               test_ptx FILE        runs them on the GPU and compares
 *
 * Copies bit for bit; ex2 and lg2 to 2^-20 and 2^-22 of 1; sums to 2^-20 of the sum of magnitudes,
 * since hardware cuts bits that fp32 keeps. A line for each case that differs; the exit code tells.
 */
#include "ptx_cases.h"
#include "ptx_cases_sm90.h"
#include "ptx_cases_wgmma.h"

#include "pbs/pbs.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

using namespace ptx_cases;

namespace {

typedef std::vector<uint32_t> words;

std::vector<ptx_case> all_cases() {
    std::vector<ptx_case> list;
    add_sm80(list);
    add_sm90(list);
    add_wgmma(list);
    return list;
}

uint32_t next(uint64_t &state) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 32);
}

/* In (-2, 2), with few bits, by integers alone: the same words on every machine. */
uint32_t small_16(uint32_t random, input kind) {
    const uint32_t sign = random & 0x8000u, fraction = random >> 16;
    return kind == BF16 ? sign | (0x3f00u + fraction % 0x100) : sign | (0x3800u + fraction % 0x800);
}

words input_of(const ptx_case &c, bool magnitudes) {
    const uint32_t special[] = {0x00000000, 0x80000000, 0x7f800000, 0xff800000, 0x7fffffff,
                                0x00000001, 0x3f800000, 0x477fefff, 0x477ff000, 0x33000000,
                                0x3f808000, 0x3f818000, 0x7f7fffff, 0x38801000, 0x38803000};
    uint64_t state = 42;
    words in(c.in_words);
    for (size_t i = 0; i < in.size(); i++) {
        const uint32_t random = next(state), other = next(state);
        if (c.in == BITS) in[i] = random;
        if (c.in == BF16 || c.in == FP16)
            in[i] = small_16(random, c.in) | small_16(other, c.in) << 16;
        if (c.in == FLOATS) { /* exponents from -20 to 6 */
            in[i] = (random & 0x807fffffu) | (107 + other % 27) << 23;
            if (i < sizeof special / sizeof *special) in[i] = special[i];
        }
        if (magnitudes) in[i] &= 0x7fff7fffu;
    }
    return in;
}

bool fill_args(case_args &a, const ptx_case &c, const uint32_t *in, uint32_t *out) {
    memset(&a, 0, sizeof a);
    a.in = in;
    a.out = out;
    a.mode = static_cast<uint32_t>(c.mode);
    memcpy(a.at, c.at, sizeof a.at);
    if (!c.shape.rank) {
        a.bytes = static_cast<uint32_t>(c.at[0][0]);
        return true;
    }
    a.bytes = box_bytes(c.shape);
    tensor_shape shape = c.shape;
    shape.base = c.stores ? static_cast<const void *>(out) : in;
    if (make_tensor_map(&a.map, shape) == PBS_OK) return true;
    printf("%s: %s\n", c.name, pbs_last_error());
    return false;
}

/* ---- running a case ------------------------------------------------------------------------- */
#if defined(__CUDACC__)

bool good(cudaError_t error, const char *name) {
    if (error == cudaSuccess) return true;
    printf("%s: %s\n", name, cudaGetErrorString(error));
    return false;
}

bool run(const ptx_case &c, const words &in, words &out) {
    uint32_t *on_gpu;
    const size_t in_bytes = in.size() * 4, room = (in_bytes + 255) / 256 * 256;
    if (!good(cudaMalloc(&on_gpu, room + out.size() * 4), c.name)) return false;
    uint32_t *results = on_gpu + room / 4;
    cudaMemcpy(on_gpu, in.data(), in_bytes, cudaMemcpyHostToDevice);
    cudaMemset(results, 0, out.size() * 4);
    case_args a;
    if (!fill_args(a, c, on_gpu, results)) return false;

    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(c.cluster), 1, 1};
    config.gridDim = dim3(static_cast<unsigned>(c.cluster));
    config.blockDim = dim3(static_cast<unsigned>(c.threads));
    config.dynamicSmemBytes = c.shared;
    config.attrs = &cluster;
    config.numAttrs = c.cluster > 1;
    bool fine =
        good(cudaFuncSetAttribute(c.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(c.shared)),
             c.name) &&
        good(cudaLaunchKernelEx(&config, c.kernel, static_cast<const case_args>(a)), c.name) &&
        good(cudaDeviceSynchronize(), c.name);
    fine = fine &&
           good(cudaMemcpy(out.data(), results, out.size() * 4, cudaMemcpyDeviceToHost), c.name);
    cudaFree(on_gpu);
    return fine;
}

#else

bool run(const ptx_case &c, const words &in, words &out) {
    out.assign(out.size(), 0);
    case_args a;
    if (!fill_args(a, c, in.data(), out.data())) return false;
    const char *error =
        emu::launch({c.name, c.cluster, c.threads, c.shared, c.cluster, 0}, [&] { c.kernel(a); });
    if (error) printf("%s\n", error);
    return !error;
}

#endif

} // namespace

/* ---- the two programs ------------------------------------------------------------------- */
#if defined(__CUDACC__)

namespace {

float of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The manual grants lg2 an absolute error of 2^-22 between 0.5 and 2, hence the second term. */
bool same(const ptx_case &c, uint32_t got, uint32_t expected, uint32_t magnitude) {
    if (got == expected) return true;
    if (c.compare == EXACT) return false;
    const double x = of_bits(got), y = of_bits(expected);
    if (isnan(x) || isnan(y)) return isnan(x) && isnan(y);
    const double size = c.compare == SUMS ? of_bits(magnitude) : fabs(y);
    return fabs(x - y) <= ldexp(size, -20) + (c.compare == NEAR ? 0x1p-22 : 0);
}

size_t count_differences(const ptx_case &c, const words &got, const words &expected,
                         const words &magnitudes) {
    size_t count = 0;
    for (size_t i = 0; i < got.size(); i++) {
        if (same(c, got[i], expected[i], magnitudes[i])) continue;
        if (!count++)
            printf("%s, swizzle %d: word %zu is %08x (%g), %08x (%g) expected\n", c.name, c.mode, i,
                   got[i], of_bits(got[i]), expected[i], of_bits(expected[i]));
    }
    if (count) printf("%s: %zu of %zu words differ\n", c.name, count, got.size());
    return count;
}

} // namespace

int run_toy_kernels(); /* toy_kernels.cu */

int main(int argc, char **argv) {
    setvbuf(stdout, nullptr, _IOLBF, 4096); /* a log shows where a kernel hung */
    FILE *file = argc > 1 ? fopen(argv[1], "rb") : nullptr;
    if (!file) return printf("usage: %s FILE, which the emulation wrote\n", argv[0]), 2;
    cudaDeviceProp device;
    if (!good(cudaGetDeviceProperties(&device, 0), "device")) return 2;
    int failed = 0, passed = 0, skipped = 0;
    for (const ptx_case &c : all_cases()) {
        words expected(c.out_words), magnitudes(c.out_words), got(c.out_words);
        if (fread(expected.data(), 4, c.out_words, file) != c.out_words ||
            fread(magnitudes.data(), 4, c.out_words, file) != c.out_words)
            return printf("%s: the file is too short; was it made from this source?\n", argv[1]), 2;
        if (c.sm90 && device.major != 9) {
            skipped++;
            continue;
        }
        const bool fine =
            run(c, input_of(c, false), got) && !count_differences(c, got, expected, magnitudes);
        printf("%-28s swizzle %d, %6u words: %s\n", c.name, c.mode, c.out_words,
               fine ? "ok" : "DIFFERS");
        (fine ? passed : failed)++;
    }
    printf("%s: %d passed, %d failed, %d not for this GPU (%d.%d)\n", device.name, passed, failed,
           skipped, device.major, device.minor);
    fclose(file);
    if (device.major == 9) failed += run_toy_kernels();
    return failed != 0;
}

#else

namespace {

/* Element by element: where box element i of place p lies in the tensor, -1 outside, and in the box
 * of shared memory; in elements. */
int64_t tensor_index(const ptx_case &c, int p, uint32_t i) {
    int64_t index = 0;
    for (int d = 0; d < c.shape.rank; d++) {
        const int64_t x = c.at[p][d] + i % static_cast<uint32_t>(c.shape.box[d]);
        i /= static_cast<uint32_t>(c.shape.box[d]);
        if (x < 0 || x >= c.shape.size[d]) return -1;
        index += x * (d ? c.shape.stride[d] / 2 : 1);
    }
    return index;
}

/* What the cases of the copy engine should give, without the emulation. */
words copied(const ptx_case &c, const words &in) {
    words out(c.out_words);
    const uint16_t *from = reinterpret_cast<const uint16_t *>(in.data());
    uint16_t *to = reinterpret_cast<uint16_t *>(out.data());
    const uint32_t elements = box_bytes(c.shape) / 2;
    const uint32_t copies = c.stores ? 1 : static_cast<uint32_t>(c.cluster);
    for (uint32_t block = 0; block < copies; block++)
        for (uint32_t p = 0; p < PLACES; p++)
            for (uint32_t i = 0; i < elements; i++) {
                const int64_t there = tensor_index(c, static_cast<int>(p), i);
                const uint32_t here = swizzled(c.mode, 2 * i) / 2;
                if (c.stores && there >= 0) to[there] = from[(p * elements + here) % 8192];
                if (!c.stores)
                    to[(block * PLACES + p) * elements + here] = there < 0 ? 0 : from[there];
            }
    return out;
}

} // namespace

int main(int argc, char **argv) {
    FILE *file = argc > 1 ? fopen(argv[1], "wb") : nullptr;
    if (!file) return printf("usage: %s FILE\n", argv[0]), 2;
    int failed = 0, passed = 0;
    for (const ptx_case &c : all_cases()) {
        const words in = input_of(c, false), without_signs = input_of(c, true);
        words expected(c.out_words), magnitudes(c.out_words), got(c.out_words);
        bool fine = true;
        for (int i = 0; fine && i < 12; i++) {
            pbs_emu_set(static_cast<uint64_t>(i), i % 3);
            fine = run(c, in, got);
            if (i == 0) expected = got;
            if (fine && got != expected) printf("%s: another order, other results\n", c.name);
            fine = fine && got == expected;
        }
        if (fine && c.shape.rank && expected != copied(c, in)) {
            printf("%s, swizzle %d: not the elements of the box\n", c.name, c.mode);
            fine = false;
        }
        fine = fine && run(c, without_signs, magnitudes);
        fwrite(expected.data(), 4, expected.size(), file);
        fwrite(magnitudes.data(), 4, magnitudes.size(), file);
        (fine ? passed : failed)++;
    }
    fclose(file);
    printf("ptx: %d functions and forms agree in 12 orders, %d do not\n", passed, failed);
    return failed != 0;
}

#endif
