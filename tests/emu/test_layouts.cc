/* SPDX-License-Identifier: Apache-2.0
 *
 * The formulas of csrc/cuda/descriptor.cuh, on which kernels and emulation stand: against tables
 * written out from the PTX ISA 9.0, and against CUTLASS's cute where its headers are (EMU_CUTLASS,
 * set by emu90.mk from CUTLASS_HOME).
 */
#include "check.h"
#include "cuda/descriptor.cuh"

#include <stdio.h>

#ifdef EMU_CUTLASS
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#endif

using namespace pbs;

namespace {

const swizzle MODES[] = {SWIZZLE_NONE, SWIZZLE_128B, SWIZZLE_64B, SWIZZLE_32B};

/* 5.5.7: which 16-byte chunk of a line of 128 bytes lies at each place, line after line. */
const char *const TABLE_32B[] = {"01234567", "10325476"};
const char *const TABLE_64B[] = {"01234567", "10325476", "23016745", "32107654"};
const char *const TABLE_128B[] = {"01234567", "10325476", "23016745", "32107654",
                                  "45670123", "54761032", "67452301", "76543210"};

void check_table(swizzle mode, const char *const *lines, uint32_t count) {
    for (uint32_t line = 0; line < 32; line++)
        for (uint32_t place = 0; place < 8; place++) {
            const uint32_t chunk = static_cast<uint32_t>(lines[line % count][place] - '0');
            const uint32_t from = line * 128 + chunk * 16, to = line * 128 + place * 16;
            CHECK(swizzled(mode, from + 6) == to + 6, "swizzle %d: byte %u goes to %u, not %u",
                  mode, from, swizzled(mode, from + 6), to + 6);
        }
}

/* A layout in the manual's notation, up to three modes of row and two of k: strides in elements. */
struct canonical {
    uint32_t rows[3], row_strides[3], k[2], k_strides[2];

    uint32_t bytes(uint32_t row, uint32_t column) const {
        uint32_t at = 0;
        for (int i = 0; i < 3; row /= rows[i], i++) at += row % rows[i] * row_strides[i];
        for (int i = 0; i < 2; column /= k[i], i++) at += column % k[i] * k_strides[i];
        return 2 * at;
    }
};

void check_mn_major(swizzle mode, const canonical &layout, uint32_t leading, uint32_t stride) {
    const uint32_t rows = layout.rows[0] * layout.rows[1] * layout.rows[2];
    for (uint32_t n = 0; n < rows; n++)
        for (uint32_t k = 0; k < 16; k++)
            CHECK(mn_major_offset(mode, leading, stride, n, k) == layout.bytes(n, k),
                  "MN-major, swizzle %d: (%u, %u)", mode, n, k);
}

void check_k_major(swizzle mode, const canonical &layout, uint32_t leading, uint32_t stride) {
    for (uint32_t row = 0; row < 16; row++)
        for (uint32_t k = 0; k < layout.k[0] * layout.k[1]; k++)
            CHECK(k_major_offset(mode, leading, stride, row, k) == layout.bytes(row, k),
                  "K-major, swizzle %d: (%u, %u)", mode, row, k);
}

} // namespace

EMU_TEST(layouts_swizzle) {
    check_table(SWIZZLE_32B, TABLE_32B, 2);
    check_table(SWIZZLE_64B, TABLE_64B, 4);
    check_table(SWIZZLE_128B, TABLE_128B, 8);
    for (uint32_t a = 0; a < 4096; a++) {
        CHECK(swizzled(SWIZZLE_NONE, a) == a, "no swizzle moves byte %u", a);
        for (const swizzle mode : MODES)
            CHECK(swizzled(mode, swizzled(mode, a)) == a, "swizzle %d twice: byte %u", mode, a);
    }
}

/* 9.7.15.5.1.2.1.3. MN-major: the manual's bf16 examples. K-major: the canonical layouts with T = 8
 * and an SBO of 8 rows; one chunk row of the swizzle. */
EMU_TEST(layouts_canonical) {
    check_mn_major(SWIZZLE_NONE, {{8, 1, 2}, {1, 8, 64}, {8, 2}, {8, 128}}, 2 * 128, 2 * 64);
    check_mn_major(SWIZZLE_32B, {{8, 2, 2}, {1, 8, 128}, {8, 2}, {16, 256}}, 2 * 128, 2 * 256);
    check_mn_major(SWIZZLE_64B, {{8, 4, 2}, {1, 8, 256}, {8, 2}, {32, 512}}, 2 * 256, 2 * 512);
    check_mn_major(SWIZZLE_128B, {{8, 8, 2}, {1, 8, 512}, {8, 2}, {64, 1024}}, 2 * 512, 2 * 1024);
    check_k_major(SWIZZLE_NONE, {{8, 2, 1}, {8, 64, 0}, {8, 2}, {1, 128}}, 2 * 128, 2 * 64);
    check_k_major(SWIZZLE_32B, {{8, 2, 1}, {16, 128, 0}, {8, 2}, {1, 8}}, 16, 2 * 128);
    check_k_major(SWIZZLE_64B, {{8, 2, 1}, {32, 256, 0}, {8, 4}, {1, 8}}, 16, 2 * 256);
    check_k_major(SWIZZLE_128B, {{8, 2, 1}, {64, 512, 0}, {8, 8}, {1, 8}}, 16, 2 * 512);
}

