/* A group's Hadamard rotation, by sums and differences in the order that rotated.py says. */
#ifndef SSDTUNE_ROTATE_H
#define SSDTUNE_ROTATE_H
#include "native.h"

enum { WIDE = WIDE_WORDS };
enum { MAX_ROTATED = 128 };
typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef int32_t places __attribute__((vector_size(4 * WIDE)));

#if defined(__clang__)
#define SHUFFLED(a, ...) __builtin_shufflevector(a, a, __VA_ARGS__)
#else
#define SHUFFLED(a, ...) __builtin_shuffle(a, (places){__VA_ARGS__})
#endif

/* Of elements 1, 2, ... WIDE / 2 apart: each with the one that it is paired with in its place. `a - b` is `b (-1) + a`
 * to the bit. */
#if defined(__AVX512F__)
#define BY_1 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#define BY_2 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13
#define BY_4 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11
#define BY_8 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7
static const wide SIGNS[4] = {
    {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
    {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
    {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
    {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
};
#elif defined(__AVX2__)
#define BY_1 1, 0, 3, 2, 5, 4, 7, 6
#define BY_2 2, 3, 0, 1, 6, 7, 4, 5
#define BY_4 4, 5, 6, 7, 0, 1, 2, 3
static const wide SIGNS[3] = {
    {1, -1, 1, -1, 1, -1, 1, -1}, {1, 1, -1, -1, 1, 1, -1, -1}, {1, 1, 1, 1, -1, -1, -1, -1}};
#else
#define BY_1 1, 0, 3, 2
#define BY_2 2, 3, 0, 1
static const wide SIGNS[2] = {{1, -1, 1, -1}, {1, 1, -1, -1}};
#endif

INLINE wide rotated_within(wide a)
{
    a = SHUFFLED(a, BY_1) + a * SIGNS[0];
    a = SHUFFLED(a, BY_2) + a * SIGNS[1];
#if defined(__AVX2__)
    a = SHUFFLED(a, BY_4) + a * SIGNS[2];
#endif
#if defined(__AVX512F__)
    a = SHUFFLED(a, BY_8) + a * SIGNS[3];
#endif
    return a;
}

/* In place. n: 32, 64 or 128, constant where it shall be fast. */
INLINE void rotate(float *group, int n, float root)
{
    wide of[MAX_ROTATED / 4];
    const int num = n / WIDE;
#pragma GCC unroll 32
    for (int i = 0; i < num; i++) {
        wide a;
        memcpy(&a, group + i * WIDE, sizeof a);
        of[i] = rotated_within(a);
    }
#pragma GCC unroll 8
    for (int half = 1; half < num; half *= 2)
#pragma GCC unroll 32
        for (int i = 0; i < num; i++)
            if (!(i & half)) {
                const wide a = of[i], b = of[i + half];
                of[i] = a + b;
                of[i + half] = a - b;
            }
#pragma GCC unroll 32
    for (int i = 0; i < num; i++) {
        const wide a = of[i] * root;
        memcpy(group + i * WIDE, &a, sizeof a);
    }
}

/* Every whole group of n elements. */
INLINE void rotate_all(float *values, int64_t n, int64_t group)
{
    switch (group) {
    case 32:
        for (; n >= 32; n -= 32, values += 32)
            rotate(values, 32, 0.17677669529663687f);
        break;
    case 64:
        for (; n >= 64; n -= 64, values += 64)
            rotate(values, 64, 0.125f);
        break;
    default:
        for (; n >= 128; n -= 128, values += 128)
            rotate(values, 128, 0.08838834764831845f);
    }
}

#endif
