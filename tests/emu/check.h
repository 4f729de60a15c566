/* SPDX-License-Identifier: Apache-2.0
 *
 * What the C++ tests share. A test is a function between EMU_TEST(name) { and }; test_main.cc
 * runs them all, or those named on the command line.
 */
#ifndef EMU_CHECK_H
#define EMU_CHECK_H

#include <stdint.h>
#include <string>

/* Sanitizers and second compilers run fewer seeds. */
#ifndef EMU_TEST_THIN
#define EMU_TEST_THIN 1
#endif

namespace emu_test {

struct registration {
    registration(const char *name, void (*run)());
};

/* Prints the first failures of each test. */
void check_that(bool good, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* xorshift64*: the same numbers on every machine. */
struct rng {
    uint64_t state;
    explicit rng(uint64_t seed) : state((seed + 1) * 0x9E3779B97F4A7C15ull | 1) {
        for (int i = 0; i < 4; i++) next();
    }
    uint32_t next() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return static_cast<uint32_t>(state * 0x2545F4914F6CDD1Dull >> 32);
    }
    uint32_t below(uint32_t end) {
        return static_cast<uint32_t>(static_cast<uint64_t>(next()) * end >> 32);
    }
    float uniform(float low, float high) {
        return low + (high - low) * static_cast<float>(next() >> 8) * 0x1p-24f;
    }
};

/* text of an error that may be NULL */
inline std::string said(const char *error) { return error ? error : "no error"; }

} // namespace emu_test

#define EMU_TEST(name)                                                       \
    static void test_##name();                                               \
    static const emu_test::registration register_##name(#name, test_##name); \
    static void test_##name()

#define CHECK(condition, ...) \
    emu_test::check_that(static_cast<bool>(condition), __FILE__, __LINE__, __VA_ARGS__)
/* The launch must go well; or fail with a text that holds these words. */
#define CHECK_RUNS(launch)                                    \
    do {                                                      \
        const char *error_ = (launch);                        \
        CHECK(!error_, "%s", emu_test::said(error_).c_str()); \
    } while (0)
#define CHECK_FAILS(launch, words)                                                        \
    do {                                                                                  \
        const std::string error_ = emu_test::said(launch);                                \
        CHECK(error_.find(words) != std::string::npos, "\"%s\" expected, got: %s", words, \
              error_.c_str());                                                            \
    } while (0)

#endif /* EMU_CHECK_H */
