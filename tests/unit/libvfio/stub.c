/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A stand-in for libvfio-user with the binary interface of v2: the same functions with the same arguments,
 * and nothing behind them but what a test asks for. A client sends it orders (struct order) over its socket,
 * and it calls the callbacks that it was given, as the library would for a request.
 *
 * -DNO_LIMIT: vfu_setup_device_dma as before March 2026, and the library's message of that time.
 * -DLACKS_REGION, -DHAS_V1_NAME, -DNO_TEXT: none of the revisions that are known.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define NUM_REGIONS 9
#define NUM_IRQS 5
#define NUM_RANGES 8
#define PAGES 1024

struct dma_info {
    struct iovec iova;
    void *vaddr;
    struct iovec mapping;
    size_t page_size;
    uint32_t prot;
};

struct sg {
    void *address;
    const struct dma_info *range;
    uint64_t length;
    uint64_t offset;
    bool writeable;
};

struct migration {
    int version;
    int (*transition)(void *, int);
    ssize_t (*read_data)(void *, void *, uint64_t);
    ssize_t (*write_data)(void *, void *, uint64_t);
};

struct context {
    int listener, client;
    ssize_t (*access[NUM_REGIONS])(void *, char *, size_t, loff_t, bool);
    size_t sizes[NUM_REGIONS];
    int flags[NUM_REGIONS], region_fds[NUM_REGIONS];
    uint32_t areas[NUM_REGIONS];
    int (*quiesce)(void *);
    int (*reset)(void *, int);
    void (*mapped)(void *, struct dma_info *);
    void (*unmapped)(void *, struct dma_info *);
    void (*irq_state[NUM_IRQS])(void *, uint32_t, uint32_t, bool);
    uint32_t irq_counts[NUM_IRQS], fired[8];
    struct migration migration;
    struct dma_info ranges[NUM_RANGES];
    uint8_t dirty[NUM_RANGES][PAGES];
    uint64_t limit, ioeventfds, shadow_sum, sgl_flags;
    int sgl_error, log_level;
    void (*log)(void *, int, const char *);
    bool has_eventfds, realized;
};

struct order {
    uint32_t what, index;
    uint64_t first, second;
    uint32_t flags, length;
};

struct result {
    int64_t value;
    int32_t error;
    uint32_t length;
};

enum what {
    ACCESS = 1, MAP, UNMAP, PEEK, POKE, RESET, TRANSITION, READ_DATA, WRITE_DATA, IRQ_STATE, FIRED, DIRTY,
    QUIESCE, FACT, EVENTFDS, SGL_ERROR,
};

#ifdef NO_LIMIT
const char *text(void) { return "hit max regions %d"; }
#elif !defined(NO_TEXT)
const char *text(void) { return "hit max regions %zu"; }
#endif

#ifdef HAS_V1_NAME
size_t vfu_get_migr_register_area_size(void) { return 4096; }
#endif

static int fail(int error)
{
    errno = error;
    return -1;
}

static int listen_at(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    if (fd >= 0 && (bind(fd, (void *)&address, sizeof(address)) < 0 || listen(fd, 0) < 0)) {
        int error = errno;
        close(fd);
        return fail(error);
    }
    return fd;
}

void *vfu_create_ctx(int transport, const char *path, int flags, void *private, int type)
{
    struct context *context = calloc(1, sizeof(*context));

    (void)private;
    context->client = -1;
    context->listener = transport == 0 && flags == 1 && type == 0 ? listen_at(path) : fail(EINVAL);
    if (context->listener < 0) {
        int error = errno;
        free(context);
        errno = error;
        return NULL;
    }
    return context;
}

int vfu_realize_ctx(struct context *context)
{
    context->realized = true;
    return 0;
}

int vfu_attach_ctx(struct context *context)
{
    context->client = accept4(context->listener, NULL, NULL, SOCK_CLOEXEC);
    if (context->client >= 0 && context->log_level >= 6)
        context->log(context, 6, "a client");
    return context->client < 0 ? -1 : 0;
}

int vfu_get_poll_fd(struct context *context)
{
    return context->client < 0 ? context->listener : context->client;
}

static void unmap(struct context *context, struct dma_info *range)
{
    context->unmapped(context, range);
    if (range->vaddr != NULL)
        munmap(range->mapping.iov_base, range->mapping.iov_len);
    memset(range, 0, sizeof(*range));
}

