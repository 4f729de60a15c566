/* SPDX-License-Identifier: Apache-2.0
 *
 * All C++ tests of the emulation, or those whose name holds a word of the command line.
 */
#include "check.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <vector>

namespace emu_test {

namespace {

struct named_test {
    const char *name;
    void (*run)();
};

/* Filled before main, from other files, so made at its first use. */
std::vector<named_test> &tests() {
    static std::vector<named_test> list;
    return list;
}

const char *running = "";
long checks, failures, failures_shown;
constexpr long SHOW = 5; /* of a test */

bool wanted(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (strstr(name, argv[i])) return true;
    return argc == 1;
}

} // namespace

registration::registration(const char *name, void (*run)()) { tests().push_back({name, run}); }

void check_that(bool good, const char *file, int line, const char *format, ...) {
    checks++;
    if (good) return;
    failures++;
    if (failures_shown++ >= SHOW) return;
    printf("%s:%d: %s: ", file, line, running);
    va_list list;
    va_start(list, format);
    vprintf(format, list);
    va_end(list);
    printf("\n");
}

static int run_all(int argc, char **argv) {
    for (const named_test &test : tests()) {
        if (!wanted(test.name, argc, argv)) continue;
        const long checks_before = checks, failures_before = failures;
        const clock_t start = clock();
        running = test.name;
        failures_shown = 0;
        test.run();
        printf("%-24s %8ld checks %4ld failed %6.2f s\n", test.name, checks - checks_before,
               failures - failures_before, static_cast<double>(clock() - start) / CLOCKS_PER_SEC);
        fflush(stdout);
    }
    printf("%s: %ld checks, %ld failed\n", argv[0], checks, failures);
    return failures != 0 || checks == 0;
}

} // namespace emu_test

int main(int argc, char **argv) { return emu_test::run_all(argc, argv); }
