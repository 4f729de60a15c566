/* SPDX-License-Identifier: Apache-2.0
 *
 * The emulation's tensor map: what the driver would encode, in plain numbers.
 */
#ifndef EMU_TENSOR_HOST_H
#define EMU_TENSOR_HOST_H

#include <stdint.h>

namespace emu {

struct tensor_box {
    char *base;
    int32_t rank;
    int32_t mode;       /* pbs::swizzle */
    uint64_t size[5];   /* elements */
    uint64_t stride[5]; /* bytes; [0] is 2 */
    uint16_t box[5];
};

/* To the 16 words of an opaque map and back; decode is false for words that encode did not make. */
void encode_tensor_map(uint64_t *words, const tensor_box &box);
bool decode_tensor_map(tensor_box &box, const uint64_t *words);

} // namespace emu

#endif /* EMU_TENSOR_HOST_H */