static void lose_client(struct context *context)
{
    if (context->realized) {
        context->quiesce(context);
        for (int i = 0; i < NUM_RANGES; i++)
            if (context->ranges[i].iova.iov_len != 0)
                unmap(context, &context->ranges[i]);
        context->reset(context, 1);
    }
    if (context->client >= 0)
        close(context->client);
    context->client = -1;
}

void vfu_destroy_ctx(struct context *context)
{
    lose_client(context);
    close(context->listener);
    free(context);
}

int vfu_setup_log(struct context *context, void *log, int level)
{
    context->log = log;
    context->log_level = level;
    return level >= 0 && level <= 7 ? 0 : fail(EINVAL);
}

#ifndef LACKS_REGION
int vfu_setup_region(struct context *context, int index, size_t size, void *access, int flags,
                     struct iovec *areas, uint32_t num_areas, int fd, uint64_t offset)
{
    if (index < 0 || index >= NUM_REGIONS || (flags & 3) == 0 || offset != 0 || (areas == NULL) != (num_areas == 0))
        return fail(EINVAL);
    context->access[index] = access;
    context->sizes[index] = size;
    context->flags[index] = flags;
    context->areas[index] = num_areas;
    context->region_fds[index] = fd;
    return 0;
}
#endif

int vfu_create_ioeventfd(struct context *context, uint32_t index, int fd, size_t offset, uint32_t size,
                         uint32_t flags, uint64_t datamatch, int shadow_fd, size_t shadow_offset)
{
    (void)flags, (void)datamatch;
    if (index >= NUM_REGIONS || fd < 0 || offset + size > context->sizes[index] || shadow_fd != -1)
        return fail(EINVAL);
    context->ioeventfds++;
    context->shadow_sum += shadow_offset;
    return 0;
}

int vfu_setup_device_reset_cb(struct context *context, void *reset)
{
    context->reset = reset;
    return 0;
}

void vfu_setup_device_quiesce_cb(struct context *context, void *quiesce)
{
    context->quiesce = quiesce;
}

int vfu_setup_device_nr_irqs(struct context *context, int index, uint32_t count)
{
    context->irq_counts[index] = count;
    return 0;
}

int vfu_setup_irq_state_callback(struct context *context, int index, void *callback)
{
    context->irq_state[index] = callback;
    return 0;
}

int vfu_irq_trigger(struct context *context, uint32_t vector)
{
    if (vector >= 8 || !context->has_eventfds)
        return fail(ENOENT);
    context->fired[vector]++;
    return 0;
}

