/* Faults, a clock that can be set, and a record of what the kernel was told: LD_PRELOAD for the processes of a daemon.
 *
 *   WORKERD_SHIM_CONTROL  a file with `struct control`, shared with the test, which changes it as it goes (see shim.py)
 *   WORKERD_SHIM_PREFIX   the files that faults and the record are about: those whose path begins so
 *   WORKERD_SHIM_TRACE    where the record goes, if one is wanted (see trace.py)
 *
 * A record is written before what it tells of is done, so that what follows from it comes later; what had another
 * outcome than asked for is followed by a RESULT of the same thread. A sync has one at its beginning, and its RESULT
 * at its end. Calls are made by syscall(2): nothing here comes back to itself.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITE = 1, TRUNCATE = 2, ALLOCATE = 4, SYNC = 8, CREATE = 16, READ = 32 }; /* what may fail */
enum { OPENED = 1, WROTE, TRUNCATED, ALLOCATED, SYNCED, RENAMED, LINKED, UNLINKED, MADE, SENT, RESULT };

struct control {
    int64_t clock;    /* nanoseconds that the wall clock is ahead */
    int64_t skip;     /* calls that still go well before the first failure */
    int64_t times;    /* calls that fail then */
    uint64_t failed;  /* calls that have failed */
    uint64_t stalled; /* syncs that are held up at present */
    uint32_t calls;   /* which calls fail, of WRITE...; 0: none */
    uint32_t error;   /* the errno that they fail with */
    uint32_t delay;   /* milliseconds that a sync takes longer, at most: setting it back lets it go at once */
    uint32_t largest; /* bytes of a write that are taken at once; 0: all */
};

struct record {
    uint32_t size; /* of all of it */
    uint32_t kind;
    int32_t process, thread;
    uint64_t inode;
    int64_t number; /* offset, length, flags or result */
    uint32_t first; /* bytes of the first of two paths */
    uint32_t unused;
};

#define FILES 65536
static struct { uint64_t inode; char *path; } files[FILES]; /* by descriptor; those of another inode are of the past */
static struct control idle, *control = &idle;
static const char *prefix;
static int trace = -1;
__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("WORKERD_SHIM_CONTROL");
    prefix = getenv("WORKERD_SHIM_PREFIX");
    int fd = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0) {
        void *memory = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (memory != MAP_FAILED) control = memory;
        syscall(SYS_close, fd);
    }
    if ((path = getenv("WORKERD_SHIM_TRACE"))) {
        fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
        trace = syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 900); /* out of everybody's way */
        syscall(SYS_close, fd);
    }
}

static int ours(const char *path) { return prefix && path && !strncmp(path, prefix, strlen(prefix)); }

static void record(int kind, uint64_t inode, int64_t number, const void *data, size_t size, const char *second)
{
    if (trace < 0) return;
    struct record head = {sizeof head + size + (second ? strlen(second) : 0), kind, syscall(SYS_getpid),
                          syscall(SYS_gettid), inode, number, size, 0};
    struct iovec parts[] = {{&head, sizeof head}, {(void *)data, size}, {(void *)second, second ? strlen(second) : 0}};
    int error = errno;
    if (syscall(SYS_writev, trace, parts, 3) != head.size) abort(); /* a record with gaps proves nothing */
    errno = error;
}

static long outcome(long result, long wanted)
{
    if (result != wanted) record(RESULT, 0, result, NULL, 0, NULL);
    return result;
}

static uint64_t identity(int fd)
{
    struct stat status;
    return fstat(fd, &status) ? 0 : status.st_ino ^ (uint64_t)status.st_dev << 44;
}

static void remember(int fd, const char *path)
{
    if (fd < 0 || fd >= FILES) return;
    files[fd].path = strdup(path); /* the old one may be in use elsewhere */
    files[fd].inode = identity(fd);
}

