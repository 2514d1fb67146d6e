/* lookup.h in vectors of 32 bytes; included by it alone. */
#ifndef SSDTUNE_LOOKUP_AVX2_H
#define SSDTUNE_LOOKUP_AVX2_H

enum { BYTES = 32, LOOKUP_BITS = 4, CAN_STREAM = 1 };
typedef __m256i bytes;
typedef struct { __m256 every4th[4]; } entries; /* 0, 4, 8, 12; then 1, 5, 9, 13; ...: in both halves */
typedef struct { __m256i low, high; } lookup;   /* bytes, in both halves */
typedef struct { lookup of[2]; } lookup_32;
typedef struct { __m256 first, second; } floats16;
typedef struct { __m256i of[LANES / 16]; } sign_words;
typedef struct { __m256 scale, less; } line;

INLINE bytes get(const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE void keep(uint8_t *to, bytes a) { _mm256_storeu_si256((__m256i *)to, a); }
INLINE bytes none(void) { return _mm256_setzero_si256(); }
INLINE bytes right(bytes a, int n) { return _mm256_srli_epi16(a, n); }
INLINE bytes left(bytes a, int n) { return _mm256_slli_epi16(a, n); }
INLINE bytes with(bytes a, bytes b, int mask)
{
    return _mm256_or_si256(a, _mm256_and_si256(b, _mm256_set1_epi8((char)mask)));
}

INLINE bytes mapped(bytes a, const uint8_t table[16])
{
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), a);
}

INLINE void put(void *to, __m256i a, int is_streamed)
{
    if (is_streamed)
        _mm256_stream_si256(to, a);
    else
        _mm256_storeu_si256(to, a);
}

INLINE void put_half(void *to, __m128i a, int is_streamed)
{
    if (is_streamed)
        _mm_stream_si128(to, a);
    else
        _mm_storeu_si128(to, a);
}

INLINE entries spread(const float *of)
{
    entries to;
    for (int i = 0; i < 4; i++)
        to.every4th[i] = _mm256_setr_ps(
            of[i], of[i + 4], of[i + 8], of[i + 12], of[i], of[i + 4], of[i + 8], of[i + 12]);
    return to;
}

/* Finite numbers to bfloat16, the even ones and the odd ones joined. */
INLINE __m256i rounded(__m256 even, __m256 odd)
{
    const __m256i a = _mm256_castps_si256(even), b = _mm256_castps_si256(odd);
    const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xAA);
    const __m256i lower = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xAA);
    /* Up where lower > 0x8000, or = 0x8000 and upper is odd: where lower - is_even has its uppermost bit set. */
    const __m256i is_even = _mm256_andnot_si256(upper, _mm256_set1_epi16(1));
    const __m256i up = _mm256_cmpgt_epi16(_mm256_setzero_si256(), _mm256_subs_epu16(lower, is_even));
    return _mm256_sub_epi16(upper, up);
}

INLINE __m256i scaled(__m256 even, __m256 odd, __m256 zero, __m256 scale)
{
    even = _mm256_mul_ps(_mm256_sub_ps(even, zero), scale);
    odd = _mm256_mul_ps(_mm256_sub_ps(odd, zero), scale);
    return rounded(even, odd);
}

INLINE __m256 halves(float first, float second)
{
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_set1_ps(first)), _mm_set1_ps(second), 1);
}

/* Two lookups of words in both halves, of which a has every other one, b those between. */
INLINE void split(lookup *first, lookup *second, __m256i a, __m256i b)
{
    const __m256i upper = _mm256_set1_epi16((short)0xFF00);
    const __m256i low = _mm256_blendv_epi8(a, _mm256_slli_epi16(b, 8), upper);
    const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi16(a, 8), b, upper);
    *first = (lookup){_mm256_permute4x64_epi64(low, 0x44), _mm256_permute4x64_epi64(high, 0x44)};
    *second = (lookup){_mm256_permute4x64_epi64(low, 0xEE), _mm256_permute4x64_epi64(high, 0xEE)};
}