/* 9.7.15.5.1.2.2 */
EMU_TEST(layouts_descriptor) {
    const uint64_t d = matrix_descriptor(0x12340, 0x2000, 0x400, SWIZZLE_128B);
    CHECK((d & 0x3fff) == 0x1234, "start address");
    CHECK((d >> 16 & 0x3fff) == 0x200, "leading byte offset");
    CHECK((d >> 32 & 0x3fff) == 0x40, "stride byte offset");
    CHECK((d >> 49 & 7) == 0, "base offset");
    CHECK(d >> 62 == 1, "128-byte swizzle");
    CHECK((d & ~(0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62)) == 0, "other bits");
    CHECK(matrix_descriptor(0, 0, 0, SWIZZLE_64B) >> 62 == 2, "64-byte swizzle");
    CHECK(matrix_descriptor(0, 0, 0, SWIZZLE_32B) >> 62 == 3, "32-byte swizzle");
    CHECK(descriptor_at(d, 32) == matrix_descriptor(0x12360, 0x2000, 0x400, SWIZZLE_128B), "step");
}

/* Figures 148 and 149: each warp of 32 holds 16 rows as the fragments of mma.m16n8k16 say
 * (9.7.14.5.8: groupID = lane / 4, threadID_in_group = lane % 4), 8 columns to four elements. */
/* Element (row, column) of a tile lies where wgmma looks for it, as operand of either kind. */
EMU_TEST(layouts_tiles) {
    for (swizzle mode : {SWIZZLE_128B, SWIZZLE_64B})
        for (uint32_t rows : {64u, 128u})
            for (uint32_t row = 0; row < rows; row++)
                for (uint32_t column = 0; column < 192; column++) {
                    const uint32_t width = swizzle_width(mode), eight = 8 * width;
                    const uint32_t at = tile_offset(mode, rows, row, column);
                    const uint32_t as_k = k_major_step(mode, rows, column / 16) +
                                          k_major_offset(mode, 16, eight, row, column % 16);
                    const uint32_t as_mn =
                        mn_major_step(mode, row / 16) +
                        mn_major_offset(mode, rows * width, eight, column, row % 16);
                    CHECK(swizzled(mode, as_k) == at, "K-major, swizzle %d: (%u, %u)", mode, row,
                          column);
                    CHECK(swizzled(mode, as_mn) == at, "MN-major, swizzle %d: (%u, %u)", mode, row,
                          column);
                }
}

EMU_TEST(layouts_fragments) {
    for (uint32_t thread = 0; thread < 128; thread++) {
        const uint32_t group = thread % 32 / 4, in_group = thread % 4, first = thread / 32 * 16;
        for (uint32_t e = 0; e < 128; e++) {
            CHECK(accumulator_row(thread, e) == first + (e % 4 < 2 ? group : group + 8), "row");
            CHECK(accumulator_column(thread, e) == e / 4 * 8 + in_group * 2 + (e & 1), "column");
        }
        for (uint32_t i = 0; i < 8; i++) {
            const bool upper = i < 2 || (i >= 4 && i < 6);
            CHECK(operand_row(thread, i) == first + (upper ? group : group + 8), "row of A");
            CHECK(operand_column(thread, i) == in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0), "k of A");
        }
    }
}

#ifdef EMU_CUTLASS

namespace {

using cute::Int;
using cute::Shape;
using cute::Step;
using element = cute::bfloat16_t;
namespace gmma = cute::SM90::GMMA;

/* cute counts elements of a 64-row operand down the columns. */
template <int N> void check_accumulator() {
    for (uint32_t t = 0; t < 128; t++)
        for (uint32_t e = 0; e < N / 2; e++)
            CHECK(static_cast<uint32_t>(gmma::CLayout_64xN<N>{}(t, e)) ==
                      accumulator_row(t, e) + 64 * accumulator_column(t, e),
                  "N %d: thread %u, element %u", N, t, e);
}

template <class Layout>
void check_k_atom(swizzle mode, const Layout &of_pointer, uint32_t leading, uint32_t stride) {
    const auto layout = cute::as_position_independent_swizzle_layout(of_pointer);
    for (uint32_t row = 0; row < static_cast<uint32_t>(cute::size<0>(layout)); row++)
        for (uint32_t k = 0; k < static_cast<uint32_t>(cute::size<1>(layout)); k++)
            CHECK(2 * static_cast<uint32_t>(layout(row, k)) ==
                      swizzled(mode, k_major_offset(mode, leading, stride, row, k)),
                  "K-major, swizzle %d: (%u, %u)", mode, row, k);
}

template <class Layout>
void check_mn_atom(swizzle mode, const Layout &of_pointer, uint32_t leading, uint32_t stride) {
    const auto layout = cute::as_position_independent_swizzle_layout(of_pointer);
    for (uint32_t n = 0; n < static_cast<uint32_t>(cute::size<0>(layout)); n++)
        for (uint32_t k = 0; k < static_cast<uint32_t>(cute::size<1>(layout)); k++)
            CHECK(2 * static_cast<uint32_t>(layout(n, k)) ==
                      swizzled(mode, mn_major_offset(mode, leading, stride, n, k)),
                  "MN-major, swizzle %d: (%u, %u)", mode, n, k);
}

template <int B> void check_swizzle(swizzle mode) {
    for (uint32_t a = 0; a < 8192; a++)
        CHECK(static_cast<uint32_t>(cute::Swizzle<B, 4, 3>{}(a)) == swizzled(mode, a), "byte %u",
              a);
}

} // namespace