/* The path, for a file of ours; for a connection "", for all else NULL. */
static const char *known(int fd, uint64_t *inode)
{
    if (fd < 0 || fd >= FILES || !files[fd].inode || identity(fd) != files[fd].inode) return NULL;
    *inode = files[fd].inode;
    return files[fd].path;
}

static int fails(unsigned call)
{
    if (!(control->calls & call) || __atomic_fetch_sub(&control->skip, 1, __ATOMIC_SEQ_CST) > 0) return 0;
    if (__atomic_fetch_sub(&control->times, 1, __ATOMIC_SEQ_CST) <= 0) return 0;
    __atomic_fetch_add(&control->failed, 1, __ATOMIC_SEQ_CST);
    errno = control->error;
    return 1;
}

/* --- files */

static int open_(int directory, const char *path, int flags, mode_t mode)
{
    int created = flags & (O_CREAT | O_TRUNC);
    if (created && ours(path) && fails(CREATE)) return -1;
    int fd = syscall(SYS_openat, directory, path, flags, mode);
    if (fd >= 0 && ours(path)) {
        remember(fd, path);
        if (created) record(OPENED, files[fd].inode, flags, path, strlen(path), NULL);
    }
    return fd;
}

#define MODE(flags, mode) \
    mode_t mode = 0; \
    if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) { MODE(flags, mode) return open_(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, mode) return open_(AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags, mode) return open_(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags, mode) return open_(at, path, flags, mode); }

/* All that writes; an offset of -1 is the file's own, or its end. */
static ssize_t write_(int fd, const struct iovec *parts, int count, off_t offset)
{
    uint64_t inode;
    const char *path = known(fd, &inode);
    if (!path) return offset < 0 ? syscall(SYS_writev, fd, parts, count) : syscall(SYS_pwritev, fd, parts, count, offset, 0);
    size_t size = 0;
    for (int i = 0; i < count; i++) size += parts[i].iov_len;
    char *data = malloc(size + 1), *end = data;
    if (!data) abort();
    for (int i = 0; i < count; i++) end = mempcpy(end, parts[i].iov_base, parts[i].iov_len);
    ssize_t done = -1;
    if (!*path) {
        record(SENT, inode, 0, data, size, NULL);
        done = outcome(syscall(SYS_write, fd, data, size), size);
    } else if (!fails(WRITE)) {
        if (control->largest && size > control->largest) size = control->largest;
        off_t at = offset;
        if (at < 0) at = lseek(fd, 0, fcntl(fd, F_GETFL) & O_APPEND ? SEEK_END : SEEK_CUR);
        record(WROTE, inode, at, data, size, NULL);
        done = offset < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
        outcome(done, size);
    }
    free(data); /* keeps errno */
    return done;
}

ssize_t pread64(int fd, void *data, size_t size, off64_t at)
{
    uint64_t inode;
    return control->calls & READ && known(fd, &inode) && fails(READ) ? -1 : syscall(SYS_pread64, fd, data, size, at);
}
ssize_t pread(int fd, void *data, size_t size, off_t at) { return pread64(fd, data, size, at); }

static ssize_t write1(int fd, const void *data, size_t size, off_t offset)
{
    struct iovec part = {(void *)data, size};
    return write_(fd, &part, 1, offset);
}

