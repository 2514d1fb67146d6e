/* lookup.h in vectors of 64 bytes; included by it alone. */
#ifndef SSDTUNE_LOOKUP_AVX512_H
#define SSDTUNE_LOOKUP_AVX512_H

enum { BYTES = 64, LOOKUP_BITS = 4, CAN_STREAM = 1 };
typedef __m512i bytes;
typedef struct { __m512 all, even, odd; } entries; /* 16; eight of each, twice */
typedef __m512i lookup;                            /* twice */
typedef __m512i lookup_32;
typedef __m512 floats16;
typedef struct { __m512i of[LANES / STEP]; } sign_words;
typedef struct { __m512 scale, less; } line;

INLINE bytes get(const uint8_t *from) { return _mm512_loadu_si512(from); }
INLINE void keep(uint8_t *to, bytes a) { _mm512_storeu_si512(to, a); }
INLINE bytes none(void) { return _mm512_setzero_si512(); }
INLINE bytes right(bytes a, int n) { return _mm512_srli_epi16(a, (unsigned)n); }
INLINE bytes left(bytes a, int n) { return _mm512_slli_epi16(a, (unsigned)n); }
INLINE bytes with(bytes a, bytes b, int mask)
{
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8((char)mask), 0xF8);
}

INLINE bytes mapped(bytes a, const uint8_t table[16])
{
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), a);
}

INLINE void put(void *to, __m512i a, int is_streamed)
{
    if (is_streamed)
        _mm512_stream_si512(to, a);
    else
        _mm512_storeu_si512(to, a);
}

INLINE entries spread(const float *values)
{
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 of = _mm512_loadu_ps(values);
    return (entries){of, _mm512_permutexvar_ps(even, of), _mm512_permutexvar_ps(odd, of)};
}

/* Up where lower > 0x8000, or = 0x8000 and upper is odd: where lower - is_even has its uppermost bit set. */
INLINE __m512i round_up(__m512i upper, __m512i lower)
{
    const __m512i is_even = _mm512_andnot_si512(upper, _mm512_set1_epi16(1));
    return _mm512_add_epi16(upper, _mm512_srli_epi16(_mm512_subs_epu16(lower, is_even), 15));
}

/* Finite numbers to bfloat16, the even ones and the odd ones joined. */
INLINE __m512i rounded(__m512 even, __m512 odd)
{
    const __m512i a = _mm512_castps_si512(even), b = _mm512_castps_si512(odd);
    const __m512i upper = _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(a, 16), b);
    return round_up(upper, _mm512_mask_blend_epi16(0xAAAAAAAAu, a, _mm512_slli_epi32(b, 16)));
}

INLINE __m512i scaled(__m512 even, __m512 odd, float zero, float scale)
{
    const __m512 z = _mm512_set1_ps(zero), s = _mm512_set1_ps(scale);
    return rounded(_mm512_mul_ps(_mm512_sub_ps(even, z), s), _mm512_mul_ps(_mm512_sub_ps(odd, z), s));
}

INLINE void make_two(lookup to[2], entries of, float zero, float scale, float next_zero, float next_scale)
{
    to[0] = scaled(of.even, of.odd, zero, scale);
    to[1] = scaled(of.even, of.odd, next_zero, next_scale);
}

#if __GNUC__ >= 10 || __clang_major__ >= 9 /* whose assemblers know it */
INLINE int rounds_at_once(void) { return __builtin_cpu_supports("avx512bf16"); }
INLINE __m512i rounded_at_once(__m512 first, __m512 then)
{
    __m512i words;
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(words) : "v"(first), "v"(then));
    return words;
}
/* sum + bfloat16 numbers, of each pair the one that `ones` has a 1 for; the other adds 0. Rounded as any sum. */
INLINE __m512 plus(__m512 sum, __m512i words, uint32_t ones)
{
    __asm__("vdpbf16ps %1, %2, %0" : "+v"(sum) : "v"(_mm512_set1_epi32((int)ones)), "v"(words));
    return sum;
}
#else
INLINE int rounds_at_once(void) { return 0; }
INLINE __m512i rounded_at_once(__m512 first, __m512 then) { return _mm512_setzero_si512(); }
INLINE __m512 plus(__m512 sum, __m512i words, uint32_t ones) { return sum; }
#endif

