/* What all sources here begin with: names that end in an instruction set's SUFFIX, and floats as their bits. */
#ifndef SSDTUNE_NATIVE_H
#define SSDTUNE_NATIVE_H
#include <stdint.h>
#include <string.h>

#define JOIN(a, b) a##b
#define NAME(a, b) JOIN(a, b)
#define INLINE static inline __attribute__((always_inline))

INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

#endif