ssize_t write(int fd, const void *data, size_t size) { return write1(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return write1(fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { return write1(fd, data, size, at); }
ssize_t writev(int fd, const struct iovec *parts, int count) { return write_(fd, parts, count, -1); }

static int resize(int call, int kind, int fd, off_t length, int (*change)(int, off_t))
{
    uint64_t inode;
    if (!known(fd, &inode)) return change(fd, length);
    if (fails(call)) return -1;
    record(kind, inode, length, NULL, 0, NULL);
    return outcome(change(fd, length), 0);
}

static int truncate_(int fd, off_t length) { return syscall(SYS_ftruncate, fd, length); }
static int allocate_(int fd, off_t end) { return syscall(SYS_fallocate, fd, 0, 0, end); }
int ftruncate(int fd, off_t length) { return resize(TRUNCATE, TRUNCATED, fd, length, truncate_); }
int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }
int posix_fallocate(int fd, off_t from, off_t size) 
{
    return resize(ALLOCATE, ALLOCATED, fd, from + size, allocate_) ? errno : 0;
}
int posix_fallocate64(int fd, off64_t from, off64_t size) { return posix_fallocate(fd, from, size); }

static int sync_(int fd, int number)
{
    uint64_t inode;
    const char *path = known(fd, &inode);
    if (!path || !*path) return syscall(number, fd);
    record(SYNCED, inode, 0, path, strlen(path), NULL);
    __atomic_fetch_add(&control->stalled, 1, __ATOMIC_SEQ_CST);
    for (uint32_t waited = 0; waited < control->delay; waited += 5)
        syscall(SYS_nanosleep, &(struct timespec){0, 5000000}, NULL);
    __atomic_fetch_sub(&control->stalled, 1, __ATOMIC_SEQ_CST);
    int result = fails(SYNC) ? -1 : syscall(number, fd);
    record(RESULT, inode, result, NULL, 0, NULL);
    return result;
}

int fsync(int fd) { return sync_(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_(fd, SYS_fdatasync); }

/* --- names: the record comes after, since few of these are ever made, and none fails */

static int named(int kind, const char *path, const char *second, long result)
{
    if (result == 0 && ours(path)) record(kind, 0, 0, path, strlen(path), second);
    return result;
}

int renameat(int at, const char *from, int to_at, const char *to)
{
    return named(RENAMED, from, to, syscall(SYS_renameat2, at, from, to_at, to, 0));
}
int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }
int linkat(int at, const char *from, int to_at, const char *to, int flags)
{
    return named(LINKED, from, to, syscall(SYS_linkat, at, from, to_at, to, flags));
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
int unlinkat(int at, const char *path, int flags) { return named(UNLINKED, path, NULL, syscall(SYS_unlinkat, at, path, flags)); }
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int mkdirat(int at, const char *path, mode_t mode) { return named(MADE, path, NULL, syscall(SYS_mkdirat, at, path, mode)); }
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
/* --- connections */

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    int accepted = syscall(SYS_accept4, fd, address, length, flags), domain = 0;
    socklen_t size = sizeof domain;
    if (accepted >= 0 && !getsockopt(accepted, SOL_SOCKET, SO_DOMAIN, &domain, &size) && domain == AF_UNIX)
        remember(accepted, "");
    return accepted;
}
int accept(int fd, struct sockaddr *address, socklen_t *length) { return accept4(fd, address, length, 0); }
static ssize_t send_(int fd, const struct msghdr *message, int flags)
{
    uint64_t inode;
    if (!known(fd, &inode)) return syscall(SYS_sendmsg, fd, message, flags);
    return write_(fd, message->msg_iov, message->msg_iovlen, -1); /* no descriptors go to clients */
}
ssize_t sendmsg(int fd, const struct msghdr *message, int flags) { return send_(fd, message, flags); }
ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t length)
{
    struct iovec part = {(void *)data, size};
    return send_(fd, &(struct msghdr){(void *)to, length, &part, 1, NULL, 0, 0}, flags);
}
ssize_t send(int fd, const void *data, size_t size, int flags) { return sendto(fd, data, size, flags, NULL, 0); }

/* --- the wall clock */

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) && control->clock) {
        int64_t total = now->tv_sec * 1000000000LL + now->tv_nsec + control->clock;
        *now = (struct timespec){total / 1000000000, total % 1000000000};
    }
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    *now = (struct timeval){exact.tv_sec, exact.tv_nsec / 1000};
    return 0;
}
time_t time(time_t *now)
{
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    return now ? (*now = exact.tv_sec) : exact.tv_sec;
}
