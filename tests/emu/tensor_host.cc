/* SPDX-License-Identifier: Apache-2.0 */
#include "tensor_host.h"

namespace emu {

/* "tensor" */
constexpr uint64_t MAGIC = 0x74656e736f720000ull;

void encode_tensor_map(uint64_t *words, const tensor_box &box) {
    words[0] = MAGIC | static_cast<uint64_t>(box.rank) << 8 | static_cast<uint64_t>(box.mode);
    words[1] = reinterpret_cast<uint64_t>(box.base);
    for (int i = 0; i < 5; i++) {
        words[2 + i] = box.size[i];
        words[7 + i] = box.stride[i];
    }
    words[12] = words[13] = words[14] = words[15] = 0;
    for (int i = 0; i < 5; i++)
        words[12 + i / 4] |= static_cast<uint64_t>(box.box[i]) << 16 * (i % 4);
}

bool decode_tensor_map(tensor_box &box, const uint64_t *words) {
    if (words[0] >> 16 != MAGIC >> 16) return false;
    box.rank = static_cast<int32_t>(words[0] >> 8 & 0xff);
    box.mode = static_cast<int32_t>(words[0] & 0xff);
    box.base = reinterpret_cast<char *>(words[1]);
    for (int i = 0; i < 5; i++) {
        box.size[i] = words[2 + i];
        box.stride[i] = words[7 + i];
        box.box[i] = static_cast<uint16_t>(words[12 + i / 4] >> 16 * (i % 4));
    }
    return true;
}

} // namespace emu
