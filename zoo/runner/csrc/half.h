// float16 <-> float32 in plain integers, for processors without an instruction for it.
#pragma once

#include <cstdint>
#include <cstring>

namespace zoo {

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16;
    uint32_t bits = h & 0x7fff;
    float value;
    if (bits >= 0x7c00) {  // infinity, NaN
        bits = sign | 0x7f800000 | (bits & 0x3ff) << 13;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    // Shifted into place the exponent is short by 112; a multiplication mends it, subnormals included.
    bits <<= 13;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    return sign ? -value : value;
}

inline uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits >= 0x7f800000) return uint16_t(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds beyond 65504
    if (bits < 0x38800000) {  // subnormal: let the addition of a power of two round
        float x;
        std::memcpy(&x, &bits, 4);
        x += 0.5f;
        std::memcpy(&bits, &x, 4);
        return uint16_t(sign | (bits - 0x3f000000));
    }
    bits += 0xc8000fff + (bits >> 13 & 1);  // exponent - 112, round to nearest even
    return uint16_t(sign | bits >> 13);
}

}  // namespace zoo