EMU_TEST(layouts_cute) {
    using cute::tile_to_shape;
    check_accumulator<64>();
    check_accumulator<96>();
    check_accumulator<128>();
    check_accumulator<256>();
    for (uint32_t t = 0; t < 128; t++)
        for (uint32_t i = 0; i < 8; i++)
            CHECK(static_cast<uint32_t>(gmma::ALayout_64x16{}(t, i)) ==
                      operand_row(t, i) + 64 * operand_column(t, i),
                  "A: thread %u, element %u", t, i);

    /* A warp's fragments of mma.m16n8k16, as ptx.cuh describes them. */
    using mma = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
    for (uint32_t t = 0; t < 32; t++) {
        for (uint32_t i = 0; i < 8; i++)
            CHECK(static_cast<uint32_t>(typename mma::ALayout{}(t, i)) ==
                      t / 4 + 8 * (i / 2 % 2) + 16 * (2 * (t % 4) + 8 * (i / 4) + i % 2),
                  "mma A: lane %u, element %u", t, i);
        for (uint32_t i = 0; i < 4; i++) {
            CHECK(static_cast<uint32_t>(typename mma::BLayout{}(t, i)) ==
                      t / 4 + 8 * (2 * (t % 4) + 8 * (i / 2) + i % 2),
                  "mma B: lane %u, element %u", t, i);
            CHECK(static_cast<uint32_t>(typename mma::CLayout{}(t, i)) ==
                      t / 4 + 8 * (i / 2) + 16 * (2 * (t % 4) + i % 2),
                  "mma C: lane %u, element %u", t, i);
        }
    }

    check_swizzle<1>(SWIZZLE_32B);
    check_swizzle<2>(SWIZZLE_64B);
    check_swizzle<3>(SWIZZLE_128B);

    /* Q, K: 128 rows of one chunk; V: 128 columns of 64 keys, chunk after chunk. */
    using K64 = Shape<Int<128>, Int<64>>;
    check_k_atom(SWIZZLE_128B, tile_to_shape(gmma::Layout_K_SW128_Atom<element>{}, K64{}), 16,
                 1024);
    check_k_atom(SWIZZLE_64B,
                 tile_to_shape(gmma::Layout_K_SW64_Atom<element>{}, Shape<Int<128>, Int<32>>{}), 16,
                 512);
    check_k_atom(SWIZZLE_32B,
                 tile_to_shape(gmma::Layout_K_SW32_Atom<element>{}, Shape<Int<128>, Int<16>>{}), 16,
                 256);
    check_k_atom(SWIZZLE_NONE, tile_to_shape(gmma::Layout_K_INTER_Atom<element>{}, K64{}), 128 * 16,
                 128);
    using keys_first = Step<cute::_2, cute::_1>;
    check_mn_atom(SWIZZLE_128B,
                  tile_to_shape(gmma::Layout_MN_SW128_Atom<element>{}, K64{}, keys_first{}),
                  64 * 128, 1024);
    check_mn_atom(SWIZZLE_64B,
                  tile_to_shape(gmma::Layout_MN_SW64_Atom<element>{}, K64{}, keys_first{}), 64 * 64,
                  512);
    check_mn_atom(SWIZZLE_32B,
                  tile_to_shape(gmma::Layout_MN_SW32_Atom<element>{}, K64{}, keys_first{}), 64 * 32,
                  256);
    check_mn_atom(SWIZZLE_NONE,
                  tile_to_shape(gmma::Layout_MN_INTER_Atom<element>{}, K64{}, keys_first{}), 128,
                  64 * 16);

    cute::GmmaDescriptor d;
    d.bitfield.start_address_ = 0x1234;
    d.bitfield.leading_byte_offset_ = 0x200;
    d.bitfield.stride_byte_offset_ = 0x40;
    d.bitfield.layout_type_ = static_cast<uint8_t>(gmma::LayoutType::B64);
    CHECK(d.desc_ == matrix_descriptor(0x12340, 0x2000, 0x400, SWIZZLE_64B), "descriptor");
}

#else

EMU_TEST(layouts_cute) {
    printf("layouts_cute: no CUTLASS headers (CUTLASS_HOME is not set), not compared\n");
}

#endif