#ifdef NO_LIMIT
int vfu_setup_device_dma(struct context *context, void *mapped, void *unmapped)
{
    uint64_t limit = 0;
#else
int vfu_setup_device_dma(struct context *context, size_t limit, void *mapped, void *unmapped)
{
#endif
    context->limit = limit;
    context->mapped = mapped;
    context->unmapped = unmapped;
    return 0;
}

int vfu_setup_device_migration_callbacks(struct context *context, const struct migration *callbacks)
{
    context->migration = *callbacks;
    return callbacks->version == 2 ? 0 : fail(EINVAL);
}

size_t dma_sg_size(void)
{
    return sizeof(struct sg);
}

int vfu_addr_to_sgl(struct context *context, void *address, size_t length, struct sg *sg, size_t most, int prot)
{
    for (int i = 0; i < NUM_RANGES && most > 0; i++) {
        struct dma_info *range = &context->ranges[i];
        uint64_t offset = (char *)address - (char *)range->iova.iov_base;

        if (address < range->iova.iov_base || offset + length > range->iova.iov_len)
            continue;
        if ((prot & PROT_WRITE) && !(range->prot & PROT_WRITE))
            return fail(EACCES);
        *sg = (struct sg){ range->iova.iov_base, range, length, offset, prot & PROT_WRITE };
        return 1;
    }
    return fail(ENOENT);
}

void vfu_sgl_mark_dirty(struct context *context, struct sg *sg, size_t count)
{
    for (uint64_t page = sg->offset >> 12; count == 1 && page <= (sg->offset + sg->length - 1) >> 12; page++)
        context->dirty[sg->range - context->ranges][page] = 1;
}

/* The next access by message fails so, if that was ordered. */
static int sgl_error(struct context *context)
{
    int error = context->sgl_error;

    context->sgl_error = 0;
    return error == 0 ? 0 : fail(error);
}

/* "By message": the test's bytes are kept in the mapping all the same, where PEEK and POKE find them. */
int vfu_sgl_read(struct context *context, struct sg *sg, size_t count, void *data, int flags)
{
    context->sgl_flags |= 1u << flags;
    if (sgl_error(context) < 0)
        return -1;
    memcpy(data, (char *)sg->range->mapping.iov_base + sg->offset, sg->length);
    return count == 1 ? 0 : fail(ENOTSUP);
}

int vfu_sgl_write(struct context *context, struct sg *sg, size_t count, void *data, int flags)
{
    context->sgl_flags |= 1u << flags;
    if (sgl_error(context) < 0)
        return -1;
    memcpy((char *)sg->range->mapping.iov_base + sg->offset, data, sg->length);
    return count == 1 && sg->writeable ? 0 : fail(ENOTSUP);
}

static struct dma_info *range_of(struct context *context, uint64_t address)
{
    for (int i = 0; i < NUM_RANGES; i++)
        if (context->ranges[i].iova.iov_len != 0 && (uint64_t)context->ranges[i].iova.iov_base == address)
            return &context->ranges[i];
    return NULL;
}

static int64_t map(struct context *context, const struct order *order)
{
    struct dma_info *range = &context->ranges[order->index];
    void *place = mmap(NULL, order->second, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | MAP_PRIVATE, -1, 0);

    memset(context->dirty[order->index], 0, PAGES);
    range->iova = (struct iovec){ (void *)order->first, order->second };
    range->mapping = (struct iovec){ place, order->second };
    range->page_size = 4096;
    range->prot = order->flags & 3;
    range->vaddr = order->flags & 4 ? NULL : place;
    context->mapped(context, range);
    return 0;
}

static int64_t fact(const struct context *context, const struct order *order)
{
    switch (order->index) {
    case 0: return context->limit;
    case 1: return context->ioeventfds;
    case 2: return context->shadow_sum;
    case 3: return context->sgl_flags;
    case 4: return context->realized;
    case 5: return context->sizes[order->first];
    case 6: return context->flags[order->first];
    case 7: return context->areas[order->first];
    case 8: return context->region_fds[order->first] >= 0;
    case 9: return context->irq_counts[order->first];
    default: return fail(EINVAL);
    }
}

static int64_t obey(struct context *context, const struct order *order, char *data, uint32_t *length)
{
    struct dma_info *range;
    int64_t value;

    *length = 0;
    switch (order->what) {
    case ACCESS:
        value = context->access[order->index](context, data, order->second, order->first, order->flags);
        *length = order->flags || value < 0 ? 0 : value;
        return value;
    case MAP:
        return map(context, order);
    case UNMAP:
        unmap(context, range_of(context, order->first));
        return 0;
    case PEEK:
        range = &context->ranges[order->index];
        memcpy(data, (char *)range->mapping.iov_base + order->first, *length = order->second);
        return order->second;
    case POKE:
        range = &context->ranges[order->index];
        memcpy((char *)range->mapping.iov_base + order->first, data, order->length);
        return order->length;
    case RESET:
        return context->reset(context, order->index);
    case TRANSITION:
        return context->migration.transition(context, order->index);
    case READ_DATA:
        value = context->migration.read_data(context, data, order->second);
        *length = value < 0 ? 0 : value;
        return value;
    case WRITE_DATA:
        return context->migration.write_data(context, data, order->length);
    case IRQ_STATE:
        context->irq_state[order->index](context, order->first, order->second, order->flags);
        return 0;
    case FIRED:
        return context->fired[order->index];
    case DIRTY:
        memcpy(data, context->dirty[order->index], *length = PAGES);
        memset(context->dirty[order->index], 0, PAGES);
        return 0;
    case QUIESCE:
        return context->quiesce(context);
    case FACT:
        return fact(context, order);
    case EVENTFDS:
        context->has_eventfds = order->flags;
        return 0;
    case SGL_ERROR:
        context->sgl_error = order->index;
        return 0;
    default:
        return fail(EINVAL);
    }
}

int vfu_run_ctx(struct context *context)
{
    static char data[1 << 20];
    struct order order;
    struct result result = { 0 };
    ssize_t got = recv(context->client, &order, sizeof(order), MSG_DONTWAIT);

    if (got < 0)
        return errno == EAGAIN ? 0 : -1;
    if (got == 0) {
        lose_client(context);
        return fail(ENOTCONN);
    }
    if (order.length != 0)
        recv(context->client, data, order.length, MSG_WAITALL);
    errno = 0;
    result.value = obey(context, &order, data, &result.length);
    result.error = result.value < 0 ? errno : 0;
    send(context->client, &result, sizeof(result), MSG_NOSIGNAL);
    if (result.length != 0)
        send(context->client, data, result.length, MSG_NOSIGNAL);
    return 1;
}