INLINE void make_two(lookup to[2], entries of, float zero, float scale, float next_zero, float next_scale)
{
    const __m256 z = halves(zero, next_zero), s = halves(scale, next_scale);
    const __m256i a = scaled(of.every4th[0], of.every4th[2], z, s);
    split(to, to + 1, a, scaled(of.every4th[1], of.every4th[3], z, s));
}

INLINE int rounds_at_once(void) { return 0; }
INLINE int moves_at_once(struct step by) { return by.is_large; }

/* words, even and odd, and so much more. */
INLINE __m256i moved(__m256i words, __m256 even_by, __m256 odd_by)
{
    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32((int)0xFFFF0000u)));
    return rounded(_mm256_add_ps(even, even_by), _mm256_add_ps(odd, odd_by));
}

INLINE void make_moved(lookup_32 to[2], entries of, float zero, float scale, float next_zero, float next_scale,
                       struct step by)
{
    const __m256 z = halves(zero, next_zero), s = halves(scale, next_scale);
    const __m256i a = scaled(of.every4th[0], of.every4th[2], z, s), b = scaled(of.every4th[1], of.every4th[3], z, s);
    for (int i = 0; i < 2; i++) {
        const __m256 step = _mm256_set1_ps(i ? by.set : by.unset);
        split(&to[0].of[i], &to[1].of[i], moved(a, step, step), moved(b, step, step));
    }
}

INLINE __m256i twice(__m128i a) { return _mm256_inserti128_si256(_mm256_castsi128_si256(a), a, 1); }

INLINE lookup of_words(const uint16_t *words)
{
    const __m128i a = _mm_loadu_si128((const __m128i *)words), b = _mm_loadu_si128((const __m128i *)(words + 8));
    const __m128i low = _mm_set1_epi16(255);
    return (lookup){twice(_mm_packus_epi16(_mm_and_si128(a, low), _mm_and_si128(b, low))),
                    twice(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)))};
}

/* The middle two quarters change places: unpacking, which stays in the halves, then joins bytes in order. */
INLINE bytes crossed(bytes a) { return _mm256_permute4x64_epi64(a, 0xD8); }

INLINE void put_joined(uint16_t *to, bytes low, bytes high, int is_streamed)
{
    put(to, _mm256_unpacklo_epi8(low, high), is_streamed);
    put(to + 16, _mm256_unpackhi_epi8(low, high), is_streamed);
}

/* 32 codes below 16, crossed. */
INLINE void look_up_crossed(uint16_t *to, bytes codes, lookup in, int is_streamed)
{
    put_joined(to, _mm256_shuffle_epi8(in.low, codes), _mm256_shuffle_epi8(in.high, codes), is_streamed);
}

INLINE void look_up(uint16_t *to, const uint8_t *codes, const lookup in[2], int is_streamed)
{
    const bytes byte = crossed(get(codes)), mask = _mm256_set1_epi8(15);
    look_up_crossed(to, _mm256_and_si256(byte, mask), in[0], is_streamed);
    look_up_crossed(to + LANES, _mm256_and_si256(_mm256_srli_epi16(byte, 4), mask), in[1], is_streamed);
}

INLINE void look_up_32(uint16_t *to, const uint8_t *codes, lookup_32 in, int is_streamed)
{
    const bytes code = crossed(get(codes)), fifth = _mm256_slli_epi16(code, 3); /* the uppermost of a byte chooses */
    const bytes low = _mm256_blendv_epi8(
        _mm256_shuffle_epi8(in.of[0].low, code), _mm256_shuffle_epi8(in.of[1].low, code), fifth);
    const bytes high = _mm256_blendv_epi8(
        _mm256_shuffle_epi8(in.of[0].high, code), _mm256_shuffle_epi8(in.of[1].high, code), fifth);
    put_joined(to, low, high, is_streamed);
}

