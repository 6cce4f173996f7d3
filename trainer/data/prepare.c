/* prepare: the command line of `tessera data`. The work is in gsm8k.c, arithmetic.c, sort.c and show.c. */
#include "trainer/data/prepare.h"

#include "trainer/data/sources.h"

#include <errno.h>
#include <string.h>

static const char usage_gsm8k[] = "prepare gsm8k SOURCE_DIR OUT_DIR [key=value ...]";
static const char usage_arithmetic[] = "prepare arithmetic OUT_DIR [key=value ...]";
static const char usage_sort[] = "prepare sort OUT_DIR [key=value ...]";
static const char usage_show[] = "show FILE [N]";

status *parse_words(const struct option_table *t, void *base, int argc, char **argv, const char *where)
{
    TRY(options_defaults(t, base));
    for (int i = 0; i < argc; i++) {
        char key[64];
        const char *eq = strchr(argv[i], '=');
        if (!eq)
            return ERR(INVALID, "%s: \"%.100s\" is not of the form key=value", where, argv[i]);
        snprintf(key, sizeof key, "%.*s", (int)(eq - argv[i] < 63 ? eq - argv[i] : 63), argv[i]);
        TRY(options_set(t, key, eq + 1, base, where));
    }
    return NULL;
}

static status *prepare(int argc, char **argv)
{
    if (argc < 2)
        return ERR(INVALID, "data prepare: which data? (legal: %s; %s; %s)", usage_gsm8k, usage_arithmetic, usage_sort);
    if (!strcmp(argv[1], "gsm8k")) {
        if (argc < 4)
            return ERR(INVALID, "data prepare gsm8k: two folders are needed (%s)", usage_gsm8k);
        return prepare_gsm8k(argv[2], argv[3], argc - 4, argv + 4);
    }
    if (!strcmp(argv[1], "arithmetic")) {
        if (argc < 3)
            return ERR(INVALID, "data prepare arithmetic: a folder is needed (%s)", usage_arithmetic);
        return prepare_arithmetic(argv[2], argc - 3, argv + 3);
    }
    if (!strcmp(argv[1], "sort")) {
        if (argc < 3)
            return ERR(INVALID, "data prepare sort: a folder is needed (%s)", usage_sort);
        return prepare_sort(argv[2], argc - 3, argv + 3);
    }
    return ERR(INVALID, "data prepare: \"%.100s\" is no data we know (legal: gsm8k, arithmetic, sort)", argv[1]);
}

static status *show(int argc, char **argv)
{
    if (argc < 2 || argc > 3)
        return ERR(INVALID, "data show: a file is needed, and nothing but a number after it (%s)", usage_show);
    return show_file(argv[1], argc == 3 ? argv[2] : NULL);
}

static void help(void)
{
    printf("tessera data %s\n", usage_gsm8k);
    options_help(&gsm8k_options, stdout);
    printf("\ntessera data %s\n", usage_arithmetic);
    options_help(&arithmetic_options, stdout);
    printf("\ntessera data %s\n", usage_sort);
    options_help(&sort_options, stdout);
    printf("\ntessera data %s\n", usage_show);
}

status *data_cli(int argc, char **argv)
{
    status *st = NULL;
    if (argc < 1)
        return ERR(INVALID, "data: what shall be done? (legal: %s; %s; %s; %s)", usage_gsm8k, usage_arithmetic,
                   usage_sort, usage_show);
    if (!strcmp(argv[0], "prepare"))
        st = prepare(argc, argv);
    else if (!strcmp(argv[0], "show"))
        st = show(argc, argv);
    else if (!strcmp(argv[0], "help") || !strcmp(argv[0], "--help"))
        help();
    else
        return ERR(INVALID, "data: \"%.100s\" is no verb (legal: prepare, show, help)", argv[0]);
    if (!st && (fflush(stdout) || ferror(stdout)))
        st = ERR_SYS(errno, "data %s: cannot write to stdout", argv[0]);
    return st;
}
