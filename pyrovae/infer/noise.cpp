// The numbers of torch's CPU generator, the Mersenne twister MT19937 (Matsumoto & Nishimura, 1998), drawn with vector
// instructions: torch draws them one by one, which takes four times (normal) to ten times (uniform) as long.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t N = 624, M = 397;

// The beginning of what torch.Generator.get_state() returns.
struct State {
    uint64_t seed;
    int32_t left;  // 1 + how many of the words from `next` on are yet to be handed out
    int32_t seeded;
    uint64_t next;
    uint64_t words[N];
};

uint32_t twist(uint32_t u, uint32_t v) {
    return (((u & 0x80000000u) | (v & 0x7fffffffu)) >> 1) ^ (-(v & 1u) & 0x9908b0dfu);
}

void renew(uint32_t* words) {
    for (int64_t i = 0; i < N - M; i++) words[i] = words[i + M] ^ twist(words[i], words[i + 1]);
#pragma omp simd safelen(16)
    for (int64_t i = N - M; i < N - 1; i++) words[i] = words[i + M - N] ^ twist(words[i], words[i + 1]);
    words[N - 1] = words[M - 1] ^ twist(words[N - 1], words[0]);
}

// Multiples of 2^-24 in [0, 1).
void temper(const uint32_t* words, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t y = words[i];
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680u;
        y ^= (y << 15) & 0xefc60000u;
        y ^= y >> 18;
        out[i] = static_cast<float>(static_cast<int32_t>(y & 0xffffffu)) * 0x1p-24f;
    }
}

// log x for x in [2^-24, 1]: with x = 2^k m, m in [sqrt 1/2, sqrt 2), and s = (m - 1) / (m + 1), log m = 2 atanh s.
// The polynomials here and below are least-squares fits of the relative error, reweighted to even it out (1e-9).
float logarithm(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    const int32_t k = (bits - 0x3f3504f3) >> 23;
    bits -= k << 23;
    float m;
    std::memcpy(&m, &bits, 4);
    const float s = (m - 1) / (m + 1), s2 = s * s;
    return static_cast<float>(k) * 0.693147181f +
           (s + s) * (1 + s2 * (0.33333407975f + s2 * (0.199873974772f + s2 * 0.149628253305f)));
}

// Box and Muller (1958): two normal numbers in the place of two uniform ones.
void to_normal(float& first, float& second) {
    const float radius = std::sqrt(-2 * logarithm(1 - first));
    // The angle is 2 pi `second`: `turn` quarter turns and 2 pi r more, |r| <= 1/8.
    const int32_t turn = static_cast<int32_t>(4 * second + 0.5f);
    const float r = second - 0.25f * static_cast<float>(turn), r2 = r * r;
    const float sine = r * (6.28318528683f + r2 * (-41.3416614551f + r2 * (81.5923535687f + r2 * -75.3935628227f)));
    const float cosine =
        1 + r2 * (-19.7392086504f + r2 * (64.9393162086f + r2 * (-85.4428521288f + r2 * 59.2204072494f)));
    const float x = turn & 1 ? sine : cosine, y = turn & 1 ? cosine : sine;
    first = radius * (turn == 1 || turn == 2 ? -x : x);
    second = radius * (turn & 2 ? -y : y);
}

// Pairs are eight apart, as in torch.
void sixteen_to_normal(float* data) {
#pragma omp simd
    for (int64_t j = 0; j < 8; j++) to_normal(data[j], data[j + 8]);
}

}  // namespace

// `count` uniform numbers; `state` becomes the one after them.
extern "C" bool uniforms(void* state, float* out, int64_t count) {
    State& generator = *static_cast<State*>(state);
    uint32_t words[N];
    for (int64_t i = 0; i < N; i++) words[i] = static_cast<uint32_t>(generator.words[i]);
    int64_t left = generator.left - 1, next = static_cast<int64_t>(generator.next);
    while (count > 0) {
        if (left == 0) {
            renew(words);
            left = N, next = 0;
        }
        const int64_t now = count < left ? count : left;
        temper(words + next, out, now);
        left -= now, next += now, out += now, count -= now;
    }
    generator.left = static_cast<int32_t>(left + 1);
    generator.next = static_cast<uint64_t>(next);
    for (int64_t i = 0; i < N; i++) generator.words[i] = words[i];
    return true;
}

// `count` standard normal numbers. As in torch, the last 16 are drawn anew unless they are a block of their own. False,
// with `state` as it was, for fewer: torch draws these in another way.
extern "C" bool normals(void* state, float* out, int64_t count) {
    if (count < 16) return false;
    uniforms(state, out, count);
    for (int64_t i = 0; i + 16 <= count; i += 16) sixteen_to_normal(out + i);
    if (count % 16 != 0) {
        uniforms(state, out + count - 16, 16);
        sixteen_to_normal(out + count - 16);
    }
    return true;
}

// `count` zeros and ones, ones with probabilities `probs`. False, with `state` as it was, where one is none.
extern "C" bool bernoullis(void* state, float* out, int64_t count, const float* probs) {
    bool valid = true;
    for (int64_t i = 0; i < count; i++) valid &= probs[i] >= 0 && probs[i] <= 1;
    if (!valid) return false;
    uniforms(state, out, count);
    for (int64_t i = 0; i < count; i++) out[i] = out[i] < probs[i] ? 1.0f : 0.0f;
    return true;
}
