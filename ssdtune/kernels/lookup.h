/* Codes to numbers, by looking up or computing, in each instruction set: what unpack.c is made of. */
#ifndef SSDTUNE_LOOKUP_H
#define SSDTUNE_LOOKUP_H
#include "native.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { LANES = 64 };                /* bytes of a slice's vectors */
enum { STEP = 32, HALF_STEP = 16 }; /* elements, a multiple of which the functions below take */

/* To bfloat16, ties to even. What is no number becomes `nan`, in which processors differ and torch with them. */
INLINE uint16_t nearest(float value, uint16_t nan)
{
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : (uint16_t)rounded;
}

/* What signs add, finite, not 0. is_large: 2^-100 or more. at_once: whether sums may be made the fast way
 * (rounds_at_once, moves_at_once). */
struct step {
    float unset, set;
    int is_large, at_once;
};

/* What each instruction set has:
 *
 *     bytes            BYTES of them; bits shifted over a byte's edge are for `with` to cut off
 *     mapped           each of the bytes, below 16, to that of a table
 *     entries          16 numbers that codes stand for, before zero and scale
 *     lookup           16 bfloat16, ready to be found by code
 *     make_two         two groups' lookups, of (entry - zero) * scale; scales are finite
 *     look_up          STEP codes in the low halves of bytes, of one group, and as many in the high halves, of another
 *     look_up_nibbles  STEP or HALF_STEP codes of one group, one after the other
 *     compute_words    (code - zero) * scale for STEP codes, a byte each; the scale is finite
 *     compute_fused    the same by one operation, code * scale - less, for scales as struct groups has them; line_of: the
 *                      scale and what is less
 *     compute_floats   as compute_words, to float32
 *     look_up_floats   HALF_STEP codes, one after the other, in a table of 16
 *     LOOKUP_BITS      codes with more bits are not looked up
 *     rounds_at_once   whether the processor rounds numbers to bfloat16 by an instruction, to which those below 2^-126
 *                      are 0
 *     CAN_STREAM       whether stores can go past the caches to memory; such ones are aligned
 *
 * and those with vectors, for signs that are added on the way:
 *
 *     five             of each byte the last four bits of a and the fifth of b, for look_up_32
 *     in_order         BYTES codes, one after the other as look_up_nibbles has them, to the last four bits of a byte each
 *     make_moved       for each of two groups its values, rounded, and what signs add to them
 *     look_up_32       STEP codes of one group, the last five bits of a byte each
 *     compute_moved    as compute_fused, rounded, and what that bit of signs adds; widened: the signs, from 64 bytes
 *     moves_at_once    whether compute_moved has a faster way for such a step */
#if defined(__AVX512F__)
#include "lookup_avx512.h"
#elif defined(__AVX2__)
#include "lookup_avx2.h"
#else
#include "lookup_plain.h"
#endif

#endif
