/* What was made in the nearest cache, on its way to memory: rounded to float16, stored past the caches. */
#ifndef SSDTUNE_STREAMS_H
#define SSDTUNE_STREAMS_H
#include "native.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

/* STREAMED: bytes that are stored at once, and what they are aligned to. */
#if defined(__AVX512F__)
enum { STREAMED = 64 };
INLINE void stream(void *to, const void *made) { _mm512_stream_si512(to, _mm512_loadu_si512(made)); }
#elif defined(__AVX2__)
enum { STREAMED = 32 };
INLINE void stream(void *to, const void *made) { _mm256_stream_si256(to, _mm256_loadu_si256(made)); }
#elif defined(__SSE2__)
enum { STREAMED = 16 };
INLINE void stream(void *to, const void *made) { _mm_stream_si128(to, _mm_loadu_si128(made)); }
#else
enum { STREAMED = 1 };
INLINE void stream(void *to, const void *made) { *(uint8_t *)to = *(const uint8_t *)made; }
#endif

/* Streamed stores are seen by other threads only behind a fence. */
INLINE void finish(int64_t is_streamed)
{
#if defined(__SSE2__)
    if (is_streamed)
        _mm_sfence();
#endif
}

/* num_bytes to `to`; past the caches if that is asked for and `to` is aligned for it. */
INLINE void put_made(void *to, const void *made, int64_t num_bytes, int64_t is_streamed)
{
    int64_t at = 0;
    if (is_streamed && (uintptr_t)to % STREAMED == 0)
        for (; at + STREAMED <= num_bytes; at += STREAMED)
            stream((uint8_t *)to + at, (const uint8_t *)made + at);
    memcpy((uint8_t *)to + at, (const uint8_t *)made + at, (size_t)(num_bytes - at));
}

/* To float16, ties to even. Without branches, so that compilers vectorize it. */
INLINE uint16_t half_of(float value)
{
    const uint32_t bits = bits_of(value), size = bits & 0x7FFFFFFFu, sign = bits >> 16 & 0x8000u;
    const uint32_t normal = (size - (112u << 23) + 0xFFFu + (size >> 13 & 1u)) >> 13;
    /* Below 2^-14 float16 has steps of 2^-24, as float32 has from 1/2 on. */
    const uint32_t small = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    const uint32_t is_small = 0u - (size < 113u << 23), is_large = 0u - (size >= 0x477FF000u);
    const uint32_t is_none = 0u - (size > 0x7F800000u);
    const uint32_t finite = (small & is_small) | (normal & ~is_small);
    return (uint16_t)(sign | (0x7C00u & is_large) | (finite & ~is_large) | (0x200u & is_none));
}

enum { MOST_HALVES = 4096 }; /* that are made at a time */

/* n <= MOST_HALVES numbers to float16. */
INLINE void put_float16(uint16_t *to, const float *made, int64_t n, int64_t is_streamed)
{
    _Alignas(64) uint16_t halves[MOST_HALVES];
    for (int64_t i = 0; i < n; i++)
        halves[i] = half_of(made[i]);
    put_made(to, halves, 2 * n, is_streamed);
}

#endif