/* No sum is then 0: no bfloat16 number is the step or its negative. */
INLINE int moves_at_once(struct step by) { return rounds_at_once() && by.is_large && (bits_of(by.set) & 0xFFFFu); }

/* Finite numbers to bfloat16, the first 16 and then the others. */
INLINE __m512i rounded_in_order(__m512 first, __m512 then, int at_once)
{
    if (at_once)
        return rounded_at_once(first, then);
    const __m512i lowers = _mm512_set_epi16(
        62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6,
        4, 2, 0);
    const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(then);
    return round_up(_mm512_permutex2var_epi16(a, _mm512_add_epi16(lowers, _mm512_set1_epi16(1)), b),
                    _mm512_permutex2var_epi16(a, lowers, b));
}

/* Finite numbers to the nearest ones that bfloat16 has. */
INLINE __m512 nearest_floats(__m512 value)
{
    const __m512i bits = _mm512_castps_si512(value), below = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i up = _mm512_mask_add_epi32(below, is_odd, bits, _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32((int)0xFFFF0000u)));
}

INLINE void make_moved(lookup_32 to[2], entries of, float zero, float scale, float next_zero, float next_scale,
                       struct step by)
{
    const __m512 unset = _mm512_set1_ps(by.unset), set = _mm512_set1_ps(by.set);
    for (int i = 0; i < 2; i++) {
        const __m512 z = _mm512_set1_ps(i ? next_zero : zero), s = _mm512_set1_ps(i ? next_scale : scale);
        const __m512 value = nearest_floats(_mm512_mul_ps(_mm512_sub_ps(of.all, z), s));
        to[i] = rounded_in_order(_mm512_add_ps(value, unset), _mm512_add_ps(value, set), by.at_once);
    }
}

INLINE lookup of_words(const uint16_t *words)
{
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)words));
}

/* Only the last five bits of an index count, and the uppermost of these makes no difference to a table twice. */
INLINE void look_up(uint16_t *to, const uint8_t *codes, const lookup in[2], int is_streamed)
{
    const __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    put(to, _mm512_permutexvar_epi16(byte, in[0]), is_streamed);
    put(to + LANES, _mm512_permutexvar_epi16(_mm512_srli_epi16(byte, 4), in[1]), is_streamed);
}

INLINE void look_up_32(uint16_t *to, const uint8_t *codes, lookup_32 in, int is_streamed)
{
    const __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    put(to, _mm512_permutexvar_epi16(byte, in), is_streamed);
}

INLINE bytes five(bytes a, bytes b) { return _mm512_ternarylogic_epi32(_mm512_set1_epi8(16), b, a, 0xCA); }

INLINE bytes in_order(const uint8_t *codes, int is_high_first)
{
    const __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    return is_high_first ? _mm512_or_si512(_mm512_srli_epi16(byte, 4), _mm512_slli_epi16(byte, 8))
                         : _mm512_or_si512(byte, _mm512_slli_epi16(byte, 4));
}

INLINE void look_up_nibbles(uint16_t *to, const uint8_t *codes, lookup in, int step, int is_high_first, int is_streamed)
{
    if (step == STEP) {
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
        const __m512i found = is_high_first
            ? _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16))
            : _mm512_or_si512(byte, _mm512_slli_epi32(byte, 12));
        put(to, _mm512_permutexvar_epi16(found, in), is_streamed);
    } else {
        const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
        const __m256i found = is_high_first
            ? _mm256_or_si256(_mm256_srli_epi32(byte, 4), _mm256_slli_epi32(byte, 16))
            : _mm256_or_si256(byte, _mm256_slli_epi32(byte, 12));
        const __m256i values = _mm256_permutexvar_epi16(found, _mm512_castsi512_si256(in));
        if (is_streamed)
            _mm256_stream_si256((__m256i *)to, values);
        else
            _mm256_storeu_si256((__m256i *)to, values);
    }
}

INLINE void compute_words(uint16_t *to, const uint8_t *codes, float zero, float scale, int is_streamed)
{
    const __m512i pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)codes));
    const __m512i even = _mm512_and_si512(pairs, _mm512_set1_epi32(255)), odd = _mm512_srli_epi32(pairs, 8);
    put(to, scaled(_mm512_cvtepi32_ps(even), _mm512_cvtepi32_ps(odd), zero, scale), is_streamed);
}