INLINE bytes five(bytes a, bytes b)
{
    return _mm256_or_si256(_mm256_and_si256(a, _mm256_set1_epi8(15)), _mm256_and_si256(b, _mm256_set1_epi8(16)));
}

INLINE bytes in_order(const uint8_t *codes, int is_high_first)
{
    const __m256i byte = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes));
    return is_high_first ? _mm256_or_si256(_mm256_srli_epi16(byte, 4), _mm256_slli_epi16(byte, 8))
                         : _mm256_or_si256(byte, _mm256_slli_epi16(byte, 4));
}

INLINE void look_up_nibbles(uint16_t *to, const uint8_t *codes, lookup in, int step, int is_high_first, int is_streamed)
{
    if (step == STEP) {
        const bytes code = _mm256_and_si256(in_order(codes, is_high_first), _mm256_set1_epi8(15));
        look_up_crossed(to, crossed(code), in, is_streamed);
    } else {
        const __m128i byte = _mm_loadl_epi64((const __m128i *)codes), mask = _mm_set1_epi8(15);
        const __m128i below = _mm_and_si128(byte, mask), above = _mm_and_si128(_mm_srli_epi16(byte, 4), mask);
        const __m128i code = is_high_first ? _mm_unpacklo_epi8(above, below) : _mm_unpacklo_epi8(below, above);
        const __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128(in.low), code);
        const __m128i high = _mm_shuffle_epi8(_mm256_castsi256_si128(in.high), code);
        put_half(to, _mm_unpacklo_epi8(low, high), is_streamed);
        put_half(to + 8, _mm_unpackhi_epi8(low, high), is_streamed);
    }
}

/* 16 bytes as the second lowest of 32-bit words. */
INLINE void widen(const uint8_t *from, __m256i *even, __m256i *odd)
{
    const __m256i evens = _mm256_setr_epi8(
        -1, 0, -1, -1, -1, 2, -1, -1, -1, 4, -1, -1, -1, 6, -1, -1, -1, 8, -1, -1, -1, 10, -1, -1, -1, 12, -1,
        -1, -1, 14, -1, -1);
    const __m256i byte = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)from));
    *even = _mm256_shuffle_epi8(byte, evens);
    *odd = _mm256_shuffle_epi8(byte, _mm256_or_si256(evens, _mm256_set1_epi32(0x0100)));
}

INLINE __m256i computed(const uint8_t *codes, float zero, float scale)
{
    /* A byte as the second lowest of 0x47000000 is the float 2^15 + it; the zero, 2^15 more, is taken away exactly. */
    const __m256i base = _mm256_set1_epi32(0x47000000);
    __m256i even, odd;
    widen(codes, &even, &odd);
    return scaled(_mm256_castsi256_ps(_mm256_or_si256(even, base)), _mm256_castsi256_ps(_mm256_or_si256(odd, base)),
                  _mm256_set1_ps(32768.0f + zero), _mm256_set1_ps(scale));
}

INLINE void compute_words(uint16_t *to, const uint8_t *codes, float zero, float scale, int is_streamed)
{
    for (int i = 0; i < STEP; i += 16)
        put(to + i, computed(codes + i, zero, scale), is_streamed);
}

INLINE line line_of(float scale, float less) { return (line){_mm256_set1_ps(scale), _mm256_set1_ps(less)}; }

/* Of 16 codes, even and odd ones. */
INLINE void fused(__m256 to[2], const uint8_t *codes, line on)
{
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes));
    const __m256i even = _mm256_and_si256(words, _mm256_set1_epi32(0xFFFF)), odd = _mm256_srli_epi32(words, 16);
    to[0] = _mm256_fmsub_ps(_mm256_cvtepi32_ps(even), on.scale, on.less);
    to[1] = _mm256_fmsub_ps(_mm256_cvtepi32_ps(odd), on.scale, on.less);
}

