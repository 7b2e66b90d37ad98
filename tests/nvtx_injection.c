/* A tool as NVTX sees one: what NVTX_INJECTION64_PATH names, which writes domains, strings and push/pop ranges to a file.
 *
 * One line an event, tab-separated: pid, thread, what (domain, string, push, pop), domain, registered (1) or not (0), text.
 * Lines go to the file that NVTX_INJECTION_LOG names, each with one write(2), so that processes may share it.
 *
 * The NVTX headers come with the CUDA toolkit and not with the Python package, so what is needed of them is declared here, from
 * nvtx3/nvtxDetail/nvtxTypes.h and nvToolsExt.h: NVTX 3 keeps it binary compatible. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ETID_CALLBACKS = 1, MODULE_CORE = 1, MODULE_CORE2 = 5 };
enum { CORE_RANGE_PUSH_EX = 8, CORE_RANGE_PUSH_A = 9, CORE_RANGE_POP = 11 };
enum { CORE2_RANGE_PUSH_EX = 4, CORE2_RANGE_POP = 5, CORE2_REGISTER_STRING_A = 10, CORE2_CREATE_A = 12 };
enum { MESSAGE_ASCII = 1, MESSAGE_REGISTERED = 3 };

typedef void (*function)(void);
typedef struct {
    size_t struct_size;
    int (*module_functions)(int module, function ***table, unsigned int *size);
} callbacks;

typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved0;
    uint64_t payload;
    int32_t message_type;
    union {
        const char *ascii;
        const void *registered;
    } message;
} event;

/* A domain's handle and a string's handle are whatever the tool returns: here the text itself. */

static void tell(const char *what, const char *domain, int registered, const char *text)
{
    char line[4096];
    const char *path = getenv("NVTX_INJECTION_LOG");
    int file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    if (file < 0)
        return;
    int length = snprintf(line, sizeof line, "%d\t%ld\t%s\t%s\t%d\t%s\n", (int)getpid(), (long)syscall(SYS_gettid), what,
                          domain ? domain : "", registered, text ? text : "");
    if (length >= (int)sizeof line) {
        length = sizeof line;
        line[length - 1] = '\n';
    }
    if (write(file, line, (size_t)length) < 0)
        perror("nvtx_injection");
    close(file);
}

static int push(const void *domain, const event *attributes)
{
    int registered = attributes->message_type == MESSAGE_REGISTERED;
    const char *text = registered ? attributes->message.registered : attributes->message_type == MESSAGE_ASCII ? attributes->message.ascii : "";
    tell("push", domain, registered, text);
    return 0;
}

static int pop(const void *domain)
{
    tell("pop", domain, 0, "");
    return 0;
}

static const void *register_string(const void *domain, const char *text)
{
    tell("string", domain, 1, text);
    return strdup(text);
}

static const void *create_domain(const char *name)
{
    tell("domain", name, 0, "");
    return strdup(name);
}

static int push_default(const event *attributes) { return push(NULL, attributes); }

static int push_default_ascii(const char *text)
{
    tell("push", NULL, 0, text);
    return 0;
}

static int pop_default(void) { return pop(NULL); }

static int put(const callbacks *table, int module, unsigned int id, function ours)
{
    function **slots = NULL;
    unsigned int size = 0;
    if (!table->module_functions(module, &slots, &size) || id >= size)
        return 0;
    *slots[id] = ours;
    return 1;
}

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t))
{
    const callbacks *table = export_table(ETID_CALLBACKS);
    return table && put(table, MODULE_CORE, CORE_RANGE_PUSH_EX, (function)push_default) &&
           put(table, MODULE_CORE, CORE_RANGE_PUSH_A, (function)push_default_ascii) &&
           put(table, MODULE_CORE, CORE_RANGE_POP, (function)pop_default) &&
           put(table, MODULE_CORE2, CORE2_RANGE_PUSH_EX, (function)push) &&
           put(table, MODULE_CORE2, CORE2_RANGE_POP, (function)pop) &&
           put(table, MODULE_CORE2, CORE2_REGISTER_STRING_A, (function)register_string) &&
           put(table, MODULE_CORE2, CORE2_CREATE_A, (function)create_domain);
}
