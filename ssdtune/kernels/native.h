/* What all sources here begin with: names that end in an instruction set's SUFFIX, and floats as their bits. */
#ifndef SSDTUNE_NATIVE_H
#define SSDTUNE_NATIVE_H
#include <stdint.h>
#include <string.h>

#define JOIN(a, b) a##b
#define NAME(a, b) JOIN(a, b)
#define INLINE static inline __attribute__((always_inline))

/* 32-bit numbers that sources written in vector extensions take at a time. */
#if defined(__AVX512F__)
#define WIDE_WORDS 16
#elif defined(__AVX2__)
#define WIDE_WORDS 8
#else
#define WIDE_WORDS 4
#endif

/* Takes the part of a job's n pieces of work that begins at *next, for one of the threads that all have the same job: its
 * first piece and the one behind its last. 0 where none is left. */
INLINE int take_part(int64_t *next, int64_t part, int64_t n, int64_t *first, int64_t *stop)
{
    *first = __atomic_fetch_add(next, part, __ATOMIC_RELAXED);
    *stop = n - *first < part ? n : *first + part;
    return *first < n;
}

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