INLINE void compute_fused(uint16_t *to, const uint8_t *codes, line on, int at_once, int is_streamed)
{
    for (int i = 0; i < STEP; i += 16) {
        __m256 value[2];
        fused(value, codes + i, on);
        put(to + i, rounded(value[0], value[1]), is_streamed);
    }
}

INLINE sign_words widened(const uint8_t signs[LANES])
{
    sign_words to;
    for (int i = 0; i < LANES / 16; i++)
        to.of[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)signs + i));
    return to;
}

/* Numbers below 2^111 to the nearest ones that bfloat16 has; those below 2^-126 may stay as they are. Beside 2^16 times its
 * first bit a number's steps are bfloat16's. */
INLINE __m256 nearest_floats(__m256 value)
{
    const __m256 times = _mm256_set1_ps(0x1p16f), upper = _mm256_castsi256_ps(_mm256_set1_epi32((int)0xFF800000u));
    const __m256 first = _mm256_and_ps(value, upper);
    return _mm256_fnmadd_ps(first, times, _mm256_fmadd_ps(first, times, value));
}

INLINE void compute_moved(uint16_t *to, const uint8_t *codes, line on, const sign_words *signs, int from, int bit,
                          struct step by, int is_streamed)
{
    const __m256 unset = _mm256_set1_ps(by.unset), set = _mm256_set1_ps(by.set);
    for (int i = 0; i < STEP; i += 16) {
        const __m256i sign = signs->of[(from + i) / 16];
        const __m256 is_even_set = _mm256_castsi256_ps(_mm256_slli_epi32(sign, 31 - bit)); /* as uppermost bits, which */
        const __m256 is_odd_set = _mm256_castsi256_ps(_mm256_slli_epi32(sign, 15 - bit));  /* choose */
        const __m256 even = _mm256_blendv_ps(unset, set, is_even_set), odd = _mm256_blendv_ps(unset, set, is_odd_set);
        __m256 value[2];
        fused(value, codes + i, on);
        const __m256i words = by.at_once
            ? rounded(_mm256_add_ps(nearest_floats(value[0]), even), _mm256_add_ps(nearest_floats(value[1]), odd))
            : moved(rounded(value[0], value[1]), even, odd);
        put(to + i, words, is_streamed);
    }
}

INLINE void compute_floats(float *to, const uint8_t *codes, float zero, float scale, int is_streamed)
{
    const __m256 z = _mm256_set1_ps(zero), s = _mm256_set1_ps(scale);
    for (int i = 0; i < STEP; i += 8) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i)));
        const __m256 value = _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(wide), z), s);
        put(to + i, _mm256_castps_si256(value), is_streamed);
    }
}

INLINE floats16 get_floats(const float *from)
{
    return (floats16){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}

INLINE floats16 times(floats16 a, float scale)
{
    const __m256 s = _mm256_set1_ps(scale);
    return (floats16){_mm256_mul_ps(a.first, s), _mm256_mul_ps(a.second, s)};
}

INLINE void look_up_floats(float *to, const uint8_t *codes, floats16 in, int is_high_first, int is_streamed)
{
    const __m256i low_first = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i shifts = _mm256_xor_si256(low_first, _mm256_set1_epi32(is_high_first ? 4 : 0));
    for (int i = 0; i < HALF_STEP; i += 8) {
        int32_t eight;
        memcpy(&eight, codes + i / 2, 4);
        const __m256i found = _mm256_srlv_epi32(_mm256_set1_epi32(eight), shifts);  /* three bits count */
        const __m256 is_second = _mm256_castsi256_ps(_mm256_slli_epi32(found, 28)); /* and here the fourth */
        const __m256 value = _mm256_blendv_ps(
            _mm256_permutevar8x32_ps(in.first, found), _mm256_permutevar8x32_ps(in.second, found), is_second);
        put(to + i, _mm256_castps_si256(value), is_streamed);
    }
}

#endif
