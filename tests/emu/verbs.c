/* SPDX-License-Identifier: Apache-2.0
 *
 * The C tests of the verbs (tests/c) on the emulated GPU: odd shapes against an fp64 brute force,
 * for the sanitizers too. Verbs may be named on the command line.
 */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "../c/harness.h"

static const struct {
    const char *name;
    void (*run)(void);
} TESTS[] = {{"score", test_score}, {"permute", test_permute}, {"select", test_select}};

static int wanted(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], name) == 0) return 1;
    return argc == 1;
}

int main(int argc, char **argv) {
    for (size_t i = 0; i < sizeof TESTS / sizeof *TESTS; i++) {
        if (!wanted(TESTS[i].name, argc, argv)) continue;
        int checks = test_checks, failures = test_failures;
        clock_t start = clock();
        test_name = TESTS[i].name;
        TESTS[i].run();
        printf("%-8s %7d checks %3d failed %6.2f s\n", test_name, test_checks - checks,
               test_failures - failures, (double)(clock() - start) / CLOCKS_PER_SEC);
    }
    printf("%s: %d checks, %d failed\n", argv[0], test_checks, test_failures);
    return test_failures != 0;
}