INLINE line line_of(float scale, float less) { return (line){_mm512_set1_ps(scale), _mm512_set1_ps(less)}; }

/* Of 16 codes. */
INLINE __m512 fused(const uint8_t *codes, line on)
{
    const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes)));
    return _mm512_fmsub_ps(code, on.scale, on.less);
}

INLINE void compute_fused(uint16_t *to, const uint8_t *codes, line on, int at_once, int is_streamed)
{
    put(to, rounded_in_order(fused(codes, on), fused(codes + 16, on), at_once), is_streamed);
}

INLINE sign_words widened(const uint8_t signs[LANES])
{
    sign_words to;
    for (int i = 0; i < LANES / STEP; i++)
        to.of[i] = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)signs + i));
    return to;
}

/* value - step is -(-value + step): where the step is taken away values' signs are turned, and their sums' again. No sum is
 * 0, whose sign would be wrong. */
INLINE __m512i moved_at_once(__m512 first, __m512 then, __m512i sign, float step)
{
    const __m512i uppermost = _mm512_set1_epi16((short)0x8000), in_turn = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
        16, 0);
    const __m512i words = _mm512_ternarylogic_epi32(rounded_at_once(first, then), sign, uppermost, 0xD2);
    const __m512 even = plus(_mm512_set1_ps(step), words, 0x3F80), odd = plus(_mm512_set1_ps(step), words, 0x3F800000);
    const __m512i sums = _mm512_permutexvar_epi16(in_turn, rounded_at_once(even, odd));
    return _mm512_ternarylogic_epi32(sums, sign, uppermost, 0xD2); /* sums ^ (~sign & uppermost) */
}

INLINE __m512 moved(__m512 value, __m512i sign, float step)
{
    const __m512i by = _mm512_castps_si512(_mm512_set1_ps(step)), uppermost = _mm512_set1_epi32((int)0x80000000u);
    const __m512i signed_step = _mm512_ternarylogic_epi32(by, sign, uppermost, 0xD2); /* by ^ (~sign & uppermost) */
    return _mm512_add_ps(nearest_floats(value), _mm512_castsi512_ps(signed_step));
}

INLINE void compute_moved(uint16_t *to, const uint8_t *codes, line on, const sign_words *signs, int from, int bit,
                          struct step by, int is_streamed)
{
    const __m512 first = fused(codes, on), then = fused(codes + 16, on);
    const __m512i sign = _mm512_slli_epi16(signs->of[from / STEP], (unsigned)(15 - bit));
    if (by.at_once) {
        put(to, moved_at_once(first, then, sign, by.set), is_streamed);
        return;
    }
    __m512 sum[2];
    for (int i = 0; i < 2; i++) {
        const __m256i half = i ? _mm512_extracti64x4_epi64(sign, 1) : _mm512_castsi512_si256(sign);
        sum[i] = moved(i ? then : first, _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16), by.set);
    }
    put(to, rounded_in_order(sum[0], sum[1], 0), is_streamed);
}

INLINE void compute_floats(float *to, const uint8_t *codes, float zero, float scale, int is_streamed)
{
    const __m512 z = _mm512_set1_ps(zero), s = _mm512_set1_ps(scale);
    for (int i = 0; i < STEP; i += 16) {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i)));
        const __m512 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(wide), z), s);
        put(to + i, _mm512_castps_si512(value), is_streamed);
    }
}

INLINE floats16 get_floats(const float *from) { return _mm512_loadu_ps(from); }
INLINE floats16 times(floats16 a, float scale) { return _mm512_mul_ps(a, _mm512_set1_ps(scale)); }

INLINE void look_up_floats(float *to, const uint8_t *codes, floats16 in, int is_high_first, int is_streamed)
{
    int32_t eight[2];
    memcpy(eight, codes, 8);
    const __m512i all = _mm512_inserti64x4(_mm512_set1_epi32(eight[0]), _mm256_set1_epi32(eight[1]), 1);
    const __m512i low_first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i shifts = _mm512_xor_si512(low_first, _mm512_set1_epi32(is_high_first ? 4 : 0));
    put(to, _mm512_castps_si512(_mm512_permutexvar_ps(_mm512_srlv_epi32(all, shifts), in)), is_streamed);
}

#endif
